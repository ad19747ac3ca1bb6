//! Ranks as threads of one process, each with its own place in the job, its own arena and its own sockets: what they
//! share, they share through the kernel, as processes do.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsFd,
    sync::{Arc, Mutex},
    time::Duration,
};

use fabric_kernels::{self as kernels, Dtype, Span};

use super::*;
use crate::{
    comm::{Collectives, Label, Op, ReduceOp},
    rendezvous::{Options as Join, Secret},
    schedule::{Kind, Problem},
};
use crate::{rendezvous::Member, wire::shm::Mapping};

const ARENA: usize = 64 << 20;

fn options() -> Options {
    Options {
        deadline: Duration::from_secs(60),
        arena_bytes: ARENA,
        ..Options::default()
    }
}

/// Run `rank` on every rank of a world, and give back what they returned, by rank.
fn world<T: Send>(size: usize, rank: impl Fn(&Arc<Member>) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let listener = Mutex::new(Some(listener));
    let secret = Secret::from_bytes(b"the ranks of a test");
    std::thread::scope(|scope| {
        let threads = (0..size)
            .map(|number| {
                let (rank, listener, secret) = (&rank, &listener, secret.clone());
                scope.spawn(move || {
                    let join = Join::new(number, size, address, secret);
                    let member = if number == 0 {
                        Member::host(join, listener.lock().unwrap().take().unwrap())
                    } else {
                        Member::join(join)
                    };
                    rank(&Arc::new(member.unwrap()))
                })
            })
            .collect::<Vec<_>>();
        let joined = threads.into_iter().map(|thread| thread.join().unwrap());
        joined.collect()
    })
}

fn shm(member: &Arc<Member>, options: Options) -> Host {
    let host = Host::shm(member, options).unwrap();
    host.expect("ranks of one process share memory")
}

/// Values that every dtype holds and whose sums round: different on every rank.
fn fill(slab: &mut Slab, rank: usize) {
    let values = (0..slab.numel())
        .map(|index| {
            let mixed = (index * 31 + rank * 17 + 7) % 61;
            if slab.dtype().is_float() {
                (mixed as f32 - 30.0) * 0.37
            } else {
                mixed as f32
            }
        })
        .collect::<Vec<_>>();
    let all = 0..values.len();
    if slab.dtype().is_float() {
        kernels::cast(Span::of(&values), slab.part_mut(all)).unwrap();
        return;
    }
    let size = slab.dtype().size();
    let is_bool = slab.dtype() == Dtype::Bool;
    for (bytes, value) in slab.as_bytes_mut().chunks_exact_mut(size).zip(values) {
        bytes.fill(0);
        bytes[0] = if is_bool {
            u8::from((value as u8).is_multiple_of(3))
        } else {
            value as u8
        };
    }
}

/// Every collective that `dtype` can be used with.
fn calls(dtype: Dtype, size: usize) -> Vec<Op> {
    let mut reduces = vec![ReduceOp::Min, ReduceOp::Max];
    if dtype != Dtype::Bool {
        reduces.extend([ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Prod]);
        reduces.push(ReduceOp::PreMulSum(3.0));
    }
    if !dtype.is_float() {
        reduces.extend([ReduceOp::BitAnd, ReduceOp::BitOr, ReduceOp::BitXor]);
    }
    let root = size - 1;
    let mut calls = vec![
        Op::AllGather,
        Op::Broadcast { root },
        Op::Gather { root },
        Op::Scatter { root },
        Op::AllToAll,
    ];
    calls.extend(reduces.iter().map(|op| Op::AllReduce(*op)));
    calls.extend(reduces.iter().map(|op| Op::ReduceScatter(*op)));
    calls.extend(reduces.iter().map(|op| Op::Reduce { op: *op, root }));
    calls
}

/// Each rank multiplies with its own factor.
fn own(op: Op, rank: usize) -> Op {
    let own = |reduce| match reduce {
        ReduceOp::PreMulSum(factor) => ReduceOp::PreMulSum(factor + rank as f64),
        reduce => reduce,
    };
    match op {
        Op::AllReduce(reduce) => Op::AllReduce(own(reduce)),
        Op::ReduceScatter(reduce) => Op::ReduceScatter(own(reduce)),
        Op::Reduce { op, root } => Op::Reduce { op: own(op), root },
        op => op,
    }
}

