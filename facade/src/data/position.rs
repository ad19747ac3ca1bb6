//! Where a loader is: which epoch comes next, and how far the running one is. The loader and its running iteration share it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::epoch::LoaderState;

/// A loader's place, shared with its iterations.
#[derive(Clone, Default)]
pub(super) struct Position(Arc<Mutex<Place>>);

#[derive(Default)]
struct Place {
    set: Option<u64>,             // by set_epoch
    next: u64,                    // counted
    resume: Option<LoaderState>,  // where the next iteration begins
    running: Option<LoaderState>, // how far the latest iteration is
    real: usize,                  // of the latest batch
}

impl Position {
    fn lock(&self) -> MutexGuard<'_, Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begin every iteration at this epoch, until set again.
    pub(super) fn set_epoch(&self, epoch: u64) {
        let mut place = self.lock();
        place.set = Some(epoch);
        place.running = None;
        // The loop counts epochs itself: it resumes within this one, or not at all.
        place.resume = place.resume.filter(|resume| resume.epoch == epoch);
    }

    /// Begin the next iteration there, and count on from its epoch.
    pub(super) fn resume(&self, state: LoaderState) {
        let mut place = self.lock();
        place.resume = Some(state);
        place.running = None;
        place.next = state.epoch;
    }

    /// An iteration begins: where.
    pub(super) fn start(&self) -> LoaderState {
        let mut place = self.lock();
        let epoch = place.set.unwrap_or(place.next);
        let start = LoaderState { epoch, consumed: 0 };
        let start = place.resume.take().unwrap_or(start);
        place.next = start.epoch + 1;
        place.running = Some(start);
        place.real = 0;
        start
    }

    /// Where the next iteration would begin.
    pub(super) fn peek(&self) -> LoaderState {
        let place = self.lock();
        let epoch = place.set.unwrap_or(place.next);
        place.resume.unwrap_or(LoaderState { epoch, consumed: 0 })
    }

    /// A batch was handed out.
    pub(super) fn advance(&self, now: LoaderState, real: usize) {
        let mut place = self.lock();
        place.running = Some(now);
        place.real = real;
    }

    /// The iteration has come to its end.
    pub(super) fn end(&self) {
        let mut place = self.lock();
        let next = place.running.map(|running| LoaderState {
            epoch: running.epoch + 1,
            consumed: 0,
        });
        place.running = next;
    }

    /// How far the running iteration is, or where the next one begins.
    pub(super) fn state(&self) -> LoaderState {
        let running = self.lock().running;
        running.unwrap_or_else(|| self.peek())
    }

    pub(super) fn real(&self) -> usize {
        self.lock().real
    }
}
