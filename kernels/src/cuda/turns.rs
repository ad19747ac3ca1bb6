//! Whose turn it is to give the driver what was put off, on all queues of a device.
//!
//! [Note: turns] A thread that takes what waits on a queue has not launched it yet. Another one that finds nothing waiting
//! would go on as if it had, and overtake it. So both take a turn: one thread at a time takes and launches, and a turn may
//! be taken again by the thread that has it, because queues launch for one another. Only threads of one rank wait for each
//! other here: a device, whose turns these are, is one rank's.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// The turns of one device.
#[derive(Default)]
pub(super) struct Turns {
    holder: Mutex<Option<(ThreadId, usize)>>, // and how often it has taken it
    free: Condvar,
}

/// A turn, until it is dropped.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Wait for the turn of this thread.
    pub(super) fn take(&self) -> Turn<'_> {
        let own = thread::current().id();
        let is_others =
            |holder: &mut Option<(ThreadId, usize)>| holder.is_some_and(|(who, _)| who != own);
        let holder = self.free.wait_while(self.lock(), is_others);
        let mut holder = holder.unwrap_or_else(PoisonError::into_inner);
        let times = holder.map_or(0, |(_, times)| times);
        *holder = Some((own, times + 1));
        Turn(self)
    }

    fn lock(&self) -> MutexGuard<'_, Option<(ThreadId, usize)>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut holder = self.0.lock();
        *holder = holder.and_then(|(who, times)| (times > 1).then_some((who, times - 1)));
        if holder.is_none() {
            self.0.free.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_thread_at_a_time_has_the_turn_and_may_take_it_again() {
        let (turns, inside) = (Turns::default(), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let _turn = turns.take();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        drop(turns.take());
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(turns.lock().is_none());
    }
}
