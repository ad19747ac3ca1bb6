//! Time as an argument: the machine's clock, or one that a simulation moves.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// A clock. Its times are durations since it was made; clones share one origin.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    Machine(Instant),
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// The machine's monotonic clock.
    pub fn machine() -> Self {
        Self(Source::Machine(Instant::now()))
    }

    /// A clock that stands still until [`Clock::advance_to`] moves it.
    pub fn manual() -> Self {
        Self(Source::Manual(Arc::new(AtomicU64::new(0))))
    }

    /// Time since the clock was made.
    pub fn now(&self) -> Duration {
        match &self.0 {
            Source::Machine(origin) => origin.elapsed(),
            Source::Manual(nanos) => Duration::from_nanos(nanos.load(Ordering::Acquire)),
        }
    }

    /// Move a manual clock forward to `time`; a machine's clock, and a time already past, are left alone.
    pub fn advance_to(&self, time: Duration) {
        if let Source::Manual(nanos) = &self.0 {
            nanos.fetch_max(
                u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
                Ordering::AcqRel,
            );
        }
    }

    /// Wait on this thread. On a manual clock time passes at once.
    pub fn sleep(&self, time: Duration) {
        match &self.0 {
            Source::Machine(_) => std::thread::sleep(time),
            Source::Manual(_) => self.advance_to(self.now() + time),
        }
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::machine()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_forward() {
        let clock = Clock::manual();
        let twin = clock.clone();
        clock.advance_to(Duration::from_secs(2));
        clock.advance_to(Duration::from_secs(1));
        assert_eq!(twin.now(), Duration::from_secs(2));
        twin.sleep(Duration::from_secs(3));
        assert_eq!(clock.now(), Duration::from_secs(5));
    }
}
