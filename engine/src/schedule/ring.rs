//! One peer at a time: each rank receives from one and sends to one, neighbours where that is enough. For what does not
//! fold, since a ring would fold in another order for every slice.

use std::ops::Range;

use super::{Loc, Problem, Rank, Region, Round, Schedule, direct};

/// All-gather in n-1 rounds: slice r travels once around. (n-1)/n of the vector sent by each rank, the least possible
/// (Patarasuk and Yuan 2009).
pub(super) fn all_gather(problem: &Problem, rank: Rank) -> Schedule {
    let world = problem.world;
    let (next, prev) = ((rank + 1) % world, (rank + world - 1) % world);
    let slice = |back: usize| problem.slices[(rank + world - back) % world].clone();
    let mut rounds = Vec::new();
    for step in 0..world - 1 {
        let mut round = Round::default();
        let (own, target) = (
            Loc::one(Region::Input, 0..slice(0).len()),
            Loc::one(Region::Output, slice(step)),
        );
        round.send(
            next,
            if step == 0 {
                own.clone()
            } else {
                target.clone()
            },
        );
        round.recv(prev, Loc::one(Region::Output, slice(step + 1)));
        if step == 0 {
            round.copy(own, target);
        }
        rounds.push(round);
    }
    Schedule {
        scratch: Vec::new(),
        rounds,
    }
}

/// All-to-all in n-1 rounds, in each of which every rank sends to one and receives from one (the pairwise exchange of
/// Thakur, Rabenseifner and Gropp 2005): nobody is sent to by many at once.
pub(super) fn all_to_all(problem: &Problem, rank: Rank) -> Schedule {
    let round = |step| {
        let mut round = Round::default();
        direct::turn(problem, rank, step, &mut round);
        if step == 1 {
            direct::keep(problem, rank, &mut round);
        }
        round
    };
    Schedule {
        scratch: Vec::new(),
        rounds: (1..problem.world).map(round).collect(),
    }
}

/// Chunks a rank of the broadcast's chain: four make it 1.25 times the wire time of one copy of the vector.
const CHUNKS_A_RANK: usize = 4;

/// Broadcast down a chain that starts at the root, in c chunks, all links busy at once.
///
/// Scatter and ring all-gather (Thakur, Rabenseifner and Gropp 2005) takes n rounds and 2(n-1)/n of the vector
/// through the root's link. The pipelined chain (Patarasuk, Faraj and Yuan 2006) sends every byte over each link once,
/// nobody receives what it has, and takes c+n-2 rounds of 1/c of the vector: with c = n the same time, with c = 4n
/// little more than half of it. So the chain.
pub(super) fn broadcast(problem: &Problem, root: Rank, rank: Rank) -> Schedule {
    let world = problem.world;
    let chunks = chunks(problem.elems(), CHUNKS_A_RANK * world);
    let place = (rank + world - root) % world;
    let mut rounds = Vec::new();
    for step in 0..(chunks.len() + world).saturating_sub(2).max(1) {
        let mut round = Round::default();
        let sent = step
            .checked_sub(place)
            .and_then(|chunk| chunks.get(chunk))
            .filter(|_| place + 1 < world);
        if let Some(chunk) = sent {
            let region = if place == 0 && step == 0 {
                Region::Input
            } else {
                Region::Output
            };
            round.send((rank + 1) % world, Loc::one(region, chunk.clone()));
        }
        if let Some(chunk) = (step + 1)
            .checked_sub(place)
            .and_then(|chunk| chunks.get(chunk))
            .filter(|_| place > 0)
        {
            round.recv(
                (rank + world - 1) % world,
                Loc::one(Region::Output, chunk.clone()),
            );
        }
        if place == 0 && step == 0 {
            let whole = |region| Loc::one(region, 0..problem.elems());
            round.copy(whole(Region::Input), whole(Region::Output));
        }
        rounds.push(round);
    }
    Schedule {
        scratch: Vec::new(),
        rounds,
    }
}

/// At most `count` even chunks, none of them empty.
fn chunks(elems: usize, count: usize) -> Vec<Range<usize>> {
    let count = count.min(elems);
    (0..count)
        .map(|chunk| chunk * elems / count..(chunk + 1) * elems / count)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Kind;

    #[test]
    fn a_chain_of_three_keeps_all_links_busy() {
        let problem = Problem::even(Kind::Broadcast { root: 2 }, 3, 24);
        let schedule = broadcast(&problem, 2, 0); // right after the root
        assert_eq!(schedule.rounds.len(), 12 + 3 - 2);
        assert_eq!(
            schedule
                .rounds
                .iter()
                .filter(|round| round.wire.len() == 2)
                .count(),
            11
        );
    }
}
