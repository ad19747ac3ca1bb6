//! Ranks as processes, which `run.sh` starts: NCCL's operations against the hosts', their bandwidths, and how ranks end.
//! Each is told who it is: GPU_RANK, GPU_WORLD, GPU_ADDRESS (of rank 0), GPU_DEVICE.

use std::{
    error::Error as AnyError,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use fabric_engine::{
    Error,
    buffer::Slab,
    comm::{
        Call, Collectives, Communicator, Data, Op, ReduceOp,
        host::{Host, Options as HostOptions},
        nccl::{Library, Nccl},
    },
    rendezvous::{Member, Options, Secret},
};
use fabric_kernels::{self as kernels, Device, Dtype, cuda::Queue};

use crate::operands::{difference, down, typed, up, wild};

type Outcome = Result<(), Box<dyn AnyError>>;

pub fn look() -> Outcome {
    match kernels::cuda::devices() {
        Ok(names) => names
            .iter()
            .enumerate()
            .for_each(|(index, name)| println!("cuda:{index} {name}")),
        Err(why) => println!("no device: {why}"),
    }
    match Library::load() {
        Ok(library) => println!("NCCL {} ({})", library.version(), library.name()),
        Err(error) => println!("no NCCL: {error}"),
    }
    Ok(())
}

/// One rank.
struct Rank {
    queue: Arc<Queue>,
    comm: Nccl,
}

impl Rank {
    fn join(deadline: Duration) -> Result<Self, Box<dyn AnyError>> {
        let text = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
        let number = |name: &str| Ok::<usize, Box<dyn AnyError>>(text(name)?.parse()?);
        let (rank, size) = (number("GPU_RANK")?, number("GPU_WORLD")?);
        let address: SocketAddr = text("GPU_ADDRESS")?.parse()?;
        let secret = Secret::from_bytes(b"a secret of this machine's own, long enough");
        let options = Options::new(rank, size, address, secret);
        let member = match rank {
            0 => Member::host(options, TcpListener::bind(address)?)?,
            _ => Member::join(options)?,
        };
        let options = HostOptions {
            deadline,
            ..HostOptions::default()
        };
        let host = Host::best(&Arc::new(member), options)?;
        let queue = Queue::open(number("GPU_DEVICE")? as u32)?;
        let device: Arc<dyn Device> = queue.clone();
        let comm = Nccl::over(host, &device)?;
        Ok(Self { queue, comm })
    }

    fn says(&self, text: impl std::fmt::Display) {
        if self.comm.rank() == 0 {
            println!("{text}");
        }
    }
}

pub fn rank(most_mib: usize) -> Outcome {
    let mut rank = Rank::join(Duration::from_secs(60))?;
    let (size, version) = (rank.comm.size(), rank.comm.version());
    rank.says(format!(
        "NCCL {version}, {size} rank{}",
        if size == 1 { "" } else { "s" }
    ));
    let (compared, wrong) = check(&mut rank)?;
    let mut totals = vec![compared as f64, wrong.len() as f64];
    rank.comm.all_reduce(&mut totals, ReduceOp::Sum)?;
    rank.says(format!(
        "  operations and types: {} compared on all ranks, {} wrong",
        totals[0], totals[1]
    ));
    for text in wrong.iter().take(5) {
        println!("  rank {}: {text}", rank.comm.rank());
    }
    bandwidths(&mut rank, most_mib)?;
    rank.comm.barrier()?;
    match totals[1] {
        0.0 => Ok(()),
        wrong => Err(format!("{wrong} results differ from the hosts'").into()),
    }
}

/// Every operation on every type that NCCL has, beside the hosts': equal bits where nothing is rounded (small whole numbers).
fn check(rank: &mut Rank) -> Result<(usize, Vec<String>), Box<dyn AnyError>> {
    let (own, size) = (rank.comm.rank(), rank.comm.size());
    let (mut compared, mut wrong) = (0, Vec::new());
    let dtypes = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];
    let reductions = [
        ReduceOp::Sum,
        ReduceOp::Prod,
        ReduceOp::Min,
        ReduceOp::Max,
        ReduceOp::PreMulSum(2.0),
    ];
    for dtype in dtypes {
        for part in [1usize, 1000] {
            let n = part * size;
            let values: Vec<f32> = (0..n).map(|index| ((index + own) % 3) as f32).collect();
            let mut calls: Vec<(Op, usize, usize)> = Vec::new();
            for op in reductions {
                calls.push((Op::AllReduce(op), n, n));
                calls.push((Op::ReduceScatter(op), n, part));
            }
            let root = size - 1;
            let (whole, _) = if own == root { (n, 0) } else { (0, 0) };
            calls.extend([
                (Op::AllGather, part, n),
                (Op::Broadcast { root }, n, n),
                (Op::AllToAll, n, n),
                (Op::Gather { root }, part, whole),
                (Op::Scatter { root }, whole, part),
            ]);
            for (op, from, into) in calls {
                let source = typed(&values[..from], dtype)?;
                let there = up(&rank.queue, &source)?;
                let fresh = Slab::zeroed(dtype, into);
                let fresh_there = rank.comm.alloc(dtype, into)?;
                let call = || Call::new(op);
                let host = rank
                    .comm
                    .submit(
                        call(),
                        Data::Out {
                            from: source,
                            into: fresh,
                        },
                    )?
                    .wait()?
                    .into_output();
                let data = Data::Out {
                    from: there,
                    into: fresh_there,
                };
                let device = rank.comm.submit(call(), data)?.wait()?.into_output();
                compared += 1;
                if let Some(where_) = difference(&down(&device)?, &host)? {
                    wrong.push(format!("{op:?} of {part} x {dtype}: {where_}"));
                }
            }
        }
    }
    // Averages and arbitrary values agree to rounding.
    let values = wild(4096, own as u64)
        .iter()
        .map(|x| if x.is_finite() { x % 8.0 } else { 1.0 })
        .collect::<Vec<_>>();
    for op in [ReduceOp::Sum, ReduceOp::Avg] {
        let mut host = values.clone();
        rank.comm.all_reduce(&mut host, op)?;
        let mut there = up(&rank.queue, &Slab::from_slice(&values))?;
        rank.comm.all_reduce(&mut there, op)?;
        let device = down(&there)?;
        compared += 1;
        let far = |(x, y): (&f32, &f32)| (x - y).abs() > 1e-4 * y.abs().max(1.0);
        if device.as_slice::<f32>().iter().zip(&host).any(far) {
            wrong.push(format!("{op:?} of f32 is far from the hosts'"));
        }
    }
    Ok((compared, wrong))
}

