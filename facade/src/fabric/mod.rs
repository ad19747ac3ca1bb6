//! The object that a training program holds: what was asked for, the job that was joined, and Fabric's verbs.

mod accumulate;
mod builder;
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

use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};

use fabric_engine::{
    comm::{Aborter, Link, Spent, trace::Trace},
    kernels,
    shard::{SharedComm, plan},
};

pub use accumulate::{Accumulate, Micro};
pub use builder::Builder;
pub use clip::Clip;
pub use training::FabricOptimizer;

use crate::{
    accelerator::{Device, Hardware},
    callback::Callbacks,
    checkpoint::StateDictType,
    environment::{self, ClusterEnvironment, Detection, Lookup},
    error::{Error, Result},
    launch::{Job, supervise, threads},
    logger::Loggers,
    model::Core,
    precision::{LossScaler, LossScalerState},
    rank_zero,
    resolve::{Precision, Request, Resolved, resolve},
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
                *self.lock_world() = Some(World::solo(&self.inner.resolved)?);
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
    /// Rank 0 has the loggers, and the callbacks that were added; other ranks have
    /// [twins](crate::callback::Callback::twin) of them. Of a callback without twins the threads share one and take turns.
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
            let result = threads::caught(rank, || fabric.to_the_end(&body)); // the others are told what a panic says
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

    /// This rank's device as an adapter needs it: whose memory gradients and parameters of its own lie in, and the queue on
    /// which Fabric works over them. `None` on a CPU, and before launch.
    pub fn queue(&self) -> Option<Arc<dyn kernels::Device>> {
        let world = self.lock_world();
        world.as_ref()?.comm.device().cloned()
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
