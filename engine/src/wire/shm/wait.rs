//! How to wait for a rank: awake at first, then asleep.
//!
//! [Note: how to wait] A rank spins for some microseconds, then yields its core, and then sleeps.
//!
//! With more ranks than cores it never spins: it yields a few times, to the ranks it waits for, and sleeps. With enough cores
//! it yields for as long as nobody takes them: a yield that comes back at once costs nothing, and being woken takes the
//! system some 40 us. A yield that takes long was used by somebody: after a few of those it sleeps, and is woken in its
//! turn. If that somebody is the rank it waits for (others use the machine, and both share a core), spinning only delays it:
//! a wait with such a yield halves the next one's spins, and a wait that ends while spinning doubles them. (Two ranks, 1 KiB
//! all_reduce, both on one core of a loaded machine: 17 us with 200 spins always, 60 us with 1000.)

use std::time::Duration;

use crate::clock::Clock;

const SPINS: u32 = 200; // at most: some 8 us
const EAGER: u32 = 40; // of them without the processor's pause, which takes a tenth of the shortest operations
const FEW_SPINS: u32 = 8;
const YIELDS: u32 = 4; // that others have used, before a rank sleeps
const USED: Duration = Duration::from_nanos(1500); // longer than a yield that nobody wants
const LONG: Duration = Duration::from_micros(200); // of yields that nobody wants: then there is time to sleep

/// The turns of one wait, and what earlier ones taught.
pub(super) struct Turns {
    is_crowded: bool,
    spins: u32, // of this wait
    taken: u32,
    used: u32,               // yields that others have used
    since: Option<Duration>, // the first yield
}

impl Turns {
    /// `is_crowded`: there are more ranks than cores, so that a rank that spins keeps another from coming.
    pub(super) fn new(is_crowded: bool) -> Self {
        Self {
            is_crowded,
            spins: if is_crowded { 0 } else { SPINS },
            taken: 0,
            used: 0,
            since: None,
        }
    }

    /// Whether the wait is long enough that whoever sleeps, and may be waiting for this rank, should be woken first.
    pub(super) fn is_long(&self) -> bool {
        self.taken >= FEW_SPINS.min(self.spins)
    }

    /// Let some time pass; false when it is time to sleep.
    #[inline]
    pub(super) fn pass(&mut self, clock: &Clock) -> bool {
        self.taken += 1;
        if self.taken <= self.spins {
            if self.taken > EAGER {
                std::hint::spin_loop();
            }
            return true;
        }
        self.pass_on(clock)
    }

    /// Others may want this core.
    fn pass_on(&mut self, clock: &Clock) -> bool {
        if self.is_crowded {
            std::thread::yield_now();
            return self.taken <= YIELDS;
        }
        let before = clock.now();
        let since = *self.since.get_or_insert(before);
        if self.used == YIELDS || before - since > LONG {
            return false;
        }
        std::thread::yield_now();
        self.used += u32::from(clock.now() - before > USED);
        true
    }

    /// What was waited for has come: [Note: how to wait].
    #[inline]
    pub(super) fn learn(&mut self) {
        if self.taken > 0 {
            self.draw();
        }
    }

    fn draw(&mut self) {
        if !self.is_crowded {
            if self.used > 0 {
                self.spins = (self.spins / 2).max(FEW_SPINS);
            } else if self.since.is_none() {
                self.spins = (self.spins * 2).min(SPINS);
            }
        }
        self.taken = 0;
        self.used = 0;
        self.since = None;
    }
}
