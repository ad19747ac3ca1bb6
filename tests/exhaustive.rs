//! Goal: every collective is right, for every world, length and root that is small enough to try. Method: the symbolic
//! checker, on both lowerings, in place and not, lifted and not, with even slices and with uneven ones.

use fabric_engine::schedule::check::{check, check_posted, check_shared};
use fabric_engine::schedule::{Algorithm, Kind, Problem};

const WORLDS: std::ops::RangeInclusive<usize> = 1..=17;
const LENGTHS: std::ops::RangeInclusive<usize> = 0..=65;

/// Proves one problem by every algorithm and in shared memory; the number of proofs.
fn prove_all(problem: &Problem) -> usize {
    let mut proofs = 0;
    for in_place in [false, true] {
        if in_place && !problem.has_in_place() {
            continue;
        }
        let tell =
            |how: &str, flaw| -> ! { panic!("{how}, in place {in_place}: {flaw}\n{problem:?}") };
        for algorithm in Algorithm::ALL {
            match check(algorithm, problem, in_place) {
                Ok(proof) => proofs += usize::from(proof.is_some()),
                Err(flaw) => tell(algorithm.name(), flaw),
            }
        }
        check_shared(problem, in_place).unwrap_or_else(|flaw| tell("shared", flaw));
        check_posted(problem, in_place).unwrap_or_else(|flaw| tell("posted", flaw));
        proofs += 2;
    }
    proofs
}

/// Slices that no even cut gives: none, all in one, every other one empty, a staircase, one long tail.
fn uneven(world: usize) -> Vec<Vec<usize>> {
    let counts = |count: &dyn Fn(usize) -> usize| (0..world).map(count).collect::<Vec<_>>();
    vec![
        counts(&|_| 0),
        counts(&|rank| if rank == world / 2 { 7 } else { 0 }),
        counts(&|rank| if rank % 2 == 1 { 3 } else { 0 }),
        counts(&|rank| if rank % 2 == 0 { 2 } else { 0 }),
        counts(&|rank| rank % 5),
        counts(&|rank| world - rank),
        counts(&|rank| if rank + 1 == world { 20 } else { 1 }),
        counts(&|rank| (rank * 7 + 3) % 4),
    ]
}

#[test]
fn every_reduction_folds_in_the_canonical_tree() {
    let mut proofs = 0;
    for world in WORLDS {
        for kind in [Kind::AllReduce, Kind::ReduceScatter] {
            let even = LENGTHS.map(|elems| Problem::even(kind, world, elems));
            let uneven = uneven(world)
                .into_iter()
                .map(|counts| Problem::with_counts(kind, world, &counts));
            for problem in even.chain(uneven) {
                proofs += prove_all(&problem);
                proofs += prove_all(&problem.with_lifted(true));
            }
        }
    }
    // 74 problems, lifted or not, in place or not, by 4 + 2 and 2 + 2 ways.
    assert_eq!(proofs, 17 * 74 * 4 * (6 + 4));
}

#[test]
fn every_rooted_collective_is_right_from_every_root() {
    for world in WORLDS {
        for root in 0..world {
            for elems in [0, 1, world, 3 * world + 2] {
                let reduce = Problem::even(Kind::Reduce { root }, world, elems);
                prove_all(&reduce.clone().with_lifted(true));
                prove_all(&reduce);
            }
            for kind in [Kind::Gather { root }, Kind::Scatter { root }] {
                let even = LENGTHS
                    .step_by(7)
                    .map(|elems| Problem::even(kind, world, elems));
                let uneven = uneven(world).into_iter();
                let uneven = uneven.map(|counts| Problem::with_counts(kind, world, &counts));
                even.chain(uneven).for_each(|problem| {
                    prove_all(&problem);
                });
            }
        }
    }
}

#[test]
fn every_block_of_an_all_to_all_arrives() {
    for world in WORLDS {
        for elems in [0, 1, world, world * world, 2 * world * world + 5] {
            prove_all(&Problem::even(Kind::AllToAll, world, elems));
        }
        for rows in uneven(world) {
            let counts = (0..world * world).map(|pair| rows[pair / world] * (pair % world % 3));
            let counts: Vec<usize> = counts.collect();
            prove_all(&Problem::with_counts(Kind::AllToAll, world, &counts));
        }
    }
}

#[test]
fn every_gather_and_barrier_reaches_all() {
    for world in WORLDS {
        for elems in LENGTHS {
            prove_all(&Problem::even(Kind::AllGather, world, elems));
        }
        for counts in uneven(world) {
            prove_all(&Problem::with_counts(Kind::AllGather, world, &counts));
        }
        prove_all(&Problem::even(Kind::Barrier, world, 0));
    }
}

#[test]
fn every_broadcast_reaches_all_from_every_root() {
    for world in WORLDS {
        for root in 0..world {
            for elems in LENGTHS {
                prove_all(&Problem::even(Kind::Broadcast { root }, world, elems));
            }
        }
    }
}

/// Rounds hold no surprise in worlds that a simulator runs.
#[test]
fn larger_worlds_are_right_too() {
    for world in [31, 32, 33, 48, 63, 64, 100] {
        for kind in [
            Kind::AllReduce,
            Kind::ReduceScatter,
            Kind::AllGather,
            Kind::Broadcast { root: world - 2 },
            Kind::Reduce { root: world - 2 },
            Kind::Gather { root: world - 2 },
            Kind::Scatter { root: world - 2 },
            Kind::AllToAll,
        ] {
            prove_all(&Problem::even(kind, world, world + 5));
        }
        prove_all(&Problem::even(Kind::Barrier, world, 0));
    }
}
