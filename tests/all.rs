//! One test binary: the rooms' tests against each other.

mod bits;
mod blocks;
mod checkpoint;
mod circle;
mod corners;
mod ddp;
mod exhaustive;
mod facade;
mod footprint;
mod fsdp;
mod mixed;
mod optim;
mod parity;
mod planner;
mod plans;
mod process;
mod puppet;
mod ranks;
mod sharded;
mod sim;
mod steady;
mod steps;
mod strangers;
mod telling;
mod tidy;
mod zero;
