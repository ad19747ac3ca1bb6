//! A rank's side of supervision: take the listener, die with the supervisor, leave last words.

use std::{
    net::TcpListener,
    os::fd::AsFd,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use super::words::LastWords;
use crate::{Error, Result};

/// Names the standard input as the job's listener.
pub(super) const LISTENER: &str = "FABRIC_LISTENER";
/// Names where a rank leaves its last words: see [`super::words`].
pub(super) const ERROR_FILE: &str = "FABRIC_ERROR_FILE";

/// The listener that the supervisor bound for rank 0 before any rank was started, so that nobody can take the port in
/// between. `None` on other ranks, without a supervisor, and on the second call.
pub fn inherited_listener() -> Option<TcpListener> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if std::env::var(LISTENER).ok()? != "stdin" || TAKEN.swap(true, Ordering::Relaxed) {
        return None;
    }
    let listener = TcpListener::from(std::io::stdin().as_fd().try_clone_to_owned().ok()?);
    listener.local_addr().ok()?; // not a socket: somebody else's standard input
    // Who reads standard input from now on finds its end, not a socket.
    if let Ok(nothing) = std::fs::File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(nothing);
    }
    Some(listener)
}

/// Have the kernel kill this process when its supervisor, process `pid`, dies; end at once when it is dead already.
///
/// # Errors
/// When the kernel refuses, or `pid` is not a process id.
pub fn die_with_supervisor(pid: u32) -> Result<()> {
    let supervisor = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| {
            Error::argument(
                format!("the supervisor's process id is {pid}"),
                "Unset FABRIC_SUPERVISOR, or start this program through its supervisor",
            )
        })?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before the line above: then this process has another parent by now, and no signal will come.
    if getppid() != Some(supervisor) {
        eprintln!("the supervisor (process {pid}) is gone, so this rank ends too");
        std::process::exit(1);
    }
    Ok(())
}

/// Leave `text` as this rank's last words for the supervisor; `from_peer`: it failed only because another rank did.
/// Does nothing without a supervisor. The first words stay, but a failure of this rank's own replaces an echo.
pub fn report_failure(text: &str, from_peer: bool) {
    static SAID: Mutex<Option<bool>> = Mutex::new(None); // whether what was said came from a peer
    let Some(path) = std::env::var_os(ERROR_FILE) else {
        return;
    };
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.is_none_or(|echo| echo && !from_peer) {
        *said = Some(from_peer);
        let words = LastWords {
            text: text.into(),
            from_peer,
        };
        if let Err(why) = words.write(Path::new(&path)) {
            eprintln!("cannot tell the supervisor of this failure: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unsupervised_process_has_no_listener_and_reports_to_nobody() {
        assert!(inherited_listener().is_none());
        report_failure("nobody reads this", false);
    }

    #[test]
    fn process_ids_that_cannot_be_are_refused() {
        for pid in [0, u32::MAX] {
            assert!(die_with_supervisor(pid).is_err());
        }
    }
}
