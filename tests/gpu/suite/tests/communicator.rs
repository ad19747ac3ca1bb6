//! `Nccl` is a `Communicator` like the hosts': the same calls, the same results, the same errors, over device memory and
//! without waiting for the device. Method: ranks as threads, each with a device, joined by the engine's own rendezvous;
//! every operation on devices and on hosts, and the bits compared (the stand-in for NCCL folds in our tree).

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use fabric_engine::{
    Error, Result,
    buffer::Slab,
    comm::{
        Call, Collectives, Communicator, Data, Op, ReduceOp,
        host::{Host, Options as HostOptions},
        nccl::Nccl,
    },
    rendezvous::{Member, Options, Secret},
};
use fabric_kernels::{self as kernels, Device, Dtype, Element, Span, SpanMut, cuda::Queue};
use gpu_suite::{
    fakes,
    stage::{another, finish, with_fakes},
};

/// How long anything may take that should not.
const LATE: Duration = Duration::from_secs(20);

/// One rank: its device, and its communicator.
struct Rank {
    queue: Arc<Queue>,
    comm: Nccl,
}

fn join(
    rank: usize,
    size: usize,
    address: SocketAddr,
    listener: Option<TcpListener>,
) -> Arc<Member> {
    let secret = Secret::from_bytes(b"the secret of the suite, long enough");
    let options = Options::new(rank, size, address, secret);
    let member = match listener {
        Some(listener) => Member::host(options, listener),
        None => Member::join(options),
    };
    Arc::new(member.unwrap())
}