/// nccl-tests' bus bandwidth of all_reduce, by size.
fn bandwidths(rank: &mut Rank, most_mib: usize) -> Outcome {
    const TURNS: u32 = 10;
    let size = rank.comm.size() as f64;
    rank.says("  all_reduce f32          bytes         us  algbw GB/s  busbw GB/s");
    let mut bytes = 1 << 10;
    while bytes <= most_mib << 20 {
        let mut slab = rank.comm.alloc(Dtype::F32, bytes / 4)?;
        let turn = |rank: &mut Rank, slab: Slab| -> fabric_engine::Result<Slab> {
            let call = Call::new(Op::AllReduce(ReduceOp::Sum));
            Ok(rank
                .comm
                .submit(call, Data::InPlace(slab))?
                .wait()?
                .into_output())
        };
        slab = turn(rank, slab)?;
        rank.queue.settle()?;
        rank.comm.barrier()?;
        let begun = Instant::now();
        for _ in 0..TURNS {
            slab = turn(rank, slab)?;
        }
        rank.queue.settle()?;
        let each = begun.elapsed() / TURNS;
        let algbw = bytes as f64 / each.as_secs_f64() / 1e9;
        let busbw = algbw * 2.0 * (size - 1.0) / size; // 0 for one rank, as in nccl-tests
        let us = each.as_secs_f64() * 1e6;
        rank.says(format!(
            "  {bytes:>27} {us:>10.1} {algbw:>11.2} {busbw:>11.2}"
        ));
        bytes *= 8;
    }
    Ok(())
}

/// Rank 1 never joins; rank 0's time is up, its stream goes on, and both say the same.
pub fn hang() -> Outcome {
    let mut rank = Rank::join(Duration::from_secs(5))?;
    if rank.comm.rank() == 1 {
        let signal = rank.comm.aborter().signal().clone();
        let error = signal
            .wait(Duration::from_secs(60))
            .ok_or("nobody said anything for a minute")?;
        println!("  rank 1 was told: {error}");
        return Ok(());
    }
    let slab = rank.comm.alloc(Dtype::F32, 1 << 20)?;
    let begun = Instant::now();
    let work = rank
        .comm
        .submit(Call::new(Op::AllReduce(ReduceOp::Sum)), Data::InPlace(slab))?;
    let slab = work.wait()?.into_output();
    rank.queue.settle()?; // waits on the device until NCCL is aborted
    drop(slab);
    let took = begun.elapsed();
    match rank.comm.barrier() {
        Err(error @ Error::Timeout { .. }) => {
            println!("  rank 0 after {:.1} s: {error}", took.as_secs_f64());
            Ok(())
        }
        other => Err(format!("a time-out was awaited, not {other:?}").into()),
    }
}

/// Rank 1 ends without a word; rank 0 hears of it, and its stream goes on.
pub fn kill() -> Outcome {
    let mut rank = Rank::join(Duration::from_secs(60))?;
    let mut slab = rank.comm.alloc(Dtype::F32, 1 << 20)?;
    rank.comm.all_reduce(&mut slab, ReduceOp::Sum)?;
    rank.queue.settle()?;
    if rank.comm.rank() == 1 {
        std::process::abort();
    }
    let begun = Instant::now();
    let work = rank
        .comm
        .submit(Call::new(Op::AllReduce(ReduceOp::Sum)), Data::InPlace(slab));
    let settled = work.and_then(|work| work.wait()).and_then(|data| {
        rank.queue.settle()?;
        Ok(data)
    });
    drop(settled);
    match rank.comm.barrier() {
        Err(error @ Error::PeerLost(_)) => {
            println!(
                "  rank 0 after {:.1} s: {error}",
                begun.elapsed().as_secs_f64()
            );
            Ok(())
        }
        other => Err(format!("the loss of rank 1 was awaited, not {other:?}").into()),
    }
}