/// Uneven slices, or blocks, of `numel` elements each at most.
fn uneven(op: Op, size: usize, numel: usize) -> Option<Arc<[usize]>> {
    let count = |slice: usize| numel * (slice * 5 % 7) / 6;
    match op {
        Op::ReduceScatter(_) | Op::AllGather | Op::Gather { .. } | Op::Scatter { .. } => {
            Some((0..size).map(count).collect())
        }
        Op::AllToAll => Some((0..size * size).map(count).collect()),
        _ => None,
    }
}

/// The problem of `op` on slices, or blocks, of `numel` elements each, or on so many where there are no slices.
fn problem(call: &Call, size: usize, numel: usize) -> Problem {
    let kind = call.op.kind().expect("no message");
    match (&call.counts, kind) {
        (Some(counts), _) => Problem::with_counts(kind, size, counts),
        (_, Kind::AllReduce | Kind::Broadcast { .. } | Kind::Reduce { .. }) => {
            Problem::even(kind, size, numel)
        }
        (_, Kind::AllToAll) => Problem::even(kind, size, numel * size * size),
        _ => Problem::even(kind, size, numel * size),
    }
}

/// Run one collective, and give back the bytes of the rank's output alone.
fn once(
    host: &mut Host,
    call: &Call,
    numel: usize,
    form: Form,
    slab: &dyn Fn(&Host, usize) -> Slab,
) -> Result<Vec<u8>> {
    let (rank, size) = (host.rank(), host.size());
    let problem = problem(call, size, numel);
    let (input, output) = (problem.input(rank), problem.output_elems(rank));
    let root = problem.kind.root();
    let data = match form {
        Form::Apart => {
            let mut from = slab(host, input.len());
            fill(&mut from, rank);
            let into = slab(host, output);
            Data::Out { from, into }
        }
        Form::InPlace => {
            let whole = root.is_none_or(|root| root == rank);
            let held = if whole {
                problem.elems()
            } else {
                input.len().max(output)
            };
            let mut slab = slab(host, held);
            // The input's values are those of the other forms.
            let mut values = Slab::zeroed(slab.dtype(), input.len());
            fill(&mut values, rank);
            let start = if whole { input.start } else { 0 };
            let place = slab.part_mut(start..start + input.len());
            kernels::cast(values.part(0..input.len()), place).unwrap();
            Data::InPlace(slab)
        }
        Form::Many => {
            let mut values = slab(host, problem.elems());
            fill(&mut values, rank);
            let (first, rest) = values.split_at(numel / 3);
            let (none, rest) = rest.split_at(0);
            Data::Many(vec![first, none, rest])
        }
    };
    let call = Call {
        op: own(call.op, rank),
        ..call.clone().blocking()
    };
    let start = problem.outputs(rank).next().map_or(0, |part| part.start);
    match host.submit(call, data)?.wait()? {
        Data::Many(slabs) if output > 0 => Ok(slabs
            .iter()
            .flat_map(|slab| slab.as_bytes().to_vec())
            .collect()),
        Data::InPlace(slab) if root.is_none_or(|root| root == rank) && output > 0 => {
            let size = slab.dtype().size();
            Ok(slab.as_bytes()[start * size..(start + output) * size].to_vec())
        }
        Data::Many(_) => Ok(Vec::new()),
        data => {
            let slab = data.into_output();
            Ok(slab.as_bytes()[..output * slab.dtype().size()].to_vec())
        }
    }
}

/// How the memory is given.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Apart,
    InPlace,
    Many,
}

/// Goal: shared memory gives the bits of the message executor. Method: both communicators side by side on the same
/// inputs, over worlds, dtypes, operations and lengths, in place and not, with registered and with private buffers.
fn agrees_with_tcp(size: usize, dtypes: &[Dtype], lengths: &[usize]) {
    world(size, |member| {
        let mut tcp = Host::tcp(member, options()).unwrap();
        let mut host = shm(member, options());
        for &dtype in dtypes {
            for op in calls(dtype, size) {
                for (index, &numel) in lengths.iter().enumerate() {
                    let even = Call::new(op);
                    let uneven = uneven(op, size, numel).map(|counts| even.clone().counts(counts));
                    for call in [Some(even), uneven].into_iter().flatten() {
                        one_agrees_with_tcp(&mut tcp, &mut host, &call, dtype, numel, index);
                    }
                }
            }
        }
        host.barrier().unwrap();
    });
}