/// Run `body` on `size` ranks at once; operations have `deadline`.
fn world<T: Send>(size: usize, deadline: Duration, body: impl Fn(Rank) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let listener = Mutex::new(Some(listener));
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let (body, listener) = (&body, &listener);
                scope.spawn(move || {
                    let listener = if rank == 0 {
                        listener.lock().unwrap().take()
                    } else {
                        None
                    };
                    body(Rank::join(rank, size, address, listener, deadline))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

const FOUR: &[(&str, &str)] = &[("FAKE_CUDA_DEVICES", "4")];

impl Rank {
    fn join(
        rank: usize,
        size: usize,
        address: SocketAddr,
        listener: Option<TcpListener>,
        deadline: Duration,
    ) -> Self {
        let member = join(rank, size, address, listener);
        let options = HostOptions {
            deadline,
            ..HostOptions::default()
        };
        let host = Host::best(&member, options).unwrap();
        let queue = Queue::open(rank as u32).unwrap();
        let device: Arc<dyn Device> = queue.clone();
        let comm = Nccl::over(host, &device).unwrap();
        Rank { queue, comm }
    }

    fn up<T: Element>(&self, values: &[T]) -> Slab {
        let mut slab = self.comm.alloc(T::DTYPE, values.len()).unwrap();
        kernels::cast(Span::of(values), slab.part_mut(0..values.len())).unwrap();
        slab
    }

    /// The same call on a host's slabs and on the device's; the output of both.
    fn both(&mut self, call: Call, from: &[f32], into: Option<usize>) -> [Vec<f32>; 2] {
        let data = |from: Slab, fresh: &dyn Fn(usize) -> Slab| match into {
            Some(numel) => Data::Out {
                from,
                into: fresh(numel),
            },
            None => Data::InPlace(from),
        };
        let on_host = data(Slab::from_slice(from), &|numel| {
            Slab::zeroed(Dtype::F32, numel)
        });
        let on_host = self
            .comm
            .submit(call.clone(), on_host)
            .unwrap()
            .wait()
            .unwrap();
        let on_device = data(self.up(from), &|numel| {
            self.comm.alloc(Dtype::F32, numel).unwrap()
        });
        let on_device = self.comm.submit(call, on_device).unwrap().wait().unwrap();
        [on_host, on_device].map(|data| down::<f32>(&data.into_output()))
    }
}

fn down<T: Element>(slab: &Slab) -> Vec<T> {
    let mut values = vec![T::zeroed(); slab.numel()];
    kernels::cast(slab.part(0..slab.numel()), SpanMut::of(&mut values)).unwrap();
    values
}

fn ramp(rank: usize, numel: usize) -> Vec<f32> {
    (0..numel)
        .map(|index| ((index + 1) as f32 * 0.37 + rank as f32).sin() * 10.0)
        .collect()
}

impl Rank {
    /// The same call on both gives the same elements in `part` of the output.
    fn same(
        &mut self,
        call: Call,
        from: &[f32],
        into: Option<usize>,
        part: std::ops::Range<usize>,
    ) {
        let (rank, op) = (self.comm.rank(), call.op);
        let [host, device] = self.both(call, from, into);
        assert_eq!(host[part.clone()], device[part], "{op:?} on rank {rank}");
    }
}

#[test]
fn every_operation_gives_what_the_hosts_give() {
    with_fakes(FOUR, || {
        for size in [1, 2, 4] {
            world(size, LATE, |mut rank| {
                let own = rank.comm.rank();
                let (part, root) = (12, size - 1);
                let n = part * size;
                let values = ramp(own, n);
                let is_root = own == root;
                let slice = own * part..(own + 1) * part;
                for op in [
                    ReduceOp::Sum,
                    ReduceOp::Avg,
                    ReduceOp::Prod,
                    ReduceOp::Min,
                    ReduceOp::Max,
                    ReduceOp::PreMulSum(0.5 + own as f64),
                ] {
                    rank.same(Call::new(Op::AllReduce(op)), &values, None, 0..n);
                    rank.same(Call::new(Op::AllReduce(op)), &values, Some(n), 0..n);
                    rank.same(
                        Call::new(Op::ReduceScatter(op)),
                        &values,
                        Some(part),
                        0..part,
                    );
                    rank.same(
                        Call::new(Op::ReduceScatter(op)),
                        &values,
                        None,
                        slice.clone(),
                    );
                    let seen = if is_root { n } else { 0 };
                    rank.same(
                        Call::new(Op::Reduce { op, root }),
                        &values,
                        Some(n),
                        0..seen,
                    );
                    rank.same(Call::new(Op::Reduce { op, root }), &values, None, 0..n);
                }
                rank.same(Call::new(Op::AllGather), &values[..part], Some(n), 0..n);
                rank.same(Call::new(Op::AllGather), &values, None, 0..n);
                rank.same(Call::new(Op::Broadcast { root }), &values, None, 0..n);
                rank.same(Call::new(Op::AllToAll), &values, Some(n), 0..n);
                let (whole, mine) = if is_root { (n, n) } else { (0, part) };
                rank.same(
                    Call::new(Op::Gather { root }),
                    &values[..part],
                    Some(whole),
                    0..whole,
                );
                rank.same(
                    Call::new(Op::Gather { root }),
                    &values[..mine],
                    None,
                    0..mine,
                );
                rank.same(
                    Call::new(Op::Scatter { root }),
                    &values[..whole],
                    Some(part),
                    0..part,
                );
                rank.same(
                    Call::new(Op::Scatter { root }),
                    &values[..mine],
                    None,
                    if is_root { slice.clone() } else { 0..part },
                );
                // Uneven: rank r has r + 1 elements, and rank 0 none when there are others.
                let counts: Vec<usize> = (0..size)
                    .map(|rank| rank * 3 + usize::from(size == 1))
                    .collect();
                let (all, start) = (
                    counts.iter().sum::<usize>(),
                    counts[..own].iter().sum::<usize>(),
                );
                let mine = counts[own];
                let call = |op| Call::new(op).counts(&counts[..]);
                rank.same(call(Op::AllGather), &values[..mine], Some(all), 0..all);
                rank.same(
                    call(Op::ReduceScatter(ReduceOp::Sum)),
                    &ramp(own, all),
                    Some(mine),
                    0..mine,
                );
                rank.same(
                    call(Op::ReduceScatter(ReduceOp::Sum)),
                    &ramp(own, all),
                    None,
                    start..start + mine,
                );
                let whole = if is_root { all } else { 0 };
                rank.same(
                    call(Op::Gather { root }),
                    &values[..mine],
                    Some(whole),
                    0..whole,
                );
                rank.same(
                    call(Op::Scatter { root }),
                    &ramp(own, all)[..whole],
                    Some(mine),
                    0..mine,
                );
                let matrix: Vec<usize> = (0..size * size).map(|pair| pair % 3).collect();
                let sent: usize = matrix[own * size..(own + 1) * size].iter().sum();
                let taken: usize = matrix.iter().skip(own).step_by(size).sum();
                let call = Call::new(Op::AllToAll).counts(&matrix[..]);
                rank.same(call, &values[..sent], Some(taken), 0..taken);
                if size > 1 {
                    let (to, from) = ((own + 1) % size, (own + size - 1) % size);
                    rank.same(Call::new(Op::SendRecv { to, from }), &values, Some(n), 0..n);
                    match own {
                        0 => rank.same(Call::new(Op::Send { to: 1 }), &values, None, 0..n),
                        1 => rank.same(Call::new(Op::Recv { from: 0 }), &values, None, 0..n),
                        _ => {}
                    }
                }
                rank.comm.barrier().unwrap();
            });
        }
    });
}

#[test]
fn many_slabs_are_one_operation_and_every_dtype_travels() {
    with_fakes(FOUR, || {
        world(2, LATE, |mut rank| {
            let own = rank.comm.rank() as f32;
            let slabs = [3usize, 0, 500].map(|numel| rank.up(&vec![own + 1.0; numel]));
            let call = Call::new(Op::AllReduce(ReduceOp::Sum));
            let work = rank.comm.submit(call, Data::Many(slabs.into())).unwrap();
            let slabs = work.wait().unwrap().into_many();
            assert_eq!(
                slabs.iter().map(Slab::numel).collect::<Vec<_>>(),
                [3, 0, 500]
            );
            assert!(
                slabs
                    .iter()
                    .all(|slab| down::<f32>(slab).iter().all(|x| *x == 3.0))
            );
            for dtype in Dtype::ALL {
                let slab = rank.comm.alloc(dtype, 5).unwrap();
                let into = rank.comm.alloc(dtype, 10).unwrap();
                let work = rank
                    .comm
                    .submit(Call::new(Op::AllGather), Data::Out { from: slab, into });
                work.unwrap().wait().unwrap();
            }
            let shorts = rank.up(&[1i16, 2]);
            let call = Call::new(Op::AllReduce(ReduceOp::Sum));
            let refused = rank
                .comm
                .submit(call, Data::InPlace(shorts))
                .unwrap_err()
                .to_string();
            assert!(refused.contains("does not compute with i16"), "{refused}");
            rank.comm.barrier().unwrap(); // a refusal is no failure
        });
    });
}

#[test]
fn buffers_of_hosts_and_devices_go_their_own_ways() {
    with_fakes(FOUR, || {
        world(2, LATE, |mut rank| {
            let own = rank.comm.rank();
            let mut vector = vec![own as f32; 3];
            rank.comm.all_reduce(&mut vector, ReduceOp::Sum).unwrap();
            assert_eq!(vector, [1.0; 3]);
            let mut slab = rank.up(&[own as f32; 3]);
            rank.comm.all_reduce(&mut slab, ReduceOp::Sum).unwrap();
            assert_eq!(down::<f32>(&slab), [1.0; 3]);
            let all = rank.comm.all_gather(&slab).unwrap();
            assert_eq!(all.memory(), slab.memory());
            let all = rank
                .comm
                .all_gather_bytes(&vec![own as u8; own + 1])
                .unwrap();
            assert_eq!(all, [vec![0], vec![1, 1]]);
            let mixed = Data::Out {
                from: rank.up(&[1f32]),
                into: Slab::zeroed(Dtype::F32, 2),
            };
            let refused = rank
                .comm
                .submit(Call::new(Op::AllGather), mixed)
                .unwrap_err()
                .to_string();
            assert!(refused.contains("several memories"), "{refused}");
            let other = Queue::open(3).unwrap();
            let device: Arc<dyn Device> = other;
            let far = Slab::zeroed_on(Some(&device), Dtype::F32, 1).unwrap();
            let call = Call::new(Op::AllReduce(ReduceOp::Sum));
            let refused = rank
                .comm
                .submit(call, Data::InPlace(far))
                .unwrap_err()
                .to_string();
            assert!(
                refused.contains("cuda:3 memory on a communicator of cuda:"),
                "{refused}"
            );
            rank.comm.barrier().unwrap();
        });
    });
}

/// Goal: nobody waits for the device between submission and the end of a step. Method: count what the driver was asked.
#[test]
fn a_pipeline_of_operations_never_waits_for_the_device() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "1000")], || {
        world(2, LATE, |mut rank| {
            let own = rank.comm.rank() as f32;
            let mut slab = Some(rank.up(&[own + 1.0; 1000]));
            rank.queue.settle().unwrap();
            rank.comm.barrier().unwrap(); // both count from here
            let synchronised = || {
                let calls = [
                    "cuStreamSynchronize",
                    "cuEventSynchronize",
                    "cuCtxSynchronize",
                ];
                calls.iter().map(|call| fakes::calls(call)).sum::<u64>()
            };
            let before = synchronised();
            for _ in 0..10 {
                let mut own = slab.take().unwrap();
                kernels::scale(own.part_mut(0..1000), 0.5).unwrap();
                let call = Call::new(Op::AllReduce(ReduceOp::Sum));
                let work = rank.comm.submit(call, Data::InPlace(own)).unwrap();
                slab = Some(work.wait().unwrap().into_output());
            }
            assert_eq!(synchronised(), before);
            rank.comm.barrier().unwrap();
            // 1 and 2: half of each is 1.5 together, and so it stays.
            assert_eq!(down::<f32>(&slab.unwrap()), [1.5; 1000]);
        });
    });
}

