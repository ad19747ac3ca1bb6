//! Collectives between host memories: a queue, a thread that works it off in order, and an executor that runs schedules
//! over a wire. A blocking call on an idle communicator skips the queue and runs on the caller's own thread.

#[cfg(feature = "cuda")]
mod beside;
mod connect;
mod inner;
mod math;
mod messages;
mod queue;
mod recent;
mod script;
mod shape;
mod shared;
#[cfg(test)]
mod tests;
mod tuned;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use fabric_kernels::Dtype;

use super::{
    Aborter, Call, Communicator, Data, Op, Rank, Spent, Work,
    trace::{Event, Trace},
    work::{Desk, Promise},
};
use crate::{
    buffer::Slab,
    clock::Clock,
    error::{Error, Result},
    rendezvous::Control,
    schedule::choose::{Tuning, WireKind},
    wire::{
        Vigil, Wire,
        frame::{OpCode, Stamp},
        shm::Arena,
    },
};
#[cfg(feature = "cuda")]
pub(super) use beside::Reporter;
use connect::Family;
use inner::{Account, Executor, Shared, work};
use messages::Messages;
use queue::{Giver, queue};
use shape::Latest;
pub(super) use shape::check_shapes;
pub(super) use shape::stamp;
/// The longest input, in bytes, that shared memory posts; longer ones are loaded whatever the tuning table says.
pub const POST_BYTES: usize = crate::wire::shm::POST_BYTES;

pub use tuned::{FABRIC_TUNING, tuning, tuning_path};

pub use crate::wire::stream::Security;

const QUEUE: usize = 1024; // operations that may wait; more block the caller
const GRACE: Duration = Duration::from_secs(1); // how long a broken connection waits for the hub's fuller story

/// How a communicator behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long an operation may take, unless its call says otherwise.
    pub deadline: Duration,
    /// Which algorithm for what; rank 0's is used by all.
    pub tuning: Tuning,
    /// The clock.
    pub clock: Clock,
    /// How many bytes of address space a rank's shared memory may take: an upper bound on all slabs that peers reach
    /// without a copy. What is not touched costs nothing.
    pub arena_bytes: usize,
    /// What is done for what travels over sockets; all ranks must ask for the same. `None`: nothing where no other machine
    /// reaches the sockets, and encryption anywhere else. Shared memory is out of others' reach.
    pub security: Option<Security>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(600),
            tuning: Tuning::default(),
            clock: Clock::machine(),
            arena_bytes: 16 << 30,
            security: None,
        }
    }
}

/// A communicator between host memories.
pub struct Host {
    shared: Arc<Shared>,
    queue: Option<Giver<Job>>,
    worker: Option<JoinHandle<()>>,
    pending: Arc<AtomicUsize>,
    desk: Desk,
    sequence: u64,
    latest: [Option<Latest>; Op::KINDS], // by operation, because calls like to repeat
    kinds: u64,
    family: Option<Family>,
    reason: String,
}

/// An operation that fits its memory, and has its number.
struct Begun {
    stamp: Stamp,
    kind: u64, // calls that are alike have the same, when nothing else came between
}

struct Job {
    begun: Begun,
    call: Call,
    data: Data,
    promise: Promise,
}

impl Host {
    /// A communicator over any wire, without a control line.
    ///
    /// # Errors
    /// When the worker's thread cannot be started.
    pub fn over_wire(
        wire: Box<dyn Wire>,
        kind: WireKind,
        vigil: Vigil,
        options: Options,
    ) -> Result<Self> {
        Self::over(wire, kind, vigil, options, None)
    }

    /// The clock on which this communicator's deadlines are read.
    pub fn clock(&self) -> &Clock {
        &self.shared.options.clock
    }

    fn over(
        wire: Box<dyn Wire>,
        kind: WireKind,
        vigil: Vigil,
        options: Options,
        control: Option<Control>,
    ) -> Result<Self> {
        let clock = options.clock.clone();
        let messages = Messages::new(wire, kind, options.tuning.clone(), clock);
        Self::start(
            Executor::Messages(Box::new(messages)),
            kind,
            None,
            vigil,
            options,
            control,
        )
    }

    fn start(
        executor: Executor,
        kind: WireKind,
        arena: Option<Arc<Arena>>,
        vigil: Vigil,
        options: Options,
        control: Option<Control>,
    ) -> Result<Self> {
        let (rank, size) = match &executor {
            Executor::Messages(messages) => (messages.rank(), messages.size()),
            Executor::Shared(shared) => (shared.rank(), shared.size()),
        };
        let trace = Trace::new(options.clock.clone());
        let shared = Arc::new(Shared {
            rank,
            size,
            kind,
            arena,
            executor: Mutex::new(executor),
            options,
            signal: vigil.signal,
            ledger: vigil.ledger,
            control,
            trace,
            spent: Account::default(),
        });
        let (queue, jobs) = queue(QUEUE);
        let pending = Arc::new(AtomicUsize::new(0));
        // The simulator holds the baton: its communicators never start a thread.
        let worker = if kind == WireKind::Sim {
            None
        } else {
            let (shared, pending) = (shared.clone(), pending.clone());
            let thread = std::thread::Builder::new()
                .name(format!("fabric-comm-{rank}"))
                .spawn(move || work(&shared, &jobs, &pending))
                .map_err(|e| Error::io(rank, "start the communicator's thread", e))?;
            Some(thread)
        };
        Ok(Self {
            shared,
            queue: Some(queue),
            worker,
            pending,
            desk: Desk::new(),
            sequence: 0,
            latest: Default::default(),
            kinds: 0,
            family: None,
            reason: String::new(),
        })
    }

