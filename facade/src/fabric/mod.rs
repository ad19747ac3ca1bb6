//! The object that a training program holds: what was asked for, the job that was joined, and Fabric's verbs.

mod accumulate;
mod clip;
mod collectives;
mod first;
mod group;
mod leaving;
mod record;
mod shared_disk;
mod training;
mod values;
mod world;

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fabric_engine::{
    comm::{Aborter, Link, Spent, trace::Trace},
    shard::{SharedComm, plan},
};

pub use accumulate::{Accumulate, Micro};
pub use clip::Clip;
pub use training::FabricOptimizer;

use crate::{
    accelerator::{Device, Hardware},
    callback::{Callback, Callbacks},
    checkpoint::StateDictType,
    environment::{self, ClusterEnvironment, Detection, Lookup},
    error::{Error, Result},
    launch::{Job, supervise, threads},
    logger::{Logger, Loggers},
    model::Core,
    precision::{LossScaler, LossScalerState},
    rank_zero,
    resolve::{Devices, Precision, Request, Resolved, resolve},
    strategy::Strategy,
};
use world::World;

type Environments = Vec<Arc<dyn ClusterEnvironment>>;

/// Who started this process.
fn detect(own: &Environments, get: Lookup<'_>) -> Result<Detection> {
    let own: Vec<&dyn ClusterEnvironment> = own.iter().map(|own| &**own).collect();
    environment::detect_with(&own, get)
}

/// Whether this process has supervised ranks.
static SUPERVISED: AtomicBool = AtomicBool::new(false);

/// Lightning Fabric's object: made by [`Fabric::builder`], put to work by [`Fabric::launch`]. Clones share everything.
///
/// ```
/// use fabric::{Fabric, ReduceOp};
///
/// let fabric = Fabric::builder().accelerator("cpu").devices(2).strategy("ddp").build()?;
/// let sums = fabric.launch_threads(|fabric| {
///     let mut mine = vec![fabric.global_rank() as f32 + 1.0; 4];
///     fabric.all_reduce(&mut mine, ReduceOp::Sum)?;
///     Ok(mine[0])
/// })?;
/// assert_eq!(sums, [3.0, 3.0]);
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone)]
pub struct Fabric {
    inner: Arc<Inner>,
}

struct Inner {
    request: Request,
    environments: Environments,
    resolved: Resolved,
    options: plan::Options,
    scaler: Mutex<Option<LossScaler>>,
    world: Mutex<Option<World>>,
    models: Mutex<Arc<Vec<Arc<Core>>>>,
    loggers: Loggers,
    callbacks: Mutex<Callbacks>,
    warnings: Mutex<Vec<String>>,
}

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
    /// built in the type that [`Precision::policy`] names.
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

impl Fabric {
    /// Begin to choose.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Start the ranks and run `body` on each.
    ///
    /// With one device, or where a launcher such as torchrun has started the ranks already, `body` runs here and its
    /// value is returned. With several, this process only supervises: it runs this program again for every rank (each
    /// of which comes to this line and runs `body`), forwards signals, shows the first failure, leaves no process
    /// behind, and returns `None`.
    ///
    /// When it returns, the job has been left: loggers are finalized, and of the ranks' connections no thread, no open file and no
    /// memory is left in this process, once the models that were set up are dropped.
    ///
    /// Ranks that were started by the supervisor have no standard input. A program may launch several times, one after the
    /// other: the ranks run all of it, the supervisor waits once.
    ///
    /// # Errors
    /// `body`'s error, or the first failure among the ranks.
    pub fn launch<T>(&self, body: impl FnOnce(&Self) -> Result<T>) -> Result<Option<T>> {
        if self.lock_world().is_some() {
            return body(self).map(Some); // launched before
        }
        let get = |name: &str| std::env::var(name).ok();
        let place = detect(&self.inner.environments, &get)?.place;
        match place {
            Some(place) => world::as_rank(self, &place, body).map(Some),
            None if self.inner.resolved.world_size == 1 => {
                *self.lock_world() = Some(World::solo()?);
                let result = self.unless_it_panics(body);
                self.leave(result.as_ref().err());
                result.map(Some)
            }
            // The ranks have run the whole program, later launches included.
            None if SUPERVISED.swap(true, Ordering::Relaxed) => Ok(None),
            None => {
                let Resolved { num_nodes, .. } = self.inner.resolved;
                let job = Job::from_variables(self.inner.resolved.devices(), num_nodes, &get)?;
                supervise(job).map(|()| None)
            }
        }
    }

