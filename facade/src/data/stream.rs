//! Streams: samples that have no number, such as lines of a pipe or records of files that are too many to count; and the loader
//! that shares one out among ranks and makes batches of it.

use std::sync::Arc;

use crossbeam_channel::bounded;

use super::{
    Distribute, LoaderState,
    batches::calm,
    epoch::{ALL, Share},
    loader::Collate,
    position::Position,
};
use crate::{Error, Result, seed};

/// Samples in an order of their own.
///
/// ```
/// use fabric::data::{Items, Part, Stream, StreamLoader};
///
/// struct Numbers(u64);
/// impl Stream for Numbers {
///     type Item = u64;
///     fn open(&self, _part: Part) -> fabric::Result<Items<u64>> {
///         Ok(Box::new((0..self.0).map(Ok)))
///     }
/// }
///
/// let loader = StreamLoader::new(Numbers(5)).batch_size(2);
/// let batches: Vec<_> = loader.iter().collect::<fabric::Result<_>>()?;
/// assert_eq!(batches, [vec![0, 1], vec![2, 3], vec![4]]);
/// # Ok::<(), fabric::Error>(())
/// ```
pub trait Stream: Send + Sync {
    /// One sample.
    type Item: Send;

    /// Begin an epoch.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open(&self, part: Part) -> Result<Items<Self::Item>>;

    /// Whether [`Stream::open`] gives `part.rank`'s samples alone. Otherwise it gives all samples, in the same order on all
    /// ranks, and the loader deals them out one by one.
    fn is_sharded(&self) -> bool {
        false
    }

    /// How many samples there are, if that is known.
    fn len(&self) -> Option<usize> {
        None
    }

    /// Whether it is known that there are none.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }
}

/// What a stream gives.
pub type Items<T> = Box<dyn Iterator<Item = Result<T>> + Send>;

/// Who reads a stream, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The epoch.
    pub epoch: u64,
    /// The rank that reads.
    pub rank: usize,
    /// How many ranks read.
    pub world: usize,
    /// A seed of this rank's and epoch's own, for random augmentation.
    pub seed: u64,
}

/// Loads a stream batch by batch. Unlike Lightning's, ranks do not all see all samples: sample i goes to rank i % world, and
/// the last samples that do not make a turn for all ranks are left out, so that all ranks have as many batches; a stream that
/// is sharded itself gives each rank what it has, and [`crate::Fabric::join_uneven`] helps where that differs.
pub struct StreamLoader<S: Stream, B = Vec<<S as Stream>::Item>> {
    stream: Arc<S>,
    batch_size: usize,
    drop_last: bool,
    prefetch: usize,
    seed: Option<u64>,
    share: Option<Share>,
    is_shared: bool,
    position: Position,
    collate: Collate<S::Item, B>,
}

impl<S: Stream + 'static> StreamLoader<S> {
    /// One sample a batch, read ahead by a thread of its own.
    pub fn new(stream: S) -> Self {
        Self {
            stream: Arc::new(stream),
            batch_size: 1,
            drop_last: false,
            prefetch: 2,
            seed: None,
            share: None,
            is_shared: true,
            position: Position::default(),
            collate: Arc::new(Ok),
        }
    }
}

impl<S: Stream, B> StreamLoader<S, B> {
    /// Samples in a batch.
    ///
    /// # Panics
    /// When 0.
    pub fn batch_size(self, batch_size: usize) -> Self {
        assert!(batch_size > 0, "a batch of 0 samples. Ask for at least one");
        Self { batch_size, ..self }
    }

    /// Leave out the last batch when it is not full.
    pub fn drop_last(self, drop_last: bool) -> Self {
        Self { drop_last, ..self }
    }

    /// Batches that a thread reads ahead, 2 unless told; with 0 the caller's own thread reads.
    pub fn prefetch(self, prefetch: usize) -> Self {
        Self { prefetch, ..self }
    }

    /// The seed from which [`Part::seed`] follows; without it the run's.
    pub fn seed(self, seed: u64) -> Self {
        let seed = Some(seed);
        Self { seed, ..self }
    }

