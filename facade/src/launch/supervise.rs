//! The supervisor: starts this program again for every rank, passes signals on, reports the first failure, and never
//! leaves a process behind.

use std::{
    os::fd::{AsFd, OwnedFd},
    process::{Child, Command, Stdio},
    time::Duration,
};

use fabric_engine::clock::Clock;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
use signal_hook::low_level::emulate_default_handler;

use super::{
    ending::{Cause, Ending, RankFailed, first_cause},
    inbox::Inbox,
    job::{Job, Told},
    output::{Output, Printer},
    words::Slate,
};
use crate::{Error, Result};

const GRACE: Duration = Duration::from_secs(2); // from SIGTERM to SIGKILL
const COURTESY: Duration = Duration::from_millis(250); // for the true culprit to finish its last words
const LOOK: Duration = Duration::from_millis(5); // between looks, on a kernel without pidfds
const OTHERS: Duration = Duration::from_secs(3); // for the ranks of other machines to end, before all start again

/// Run a program as the ranks of one job, and wait for all of them: `supervise(4)` runs this program again, with the same
/// arguments, as ranks 0 to 3; a [`Job`] says more.
///
/// Each rank finds its place in `FABRIC_*` variables (see [`crate::environment::Own`]); rank 0's standard input is
/// the listener at which all meet, the others' is empty. Cores that this process may use are divided among its ranks
/// (`RAYON_NUM_THREADS`, `OMP_NUM_THREADS`) unless the user did. SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 are passed on;
/// a second SIGINT or SIGTERM ends the job. When a rank fails, the others get SIGTERM and, 2 s later, SIGKILL.
///
/// When SIGINT, SIGTERM or SIGHUP has ended the ranks, this process dies by the same signal, as a shell expects, and this
/// function does not return. It returns when the ranks took the signal as a reason to end well.
///
/// # Errors
/// When a rank cannot be started, and when one fails: a [`RankFailed`] that shows the first cause.
pub fn supervise(job: impl Into<Job>) -> Result<()> {
    let job = job.into();
    job.check()?;
    let ranks = job.node_rank * job.local..(job.node_rank + 1) * job.local;
    job.output.prepare(ranks)?;
    let mut restart = 0;
    loop {
        let failure = match run(&job, restart)? {
            Outcome::Done => return Ok(()),
            Outcome::Failed(failure) => failure,
            Outcome::Ended(signal, failure) => {
                if let Some(failure) = failure {
                    eprintln!("fabric: {failure}");
                }
                emulate_default_handler(signal.as_raw())?;
                return Err(Error::new("a signal ended the job")); // it was one that does not kill
            }
        };
        if restart == job.restarts {
            return Err(failure.into());
        }
        restart += 1;
        eprintln!(
            "fabric: {failure}; starting all ranks again ({restart} of {})",
            job.restarts
        );
        if job.nodes > 1 {
            Clock::machine().sleep(OTHERS);
        }
    }
}

/// How a job ended.
enum Outcome {
    Done,
    Failed(RankFailed),
    /// A signal to the supervisor asked for it; what went wrong besides.
    Ended(Signal, Option<RankFailed>),
}

fn run(job: &Job, restart: usize) -> Result<Outcome> {
    let meeting = job.meet()?;
    let told = Told {
        address: meeting.address,
        secret: meeting.secret,
        supervisor: std::process::id(),
        restart,
        cores: std::thread::available_parallelism().map_or(1, usize::from),
    };
    let mut listener = meeting.listener;
    let first = job.node_rank * job.local;
    watch(first, job.local, &job.output, |local_rank, slate| {
        let mut command = job.command(local_rank, &told, slate.path());
        let stdin = listener
            .take()
            .map(|listener| Stdio::from(OwnedFd::from(listener)));
        command.stdin(stdin.unwrap_or_else(Stdio::null));
        command
    })
}