    /// How long an operation may take, unless its call says otherwise.
    pub fn deadline(&self) -> Duration {
        self.shared.options.deadline
    }

    /// Nothing is under way.
    fn is_idle(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0
    }

    /// An operation begins, if its memory fits and nobody has failed: it gets its number.
    #[inline(always)]
    fn begin(&mut self, call: &Call, data: &Data) -> Result<Begun> {
        let shared = &self.shared;
        let latest = &mut self.latest[call.op.index()];
        let (mut stamp, kind) = match latest {
            Some(latest) if latest.is_like(call, data) => (latest.stamp, latest.kind),
            latest => {
                let shape = check_shapes(shared.rank, shared.size, call, data)?;
                let stamp = stamp(0, call, shape);
                self.kinds += 1;
                *latest = Latest::new(call, data, stamp, self.kinds);
                (stamp, self.kinds)
            }
        };
        stamp.label = call.label;
        let is_numbered = stamp.op != OpCode::SendRecv; // only two ranks know of a message
        if is_numbered {
            stamp.sequence = self.sequence;
        }
        shared.check(&stamp)?;
        self.sequence += u64::from(is_numbered);
        if shared.trace.is_on() {
            shared.trace.note(Event::Submitted {
                sequence: stamp.sequence,
                label: call.label,
                op: stamp.op.name(),
                bytes: stamp.numel as usize * stamp.dtype.size(),
            });
        }
        Ok(Begun { stamp, kind })
    }

    /// By which wire: "shm", "tcp", "sim", ...
    pub fn wire(&self) -> &'static str {
        self.shared.kind.name()
    }

    /// Why this wire, where [`Host::best`] has chosen it; otherwise nothing.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

impl Communicator for Host {
    fn rank(&self) -> Rank {
        self.shared.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn alloc(&self, dtype: Dtype, numel: usize) -> Result<Slab> {
        let arena = self.shared.arena.as_ref().filter(|_| numel > 0);
        let slab = arena.and_then(|arena| arena.slab(dtype, numel));
        Ok(slab.unwrap_or_else(|| Slab::zeroed(dtype, numel))) // a full arena costs copies, not the run
    }

    fn submit(&mut self, call: Call, mut data: Data) -> Result<Work> {
        let begun = self.begin(&call, &data)?;
        if self.worker.is_none() || (call.blocking && self.is_idle()) {
            let result = self.shared.run(&begun, &call, &mut data);
            return Ok(Work::done(result.map(|()| data)));
        }
        let (promise, work) = self.desk.open(self.shared.signal.clone());
        self.pending.fetch_add(1, Ordering::AcqRel);
        let job = Job {
            begun,
            call,
            data,
            promise,
        };
        let queue = self.queue.as_ref().expect("the queue closes only in drop");
        if queue.give(job).is_err() {
            return Err(self.shared.signal.first().unwrap_or_else(|| {
                Error::argument(
                    "the communicator's thread has ended",
                    "Look for an earlier panic in its output",
                )
            }));
        }
        Ok(work)
    }

    fn run(&mut self, call: &Call, data: &mut Data) -> Result<()> {
        if self.worker.is_none() || self.is_idle() {
            let begun = self.begin(call, data)?;
            return self.shared.run(&begun, call, data);
        }
        let taken = std::mem::replace(data, Data::None);
        *data = self.submit(call.clone().blocking(), taken)?.wait()?;
        Ok(())
    }

    fn split(&mut self, color: u32, key: u32) -> Result<Box<dyn Communicator>> {
        Ok(Box::new(self.subgroup(color, key)?))
    }

    fn aborter(&self) -> Aborter {
        let shared = &self.shared;
        Aborter {
            rank: shared.rank,
            signal: shared.signal.clone(),
            control: shared.control.clone(),
        }
    }

    fn price(&self, call: &Call, dtype: Dtype, numel: usize) -> Spent {
        let mut executor = self
            .shared
            .executor
            .lock()
            .unwrap_or_else(|held| held.into_inner());
        executor.price(call, dtype, numel)
    }

    fn spent(&self) -> Spent {
        self.shared.spent.read()
    }

    fn shared_bytes(&self) -> u64 {
        let arena = self.shared.arena.as_ref();
        arena.map_or(0, |arena| arena.resident_bytes())
    }

    fn trace(&self) -> Trace {
        self.shared.trace.clone()
    }
}
