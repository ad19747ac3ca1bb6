//! Every operation on every dtype, against the communicators of the host, whose arithmetic is proved elsewhere.

use std::{
    net::TcpListener,
    sync::{Arc, Mutex, mpsc},
};

use cudarc::driver::CudaSlice;
use fabric_engine::{
    buffer::Slab,
    clock::Clock,
    comm::{Call, Communicator, Data, Op, ReduceOp, host, solo::Solo},
    kernels::{self, Dtype},
    rendezvous::{Member, Options, Secret},
};
use gpu_suite::stage::with_fakes;

use crate::ranks::{Rank, world};

const NUMEL: usize = 37;

/// Small values of a dtype, different on each rank.
fn values(dtype: Dtype, numel: usize, rank: usize) -> Slab {
    let numbers: Vec<f32> = (0..numel)
        .map(|i| ((i * 7 + rank * 3) % 5) as f32 + 1.0)
        .collect();
    let mut slab = Slab::zeroed(dtype, numel);
    if dtype.is_float() {
        let from = Slab::from_slice(&numbers);
        kernels::cast(from.part(0..numel), slab.part_mut(0..numel)).unwrap();
        return slab;
    }
    let size = dtype.size();
    for (element, number) in slab.as_bytes_mut().chunks_exact_mut(size).zip(numbers) {
        let number = if dtype == Dtype::Bool {
            number as u64 % 2
        } else {
            number as u64
        };
        element.copy_from_slice(&number.to_le_bytes()[..size]);
    }
    slab
}

/// A world of communicators between host memories, as the oracle.
fn hosts(size: usize) -> Vec<host::Host> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, made) = mpsc::channel();
    std::thread::scope(|scope| {
        let mut listener = Some(listener);
        for rank in 0..size {
            let (sender, listener) = (sender.clone(), listener.take());
            scope.spawn(move || {
                let options = Options::new(rank, size, address, Secret::none());
                let member = match listener {
                    Some(listener) => Member::host(options, listener),
                    None => Member::join(options),
                };
                let member = Arc::new(member.unwrap());
                let host = host::Host::tcp(&member, host::Options::default()).unwrap();
                sender.send((rank, host)).unwrap();
            });
        }
    });
    let mut hosts: Vec<_> = (0..size).map(|_| made.recv().unwrap()).collect();
    hosts.sort_by_key(|(rank, _)| *rank);
    hosts.into_iter().map(|(_, host)| host).collect()
}

/// One operation, as both understand it.
#[derive(Clone, Copy, Debug)]
enum Which {
    AllReduce(ReduceOp),
    ReduceScatter(ReduceOp),
    Reduce(ReduceOp),
    AllGather,
    Broadcast,
    AllToAll,
}

const ROOT: usize = 0;

impl Which {
    fn op(self) -> Op {
        match self {
            Self::AllReduce(op) => Op::AllReduce(op),
            Self::ReduceScatter(op) => Op::ReduceScatter(op),
            Self::Reduce(op) => Op::Reduce { op, root: ROOT },
            Self::AllGather => Op::AllGather,
            Self::Broadcast => Op::Broadcast { root: ROOT },
            Self::AllToAll => Op::AllToAll,
        }
    }

    /// Elements of input and output.
    fn sizes(self, size: usize) -> (usize, usize) {
        match self {
            Self::ReduceScatter(_) => (NUMEL * size, NUMEL),
            Self::AllGather => (NUMEL, NUMEL * size),
            Self::AllToAll => (NUMEL * size, NUMEL * size),
            _ => (NUMEL, NUMEL),
        }
    }

    fn on_host(self, host: &mut dyn Communicator, input: Slab) -> Slab {
        let into = Slab::zeroed(input.dtype(), self.sizes(host.size()).1);
        let data = match self {
            Self::AllReduce(_) | Self::Reduce(_) | Self::Broadcast => Data::InPlace(input),
            _ => Data::Out { from: input, into },
        };
        let work = host.submit(Call::new(self.op()).blocking(), data).unwrap();
        work.wait().unwrap().into_output()
    }

