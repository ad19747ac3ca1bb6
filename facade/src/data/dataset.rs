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
