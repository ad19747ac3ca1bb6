//! A loader: a dataset, in a sampler's order, in batches.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Batches, Dataset, Sampler, batches::Recipe};
use crate::{Error, Result, seed};

/// Makes one batch of samples.
pub(super) type Collate<I, B> = Arc<dyn Fn(Vec<I>) -> Result<B> + Send + Sync>;

/// Loads a dataset batch by batch, in the same order whatever the number of workers.
///
/// ```
/// use fabric::data::DataLoader;
///
/// let loader = DataLoader::new((0..10).collect::<Vec<i64>>())
///     .batch_size(4)
///     .workers(2)
///     .collate(|samples| Ok(samples.iter().sum::<i64>()));
/// assert_eq!(loader.len(), 3);
/// let sums: Vec<i64> = loader.iter().collect::<fabric::Result<_>>()?;
/// assert_eq!(sums, [6, 22, 17]);
/// # Ok::<(), fabric::Error>(())
/// ```
///
/// Every [`DataLoader::iter`] is a new epoch: 0, 1, 2, ..., which changes the order when shuffled. A program that
/// resumes, or counts epochs in its own way, calls [`DataLoader::set_epoch`] before each.
pub struct DataLoader<D: Dataset, B = Vec<<D as Dataset>::Item>> {
    dataset: Arc<D>,
    batch_size: usize,
    shuffle: bool,
    seed: Option<u64>,
    drop_last: bool,
    workers: usize,
    prefetch: usize,
    share: Option<Share>,
    epoch: Mutex<Epoch>,
    collate: Collate<D::Item, B>,
}

#[derive(Clone, Copy)]
struct Share {
    rank: usize,
    world: usize,
}

#[derive(Clone, Copy)]
enum Epoch {
    Counted { next: u64 },
    Set(u64),
}

impl<D: Dataset + 'static> DataLoader<D> {
    /// One sample a batch, in order, read by the caller's own thread.
    pub fn new(dataset: D) -> Self {
        Self {
            dataset: Arc::new(dataset),
            batch_size: 1,
            shuffle: false,
            seed: None,
            drop_last: false,
            workers: 0,
            prefetch: 2,
            share: None,
            epoch: Mutex::new(Epoch::Counted { next: 0 }),
            collate: Arc::new(Ok),
        }
    }
}

impl<D: Dataset, B> DataLoader<D, B> {
    /// Samples in a batch.
    ///
    /// # Panics
    /// When 0.
    pub fn batch_size(self, batch_size: usize) -> Self {
        assert!(batch_size > 0, "a batch of 0 samples. Ask for at least one");
        Self { batch_size, ..self }
    }

    /// Whether every epoch has an order of its own.
    pub fn shuffle(self, shuffle: bool) -> Self {
        Self { shuffle, ..self }
    }

    /// The seed of the orders; without it the run's ([`seed::current`]), and without that 0. It must be the same on
    /// all ranks.
    pub fn seed(self, seed: u64) -> Self {
        let seed = Some(seed);
        Self { seed, ..self }
    }

    /// Leave out the last batch when it is not full.
    pub fn drop_last(self, drop_last: bool) -> Self {
        Self { drop_last, ..self }
    }

    /// Threads that read ahead; with 0 the caller's own thread reads.
    pub fn workers(self, workers: usize) -> Self {
        Self { workers, ..self }
    }

    /// Batches that each worker may be ahead of the caller, 2 unless told; at least 1.
    pub fn prefetch(self, prefetch: usize) -> Self {
        Self {
            prefetch: prefetch.max(1),
            ..self
        }
    }

    /// How samples become a batch. Workers do it, so that it may be costly.
    pub fn collate<C>(
        self,
        collate: impl Fn(Vec<D::Item>) -> Result<C> + Send + Sync + 'static,
    ) -> DataLoader<D, C> {
        DataLoader {
            dataset: self.dataset,
            batch_size: self.batch_size,
            shuffle: self.shuffle,
            seed: self.seed,
            drop_last: self.drop_last,
            workers: self.workers,
            prefetch: self.prefetch,
            share: self.share,
            epoch: self.epoch,
            collate: Arc::new(collate),
        }
    }

    /// Load only `rank`'s share of `world` shares. Shares are equally long on all ranks: the first samples of the epoch
    /// are repeated where the last turn is not full, as in Lightning; `drop_last` still speaks of batches.
    ///
    /// # Errors
    /// When the loader has been distributed before, or `rank` is not below `world`.
    pub fn distribute(&mut self, rank: usize, world: usize) -> Result<()> {
        if rank >= world {
            return Err(Error::argument(
                format!("a loader's share {rank} of {world}"),
                "Ranks are numbered from 0 to world size - 1",
            ));
        }
        if let Some(share) = self.share {
            return Err(Error::argument(
                format!(
                    "this loader already loads the share of rank {} of {}",
                    share.rank, share.world
                ),
                "Set up each loader once",
            ));
        }
        self.share = Some(Share { rank, world });
        Ok(())
    }

    /// Use `epoch` for every [`DataLoader::iter`] from now on, until set again: the loader stops counting by itself.
    pub fn set_epoch(&self, epoch: u64) {
        *self.epoch.lock().unwrap_or_else(PoisonError::into_inner) = Epoch::Set(epoch);
    }

