//! Collectives between host memories: a queue, a thread that works it off in order, and an executor that runs schedules
//! over a wire. A blocking call on an idle communicator skips the queue and runs on the caller's own thread.

mod math;
mod messages;
mod shared;
#[cfg(test)]
mod tests;

use std::{
    os::fd::AsFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use fabric_kernels::Dtype;

use super::{
    Aborter, Call, Communicator, Data, Op, Rank, Spent, Work,
    trace::{Event, Trace},
};
use crate::{
    buffer::Slab,
    clock::Clock,
    error::{Error, Result},
    rendezvous::{Control, Member},
    schedule::choose::{Tuning, WireKind},
    signal::Signal,
    wire::{
        Vigil, Wire,
        frame::Stamp,
        ledger::Ledger,
        shm::{Arena, Group, Mapping},
        tcp::Tcp,
    },
};
use messages::Messages;
use shared::SharedMemory;

const QUEUE: usize = 1024; // operations that may wait; more block the caller
const GRACE: Duration = Duration::from_secs(1); // how long a broken connection waits for the hub's fuller story

/// How a communicator behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long an operation may take, unless its call says otherwise.
    pub deadline: Duration,
    /// Which algorithm for what; all ranks must have the same.
    pub tuning: Tuning,
    /// The clock.
    pub clock: Clock,
    /// How many bytes of address space a rank's shared memory may take: an upper bound on all slabs that peers reach
    /// without a copy. What is not touched costs nothing.
    pub arena_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(600),
            tuning: Tuning::default(),
            clock: Clock::machine(),
            arena_bytes: 16 << 30,
        }
    }
}

/// A communicator between host memories.
pub struct Host {
    shared: Arc<Shared>,
    queue: Option<Sender<Job>>,
    worker: Option<JoinHandle<()>>,
    pending: Arc<AtomicUsize>,
    sequence: u64,
    family: Option<Family>,
}

/// What a communicator needs to make subgroups.
struct Family {
    member: Arc<Member>,
    group: Vec<usize>, // world ranks
    name: String,
    children: u32,
    reach: Reach,
}

/// Which wires a group may take.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Tcp,
    Best,
}

/// What runs schedules.
enum Executor {
    Messages(Messages),
    Shared(SharedMemory),
}

impl Executor {
    fn run(
        &mut self,
        stamp: &Stamp,
        call: &Call,
        data: Data,
        deadline: Duration,
    ) -> Result<(Data, Spent)> {
        match self {
            Self::Messages(messages) => messages.run(stamp, call, data, deadline),
            Self::Shared(shared) => shared.run(stamp, call, data, deadline),
        }
    }

    fn price(&mut self, op: Op, dtype: Dtype, numel: usize) -> Spent {
        match self {
            Self::Messages(messages) => messages.price(op, dtype, numel),
            Self::Shared(shared) => shared.price(op, dtype, numel),
        }
    }
}

struct Shared {
    rank: Rank,
    size: usize,
    options: Options,
    signal: Signal,
    ledger: Ledger,
    control: Option<Control>,
    trace: Trace,
    kind: WireKind,
    arena: Option<Arc<Arena>>, // where slabs come from, when peers can reach them
    executor: Mutex<Executor>,
    spent: Mutex<Spent>,
}

struct Job {
    stamp: Stamp,
    call: Call,
    data: Data,
    done: Sender<Result<Data>>,
}

impl Host {
    /// Connect all ranks of the job over TCP.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' tuning tables differ.
    pub fn tcp(member: &Arc<Member>, options: Options) -> Result<Self> {
        agree(member, &options)?;
        Self::tcp_group(member, everybody(member), "world".into(), options)
    }

    /// Connect all ranks of the job through memory that all of them map; `None`, on all ranks alike, when that cannot
    /// be done because they are on different machines, or in different containers, or the system refuses.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' tuning tables differ.
    pub fn shm(member: &Arc<Member>, options: Options) -> Result<Option<Self>> {
        agree(member, &options)?;
        let (made, _) = Self::shm_group(member, everybody(member), "world".into(), options)?;
        Ok(made.ok())
    }

