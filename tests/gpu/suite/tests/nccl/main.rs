//! The engine's layer over NCCL, against the stand-in: every operation and dtype, groups, splits, registrations, and
//! everything that can end badly.

mod arithmetic;
mod calls;
mod ends;
mod loading;
mod ranks;
mod splits;
mod strict;
