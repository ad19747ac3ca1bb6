//! NCCL as a [`Communicator`]: device memory goes to NCCL, on a stream of its own, and memory of the host to the
//! communicator between the hosts that stands beside it.
//!
//! ```text
//! compute  --pack--*.......wait: goes on after `done`.......*--update-->
//!                  | start                                  | done
//! own      --------*----all_reduce--------------------------*---------->
//! ```
//!
//! [Note: order on devices] An operation begins when everything is done that the compute queue was given before it was
//! submitted, and [`Work::wait`](super::super::Work::wait) lets the compute queue go on when the operation is done: the
//! host waits for neither. So an error shows later than on the host's wires: the [`Watch`] sees it, aborts, which lets the
//! queues go on, and every later call returns it. What was computed meanwhile is worthless, as after any failure.

use std::sync::Arc;

use fabric_kernels::{Device, Dtype, Memory, cuda::Queue};

use super::{
    Comm, Config, Id, Library, Version,
    flight::{Flight, Landing},
    moves,
    watch::Watch,
};
use crate::{
    buffer::Slab,
    comm::{
        Aborter, Call, Collectives, Communicator, Data, Rank, Spent, Work,
        host::{Host, check_shapes, stamp},
        trace::{Event, Trace},
    },
    error::{Error, Result},
};

/// The first version with a split of its own.
const SPLITS_SINCE: Version = Version::from_code(21_800);

/// A communicator over the memory of one CUDA device a rank.
pub struct Nccl {
    // In the order in which they end: NCCL's own end needs the other ranks.
    comm: Arc<Comm>,
    watch: Watch,
    own: Arc<Queue>,
    compute: Arc<Queue>,
    spent: Spent,
    host: Host,
}

impl Nccl {
    /// The ranks of `host`, each with a device of its own. All call this together.
    ///
    /// # Errors
    /// When NCCL is not there, on all ranks alike if on one; when a device is not CUDA's; when the ranks' devices do not
    /// reach each other.
    pub fn over(mut host: Host, device: &Arc<dyn Device>) -> Result<Self> {
        let rank = host.rank();
        let library = Library::load();
        // A rank that cannot go on says so before the others wait for it in NCCL, where they would not hear it.
        let trouble = library.as_ref().err().map(ToString::to_string);
        let told = host.all_gather_bytes(trouble.unwrap_or_default().as_bytes())?;
        let library = library?;
        if let Some(other) = told.iter().position(|text| !text.is_empty()) {
            let text = String::from_utf8_lossy(&told[other]);
            return Err(Error::rendezvous(
                rank,
                format!("rank {other} has no NCCL: {text}"),
                "Install NCCL on every machine, or choose accelerator = cpu",
            ));
        }
        let reporter = host.reporter();
        let compute = queue_of(device);
        let joined = compute.and_then(|compute| Self::with(host, &library, compute, meet));
        // The others wait in NCCL, where they hear of this rank only if somebody tells them.
        joined.map_err(|error| reporter.fail(error))
    }

    /// The ranks of `host`, which `meet` brings together in NCCL.
    fn with(
        mut host: Host,
        library: &Arc<Library>,
        compute: Arc<Queue>,
        meet: impl FnOnce(&mut Host, &Arc<Library>, &Queue) -> Result<Comm>,
    ) -> Result<Self> {
        // What this rank may lack for itself comes first: then the others have not begun to wait.
        let own = compute.fork();
        let own = own.map_err(Error::kernel(host.rank(), "open a stream"))?;
        let watch = Watch::new(&host)?;
        let comm = Arc::new(meet(&mut host, library, &compute)?);
        watch.guard(&comm);
        Ok(Self {
            host,
            comm,
            compute,
            own,
            watch,
            spent: Spent::default(),
        })
    }

    /// The part of this that `host` connects.
    fn split_with(&self, host: Host, color: u32) -> Result<Self> {
        let failed = || Error::kernel(self.rank(), "split");
        self.compute.bind().map_err(failed())?;
        self.own.settle().map_err(failed())?; // nothing may be in progress
        // NCCL's own split shares what is open, but it is of 2.18, and its colors are smaller than ours.
        let splits = self.comm.library().version() >= SPLITS_SINCE && color <= i32::MAX as u32;
        let library = self.comm.library().clone();
        Self::with(
            host,
            &library,
            self.compute.clone(),
            |host, library, compute| {
                if !splits {
                    return meet(host, library, compute);
                }
                let config = config(host);
                let part = self.comm.split(Some(color), host.rank() as u32, config)?;
                Ok(part.expect("a rank with a color is in a group"))
            },
        )
    }

    /// NCCL's version.
    pub fn version(&self) -> String {
        self.comm.library().version().to_string()
    }

    /// How the hosts are connected beside it.
    pub fn host(&self) -> &Host {
        &self.host
    }

