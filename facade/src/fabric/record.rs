//! What a run tells the world: printing, logging, callbacks, and the seed from which it can be repeated.

use std::any::Any;

use serde::Serialize;
use serde_json::{Map, Value};

use super::{Fabric, lock};
use crate::{
    callback::{Callback, Callbacks, Hook, Moment},
    error::{Error, Result},
    logger::{Logger, Status},
    rank_zero, seed,
};

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

    /// Give several numbers to every logger; rank 0 writes them. The numbers of ranks are not combined:
    /// [`Fabric::all_reduce_value`] does that.
    ///
    /// # Errors
    /// When a logger cannot write.
    pub fn log_dict(&self, metrics: &[(&str, f64)], step: u64) -> Result<()> {
        let metrics: Vec<_> = metrics
            .iter()
            .map(|(name, value)| (name.to_string(), *value))
            .collect();
        self.each_logger(|logger| logger.log_metrics(&metrics, step))
    }

    /// Give the run's settings to every logger; rank 0 writes them. Loggers that need flat names join nested ones with `/`.
    ///
    /// ```
    /// use fabric::{Fabric, logger::CsvLogger};
    ///
    /// #[derive(serde::Serialize)]
    /// struct Settings { lr: f64, layers: Vec<u32> }
    ///
    /// let folder = tempfile::tempdir()?;
    /// let fabric = Fabric::builder().logger(CsvLogger::new(folder.path(), "runs")).build()?;
    /// fabric.log_hyperparams(&Settings { lr: 0.1, layers: vec![64, 10] })?;
    /// assert!(folder.path().join("runs/version_0/hparams.json").exists());
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// When they cannot be written, or serde cannot turn them into JSON.
    pub fn log_hyperparams(&self, hyperparams: &impl Serialize) -> Result<()> {
        let hyperparams = serde_json::to_value(hyperparams)?;
        self.each_logger(|logger| logger.log_hyperparams(&hyperparams))
    }

    /// Use the first logger on rank 0, and return what `f` returns; `None` on other ranks, where nothing is logged.
    ///
    /// ```
    /// use fabric::{Fabric, logger::CsvLogger};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let fabric = Fabric::builder().logger(CsvLogger::new(folder.path(), "runs")).build()?;
    /// let folder_of_run = fabric.logger(|logger| logger.log_dir())?;
    /// assert_eq!(folder_of_run, Some(Some(folder.path().join("runs/version_0"))));
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// `f`'s, or when there is no logger.
    pub fn logger<T>(&self, f: impl FnOnce(&mut dyn Logger) -> Result<T>) -> Result<Option<T>> {
        let logger = self.inner.loggers.iter().next().ok_or_else(|| {
            Error::argument(
                "this Fabric has no logger",
                "Add one: Fabric::builder().logger(CsvLogger::new(\"logs\", \"run\"))",
            )
        })?;
        if !self.logs() {
            return Ok(None);
        }
        let mut logger = logger.take().ok_or_else(in_use)?;
        f(&mut **logger).map(Some)
    }

    /// Use all loggers on rank 0, one after the other; there may be none.
    ///
    /// # Errors
    /// The first of `f`'s.
    pub fn loggers(&self, f: impl FnMut(&mut dyn Logger) -> Result<()>) -> Result<()> {
        self.each_logger(f)
    }

    /// Whether this is rank 0, also before it has joined the job.
    fn logs(&self) -> bool {
        let joined = self.lock_world().as_ref().map(|world| world.job_rank);
        joined.or_else(rank_zero::rank).unwrap_or(0) == 0
    }

    fn each_logger(&self, mut f: impl FnMut(&mut dyn Logger) -> Result<()>) -> Result<()> {
        if !self.logs() {
            return Ok(());
        }
        self.inner
            .loggers
            .iter()
            .try_for_each(|logger| f(&mut **logger.take().ok_or_else(in_use)?))
    }

    /// The job has ended, so or so.
    pub(super) fn finalize_loggers(&self, error: Option<&Error>) {
        let status = match error {
            None => Status::Success,
            Some(error) if crate::launch::is_interruption(error) => Status::Interrupted,
            Some(_) => Status::Failed,
        };
        self.finalize_with(status, true);
    }

    /// Nothing can be returned here: the body's own result counts. Without patience, a logger that is in use is left alone.
    pub(super) fn finalize_with(&self, status: Status, patient: bool) {
        if !self.is_global_zero() || self.lock_world().is_none() {
            return; // who has never joined has logged nothing
        }
        for logger in self.inner.loggers.iter() {
            let logger = match patient {
                true => logger.take(),
                false => logger.try_take(),
            };
            let result = logger.map(|mut logger| logger.finalize(status));
            if let Some(Err(error)) = result {
                self.warn(format!("a logger could not be finalized: {error}"));
            }
        }
    }

    /// Announce a moment to every callback of this rank, in the order in which they were added.
    ///
    /// # Errors
    /// The first callback's that fails; those after it are not told.
    pub fn notify(&self, hook: Hook, moment: &mut Moment<'_>) -> Result<()> {
        self.callbacks().notify(hook, self, moment)
    }

    /// Announce a moment of the program's own to every callback of this rank, in the order in which they were added. The
    /// payload is theirs to read and change.
    ///
    /// # Errors
    /// The first callback's that fails.
    pub fn call<P: Any>(&self, hook: &str, payload: &mut P) -> Result<()> {
        self.callbacks().call(self, hook, payload)
    }

    /// Use this rank's first callback of type `C`, to see or change what it knows; `None` when there is none.
    ///
    /// # Errors
    /// `f`'s.
    pub fn with_callback<C: Callback, T>(
        &self,
        f: impl FnOnce(&mut C) -> Result<T>,
    ) -> Result<Option<T>> {
        self.callbacks().find(f).transpose()
    }

    /// Add a callback on this rank, after those that it has. Every rank that wants one adds its own.
    pub fn add_callback(&self, callback: impl Callback) {
        lock(&self.inner.callbacks).add(Box::new(callback));
    }

    /// What all callbacks of this rank have to remember, to be saved: a map from their names, to be given to
    /// [`crate::State::value`]. A callback that is running is left out: take the states before a moment is announced, not in it.
    ///
    /// # Errors
    /// When a callback cannot write its state.
    pub fn callback_states(&self) -> Result<Map<String, Value>> {
        self.callbacks().states()
    }

    /// Go on from saved states. Callbacks of which there is none begin anew.
    ///
    /// # Errors
    /// When a state does not fit its callback.
    pub fn load_callback_states(&self, states: &Map<String, Value>) -> Result<()> {
        self.callbacks().load_states(states)
    }

    /// Not locked while one runs.
    fn callbacks(&self) -> Callbacks {
        lock(&self.inner.callbacks).clone()
    }
}

fn in_use() -> Error {
    Error::argument(
        "a logger was asked to log while this thread is using it",
        "Inside fabric.logger(|logger| ...) and fabric.loggers(..) use the logger that you are given",
    )
}