#[test]
fn a_work_that_is_dropped_keeps_its_memory_until_it_is_done() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "2000")], || {
        world(2, LATE, |mut rank| {
            for _ in 0..5 {
                let slab = rank.up(&[1f32; 4000]);
                let call = Call::new(Op::AllReduce(ReduceOp::Sum));
                drop(rank.comm.submit(call, Data::InPlace(slab)).unwrap());
                // Memory of the same size: it would be the same block, were it free already.
                let next = rank.up(&[7f32; 4000]);
                assert_eq!(down::<f32>(&next), [7.0; 4000]);
            }
            rank.comm.barrier().unwrap();
        });
    });
}

#[test]
fn groups_split_on_both_sides() {
    with_fakes(FOUR, || {
        world(4, LATE, |mut rank| {
            let own = rank.comm.rank();
            // Backwards within each half, and one with a color that NCCL does not take.
            for color in [own as u32 / 2, u32::MAX - own as u32 / 2] {
                let mut half = rank.comm.split(color, 10 - own as u32).unwrap();
                assert_eq!((half.size(), half.rank()), (2, 1 - own % 2));
                let mut slab = rank.up(&[own as f32]);
                half.all_reduce(&mut slab, ReduceOp::Sum).unwrap();
                let expected = if own < 2 { 1.0 } else { 5.0 };
                assert_eq!(down::<f32>(&slab), [expected]);
                let mut vector = vec![own as f32];
                half.all_reduce(&mut vector, ReduceOp::Sum).unwrap();
                assert_eq!(vector, [expected]);
            }
        });
    });
}

