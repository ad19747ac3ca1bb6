//! The owner map run backwards: from the owner of a piece in the whole world down to every rank. Halving's map gives
//! the recursive-doubling all-gather (Thakur, Rabenseifner and Gropp 2005), the tree's map the binomial broadcast.

use std::collections::BTreeMap;
use std::ops::Range;

use super::owners::Owners;
use super::tree::{Block, top};
use super::{Loc, Problem, Rank, Region, Round, Schedule};

/// All-gather, log2 n rounds for any n; each rank receives every piece once.
pub(super) fn all_gather(problem: &Problem, rank: Rank) -> Schedule {
    let slice = problem.slices[rank].clone();
    let own = Loc::one(Region::Input, 0..slice.len());
    let mut rounds = Spread {
        owners: Owners::Strided,
        pieces: &problem.slices,
        world: problem.world,
        root: 0,
    }
    .rounds(rank, Some(slice.start));
    rounds[0].copy(own, Loc::one(Region::Output, slice));
    Schedule {
        scratch: Vec::new(),
        rounds,
    }
}

/// Broadcast along a binomial tree over the ranks counted from the root.
pub(super) fn broadcast(problem: &Problem, root: Rank, rank: Rank) -> Schedule {
    let whole = |region| Loc::one(region, 0..problem.elems());
    let pieces = 0..problem.elems();
    let mut rounds = Spread {
        owners: Owners::First,
        pieces: std::slice::from_ref(&pieces),
        world: problem.world,
        root,
    }
    .rounds(rank, Some(0));
    if rank == root {
        rounds[0].copy(whole(Region::Input), whole(Region::Output));
    }
    Schedule {
        scratch: Vec::new(),
        rounds,
    }
}

/// Pieces on their way from their owners to all.
pub(super) struct Spread<'a> {
    /// Who holds what at each level.
    pub(super) owners: Owners,
    /// Ranges of the full vector.
    pub(super) pieces: &'a [Range<usize>],
    /// The world's size.
    pub(super) world: usize,
    /// The tree's rank 0 is this rank, and so on around.
    pub(super) root: Rank,
}

impl Spread<'_> {
    /// One round a level, from the top. What moves is Output, in the full vector's coordinates; `input` says that the
    /// first round reads Input instead, whose element 0 is that element of the full vector.
    pub(super) fn rounds(&self, rank: Rank, input: Option<usize>) -> Vec<Round> {
        let highest = top(self.world);
        (1..=highest)
            .rev()
            .map(|level| self.round(rank, level, input.filter(|_| level == highest)))
            .collect()
    }

    /// The holder of each piece in a block gives it to the holders in both halves.
    fn round(&self, rank: Rank, level: u32, input: Option<usize>) -> Round {
        let place = (rank + self.world - self.root) % self.world;
        let block = Block::at(self.world, place, level);
        let Some((left, right)) = block.halves(level) else {
            return Round::default();
        };
        let (mut sent, mut taken) = (
            BTreeMap::<Rank, Vec<_>>::new(),
            BTreeMap::<Rank, Vec<_>>::new(),
        );
        for (piece, range) in self.pieces.iter().enumerate() {
            let owner = self.owners.owner(block, piece);
            for half in [left, right] {
                let target = self.owners.owner(half, piece);
                if (owner != place && target != place) || self.had(target, piece, level) {
                    continue;
                }
                let (side, peer) = if owner == place {
                    (&mut sent, target)
                } else {
                    (&mut taken, owner)
                };
                side.entry((peer + self.root) % self.world)
                    .or_default()
                    .push(range.clone());
            }
        }
        let mut round = Round::default();
        let (region, start) = input.map_or((Region::Output, 0), |start| (Region::Input, start));
        for (to, ranges) in sent {
            round.send(
                to,
                Loc::new(
                    region,
                    ranges
                        .into_iter()
                        .map(|range| range.start - start..range.end - start),
                ),
            );
        }
        for (from, ranges) in taken {
            round.recv(from, Loc::new(Region::Output, ranges));
        }
        round
    }

    /// Whether `place` owned the piece at this level or above, and so has it already. (Where the world is no power of
    /// two, ownership may come back to a rank that had passed the piece on.)
    fn had(&self, place: Rank, piece: usize, level: u32) -> bool {
        (level..=top(self.world)).any(|above| {
            self.owners
                .owner(Block::at(self.world, place, above), piece)
                == place
        })
    }
}