/// Start `count` commands, which are the ranks from `first` on, and wait for all.
///
/// The kernel binds a child's parent-death signal to the *thread* that started it, so the thread that starts the ranks
/// is the one that waits for them: were it to end earlier, the ranks would be killed with it.
fn watch(
    first: usize,
    count: usize,
    output: &Output,
    mut command: impl FnMut(usize, &Slate) -> Command,
) -> Result<Outcome> {
    let mut inbox = Inbox::open()?; // before the first rank: a signal that comes now must reach it
    let mut ranks = Ranks::default();
    let mut printer = Printer::new();
    for local_rank in 0..count {
        let (rank, slate) = (first + local_rank, Slate::new()?);
        let mut command = command(local_rank, &slate);
        if !output.is_direct() {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let child = command.spawn().map_err(|why| {
            let program = command.get_program().to_string_lossy().into_owned();
            Error::argument(
                format!("rank {rank} cannot be started ({program}): {why}"),
                "Ask for fewer devices, or see whether this user may start more processes (ulimit -u)",
            )
        })?;
        ranks.living.push(Running::new(rank, child, slate));
        let child = ranks.living.last_mut().map(|running| &mut running.child);
        if let Some(child) = child {
            printer.take(rank, child, output)?;
        }
    }
    printer.start()?;
    let outcome = ranks.see_through(&mut inbox, &Clock::machine());
    drop(inbox); // whoever reads our output may be slow: signals need not wait for that
    printer.finish();
    outcome
}

/// What the supervisor is about to do to the living ranks.
#[derive(Clone, Copy)]
enum Phase {
    /// Let them train.
    Run,
    /// Send SIGTERM at this time.
    TermAt(Duration),
    /// SIGTERM was sent; send SIGKILL at this time.
    KillAt(Duration),
    /// SIGKILL was sent.
    Killed,
}

/// All ranks. Dropping them kills and reaps those that live, also when the supervisor panics.
#[derive(Default)]
struct Ranks {
    living: Vec<Running>,
    endings: Vec<Ending>, // in the order of time
}

/// One rank's process.
struct Running {
    rank: usize,
    child: Child,
    /// Readable when the process has ended.
    ended: Option<OwnedFd>,
    slate: Slate,
    sent: Vec<i32>,
}

impl Ranks {
    /// Wait until all have ended.
    fn see_through(&mut self, inbox: &mut Inbox, clock: &Clock) -> Result<Outcome> {
        let mut phase = Phase::Run;
        let mut asked_to_end = None;
        loop {
            let before = self.endings.len();
            self.reap()?;
            if self.living.is_empty() {
                break;
            }
            let causes: Vec<_> = self.endings[before..]
                .iter()
                .filter_map(Ending::cause)
                .collect();
            phase = self.next_phase(phase, &causes, clock.now());
            self.sleep(inbox, phase, clock.now());
            for signal in inbox.read() {
                if matches!(signal, Signal::INT | Signal::TERM | Signal::HUP) {
                    if asked_to_end.is_some() && matches!(phase, Phase::Run) {
                        phase = Phase::TermAt(clock.now());
                    }
                    asked_to_end.get_or_insert(signal);
                }
                self.send(signal);
            }
        }
        Ok(match (first_cause(&self.endings), asked_to_end) {
            (None, _) => Outcome::Done,
            (Some(first), None) => Outcome::Failed(first.failure()),
            (Some(first), Some(signal)) => {
                let own = first.cause() == Some(Cause::Own);
                Outcome::Ended(signal, own.then(|| first.failure()))
            }
        })
    }

    /// A failure ends the others: at once when it is the rank's own, and a moment later when it only echoes another
    /// rank's, which may be about to say what happened.
    fn next_phase(&mut self, phase: Phase, causes: &[Cause], now: Duration) -> Phase {
        let phase = match (phase, causes.iter().min()) {
            (Phase::Run, Some(Cause::Own | Cause::Stopped)) => Phase::TermAt(now),
            (Phase::Run, Some(Cause::Peer)) => Phase::TermAt(now + COURTESY),
            (Phase::TermAt(_), Some(Cause::Own)) => Phase::TermAt(now),
            (phase, _) => phase,
        };
        match phase {
            Phase::TermAt(time) if now >= time => {
                self.send(Signal::TERM);
                Phase::KillAt(now + GRACE)
            }
            Phase::KillAt(time) if now >= time => {
                self.send(Signal::KILL);
                Phase::Killed
            }
            phase => phase,
        }
    }

    /// Take leave of those that have ended.
    fn reap(&mut self) -> Result<()> {
        let mut index = 0;
        while index < self.living.len() {
            match self.living[index].child.try_wait()? {
                None => index += 1,
                Some(status) => {
                    let Running {
                        rank, slate, sent, ..
                    } = self.living.remove(index);
                    let words = slate.read();
                    self.endings.push(Ending {
                        rank,
                        status,
                        words,
                        sent,
                    });
                }
            }
        }
        Ok(())
    }

    /// Send `signal` to all that live. None of them has been reaped, so that no number belongs to a stranger.
    fn send(&mut self, signal: Signal) {
        for running in &mut self.living {
            running.sent.push(signal.as_raw());
            let pid = i32::try_from(running.child.id())
                .ok()
                .and_then(Pid::from_raw);
            if let Some(pid) = pid {
                let _ = kill_process(pid, signal); // it may have ended meanwhile, which reap() will see
            }
        }
    }

    /// Sleep until a rank ends, a signal comes, or `phase` asks for something.
    fn sleep(&self, inbox: &Inbox, phase: Phase, now: Duration) {
        let deadline = match phase {
            Phase::Run | Phase::Killed => None,
            Phase::TermAt(time) | Phase::KillAt(time) => Some(time.saturating_sub(now)),
        };
        let blind = self.living.iter().any(|running| running.ended.is_none());
        let patience = if blind {
            Some(deadline.map_or(LOOK, |deadline| deadline.min(LOOK)))
        } else {
            deadline
        };
        let patience = patience.map(|patience| Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: patience.subsec_nanos().into(),
        });
        let ended = self
            .living
            .iter()
            .filter_map(|running| running.ended.as_ref());
        let ended = ended.map(|fd| fd.as_fd());
        let signals = inbox.fds();
        let mut fds: Vec<_> = ended
            .chain(signals)
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let _ = poll(&mut fds, patience.as_ref()); // a failed poll only means a look too early
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for running in &mut self.living {
            let _ = running.child.kill();
        }
        for running in &mut self.living {
            let _ = running.child.wait();
        }
    }
}

