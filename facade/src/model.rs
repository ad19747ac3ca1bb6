//! What a tensor library must offer, and what it gets: an adapter implements [`Model`] and [`Backward`] for its library
//! and reports gradients to [`Events`]. Nobody's tensor type appears here.

use std::{
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use fabric_engine::{
    Error as EngineError, Result as EngineResult,
    buffer::Buffer,
    comm::{Link, Spent},
    kernels::{self, Span},
    shard::{
        Parameters, SharedComm,
        plan::{Footprint, Forecast, Piece, Plan},
        sequencer::{Sequencer, Unused, WorkingSet},
    },
};

use crate::{fabric::FabricOptimizer, optim::Optimizer, shards::Shards};

pub use fabric_engine::shard::{Edge, ParamId, ParamMeta, UnitId, sequencer::Keep};

/// Updates a parameter, and the copy of it that the model computes with.
pub type UpdateParam<'a> =
    dyn FnMut(&mut dyn Buffer, Option<&mut dyn Buffer>) -> EngineResult<()> + 'a;

/// A model as Fabric sees it: parameters that can be reached, and that report their gradients.
pub trait Model: Send + Sync + 'static {
    /// All parameters in registration order, frozen ones too. The same on all ranks, and always.
    fn params(&self) -> &[ParamMeta];

    /// The parameters that [`Model::params`] are pieces of, the same on all ranks: themselves, where they are whole.
    fn whole_params(&self) -> &[ParamMeta] {
        self.params()
    }

    /// Which of [`Model::whole_params`] a parameter is a piece of.
    fn whole(&self, param: ParamId) -> ParamId {
        param
    }

    /// Call `f` with the memory of one parameter.
    ///
    /// # Errors
    /// What `f` returns, or the library's refusal.
    fn with(
        &self,
        param: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> EngineResult<()>,
    ) -> EngineResult<()>;

    /// Call `f` with what an optimizer updates: the parameter, and, where the parameter is kept in a wider type than the
    /// model computes with, the copy that it computes with, which the update rewrites.
    ///
    /// # Errors
    /// As [`Model::with`].
    fn update(&self, param: ParamId, f: &mut UpdateParam<'_>) -> EngineResult<()> {
        self.with(param, &mut |buffer| f(buffer, None))
    }

    /// The memory that the model computes in, where that is one place: `fabric.setup` refuses a model on another device than the
    /// rank's. `None` where parameters may lie anywhere: what is not on the rank's device is copied there and back.
    fn memory(&self) -> Option<kernels::Memory> {
        None
    }

    /// The units that parameters may be sharded by, in forward order: [`ParamMeta::unit`] counts in this list. A library
    /// that names units reports their edges to [`Events::unit`], and can [`Model::release`] and [`Model::acquire`].
    fn units(&self) -> &[String] {
        &[]
    }

    /// Give a parameter whose initialisation was deferred its memory and its first values; nothing for any other. Called
    /// by `fabric.setup`, once for each parameter, on the rank whose values count.
    ///
    /// # Errors
    /// The library's refusal.
    fn initialize(&self, param: ParamId) -> EngineResult<()> {
        let _ = param;
        Ok(())
    }

    /// Give up a parameter's memory: its values are kept elsewhere until [`Model::acquire`]. A use of it meanwhile must be
    /// an error of the library, and never a wrong result. Nothing, when it has none.
    ///
    /// # Errors
    /// When the library cannot do it: its parameters cannot be sharded.
    fn release(&self, param: ParamId) -> EngineResult<()> {
        let name = &self.params()[param.0].name;
        Err(EngineError::argument(
            format!("'{name}' cannot give up its memory, which sharding parameters needs"),
            "Use a strategy that keeps parameters whole (ddp, zero1, zero2), or an adapter that implements Model::release",
        ))
    }

    /// Give a parameter memory for its values, which [`Model::with`] then fills; what it holds before that is undefined.
    /// Nothing, when it has memory.
    ///
    /// # Errors
    /// When there is no memory, or the library cannot do it.
    fn acquire(&self, param: ParamId) -> EngineResult<()> {
        let _ = param;
        Ok(())
    }

    /// Where gradients are to be reported from now on. Called once, by `fabric.setup`.
    fn attach(&self, events: Arc<dyn Events>);

    /// What to tell a user whose parameter got no gradient: the library's usual reasons.
    fn unused_hint(&self) -> &str {
        "Check that the loss depends on it, or freeze it"
    }
}

/// Who is told that a gradient is ready: during the library's own backward where it has hooks (communication then
/// overlaps), or afterwards, last parameter first, where it has none.
pub trait Events: Send + Sync {
    /// The gradient of `param` is complete. The buffer is lent for the call; [`Keep`] says whether the library may drop
    /// its own copy.
    ///
    /// # Errors
    /// When the gradient does not fit or a reduction failed. The error is kept and returned by `fabric.backward`, so
    /// that a hook that cannot return it may ignore it.
    fn ready(&self, param: ParamId, grad: &dyn Buffer) -> EngineResult<Keep>;

