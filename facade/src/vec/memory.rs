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
/// memory, so that a steady state allocates nothing, and there are never more than were taken at once. Those that a model
/// was made with were not: they are freed.
pub(super) struct Spare<T>(Mutex<Shelf<T>>);

struct Shelf<T> {
    vectors: Vec<Vec<T>>,
    taken: usize,
}

impl<T> Default for Spare<T> {
    fn default() -> Self {
        Self(Mutex::new(Shelf {
            vectors: Vec::new(),
            taken: 0,
        }))
    }
}

impl<T: Element> Spare<T> {
    pub(super) fn give(&self, values: Vec<T>) {
        let mut shelf = self.lock();
        if shelf.taken > 0 {
            shelf.taken -= 1;
            shelf.vectors.push(values);
        }
    }

    /// A vector of `numel` elements; what is in it is undefined.
    pub(super) fn take(&self, numel: usize) -> Vec<T> {
        let mut shelf = self.lock();
        shelf.taken += 1;
        match shelf.find(numel) {
            Some(values) => values,
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
        let mut shelf = self.lock();
        shelf.taken += 1;
        let Some(mut reused) = shelf.find(values.len()) else {
            return values;
        };
        reused.copy_from_slice(&values);
        reused
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shelf<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Shelf<T> {
    fn find(&mut self, numel: usize) -> Option<Vec<T>> {
        let index = self
            .vectors
            .iter()
            .position(|values| values.len() == numel)?;
        Some(self.vectors.swap_remove(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_taken_is_kept_for_later() {
        let spare = Spare::default();
        spare.give(vec![1f32; 3]); // of a model that was made with all its values
        let fresh = spare.take(3);
        assert_eq!(fresh, [0.0; 3]);
        let place = fresh.as_ptr();
        spare.give(fresh);
        let again = spare.take(3);
        assert_eq!(again.as_ptr(), place);
    }
}
