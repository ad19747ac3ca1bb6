//! The memory of a parameter that comes and goes.

use std::sync::{Mutex, PoisonError};

use fabric_engine::kernels::Element;

use super::Init;

/// What a parameter has at present.
pub(super) enum Slot<T> {
    /// Its values.
    Here(Vec<T>),
    /// Nothing yet.
    Deferred(Init<T>),
    /// Nothing: its values are kept elsewhere.
    Away,
}

/// Vectors that were released, to be taken again: units of one shape, and their gradients, take turns with one another's
/// memory, so that a steady state allocates nothing, and there are never more than were in use at once.
pub(super) struct Spare<T>(Mutex<Vec<Vec<T>>>);

impl<T> Default for Spare<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Element> Spare<T> {
    pub(super) fn give(&self, values: Vec<T>) {
        self.lock().push(values);
    }

    /// A vector of `numel` elements; what is in it is undefined.
    pub(super) fn take(&self, numel: usize) -> Vec<T> {
        let mut spare = self.lock();
        match spare.iter().position(|values| values.len() == numel) {
            Some(index) => spare.swap_remove(index),
            None => vec![T::zeroed(); numel],
        }
    }

    /// A vector of `numel` zeros.
    pub(super) fn zeros(&self, numel: usize) -> Vec<T> {
        let mut values = self.take(numel);
        values.fill(T::zeroed());
        values
    }

    /// These values, in a vector that was released, if there is one as long: otherwise first values that come and go one
    /// after the other would each leave a vector behind.
    pub(super) fn reuse(&self, values: Vec<T>) -> Vec<T> {
        let mut spare = self.lock();
        let found = spare.iter().position(|spare| spare.len() == values.len());
        let Some(index) = found else {
            return values;
        };
        let mut reused = spare.swap_remove(index);
        reused.copy_from_slice(&values);
        reused
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
