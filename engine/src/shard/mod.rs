//! Who holds which piece of a model, and when it moves. A strategy is a row of placements ([`placement::Row`]); a
//! [`plan::Plan`] is that row applied to a model's parameters; a [`sequencer::Sequencer`] runs it. This room knows a
//! `Communicator`, never a wire.

pub mod bucket;
pub mod groups;
pub mod layout;
pub mod mains;
pub mod mesh;
pub mod placement;
pub mod plan;
pub mod pool;
pub mod replicate;
pub mod sequencer;
mod units;

use std::sync::{Arc, Mutex, MutexGuard};

use fabric_kernels::Device;

use crate::{
    buffer::Buffer,
    comm::{Aborter, Communicator, Rank, trace::Trace},
    error::Result,
};

/// A parameter's position in the model's registration order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub usize);

/// A unit's position in the order in which the forward pass runs them: the parameters that are gathered together, used
/// together and dropped together where parameters are sharded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitId(pub usize);

/// Where a pass through the model crosses the border of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// Its forward begins: its parameters are needed.
    ForwardEnter,
    /// Its forward is over.
    ForwardLeave,
    /// Its backward begins: its parameters are needed again.
    BackwardEnter,
    /// Its backward is over: all its gradients were handed over. A library that cannot tell leaves it to the engine,
    /// which counts them.
    BackwardLeave,
}

/// What the engine knows of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamMeta {
    /// Its name, unique in the model: "blocks.0.attn.q.weight".
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// The type of its elements.
    pub dtype: fabric_kernels::Dtype,
    /// Whether it gets gradients.
    pub trainable: bool,
    /// The unit it belongs to; `None` is the root, whose parameters are always there.
    pub unit: Option<UnitId>,
    /// Where else the model uses it: a tied parameter. When that is not its own unit, the root has it.
    pub tied: Vec<Option<UnitId>>,
}

impl ParamMeta {
    /// A trainable parameter.
    pub fn new(name: impl Into<String>, shape: &[usize], dtype: fabric_kernels::Dtype) -> Self {
        Self {
            name: name.into(),
            shape: shape.to_vec(),
            dtype,
            trainable: true,
            unit: None,
            tied: Vec::new(),
        }
    }

    /// The same, in a unit.
    pub fn in_unit(self, unit: UnitId) -> Self {
        Self {
            unit: Some(unit),
            ..self
        }
    }

    /// The unit that gathers it: its own, unless it is tied to a place outside.
    pub fn home(&self) -> Option<UnitId> {
        self.unit
            .filter(|unit| self.tied.iter().all(|other| *other == Some(*unit)))
    }

    /// How many elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// How the engine reaches a model's parameters.
pub trait Parameters: Send + Sync {
    /// Call `f` with the memory of one parameter.
    ///
    /// # Errors
    /// What `f` returns, or the library's refusal.
    fn with(&self, param: ParamId, f: &mut dyn FnMut(&mut dyn Buffer) -> Result<()>) -> Result<()>;

    /// Give a parameter its first values, where that was deferred.
    ///
    /// # Errors
    /// The library's refusal.
    fn initialize(&self, param: ParamId) -> Result<()>;

    /// Give a parameter memory; what is in it is undefined. Nothing, when it has memory.
    ///
    /// # Errors
    /// The library's refusal.
    fn acquire(&self, param: ParamId) -> Result<()>;

    /// Give up a parameter's memory. Nothing, when it has none.
    ///
    /// # Errors
    /// When the library cannot do it.
    fn release(&self, param: ParamId) -> Result<()>;
}

/// A communicator that several models and the user's own calls share. What never changes is known without the lock,
/// which a blocking collective holds for as long as it takes: who wants to abort must not wait for it.
#[derive(Clone)]
pub struct SharedComm {
    comm: Arc<Mutex<Box<dyn Communicator>>>,
    rank: Rank,
    size: usize,
    aborter: Aborter,
    trace: Trace,
    device: Option<Arc<dyn Device>>,
}

impl SharedComm {
    /// Share `comm`.
    pub fn new(comm: Box<dyn Communicator>) -> Self {
        let (rank, size) = (comm.rank(), comm.size());
        let (aborter, trace) = (comm.aborter(), comm.trace());
        let device = comm.device();
        Self {
            comm: Arc::new(Mutex::new(comm)),
            rank,
            size,
            aborter,
            trace,
            device,
        }
    }

    /// The communicator, until the guard is dropped.
    pub fn lock(&self) -> MutexGuard<'_, Box<dyn Communicator>> {
        // A panic elsewhere leaves the communicator itself intact: it keeps its own first error.
        self.comm.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// This rank's number in the group.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The device in whose memory it works; `None` is the host.
    pub fn device(&self) -> Option<&Arc<dyn Device>> {
        self.device.as_ref()
    }

    /// A handle that stops everything, also while another thread waits.
    pub fn aborter(&self) -> Aborter {
        self.aborter.clone()
    }

    /// The record of what happened.
    pub fn trace(&self) -> Trace {
        self.trace.clone()
    }
}
