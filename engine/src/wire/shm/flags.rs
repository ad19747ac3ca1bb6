//! How ranks meet in shared memory: a rank publishes that it has come to a step, together with a note; the others wait
//! for it, at first awake, then asleep in the kernel. This is the whole protocol, over atomics and nothing else.
//!
//! [Note: two lines] Step k is published in line k mod 2, the note first, then the step's number with release order. A
//! reader that sees the number sees the note. Nobody overwrites a line that is still read: a rank publishes step k + 2
//! only after it has seen step k + 1 of everybody, and a rank publishes step k + 1 only after it has read the notes of
//! step k. So a rank is never more than one step ahead of another, a line holds either k - 2 or k, and the number may
//! wrap around.
//!
//! [Note: no lost wake-up] A waiter counts itself as asleep, then looks at the step once more (the kernel does, under
//! its lock), then sleeps. A publisher stores the step, then looks at the count. Between each pair stands a fence of
//! sequential consistency, so at least one of the two sees the other: the waiter sees the step, or the publisher wakes
//! it. The count is only a hint: a waiter that dies leaves it too high, which costs needless wake-ups.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
    time::Duration,
};

use rustix::thread::futex;

/// Words of a note.
pub(super) const WORDS: usize = 9;

/// One rank's control block. All of it is zero at first.
#[repr(C)]
pub(super) struct Control {
    lines: [Line; 2],
    bell: Bell,
}

/// Two cache lines, because the prefetcher fetches pairs. Written by the owner alone.
#[repr(C, align(128))]
struct Line {
    step: AtomicU32, // the futex, too
    words: [AtomicU64; WORDS],
}

/// Apart from the lines, because waiters write it.
#[repr(C, align(128))]
struct Bell {
    asleep: AtomicU32, // waiters that sleep, or are about to
    failed: AtomicU32, // not zero: the owner will not come
}

impl Control {
    /// The owner has come to `step`; steps count from 1.
    pub(super) fn publish(&self, step: u32, words: &[u64; WORDS]) {
        let line = self.line(step);
        for (slot, word) in line.words.iter().zip(words) {
            slot.store(*word, Ordering::Relaxed);
        }
        line.step.store(step, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.bell.asleep.load(Ordering::Relaxed) != 0 {
            wake(&line.step);
        }
    }

    /// The owner's note, once it has come to `step`.
    pub(super) fn arrived(&self, step: u32) -> Option<[u64; WORDS]> {
        let line = self.line(step);
        (line.step.load(Ordering::Acquire) == step).then(|| {
            let mut words = [0; WORDS];
            for (word, slot) in words.iter_mut().zip(&line.words) {
                *word = slot.load(Ordering::Relaxed);
            }
            words
        })
    }

    /// Sleep until the owner comes to `step`, or fails, at most `nap`; may wake early.
    pub(super) fn park(&self, step: u32, nap: Duration) {
        let line = self.line(step);
        self.bell.asleep.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let before = line.step.load(Ordering::Relaxed);
        if before != step && !self.has_failed() {
            let nap = futex::Timespec {
                tv_sec: nap.as_secs() as i64,
                tv_nsec: nap.subsec_nanos().into(),
            };
            // However it ends (woken, changed before, timed out, a signal), the caller looks again.
            let _ = futex::wait(&line.step, futex::Flags::empty(), before, Some(&nap));
        }
        self.bell.asleep.fetch_sub(1, Ordering::Relaxed);
    }

    /// The owner will come no more; wakes all who wait for it.
    pub(super) fn fail(&self) {
        self.bell.failed.store(1, Ordering::SeqCst);
        for line in &self.lines {
            wake(&line.step);
        }
    }

    /// Whether the owner has said that it will come no more.
    pub(super) fn has_failed(&self) -> bool {
        self.bell.failed.load(Ordering::Acquire) != 0
    }

    fn line(&self, step: u32) -> &Line {
        &self.lines[(step % 2) as usize]
    }
}

/// Wake all that sleep on a word; it may be mapped by any number of processes, so the futex is not private.
fn wake(word: &AtomicU32) {
    let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32); // fails only for a bad address
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control() -> Control {
        let line = || Line {
            step: AtomicU32::new(0),
            words: Default::default(),
        };
        Control {
            lines: [line(), line()],
            bell: Bell {
                asleep: AtomicU32::new(0),
                failed: AtomicU32::new(0),
            },
        }
    }

    #[test]
    fn a_note_is_seen_with_its_step_and_kept_during_the_next() {
        let control = control();
        assert_eq!(control.arrived(1), None);
        control.publish(1, &[1; WORDS]);
        control.publish(2, &[2; WORDS]);
        assert_eq!(control.arrived(1), Some([1; WORDS]));
        assert_eq!(control.arrived(2), Some([2; WORDS]));
        assert_eq!(control.arrived(3), None);
    }

    /// Goal: no wake-up is lost. Method: two ranks that always sleep meet many times; a lost wake-up would cost its
    /// whole nap, and the test an hour.
    #[test]
    fn ranks_that_always_sleep_meet_ten_thousand_times() {
        let controls = [control(), control()];
        let nap = Duration::from_secs(3600);
        std::thread::scope(|scope| {
            for rank in 0..2 {
                let controls = &controls;
                scope.spawn(move || {
                    for step in 1..=10_000u32 {
                        controls[rank].publish(step, &[u64::from(step); WORDS]);
                        while controls[1 - rank].arrived(step).is_none() {
                            controls[1 - rank].park(step, nap);
                        }
                        let words = controls[1 - rank].arrived(step);
                        assert_eq!(words, Some([u64::from(step); WORDS]));
                    }
                });
            }
        });
    }

    #[test]
    fn failing_wakes_who_waits() {
        let control = control();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !control.has_failed() {
                    control.park(1, Duration::from_secs(3600));
                }
            });
            std::thread::sleep(Duration::from_millis(10));
            control.fail();
        });
    }
}
