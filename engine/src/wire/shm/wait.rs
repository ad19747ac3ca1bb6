//! How to wait for a rank: awake at first, then asleep.
//!
//! [Note: how to wait] A rank spins for some microseconds, yields its core a few times, and then sleeps. With more ranks
//! than cores it never spins. With enough cores it may still share one with the rank it waits for, because others use
//! the machine; then spinning only delays that rank, and what helps is the yield. So a wait that ends with a yield halves
//! the next one's spins, and a wait that ends while spinning doubles them. (Two ranks, 1 KiB all_reduce, both on one core
//! of a loaded machine: 17 us with 200 spins always, 60 us with 1000; 1.5 us on two idle cores.)

const SPINS: u32 = 200; // at most: some 8 us
const FEW_SPINS: u32 = 8;
const YIELDS: u32 = 4;

/// The turns of one wait, and what earlier ones taught.
pub(super) struct Turns {
    most_spins: u32,
    spins: u32, // of this wait
    taken: u32,
}

impl Turns {
    /// `crowded`: there are more ranks than cores, so that a rank that spins keeps another from coming.
    pub(super) fn new(crowded: bool) -> Self {
        let most_spins = if crowded { 0 } else { SPINS };
        Self {
            most_spins,
            spins: most_spins,
            taken: 0,
        }
    }

    /// Whether the wait is long enough that whoever sleeps, and may be waiting for this rank, should be woken first.
    pub(super) fn is_long(&self) -> bool {
        self.taken >= FEW_SPINS.min(self.spins)
    }

    /// Let some time pass; false when it is time to sleep.
    pub(super) fn pass(&mut self) -> bool {
        self.taken += 1;
        if self.taken <= self.spins {
            std::hint::spin_loop();
        } else if self.taken <= self.spins + YIELDS {
            std::thread::yield_now();
        } else {
            return false;
        }
        true
    }

    /// What was waited for has come: [Note: how to wait].
    pub(super) fn learn(&mut self) {
        let taken = std::mem::take(&mut self.taken);
        let few = FEW_SPINS.min(self.most_spins);
        if taken > self.spins && taken <= self.spins + YIELDS {
            self.spins = (self.spins / 2).max(few);
        } else if taken > 0 && taken <= self.spins {
            self.spins = (self.spins * 2).min(self.most_spins);
        }
    }
}