    /// Run `body` on every rank, each a thread of this process: for tests and notebooks. Returns the ranks' values.
    ///
    /// Rank 0 has the loggers, and the callbacks that were added; other ranks have [`Callback::twin`]s of them. Of a
    /// callback without twins the threads share one and take turns.
    ///
    /// # Errors
    /// The first failure among the ranks.
    pub fn launch_threads<T: Send>(
        &self,
        body: impl Fn(&Self) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let count = resolve(&self.inner.request, None, &Hardware::look())?.world_size;
        let meeting = world::Meeting::new()?;
        let fabrics: Vec<_> = (0..count).map(|rank| self.twin(rank)).collect();
        threads::run(count, threads::STACK_BYTES, |rank| {
            rank_zero::this_thread_is(rank);
            let fabric = fabrics[rank].clone();
            *fabric.lock_world() = Some(meeting.join(rank, count, &fabric.inner.resolved)?);
            let result = threads::caught(rank, || body(&fabric)); // the others are told what a panic says
            fabric.leave(result.as_ref().err());
            result
        })
    }

    /// A Fabric with the same choices, for a rank, that has not been launched.
    fn twin(&self, rank: usize) -> Self {
        let callbacks = lock(&self.inner.callbacks);
        let callbacks = match rank {
            0 => callbacks.clone(),
            _ => callbacks.twin(),
        };
        self.alike(None, callbacks)
    }

    /// A Fabric with the same choices in another world.
    fn alike(&self, world: Option<World>, callbacks: Callbacks) -> Self {
        let inner = &self.inner;
        Self {
            inner: Arc::new(Inner {
                request: inner.request.clone(),
                environments: inner.environments.clone(),
                resolved: inner.resolved.clone(),
                options: inner.options.clone(),
                scaler: Mutex::new(lock(&inner.scaler).clone()),
                world: Mutex::new(world),
                models: Mutex::default(),
                loggers: inner.loggers.clone(),
                callbacks: Mutex::new(callbacks),
                warnings: Mutex::default(),
            }),
        }
    }

    /// This process's rank among all; 0 before launch.
    pub fn global_rank(&self) -> usize {
        self.lock_world().as_ref().map_or(0, |world| world.rank)
    }

    /// This process's rank on its machine.
    pub fn local_rank(&self) -> usize {
        self.lock_world()
            .as_ref()
            .map_or(0, |world| world.local_rank)
    }

    /// The number of this machine.
    pub fn node_rank(&self) -> usize {
        self.lock_world()
            .as_ref()
            .map_or(0, |world| world.node_rank)
    }

    /// How many ranks there are; 1 before launch.
    pub fn world_size(&self) -> usize {
        self.lock_world().as_ref().map_or(1, |world| world.size)
    }

    /// How many ranks the job will have, already before launch: to check arguments once, and not on every rank.
    pub fn ranks(&self) -> usize {
        self.inner.resolved.world_size
    }

    /// Whether this is the rank that writes files and prints.
    pub fn is_global_zero(&self) -> bool {
        self.global_rank() == 0
    }

    /// The accelerator's name.
    pub fn accelerator(&self) -> &str {
        &self.inner.resolved.accelerator
    }

    /// The device that this rank computes on; before launch, the first rank's of this machine.
    pub fn device(&self) -> Device {
        self.inner.resolved.device(self.local_rank())
    }

