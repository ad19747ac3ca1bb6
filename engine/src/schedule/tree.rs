//! The canonical tree over rank numbers: aligned blocks and their halves. See [Note: fold order] in the parent.

use std::ops::Range;

use super::Rank;

/// Consecutive ranks whose values are folded together: an aligned block of 2^level ranks, cut off at the world's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    /// The first rank.
    pub(super) lo: Rank,
    /// How many ranks; at least one.
    pub(super) len: usize,
}

impl Block {
    /// The block of 2^level ranks that `rank` is in.
    pub(super) fn at(world: usize, rank: Rank, level: u32) -> Block {
        let lo = (rank >> level) << level;
        Block {
            lo,
            len: (1 << level).min(world - lo),
        }
    }

    /// The halves this block of 2^level ranks is folded from; `None` where the right one is missing.
    pub(super) fn halves(self, level: u32) -> Option<(Block, Block)> {
        let half = 1 << (level - 1);
        (self.len > half).then(|| {
            (
                Block {
                    lo: self.lo,
                    len: half,
                },
                Block {
                    lo: self.lo + half,
                    len: self.len - half,
                },
            )
        })
    }

    /// Its ranks.
    pub(super) fn ranks(self) -> Range<Rank> {
        self.lo..self.lo + self.len
    }
}

/// The level at which one block is the whole world: log2 of its size, rounded up.
pub(super) fn top(world: usize) -> u32 {
    world.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_ranks_fold_as_four_and_one() {
        assert_eq!(top(5), 3);
        let all = Block::at(5, 3, 3);
        assert_eq!(all, Block { lo: 0, len: 5 });
        assert_eq!(
            all.halves(3),
            Some((Block { lo: 0, len: 4 }, Block { lo: 4, len: 1 }))
        );
        assert_eq!(Block::at(5, 4, 2), Block { lo: 4, len: 1 });
        assert_eq!(Block::at(5, 4, 2).halves(2), None);
    }

    #[test]
    fn the_top_block_is_the_world() {
        for world in 1..100 {
            assert_eq!(
                Block::at(world, world - 1, top(world)),
                Block { lo: 0, len: world }
            );
        }
    }
}
