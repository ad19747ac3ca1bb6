//! How ranks meet in shared memory: a rank publishes that it has come to a step, together with a note; others wait for it,
//! at first awake, then asleep in the kernel. This is the whole protocol, over atomics and a waiter ([`super::sync`]) and
//! nothing else: it knows no mapping, and `loom` runs it.
//!
//! [Note: lines] Step k is published in line k mod LINES, the note first, then the step's number with release order, so
//! that a reader that sees the number sees the note, and all that was written before it. A line is used again only when
//! nobody can still need it: a rank publishes step k only once every peer has published k - LINES + 1 ([`Control::reached`]),
//! which a peer does only after it has done with what others published at k - LINES. What is posted beside the lines has
//! as many slots and is numbered apart, at most one number a step, so that the same rule keeps it. Numbers may wrap around,
//! because two ranks are never LINES steps apart.
//!
//! [Note: one cache line] What everybody reads of a line (step, fingerprint, a few words) fits 64 bytes, so that one
//! transfer between cores brings it, small payloads included. What is only read to explain a disagreement lies beyond.
//!
//! [Note: no lost wake-up] A waiter counts itself as asleep, then looks at the step once more (the kernel does, under
//! its lock), then sleeps. A publisher stores the step, then looks at the count. Between each pair stands a fence of
//! sequential consistency, so at least one of the two sees the other: the waiter sees the step, or the publisher wakes
//! it. (The publisher may first look whether what it waits for itself has come, but not sleep.) The count is only a hint: a waiter that dies leaves it too high, which costs needless wake-ups.

use std::time::Duration;

use super::sync::{AtomicU32, AtomicU64, Ordering, Word, fence};

/// Words of a note, beside its fingerprint.
pub(crate) const WORDS: usize = 6;

/// Words that explain a note.
pub(super) const DETAILS: usize = 6;

/// How far a rank may be ahead of another, plus one.
pub(super) const LINES: usize = 4;

/// What a rank publishes with a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Note {
    /// Equal on ranks that agree.
    pub(super) print: u64,
    /// Of each rank's own.
    pub(super) words: [u64; WORDS],
}

/// One rank's control block. All of it is zero at first.
#[repr(C)]
pub(super) struct Control<const N: usize = LINES> {
    lines: [Line; N],
    bell: Bell,
}

/// Two cache lines, because some prefetchers fetch pairs. Written by the owner alone.
#[repr(C, align(128))]
struct Line {
    step: Word,
    print: AtomicU64,
    words: [AtomicU64; WORDS],
    details: [AtomicU64; DETAILS],
}

/// Apart from the lines, because waiters write it.
#[repr(C, align(128))]
struct Bell {
    asleep: AtomicU32, // waiters that sleep, or are about to
    failed: AtomicU32, // not zero: the owner will not come
}

#[cfg(not(loom))]
const _: () = assert!(std::mem::offset_of!(Line, details) == 64);

impl<const N: usize> Control<N> {
    /// The owner has come to `step`; steps count from 1. It has seen to it that the line is free: [Note: lines].
    /// Whoever publishes owes a [`Control::ring`].
    pub(super) fn publish(&self, step: u32, note: &Note, details: &[u64; DETAILS]) {
        self.write(
            step,
            note.print,
            Some(&note.words),
            details,
            Ordering::Release,
        );
    }

    /// The same of a step whose words nobody reads: they are whatever was there.
    pub(super) fn publish_bare(&self, step: u32, print: u64, details: &[u64; DETAILS]) {
        self.write(step, print, None, details, Ordering::Release);
    }

    #[inline(always)]
    fn write(
        &self,
        step: u32,
        print: u64,
        words: Option<&[u64; WORDS]>,
        details: &[u64; DETAILS],
        order: Ordering,
    ) {
        let line = self.line(step);
        line.print.store(print, Ordering::Relaxed);
        if let Some(words) = words {
            for (slot, word) in line.words.iter().zip(words) {
                slot.store(*word, Ordering::Relaxed);
            }
        }
        for (slot, word) in line.details.iter().zip(details) {
            slot.store(*word, Ordering::Relaxed);
        }
        line.step.store(step, order);
    }

    /// Wake those that sleep, if there are any: due after a step is published, before its owner waits long or goes on. Not
    /// at once, because the fence waits until the step has left this core, and then nothing can be looked at meanwhile.
    pub(super) fn ring(&self, step: u32) {
        fence(Ordering::SeqCst);
        self.ring_unfenced(step);
    }

    fn ring_unfenced(&self, step: u32) {
        if self.bell.asleep.load(Ordering::Relaxed) != 0 {
            self.line(step).step.wake();
        }
    }

    /// The owner's note, once it has come to `step`.
    pub(super) fn arrived(&self, step: u32) -> Option<Note> {
        let line = self.line(step);
        (line.step.load(Ordering::Acquire) == step).then(|| Note {
            print: line.print.load(Ordering::Relaxed),
            words: std::array::from_fn(|at| line.words[at].load(Ordering::Relaxed)),
        })
    }