    /// Connect all ranks of the job by the fastest wire that reaches all of them: shared memory, or else TCP.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' tuning tables differ.
    pub fn best(member: &Arc<Member>, options: Options) -> Result<Self> {
        agree(member, &options)?;
        Self::best_group(member, everybody(member), "world".into(), options)
    }

    fn best_group(
        member: &Arc<Member>,
        group: Vec<usize>,
        name: String,
        options: Options,
    ) -> Result<Self> {
        let rank = member.rank();
        let (made, everywhere) =
            Self::shm_group(member, group.clone(), name.clone(), options.clone())?;
        match made {
            Ok(host) => {
                tracing::info!(rank, group = name, wire = "shm", "all ranks share memory");
                if !everywhere {
                    member.connect(&name, &[])?; // another group of this split needs the whole world to swap addresses
                }
                Ok(host)
            }
            Err(why) => {
                tracing::info!(rank, group = name, wire = "tcp", why, "no shared memory");
                Self::tcp_group(member, group, name, options).map(|mut host| {
                    if let Some(family) = &mut host.family {
                        family.reach = Reach::Best;
                    }
                    host
                })
            }
        }
    }

    /// The communicator, or why there is none, which all ranks of the group agree on; and whether all groups of the
    /// world have theirs.
    fn shm_group(
        member: &Arc<Member>,
        group: Vec<usize>,
        name: String,
        options: Options,
    ) -> Result<(Result<Self, String>, bool)> {
        let rank = place(member, &group);
        let made = Arena::new(options.arena_bytes).map_err(|e| format!("no shared memory: {e}"));
        let own = made
            .as_ref()
            .map(|(_, fd)| fd.as_fd())
            .map_err(Clone::clone);
        let mut peers = (0..group.len()).map(|_| None).collect::<Vec<_>>();
        let passed = member.pass(&name, &group, own, &mut |index, fd| {
            peers[index] = Some(Mapping::of_peer(&fd)?);
            Ok(())
        })?;
        let arena = match (passed.outcome, made) {
            (Ok(()), Ok((arena, _))) => arena,
            (Err(why), _) | (Ok(()), Err(why)) => return Ok((Err(why), passed.everywhere)),
        };
        let vigil = watch(member, &group, &options);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let crowded = passed.neighbours > cores;
        let shared = Group::new(rank, arena.clone(), peers, vigil.clone(), crowded);
        let executor = Executor::Shared(SharedMemory::new(shared));
        let control = Some(member.control().clone());
        let kind = WireKind::Shm;
        let mut host = Self::start(executor, kind, Some(arena), vigil, options, control)?;
        host.family = Some(Family::new(member, group, name, Reach::Best));
        Ok((Ok(host), passed.everywhere))
    }

    fn tcp_group(
        member: &Arc<Member>,
        group: Vec<usize>,
        name: String,
        options: Options,
    ) -> Result<Self> {
        let peers = member.connect(&name, &group)?;
        let rank = place(member, &group);
        let vigil = watch(member, &group, &options);
        let wire = Tcp::new(rank, peers, vigil.clone())?;
        let mut host = Self::over(
            Box::new(wire),
            WireKind::Tcp,
            vigil,
            options,
            Some(member.control().clone()),
        )?;
        host.family = Some(Family::new(member, group, name, Reach::Tcp));
        Ok(host)
    }

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
        let messages = Messages::new(wire, kind, options.tuning.clone());
        Self::start(
            Executor::Messages(messages),
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
            spent: Mutex::default(),
        });
        let (queue, jobs) = bounded::<Job>(QUEUE);
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
            sequence: 0,
            family: None,
        })
    }

    /// By which wire: "shm", "tcp", "sim", ...
    pub fn wire(&self) -> &'static str {
        self.shared.kind.name()
    }
}

impl Family {
    fn new(member: &Arc<Member>, group: Vec<usize>, name: String, reach: Reach) -> Self {
        Self {
            member: member.clone(),
            group,
            name,
            children: 0,
            reach,
        }
    }
}

fn everybody(member: &Member) -> Vec<usize> {
    (0..member.world()).collect()
}

/// This rank's number in a group that it belongs to.
fn place(member: &Member, group: &[usize]) -> usize {
    let own = group.iter().position(|rank| *rank == member.rank());
    own.expect("a rank is in its own group")
}

