//! NCCL, met at run time: its library is looked for when it is needed, never linked. A thin layer: [`Library`] has the
//! functions, [`Comm`] is one of its communicators with nothing added but that every call returns an error in words,
//! that no wait is without an end, and that one thread may abort what another waits for.
//!
//! Communicators are made in NCCL's non-blocking mode, so that no call blocks: what is in progress is asked for until it
//! is done, its time is up, or the group's [`Signal`](crate::signal::Signal) is raised.
#![allow(unsafe_code)]

mod collective;
mod comm;
mod communicator;
mod config;
mod dtype;
mod flight;
mod group;
mod library;
mod moves;
mod raw;
mod register;
mod watch;

pub use collective::{Operands, StreamHandle};
pub use comm::{Comm, Id, Progress};
pub use communicator::Nccl;
pub use config::Config;
pub use group::group;
pub use library::{FABRIC_NCCL, Library, Version};
pub use register::{Memory, Registration};
