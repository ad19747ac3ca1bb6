//! Lightning Fabric for Rust, over any tensor library: change five lines of a training loop and get N devices.
#![forbid(unsafe_code)]

pub mod callback;
pub mod data;
pub mod environment;
pub mod error;
pub mod launch;
pub mod logger;
pub mod seed;

pub use error::{Error, Result};
pub use fabric_engine as engine;
