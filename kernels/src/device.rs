//! Memory that the processor does not address, and the queue on which work over it is done, in order: what the verbs need
//! of an accelerator. The verbs are the same for all memory; they find a device in the spans they are given.
//!
//! [Note: queue order] What is given to a device is done after everything that was given before, and before everything
//! that comes later; nobody waits for it but [`Device::settle`], [`Moment::block`], and copies to the host. Memory is freed
//! in the same order, so that a span may be let go as soon as its work was given. Work of another queue is ordered by a
//! [`Moment`]: one queue leaves it, the other waits for it.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use crate::dtype::Memory;
use crate::error::KernelError;
use crate::fold::Fold;
use crate::optim::Rule;
use crate::span::{Span, SpanMut};

/// An accelerator's memory and its queue. Addresses in its spans mean something to it alone.
pub trait Device: Send + Sync + Debug {
    /// Which memory.
    fn memory(&self) -> Memory;

    /// The handle that keeps it.
    fn share(&self) -> Arc<dyn Device>;

    /// Memory of zeros, freed in queue order when the last handle is dropped. At least one byte, aligned to 256.
    ///
    /// # Errors
    /// [`KernelError::Driver`] when there is no more.
    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Block>, KernelError>;

    /// Do one piece of work, whose operands were checked. Inside [`batch`] it may be put off, and done in one launch with
    /// others of its kind.
    ///
    /// # Errors
    /// When the device does not know such work, or the driver refuses.
    fn run(&self, task: Task<'_>) -> Result<(), KernelError>;

    /// The squares of all elements of all spans. Waits for the result.
    ///
    /// # Errors
    /// As [`Device::run`].
    fn squares(&self, spans: &[Span<'_>]) -> Result<Squares, KernelError>;

    /// Keep `hold`, which keeps the memory of work that was put off, until that work was given to the driver.
    fn keep(&self, hold: Box<dyn Any + Send>);

    /// Give everything that was put off to the driver.
    ///
    /// # Errors
    /// The driver's refusal.
    fn flush(&self) -> Result<(), KernelError>;

    /// The moment at which everything given so far will be done.
    ///
    /// # Errors
    /// The driver's refusal.
    fn moment(&self) -> Result<Arc<dyn Moment>, KernelError>;

    /// Do nothing of what comes before `moment`, which may be another queue's.
    ///
    /// # Errors
    /// When it is not of this kind of device, or the driver refuses.
    fn wait_for(&self, moment: &dyn Moment) -> Result<(), KernelError>;

    /// Wait on this thread until everything given so far is done.
    ///
    /// # Errors
    /// What has gone wrong on the device.
    fn settle(&self) -> Result<(), KernelError>;

    /// For those who know which device it is.
    fn as_any(&self) -> &dyn Any;
}

/// Memory of a device.
pub trait Block: Send + Sync {
    /// Its address there.
    fn address(&self) -> usize;
}

/// A place in a queue's order.
pub trait Moment: Send + Sync {
    /// Whether it is past.
    ///
    /// # Errors
    /// What has gone wrong on the device.
    fn is_past(&self) -> Result<bool, KernelError>;

    /// Wait on this thread until it is past.
    ///
    /// # Errors
    /// What has gone wrong on the device.
    fn block(&self) -> Result<(), KernelError>;

    /// For those who know which moment it is.
    fn as_any(&self) -> &dyn Any;
}

/// The work that devices do. At least one span lies on the device that is asked; others may lie on the host.
#[derive(Debug)]
#[non_exhaustive]
pub enum Task<'a> {
    /// `into = from * factor`, cast: [`cast_scaled`](crate::cast_scaled()). Equal dtypes and a factor of 1 are a copy.
    Move {
        /// The source.
        from: Span<'a>,
        /// The target.
        into: SpanMut<'a>,
        /// What to multiply by, in the accumulator type.
        factor: f64,
    },
    /// `into = from * factor`, rounded by chance: [`cast_stochastic`](crate::cast_stochastic()). All pairs are of the same two
    /// dtypes.
    Round {
        /// The sources and their targets.
        pairs: Vec<(Span<'a>, SpanMut<'a>)>,
        /// What to multiply by.
        factor: f64,
        /// What decides the chance.
        seed: u64,
    },
    /// [`quantize`](crate::quantize()).
    Quantize {
        /// The source.
        from: Span<'a>,
        /// The target.
        into: SpanMut<'a>,
        /// A scale for each block.
        scales: SpanMut<'a>,
    },
    /// [`dequantize`](crate::dequantize()).
    Dequantize {
        /// The source.
        from: Span<'a>,
        /// A scale for each block.
        scales: Span<'a>,
        /// The target.
        into: SpanMut<'a>,
    },
    /// `x *= factor`, in place.
    Scale {
        /// What is changed.
        x: SpanMut<'a>,
        /// What to multiply by.
        factor: f64,
    },
    /// `into = into op with`: [`fold`](crate::fold()).
    Fold {
        /// How two become one.
        op: Fold,
        /// What is changed.
        into: SpanMut<'a>,
        /// The other side.
        with: Span<'a>,
    },
    /// `into = value`: [`fill`](crate::fill()).
    Fill {
        /// The target.
        into: SpanMut<'a>,
        /// The value, which the dtype holds.
        value: f64,
    },
    /// [`clamp`](crate::clamp()).
    Clamp {
        /// What is changed.
        x: SpanMut<'a>,
        /// The bound.
        limit: f64,
    },
    /// [`update`](crate::update()).
    Update {
        /// The formula.
        rule: &'a Rule,
        /// From 1.
        step: u64,
        /// What gradients are multiplied by first.
        grad_scale: f64,
        /// The parameter.
        param: SpanMut<'a>,
        /// Its gradient.
        grad: Span<'a>,
        /// Its states, as many as the rule has.
        states: [Option<SpanMut<'a>>; 2],
        /// The copy that is computed with.
        copy: Option<SpanMut<'a>>,
    },
}

impl Task<'_> {
    /// What errors call it.
    pub fn name(&self) -> &'static str {
        match self {
            Task::Move { factor: 1.0, .. } => "cast",
            Task::Move { .. } => "cast_scaled",
            Task::Round { .. } => "cast_stochastic",
            Task::Quantize { .. } => "quantize",
            Task::Dequantize { .. } => "dequantize",
            Task::Scale { .. } => "scale",
            Task::Fold { .. } => "fold",
            Task::Fill { .. } => "fill",
            Task::Clamp { .. } => "clamp",
            Task::Update { rule, .. } => rule.name(),
        }
    }
}

/// What [`Device::squares`] found.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct Squares {
    /// The sum over the finite elements, in f64, in an order that follows from their number alone.
    pub sum: f64,
    /// How many elements are infinite.
    pub infinities: u64,
    /// How many are NaN.
    pub nans: u64,
}

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static WAITING: RefCell<Vec<Arc<dyn Device>>> = const { RefCell::new(Vec::new()) };
}

