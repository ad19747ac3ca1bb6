//! Messages with nothing in them: nobody leaves before all have entered.

use super::direct::peers;
use super::tree::{Block, top};
use super::{Loc, Move, Rank, Region, Round, Schedule};

/// Everyone tells everyone; one round.
pub(super) fn direct(world: usize, rank: Rank) -> Schedule {
    let wire = peers(world, rank)
        .flat_map(|peer| [send(peer), recv(peer)])
        .collect();
    Schedule {
        scratch: Vec::new(),
        rounds: vec![Round {
            wire,
            local: Vec::new(),
        }],
    }
}

/// In round k tell the rank 2^k ahead; after log2 n rounds, rounded up, each has heard of all, for any n (Hensgen,
/// Finkel and Manber 1988).
pub(super) fn dissemination(world: usize, rank: Rank) -> Schedule {
    let round = |level: u32| {
        let step = 1 << level;
        let wire = vec![
            send((rank + step) % world),
            recv((rank + world - step) % world),
        ];
        Round {
            wire,
            local: Vec::new(),
        }
    };
    Schedule {
        scratch: Vec::new(),
        rounds: (0..top(world)).map(round).collect(),
    }
}

/// Up the tree to rank 0 and down again: 2(n-1) messages in all, the fewest, in 2 log2 n rounds.
pub(super) fn tree(world: usize, rank: Rank) -> Schedule {
    let levels = 1..=top(world);
    let up = levels.clone().map(|level| step(world, rank, level, true));
    let down = levels.rev().map(|level| step(world, rank, level, false));
    Schedule {
        scratch: Vec::new(),
        rounds: up.chain(down).collect(),
    }
}

/// One level of the tree: between the first ranks of a block's halves.
fn step(world: usize, rank: Rank, level: u32, up: bool) -> Round {
    let Some((left, right)) = Block::at(world, rank, level).halves(level) else {
        return Round::default();
    };
    let wire = match (rank == left.lo, rank == right.lo) {
        (true, _) => vec![if up { recv(right.lo) } else { send(right.lo) }],
        (_, true) => vec![if up { send(left.lo) } else { recv(left.lo) }],
        _ => Vec::new(),
    };
    Round {
        wire,
        local: Vec::new(),
    }
}

fn send(to: Rank) -> Move {
    Move::Send {
        to,
        from: Loc::new(Region::Input, []),
    }
}

fn recv(from: Rank) -> Move {
    Move::Recv {
        from,
        into: Loc::new(Region::Output, []),
    }
}