    /// What explains the note of a step that the owner has come to.
    pub(super) fn details(&self, step: u32) -> [u64; DETAILS] {
        let line = self.line(step);
        std::array::from_fn(|at| line.details[at].load(Ordering::Relaxed))
    }

    /// Whether the owner has come to `step` or further; all that it did before is seen then.
    pub(super) fn reached(&self, step: u32) -> bool {
        is_past(self.line(step).step.load(Ordering::Acquire), step)
    }

    /// Sleep until the owner comes to `step` or further, or fails, at most `nap`; may wake early.
    pub(super) fn park(&self, step: u32, nap: Duration) {
        let line = self.line(step);
        self.bell.asleep.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let before = line.step.load(Ordering::Relaxed);
        if !is_past(before, step) && !self.has_failed() {
            line.step.wait(before, nap);
        }
        self.bell.asleep.fetch_sub(1, Ordering::Relaxed);
    }

    /// The owner will come no more; wakes all who wait for it.
    pub(super) fn fail(&self) {
        self.bell.failed.store(1, Ordering::SeqCst);
        for line in &self.lines {
            line.step.wake();
        }
    }

    /// Whether the owner has said that it will come no more.
    pub(super) fn has_failed(&self) -> bool {
        self.bell.failed.load(Ordering::Acquire) != 0
    }

    fn line(&self, step: u32) -> &Line {
        &self.lines[step as usize % N]
    }

    #[cfg(test)]
    fn new() -> Self {
        let words = || std::array::from_fn(|_| AtomicU64::new(0));
        Self {
            lines: std::array::from_fn(|_| Line {
                step: Word::default(),
                print: AtomicU64::new(0),
                words: words(),
                details: words(),
            }),
            bell: Bell {
                asleep: AtomicU32::new(0),
                failed: AtomicU32::new(0),
            },
        }
    }
}

