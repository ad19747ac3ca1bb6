//! NVIDIA's devices: a [`Queue`] is a stream of one of them, with the kernels of `kernels/cuda` behind the verbs.
//!
//! This is an unsafe room: addresses of device memory become arguments of the driver here, and nowhere else.

mod abi;
mod driver;
mod functions;
mod memory;
mod pending;
mod queue;
mod staging;
mod tasks;
mod turns;

pub use driver::{devices, ready};
pub use queue::Queue;
