//! The engine under Fabric for Rust: collectives between ranks, and the question of who holds which piece of a model
//! and when. It has never heard of a tensor library: it meets tensors through [`buffer::Buffer`].
//!
//! Read in this order: [`buffer`], [`comm`], [`shard`]; then, for what happens underneath, [`schedule`], [`wire`] and
//! [`rendezvous`].
#![deny(unsafe_code)]

pub mod buffer;
pub mod clock;
pub mod comm;
pub mod error;
pub mod rendezvous;
pub mod schedule;
pub mod shard;
pub mod signal;
pub mod wire;

pub use error::{Error, Result};
pub use fabric_kernels as kernels;