    /// The dataset.
    pub fn dataset(&self) -> &D {
        &self.dataset
    }

    /// The order of samples that [`DataLoader::iter`] follows.
    pub fn sampler(&self) -> Sampler {
        let seed = self.seed.or_else(seed::current).unwrap_or(0);
        match (self.share, self.shuffle) {
            (Some(Share { rank, world }), shuffle) => Sampler::Distributed {
                rank,
                world,
                shuffle,
                seed,
                drop_last: false,
            },
            (None, true) => Sampler::Shuffled { seed },
            (None, false) => Sampler::Sequential,
        }
    }

    /// How many batches an epoch has, on this rank.
    pub fn len(&self) -> usize {
        let samples = self.sampler().len(self.dataset.len());
        if self.drop_last {
            samples / self.batch_size
        } else {
            samples.div_ceil(self.batch_size)
        }
    }

    /// Whether an epoch has no batch.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of the epoch that starts now.
    fn start_epoch(&self) -> u64 {
        let mut epoch = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        match *epoch {
            Epoch::Set(set) => set,
            Epoch::Counted { next } => {
                *epoch = Epoch::Counted { next: next + 1 };
                next
            }
        }
    }
}

impl<D: Dataset + 'static, B: Send + 'static> DataLoader<D, B> {
    /// Start an epoch. After an error there is no further batch; a dropped iterator stops and joins its workers.
    pub fn iter(&self) -> Batches<D, B> {
        let order = self
            .sampler()
            .indices(self.dataset.len(), self.start_epoch());
        let recipe = Recipe {
            dataset: self.dataset.clone(),
            order,
            batch_size: self.batch_size,
            count: self.len(),
            collate: self.collate.clone(),
        };
        Batches::new(recipe, self.workers, self.prefetch)
    }
}

impl<D: Dataset + 'static, B: Send + 'static> IntoIterator for &DataLoader<D, B> {
    type Item = Result<B>;
    type IntoIter = Batches<D, B>;

    fn into_iter(self) -> Batches<D, B> {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loader(count: usize) -> DataLoader<Vec<usize>> {
        DataLoader::new((0..count).collect::<Vec<_>>()).seed(11)
    }

    fn epoch(loader: &DataLoader<Vec<usize>>) -> Vec<Vec<usize>> {
        loader.iter().map(Result::unwrap).collect()
    }

    #[test]
    fn the_order_does_not_depend_on_the_number_of_workers() {
        let passes = |workers| {
            let loader = loader(103).batch_size(4).shuffle(true).workers(workers);
            [epoch(&loader), epoch(&loader)]
        };
        assert_eq!(passes(0), passes(1));
        assert_eq!(passes(0), passes(3));
    }

    #[test]
    fn each_pass_is_a_new_epoch_unless_one_is_set() {
        let counted = loader(40).shuffle(true);
        let passes = [epoch(&counted), epoch(&counted), epoch(&counted)];
        assert_ne!(passes[0], passes[1]);
        assert_ne!(passes[1], passes[2]);
        let set = loader(40).shuffle(true);
        for number in [2, 0, 1] {
            set.set_epoch(number);
            assert_eq!(epoch(&set), passes[number as usize]);
            assert_eq!(epoch(&set), passes[number as usize]);
        }
    }

    #[test]
    fn the_last_batch_is_short_or_left_out() {
        let whole = loader(10).batch_size(4);
        assert_eq!(epoch(&whole).last().unwrap(), &[8, 9]);
        assert_eq!((whole.len(), epoch(&whole).len()), (3, 3));
        let cut = loader(10).batch_size(4).drop_last(true);
        assert_eq!((cut.len(), epoch(&cut).len()), (2, 2));
        let none = loader(0).batch_size(4).workers(2);
        assert!(none.is_empty() && epoch(&none).is_empty());
    }

    #[test]
    fn ranks_have_as_many_batches_and_together_all_samples() {
        for world in [2, 3, 7] {
            let mut seen = Vec::new();
            for rank in 0..world {
                let mut loader = loader(5).batch_size(2).shuffle(true).workers(rank % 2);
                loader.distribute(rank, world).unwrap();
                let batches = epoch(&loader);
                assert_eq!(batches.len(), 5usize.div_ceil(world).div_ceil(2));
                seen.extend(batches.concat());
            }
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, [0, 1, 2, 3, 4]);
        }
    }

    #[test]
    fn five_samples_on_two_ranks_are_lightnings() {
        let mut loader = loader(5).batch_size(2);
        loader.distribute(0, 2).unwrap();
        assert_eq!(epoch(&loader), [vec![0, 2], vec![4]]);
    }

    #[test]
    fn a_loader_is_distributed_once() {
        let mut loader = loader(5);
        assert!(loader.distribute(2, 2).is_err());
        loader.distribute(1, 2).unwrap();
        let text = loader.distribute(0, 2).unwrap_err().to_string();
        assert!(text.contains("rank 1 of 2"), "{text}");
    }

    #[test]
    #[should_panic(expected = "Ask for at least one")]
    fn a_batch_of_nothing_is_refused() {
        let _ = loader(5).batch_size(0);
    }
}