/// Whether a line that shows `shown` has come to `step`.
fn is_past(shown: u32, step: u32) -> bool {
    shown.wrapping_sub(step) < u32::MAX / 2
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn note(word: u64) -> Note {
        Note {
            print: word + 1,
            words: [word; WORDS],
        }
    }

    #[test]
    fn a_note_is_seen_with_its_step_and_kept_while_others_may_need_it() {
        let control = Control::<LINES>::new();
        assert_eq!(control.arrived(1), None);
        for step in 1..=LINES as u32 {
            control.publish(step, &note(step.into()), &[7; DETAILS]);
        }
        for step in 1..=LINES as u32 {
            assert_eq!(control.arrived(step), Some(note(step.into())));
            assert_eq!(control.details(step), [7; DETAILS]);
            assert!(control.reached(step));
        }
        let next = LINES as u32 + 1;
        assert!(control.arrived(next).is_none() && !control.reached(next));
        control.publish(next, &note(9), &[0; DETAILS]);
        assert!(control.arrived(1).is_none() && control.reached(1));
    }

    #[test]
    fn steps_may_wrap_around() {
        let control = Control::<LINES>::new();
        let last = u32::MAX - 1;
        control.publish(last, &note(1), &[0; DETAILS]);
        assert!(control.reached(last) && !control.reached(last.wrapping_add(4)));
        control.publish(last.wrapping_add(4), &note(2), &[0; DETAILS]);
        assert!(control.reached(last) && control.arrived(2) == Some(note(2)));
    }

    /// Goal: no wake-up is lost. Method: two ranks that always sleep meet many times; a lost wake-up would cost its
    /// whole nap, and the test an hour.
    #[test]
    fn ranks_that_always_sleep_meet_ten_thousand_times() {
        let controls = [Control::<LINES>::new(), Control::new()];
        let nap = Duration::from_secs(3600);
        std::thread::scope(|scope| {
            for rank in 0..2 {
                let controls = &controls;
                scope.spawn(move || {
                    for step in 1..=10_000u32 {
                        controls[rank].publish(step, &note(step.into()), &[0; DETAILS]);
                        controls[rank].ring(step);
                        while controls[1 - rank].arrived(step).is_none() {
                            controls[1 - rank].park(step, nap);
                        }
                        let theirs = controls[1 - rank].arrived(step);
                        assert_eq!(theirs, Some(note(step.into())));
                    }
                });
            }
        });
    }

    #[test]
    fn failing_wakes_who_waits() {
        let control = Control::<LINES>::new();
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

/// The protocol under every order of events that `loom` finds, with memory that is no atomic beside the flags: a slot for
/// each line, written before its step is published and read after it is seen.
/// `RUSTFLAGS="--cfg loom" cargo test --target-dir target/loom -p fabric-engine --lib loom`
#[cfg(all(test, loom))]
#[allow(unsafe_code)]
mod model {
    use loom::{cell::UnsafeCell, sync::Arc, thread};

    use super::*;

    const SLOTS: usize = 2; // lines in the model: reuse comes at the third step

    struct Rank {
        control: Control<SLOTS>,
        slots: [UnsafeCell<u32>; SLOTS],
    }

    /// What is broken on purpose.
    #[derive(Clone, Copy, PartialEq)]
    enum Flaw {
        None,
        /// The step is published without release order.
        Relaxed,
        /// Lines are used again without asking.
        Hasty,
        /// Nobody who sleeps is woken.
        Silent,
        /// No fence stands between the step and the look at who sleeps.
        Unfenced,
    }

    /// `world` ranks meet at `steps` steps. In a broadcast only rank 0 posts, and nobody but its readers waits for it.
    fn meet(world: usize, steps: u32, broadcast: bool, flaw: Flaw) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(if world == 2 { 2 } else { 1 });
        model.max_branches = 20_000; // a rank that spins while two others go on takes many
        model.check(move || {
            let rank = |_| Rank {
                control: Control::new(),
                slots: std::array::from_fn(|_| UnsafeCell::new(0)),
            };
            let ranks: Arc<Vec<Rank>> = Arc::new((0..world).map(rank).collect());
            let threads = (1..world).map(|own| {
                let ranks = ranks.clone();
                thread::spawn(move || live(&ranks, own, steps, broadcast, flaw))
            });
            let threads: Vec<_> = threads.collect();
            live(&ranks, 0, steps, broadcast, flaw);
            threads
                .into_iter()
                .for_each(|thread| thread.join().unwrap());
        });
    }

    fn live(ranks: &[Rank], own: usize, steps: u32, broadcast: bool, flaw: Flaw) {
        let peers = || (0..ranks.len()).filter(move |peer| *peer != own);
        for step in 1..=steps {
            let slot = step as usize % SLOTS;
            if step as usize >= SLOTS && flaw != Flaw::Hasty {
                let free = step + 1 - SLOTS as u32;
                for peer in peers() {
                    while !ranks[peer].control.reached(free) {
                        ranks[peer].control.park(free, Duration::MAX);
                    }
                }
            }
            let posts = !broadcast || own == 0;
            if posts {
                let value = step * 10 + own as u32;
                // SAFETY: loom keeps track of who touches the cell, and fails where two do so at once.
                ranks[own].slots[slot].with_mut(|cell| unsafe { *cell = value });
            }
            let note = Note {
                print: step.into(),
                words: [own as u64; WORDS],
            };
            let control = &ranks[own].control;
            match flaw {
                Flaw::Relaxed => control.write(
                    step,
                    note.print,
                    Some(&note.words),
                    &[0; DETAILS],
                    Ordering::Relaxed,
                ),
                _ => control.publish(step, &note, &[0; DETAILS]),
            }
            let mut has_rung = false;
            let mut ring = || match flaw {
                Flaw::Silent => {}
                Flaw::Unfenced => control.ring_unfenced(step),
                _ if has_rung => {}
                _ => {
                    control.ring(step);
                    has_rung = true;
                }
            };
            for peer in peers().filter(|peer| !broadcast || *peer == 0) {
                let seen = loop {
                    match ranks[peer].control.arrived(step) {
                        None if ranks[peer].control.reached(step) => {
                            let seen = ranks[peer].control.arrived(step);
                            assert!(seen.is_some(), "a line is used again before it was read");
                        }
                        None => {
                            ring();
                            ranks[peer].control.park(step, Duration::MAX);
                        }
                        seen => break seen,
                    }
                };
                assert_eq!(seen.map(|note| note.words[0]), Some(peer as u64));
                // SAFETY: as above.
                let value = ranks[peer].slots[slot].with(|cell| unsafe { *cell });
                assert_eq!(value, step * 10 + peer as u32);
            }
            ring();
        }
    }

    #[test]
    fn loom_two_ranks_meet_and_reuse_their_lines() {
        meet(2, 3, false, Flaw::None);
    }

    #[test]
    fn loom_three_ranks_meet() {
        meet(3, 1, false, Flaw::None);
    }

    #[test]
    fn loom_two_ranks_broadcast_and_reuse_their_lines() {
        meet(2, 4, true, Flaw::None);
    }

    #[test]
    fn loom_three_ranks_broadcast() {
        meet(3, 3, true, Flaw::None);
    }

    #[test]
    #[should_panic(expected = "Causality violation")]
    fn loom_sees_a_step_that_is_published_without_release_order() {
        meet(2, 1, false, Flaw::Relaxed);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn loom_sees_a_wake_up_that_is_lost() {
        meet(2, 1, false, Flaw::Silent);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn loom_sees_a_fence_that_is_left_out() {
        meet(2, 1, false, Flaw::Unfenced);
    }

    #[test]
    #[should_panic(expected = "used again before it was read")]
    fn loom_sees_lines_that_are_used_again_too_soon() {
        meet(2, 3, true, Flaw::Hasty);
    }
}