    /// Whether `fabric.setup_dataloaders` shares the samples out among the ranks, as it does unless told.
    pub fn use_distributed_sampler(self, is_shared: bool) -> Self {
        Self { is_shared, ..self }
    }

    /// How samples become a batch.
    pub fn collate<C>(
        self,
        collate: impl Fn(Vec<S::Item>) -> Result<C> + Send + Sync + 'static,
    ) -> StreamLoader<S, C> {
        StreamLoader {
            stream: self.stream,
            batch_size: self.batch_size,
            drop_last: self.drop_last,
            prefetch: self.prefetch,
            seed: self.seed,
            share: self.share,
            is_shared: self.is_shared,
            position: self.position,
            collate: Arc::new(collate),
        }
    }

    /// Use `epoch` for every [`StreamLoader::iter`] from now on, until set again.
    pub fn set_epoch(&self, epoch: u64) {
        self.position.set_epoch(epoch);
    }

    /// How far this loader is. For a stream that is sharded itself this is only right for as many ranks.
    pub fn state(&self) -> LoaderState {
        self.position.state()
    }

    /// Go on from a saved state: the next [`StreamLoader::iter`] reads past what was consumed of that epoch.
    pub fn resume(&self, state: LoaderState) {
        self.position.resume(state);
    }

    /// How many batches an epoch has on this rank, if the stream knows how many samples there are and leaves sharing to us.
    pub fn len(&self) -> Option<usize> {
        let share = self.share.unwrap_or(ALL);
        let known = self.stream.len().filter(|_| !self.stream.is_sharded())?;
        let mine = known / share.world;
        Some(match self.drop_last {
            true => mine / self.batch_size,
            false => mine.div_ceil(self.batch_size),
        })
    }

    /// Whether it is known that an epoch has no batch.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }
}

impl<S: Stream, B> Distribute for StreamLoader<S, B> {
    fn distribute(&mut self, rank: usize, world: usize) -> Result<()> {
        let share = Share::new(rank, world, self.share)?;
        self.share = Some(if self.is_shared { share } else { ALL });
        Ok(())
    }
}

impl<S: Stream + 'static, B: Send + 'static> StreamLoader<S, B> {
    /// Start an epoch. After an error there is no further batch; when the iterator is dropped, the thread that reads ahead ends
    /// after the batch in its hands.
    pub fn iter(&self) -> Streaming<B> {
        let (start, share) = (self.position.start(), self.share.unwrap_or(ALL));
        let seed = self.seed.or_else(seed::current).unwrap_or(0);
        let part = Part {
            epoch: start.epoch,
            rank: share.rank,
            world: share.world,
            seed: seed::derive(seed, &[start.epoch, share.rank as u64]),
        };
        let reader = Reader {
            stream: self.stream.clone(),
            part,
            skip: start.consumed,
            batch_size: self.batch_size,
            drop_last: self.drop_last,
            collate: self.collate.clone(),
        };
        Streaming {
            batches: Some(reader.start(self.prefetch)),
            position: self.position.clone(),
            now: start,
            world: share.world,
        }
    }
}

impl<S: Stream + 'static, B: Send + 'static> IntoIterator for &StreamLoader<S, B> {
    type Item = Result<B>;
    type IntoIter = Streaming<B>;

    fn into_iter(self) -> Streaming<B> {
        self.iter()
    }
}

/// A batch, and of how many samples it is made.
type Counted<B> = Result<(B, usize)>;

/// The batches of one epoch of a stream. The first error is the last item.
pub struct Streaming<B> {
    batches: Option<Box<dyn Iterator<Item = Counted<B>> + Send>>,
    position: Position,
    now: LoaderState,
    world: usize,
}

impl<B> Iterator for Streaming<B> {
    type Item = Result<B>;

    fn next(&mut self) -> Option<Result<B>> {
        match self.batches.as_mut()?.next() {
            None => {
                self.batches = None;
                self.position.end();
                None
            }
            Some(Ok((batch, samples))) => {
                self.now.consumed += samples * self.world;
                self.position.advance(self.now, samples);
                Some(Ok(batch))
            }
            Some(Err(error)) => {
                self.batches = None;
                Some(Err(error))
            }
        }
    }
}