    fn on_device(self, rank: &Rank, from: &CudaSlice<u8>, into: &CudaSlice<u8>, dtype: Dtype) {
        let (data, stream, comm) = (
            rank.operands(from, into, NUMEL, dtype),
            rank.handle(),
            &rank.comm,
        );
        // SAFETY, of all: the buffers have as many elements as `sizes` says, and live until the stream is waited for.
        let done = match self {
            // SAFETY: see above.
            Self::AllReduce(op) => unsafe { comm.all_reduce(data, op, stream) },
            // SAFETY: see above.
            Self::ReduceScatter(op) => unsafe { comm.reduce_scatter(data, op, stream) },
            // SAFETY: see above.
            Self::Reduce(op) => unsafe { comm.reduce(data, op, ROOT, stream) },
            // SAFETY: see above.
            Self::AllGather => unsafe { comm.all_gather(data, stream) },
            // SAFETY: see above.
            Self::Broadcast => unsafe { comm.broadcast(data, ROOT, stream) },
            // SAFETY: see above.
            Self::AllToAll => unsafe { comm.all_to_all(data, stream) },
        };
        done.unwrap_or_else(|error| panic!("{self:?} of {dtype}: {error}"));
    }
}

/// What NCCL has of reductions.
fn reductions(dtype: Dtype) -> Vec<ReduceOp> {
    match dtype {
        Dtype::I16 | Dtype::U16 => vec![],
        Dtype::Bool => vec![ReduceOp::Min, ReduceOp::Max],
        _ => vec![
            ReduceOp::Sum,
            ReduceOp::Avg,
            ReduceOp::Prod,
            ReduceOp::Min,
            ReduceOp::Max,
            ReduceOp::PreMulSum(2.0),
        ],
    }
}

fn all_operations(dtype: Dtype) -> Vec<Which> {
    let reductions = reductions(dtype);
    let each =
        |make: fn(ReduceOp) -> Which| reductions.iter().copied().map(make).collect::<Vec<_>>();
    let mut all = [
        each(Which::AllReduce),
        each(Which::ReduceScatter),
        each(Which::Reduce),
    ]
    .concat();
    all.extend([Which::AllGather, Which::Broadcast, Which::AllToAll]);
    all
}

fn every_operation_on(size: usize) {
    let oracles: Vec<_> = hosts(size).into_iter().map(Mutex::new).collect();
    world(size, |rank| {
        let mut host = oracles[rank.rank].lock().unwrap();
        for dtype in Dtype::ALL {
            for which in all_operations(dtype) {
                let (numel, out) = which.sizes(size);
                let input = values(dtype, numel, rank.rank);
                let from = rank.put(input.as_bytes());
                let into = rank.put(&vec![0; out * dtype.size()]);
                which.on_device(&rank, &from, &into, dtype);
                let seen = rank.get(&into);
                let right = which.on_host(&mut *host, input);
                if rank.rank == ROOT || !matches!(which, Which::Reduce(_)) {
                    assert_eq!(
                        seen,
                        right.as_bytes(),
                        "{which:?} of {dtype} on rank {}",
                        rank.rank
                    );
                }
            }
        }
    });
}

const SETTINGS: [(&str, &str); 2] = [("FAKE_CUDA_DEVICES", "4"), ("FAKE_CUDA_DELAY_US", "0")];

#[test]
fn every_operation_on_every_dtype_alone() {
    with_fakes(&SETTINGS, || {
        world(1, |rank| {
            let mut solo = Solo::new(Clock::machine());
            for dtype in Dtype::ALL {
                for which in all_operations(dtype) {
                    let input = values(dtype, NUMEL, 0);
                    let (from, into) = (
                        rank.put(input.as_bytes()),
                        rank.put(&vec![0; NUMEL * dtype.size()]),
                    );
                    which.on_device(&rank, &from, &into, dtype);
                    let right = which.on_host(&mut solo, input);
                    assert_eq!(rank.get(&into), right.as_bytes(), "{which:?} of {dtype}");
                }
            }
        });
    });
}

#[test]
fn every_operation_on_every_dtype_of_two_ranks() {
    with_fakes(&SETTINGS, || every_operation_on(2));
}

#[test]
fn every_operation_on_every_dtype_of_three_ranks() {
    with_fakes(&SETTINGS, || every_operation_on(3));
}

#[test]
fn every_operation_on_every_dtype_of_four_ranks() {
    with_fakes(&SETTINGS, || every_operation_on(4));
}