    fn start(&mut self, call: Call, data: Data) -> Result<Work> {
        let (rank, size) = (self.rank(), self.size());
        let shape = check_shapes(rank, size, &call, &data)?;
        moves::check(
            rank,
            &call,
            &data,
            shape.dtype,
            self.comm.library().version(),
        )?;
        let stamp = stamp(self.host.next_number(&call), &call, shape);
        self.host.check(&stamp)?;
        self.host.trace().note(Event::Submitted {
            sequence: stamp.sequence,
            label: call.label,
            op: stamp.op.name(),
            bytes: shape.numel * shape.dtype.size(),
        });
        let failed = |what: &str| Error::kernel(rank, format!("{stamp}: {what}"));
        // From here on the others wait for this rank: whatever goes wrong, they are told.
        let homes = homes(&data, &self.compute);
        let begun = homes
            .iter()
            .try_for_each(|home| self.own.wait_for(&*home.moment()?));
        begun.map_err(|error| self.host.fail(failed("begin")(error)))?;
        self.host.ledger().enter(&stamp);
        let submitted = moves::submit(&self.comm, &call, &data, &self.own);
        let done = submitted.and_then(|()| self.own.moment().map_err(failed("end")));
        let done = match done {
            Ok(done) => done,
            Err(error) => {
                std::mem::forget(data); // part of it may be under way
                return Err(self.host.fail(error));
            }
        };
        self.spent += self.host.price(&call, shape.dtype, shape.numel);
        self.watch.follow(Flight::new(
            stamp,
            call.deadline.unwrap_or(self.host.deadline()),
            done.clone(),
        ));
        let signal = self.host.aborter().signal().clone();
        Ok(Work::ahead(Box::new(Landing::new(
            rank, data, done, homes, signal,
        ))))
    }
}

/// Let the ranks of `host` meet in NCCL.
fn meet(host: &mut Host, library: &Arc<Library>, compute: &Queue) -> Result<Comm> {
    let rank = host.rank();
    let id = match rank {
        0 => Id::create(library)?.bytes().to_vec(),
        _ => Vec::new(),
    };
    let id = host.broadcast_bytes(&id, 0)?;
    let id = id.try_into().map_err(|_| {
        let hint = "All ranks must run the same version of this program";
        Error::rendezvous(rank, "rank 0 sent no NCCL id", hint)
    })?;
    compute.bind().map_err(Error::kernel(rank, "open NCCL"))?;
    let (id, config) = (Id::from_bytes(id), config(host));
    Comm::init(library, &id, host.size(), rank, config)
}

fn config(host: &Host) -> Config {
    Config {
        clock: host.clock().clone(),
        deadline: Some(host.deadline()),
        signal: host.aborter().signal().clone(),
        ..Config::default()
    }
}

/// The queue behind a device.
fn queue_of(device: &Arc<dyn Device>) -> Result<Arc<Queue>> {
    let queue = device.as_any().downcast_ref::<Queue>();
    queue.map(Queue::handle).ok_or_else(|| {
        let what = format!("NCCL over {device:?}, which is no CUDA device");
        Error::argument(
            what,
            "Give each rank a device of kernels::cuda::Queue::open",
        )
    })
}

/// The queues that work on some data: the compute queue, and those whose memory it is.
fn homes(data: &Data, compute: &Arc<Queue>) -> Vec<Arc<dyn Device>> {
    let mut homes: Vec<Arc<dyn Device>> = vec![compute.clone()];
    for home in slabs(data).into_iter().filter_map(Slab::device) {
        if !homes.iter().any(|known| Arc::ptr_eq(known, home)) {
            homes.push(home.clone());
        }
    }
    homes
}

fn slabs(data: &Data) -> Vec<&Slab> {
    match data {
        Data::None => Vec::new(),
        Data::InPlace(slab) => vec![slab],
        Data::Many(slabs) => slabs.iter().collect(),
        Data::Out { from, into } => vec![from, into],
    }
}

/// Where all slabs of some data are; `None` when there are none, or on both sides.
fn memory(data: &Data) -> Option<Memory> {
    if let Data::None = data {
        return Some(Memory::Host);
    }
    let mut slabs = slabs(data).into_iter().map(Slab::memory);
    let first = slabs.next()?;
    slabs.all(|other| other == first).then_some(first)
}

impl Communicator for Nccl {
    fn rank(&self) -> Rank {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn alloc(&self, dtype: Dtype, numel: usize) -> Result<Slab> {
        let device: Arc<dyn Device> = self.compute.clone();
        let slab = Slab::zeroed_on(Some(&device), dtype, numel);
        slab.map_err(Error::kernel(self.rank(), "allocate memory"))
    }

    fn device(&self) -> Option<Arc<dyn Device>> {
        Some(self.compute.clone())
    }

    fn alloc_host(&self, dtype: Dtype, numel: usize) -> Result<Slab> {
        self.host.alloc(dtype, numel)
    }

    /// Memory of the host goes to the communicator between hosts, in whatever operation.
    fn submit(&mut self, call: Call, data: Data) -> Result<Work> {
        let own = Device::memory(&*self.compute);
        match memory(&data) {
            Some(Memory::Host) => self.host.submit(call, data),
            Some(memory) if memory == own => self.start(call, data),
            Some(memory) => Err(Error::argument(
                format!(
                    "rank {}: {memory} memory on a communicator of {own}",
                    self.rank()
                ),
                "Allocate with the communicator, or give each rank tensors of its own device",
            )),
            None => Err(Error::argument(
                format!(
                    "rank {}: slabs of several memories in one call",
                    self.rank()
                ),
                "Bring them to one place first",
            )),
        }
    }

    fn split(&mut self, color: u32, key: u32) -> Result<Box<dyn Communicator>> {
        let host = self.host.subgroup(color, key)?;
        let part = self.split_with(host, color);
        Ok(Box::new(part.map_err(|error| self.host.fail(error))?))
    }

    fn aborter(&self) -> Aborter {
        self.host.aborter()
    }

    /// By the hosts' schedules: NCCL does not say what its own send.
    fn price(&self, call: &Call, dtype: Dtype, numel: usize) -> Spent {
        self.host.price(call, dtype, numel)
    }

    fn spent(&self) -> Spent {
        let mut spent = self.host.spent();
        spent += self.spent;
        spent
    }

    fn shared_bytes(&self) -> u64 {
        self.host.shared_bytes()
    }

    fn trace(&self) -> Trace {
        self.host.trace()
    }
}
