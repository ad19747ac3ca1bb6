//! What a run tells the world: printing, logging, callbacks, and the seed from which it can be repeated.

use std::any::Any;

use super::{Fabric, lock};
use crate::{error::Result, seed};

impl Fabric {
    /// Seed every random choice of this crate and its adapters, in the same way on all ranks; returns the seed. `None`
    /// takes FABRIC_SEED, or 0.
    ///
    /// # Errors
    /// When FABRIC_SEED is no number.
    pub fn seed_everything(seed: Option<u64>) -> Result<u64> {
        seed::seed_everything(seed)
    }

    /// Print a line once for each machine.
    pub fn print(&self, text: impl std::fmt::Display) {
        if self.local_rank() == 0 {
            println!("{text}");
        }
    }

    /// Give one number to every logger; rank 0 writes it.
    ///
    /// # Errors
    /// When a logger cannot write.
    pub fn log(&self, name: &str, value: f64, step: u64) -> Result<()> {
        self.log_dict(&[(name, value)], step)
    }

    /// Give several numbers to every logger; rank 0 writes them.
    ///
    /// # Errors
    /// When a logger cannot write.
    pub fn log_dict(&self, metrics: &[(&str, f64)], step: u64) -> Result<()> {
        if !self.is_global_zero() {
            return Ok(());
        }
        let metrics: Vec<_> = metrics
            .iter()
            .map(|(name, value)| (name.to_string(), *value))
            .collect();
        let mut loggers = lock(&self.inner.loggers);
        loggers
            .iter_mut()
            .try_for_each(|logger| logger.log_metrics(&metrics, step))
    }

    /// Call `hook` on every callback, in the order in which they were added. The payload is theirs to read and change.
    ///
    /// # Errors
    /// The first callback's that fails.
    pub fn call<P: Any>(&self, hook: &str, payload: &mut P) -> Result<()> {
        lock(&self.inner.callbacks).call(hook, payload)
    }
}
