//! A callback that logs learning rates.

use super::{Callback, Moment, Progress};
use crate::{Fabric, Result};

/// Logs the loop's learning rates every so many batches: `lr`, or `lr-NAME` where they have names of their own.
#[derive(Clone, Debug)]
pub struct LearningRateMonitor {
    every: u64,
}

impl LearningRateMonitor {
    /// After every batch.
    pub fn new() -> Self {
        Self { every: 1 }
    }

    /// After every so many batches.
    pub fn every(mut self, batches: u64) -> Self {
        self.every = batches.max(1);
        self
    }
}

impl Default for LearningRateMonitor {
    fn default() -> Self {
        Self::new()
    }
}

impl Callback for LearningRateMonitor {
    fn on_train_batch_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        let Progress { batches, steps, .. } = moment.progress;
        if moment.learning_rates.is_empty() || !batches.is_multiple_of(self.every) {
            return Ok(());
        }
        let name = |name: &str| match name {
            "lr" => name.to_string(),
            _ => format!("lr-{name}"),
        };
        let rates = moment.learning_rates.iter();
        let named: Vec<_> = rates.map(|(own, rate)| (name(own), rate)).collect();
        let rates: Vec<_> = named
            .iter()
            .map(|(name, rate)| (name.as_str(), *rate))
            .collect();
        fabric.log_dict(&rates, steps)
    }

    fn twin(&self) -> Option<Box<dyn Callback>> {
        Some(Box::new(self.clone()))
    }
}
