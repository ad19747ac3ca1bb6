//! Loggers: where a run's numbers go.

mod csv;

pub use csv::CsvLogger;

use crate::Result;

/// A place for a run's numbers. Fabric calls it on rank 0 only, so that an implementation need not know of ranks.
pub trait Logger: Send {
    /// The logger's name.
    fn name(&self) -> &str;

    /// Keep `metrics` of `step`. When this returns, the numbers survive the death of the process.
    ///
    /// # Errors
    /// When they cannot be kept.
    fn log_metrics(&mut self, metrics: &[(String, f64)], step: u64) -> Result<()>;

    /// Keep the run's settings.
    ///
    /// # Errors
    /// When they cannot be kept.
    fn log_hyperparams(&mut self, hyperparams: &serde_json::Value) -> Result<()> {
        let _ = hyperparams;
        Ok(())
    }

    /// Bring all that was logged onto the disk, so that it survives the death of the machine too.
    ///
    /// # Errors
    /// When that fails.
    fn flush(&mut self) -> Result<()>;
}
