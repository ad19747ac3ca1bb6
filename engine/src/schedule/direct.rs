//! Everyone to everyone: the owner of a slice gets all its leaves in one round and folds them itself.
//!
//! Two messages' latency for an all-reduce, (n-1)/n of the vector sent in each phase, and only leaves and finished
//! values travel, so a 16-bit payload is never widened on the wire. The price is n-1 messages a phase at each rank.
//! (The first round of "nreduce" in oneCCL and the pairwise reduce-scatter of Thakur, Rabenseifner and Gropp 2005,
//! move the same bytes; the fold here is the canonical tree.)

use std::ops::Range;

use super::tree::{Block, top};
use super::{Form, Kind, Loc, Problem, Rank, Region, Round, Schedule, Slot};

/// The owner's sums, or the lifted leaves that become them.
const ACC: Region = Region::Scratch(0);
/// The leaves as they arrive.
const LEAVES: Region = Region::Scratch(1);

/// All-reduce, reduce-scatter. Scratch where leaves are not lifted: log2 n slices of sums, n-1 slices of leaves.
pub(super) fn reduce(problem: &Problem, rank: Rank) -> Schedule {
    let slice = problem.slices[rank].clone();
    let mut rounds = Vec::new();
    if problem.lifted {
        let mut lift = Round::default();
        lift.copy(
            Loc::one(Region::Input, 0..problem.elems()),
            Loc::one(ACC, 0..problem.elems()),
        );
        rounds.push(lift);
    }

    let mut round = Round::default();
    let leaves = if problem.lifted { ACC } else { Region::Input };
    for peer in peers(problem.world, rank) {
        round.send(peer, Loc::one(leaves, problem.slices[peer].clone()));
        round.recv(peer, arrival(problem, rank, peer));
    }
    let mut folder = Folder {
        problem,
        rank,
        round,
        sums: 0,
        most: 0,
    };
    let sum = folder.fold(
        Block {
            lo: 0,
            len: problem.world,
        },
        top(problem.world),
    );
    let Folder {
        mut round, most, ..
    } = folder;
    let target = if problem.kind == Kind::AllReduce {
        slice.clone()
    } else {
        0..slice.len()
    };
    round.copy(sum, Loc::one(Region::Output, target));
    rounds.push(round);

    if problem.kind == Kind::AllReduce {
        let mut gather = Round::default();
        exchange(
            problem,
            rank,
            &mut gather,
            Loc::one(Region::Output, slice.clone()),
        );
        rounds.push(gather);
    }
    let form = if problem.lifted {
        Form::Partial
    } else {
        Form::Payload
    };
    let acc_elems = if problem.lifted {
        problem.elems()
    } else {
        most * slice.len()
    };
    let acc = Slot {
        form: Form::Partial,
        elems: acc_elems,
    };
    let stage = Slot {
        form,
        elems: (problem.world - 1) * slice.len(),
    };
    Schedule {
        scratch: vec![acc, stage],
        rounds,
    }
}

/// Reduce: as a reduce-scatter whose only slice is the root's.
pub(super) fn reduce_to(problem: &Problem, root: Rank, rank: Rank) -> Schedule {
    let counts = (0..problem.world).map(|owner| if owner == root { problem.elems() } else { 0 });
    let counts: Vec<usize> = counts.collect();
    let only = Problem::with_counts(Kind::ReduceScatter, problem.world, &counts);
    reduce(&only.with_lifted(problem.lifted), rank)
}

/// All-gather: one round.
pub(super) fn all_gather(problem: &Problem, rank: Rank) -> Schedule {
    let slice = problem.slices[rank].clone();
    let mut round = Round::default();
    let own = Loc::one(Region::Input, 0..slice.len());
    exchange(problem, rank, &mut round, own.clone());
    round.copy(own, Loc::one(Region::Output, slice));
    Schedule {
        scratch: Vec::new(),
        rounds: vec![round],
    }
}

/// Broadcast: the root sends to each.
pub(super) fn broadcast(problem: &Problem, root: Rank, rank: Rank) -> Schedule {
    let whole = |region| Loc::one(region, 0..problem.elems());
    let mut round = Round::default();
    if rank == root {
        for peer in peers(problem.world, rank) {
            round.send(peer, whole(Region::Input));
        }
        round.copy(whole(Region::Input), whole(Region::Output));
    } else {
        round.recv(root, whole(Region::Output));
    }
    Schedule {
        scratch: Vec::new(),
        rounds: vec![round],
    }
}

/// Gather: each sends to the root.
pub(super) fn gather(problem: &Problem, root: Rank, rank: Rank) -> Schedule {
    let slice = |of: Rank| problem.slices[of].clone();
    let own = Loc::one(Region::Input, 0..slice(rank).len());
    let mut round = Round::default();
    if rank == root {
        for peer in peers(problem.world, rank) {
            round.recv(peer, Loc::one(Region::Output, slice(peer)));
        }
        round.copy(own, Loc::one(Region::Output, slice(rank)));
    } else {
        round.send(root, own);
    }
    once(round)
}

