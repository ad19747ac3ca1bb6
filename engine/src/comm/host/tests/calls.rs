//! Messages from rank to rank, the convenient forms, and calls that are refused.

use super::*;
use crate::comm::{Collectives, Op, ReduceOp};

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
        let wrong = host.all_to_all_v(&vec![0u8; 3], &[usize::MAX, 3, 1]);
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
            (
                call(Op::AllGather).counts([usize::MAX, 2]),
                Data::InPlace(slab(1)),
                "than memory holds",
            ),
            (
                // What the last rank keeps, only it could refuse.
                call(Op::AllToAll).counts([1, 0, 0, usize::MAX / 4]),
                out(1, 1),
                "than memory holds",
            ),
            (
                call(Op::AllReduce(ReduceOp::BitAnd)),
                Data::InPlace(slab(2)),
                "band of f32",
            ),
            (
                call(Op::Reduce {
                    op: ReduceOp::Sum,
                    root: 0,
                }),
                Data::InPlace(Slab::zeroed(Dtype::Bool, 2)),
                "sum of bool",
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
        let error = work.and_then(Work::wait).unwrap_err().to_string();
        let peer = 1 - member.rank();
        let joined = host.shared.ledger.sighting(peer).joined;
        assert_eq!(joined, None, "messages have no number");
        error
    });
    assert!(
        errors[1].contains("send_recv(f32)") && errors[1].contains("12 bytes"),
        "{}",
        errors[1]
    );
}

#[test]
fn ranks_may_hold_a_vector_each_in_its_own_way() {
    world(3, |member| {
        let rank = member.rank();
        let hosts = [
            Host::tcp(member, options()).unwrap(),
            shm(member, options()),
        ];
        for mut host in hosts {
            for numel in [0, 3, 900, 300_000] {
                let slab = |numel| {
                    let mut slab = Slab::zeroed(Dtype::F32, numel);
                    slab.as_mut_slice::<f32>().fill(1.0 + rank as f32);
                    slab
                };
                let third = numel / 3;
                let data = match rank {
                    0 => Data::Many(vec![slab(third), slab(0), slab(numel - third)]),
                    1 => Data::InPlace(slab(numel)),
                    _ => Data::Out {
                        from: slab(numel),
                        into: host.alloc(Dtype::F32, numel).unwrap(),
                    },
                };
                let call = Call::new(Op::AllReduce(ReduceOp::Sum));
                let back = host.submit(call, data).unwrap().wait().unwrap();
                let slabs = match back {
                    Data::Many(slabs) => slabs,
                    other => vec![other.into_output()],
                };
                let values = slabs.iter().flat_map(|slab| slab.as_slice::<f32>());
                assert!(values.clone().all(|value| *value == 6.0));
                assert_eq!(values.count(), numel);
            }
        }
    });
}

/// Goal: roots that run ahead spoil nothing that the others still read. Method: many calls in flight, in which almost
/// nobody waits for anybody, the root another one each time.
#[test]
fn roots_that_change_run_ahead_of_the_others() {
    for size in [2, 3] {
        world(size, |member| {
            let mut host = shm(member, options());
            let works: Vec<_> = (0..600)
                .map(|turn| {
                    let (root, is_sum) = (turn / 5 % size, turn % 7 == 3);
                    let mut slab = host.alloc(Dtype::I32, [4, 900][turn % 2]).unwrap();
                    let value = turn * 10 + host.rank();
                    slab.as_mut_slice::<i32>().fill(value as i32);
                    let op = match is_sum {
                        true => Op::Reduce {
                            op: ReduceOp::Sum,
                            root,
                        },
                        false => Op::Broadcast { root },
                    };
                    host.submit(Call::new(op), Data::InPlace(slab)).unwrap()
                })
                .collect();
            for (turn, work) in works.into_iter().enumerate() {
                let slab = work.wait().unwrap().into_output();
                let root = turn / 5 % size;
                let expected = match (turn % 7 == 3, root == host.rank()) {
                    (false, _) => turn * 10 + root,
                    (true, true) => (0..size).map(|rank| turn * 10 + rank).sum(),
                    (true, false) => turn * 10 + host.rank(),
                };
                let right = |value: &i32| *value == expected as i32;
                assert!(slab.as_slice::<i32>().iter().all(right), "turn {turn}");
            }
        });
    }
}

#[test]
fn a_message_each_way_waits_for_both_peers() {
    world(3, |member| {
        let mut host = shm(member, options());
        if host.rank() > 0 {
            host.shared.signal.wait(Duration::from_secs(30)).unwrap();
            return;
        }
        let slab = |host: &Host| host.alloc(Dtype::F32, 3).unwrap();
        let (from, into) = (slab(&host), slab(&host));
        let mut call = Call::new(Op::SendRecv { to: 1, from: 2 }).blocking();
        call.deadline = Some(Duration::from_millis(100));
        let work = host.submit(call, Data::Out { from, into }).unwrap();
        let error = work.wait().unwrap_err();
        let Error::Timeout { waiting_for, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(waiting_for, &[1, 2]);
    });
}

#[test]
fn rank_0s_tuning_table_is_everybodys() {
    use crate::schedule::choose::Tuning;
    let prices = world(2, |member| {
        // By rank 1's own table the vector would be posted; by rank 0's it is loaded.
        let text = ["* shm * * load", "* shm * * post"][member.rank()];
        let options = Options {
            tuning: Tuning::parse(text).unwrap(),
            ..options()
        };
        let mut host = shm(member, options);
        let call = Call::new(Op::AllReduce(ReduceOp::Sum)).blocking();
        let price = host.price(&call, Dtype::F32, 100);
        let slab = host.alloc(Dtype::F32, 100).unwrap();
        host.submit(call, Data::InPlace(slab))
            .unwrap()
            .wait()
            .unwrap();
        price.bytes
    });
    assert_eq!(
        prices,
        [400, 400],
        "half of each vector is loaded, half is stored"
    );
}