fn one_agrees_with_tcp(
    tcp: &mut Host,
    host: &mut Host,
    call: &Call,
    dtype: Dtype,
    numel: usize,
    index: usize,
) {
    let heap = |_: &Host, numel| Slab::zeroed(dtype, numel);
    let arena = |host: &Host, numel| host.alloc(dtype, numel).unwrap();
    // Some ranks' buffers are private, not always the same ones.
    let mixed = |host: &Host, numel| {
        if (host.rank() + index).is_multiple_of(2) {
            Slab::zeroed(dtype, numel)
        } else {
            host.alloc(dtype, numel).unwrap()
        }
    };
    let expected = once(tcp, call, numel, Form::Apart, &heap).unwrap();
    let full = problem(call, host.size(), numel).elems();
    for form in [Form::Apart, Form::InPlace, Form::Many] {
        let what = || format!("{call:?} of {numel} x {dtype}, {form:?}");
        let whole = matches!(
            call.op,
            Op::AllReduce(_) | Op::Reduce { .. } | Op::Broadcast { .. }
        );
        if (form == Form::Many && !whole) || (form == Form::InPlace && call.op == Op::AllToAll) {
            continue;
        }
        let messages = once(tcp, call, numel, form, &heap);
        assert!(messages.unwrap() == expected, "messages {}", what());
        let price = host.price(call, dtype, full);
        let before = host.spent();
        let registered = once(host, call, numel, form, &arena);
        assert!(registered.unwrap() == expected, "registered {}", what());
        if form != Form::Many {
            assert_eq!(host.spent() - before, price, "{}", what());
        }
        let private = once(host, call, numel, form, &mixed);
        assert!(private.unwrap() == expected, "private {}", what());
    }
}

/// Goal: messages reach their rank whatever else goes on, and only two ranks take part. Method: on both wires, with memory
/// in arenas and outside, longer than a stage and empty; sends before receives, a ring at once, collectives in between.
#[test]
fn messages_go_from_rank_to_rank_between_collectives() {
    for size in [2, 3, 5] {
        world(size, |member| {
            let rank = member.rank();
            let hosts = [
                Host::tcp(member, options()).unwrap(),
                shm(member, options()),
            ];
            for mut host in hosts {
                for (private, numel) in [(false, 1000), (true, 3), (true, 300_001), (false, 0)] {
                    let slab = |host: &Host, value: u32| {
                        let mut slab = if private {
                            Slab::zeroed(Dtype::U32, numel)
                        } else {
                            host.alloc(Dtype::U32, numel).unwrap()
                        };
                        slab.as_mut_slice::<u32>().fill(value);
                        slab
                    };
                    let is_all = |slab: &Slab, value: u32| {
                        assert!(slab.as_slice::<u32>().iter().all(|v| *v == value));
                        assert_eq!(slab.numel(), numel);
                    };
                    // From rank 1 to rank 0; the others know nothing of it.
                    let one = match rank {
                        0 => Some((Op::Recv { from: 1 }, 0)),
                        1 => Some((Op::Send { to: 0 }, 7)),
                        _ => None,
                    };
                    if let Some((op, value)) = one {
                        let data = Data::InPlace(slab(&host, value));
                        let before = host.spent();
                        let work = host.submit(Call::new(op).blocking(), data).unwrap();
                        is_all(&work.wait().unwrap().into_output(), 7);
                        let price = host.price(&Call::new(op), Dtype::U32, numel);
                        assert_eq!(host.spent() - before, price);
                    }
                    host.barrier().unwrap();
                    // Around, all at once.
                    let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
                    let call = Call::new(Op::SendRecv { to, from });
                    let (source, target) = (slab(&host, rank as u32), slab(&host, 99));
                    let data = Data::Out {
                        from: source,
                        into: target,
                    };
                    let work = host.submit(call, data).unwrap();
                    is_all(&work.wait().unwrap().into_output(), from as u32);
                }
            }
        });
    }
}