/// Reads an epoch and makes its batches.
struct Reader<S: Stream, B> {
    stream: Arc<S>,
    part: Part,
    skip: usize, // of the common order
    batch_size: usize,
    drop_last: bool,
    collate: Collate<S::Item, B>,
}

impl<S: Stream + 'static, B: Send + 'static> Reader<S, B> {
    /// Read in a thread that is `prefetch` batches ahead, or here.
    fn start(self, prefetch: usize) -> Box<dyn Iterator<Item = Counted<B>> + Send> {
        if prefetch == 0 {
            return self.batches();
        }
        let (ready, batches) = bounded(prefetch);
        let thread = std::thread::Builder::new().name("stream".into());
        let body = move || {
            for batch in self.batches() {
                if ready.send(batch).is_err() {
                    return; // nobody listens any more
                }
            }
        };
        match thread.spawn(body) {
            Ok(_) => Box::new(batches.into_iter()),
            Err(why) => Box::new(std::iter::once(Err(Error::argument(
                format!("the stream cannot have a thread that reads ahead: {why}"),
                "Use prefetch(0)",
            )))),
        }
    }

    fn batches(self) -> Box<dyn Iterator<Item = Counted<B>> + Send> {
        let mut items = match calm(|| self.mine()) {
            Ok(items) => items,
            Err(error) => return Box::new(std::iter::once(Err(error))),
        };
        let (mut number, mut ended) = (0, false);
        Box::new(std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let batch = self.batch(&mut items, number).transpose();
            number += 1;
            ended = !matches!(batch, Some(Ok(_)));
            batch
        }))
    }

    fn batch(&self, items: &mut Items<S::Item>, number: usize) -> Result<Option<(B, usize)>> {
        let named = |what: &str, why: Error| Error::new(format!("{what} {number}: {why}"));
        let samples: Result<Vec<_>> = calm(|| items.take(self.batch_size).collect());
        let samples = samples.map_err(|why| named("a sample of the stream's batch", why))?;
        let count = samples.len();
        if count == 0 || self.drop_last && count < self.batch_size {
            return Ok(None);
        }
        let batch = calm(|| (self.collate)(samples));
        let batch = batch.map_err(|why| named("the stream's batch cannot be collated:", why))?;
        Ok(Some((batch, count)))
    }

    /// This rank's samples of the epoch.
    fn mine(&self) -> Result<Items<S::Item>> {
        let Part { rank, world, .. } = self.part;
        let items = self.stream.open(self.part)?;
        if self.stream.is_sharded() {
            return Ok(Box::new(items.skip(self.skip / world)));
        }
        let mut items = items.skip(self.skip);
        Ok(Box::new(std::iter::from_fn(move || {
            let mut own = None;
            for turn in 0..world {
                match items.next()? {
                    Err(error) => return Some(Err(error)),
                    Ok(item) if turn == rank => own = Some(item),
                    Ok(_) => {}
                }
            }
            own.map(Ok)
        })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Numbers {
        count: usize,
        bad: Option<usize>,
        sharded: bool,
    }

    impl Stream for Numbers {
        type Item = usize;
        fn open(&self, part: Part) -> Result<Items<usize>> {
            let (bad, base) = (self.bad, 1000 * part.epoch as usize);
            let item = move |number| match Some(number) == bad {
                true => Err(Error::new("the pipe broke")),
                false => Ok(base + number),
            };
            let (first, step) = if self.sharded {
                (part.rank, part.world)
            } else {
                (0, 1)
            };
            Ok(Box::new((first..self.count).step_by(step).map(item)))
        }
        fn is_sharded(&self) -> bool {
            self.sharded
        }
        fn len(&self) -> Option<usize> {
            Some(self.count)
        }
    }

    fn loader(count: usize, rank: usize, world: usize, prefetch: usize) -> StreamLoader<Numbers> {
        let numbers = Numbers {
            count,
            bad: None,
            sharded: false,
        };
        let mut loader = StreamLoader::new(numbers).batch_size(2).prefetch(prefetch);
        loader.distribute(rank, world).unwrap();
        loader
    }

    fn epoch(loader: &StreamLoader<Numbers>) -> Vec<Vec<usize>> {
        loader.iter().map(Result::unwrap).collect()
    }

    // R-08, GAP-07, WRAP-26: what Lightning leaves to the user.
    #[test]
    fn samples_are_dealt_out_in_whole_turns() {
        for prefetch in [0, 3] {
            let (zero, one) = (loader(11, 0, 2, prefetch), loader(11, 1, 2, prefetch));
            assert_eq!(epoch(&zero), [vec![0, 2], vec![4, 6], vec![8]]);
            assert_eq!(epoch(&one), [vec![1, 3], vec![5, 7], vec![9]]);
            assert_eq!((zero.len(), one.len()), (Some(3), Some(3)));
            assert_eq!(epoch(&zero)[0], [1000, 1002]); // the next epoch
        }
        let all = StreamLoader::new(Numbers {
            count: 3,
            bad: None,
            sharded: false,
        });
        let mut all = all.use_distributed_sampler(false);
        all.distribute(1, 2).unwrap();
        assert_eq!(epoch(&all).concat(), [0, 1, 2]);
        assert!(all.distribute(1, 2).is_err());
    }

    #[test]
    fn a_stream_goes_on_where_it_was_with_another_number_of_ranks() {
        for prefetch in [0, 2] {
            let two = loader(20, 1, 2, prefetch);
            let mut batches = two.iter();
            batches.next().unwrap().unwrap();
            batches.next().unwrap().unwrap();
            let state = two.state();
            assert_eq!((state.epoch, state.consumed), (0, 8));
            let one = loader(20, 0, 1, prefetch);
            one.resume(state);
            assert_eq!(epoch(&one).concat(), (8..20).collect::<Vec<_>>());
            assert_eq!(one.state().epoch, 1);
            assert_eq!(epoch(&one)[0], [1000, 1001]);
        }
    }

    #[test]
    fn a_broken_stream_is_one_error_and_then_the_end() {
        for prefetch in [0, 2] {
            let numbers = Numbers {
                count: 9,
                bad: Some(5),
                sharded: false,
            };
            let loader = StreamLoader::new(numbers).batch_size(2).prefetch(prefetch);
            let mut batches = loader.iter();
            assert_eq!(batches.next().unwrap().unwrap(), [0, 1]);
            assert_eq!(batches.next().unwrap().unwrap(), [2, 3]);
            let text = batches.next().unwrap().unwrap_err().to_string();
            assert!(text.contains("batch 2: the pipe broke"), "{text}");
            assert!(batches.next().is_none() && batches.next().is_none());
            assert_eq!(loader.state().consumed, 4);
        }
    }

    #[test]
    fn a_stream_that_is_sharded_keeps_its_shares() {
        let numbers = || Numbers {
            count: 7,
            bad: None,
            sharded: true,
        };
        let mut loader = StreamLoader::new(numbers()).batch_size(3).drop_last(true);
        loader.distribute(1, 2).unwrap();
        assert_eq!(epoch(&loader), [vec![1, 3, 5]]);
        let mut loader = StreamLoader::new(numbers()).batch_size(3).drop_last(true);
        loader.distribute(0, 2).unwrap();
        assert_eq!((epoch(&loader), loader.len()), (vec![vec![0, 2, 4]], None));
    }

    #[test]
    fn a_panic_of_the_stream_is_an_error() {
        struct Panics;
        impl Stream for Panics {
            type Item = u8;
            fn open(&self, _: Part) -> Result<Items<u8>> {
                panic!("no such pipe")
            }
        }
        for prefetch in [0, 1] {
            let loader = StreamLoader::new(Panics).prefetch(prefetch);
            let text = loader.iter().next().unwrap().unwrap_err().to_string();
            assert!(text.contains("no such pipe"), "{text}");
        }
    }
}
