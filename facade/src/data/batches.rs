//! One epoch of a loader: batches in order, read by the caller's thread or by workers.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use super::{Dataset, epoch::Epoch, loader::Collate, position::Position, workers::Workers};
use crate::{Error, Result, launch::panic_text};

/// What one epoch consists of.
pub(super) struct Recipe<D: Dataset, B> {
    pub(super) dataset: Arc<D>,
    pub(super) epoch: Epoch,
    pub(super) collate: Collate<D::Item, B>,
}

impl<D: Dataset, B> Recipe<D, B> {
    /// Make batch `number`. A panic of the dataset or of `collate` becomes an error, so that it is the same for the
    /// caller whoever reads.
    pub(super) fn batch(&self, number: usize) -> Result<B> {
        let indices = self.epoch.batch(number);
        let sample = |&index: &usize| {
            calm(|| self.dataset.get(index)).map_err(|why| {
                Error::new(format!(
                    "sample {index} of the dataset (in batch {number}): {why}"
                ))
            })
        };
        let samples = indices.iter().map(sample).collect::<Result<Vec<_>>>()?;
        calm(|| (self.collate)(samples)).map_err(|why| {
            Error::new(format!(
                "batch {number} (samples {indices:?}) cannot be collated: {why}"
            ))
        })
    }
}

/// The batches of one epoch, in order. The first error is the last item.
pub struct Batches<D: Dataset, B> {
    recipe: Arc<Recipe<D, B>>,
    source: Source<B>,
    next: usize,
    position: Position,
}

enum Source<B> {
    Here,
    Workers(Workers<B>),
    Refused(Option<Error>),
    Ended,
}

impl<D: Dataset + 'static, B: Send + 'static> Batches<D, B> {
    pub(super) fn new(
        recipe: Recipe<D, B>,
        workers: usize,
        prefetch: usize,
        position: Position,
    ) -> Self {
        let recipe = Arc::new(recipe);
        let workers = workers.min(recipe.epoch.count);
        let source = if workers == 0 {
            Source::Here
        } else {
            let (count, recipe) = (recipe.epoch.count, recipe.clone());
            match Workers::start(workers, prefetch, count, move |n| recipe.batch(n)) {
                Ok(workers) => Source::Workers(workers),
                Err(error) => Source::Refused(Some(error)),
            }
        };
        Self {
            recipe,
            source,
            next: 0,
            position,
        }
    }
}

impl<D: Dataset, B> Iterator for Batches<D, B> {
    type Item = Result<B>;

    fn next(&mut self) -> Option<Result<B>> {
        let epoch = &self.recipe.epoch;
        if self.next == epoch.count {
            if !matches!(self.source, Source::Ended) {
                self.position.end();
            }
            self.source = Source::Ended;
            return None;
        }
        let batch = match &mut self.source {
            Source::Here => self.recipe.batch(self.next),
            Source::Workers(workers) => workers.next(),
            Source::Refused(error) => Err(error.take()?),
            Source::Ended => return None,
        };
        self.next += 1;
        match batch {
            Ok(_) => (self.position).advance(epoch.after(self.next), epoch.real(self.next - 1)),
            Err(_) => self.source = Source::Ended,
        }
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        match self.source {
            Source::Ended => (0, Some(0)),
            _ => (0, Some(self.recipe.epoch.count - self.next)), // fewer, after an error
        }
    }
}

/// Run `body`; its panic is an error with the panic's text.
pub(super) fn calm<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body))
        .unwrap_or_else(|panic| Err(Error::new(format!("panicked: {}", panic_text(&*panic)))))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::data::DataLoader;

    /// Counts its readers' calls; sample `bad` panics or is an error.
    struct Picky {
        count: usize,
        bad: Option<usize>,
        panics: bool,
        read: AtomicUsize,
    }

    impl Picky {
        fn new(count: usize, bad: Option<usize>, panics: bool) -> Arc<Self> {
            Arc::new(Self {
                count,
                bad,
                panics,
                read: AtomicUsize::new(0),
            })
        }
    }

    impl Dataset for Picky {
        type Item = usize;
        fn len(&self) -> usize {
            self.count
        }
        fn get(&self, index: usize) -> Result<usize> {
            self.read.fetch_add(1, Ordering::Relaxed);
            if Some(index) == self.bad {
                assert!(!self.panics, "cannot bear {index}");
                return Err(Error::new("the file is gone"));
            }
            Ok(index)
        }
    }

    #[test]
    fn a_bad_sample_is_one_error_that_names_it_and_then_the_end() {
        for workers in [0, 3] {
            for (panics, why) in [(false, "the file is gone"), (true, "cannot bear 13")] {
                let loader = DataLoader::new(Picky::new(40, Some(13), panics))
                    .batch_size(4)
                    .workers(workers);
                let mut batches = loader.iter();
                for _ in 0..3 {
                    batches.next().unwrap().unwrap();
                }
                let text = batches.next().unwrap().unwrap_err().to_string();
                assert!(text.contains("sample 13") && text.contains(why), "{text}");
                assert!(batches.next().is_none() && batches.next().is_none());
                assert_eq!(batches.size_hint(), (0, Some(0)));
            }
        }
    }

    #[test]
    fn a_failing_collate_names_its_samples() {
        let loader = DataLoader::new(vec![1u8, 2, 3])
            .batch_size(2)
            .workers(1)
            .collate(|_| -> Result<()> { Err(Error::new("ragged")) });
        let text = loader.iter().next().unwrap().unwrap_err().to_string();
        assert!(text.contains("[0, 1]") && text.contains("ragged"), "{text}");
    }

    #[test]
    fn workers_are_ahead_by_no_more_than_the_prefetch() {
        let data = Picky::new(1000, None, false);
        let loader = DataLoader::new(data.clone()).workers(2).prefetch(3);
        let mut batches = loader.iter();
        for taken in 1..=20 {
            batches.next().unwrap().unwrap();
            assert!(data.read.load(Ordering::Relaxed) <= taken + 2 * 3);
        }
    }

    #[test]
    fn a_dropped_iterator_joins_its_workers() {
        let data = Picky::new(1000, None, false);
        let loader = DataLoader::new(data.clone()).batch_size(5).workers(3);
        let mut batches = loader.iter();
        batches.next().unwrap().unwrap();
        drop(batches);
        let read = data.read.load(Ordering::Relaxed);
        assert!(read <= 5 * (1 + 3 * 2), "{read}");
        drop(loader);
        assert_eq!(Arc::strong_count(&data), 1); // no thread holds it any more
    }
}
