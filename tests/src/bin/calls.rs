//! Runs every collective in every way under an allocator that counts, and fails when one that ran before allocates:
//! `calls RANKS WIRE`. Ranks are threads, so that the count is of all of them, and of the hub.

use std::{
    net::{Ipv4Addr, TcpListener},
    sync::{Arc, Barrier, Mutex, PoisonError},
};

use fabric::{
    Error, Result,
    engine::{
        buffer::Slab,
        comm::{
            Call, Communicator, Data, Op, ReduceOp,
            host::{Host, Options},
        },
        kernels::Dtype,
        rendezvous::{self, Member, Secret},
    },
};
use fabric_tests::Record;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

const ROUNDS: usize = 5;
const WARM: usize = 2; // rounds in which memory may be made

/// A call, and its memory between two runs.
struct Case {
    call: Call,
    data: Option<Data>,
}

/// Every collective: small, middling and longer than two windows of shared memory, in memory that peers reach and not.
fn cases(host: &Host) -> Result<Vec<Case>> {
    let (rank, size) = (host.rank(), host.size());
    let mut cases = Vec::new();
    for numel in [1, 1000, 30_011, 150_001] {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::I64] {
            for private in [false, true] {
                let slab = |numel: usize| match private {
                    true => Ok(Slab::zeroed(dtype, numel)),
                    false => host.alloc(dtype, numel),
                };
                for op in [
                    Op::AllReduce(ReduceOp::Sum),
                    Op::AllReduce(ReduceOp::Avg),
                    Op::AllReduce(ReduceOp::PreMulSum(rank as f64)),
                    Op::ReduceScatter(ReduceOp::Max),
                    Op::AllGather,
                    Op::Broadcast { root: size - 1 },
                ] {
                    let (from, into) = match op {
                        Op::ReduceScatter(_) => (numel * size, numel),
                        Op::AllGather => (numel, numel * size),
                        _ => (numel, numel),
                    };
                    let apart = Data::Out {
                        from: slab(from)?,
                        into: slab(into)?,
                    };
                    let in_place = Data::InPlace(slab(from.max(into))?);
                    cases.extend([apart, in_place].map(|data| Case {
                        call: Call::new(op),
                        data: Some(data),
                    }));
                }
            }
        }
    }
    cases.push(Case {
        call: Call::new(Op::Barrier),
        data: Some(Data::None),
    });
    Ok(cases)
}

/// All cases, one after the other on this thread, then all at once on the communicator's.
fn round(
    host: &mut Host,
    cases: &mut [Case],
    works: &mut Vec<fabric::engine::comm::Work>,
) -> Result<()> {
    for case in &mut *cases {
        let data = case.data.take().expect("it came back");
        case.data = Some(host.submit(case.call.clone().blocking(), data)?.wait()?);
    }
    for case in &mut *cases {
        let data = case.data.take().expect("it came back");
        works.push(host.submit(case.call.clone(), data)?);
    }
    for (case, work) in cases.iter_mut().zip(works.drain(..)) {
        case.data = Some(work.wait()?);
    }
    Ok(())
}

fn run(member: &Arc<Member>, wire: &str, meet: &Barrier) -> Result<Option<(u64, String)>> {
    let mut host = match wire {
        "tcp" => Host::tcp(member, Options::default())?,
        _ => Host::shm(member, Options::default())?.map_err(Error::new)?,
    };
    let mut cases = cases(&host)?;
    let mut works = Vec::with_capacity(cases.len());
    let mut record = None;
    for done in 0..ROUNDS {
        if done == WARM {
            meet.wait();
            if host.rank() == 0 {
                record = Some(Record::begin());
            }
            meet.wait();
        }
        round(&mut host, &mut cases, &mut works)?;
    }
    meet.wait();
    let count = record.map(Record::end).transpose();
    meet.wait(); // nobody leaves while it is counted
    count
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let size = args.next().map_or(Ok(2), |text| text.parse::<usize>())?;
    let wire = args.next().unwrap_or_else(|| "shm".into());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let listener = Mutex::new(Some(listener));
    let secret = Secret::from_bytes(b"the ranks of one program");
    let meet = Barrier::new(size);
    let counts = fabric::launch::threads::run(size, 2 << 20, |rank| {
        let options = rendezvous::Options::new(rank, size, address, secret.clone());
        let member = match rank {
            0 => {
                let listener = listener
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                Member::host(options, listener.expect("there is one rank 0"))?
            }
            _ => Member::join(options)?,
        };
        run(&Arc::new(member), &wire, &meet)
    })?;
    for (count, places) in counts.into_iter().flatten() {
        println!("{count} allocations\n{places}");
        if count > 0 {
            return Err(Error::new(format!("{count} allocations")));
        }
    }
    Ok(())
}
