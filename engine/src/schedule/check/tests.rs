//! Breaks schedules in every way that the checker claims to see, and looks for the flaw's name.

use super::*;
use crate::schedule::{Form, Loc, Move, Ranks, Region, Round, Slot};

/// Every kind by every algorithm, in place and not, for one world and length.
fn all_are_right(world: usize, elems: usize) {
    let kinds = Kind::ALL.map(|kind| match kind {
        Kind::Broadcast { .. } => Kind::Broadcast { root: world / 2 },
        Kind::Reduce { .. } => Kind::Reduce { root: world / 2 },
        Kind::Gather { .. } => Kind::Gather { root: world / 2 },
        Kind::Scatter { .. } => Kind::Scatter { root: world / 2 },
        other => other,
    });
    for kind in kinds {
        let elems = if kind == Kind::Barrier { 0 } else { elems };
        for lifted in [false, true] {
            let problem = Problem::even(kind, world, elems).with_lifted(lifted);
            for in_place in [false, true] {
                if in_place && !problem.has_in_place() {
                    continue;
                }
                for algorithm in Algorithm::ALL {
                    if let Err(flaw) = check(algorithm, &problem, in_place) {
                        panic!(
                            "{algorithm} {kind} over {world} ranks, {elems} elements, in place {in_place}: {flaw}"
                        );
                    }
                }
                check_shared(&problem, in_place)
                    .unwrap_or_else(|flaw| panic!("shared {kind} {world}: {flaw}"));
                check_posted(&problem, in_place)
                    .unwrap_or_else(|flaw| panic!("posted {kind} {world}: {flaw}"));
            }
        }
    }
}

#[test]
fn small_and_odd_worlds_are_right() {
    for (world, elems) in [
        (1, 3),
        (2, 5),
        (3, 7),
        (4, 9),
        (5, 0),
        (6, 4),
        (7, 20),
        (13, 40),
        (33, 70),
        (65, 70),
    ] {
        all_are_right(world, elems);
    }
}

/// All ranks' schedules.
fn world(algorithm: Algorithm, problem: &Problem) -> Vec<Schedule> {
    (0..problem.world)
        .map(|rank| messages(algorithm, problem, rank).expect("applies"))
        .collect()
}

/// The flaw of an all-reduce of five ranks and ten elements, after `spoil`.
fn flaw(algorithm: Algorithm, lifted: bool, spoil: impl FnOnce(&mut [Schedule])) -> Flaw {
    let problem = Problem::even(Kind::AllReduce, 5, 10).with_lifted(lifted);
    let mut schedules = world(algorithm, &problem);
    spoil(&mut schedules);
    prove(&problem, &schedules, false).expect_err("the flaw is seen")
}

#[test]
fn a_fold_out_of_order_is_named() {
    // Rank 0's leaf is folded with rank 2's before rank 1's: two arrivals trade places.
    let found = flaw(Algorithm::Direct, false, |ranks| {
        let arrivals = ranks[0].rounds[0].wire.iter_mut();
        let mut locs: Vec<&mut Loc> = arrivals
            .filter_map(|step| match step {
                Move::Recv { from: 1 | 2, into } => Some(into),
                _ => None,
            })
            .collect();
        let (a, b) = locs.split_at_mut(1);
        std::mem::swap(a[0], b[0]);
    });
    assert!(matches!(found, Flaw::Order { round: 0, .. }), "{found}");
    assert!(found.to_string().contains("not the halves of one block"));
}

#[test]
fn a_chain_of_folds_is_not_the_tree() {
    let problem = Problem::even(Kind::AllReduce, 4, 1).with_lifted(true);
    let mut schedules = world(Algorithm::Direct, &problem);
    let folds: Vec<usize> = (0..schedules[0].rounds[1].local.len())
        .filter(|&step| matches!(schedules[0].rounds[1].local[step], Move::Fold { .. }))
        .collect();
    // (0+1), (2+3), 01+23 becomes (0+1), 01+23's operands before 2 has met 3.
    schedules[0].rounds[1].local.swap(folds[1], folds[2]);
    assert!(matches!(
        prove(&problem, &schedules, false),
        Err(Flaw::Order { .. })
    ));
}

#[test]
fn a_dropped_send_and_a_dropped_receive_are_named() {
    let drop = |sends: bool| {
        flaw(Algorithm::Halving, false, |ranks| {
            ranks[1].rounds[0]
                .wire
                .retain(|step| matches!(step, Move::Send { .. }) != sends);
        })
    };
    assert_eq!(
        drop(true),
        Flaw::Unsent {
            from: 1,
            to: 0,
            round: 0
        }
    );
    assert_eq!(
        drop(false),
        Flaw::Unreceived {
            from: 0,
            to: 1,
            round: 0
        }
    );
}

