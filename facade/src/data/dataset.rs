//! A dataset: samples by number.

use std::sync::Arc;

use crate::{Error, Result};

/// Samples that are found by their number. Reading must depend on nothing but the number, so that the order of a run
/// is the same whatever the number of workers; for random augmentation, derive a generator from the sample's number
/// and the epoch with [`crate::seed::derive()`].
///
/// ```
/// use fabric::data::Dataset;
///
/// struct Squares(usize);
/// impl Dataset for Squares {
///     type Item = usize;
///     fn len(&self) -> usize {
///         self.0
///     }
///     fn get(&self, index: usize) -> fabric::Result<usize> {
///         Ok(index * index)
///     }
/// }
/// assert_eq!(Squares(4).get(3)?, 9);
/// # Ok::<(), fabric::Error>(())
/// ```
pub trait Dataset: Send + Sync {
    /// One sample.
    type Item: Send;

    /// How many samples there are.
    fn len(&self) -> usize;

    /// Whether there is no sample.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sample `index`, from 0 to `len() - 1`. Several workers call this at once.
    ///
    /// # Errors
    /// When the sample cannot be read; the loader adds its number.
    fn get(&self, index: usize) -> Result<Self::Item>;
}

impl<T: Clone + Send + Sync> Dataset for Vec<T> {
    type Item = T;

    fn len(&self) -> usize {
        Vec::len(self)
    }

    fn get(&self, index: usize) -> Result<T> {
        let sample = self.as_slice().get(index).cloned();
        sample.ok_or_else(|| {
            Error::argument(
                format!("sample {index} of {}", Vec::len(self)),
                "Samples are numbered from 0",
            )
        })
    }
}

impl<D: Dataset + ?Sized> Dataset for Arc<D> {
    type Item = D::Item;

    fn len(&self) -> usize {
        (**self).len()
    }

    fn get(&self, index: usize) -> Result<D::Item> {
        (**self).get(index)
    }
}

/// Some samples of a dataset, for splits and folds.
///
/// ```
/// use fabric::data::{Dataset, Subset};
///
/// let even = Subset::new(vec!['a', 'b', 'c', 'd'], vec![2, 0])?;
/// assert_eq!((even.len(), even.get(0)?), (2, 'c'));
///
/// // Five folds of 11 samples: every sample is in one of the parts that are left out.
/// let folds = Subset::folds(11, 5);
/// assert_eq!(folds[0], ((3..11).collect(), (0..3).collect()));
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Subset<D> {
    dataset: D,
    samples: Vec<usize>,
}

impl<D: Dataset> Subset<D> {
    /// `samples` of `dataset`, in this order.
    ///
    /// # Errors
    /// When one of them is not there.
    pub fn new(dataset: D, samples: Vec<usize>) -> Result<Self> {
        let count = dataset.len();
        match samples.iter().find(|sample| **sample >= count) {
            None => Ok(Self { dataset, samples }),
            Some(sample) => Err(Error::argument(
                format!("sample {sample} of {count}"),
                "Samples are numbered from 0",
            )),
        }
    }
}

impl Subset<()> {
    /// `count` samples in `folds` parts, one behind the other and as equal as can be: for each the samples to train on, and those
    /// that are left out.
    ///
    /// # Panics
    /// When `folds` is 0.
    pub fn folds(count: usize, folds: usize) -> Vec<(Vec<usize>, Vec<usize>)> {
        assert!(folds > 0, "0 folds. Ask for at least one");
        let border = |fold: usize| fold * (count / folds) + fold.min(count % folds);
        let fold = |fold| {
            let out = border(fold)..border(fold + 1);
            let train = (0..count).filter(|sample| !out.contains(sample));
            (train.collect(), out.clone().collect())
        };
        (0..folds).map(fold).collect()
    }
}

impl<D: Dataset> Dataset for Subset<D> {
    type Item = D::Item;

    fn len(&self) -> usize {
        self.samples.len()
    }

    fn get(&self, index: usize) -> Result<D::Item> {
        let sample = self.samples.as_slice().get(index).ok_or_else(|| {
            Error::argument(
                format!("sample {index} of a subset of {}", self.samples.len()),
                "Samples are numbered from 0",
            )
        })?;
        self.dataset.get(*sample)
    }
}
