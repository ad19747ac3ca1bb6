//! A loader: a dataset, in a sampler's order, in batches.

use std::sync::Arc;

use super::{
    BatchSampler, Batches, Dataset, Distribute, LoaderState, RandomSampler, Sampler,
    SequentialSampler,
    batches::Recipe,
    epoch::{ALL, Batching, Epoch, Share},
    position::Position,
};
use crate::{Result, seed};

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
/// counts epochs in its own way calls [`DataLoader::set_epoch`] before each; one that resumes, [`DataLoader::resume`].
pub struct DataLoader<D: Dataset, B = Vec<<D as Dataset>::Item>> {
    dataset: Arc<D>,
    batching: Batching,
    sampler: Option<Arc<dyn Sampler>>,
    shuffle: bool,
    seed: Option<u64>,
    workers: usize,
    prefetch: usize,
    share: Option<Share>,
    is_shared: bool, // or whole on every rank, whatever fabric.setup_dataloaders is told
    position: Position,
    collate: Collate<D::Item, B>,
}

impl<D: Dataset + 'static> DataLoader<D> {
    /// One sample a batch, in order, read by the caller's own thread.
    pub fn new(dataset: D) -> Self {
        Self {
            dataset: Arc::new(dataset),
            batching: Batching::Sized {
                size: 1,
                drop_last: false,
            },
            sampler: None,
            shuffle: false,
            seed: None,
            workers: 0,
            prefetch: 2,
            share: None,
            is_shared: true,
            position: Position::default(),
            collate: Arc::new(Ok),
        }
    }
}

impl<D: Dataset, B> DataLoader<D, B> {
    /// Samples in a batch.
    ///
    /// # Panics
    /// When 0.
    pub fn batch_size(mut self, batch_size: usize) -> Self {
        assert!(batch_size > 0, "a batch of 0 samples. Ask for at least one");
        let drop_last = matches!(
            self.batching,
            Batching::Sized {
                drop_last: true,
                ..
            }
        );
        self.batching = Batching::Sized {
            size: batch_size,
            drop_last,
        };
        self
    }

    /// Leave out the last batch when it is not full. A batch sampler decides that itself.
    pub fn drop_last(mut self, leave: bool) -> Self {
        if let Batching::Sized { drop_last, .. } = &mut self.batching {
            *drop_last = leave;
        }
        self
    }

    /// Let `sampler` make the batches, instead of a size. Several ranks are dealt whole batches.
    ///
    /// ```
    /// use fabric::data::DataLoader;
    ///
    /// let pairs = |order: &[usize], _epoch: u64| order.chunks(2).map(<[usize]>::to_vec).collect::<Vec<_>>();
    /// let loader = DataLoader::new(vec!['a', 'b', 'c']).batch_sampler(pairs);
    /// let batches: Vec<_> = loader.iter().collect::<fabric::Result<_>>()?;
    /// assert_eq!(batches, [vec!['a', 'b'], vec!['c']]);
    /// # Ok::<(), fabric::Error>(())
    /// ```
    pub fn batch_sampler(mut self, sampler: impl BatchSampler + 'static) -> Self {
        self.batching = Batching::Custom(Arc::new(sampler));
        self
    }

    /// Whether every epoch has an order of its own.
    pub fn shuffle(self, shuffle: bool) -> Self {
        Self { shuffle, ..self }
    }

    /// In the order of this sampler. With several ranks each has its share of it, unless it is distributed already.
    pub fn sampler(mut self, sampler: impl Sampler + 'static) -> Self {
        self.sampler = Some(Arc::new(sampler));
        self
    }

    /// Whether `fabric.setup_dataloaders` shares the samples out among the ranks, as it does unless told. With false every
    /// rank loads all of them.
    pub fn use_distributed_sampler(self, is_shared: bool) -> Self {
        Self { is_shared, ..self }
    }

    /// The seed of the orders; without it the run's ([`seed::current`]), and without that 0. It must be the same on
    /// all ranks.
    pub fn seed(self, seed: u64) -> Self {
        let seed = Some(seed);
        Self { seed, ..self }
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
            batching: self.batching,
            sampler: self.sampler,
            shuffle: self.shuffle,
            seed: self.seed,
            workers: self.workers,
            prefetch: self.prefetch,
            share: self.share,
            is_shared: self.is_shared,
            position: self.position,
            collate: Arc::new(collate),
        }
    }

    /// Use `epoch` for every [`DataLoader::iter`] from now on, until set again: the loader stops counting by itself.
    pub fn set_epoch(&self, epoch: u64) {
        self.position.set_epoch(epoch);
    }

    /// How far this loader is: in the running epoch, or at the beginning of the next. The same on all ranks that have taken as
    /// many batches.
    pub fn state(&self) -> LoaderState {
        self.position.state()
    }

    /// Go on from a saved state, with any number of ranks: the next [`DataLoader::iter`] has what was left of that epoch.
    ///
    /// ```
    /// use fabric::data::DataLoader;
    ///
    /// let loader = || DataLoader::new((0..10).collect::<Vec<_>>()).batch_size(2).shuffle(true);
    /// let first = loader();
    /// let mut batches = first.iter();
    /// let mut seen = [batches.next().unwrap()?, batches.next().unwrap()?].concat();
    ///
    /// let second = loader();
    /// second.resume(first.state());
    /// for batch in &second {
    ///     seen.extend(batch?);
    /// }
    /// assert_eq!(seen, loader().iter().collect::<fabric::Result<Vec<_>>>()?.concat());
    /// # Ok::<(), fabric::Error>(())
    /// ```
    pub fn resume(&self, state: LoaderState) {
        self.position.resume(state);
    }

    /// How many samples of the latest batch this rank alone has, from the batch's first: what comes after them repeats samples
    /// of other ranks, so that all have as many.
    pub fn real_samples(&self) -> usize {
        self.position.real()
    }

    /// The dataset.
    pub fn dataset(&self) -> &D {
        &self.dataset
    }

    /// How many batches the next epoch has, on this rank; fewer than others have, where the loader resumes within it.
    pub fn len(&self) -> usize {
        self.epoch(self.position.peek()).count
    }

    /// Whether the next epoch has no batch.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn epoch(&self, start: LoaderState) -> Epoch {
        let seed = self.seed.or_else(seed::current).unwrap_or(0);
        let random = RandomSampler { seed };
        let sampler: &dyn Sampler = match (&self.sampler, self.shuffle) {
            (Some(sampler), _) => &**sampler,
            (None, true) => &random,
            (None, false) => &SequentialSampler,
        };
        let share = self.share.filter(|_| !sampler.is_distributed());
        let (samples, share) = (self.dataset.len(), share.unwrap_or(ALL));
        Epoch::new(sampler, samples, &self.batching, share, start)
    }
}

impl<D: Dataset, B> Distribute for DataLoader<D, B> {
    fn distribute(&mut self, rank: usize, world: usize) -> Result<()> {
        let share = Share::new(rank, world, self.share)?;
        self.share = Some(if self.is_shared { share } else { ALL });
        Ok(())
    }
}

impl<D: Dataset + 'static, B: Send + 'static> DataLoader<D, B> {
    /// Start an epoch. After an error there is no further batch; a dropped iterator stops and joins its workers.
    pub fn iter(&self) -> Batches<D, B> {
        let recipe = Recipe {
            dataset: self.dataset.clone(),
            epoch: self.epoch(self.position.start()),
            collate: self.collate.clone(),
        };
        Batches::new(recipe, self.workers, self.prefetch, self.position.clone())
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

    // R-07.
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
