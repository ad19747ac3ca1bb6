//! A sampler: in which order samples come, and which of them are this rank's. It is plain data; the order is a pure
//! function of it, the number of samples and the epoch.

use rand::seq::SliceRandom;

use crate::seed;

/// Which samples, in which order.
///
/// ```
/// use fabric::data::Sampler;
///
/// // 5 samples on 2 ranks: rank 1's last one repeats sample 0, so that both ranks have as many.
/// let shard = |rank| Sampler::Distributed { rank, world: 2, shuffle: false, seed: 0, drop_last: false };
/// assert_eq!(shard(0).indices(5, 0), [0, 2, 4]);
/// assert_eq!(shard(1).indices(5, 0), [1, 3, 0]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampler {
    /// From the first to the last.
    Sequential,
    /// In an order that follows from the seed and the epoch.
    Shuffled {
        /// The order's seed.
        seed: u64,
    },
    /// One rank's share: positions rank, rank + world, ... of the common order, which all ranks compute alike.
    Distributed {
        /// Whose share.
        rank: usize,
        /// How many shares.
        world: usize,
        /// Whether the common order is shuffled.
        shuffle: bool,
        /// The common order's seed.
        seed: u64,
        /// Leave out the last samples that do not fill all ranks, rather than repeat the first ones.
        drop_last: bool,
    },
}

impl Sampler {
    /// The numbers of the samples of one epoch, out of `count` samples. All shares are equally long; with no samples
    /// all are empty, and with fewer samples than ranks they repeat as often as needed (or are empty, when `drop_last`).
    pub fn indices(&self, count: usize, epoch: u64) -> Vec<usize> {
        match *self {
            Self::Sequential => (0..count).collect(),
            Self::Shuffled { seed } => shuffled(count, seed, epoch),
            Self::Distributed {
                rank,
                world,
                shuffle,
                seed,
                ..
            } => {
                let order = if shuffle {
                    shuffled(count, seed, epoch)
                } else {
                    (0..count).collect()
                };
                let positions = (0..self.len(count)).map(|turn| rank + turn * world);
                positions.map(|position| order[position % count]).collect()
            }
        }
    }

    /// How many samples an epoch has, out of `count`.
    pub fn len(&self, count: usize) -> usize {
        match *self {
            Self::Sequential | Self::Shuffled { .. } => count,
            Self::Distributed {
                world,
                drop_last: true,
                ..
            } => count / world,
            Self::Distributed { world, .. } => count.div_ceil(world),
        }
    }

    /// Whether an epoch out of `count` samples is empty.
    pub fn is_empty(&self, count: usize) -> bool {
        self.len(count) == 0
    }
}

fn shuffled(count: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut seed::rng(seed::derive(seed, &[epoch])));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(rank: usize, world: usize, shuffle: bool, drop_last: bool) -> Sampler {
        Sampler::Distributed {
            rank,
            world,
            shuffle,
            seed: 5,
            drop_last,
        }
    }

    /// The published algorithm, step by step: pad or cut the whole order, then take every world-th.
    fn by_the_book(order: &[usize], rank: usize, world: usize, drop_last: bool) -> Vec<usize> {
        let mut order = order.to_vec();
        if drop_last {
            order.truncate(order.len() / world * world);
        } else if !order.is_empty() {
            let first = order.clone();
            let mut again = first.iter().cycle();
            while !order.len().is_multiple_of(world) {
                order.extend(again.next());
            }
        }
        order.into_iter().skip(rank).step_by(world).collect()
    }

    #[test]
    fn shards_are_those_of_the_published_algorithm() {
        for count in 0..20 {
            for world in 1..9 {
                for drop_last in [false, true] {
                    for shuffle in [false, true] {
                        let order = shard(0, 1, shuffle, false).indices(count, 3);
                        for rank in 0..world {
                            let sampler = shard(rank, world, shuffle, drop_last);
                            let indices = sampler.indices(count, 3);
                            assert_eq!(indices, by_the_book(&order, rank, world, drop_last));
                            assert_eq!(indices.len(), sampler.len(count));
                            assert_eq!(indices.is_empty(), sampler.is_empty(count));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn shards_cover_every_sample() {
        for world in 1..6 {
            let shards = (0..world).flat_map(|rank| shard(rank, world, true, false).indices(17, 1));
            let mut all: Vec<_> = shards.collect();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all, (0..17).collect::<Vec<_>>());
        }
    }

    #[test]
    fn epochs_differ_and_repeat_by_seed() {
        let order = |seed, epoch| Sampler::Shuffled { seed }.indices(50, epoch);
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        let mut sorted = order(1, 0);
        sorted.sort_unstable();
        assert_eq!(sorted, Sampler::Sequential.indices(50, 9));
    }

    #[test]
    fn fewer_samples_than_ranks_repeat_or_are_left_out() {
        assert_eq!(shard(4, 5, false, false).indices(2, 0), [0]);
        assert_eq!(shard(3, 5, false, false).indices(2, 0), [1]);
        assert!(shard(0, 5, false, true).indices(2, 0).is_empty());
        assert!(shard(0, 5, false, false).indices(0, 0).is_empty());
    }
}