/// The error that a rank meets sooner or later, when it goes on reducing.
fn outlive(rank: &mut Rank) -> Error {
    let begun = Instant::now();
    loop {
        let mut step = || -> Result<()> {
            let slab = rank.comm.alloc(Dtype::F32, 100)?;
            let call = Call::new(Op::AllReduce(ReduceOp::Sum));
            let work = rank.comm.submit(call, Data::InPlace(slab))?;
            work.block()?;
            work.wait().map(drop)
        };
        match step() {
            Err(error) => return error,
            Ok(()) => assert!(begun.elapsed() < LATE, "no error came"),
        }
    }
}

#[test]
fn an_operation_that_a_rank_never_joins_times_out_and_lets_the_stream_go_on() {
    with_fakes(&[], || {
        let errors = world(2, Duration::from_millis(500), |mut rank| {
            if rank.comm.rank() == 1 {
                // It is told what happened, though it waits for nothing.
                let signal = rank.comm.aborter().signal().clone();
                return signal.wait(LATE).expect("the abort of rank 0").to_string();
            }
            let slab = rank.up(&[1f32; 10]);
            let call = Call::new(Op::AllReduce(ReduceOp::Sum));
            let work = rank.comm.submit(call, Data::InPlace(slab)).unwrap();
            let slab = work.wait().unwrap().into_output(); // the queue waits, not the host
            drop(slab);
            rank.queue.settle().unwrap(); // it would not return if nobody aborted
            let error = rank.comm.barrier().unwrap_err();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            error.to_string()
        });
        assert!(
            errors[0].contains("rank 0: #") && errors[0].contains("all_reduce"),
            "{}",
            errors[0]
        );
        assert!(errors[0].contains("waiting for rank 1"), "{}", errors[0]);
        assert!(errors[1].contains("all_reduce"), "{}", errors[1]);
    });
}

#[test]
fn an_abort_ends_what_waits_on_devices_on_all_ranks() {
    with_fakes(&[], || {
        let errors = world(2, LATE, |mut rank| {
            rank.comm.barrier().unwrap();
            if rank.comm.rank() == 1 {
                rank.comm.aborter().abort("the user pressed Ctrl-C");
                return outlive(&mut rank).to_string();
            }
            outlive(&mut rank).to_string()
        });
        for error in errors {
            assert!(error.contains("the user pressed Ctrl-C"), "{error}");
        }
    });
}

