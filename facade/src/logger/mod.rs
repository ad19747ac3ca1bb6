//! Loggers: where a run's numbers go.
//!
//! | logger | writes | non-finite numbers |
//! |---|---|---|
//! | [`CsvLogger`] | one table, `metrics.csv`, and `hparams.json` | `nan`, `inf`, `-inf` |
//! | [`JsonlLogger`] | one JSON object a line, `metrics.jsonl` | `"NaN"`, `"Infinity"`, `"-Infinity"` |
//! | [`TensorBoardLogger`] | an event file for TensorBoard | as they are |
//!
//! All of them hand each row to the system at once: a process that is killed has lost none.

mod csv;
mod file;
mod flat;
mod folder;
mod jsonl;
mod record;
mod tensorboard;
mod wire;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

pub use csv::CsvLogger;
pub(crate) use file::replace as replace_file;
pub use folder::{RunFolder, Version};
pub use jsonl::JsonlLogger;
pub use record::{checksum, read_records};
pub use tensorboard::TensorBoardLogger;

use crate::{Result, turn::Turn};

/// How a run has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// By itself.
    Success,
    /// With an error or a panic.
    Failed,
    /// By a signal.
    Interrupted,
}

impl Status {
    /// "success", "failed" or "interrupted".
    pub fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
        }
    }
}

/// A place for a run's numbers. Fabric calls it on rank 0 only, so that an implementation need not know of ranks.
pub trait Logger: Send {
    /// The logger's name: of the experiment, where it has one.
    fn name(&self) -> &str;

    /// The run's version, which is chosen when it is first needed; `None` where runs have none.
    ///
    /// # Errors
    /// When none can be chosen.
    fn version(&mut self) -> Result<Option<String>> {
        Ok(None)
    }

    /// The folder in which all experiments are.
    fn root_dir(&self) -> Option<PathBuf> {
        None
    }

    /// The folder of this run, which is made when it is first needed; `None` where runs have none.
    ///
    /// # Errors
    /// When it cannot be made.
    fn log_dir(&mut self) -> Result<Option<PathBuf>> {
        Ok(None)
    }

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

    /// Keep a text of `step`, where the logger has a place for one.
    ///
    /// # Errors
    /// When it cannot be kept.
    fn log_text(&mut self, name: &str, text: &str, step: u64) -> Result<()> {
        let _ = (name, text, step);
        Ok(())
    }

    /// Bring all that was logged onto the disk, so that it survives the death of the machine too.
    ///
    /// # Errors
    /// When that fails.
    fn flush(&mut self) -> Result<()>;

    /// The run has ended; another one in the same process may go on.
    ///
    /// # Errors
    /// When something could not be brought onto the disk.
    fn finalize(&mut self, status: Status) -> Result<()> {
        let _ = status;
        self.flush()
    }
}

/// The loggers of a job, which its ranks in this process share.
#[derive(Clone, Default)]
pub(crate) struct Loggers(Arc<Vec<Turn<Box<dyn Logger>>>>);

impl Loggers {
    pub(crate) fn new(loggers: Vec<Box<dyn Logger>>) -> Self {
        Self(Arc::new(loggers.into_iter().map(Turn::new).collect()))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Turn<Box<dyn Logger>>> {
        self.0.iter()
    }
}

/// Seconds since 1970, for the reader of a log.
fn wall_time() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |time| time.as_secs_f64())
}

/// `prefix-name`, or the name alone.
fn prefixed(prefix: &str, name: &str) -> String {
    match prefix {
        "" => name.to_string(),
        _ => format!("{prefix}-{name}"),
    }
}
