//! Jobs on their way to a communicator's thread: a bounded queue with one giver and one taker. All its memory is there from
//! the start; a channel would make some when a thread first waits, whenever that is.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

const YIELDS: u32 = 4; // before the taker sleeps: the next job may be on its way

/// The end that jobs are given to. When it is dropped, the taker gets what is left, and then nothing.
pub(super) struct Giver<J>(Arc<Queue<J>>);

/// The end that jobs are taken from. When it is dropped, so are all jobs, those that are still given too.
pub(super) struct Taker<J>(Arc<Queue<J>>);

struct Queue<J> {
    line: Mutex<Line<J>>,
    changed: Condvar, // one end at most waits: there is something to take, or room to give
}

struct Line<J> {
    jobs: VecDeque<J>,
    most: usize,
    closed: bool, // one end is gone
    asleep: bool,
}

/// A queue in which at most `most` jobs wait.
pub(super) fn queue<J>(most: usize) -> (Giver<J>, Taker<J>) {
    let line = Line {
        jobs: VecDeque::with_capacity(most),
        most,
        closed: false,
        asleep: false,
    };
    let queue = Arc::new(Queue {
        line: Mutex::new(line),
        changed: Condvar::new(),
    });
    (Giver(queue.clone()), Taker(queue))
}

impl<J> Giver<J> {
    /// Put a job behind the others; waits while there is no room. Gives it back when nobody will take it.
    pub(super) fn give(&self, job: J) -> Result<(), J> {
        let mut line = self.0.until(|line| line.jobs.len() < line.most);
        if line.closed {
            return Err(job);
        }
        line.jobs.push_back(job);
        self.0.wake(&mut line);
        Ok(())
    }
}

impl<J> Taker<J> {
    /// The next job; waits for it. `None` when there will be no more.
    pub(super) fn take(&self) -> Option<J> {
        for _ in 0..YIELDS {
            if !self.0.lock().jobs.is_empty() {
                break;
            }
            std::thread::yield_now();
        }
        let mut line = self.0.until(|line| !line.jobs.is_empty());
        let job = line.jobs.pop_front();
        if line.jobs.is_empty() {
            line.jobs.clear(); // the next goes to the front again, whose memory is near
        }
        self.0.wake(&mut line);
        job
    }
}

impl<J> Queue<J> {
    fn lock(&self) -> MutexGuard<'_, Line<J>> {
        // Nothing in here panics halfway through a change.
        self.line.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// The line, once `ready` holds or an end is gone.
    fn until(&self, ready: impl Fn(&Line<J>) -> bool) -> MutexGuard<'_, Line<J>> {
        let mut line = self.lock();
        while !ready(&line) && !line.closed {
            line.asleep = true;
            line = (self.changed.wait(line)).unwrap_or_else(|held| held.into_inner());
        }
        line
    }

    fn wake(&self, line: &mut Line<J>) {
        if std::mem::take(&mut line.asleep) {
            self.changed.notify_all();
        }
    }

    fn close(&self) -> MutexGuard<'_, Line<J>> {
        let mut line = self.lock();
        line.closed = true;
        self.wake(&mut line);
        line
    }
}

impl<J> Drop for Giver<J> {
    fn drop(&mut self) {
        drop(self.0.close());
    }
}

impl<J> Drop for Taker<J> {
    fn drop(&mut self) {
        let left = std::mem::take(&mut self.0.close().jobs);
        drop(left); // without the lock
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn jobs_come_in_order_through_a_queue_that_is_often_full_and_often_empty() {
        let (giver, taker) = queue(3);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for job in 0..10_000 {
                    giver.give(job).unwrap();
                    if job % 1000 == 0 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            for job in 0..10_000 {
                assert_eq!(taker.take(), Some(job));
                if job % 1500 == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            assert_eq!(taker.take(), None);
        });
    }

    #[test]
    fn what_was_given_before_the_end_is_still_taken() {
        let (giver, taker) = queue(2);
        giver.give(1).unwrap();
        drop(giver);
        assert_eq!((taker.take(), taker.take()), (Some(1), None));
    }

    #[test]
    fn without_a_taker_jobs_are_dropped_and_given_back() {
        let (giver, taker) = queue(1);
        let job = Arc::new(());
        giver.give(job.clone()).unwrap();
        std::thread::scope(|scope| {
            let blocked = scope.spawn(|| giver.give(job.clone()));
            std::thread::sleep(Duration::from_millis(20)); // by then it waits for room
            drop(taker);
            assert!(blocked.join().unwrap().is_err());
        });
        assert_eq!(Arc::strong_count(&job), 1);
    }
}