#[test]
fn wrong_ranges_are_named() {
    let spoil = |range: std::ops::Range<usize>| {
        flaw(Algorithm::Doubling, false, move |ranks| {
            let Move::Send { from, .. } = &mut ranks[2].rounds[0].wire[0] else {
                panic!("sends first")
            };
            from.ranges = vec![range];
        })
    };
    assert!(matches!(
        spoil(0..9),
        Flaw::Length {
            from: 2,
            to: 3,
            round: 0,
            sent: 9,
            taken: 10
        }
    ));
    assert!(matches!(spoil(1..11), Flaw::Bounds { len: 10, .. }));
}

#[test]
fn a_message_from_the_wrong_place_is_named() {
    let found = flaw(Algorithm::Doubling, false, |ranks| {
        let Move::Send { from, .. } = &mut ranks[2].rounds[0].wire[0] else {
            panic!("sends first")
        };
        from.ranges = vec![5..10, 0..5];
    });
    assert!(matches!(found, Flaw::Order { .. }), "{found}");
    let found = flaw(Algorithm::Doubling, false, |ranks| {
        let Move::Send { from, .. } = &mut ranks[2].rounds[0].wire[0] else {
            panic!("sends first")
        };
        from.region = Region::Output;
    });
    assert!(matches!(found, Flaw::Undefined { round: 0, .. }), "{found}");
}

#[test]
fn a_value_finished_twice_is_named() {
    let found = flaw(Algorithm::Tree, false, |ranks| {
        let whole = |region| Loc::one(region, 0..10);
        let last = ranks[0].rounds.len() - 1;
        let again = &mut ranks[0].rounds[last].local;
        again.push(Move::Copy {
            from: whole(Region::Output),
            into: whole(Region::Scratch(0)),
        });
        again.push(Move::Copy {
            from: whole(Region::Scratch(0)),
            into: whole(Region::Output),
        });
    });
    assert!(
        matches!(
            found,
            Flaw::Widened {
                found: Value::Finished { elem: 0 },
                ..
            }
        ),
        "{found}"
    );
}

#[test]
fn a_value_finished_early_is_named() {
    let found = flaw(Algorithm::Tree, false, |ranks| {
        let (from, into) = (
            Loc::one(Region::Scratch(0), 0..10),
            Loc::one(Region::Output, 0..10),
        );
        ranks[0].rounds[0].local.push(Move::Copy { from, into });
    });
    assert!(matches!(found, Flaw::Early { .. }), "{found}");
}

#[test]
fn an_answer_left_out_is_named() {
    let found = flaw(Algorithm::Doubling, false, |ranks| {
        ranks[4].rounds.last_mut().expect("has rounds").local.pop();
    });
    let cell = Cell {
        rank: 4,
        region: Region::Output,
        index: 0,
    };
    assert_eq!(
        found,
        Flaw::Answer {
            cell,
            found: Value::Nothing
        }
    );
    assert_eq!(found.to_string(), "output[0] of rank 4 ends as nothing");
}

#[test]
fn overlapping_receives_are_named() {
    let found = flaw(Algorithm::Direct, false, |ranks| {
        for step in &mut ranks[0].rounds[0].wire {
            if let Move::Recv { into, .. } = step {
                *into = Loc::one(into.region, 0..2);
            }
        }
    });
    assert!(matches!(found, Flaw::Race { round: 0, .. }), "{found}");
}

#[test]
fn a_receive_over_what_is_being_sent_is_named_in_place_only() {
    let problem = Problem::even(Kind::AllReduce, 2, 2);
    let whole = |region| Loc::one(region, 0..2);
    let spoilt = |rank: usize| {
        let wire = vec![
            Move::Send {
                to: 1 - rank,
                from: whole(Region::Input),
            },
            Move::Recv {
                from: 1 - rank,
                into: whole(Region::Output),
            },
        ];
        let local = vec![
            Move::Copy {
                from: whole(Region::Output),
                into: whole(Region::Scratch(0)),
            },
            Move::Fold {
                into: whole(Region::Scratch(0)),
                with: whole(Region::Input),
            },
            Move::Copy {
                from: whole(Region::Scratch(0)),
                into: whole(Region::Output),
            },
        ];
        let scratch = vec![Slot {
            form: Form::Partial,
            elems: 2,
        }];
        Schedule {
            scratch,
            rounds: vec![Round { wire, local }],
        }
    };
    let schedules = [spoilt(0), spoilt(1)];
    assert!(matches!(
        prove(&problem, &schedules, true),
        Err(Flaw::Race { .. })
    ));
    assert!(matches!(
        prove(&problem, &schedules, false),
        Err(Flaw::LateInput { .. })
    ));
}

