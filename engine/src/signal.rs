//! The word that stops everybody: the first error on a group of ranks, kept, and seen by every thread that waits.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::error::{Error, Result};

/// A shared slot for the first error. Clones share the slot; whoever fails first decides what all later calls return.
#[derive(Clone, Debug, Default)]
pub struct Signal(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    raised: AtomicBool,
    first: Mutex<Option<Error>>,
    changed: Condvar,
}

impl Signal {
    /// Nothing has failed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keep `error` if it is the first, and return the first.
    pub fn raise(&self, error: Error) -> Error {
        let mut slot = self.0.first.lock().unwrap_or_else(|held| held.into_inner());
        let first = slot.get_or_insert(error).clone();
        self.0.raised.store(true, Ordering::Release);
        self.0.changed.notify_all();
        first
    }

    /// Add what is now known to the first error, if there is one.
    pub fn amend(&self, add: impl FnOnce(&mut Error)) {
        if self.is_raised()
            && let Some(error) = &mut *self.0.first.lock().unwrap_or_else(|held| held.into_inner())
        {
            add(error);
        }
    }

    /// One atomic load: has anything failed?
    #[inline]
    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::Acquire)
    }

    /// The first error, if any.
    pub fn first(&self) -> Option<Error> {
        if !self.is_raised() {
            return None;
        }
        self.0
            .first
            .lock()
            .unwrap_or_else(|held| held.into_inner())
            .clone()
    }

    /// `Err` with the first error once something has failed.
    pub fn check(&self) -> Result<()> {
        self.first().map_or(Ok(()), Err)
    }

    /// Wait up to `patience` for an error from another thread.
    pub fn wait(&self, patience: Duration) -> Option<Error> {
        let slot = self.0.first.lock().unwrap_or_else(|held| held.into_inner());
        let (slot, _) = self
            .0
            .changed
            .wait_timeout_while(slot, patience, |first| first.is_none())
            .unwrap_or_else(|held| held.into_inner());
        slot.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_survives() {
        let signal = Signal::new();
        assert!(signal.check().is_ok());
        signal.raise(Error::Aborted {
            rank: 0,
            reason: "the first".into(),
        });
        let kept = signal.raise(Error::Aborted {
            rank: 0,
            reason: "the second".into(),
        });
        assert!(kept.to_string().contains("the first"));
        assert!(
            signal
                .clone()
                .check()
                .unwrap_err()
                .to_string()
                .contains("the first")
        );
    }
}