    /// A pass crosses the border of a unit. When this returns from an entrance, the unit's parameters are there. All
    /// ranks cross the same borders in the same order.
    ///
    /// # Errors
    /// When a rank is gone, or the order makes no sense.
    fn unit(&self, unit: UnitId, edge: Edge) -> EngineResult<()>;
}

/// A loss: what `fabric.backward` is called with.
pub trait Backward {
    /// Run the library's backward on the loss times `scale`, reporting gradients to the models' [`Events`].
    ///
    /// # Errors
    /// The library's refusal.
    fn backward(self, scale: f32) -> EngineResult<()>;
}

/// A model that was set up. It is the model (`Deref`), plus its place in the job.
pub struct FabricModule<M: Model> {
    model: Arc<M>,
    pub(crate) core: Arc<Core>,
}

impl<M: Model> FabricModule<M> {
    pub(crate) fn new(model: Arc<M>, core: Arc<Core>) -> Self {
        Self { model, core }
    }

    /// The original model.
    pub fn module(&self) -> &M {
        &self.model
    }

    /// The original model, shared.
    pub fn module_arc(&self) -> Arc<M> {
        self.model.clone()
    }

    /// The plan by which its gradients travel.
    pub fn plan(&self) -> Plan {
        self.core.sequencer().plan().clone()
    }

    /// What the parts of a step cost this rank, predicted from the plan: collectives, messages and bytes sent.
    pub fn forecast(&self) -> Forecast {
        self.core.forecast
    }

    /// What will happen and what it costs: units, bytes a rank, collectives and bytes a step, types and the divisor.
    /// `link` is what the wire is like, from [`crate::Fabric::measure_link`], for the time that no computation can hide.
    pub fn explain<O: Optimizer>(
        &self,
        optimizer: &FabricOptimizer<O>,
        link: Option<Link>,
    ) -> String {
        let states = optimizer.optimizer().states_per_param();
        let sequencer = self.core.sequencer();
        sequencer.plan().explain(&self.core.forecast, states, link)
    }

    /// What a rank needs in memory, predicted from the plan, with an optimizer that keeps `states` vectors beside each
    /// parameter.
    pub fn footprint(&self, states: usize) -> Footprint {
        let sequencer = self.core.sequencer();
        sequencer.plan().footprint(sequencer.rank(), states)
    }

    /// The working set, counted so far.
    pub fn working_set(&self) -> WorkingSet {
        self.core.sequencer().working_set()
    }

    /// Bytes of memory that lie in this rank's shared arenas at present, beside its own.
    pub fn shared_bytes(&self) -> u64 {
        self.core.sequencer().groups().shared_bytes()
    }

    /// What one synchronised backward costs this rank: part of [`FabricModule::forecast`].
    pub fn prediction(&self) -> Spent {
        self.core.forecast.last_backward
    }

    /// What one optimizer step costs this rank: nothing, unless ranks update pieces.
    pub fn step_prediction(&self) -> Spent {
        self.core.forecast.step
    }

    /// A copy of a parameter's gradient as f32, if it has one and this rank holds all of it (a strategy that shards the
    /// update leaves it in pieces): for tests and for logging.
    pub fn grad(&self, param: ParamId) -> Option<Vec<f32>> {
        let sequencer = self.core.sequencer();
        let grad = sequencer.grad(param)?;
        let mut copy = vec![0f32; grad.len()];
        let into = kernels::SpanMut::of(&mut copy);
        kernels::cast_scaled(grad, into, sequencer.factor()).ok()?;
        Some(copy)
    }

    /// Tell the engine that a pass crosses the border of a unit: for libraries, and programs over plain vectors, that
    /// call their blocks themselves.
    ///
    /// # Errors
    /// When a rank is gone, or the order makes no sense.
    pub fn unit(&self, unit: UnitId, edge: Edge) -> crate::Result<()> {
        Ok(self.core.sequencer().unit(unit, edge)?)
    }

    /// Forget the gradients of all parameters.
    pub fn zero_grad(&self) {
        self.core.sequencer().zero_grad();
    }
}

impl<M: Model> Deref for FabricModule<M> {
    type Target = M;
    fn deref(&self) -> &M {
        &self.model
    }
}

/// The gradients that an optimizer reads, of the parameters of the model that it is given: reduced, in the reduce dtype.
pub struct Gradients<'a> {
    sequencer: &'a Sequencer,
    pieces: Option<&'a [Piece]>,
}

impl<'a> Gradients<'a> {
    /// Of whole parameters.
    pub(crate) fn whole(sequencer: &'a Sequencer) -> Self {
        let pieces = None;
        Self { sequencer, pieces }
    }

    /// Of pieces: parameter i is piece i.
    pub(crate) fn of_pieces(sequencer: &'a Sequencer, pieces: &'a [Piece]) -> Self {
        let pieces = Some(pieces);
        Self { sequencer, pieces }
    }

    /// What every gradient is to be multiplied by: the loss's scale undone, and clipping.
    pub fn scale(&self) -> f64 {
        self.sequencer.factor()
    }