#[test]
fn forms_must_agree_and_lifted_leaves_must_be_lifted() {
    let found = flaw(Algorithm::Doubling, false, |ranks| {
        ranks[3].scratch[1].form = Form::Partial
    });
    assert_eq!(
        found,
        Flaw::Form {
            from: 2,
            to: 3,
            round: 0,
            sent: Form::Payload,
            taken: Form::Partial
        }
    );

    let plain = Problem::even(Kind::AllReduce, 5, 10);
    let schedules = world(Algorithm::Direct, &plain);
    let found =
        prove(&plain.with_lifted(true), &schedules, false).expect_err("leaves are not lifted");
    assert!(
        matches!(
            found,
            Flaw::Widened {
                found: Value::Leaf { .. },
                ..
            }
        ),
        "{found}"
    );
}

#[test]
fn moves_in_the_wrong_place_are_named() {
    let found = flaw(Algorithm::Tree, false, |ranks| {
        let step = ranks[0].rounds[0].local.pop().expect("a fold");
        ranks[0].rounds[0].wire.push(step);
    });
    assert_eq!(found, Flaw::Misplaced { rank: 0, round: 0 });
    let found = flaw(Algorithm::Tree, false, |ranks| {
        ranks[3].rounds.pop();
    });
    assert_eq!(
        found,
        Flaw::Rounds {
            rank: 3,
            found: 5,
            expected: 6
        }
    );
    let found = flaw(Algorithm::Tree, false, |ranks| {
        let (from, into) = (
            Loc::one(Region::Output, 0..10),
            Loc::one(Region::Input, 0..10),
        );
        ranks[0].rounds[5].local.push(Move::Copy { from, into });
    });
    assert!(matches!(found, Flaw::Target { round: 5, .. }), "{found}");
    let found = flaw(Algorithm::Tree, false, |ranks| {
        let (from, into) = (
            Loc::one(Region::Scratch(0), 0..4),
            Loc::one(Region::Scratch(0), 1..5),
        );
        ranks[0].rounds[0].local.push(Move::Copy { from, into });
    });
    assert!(matches!(found, Flaw::Overlap { round: 0, .. }), "{found}");
}

#[test]
fn a_barrier_that_forgets_a_rank_is_named() {
    let problem = Problem::even(Kind::Barrier, 5, 0);
    let mut schedules = world(Algorithm::Doubling, &problem);
    for schedule in &mut schedules {
        schedule.rounds.pop();
    }
    assert_eq!(
        prove(&problem, &schedules, false),
        Err(Flaw::Ignorant { rank: 0, of: 1 })
    );
    assert!(matches!(
        prove_shared(&problem, &vec![Vec::new(); 5], false),
        Err(Flaw::Ignorant { .. })
    ));
}

#[test]
fn shared_memory_without_its_syncs_is_named() {
    let problem = Problem::even(Kind::AllReduce, 3, 6);
    let steps: Vec<_> = (0..3).map(|rank| shared(&problem, rank)).collect();
    let without = |step: usize, ranks: std::ops::Range<usize>| {
        let mut steps = steps.clone();
        for own in &mut steps[ranks] {
            own.remove(step);
        }
        prove_shared(&problem, &steps, true).expect_err("a sync is missing")
    };
    assert!(matches!(without(0, 0..3), Flaw::Unguarded { .. }));
    assert!(matches!(without(2, 0..3), Flaw::Unguarded { .. }));
    assert_eq!(
        without(0, 1..2),
        Flaw::Syncs {
            rank: 1,
            found: 1,
            expected: 2
        }
    );
}

#[test]
fn shared_memory_hazards_are_named() {
    let problem = Problem::even(Kind::AllReduce, 3, 6);
    // Every rank folds everything into its own output: right with memory apart, a hazard in place.
    let own = |rank| {
        let fold = Shared::LoadFoldStore {
            ranges: Loc::one(Region::Input, 0..6).ranges,
            from: Ranks::All,
            into: Ranks::One(rank),
        };
        vec![Shared::Sync, fold, Shared::Sync]
    };
    let steps: Vec<_> = (0..3).map(own).collect();
    assert_eq!(prove_shared(&problem, &steps, false), Ok(()));
    assert!(matches!(
        prove_shared(&problem, &steps, true),
        Err(Flaw::Hazard { .. })
    ));

    // Two ranks store the same slice.
    let mut steps: Vec<_> = (0..3).map(|rank| shared(&problem, rank)).collect();
    steps[2] = steps[1].clone();
    assert!(matches!(
        prove_shared(&problem, &steps, false),
        Err(Flaw::Hazard { .. })
    ));
}