/// Let devices put off what `work` gives them from this thread, and do it together when `work` is over: many small
/// pieces of one kind are one launch. Nothing for memory of the host. What `work` touches must stay where it is until then:
/// parameters, say, but not a temporary of a library that frees behind the device's back (see [`put_off`]). Pieces of work
/// that depend on one another are done in their order.
///
/// # Errors
/// Those of `work`; then those of what was put off.
pub fn batch<T, E: From<KernelError>>(work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let result = {
        let _scope = Scope::enter();
        work()
    };
    if DEPTH.get() > 0 {
        return result;
    }
    let flushed = flush_waiting();
    let result = result?;
    flushed?;
    Ok(result)
}

/// [`batch`] without its end: what `work` gives to devices waits for more of its kind, until anything else is given or
/// [`Device::flush`] is called. They keep `hold`, which keeps its memory, meanwhile.
///
/// # Errors
/// Those of `work`.
pub fn put_off<T, E>(
    hold: Box<dyn Any + Send>,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    let _held = Held(Arc::new(Mutex::new(hold))); // dropped after the scope
    let _scope = Scope::enter();
    work()
}

/// Flush all devices that this thread has given work to put off: before work that is done at once, which comes after it.
///
/// # Errors
/// The drivers' refusals.
pub fn flush_waiting() -> Result<(), KernelError> {
    if WAITING.with_borrow(Vec::is_empty) {
        return Ok(());
    }
    // All of them, whatever becomes of the first: nobody would flush the others later.
    let flushed = WAITING.take().into_iter().map(|device| device.flush());
    flushed.fold(Ok(()), Result::and)
}

/// Whether work may be put off at present; then `device` is told to flush at the end of the batch.
pub fn may_put_off(device: &dyn Device) -> bool {
    if DEPTH.get() == 0 {
        return false;
    }
    let same = |known: &Arc<dyn Device>| std::ptr::addr_eq(&raw const **known, device);
    WAITING.with_borrow_mut(|waiting| {
        if !waiting.iter().any(same) {
            waiting.push(device.share());
        }
    });
    true
}

/// One level of [`batch`], also when the work panics.
struct Scope;

impl Scope {
    fn enter() -> Self {
        DEPTH.set(DEPTH.get() + 1);
        Scope
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
        if DEPTH.get() == 0 && std::thread::panicking() {
            // What the work touches may be gone when the panic is over. An error of the device says less than the panic.
            let _ = flush_waiting();
        }
    }
}

/// What keeps memory, for all devices to keep on which work over it may wait, when it was given, also when that panics.
struct Held(Arc<Mutex<Box<dyn Any + Send>>>);

impl Drop for Held {
    fn drop(&mut self) {
        let keep = |device: &Arc<dyn Device>| device.keep(Box::new(self.0.clone()));
        WAITING.with_borrow(|waiting| waiting.iter().for_each(keep));
    }
}

/// The device on which work over these spans is done: the first that is named; `None` is the host.
pub(crate) fn place<const N: usize>(devices: [Option<&dyn Device>; N]) -> Option<&dyn Device> {
    devices.into_iter().flatten().next()
}
