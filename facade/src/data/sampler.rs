//! Samplers: in which order samples come, and which of them are a rank's. The order is a pure function of the number of
//! samples and the epoch, so that all ranks find the same one.

use rand::{
    distr::{Distribution, weighted::WeightedIndex},
    seq::SliceRandom,
};

use crate::{Error, Result, seed};

/// In which order samples come.
///
/// ```
/// use fabric::data::{DataLoader, Sampler};
///
/// /// The longest texts first.
/// struct ByLength(Vec<usize>);
/// impl Sampler for ByLength {
///     fn indices(&self, count: usize, _epoch: u64) -> Vec<usize> {
///         let mut order: Vec<_> = (0..count).collect();
///         order.sort_by_key(|sample| std::cmp::Reverse(self.0[*sample]));
///         order
///     }
/// }
///
/// let texts = vec!["a", "abc", "ab"];
/// let lengths = texts.iter().map(|text| text.len()).collect();
/// let loader = DataLoader::new(texts).sampler(ByLength(lengths));
/// let batches: Vec<_> = loader.iter().collect::<fabric::Result<_>>()?;
/// assert_eq!(batches, [["abc"], ["ab"], ["a"]]);
/// # Ok::<(), fabric::Error>(())
/// ```
pub trait Sampler: Send + Sync {
    /// The numbers of an epoch's samples, out of `count` samples, in order. The same on all ranks.
    fn indices(&self, count: usize, epoch: u64) -> Vec<usize>;

    /// How many samples an epoch has, out of `count`.
    fn len(&self, count: usize) -> usize {
        count
    }

    /// Whether an epoch out of `count` samples is empty.
    fn is_empty(&self, count: usize) -> bool {
        self.len(count) == 0
    }

    /// Whether these are one rank's samples already, so that `fabric.setup_dataloaders` leaves them alone.
    fn is_distributed(&self) -> bool {
        false
    }
}

impl<S: Sampler + ?Sized> Sampler for std::sync::Arc<S> {
    fn indices(&self, count: usize, epoch: u64) -> Vec<usize> {
        (**self).indices(count, epoch)
    }
    fn len(&self, count: usize) -> usize {
        (**self).len(count)
    }
    fn is_distributed(&self) -> bool {
        (**self).is_distributed()
    }
}

/// From the first to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequentialSampler;

impl Sampler for SequentialSampler {
    fn indices(&self, count: usize, _epoch: u64) -> Vec<usize> {
        (0..count).collect()
    }
}

/// In an order that follows from the seed and the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomSampler {
    /// The order's seed.
    pub seed: u64,
}

impl Sampler for RandomSampler {
    fn indices(&self, count: usize, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        order.shuffle(&mut seed::rng(seed::derive(self.seed, &[epoch])));
        order
    }
}

/// Drawn with replacement, each sample as often as its weight says.
#[derive(Clone, Debug)]
pub struct WeightedRandomSampler {
    law: WeightedIndex<f64>,
    weights: usize,
    samples: usize,
    seed: u64,
}

impl WeightedRandomSampler {
    /// `samples` a epoch, of a dataset with as many samples as there are weights.
    ///
    /// # Errors
    /// When a weight is negative or not finite, or all are 0.
    pub fn new(weights: &[f64], samples: usize, seed: u64) -> Result<Self> {
        let law = WeightedIndex::new(weights).map_err(|error| {
            Error::argument(
                format!("samples cannot be drawn by these weights: {error}"),
                "Give one finite weight a sample, not below 0, and not all of them 0",
            )
        })?;
        Ok(Self {
            law,
            weights: weights.len(),
            samples,
            seed,
        })
    }
}

impl Sampler for WeightedRandomSampler {
    /// # Panics
    /// When the dataset has other than as many samples as there are weights.
    fn indices(&self, count: usize, epoch: u64) -> Vec<usize> {
        assert_eq!(
            count, self.weights,
            "{count} samples, but {} weights. Give one weight a sample",
            self.weights
        );
        let mut rng = seed::rng(seed::derive(self.seed, &[epoch]));
        (0..self.samples)
            .map(|_| self.law.sample(&mut rng))
            .collect()
    }

    fn len(&self, _count: usize) -> usize {
        self.samples
    }
}

/// One rank's share of another sampler's order: positions rank, rank + world, ... of it.
///
/// ```
/// use fabric::data::{DistributedSampler, Sampler, SequentialSampler};
///
/// // 5 samples on 2 ranks: rank 1's last one repeats sample 0, so that both ranks have as many.
/// let shard = |rank| DistributedSampler::new(SequentialSampler, rank, 2);
/// assert_eq!(shard(0).indices(5, 0), [0, 2, 4]);
/// assert_eq!(shard(1).indices(5, 0), [1, 3, 0]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DistributedSampler<S> {
    inner: S,
    rank: usize,
    world: usize,
    drop_last: bool,
}