#[test]
fn the_convenient_forms_say_what_everybody_gave() {
    world(3, |member| {
        let mut host = shm(member, options());
        let rank = host.rank();
        let mut sum = vec![rank as f32; 2];
        host.reduce(&mut sum, ReduceOp::Sum, 1).unwrap();
        assert_eq!(
            sum,
            if rank == 1 {
                [3.0; 2]
            } else {
                [rank as f32; 2]
            }
        );
        let rows = host.gather(&vec![rank as i64; 2], 2).unwrap();
        let rows = rows.map(|rows| rows.as_slice::<i64>().to_vec());
        assert_eq!(rows, (rank == 2).then(|| vec![0, 0, 1, 1, 2, 2]));
        let cut: Vec<i32> = (0..6).collect();
        let mut own = vec![0; 2];
        let from = (rank == 0).then_some(&cut as &dyn crate::buffer::Buffer);
        host.scatter(from, &mut own, 0).unwrap();
        assert_eq!(own, [2 * rank as i32, 2 * rank as i32 + 1]);
        let blocks: Vec<u8> = (0..3).map(|to| (10 * rank + to) as u8).collect();
        let column = host.all_to_all(&blocks).unwrap();
        assert_eq!(
            column.as_bytes(),
            [rank as u8, 10 + rank as u8, 20 + rank as u8]
        );
        // Rank r gives r elements to rank 0, one to rank 1 and none to rank 2.
        let (all, counts) = host
            .all_to_all_v(&vec![rank as u16; rank + 1], &[rank, 1, 0])
            .unwrap();
        let expected: [Vec<usize>; 3] = [vec![0, 1, 2], vec![1; 3], vec![0; 3]];
        assert_eq!(counts, expected[rank]);
        assert_eq!(all.numel(), counts.iter().sum::<usize>());
        let (all, counts) = host.all_gather_v(&vec![rank as u16; 2 - rank]).unwrap();
        assert_eq!(
            (all.as_slice::<u16>(), &counts[..]),
            (&[0, 0, 1][..], &[2, 1, 0][..])
        );
        let (mut a, mut b) = (vec![1.0f64; 3], vec![rank as f64]);
        host.all_reduce_coalesced(&mut [&mut a, &mut b], ReduceOp::Sum)
            .unwrap();
        assert_eq!((a, b), (vec![3.0; 3], vec![3.0]));
        match rank {
            0 => host.send(&vec![5u8; 4], 2).unwrap(),
            2 => {
                let mut got = vec![0u8; 4];
                host.recv(&mut got, 0).unwrap();
                assert_eq!(got, [5; 4]);
            }
            _ => {}
        }
        let wrong = host.all_to_all_v(&vec![0u8; 3], &[1, 1, 2]);
        assert!(wrong.unwrap_err().to_string().contains("together they are"));
    });
}

#[test]
fn memory_that_does_not_fit_a_call_is_refused_before_anybody_waits() {
    world(2, |member| {
        let mut host = shm(member, options());
        let slab = |numel| Slab::zeroed(Dtype::F32, numel);
        let out = |from, into| Data::Out {
            from: slab(from),
            into: slab(into),
        };
        let rank = host.rank();
        let call = Call::new;
        let cases = [
            (call(Op::Barrier), Data::InPlace(slab(1)), "Data::None"),
            (call(Op::AllGather), Data::None, "without data"),
            (call(Op::AllGather), out(2, 5), "slices"),
            (
                call(Op::AllGather),
                Data::InPlace(slab(3)),
                "multiple of the world size",
            ),
            (
                call(Op::ReduceScatter(ReduceOp::Sum)),
                out(4, 1),
                "come out",
            ),
            (
                call(Op::Gather { root: 2 }),
                Data::InPlace(slab(2)),
                "root 2 of 2",
            ),
            (
                call(Op::AllToAll),
                Data::InPlace(slab(4)),
                "output of its own",
            ),
            (call(Op::AllToAll).counts([1, 2, 3]), out(1, 1), "3 counts"),
            (
                call(Op::AllReduce(ReduceOp::Sum)).counts([1, 1]),
                Data::InPlace(slab(2)),
                "leave",
            ),
            (
                call(Op::AllGather),
                Data::Many(vec![slab(2)]),
                "Only all_reduce",
            ),
            (
                call(Op::AllReduce(ReduceOp::Sum)),
                Data::Many(vec![]),
                "at least one",
            ),
            (
                call(Op::Send { to: rank }),
                Data::InPlace(slab(2)),
                "another rank",
            ),
            (
                call(Op::Recv { from: 7 }),
                Data::InPlace(slab(2)),
                "another rank",
            ),
            (call(Op::Send { to: 1 - rank }), out(1, 1), "Data::InPlace"),
            (
                call(Op::Gather { root: rank }),
                Data::InPlace(slab(3)),
                "multiple",
            ),
        ];
        for (call, data, hint) in cases {
            let text = host.submit(call, data).unwrap_err().to_string();
            assert!(text.contains(hint), "{text}");
        }
        host.barrier().unwrap();
    });
}

