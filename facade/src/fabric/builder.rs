//! What can be chosen about a Fabric, and the moment in which it is checked.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use fabric_engine::shard::plan;

use super::{Environments, Fabric, Inner, detect};
use crate::{
    accelerator::Hardware,
    callback::{Callback, Callbacks},
    environment::ClusterEnvironment,
    error::Result,
    logger::{Logger, Loggers},
    precision::LossScaler,
    resolve::{Devices, Request, resolve},
    strategy::Strategy,
};

/// Everything that can be chosen; [`Builder::build`] checks it.
#[derive(Default)]
pub struct Builder {
    request: Request,
    environments: Environments,
    options: plan::Options,
    group: Option<usize>,
    scaler: Option<LossScaler>,
    loggers: Vec<Box<dyn Logger>>,
    callbacks: Callbacks,
}

impl Builder {
    /// The accelerator: "cpu", "cuda" (or "gpu"), "metal", "tpu", one of your own ([`crate::accelerator::register`]), or "auto"
    /// (the default).
    pub fn accelerator(mut self, name: &str) -> Self {
        self.request.accelerator = Some(name.into());
        self
    }

    /// How many devices of each machine, or which: `2`, `"auto"` (the default), `-1` for all, `[0, 2]` or `"0,2"`.
    pub fn devices(mut self, devices: impl Into<Devices>) -> Self {
        self.request.devices = devices.into();
        self
    }

    /// How many machines; on each of them the program is started once, or all of its ranks by a launcher.
    pub fn num_nodes(mut self, nodes: usize) -> Self {
        self.request.num_nodes = Some(nodes);
        self
    }

    /// A launcher of your own, whose ranks this program can be; asked before those that Fabric knows.
    pub fn environment(mut self, environment: impl ClusterEnvironment + 'static) -> Self {
        self.environments.push(Arc::new(environment));
        self
    }

    /// The strategy: "single", "ddp", "zero1", "zero2", "fsdp", "hsdp", one of Lightning's other names for these, one of your
    /// own ([`crate::strategy::Preset`]), or "auto" (the default).
    pub fn strategy(mut self, strategy: impl Into<Strategy>) -> Self {
        self.request.strategy = Some(strategy.into());
        self
    }

    /// The strategy's mesh: how many ranks share the work of one replica under "hsdp".
    pub fn group(mut self, ranks: usize) -> Self {
        self.options.group = Some(ranks);
        self.group = Some(ranks);
        self
    }

    /// The precision: "32-true" (the default), "64-true", "bf16-true", "16-true", "bf16-mixed" or "16-mixed". The model is
    /// built in the type that [`crate::precision::Precision::policy`] names.
    pub fn precision(mut self, name: &str) -> Self {
        self.request.precision = Some(name.into());
        self
    }

    /// How the loss is scaled under "16-mixed"; the default is torch's rule.
    pub fn loss_scaler(mut self, scaler: LossScaler) -> Self {
        self.scaler = Some(scaler);
        self
    }

    /// How a model is cut: buckets, units, types.
    pub fn buckets(mut self, options: plan::Options) -> Self {
        self.options = options;
        self
    }

    /// The form of checkpoints: "full" is one file, which rank 0 writes; "sharded", the default where parameters are, is a
    /// folder, to which every rank writes what it holds. See [`crate::checkpoint`].
    pub fn state_dict_type(mut self, form: &str) -> Self {
        self.request.state_dict_type = Some(form.into());
        self
    }

    /// What connects the ranks: "shm" (shared memory), "unix" (Unix sockets), "tcp", or "auto" (the default), the first of
    /// these that reaches all ranks.
    pub fn wire(mut self, name: &str) -> Self {
        self.request.wire = Some(name.into());
        self
    }

    /// How long one collective may take before it fails and names who is missing; 600 s unless told otherwise.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.request.timeout = Some(timeout);
        self
    }

    /// Add a logger. Rank 0 writes to it.
    pub fn logger(mut self, logger: impl Logger + 'static) -> Self {
        self.loggers.push(Box::new(logger));
        self
    }

    /// Add a callback.
    pub fn callback(mut self, callback: impl Callback) -> Self {
        self.callbacks.add(Box::new(callback));
        self
    }

    /// Add callbacks of any types.
    pub fn callbacks(mut self, callbacks: impl IntoIterator<Item = Box<dyn Callback>>) -> Self {
        callbacks
            .into_iter()
            .for_each(|callback| self.callbacks.add(callback));
        self
    }

    /// Check everything.
    ///
    /// # Errors
    /// When a name is unknown, choices contradict each other, or the environment's rank variables are malformed.
    pub fn build(self) -> Result<Fabric> {
        let get = |name: &str| std::env::var(name).ok();
        let request = self.request.with_environment(&get)?;
        let started_by = detect(&self.environments, &get)?;
        let resolved = resolve(&request, Some(&started_by), &Hardware::look())?;
        let policy = resolved.precision.policy();
        let mut options = self.options;
        resolved.preset.apply(&mut options);
        crate::resolve::check_group(&resolved.strategy, self.group)?;
        if policy.is_mixed() {
            options.main_dtype.get_or_insert(policy.main);
        }
        let scaler = resolved.precision.scaler();
        let scaler = scaler.map(|usual| self.scaler.unwrap_or(usual));
        Ok(Fabric {
            inner: Arc::new(Inner {
                request,
                environments: self.environments,
                resolved,
                options,
                scaler: Mutex::new(scaler),
                world: Mutex::new(None),
                models: Mutex::default(),
                loggers: Loggers::new(self.loggers),
                callbacks: Mutex::new(self.callbacks),
                warnings: Mutex::default(),
            }),
        })
    }
}