impl Running {
    fn new(rank: usize, child: Child, slate: Slate) -> Self {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        Self {
            rank,
            ended: pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()),
            child,
            slate,
            sent: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::child::ERROR_FILE;

    /// Supervise shell scripts, one a rank; they know where their last words go.
    fn scripts(scripts: &[&str]) -> (Outcome, Duration) {
        let clock = Clock::machine();
        let outcome = watch(0, scripts.len(), &Output::default(), |rank, slate| {
            let mut command = Command::new("sh");
            command
                .args(["-c", scripts[rank]])
                .env(ERROR_FILE, slate.path())
                .stdin(Stdio::null());
            command
        });
        (outcome.unwrap(), clock.now())
    }

    fn failure(list: &[&str]) -> (String, Duration) {
        let (failure, time) = failed(list);
        (failure.to_string(), time)
    }

    fn failed(list: &[&str]) -> (RankFailed, Duration) {
        match scripts(list) {
            (Outcome::Failed(failure), time) => (failure, time),
            _ => panic!("a rank fails"),
        }
    }

    #[test]
    fn all_succeed() {
        let outcome = scripts(&["exit 0", "sleep 0.05", "true"]).0;
        assert!(matches!(outcome, Outcome::Done));
    }

    // LAU-02, line 10
    #[test]
    fn line_10_a_failure_ends_the_others_at_once() {
        let (text, time) = failure(&["exec sleep 60", "exit 3", "exec sleep 60"]);
        assert!(text.contains("rank 1 ended with exit code 3"), "{text}");
        assert!(time < GRACE, "{time:?}");
    }

    #[test]
    fn a_killed_rank_is_named_with_its_signal() {
        let (failure, _) = failed(&["exec sleep 60", "exec sleep 60", "kill -9 $$"]);
        assert_eq!(
            failure.to_string(),
            "rank 2 was killed by signal 9 (SIGKILL)"
        );
        assert_eq!((failure.rank(), failure.exit_code()), (2, 137));
        assert_eq!(failed(&["exit 7"]).0.exit_code(), 7);
    }

    #[test]
    fn a_rank_that_ignores_sigterm_is_killed_after_the_grace() {
        let (text, time) = failure(&[
            "trap '' TERM; echo x > $FABRIC_ERROR_FILE; while :; do sleep 0.05; done",
            "sleep 0.2; exit 4",
        ]);
        assert!(text.contains("rank 1 ended with exit code 4"), "{text}");
        assert!(time >= GRACE && time < GRACE * 3, "{time:?}");
    }

    #[test]
    fn the_culprits_own_words_win_over_the_echo_that_came_first() {
        let say = |text: &str, from_peer: bool| {
            format!(
                r#"printf '{{"text":"{text}","from_peer":{from_peer}}}' > "$FABRIC_ERROR_FILE"; exit 1"#
            )
        };
        let echo = say("rank 1 is gone", true);
        let own = format!("sleep 0.1; {}", say("out of memory", false));
        let (text, _) = failure(&[&echo, &own, "exec sleep 60"]);
        assert_eq!(text, "rank 1 failed: out of memory");
        let (text, _) = failure(&[&echo, "exec sleep 60"]);
        assert_eq!(text, "rank 0 failed: rank 1 is gone");
    }

    #[test]
    fn a_rank_that_cannot_start_ends_those_that_have() {
        let clock = Clock::machine();
        let error = watch(0, 2, &Output::default(), |rank, _| {
            let mut command = Command::new(["sleep", "./no such program"][rank]);
            command.arg("60");
            command
        });
        let text = error.err().unwrap().to_string();
        assert!(
            text.contains("rank 1 cannot be started") && text.contains("no such program"),
            "{text}"
        );
        assert!(clock.now() < Duration::from_secs(10));
    }
}