#[test]
fn ranks_that_cut_differently_are_told() {
    let errors = world(2, |member| {
        let mut host = shm(member, options());
        let counts = if host.rank() == 0 { [1, 3] } else { [3, 1] };
        let from = Slab::zeroed(Dtype::F32, counts[host.rank()]);
        let into = Slab::zeroed(Dtype::F32, 4);
        let call = Call::new(Op::AllGather).counts(counts).blocking();
        let work = host.submit(call, Data::Out { from, into });
        work.and_then(Work::wait).unwrap_err().to_string()
    });
    assert!(
        errors.iter().any(|text| text.contains("slices ")),
        "{errors:?}"
    );
}

#[test]
fn a_message_of_another_length_is_named_on_the_side_that_receives_it() {
    let errors = world(2, |member| {
        let mut host = shm(member, options());
        let (op, numel) = match member.rank() {
            0 => (Op::Send { to: 1 }, 3),
            _ => (Op::Recv { from: 0 }, 4),
        };
        let data = Data::InPlace(host.alloc(Dtype::F32, numel).unwrap());
        let work = host.submit(Call::new(op).blocking(), data);
        work.and_then(Work::wait).unwrap_err().to_string()
    });
    assert!(
        errors[1].contains("send_recv(f32)") && errors[1].contains("12 bytes"),
        "{}",
        errors[1]
    );
}

#[test]
fn shared_memory_gives_the_bits_of_messages_for_every_dtype() {
    for size in 1..=5 {
        agrees_with_tcp(size, &Dtype::ALL, &[0, 1, 2, 7, 64, 1000]);
    }
}

#[test]
fn shared_memory_gives_the_bits_of_messages_over_many_chunks() {
    agrees_with_tcp(3, &Dtype::ALL, &[100_003]);
    for size in [1, 2, 4, 5] {
        agrees_with_tcp(size, &[Dtype::BF16, Dtype::I32], &[100_003]);
    }
}

/// Goal: windows begin and end where they should, whatever the world. Method: all_reduce of f64 against a sum that is
/// exact.
#[test]
fn long_vectors_cross_windows_in_every_world() {
    for size in 1..=5 {
        world(size, |member| {
            let mut host = shm(member, options());
            for numel in [100_003, 32 << 10, (32 << 10) + 1] {
                for private in [false, true] {
                    let mut slab = if private {
                        Slab::zeroed(Dtype::F64, numel)
                    } else {
                        host.alloc(Dtype::F64, numel).unwrap()
                    };
                    for (index, value) in slab.as_mut_slice::<f64>().iter_mut().enumerate() {
                        *value = (index * (host.rank() + 1)) as f64;
                    }
                    let call = Call::new(Op::AllReduce(ReduceOp::Sum));
                    let slab = host.submit(call, Data::InPlace(slab)).unwrap();
                    let slab = slab.wait().unwrap().into_output();
                    let factor = size * (size + 1) / 2;
                    let right = |(index, value): (usize, &f64)| *value == (index * factor) as f64;
                    assert!(slab.as_slice::<f64>().iter().enumerate().all(right));
                }
            }
        });
    }
}

#[test]
fn ranks_that_diverge_both_say_what_they_are_in() {
    for over_shm in [true, false] {
        let errors = world(2, |member| {
            let mut host = if over_shm {
                shm(member, options())
            } else {
                Host::tcp(member, options()).unwrap()
            };
            host.barrier().unwrap();
            let slab = host.alloc(Dtype::F32, 8 + host.rank()).unwrap();
            let call = Call::new(Op::AllReduce(ReduceOp::Sum)).label(Label::Bucket(3));
            host.submit(call, Data::InPlace(slab))
                .and_then(Work::wait)
                .unwrap_err()
                .to_string()
        });
        // The rank that looks later may hear from the hub first; what it hears is the other's story.
        for error in errors {
            assert!(error.contains("have diverged"), "{error}");
            let mine = "#1 all_reduce(gradient bucket 3, sum, 8 x f32)";
            let theirs = "#1 all_reduce(gradient bucket 3, sum, 9 x f32)";
            assert!(error.contains(mine) && error.contains(theirs), "{error}");
        }
    }
}

