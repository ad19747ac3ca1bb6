//! Calls of all kinds one after another, for which much is kept from call to call, in memory and on stages.

use super::*;
use crate::comm::{Op, ReduceOp};

/// Goal: what is kept of a call (its shape, its outline, its post) never serves another, and no post is written while a peer
/// still loads it. Method: small calls in a drawn order, inline, posted and neither.
#[test]
fn small_calls_of_all_kinds_take_turns() {
    for size in [1, 2, 3] {
        take_turns(size, 1500, &[0, 1, 3, 64, 257]);
    }
}

/// Goal: no stage is written while a peer still loads it, by collectives nor by messages, whoever is private. Method: calls of
/// up to several windows in a drawn order, on more ranks than most machines of tests have cores, so that they are late.
#[test]
fn long_calls_of_all_kinds_take_turns() {
    for size in [2, 3, 4] {
        take_turns(size, 200, &[1, 2_000, 10_000, 30_001, 70_000]);
    }
}

/// Calls of all operations in a drawn order, the same on all ranks, of changing lengths, roots, reductions and holds, in
/// memory that is private on some ranks or on all, among them barriers, messages, and such as wait for nobody; every result
/// against plain arithmetic.
fn take_turns(size: usize, turns: u64, parts: &[usize]) {
    world(size, |member| {
        let mut host = shm(member, options());
        let rank = host.rank();
        let mut seed = 7u64;
        let mut draw = |below: u64| {
            seed = (seed.wrapping_mul(6364136223846793005)).wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        for turn in 0..turns {
            let root = draw(size as u64) as usize;
            let part = parts[draw(parts.len() as u64) as usize];
            let kind = draw(if size > 1 { 9 } else { 8 }); // no messages alone
            let numel = part * size;
            let (in_place, private) = (draw(2) == 0, draw(1 << size));
            let is_own = private >> rank & 1 == 0;
            let value = |of: usize, at: usize| (turn * 31 + of as u64 * 1000 + at as u64) % 997;
            let memory = |numel: usize| match is_own {
                true => host.alloc(Dtype::U64, numel).unwrap(),
                false => Slab::zeroed(Dtype::U64, numel),
            };
            let filled = |numel: usize, skip: usize| {
                let mut slab = memory(skip + numel);
                let all = slab.as_mut_slice::<u64>()[skip..].iter_mut();
                all.enumerate().for_each(|(at, v)| *v = value(rank, at));
                slab
            };
            let total = |at: usize| (0..size).map(|of| value(of, at)).sum::<u64>();
            let largest = |at: usize| (0..size).map(|of| value(of, at)).max().unwrap();
            let (op, mut data, skip, expected): (_, _, _, Vec<u64>) = match kind {
                0 => (Op::Barrier, Data::None, 0, Vec::new()),
                1 | 2 => {
                    let op = [ReduceOp::Sum, ReduceOp::Max, ReduceOp::PreMulSum(2.0)];
                    let op = op[draw(3) as usize];
                    let data = match in_place {
                        true => Data::Many(vec![filled(numel, 0)]),
                        false => Data::Out {
                            from: filled(numel, 0),
                            into: memory(numel),
                        },
                    };
                    let expected = (0..numel).map(|at| match op {
                        ReduceOp::Max => largest(at),
                        ReduceOp::Sum => total(at),
                        _ => 2 * total(at),
                    });
                    (Op::AllReduce(op), data, 0, expected.collect())
                }
                3 => {
                    let own = rank * part;
                    let data = match in_place {
                        true => Data::InPlace(filled(numel, 0)),
                        false => Data::Out {
                            from: filled(numel, 0),
                            into: memory(part),
                        },
                    };
                    let expected = (own..own + part).map(total).collect();
                    let skip = if in_place { own } else { 0 };
                    (Op::ReduceScatter(ReduceOp::Sum), data, skip, expected)
                }
                4 => {
                    let data = match in_place {
                        true => {
                            let mut slab = memory(numel);
                            let own = &mut slab.as_mut_slice::<u64>()[rank * part..][..part];
                            own.iter_mut()
                                .enumerate()
                                .for_each(|(at, v)| *v = value(rank, at));
                            Data::InPlace(slab)
                        }
                        false => Data::Out {
                            from: filled(part, 0),
                            into: memory(numel),
                        },
                    };
                    let expected = (0..numel).map(|at| value(at / part, at % part));
                    (Op::AllGather, data, 0, expected.collect())
                }
                5 => {
                    let expected = (0..numel).map(|at| value(root, at)).collect();
                    (
                        Op::Broadcast { root },
                        Data::InPlace(filled(numel, 0)),
                        0,
                        expected,
                    )
                }
                6 => {
                    let op = ReduceOp::Sum;
                    let data = Data::InPlace(filled(numel, 0));
                    let expected = (0..numel).map(total);
                    let expected = expected.filter(|_| rank == root).collect();
                    (Op::Reduce { op, root }, data, 0, expected)
                }
                7 => {
                    let data = Data::Out {
                        from: filled(numel, 0),
                        into: memory(numel),
                    };
                    let expected = (0..numel).map(|at| value(at / part, rank * part + at % part));
                    (Op::AllToAll, data, 0, expected.collect())
                }
                _ => {
                    let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
                    let data = Data::Out {
                        from: filled(numel, 0),
                        into: memory(numel),
                    };
                    let expected = (0..numel).map(|at| value(from, at)).collect();
                    (Op::SendRecv { to, from }, data, 0, expected)
                }
            };
            host.run(&Call::new(op), &mut data).unwrap();
            let found = match &data {
                Data::None => continue,
                Data::InPlace(slab) | Data::Out { into: slab, .. } => slab,
                Data::Many(slabs) => &slabs[0],
            };
            let found = &found.as_slice::<u64>()[skip..skip + expected.len()];
            assert!(
                found == expected,
                "turn {turn}, {op:?} of {numel}, rank {rank} of {size}"
            );
        }
    });
}
