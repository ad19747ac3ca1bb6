//! Waiting for several file descriptors at once, again and again, in memory that is kept.

use std::time::Duration;

use rustix::event::{PollFd, Timespec, poll};

/// The list that the kernel is given.
#[derive(Default)]
pub(crate) struct Waiting(Vec<PollFd<'static>>);

impl Waiting {
    /// Room for `most` at once, and for more where it must be.
    pub(crate) fn new(most: usize) -> Self {
        Self(Vec::with_capacity(most))
    }

    /// Sleep until one of `fds` is ready, at most `nap`; may wake early.
    ///
    /// # Errors
    /// The system's refusal.
    pub(crate) fn on<'fd>(
        &mut self,
        fds: impl Iterator<Item = PollFd<'fd>>,
        nap: Duration,
    ) -> rustix::io::Result<()> {
        let mut list: Vec<PollFd<'fd>> = std::mem::take(&mut self.0);
        list.extend(fds);
        let nap = Timespec {
            tv_sec: nap.as_secs() as i64,
            tv_nsec: nap.subsec_nanos().into(),
        };
        let result = poll(&mut list, Some(&nap));
        list.clear();
        // Of no elements, for any lifetime: the standard library collects a vector's own elements where they lie. That it
        // goes on doing so is what the steady steps' test sees.
        self.0 = list.into_iter().map(|_| unreachable!()).collect();
        match result {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