    /// The gradient of one parameter, or `None` when it has none. It is still to be multiplied by [`Gradients::scale`].
    pub fn get(&self, param: ParamId) -> Option<Span<'_>> {
        match self.pieces {
            Some(pieces) => self.sequencer.piece(pieces.get(param.0)?),
            None => self.sequencer.grad(param),
        }
    }
}

/// One set-up model's place in the job: the sequencer behind one mutex, and what hooks report to.
pub(crate) struct Core {
    pub(crate) id: u64,
    pub(crate) model: Arc<dyn Model>,
    sequencer: Mutex<Sequencer>,
    pub(crate) forecast: Forecast,
    pub(crate) shards: Option<Shards>,
    pub(crate) comm: SharedComm,
    sync: AtomicBool,
    reported_everywhere: AtomicBool,
    reported_somewhere: AtomicBool,
}

impl Core {
    pub(crate) fn new(
        model: Arc<dyn Model>,
        sequencer: Sequencer,
        comm: SharedComm,
        forecast: Forecast,
    ) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            shards: Shards::of(&model, &sequencer),
            model,
            sequencer: Mutex::new(sequencer),
            comm,
            forecast,
            sync: AtomicBool::new(true),
            reported_everywhere: AtomicBool::new(false),
            reported_somewhere: AtomicBool::new(false),
        }
    }

    pub(crate) fn sequencer(&self) -> MutexGuard<'_, Sequencer> {
        // A panic in a hook leaves the sequencer in its phase, which the next begin() refuses.
        self.sequencer
            .lock()
            .unwrap_or_else(|held| held.into_inner())
    }

    /// The model as this rank updates it: whole, or its pieces.
    pub(crate) fn updated(&self) -> &dyn Model {
        match &self.shards {
            Some(shards) => shards,
            None => &*self.model,
        }
    }

    pub(crate) fn syncs(&self) -> bool {
        self.sync.load(Ordering::Relaxed)
    }

    pub(crate) fn set_sync(&self, sync: bool) {
        self.sync.store(sync, Ordering::Relaxed);
    }

    /// What to say about parameters without a gradient: of those that no rank used, and of those that some did not, once
    /// each, after the first synchronised backward that has some.
    pub(crate) fn unused_report(&self, unused: &Unused) -> Option<String> {
        let mut text = String::new();
        let first = |params: &[ParamId], reported: &AtomicBool| {
            !params.is_empty() && !reported.swap(true, Ordering::Relaxed)
        };
        let names = |params: &[ParamId]| {
            let name = |param: &ParamId| format!("'{}'", self.model.params()[param.0].name);
            params.iter().map(name).collect::<Vec<_>>().join(", ")
        };
        if first(&unused.everywhere, &self.reported_everywhere) {
            text += &format!(
                "no gradient reached {} on any rank: an optimizer will not move them. {}. ",
                names(&unused.everywhere),
                self.model.unused_hint()
            );
        }
        if first(&unused.somewhere, &self.reported_somewhere) {
            text += &format!(
                "no gradient reached {} on some of the ranks: there it counted as zero. ",
                names(&unused.somewhere)
            );
        }
        (!text.is_empty()).then(|| text + "This is said once")
    }
}

/// A model's parameters, as the engine reaches them.
pub(crate) struct Reach(pub(crate) Arc<dyn Model>);

impl Parameters for Reach {
    fn with(
        &self,
        param: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> EngineResult<()>,
    ) -> EngineResult<()> {
        self.0.with(param, f)
    }
    fn initialize(&self, param: ParamId) -> EngineResult<()> {
        self.0.initialize(param)
    }
    fn acquire(&self, param: ParamId) -> EngineResult<()> {
        self.0.acquire(param)
    }
    fn release(&self, param: ParamId) -> EngineResult<()> {
        self.0.release(param)
    }
}

/// What a model's hooks report to. It does not keep the model alive, which keeps it.
pub(crate) struct Reporter(Weak<Core>);

impl Reporter {
    pub(crate) fn new(core: &Arc<Core>) -> Self {
        Self(Arc::downgrade(core))
    }
}

impl Events for Reporter {
    fn ready(&self, param: ParamId, grad: &dyn Buffer) -> EngineResult<Keep> {
        match self.0.upgrade() {
            Some(core) => core.sequencer().ready(param, grad),
            None => Err(EngineError::argument(
                "a gradient became ready after its job had ended",
                "Use a model inside the fabric.launch in which it was set up",
            )),
        }
    }

    fn unit(&self, unit: UnitId, edge: Edge) -> EngineResult<()> {
        match self.0.upgrade() {
            Some(core) => core.sequencer().unit(unit, edge),
            None => Ok(()), // the job is over; a forward may go on
        }
    }
}

/// A mistake about models, for errors of this crate.
pub(crate) fn mistake(
    rank: usize,
    what: impl Into<String>,
    hint: impl Into<String>,
) -> EngineError {
    EngineError::model(rank, what, hint)
}