/// Scatter: the root sends to each.
pub(super) fn scatter(problem: &Problem, root: Rank, rank: Rank) -> Schedule {
    let slice = |of: Rank| problem.slices[of].clone();
    let own = Loc::one(Region::Output, 0..slice(rank).len());
    let mut round = Round::default();
    if rank == root {
        for peer in peers(problem.world, rank) {
            round.send(peer, Loc::one(Region::Input, slice(peer)));
        }
        round.copy(Loc::one(Region::Input, slice(rank)), own);
    } else {
        round.recv(root, own);
    }
    once(round)
}

/// All-to-all: all blocks in one round.
pub(super) fn all_to_all(problem: &Problem, rank: Rank) -> Schedule {
    let mut round = Round::default();
    for step in 1..problem.world {
        turn(problem, rank, step, &mut round);
    }
    keep(problem, rank, &mut round);
    once(round)
}

/// All-to-all: what a rank sends `step` ranks ahead, and takes from as far behind.
pub(super) fn turn(problem: &Problem, rank: Rank, step: usize, round: &mut Round) {
    let world = problem.world;
    let (to, from) = ((rank + step) % world, (rank + world - step) % world);
    round.send(to, outgoing(problem, rank, to));
    round.recv(from, incoming(problem, rank, from));
}

/// All-to-all: what a rank keeps.
pub(super) fn keep(problem: &Problem, rank: Rank, round: &mut Round) {
    round.copy(outgoing(problem, rank, rank), incoming(problem, rank, rank));
}

fn outgoing(problem: &Problem, rank: Rank, to: Rank) -> Loc {
    let (block, start) = (problem.block(rank, to), problem.slices[rank].start);
    Loc::one(Region::Input, block.start - start..block.end - start)
}

fn incoming(problem: &Problem, rank: Rank, from: Rank) -> Loc {
    let len = |from| problem.block(from, rank).len();
    let start = (0..from).map(len).sum();
    Loc::one(Region::Output, start..start + len(from))
}

fn once(round: Round) -> Schedule {
    Schedule {
        scratch: Vec::new(),
        rounds: vec![round],
    }
}

/// All other ranks, the next one first, so that not all start with rank 0.
pub(super) fn peers(world: usize, rank: Rank) -> impl Iterator<Item = Rank> {
    (1..world).map(move |step| (rank + step) % world)
}

/// Sends `own` to all, takes every other slice into Output.
fn exchange(problem: &Problem, rank: Rank, round: &mut Round, own: Loc) {
    for peer in peers(problem.world, rank) {
        round.send(peer, own.clone());
        round.recv(peer, Loc::one(Region::Output, problem.slices[peer].clone()));
    }
}

/// Where `peer`'s leaf of this rank's slice lands: rank order, without our own.
fn arrival(problem: &Problem, rank: Rank, peer: Rank) -> Loc {
    let len = problem.slices[rank].len();
    let place = if peer < rank { peer } else { peer - 1 };
    Loc::one(LEAVES, place * len..(place + 1) * len)
}

/// Folds one slice's leaves along the tree, into a stack of sums.
struct Folder<'a> {
    problem: &'a Problem,
    rank: Rank,
    round: Round,
    /// Sums in use, and the most there ever were.
    sums: usize,
    most: usize,
}

impl Folder<'_> {
    /// Where the block's value stands. A block of one stands where its leaf is; lifted leaves are folded in place.
    fn fold(&mut self, block: Block, level: u32) -> Loc {
        if block.len == 1 {
            return self.leaf(block.lo);
        }
        let Some((left, right)) = block.halves(level) else {
            return self.fold(block, level - 1);
        };
        if self.problem.lifted {
            let (into, with) = (self.fold(left, level - 1), self.fold(right, level - 1));
            self.round.fold(into.clone(), with);
            return into;
        }
        let depth = self.sums;
        let mut into = self.fold(left, level - 1);
        if left.len == 1 {
            let sum = Loc::one(ACC, self.claim());
            self.round.copy(into, sum.clone());
            into = sum;
        }
        let with = self.fold(right, level - 1);
        self.round.fold(into.clone(), with);
        self.sums = depth + 1;
        into
    }

    /// Where a rank's leaf of this slice is.
    fn leaf(&self, of: Rank) -> Loc {
        let region = if self.problem.lifted {
            ACC
        } else {
            Region::Input
        };
        if of == self.rank {
            Loc::one(region, self.problem.slices[self.rank].clone())
        } else {
            arrival(self.problem, self.rank, of)
        }
    }

    /// Room for one more sum.
    fn claim(&mut self) -> Range<usize> {
        let len = self.problem.slices[self.rank].len();
        let room = self.sums * len..(self.sums + 1) * len;
        self.sums += 1;
        self.most = self.most.max(self.sums);
        room
    }
}
