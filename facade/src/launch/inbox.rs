//! The supervisor's inbox: signals that came to it, to be passed on to the ranks.

use std::{
    io::Read,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::process::Signal;
use signal_hook::{SigId, flag, low_level};

use crate::Result;

const PASSED_ON: [Signal; 5] = [
    Signal::INT,
    Signal::TERM,
    Signal::HUP,
    Signal::USR1,
    Signal::USR2,
];

/// The signals that come to the supervisor, each with a pipe that it makes readable. When it is dropped, signals do
/// what they do by default.
pub(super) struct Inbox {
    pipes: Vec<(Signal, UnixStream)>,
    actions: Vec<SigId>,
}

impl Inbox {
    /// From now on, signals come here.
    pub(super) fn open() -> Result<Self> {
        defaults(1)?;
        let mut inbox = Self {
            pipes: Vec::new(),
            actions: Vec::new(),
        };
        for signal in PASSED_ON {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            inbox
                .actions
                .push(low_level::pipe::register(signal.as_raw(), theirs)?);
            inbox.pipes.push((signal, ours));
        }
        Ok(inbox)
    }

    /// What becomes readable when a signal comes.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.pipes.iter().map(|(_, pipe)| pipe.as_fd())
    }

    /// The signals that have come since the last look, one entry for each kind.
    pub(super) fn read(&mut self) -> Vec<Signal> {
        let mut come = Vec::new();
        for (signal, pipe) in &mut self.pipes {
            let mut bytes = [0; 64];
            if pipe.read(&mut bytes).is_ok_and(|count| count > 0) {
                come.push(*signal);
            }
        }
        come
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        for action in self.actions.drain(..) {
            low_level::unregister(action);
        }
        let _ = defaults(-1); // it fails only at the first opening
    }
}

/// Count the open inboxes. Without one, signals do what they do by default: a handler cannot be taken back, but one
/// registered for good can imitate the default.
fn defaults(opened: isize) -> Result<()> {
    static OPEN: Mutex<(isize, Option<Arc<AtomicBool>>)> = Mutex::new((0, None));

    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let none_open = match &open.1 {
        Some(none_open) => none_open.clone(),
        None => {
            let none_open = Arc::new(AtomicBool::new(false));
            for signal in PASSED_ON {
                flag::register_conditional_default(signal.as_raw(), none_open.clone())?;
            }
            open.1.insert(none_open).clone()
        }
    };
    open.0 += opened;
    none_open.store(open.0 == 0, Ordering::Relaxed);
    Ok(())
}