    /// What connects the ranks: "shm", "unix" or "tcp". `None` before launch, for one rank, and for a group of ranks.
    pub fn wire(&self) -> Option<&'static str> {
        let world = self.lock_world();
        world.as_ref()?.wire.as_ref().map(|(name, _)| *name)
    }

    /// The strategy's name.
    pub fn strategy(&self) -> &'static str {
        self.inner.resolved.strategy.name
    }

    /// The form in which checkpoints are written.
    pub fn state_dict_type(&self) -> StateDictType {
        self.inner.resolved.state_dict_type
    }

    /// The precision.
    pub fn precision(&self) -> Precision {
        self.inner.resolved.precision
    }

    /// What the loss is multiplied by at present: 1, unless the precision is "16-mixed".
    pub fn loss_scale(&self) -> f64 {
        lock(&self.inner.scaler)
            .as_ref()
            .map_or(1.0, LossScaler::scale)
    }

    /// The state of the loss's scale, to be saved: `state.value("loss scale", &mut fabric.loss_scaler_state())`.
    pub fn loss_scaler_state(&self) -> Option<LossScalerState> {
        lock(&self.inner.scaler).as_ref().map(LossScaler::state)
    }

    /// Go on from a saved state of the loss's scale; nothing, where the loss is not scaled.
    ///
    /// # Errors
    /// When the state makes no sense.
    pub fn load_loss_scaler_state(&self, state: Option<LossScalerState>) -> Result<()> {
        match (lock(&self.inner.scaler).as_mut(), state) {
            (Some(scaler), Some(state)) => scaler.load_state(state),
            _ => Ok(()),
        }
    }

    /// Each choice with its reason, a line each; after launch, what connects the ranks too.
    pub fn explain(&self) -> String {
        let mut lines = self.inner.resolved.reasons.clone();
        if let Some(World { wire, .. }) = &*self.lock_world() {
            let line = |(name, why): &(&str, String)| format!("wire = {name}: {why}");
            lines.extend(wire.as_ref().map(line));
        }
        lines.join("\n")
    }

    /// What this rank has sent so far: collectives, messages and bytes, as the communicator counted them.
    ///
    /// # Errors
    /// Before launch.
    pub fn spent(&self) -> Result<Spent> {
        let mut spent = self.comm()?.lock().spent();
        for core in lock(&self.inner.models).iter() {
            spent += core.sequencer().groups().spent();
        }
        Ok(spent)
    }

    /// Measure what the wire between the ranks is like; `None` for one rank. All ranks call this together.
    ///
    /// # Errors
    /// Before launch, or when a rank is gone.
    pub fn measure_link(&self) -> Result<Option<Link>> {
        let comm = self.comm()?;
        let clock = comm.trace().clock();
        Ok(Link::measure(&mut **comm.lock(), &clock)?)
    }

    /// The record of gradients and collectives.
    ///
    /// # Errors
    /// Before launch.
    pub fn trace(&self) -> Result<Trace> {
        Ok(self.comm()?.trace())
    }

    /// A handle that ends the job from any thread.
    ///
    /// # Errors
    /// Before launch.
    pub fn aborter(&self) -> Result<Aborter> {
        Ok(self.comm()?.aborter())
    }

    /// What this rank was warned of so far; each was also printed once.
    pub fn warnings(&self) -> Vec<String> {
        lock(&self.inner.warnings).clone()
    }

    /// The job's communicator.
    pub(crate) fn comm(&self) -> Result<SharedComm> {
        let world = self.lock_world();
        let world = world.as_ref().ok_or_else(|| {
            Error::argument(
                "this needs the other ranks, but this rank has left the job, or the job was not launched",
                "Put the training code into fabric.launch(|fabric| ...)",
            )
        })?;
        Ok(world.comm.clone())
    }

    fn lock_world(&self) -> MutexGuard<'_, Option<World>> {
        lock(&self.inner.world)
    }

    pub(crate) fn warn(&self, text: String) {
        if self.is_global_zero() {
            eprintln!("fabric: warning: {text}");
        }
        lock(&self.inner.warnings).push(text);
    }
}

/// A panic of another thread leaves our lists as they are.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|held| held.into_inner())
}