impl<S: Sampler> DistributedSampler<S> {
    /// `rank`'s share of `world` shares. All are equally long: where the last turn is not full, the first samples are
    /// repeated; with fewer samples than ranks, as often as needed.
    ///
    /// # Panics
    /// When `rank` is not below `world`.
    pub fn new(inner: S, rank: usize, world: usize) -> Self {
        assert!(
            rank < world,
            "share {rank} of {world}. Shares are numbered from 0"
        );
        Self {
            inner,
            rank,
            world,
            drop_last: false,
        }
    }

    /// Leave out the last samples that do not fill all ranks, rather than repeat the first ones.
    pub fn drop_last(self, drop_last: bool) -> Self {
        Self { drop_last, ..self }
    }
}

impl<S: Sampler> Sampler for DistributedSampler<S> {
    fn indices(&self, count: usize, epoch: u64) -> Vec<usize> {
        let order = self.inner.indices(count, epoch);
        let positions = (0..self.len(count)).map(|turn| self.rank + turn * self.world);
        positions
            .map(|position| order[position % order.len()])
            .collect()
    }

    fn len(&self, count: usize) -> usize {
        let all = self.inner.len(count);
        match self.drop_last {
            true => all / self.world,
            false => all.div_ceil(self.world),
        }
    }

    fn is_distributed(&self) -> bool {
        true
    }
}

/// Which samples make which batch: for batches of texts of like lengths, say. Where there are several ranks, whole batches
/// are dealt among them.
pub trait BatchSampler: Send + Sync {
    /// The batches of an epoch, whose samples come in this order. The same on all ranks.
    fn batches(&self, order: &[usize], epoch: u64) -> Vec<Vec<usize>>;
}

impl<F: Fn(&[usize], u64) -> Vec<Vec<usize>> + Send + Sync> BatchSampler for F {
    fn batches(&self, order: &[usize], epoch: u64) -> Vec<Vec<usize>> {
        self(order, epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANDOM: RandomSampler = RandomSampler { seed: 5 };

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

    fn compare(sampler: impl Sampler + Copy, count: usize, rank: usize, world: usize) {
        let order = sampler.indices(count, 3);
        for drop_last in [false, true] {
            let shard = DistributedSampler::new(sampler, rank, world).drop_last(drop_last);
            let indices = shard.indices(count, 3);
            assert_eq!(indices, by_the_book(&order, rank, world, drop_last));
            assert_eq!(indices.len(), shard.len(count));
            assert_eq!(indices.is_empty(), shard.is_empty(count));
        }
    }

    // Line 26: parity with torch's DistributedSampler, and with Lightning's wrapper of any other.
    #[test]
    fn line_26_shards_are_those_of_the_published_algorithm() {
        for count in 0..20 {
            for world in 1..9 {
                for rank in 0..world {
                    compare(SequentialSampler, count, rank, world);
                    compare(RANDOM, count, rank, world);
                }
            }
        }
    }

    #[test]
    fn shards_cover_every_sample() {
        for world in 1..6 {
            let shard = |rank| DistributedSampler::new(RANDOM, rank, world).indices(17, 1);
            let mut all: Vec<_> = (0..world).flat_map(shard).collect();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all, (0..17).collect::<Vec<_>>());
        }
    }

    #[test]
    fn epochs_differ_and_repeat_by_seed() {
        let order = |seed, epoch| RandomSampler { seed }.indices(50, epoch);
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        let mut sorted = order(1, 0);
        sorted.sort_unstable();
        assert_eq!(sorted, SequentialSampler.indices(50, 9));
    }

    #[test]
    fn weights_decide_how_often_a_sample_is_drawn() {
        let sampler = WeightedRandomSampler::new(&[0.0, 1.0, 3.0], 4000, 1).unwrap();
        let drawn = sampler.indices(3, 0);
        let times = |sample| drawn.iter().filter(|drawn| **drawn == sample).count();
        assert_eq!(
            (times(0), times(1) + times(2), sampler.len(3)),
            (0, 4000, 4000)
        );
        assert!((850..1150).contains(&times(1)), "{}", times(1)); // 1000 +- 5 deviations
        assert_ne!(drawn, sampler.indices(3, 1));
        for weights in [&[][..], &[0.0, 0.0], &[1.0, -1.0], &[f64::NAN]] {
            assert!(WeightedRandomSampler::new(weights, 1, 1).is_err());
        }
    }
}