/// What bounds a group's waits.
fn watch(member: &Member, group: &[usize], options: &Options) -> Vigil {
    let control = member.control();
    let whole = group.len() == member.world();
    Vigil {
        clock: options.clock.clone(),
        signal: control.signal().clone(),
        ledger: if whole {
            control.ledger().clone()
        } else {
            Ledger::new(place(member, group), group.len())
        },
    }
}

/// All ranks must choose algorithms from one table.
fn agree(member: &Member, options: &Options) -> Result<()> {
    let tables = member.swap("fabric/tuning", &options.tuning.hash().to_le_bytes())?;
    let own = &tables[member.rank()];
    match tables.iter().position(|hash| hash != own) {
        None => Ok(()),
        Some(peer) => Err(Error::rendezvous(
            member.rank(),
            format!("rank {peer} has another tuning table"),
            "Give all ranks the same FABRIC_TUNING, or none",
        )),
    }
}

/// The worker's life: one job after the other, in order of submission.
fn work(shared: &Shared, jobs: &Receiver<Job>, pending: &AtomicUsize) {
    for job in jobs {
        let result = shared.run(&job.stamp, &job.call, job.data);
        pending.fetch_sub(1, Ordering::AcqRel);
        let _ = job.done.send(result); // the Work may have been dropped: its memory is freed here
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

impl Shared {
    fn run(&self, stamp: &Stamp, call: &Call, data: Data) -> Result<Data> {
        self.signal.check()?;
        let deadline = self.options.clock.now() + call.deadline.unwrap_or(self.options.deadline);
        self.ledger.enter(*stamp);
        let mut executor = self
            .executor
            .lock()
            .unwrap_or_else(|held| held.into_inner());
        match executor.run(stamp, call, data, deadline) {
            Ok((data, cost)) => {
                self.ledger.leave();
                *self.spent.lock().unwrap_or_else(|held| held.into_inner()) += cost;
                self.trace.note(Event::Completed {
                    sequence: stamp.sequence,
                });
                Ok(data)
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Keep the first error, tell everybody, and prefer the hub's story about a peer that is gone to our own.
    fn fail(&self, error: Error) -> Error {
        let Some(control) = &self.control else {
            return self.signal.raise(error);
        };
        match &error {
            Error::PeerLost(lost) => {
                control.report_lost(lost.peer, lost.how.clone());
                self.signal
                    .wait(GRACE)
                    .unwrap_or_else(|| self.signal.raise(error))
            }
            Error::Aborted { .. } => self.signal.raise(error),
            _ if self.signal.is_raised() => self.signal.raise(error),
            _ => {
                let first = self.signal.raise(error.clone());
                control.abort(self.rank, error.to_string());
                first
            }
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

    fn submit(&mut self, call: Call, data: Data) -> Result<Work> {
        let shared = &self.shared;
        shared.signal.check()?;
        let shape = check_shapes(shared.rank, shared.size, &call, &data)?;
        let stamp = stamp(self.sequence, &call, shape);
        self.sequence += 1;
        let (op, bytes) = (stamp.op.name(), shape.numel * shape.dtype.size());
        shared.trace.note(Event::Submitted {
            sequence: stamp.sequence,
            label: call.label,
            op,
            bytes,
        });
        let idle =
            self.worker.is_none() || (call.blocking && self.pending.load(Ordering::Acquire) == 0);
        if idle {
            return Ok(Work::done(shared.run(&stamp, &call, data)));
        }
        let (done, work) = Work::flying(shared.signal.clone());
        self.pending.fetch_add(1, Ordering::AcqRel);
        let job = Job {
            stamp,
            call,
            data,
            done,
        };
        let queue = self.queue.as_ref().expect("the queue closes only in drop");
        if queue.send(job).is_err() {
            return Err(shared.signal.first().unwrap_or_else(|| {
                Error::argument(
                    "the communicator's thread has ended",
                    "Look for an earlier panic in its output",
                )
            }));
        }
        Ok(work)
    }

    fn split(&mut self, color: u32, key: u32) -> Result<Box<dyn Communicator>> {
        let rank = self.shared.rank;
        let Some(family) = &mut self.family else {
            return Err(Error::argument(
                "this communicator cannot be split",
                "Split one that joined a rendezvous",
            ));
        };
        let name = format!("{}/{}", family.name, family.children);
        family.children += 1;
        let mine = [color.to_le_bytes(), key.to_le_bytes()].concat();
        let rows = family.member.swap(&format!("fabric/split/{name}"), &mine)?;
        let number = |row: &[u8], at: usize| {
            u32::from_le_bytes(row[at..at + 4].try_into().expect("four bytes"))
        };
        let mut group = Vec::new();
        for &peer in &family.group {
            if rows[peer].len() != 8 {
                return Err(Error::rendezvous(
                    rank,
                    format!("rank {peer} did not split here"),
                    "Split on all ranks",
                ));
            }
            if number(&rows[peer], 0) == color {
                group.push((number(&rows[peer], 4), peer));
            }
        }
        group.sort_unstable();
        let group = group.into_iter().map(|(_, peer)| peer).collect();
        let make = match family.reach {
            Reach::Tcp => Self::tcp_group,
            Reach::Best => Self::best_group,
        };
        let options = self.shared.options.clone();
        Ok(Box::new(make(&family.member, group, name, options)?))
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
        executor.price(call.op, dtype, numel)
    }

    fn spent(&self) -> Spent {
        *self
            .shared
            .spent
            .lock()
            .unwrap_or_else(|held| held.into_inner())
    }

    fn trace(&self) -> Trace {
        self.shared.trace.clone()
    }
}

/// The full vector of a call: its length and type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) dtype: Dtype,
    pub(super) numel: usize,
}

fn stamp(sequence: u64, call: &Call, shape: Shape) -> Stamp {
    let (op, reduce) = call.op.code();
    let root = if let Op::Broadcast { root } = call.op {
        root as u32
    } else {
        0
    };
    Stamp {
        sequence,
        op,
        reduce,
        dtype: shape.dtype,
        root,
        numel: shape.numel as u64,
        label: call.label,
    }
}

/// Does the data fit the call?
pub(super) fn check_shapes(rank: Rank, size: usize, call: &Call, data: &Data) -> Result<Shape> {
    let wrong =
        |what: String, hint: &str| Err(Error::argument(format!("rank {rank}: {what}"), hint));
    let name = call.op.code().0.name();
    if let Op::Broadcast { root } = call.op
        && root >= size
    {
        return wrong(
            format!("broadcast from rank {root} of {size}"),
            "Name a rank of the group as the root",
        );
    }
    let (from, into) = match (call.op, data) {
        (Op::Barrier, Data::None) => {
            return Ok(Shape {
                dtype: Dtype::U8,
                numel: 0,
            });
        }
        (Op::Barrier, _) => {
            return wrong(
                "a barrier with data".into(),
                "Submit a barrier with Data::None",
            );
        }
        (_, Data::None) => return wrong(format!("{name} without data"), "Give it a slab"),
        (_, Data::InPlace(slab)) => {
            let (dtype, numel) = (slab.dtype(), slab.numel());
            if matches!(call.op, Op::ReduceScatter(_) | Op::AllGather) && numel % size != 0 {
                return wrong(
                    format!("{name} of {numel} elements among {size} ranks"),
                    "Pad the vector to a multiple of the world size",
                );
            }
            return Ok(Shape { dtype, numel });
        }
        (_, Data::Out { from, into }) => (from, into),
    };
    if from.dtype() != into.dtype() {
        return wrong(
            format!("{name} from {} into {}", from.dtype(), into.dtype()),
            "Use one dtype",
        );
    }
    let (expected, numel) = match call.op {
        Op::ReduceScatter(_) => (into.numel() * size == from.numel(), from.numel()),
        Op::AllGather => (from.numel() * size == into.numel(), into.numel()),
        Op::Broadcast { root } => (root != rank || from.numel() == into.numel(), into.numel()),
        _ => (from.numel() == into.numel(), from.numel()),
    };
    if !expected {
        let (from, into) = (from.numel(), into.numel());
        return wrong(
            format!("{name} from {from} into {into} elements among {size} ranks"),
            "reduce_scatter's input and all_gather's output have world size x the other's elements; otherwise both are \
             equal",
        );
    }
    Ok(Shape {
        dtype: into.dtype(),
        numel,
    })
}