#[test]
fn two_shared_ranks_that_meet_in_different_operations_both_diverge() {
    let errors = world(2, |member| {
        let host = shm(member, options());
        let call = match host.rank() {
            0 => Call::new(Op::Barrier),
            _ => Call::new(Op::Broadcast { root: 0 }),
        };
        let data = match host.rank() {
            0 => Data::None,
            _ => Data::InPlace(host.alloc(Dtype::U8, 3).unwrap()),
        };
        // Meet the executor itself, without the signal that the other side's error raises.
        let shape = check_shapes(host.rank(), 2, &call, &data).unwrap();
        let deadline = host.shared.options.clock.now() + Duration::from_secs(10);
        let mut executor = host.shared.executor.lock().unwrap();
        let result = executor.run(&stamp(0, &call, shape), &call, data, deadline);
        result.unwrap_err()
    });
    for (rank, error) in errors.iter().enumerate() {
        let Error::Diverged { peer, ours, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(*peer, 1 - rank);
        assert!(ours.contains(["barrier", "broadcast"][rank]), "{ours}");
    }
}

#[test]
fn a_rank_that_never_comes_is_named_by_the_timeout() {
    for over_shm in [true, false] {
        let errors = world(3, |member| {
            let mut host = if over_shm {
                shm(member, options())
            } else {
                Host::tcp(member, options()).unwrap()
            };
            let mut call = Call::new(Op::Barrier);
            call.deadline = Some(Duration::from_millis(300));
            let result = if host.rank() == 2 {
                host.shared
                    .signal
                    .wait(Duration::from_secs(30))
                    .map_or(Ok(()), Err)
            } else {
                let work = host.submit(call, Data::None).unwrap();
                work.wait().map(drop)
            };
            result.unwrap_err().to_string()
        });
        assert!(
            errors
                .iter()
                .any(|error| error.contains("waiting for rank 2.")),
            "{errors:?}"
        );
        for error in &errors {
            assert!(
                error.contains("#0 barrier was not complete after 0."),
                "{error}"
            );
        }
    }
}

#[test]
fn an_abort_wakes_those_who_sleep() {
    for over_shm in [true, false] {
        let errors = world(3, |member| {
            let mut host = if over_shm {
                shm(member, options())
            } else {
                Host::tcp(member, options()).unwrap()
            };
            if host.rank() == 1 {
                std::thread::sleep(Duration::from_millis(100)); // until the others sleep: there is nothing to ask
                host.aborter().abort("somebody pressed a key");
            }
            let slab = host.alloc(Dtype::F32, 1000).unwrap();
            let call = Call::new(Op::AllReduce(ReduceOp::Sum));
            let result = host
                .submit(call.clone(), Data::InPlace(slab))
                .and_then(Work::wait);
            let again = host.submit(call, Data::InPlace(Slab::zeroed(Dtype::F32, 1)));
            assert_eq!(
                again.err().unwrap().to_string(),
                result.as_ref().unwrap_err().to_string(),
                "a communicator that failed stays so"
            );
            result.unwrap_err().to_string()
        });
        for error in errors {
            assert!(error.contains("somebody pressed a key"), "{error}");
        }
    }
}

#[test]
fn a_failed_call_keeps_its_memory_until_the_communicator_ends() {
    world(2, |member| {
        let mut host = shm(member, options());
        if host.rank() == 0 {
            let slab = host.alloc(Dtype::F32, 1000).unwrap();
            let address = slab.address();
            let mut call = Call::new(Op::AllReduce(ReduceOp::Sum)).blocking();
            call.deadline = Some(Duration::from_millis(50));
            let work = host.submit(call, Data::InPlace(slab)).unwrap();
            assert!(matches!(work.wait(), Err(Error::Timeout { .. })));
            let other = host.alloc(Dtype::F32, 1000).unwrap();
            assert_ne!(other.address(), address);
        } else {
            host.shared.signal.wait(Duration::from_secs(30)).unwrap();
        }
    });
}

#[test]
fn eight_ranks_on_few_cores_finish_two_hundred_reductions() {
    world(8, |member| {
        let mut host = shm(member, options());
        let mut slab = host.alloc(Dtype::F32, 256).unwrap();
        for _ in 0..200 {
            slab.as_mut_slice::<f32>().fill(1.0);
            let call = Call::new(Op::AllReduce(ReduceOp::Sum)).blocking();
            let work = host.submit(call, Data::InPlace(slab)).unwrap();
            slab = work.wait().unwrap().into_output();
            assert_eq!(slab.as_slice::<f32>(), [8.0; 256]);
        }
    });
}

#[test]
fn works_in_flight_keep_their_order() {
    world(2, |member| {
        let mut host = shm(member, options());
        let works = (0..50)
            .map(|index| {
                let mut slab = host.alloc(Dtype::I32, 100 + index).unwrap();
                slab.as_mut_slice::<i32>().fill(index as i32);
                let call = Call::new(Op::AllReduce(ReduceOp::Sum));
                host.submit(call, Data::InPlace(slab)).unwrap()
            })
            .collect::<Vec<_>>();
        for (index, work) in works.into_iter().enumerate() {
            let slab = work.wait().unwrap().into_output();
            assert!(
                slab.as_slice::<i32>()
                    .iter()
                    .all(|value| *value == 2 * index as i32)
            );
        }
    });
}

#[test]
fn subgroups_share_memory_of_their_own() {
    world(4, |member| {
        let mut host = Host::best(member, options()).unwrap();
        assert_eq!(host.wire(), "shm");
        let rank = host.rank();
        // Backwards within the group, so that numbers differ from the world's.
        let mut half = host.split((rank % 2) as u32, 10 - rank as u32).unwrap();
        assert_eq!((half.size(), half.rank()), (2, 1 - rank / 2));
        let mut value = vec![rank as i64; 2];
        half.all_reduce(&mut value, ReduceOp::Sum).unwrap();
        assert_eq!(value, [2 * (rank % 2) as i64 + 2; 2]);
        assert!(half.spent().bytes > 0);
        let mut one = half.split(half.rank() as u32, 0).unwrap();
        assert_eq!(one.size(), 1);
        one.barrier().unwrap();
        host.barrier().unwrap();
    });
}

#[test]
fn without_shared_memory_all_ranks_take_tcp() {
    let files = world(2, |member| {
        let group = [0, 1];
        let fd = std::fs::File::open("/proc/self/exe").unwrap();
        let own = match member.rank() {
            0 => Ok(fd.as_fd()),
            _ => Err("the system refuses".to_string()),
        };
        let passed = member
            .pass("test", &group, own, &mut |_, _| Ok(()))
            .unwrap();
        assert!(!passed.everywhere && passed.neighbours == 2);
        passed.outcome.unwrap_err()
    });
    for why in files {
        assert!(why.contains("rank 1 has no shared memory"), "{why}");
    }
}

#[test]
fn a_descriptor_that_is_no_arena_is_refused_by_all_alike() {
    let outcomes = world(3, |member| {
        let fd = std::fs::File::open("/proc/self/exe").unwrap();
        let mut keep = |_, fd| match member.rank() {
            1 => Mapping::of_peer(&fd).map(drop),
            _ => Ok(()),
        };
        let passed = member.pass("test", &[0, 1, 2], Ok(fd.as_fd()), &mut keep);
        passed.unwrap().outcome.unwrap_err()
    });
    for why in outcomes {
        assert!(why.starts_with("rank 1: rank 0: its arena"), "{why}");
    }
}

#[test]
fn an_arena_that_is_full_costs_copies_only() {
    world(2, |member| {
        let small = Options {
            arena_bytes: 0,
            ..options()
        };
        let mut host = shm(member, small);
        let mut values = vec![1.0f32; 1 << 20];
        host.all_reduce(&mut values, ReduceOp::Sum).unwrap();
        assert!(values.iter().all(|value| *value == 2.0));
        assert!(std::fs::read_dir("/dev/shm").unwrap().all(|entry| {
            !entry
                .unwrap()
                .file_name()
                .to_string_lossy()
                .contains("fabric")
        }));
    });
}
