//! Something that several threads use in turns, and that may call back into its user while it is used: it is taken out,
//! not locked, so that whoever comes back to it on the same thread is told so instead of waiting for itself.

use std::{
    ops::{Deref, DerefMut},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
};

/// A value that one thread at a time takes.
pub(crate) struct Turn<T> {
    place: Mutex<Place<T>>,
    back: Condvar,
}

enum Place<T> {
    Here(T),
    With(ThreadId),
}

impl<T> Turn<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            place: Mutex::new(Place::Here(value)),
            back: Condvar::new(),
        }
    }

    /// Take the value, when other threads have put it back; `None` when this thread has it already.
    pub(crate) fn take(&self) -> Option<Taken<'_, T>> {
        let me = thread::current().id();
        let mut place = self.lock();
        loop {
            match &*place {
                Place::With(thread) if *thread == me => return None,
                Place::With(_) => {
                    let waited = self.back.wait(place);
                    place = waited.unwrap_or_else(PoisonError::into_inner);
                }
                Place::Here(_) => break,
            }
        }
        match std::mem::replace(&mut *place, Place::With(me)) {
            Place::Here(value) => Some(Taken {
                turn: self,
                value: Some(value),
            }),
            Place::With(_) => unreachable!("it was here"),
        }
    }

    /// The value, if nobody has it.
    pub(crate) fn try_take(&self) -> Option<Taken<'_, T>> {
        let me = thread::current().id();
        let mut place = self.lock();
        match std::mem::replace(&mut *place, Place::With(me)) {
            Place::Here(value) => Some(Taken {
                turn: self,
                value: Some(value),
            }),
            taken => {
                *place = taken;
                None
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Place<T>> {
        // Nothing that can panic runs while this is held.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The value; dropped, also by a panic, it is put back.
pub(crate) struct Taken<'a, T> {
    turn: &'a Turn<T>,
    value: Option<T>, // until dropped
}

impl<T> Deref for Taken<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.value.as_ref().expect("here until dropped")
    }
}

impl<T> DerefMut for Taken<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("here until dropped")
    }
}

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            *self.turn.lock() = Place::Here(value);
            self.turn.back.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_it_is_told_so_and_others_wait() {
        let turn = Turn::new(0u32);
        let mut taken = turn.take().unwrap();
        assert!(turn.take().is_none(), "this thread has it");
        assert!(turn.try_take().is_none());
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                let mut taken = turn.take().unwrap();
                *taken *= 10;
                *taken
            });
            *taken += 1;
            drop(taken);
            assert_eq!(other.join().unwrap(), 10);
        });
        assert_eq!(*turn.take().unwrap(), 10);
    }

    #[test]
    fn a_panic_puts_it_back() {
        let turn = Turn::new(7);
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _taken = turn.take();
            panic!("no luck");
        }));
        assert!(panic.is_err());
        assert_eq!(turn.take().as_deref(), Some(&7));
        assert_eq!(turn.try_take().as_deref(), Some(&7));
    }
}
