//! A rank's answer to SIGTERM and SIGINT: end the job with its true cause, and end this process soon.

use std::{
    io::{self, Write},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fabric_engine::{Error, clock::Clock, comm::Aborter};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
    low_level::signal_name,
};

use super::child::report_failure;
use crate::Result;

const STORY: Duration = Duration::from_millis(700); // for the hub to tell who died
const FAREWELL: Duration = Duration::from_millis(800); // for the main thread to end by itself

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

const RECEIVED: &str = "it received ";

type Words = Box<dyn Fn(bool) + Send>;
static LAST: Mutex<Option<Words>> = Mutex::new(None);

type Slot = Arc<Mutex<Aborter>>;

/// From now on, SIGTERM and SIGINT end this rank in order, within 1.5 s: first the job may tell why it ends (a
/// supervisor sends SIGTERM because another rank died, and that rank is the news), else this rank aborts it; then the
/// main thread, whose collectives now fail, may end by itself; then the process exits with 128 + the signal's number.
///
/// Signals of the process are handled once; a later call only replaces the aborter.
///
/// # Errors
/// When the signals cannot be registered or no thread can be started.
pub fn on_terminate(aborter: Aborter) -> Result<()> {
    static REGISTERED: OnceLock<Slot> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());

    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(slot) = REGISTERED.get() {
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = aborter;
        return Ok(());
    }
    let slot = Arc::new(Mutex::new(aborter));
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let thread = std::thread::Builder::new().name("terminate".into());
    let watched = slot.clone();
    thread.spawn(move || {
        if let Some(signal) = signals.forever().next() {
            INTERRUPTED.store(true, Ordering::Relaxed);
            let aborter = watched
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            end(signal, &aborter)
        }
    })?;
    let _ = REGISTERED.set(slot); // nobody else can have: this is our turn
    Ok(())
}

/// Run `last` before the process ends by a signal, when the main thread has not ended by itself. It is told whether the
/// signal is the reason, or another rank's failure.
pub(crate) fn before_exit(last: impl Fn(bool) + Send + 'static) {
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(last));
}

/// Whether the job ends with `error` because a signal has asked for its end: here, or on another rank. A supervisor's signal
/// after another rank's failure is not the reason.
pub(crate) fn is_interruption(error: &crate::Error) -> bool {
    match error.engine() {
        Some(error) if error.is_from_peer() => error.to_string().contains(RECEIVED),
        _ => INTERRUPTED.load(Ordering::Relaxed),
    }
}

fn end(signal: i32, aborter: &Aborter) -> ! {
    let (text, from_peer) = story(signal, aborter, STORY);
    Clock::machine().sleep(FAREWELL);
    if let Some(last) = LAST.lock().unwrap_or_else(PoisonError::into_inner).take() {
        last(!from_peer || text.contains(RECEIVED));
    }
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes()); // in one piece: all ranks speak at once
    report_failure(&text, from_peer);
    std::process::exit(128 + signal)
}

/// Why the job ends, and whether another rank is the cause. Aborts the job when nobody else has within `patience`.
fn story(signal: i32, aborter: &Aborter, patience: Duration) -> (String, bool) {
    if let Some(error) = aborter.signal().wait(patience) {
        return (error.to_string(), error.is_from_peer());
    }
    let ours = format!("{RECEIVED}{}", signal_name(signal).unwrap_or("a signal"));
    aborter.abort(ours.clone());
    match aborter.signal().first() {
        // Between the wait and the abort, somebody else's story may have come.
        Some(Error::Aborted { rank, reason }) if reason == ours => {
            (format!("rank {rank}: {reason}"), false)
        }
        Some(error) => (error.to_string(), error.is_from_peer()),
        None => (ours, false),
    }
}

#[cfg(test)]
mod tests {
    use fabric_engine::comm::{Communicator, solo::Solo};

    use super::*;

    #[test]
    fn the_jobs_own_story_is_told_first() {
        let aborter = Solo::new(Clock::machine()).aborter();
        let reason = "rank 2 ended the job: out of memory".into();
        aborter.signal().raise(Error::Aborted { rank: 0, reason });
        let (text, from_peer) = story(SIGTERM, &aborter, STORY);
        assert!(text.contains("out of memory") && from_peer, "{text}");
    }

    #[test]
    fn without_a_story_the_signal_is_the_reason_and_ends_the_job() {
        let aborter = Solo::new(Clock::machine()).aborter();
        let (text, from_peer) = story(SIGTERM, &aborter, Duration::from_millis(1));
        assert_eq!(
            (text.as_str(), from_peer),
            ("rank 0: it received SIGTERM", false)
        );
        let error = aborter.signal().first().unwrap().to_string();
        assert!(error.contains("it received SIGTERM"), "{error}");
    }
}