/// Goal: a killed process is told as on the hosts' wires: who, how, and where it was last seen. Method: this test again as
/// another process, killed while an operation waits for it on the device.
#[test]
fn a_rank_that_is_killed_is_a_lost_peer_in_the_words_of_the_hosts_wires() {
    with_fakes(&[], || {
        let sum = |rank: &mut Rank| {
            let mut slab = rank.up(&[1f32; 10]);
            rank.comm.all_reduce(&mut slab, ReduceOp::Sum).unwrap();
            rank.queue.settle().unwrap();
        };
        if let Ok(address) = std::env::var("SUITE_ADDRESS") {
            let mut peer = Rank::join(1, 2, address.parse().unwrap(), None, LATE);
            sum(&mut peer);
            loop {
                std::thread::park(); // until it is killed
            }
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let test = "a_rank_that_is_killed_is_a_lost_peer_in_the_words_of_the_hosts_wires";
        let mut peer = another(test, &[("SUITE_ADDRESS", &address.to_string())]);
        let mut rank = Rank::join(0, 2, address, Some(listener), LATE);
        sum(&mut rank);
        let slab = rank.up(&[1f32; 10]);
        let call = Call::new(Op::AllReduce(ReduceOp::Sum));
        let work = rank.comm.submit(call, Data::InPlace(slab)).unwrap();
        let slab = work.wait().unwrap().into_output(); // the queue waits for the peer
        peer.kill().unwrap();
        rank.queue.settle().unwrap(); // the abort lets it go on
        drop(slab);
        let error = outlive(&mut rank);
        assert!(matches!(error, Error::PeerLost(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("rank 1 is gone"), "{text}");
        assert!(
            text.contains("The last operation it joined: #")
                && text.contains("all_reduce(sum, 10 x f32)"),
            "{text}"
        );
        finish(peer, LATE);
    });
}

#[test]
fn a_call_that_nccl_refuses_ends_the_group_in_words() {
    with_fakes(&[("FAKE_NCCL_FAIL", "ncclAllReduce:3:3")], || {
        let errors = world(2, LATE, |mut rank| outlive(&mut rank).to_string());
        assert!(
            errors.iter().any(|error| error.contains("ncclAllReduce")),
            "{errors:?}"
        );
    });
}

#[test]
fn memory_of_another_queue_is_reduced_in_that_queues_order() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "1000")], || {
        world(2, LATE, |mut rank| {
            let other: Arc<dyn Device> = Queue::open(rank.comm.rank() as u32).unwrap();
            let all = || 0..5000;
            for turn in 1..8 {
                let mut slab = Slab::zeroed_on(Some(&other), Dtype::F32, 5000).unwrap();
                kernels::fill(slab.part_mut(all()), f64::from(turn)).unwrap();
                let call = || Call::new(Op::AllReduce(ReduceOp::Sum));
                let work = rank.comm.submit(call(), Data::InPlace(slab)).unwrap();
                let mut slab = work.wait().unwrap().into_output();
                kernels::scale(slab.part_mut(all()), 2.0).unwrap();
                let expected = (4 * turn) as f32;
                assert!(down::<f32>(&slab).iter().all(|x| *x == expected));
                // Freed while it is reduced.
                drop(rank.comm.submit(call(), Data::InPlace(slab)).unwrap());
            }
            rank.comm.barrier().unwrap();
        });
    });
}

/// What all ranks meet when something goes wrong with one of them: nobody waits for long.
fn all_hear(errors: &[String], what: &str) {
    for error in errors {
        assert!(error.contains(what), "{errors:#?}");
    }
}

#[test]
fn a_driver_that_fails_around_an_operation_on_one_rank_ends_the_group() {
    with_fakes(&[("FAKE_CUDA_FAIL", "cuEventRecord:10:2")], || {
        let begun = Instant::now();
        let errors = world(2, 3 * LATE, |mut rank| {
            let error = outlive(&mut rank).to_string();
            let slab = Slab::zeroed(Dtype::F32, 1);
            let call = Call::new(Op::AllReduce(ReduceOp::Sum));
            let later = rank.comm.submit(call, Data::InPlace(slab));
            assert!(later.and_then(|work| work.wait()).is_err(), "it stays");
            error
        });
        all_hear(&errors, "record an event");
        assert!(begun.elapsed() < LATE);
    });
}

/// Two ranks that join; what each meets.
fn joined() -> Vec<Result<()>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let begun = Instant::now();
    let results = std::thread::scope(|scope| {
        let mut listener = Some(listener);
        let ranks = [0, 1].map(|rank| {
            let listener = listener.take();
            scope.spawn(move || {
                let member = join(rank, 2, address, listener);
                let options = HostOptions {
                    deadline: 3 * LATE,
                    ..HostOptions::default()
                };
                let host = Host::best(&member, options).unwrap();
                let device: Arc<dyn Device> = Queue::open(rank as u32).unwrap();
                let result = Nccl::over(host, &device).map(drop);
                // A rank that failed may live on, and its connections with it.
                let signal = member.control().signal().clone();
                if result.is_err() {
                    signal.wait(LATE);
                }
                result
            })
        });
        ranks.map(|rank| rank.join().unwrap())
    });
    assert!(begun.elapsed() < LATE, "somebody waited for long");
    results.into()
}

fn words(results: Vec<Result<()>>) -> Vec<String> {
    let word = |result: Result<()>| result.expect_err("on both ranks").to_string();
    results.into_iter().map(word).collect()
}

#[test]
fn a_rank_that_nccl_does_not_take_is_heard_of_by_those_that_wait_in_nccl() {
    with_fakes(&[("FAKE_NCCL_FAIL", "ncclCommInitRankConfig:2:1")], || {
        all_hear(&words(joined()), "ncclCommInitRankConfig");
    });
}

#[test]
fn a_rank_without_a_stream_is_heard_of_by_those_that_wait_in_nccl() {
    with_fakes(&[("FAKE_CUDA_FAIL", "cuStreamCreate:4:2")], || {
        all_hear(&words(joined()), "open a stream");
    });
}

#[test]
fn a_split_that_fails_on_one_rank_fails_on_all() {
    with_fakes(&[("FAKE_NCCL_FAIL", "ncclCommSplit:2:1")], || {
        let begun = Instant::now();
        let errors = world(2, 3 * LATE, |mut rank| match rank.comm.split(0, 0) {
            Err(error) => error.to_string(),
            Ok(_) => outlive(&mut rank).to_string(),
        });
        all_hear(&errors, "ncclCommSplit");
        assert!(begun.elapsed() < LATE);
    });
}

#[test]
fn an_operation_may_have_all_the_time_there_is() {
    with_fakes(&[], || {
        world(2, Duration::MAX, |mut rank| {
            let call = Call {
                deadline: Some(Duration::MAX),
                ..Call::new(Op::AllReduce(ReduceOp::Sum))
            };
            for _ in 0..3 {
                let slab = rank.up(&[1f32; 10]);
                let work = rank.comm.submit(call.clone(), Data::InPlace(slab)).unwrap();
                work.block().unwrap();
                assert_eq!(down::<f32>(&work.wait().unwrap().into_output()), [2.0; 10]);
            }
            // The watch lives: it aborts what waits.
            rank.comm.barrier().unwrap();
            if rank.comm.rank() == 1 {
                rank.comm.aborter().abort("enough");
                return;
            }
            assert!(outlive(&mut rank).to_string().contains("enough"));
        });
    });
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn works_outlive_their_communicator_on_other_threads_and_nothing_stays() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "500")], || {
        let before = threads();
        for _ in 0..4 {
            world(2, LATE, |mut rank| {
                let mut works: Vec<_> = (0..6)
                    .map(|_| {
                        let slab = rank.up(&[1f32; 3000]);
                        let call = Call::new(Op::AllReduce(ReduceOp::Sum));
                        rank.comm.submit(call, Data::InPlace(slab)).unwrap()
                    })
                    .collect();
                let kept = works.pop().unwrap();
                drop(rank.comm);
                std::thread::spawn(move || drop(works)).join().unwrap();
                let slab = kept.wait().unwrap().into_output();
                assert_eq!(down::<f32>(&slab), [2.0; 3000]);
                drop(slab);
                rank.queue.settle().unwrap();
            });
            assert_eq!([0, 1].map(fakes::live), [0, 0]);
        }
        // The stand-in keeps one thread a device, and ends those of streams when it comes to it.
        let begun = Instant::now();
        while threads() > before + 2 {
            assert!(begun.elapsed() < LATE, "{} threads stay", threads());
            std::thread::yield_now();
        }
    });
}
