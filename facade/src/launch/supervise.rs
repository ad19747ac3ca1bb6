//! The supervisor: starts this program again for every rank, passes signals on, reports the first failure, and never
//! leaves a process behind.

use std::{
    ffi::OsString,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use fabric_engine::{clock::Clock, rendezvous::Secret};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

use super::{
    child::{ERROR_FILE, LISTENER, LastWords},
    ending::{Cause, Ending, first_cause},
    inbox::Inbox,
};
use crate::{Error, Result};

const GRACE: Duration = Duration::from_secs(2); // from SIGTERM to SIGKILL
const COURTESY: Duration = Duration::from_millis(250); // for the true culprit to finish its last words
const LOOK: Duration = Duration::from_millis(5); // between looks, on a kernel without pidfds

/// Run this program again `count` times, with the same arguments, as ranks 0 to `count - 1` of one job on this machine,
/// and wait for all of them.
///
/// Each rank finds its place in `FABRIC_*` variables (see [`crate::environment::Place`]); rank 0's standard input is
/// the listener at which all meet, the others' is empty. Cores are divided among ranks (`RAYON_NUM_THREADS`,
/// `OMP_NUM_THREADS`) unless the user did. SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 are passed on; a second SIGINT or
/// SIGTERM ends the job. When a rank fails, the others get SIGTERM and, 2 s later, SIGKILL.
///
/// # Errors
/// When a rank cannot be started, and when one fails: the error shows the first cause.
pub fn supervise(count: usize) -> Result<()> {
    if count == 0 {
        return Err(Error::argument("0 ranks to start", "Ask for at least one"));
    }
    let program = std::env::current_exe()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let shared = Shared {
        world: count,
        address: listener.local_addr()?,
        secret: Secret::random_text()?,
        supervisor: std::process::id(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
    };
    let mut listener = Some(listener);
    watch(count, |rank, error_file| {
        let mut arguments = std::env::args_os();
        let mut command = Command::new(&program);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        let stdin = listener
            .take()
            .map(|listener| Stdio::from(OwnedFd::from(listener)));
        let is_set = |name: &str| std::env::var_os(name).is_some();
        command
            .args(arguments)
            .envs(shared.variables(rank, error_file, &is_set))
            .stdin(stdin.unwrap_or_else(Stdio::null));
        if rank > 0 {
            command.env_remove(LISTENER);
        }
        command
    })
}

/// What all ranks of a job are told.
struct Shared {
    world: usize,
    address: SocketAddr,
    secret: String,
    supervisor: u32,
    cores: usize,
}

impl Shared {
    /// The environment of `rank`, on top of the supervisor's own.
    fn variables(
        &self,
        rank: usize,
        error_file: &Path,
        is_set: &dyn Fn(&str) -> bool,
    ) -> Vec<(&'static str, OsString)> {
        let mut variables: Vec<(&'static str, OsString)> = vec![
            ("FABRIC_RANK", rank.to_string().into()),
            ("FABRIC_WORLD_SIZE", self.world.to_string().into()),
            ("FABRIC_LOCAL_RANK", rank.to_string().into()),
            ("FABRIC_LOCAL_WORLD_SIZE", self.world.to_string().into()),
            ("FABRIC_NODE_RANK", "0".into()),
            ("FABRIC_ADDR", self.address.ip().to_string().into()),
            ("FABRIC_PORT", self.address.port().to_string().into()),
            ("FABRIC_SECRET", self.secret.clone().into()),
            ("FABRIC_SUPERVISOR", self.supervisor.to_string().into()),
            (ERROR_FILE, error_file.into()),
        ];
        if rank == 0 {
            variables.push((LISTENER, "stdin".into()));
        }
        let threads = (self.cores / self.world).max(1);
        for name in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS"] {
            if !is_set(name) {
                variables.push((name, threads.to_string().into()));
            }
        }
        variables
    }
}

/// Start `count` commands and wait for all.
///
/// The kernel binds a child's parent-death signal to the *thread* that started it, so the thread that starts the ranks
/// is the one that waits for them: were it to end earlier, the ranks would be killed with it.
fn watch(count: usize, mut command: impl FnMut(usize, &Path) -> Command) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("fabric-").tempdir()?;
    let mut inbox = Inbox::open()?; // before the first rank: a signal that comes now must reach it
    let mut ranks = Ranks::default();
    for rank in 0..count {
        let error_file = folder.path().join(format!("rank-{rank}"));
        let mut command = command(rank, &error_file);
        let child = command.spawn().map_err(|why| {
            let program = command.get_program().to_string_lossy().into_owned();
            Error::argument(
                format!("rank {rank} of {count} cannot be started ({program}): {why}"),
                "Ask for fewer devices, or see whether this user may start more processes (ulimit -u)",
            )
        })?;
        ranks.living.push(Running::new(rank, child, error_file));
    }
    ranks.see_through(&mut inbox, &Clock::machine())
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
    error_file: PathBuf,
    sent: Vec<i32>,
}

impl Ranks {
    /// Wait until all have ended.
    fn see_through(&mut self, inbox: &mut Inbox, clock: &Clock) -> Result<()> {
        let mut phase = Phase::Run;
        let mut asked_to_end = false;
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
                let ends = matches!(signal, Signal::INT | Signal::TERM);
                if ends && asked_to_end && matches!(phase, Phase::Run) {
                    phase = Phase::TermAt(clock.now());
                }
                asked_to_end |= ends;
                self.send(signal);
            }
        }
        match first_cause(&self.endings) {
            None => Ok(()),
            Some(first) => Err(Error::new(first.text())),
        }
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
                        rank,
                        error_file,
                        sent,
                        ..
                    } = self.living.remove(index);
                    let words = LastWords::read(&error_file);
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
    fn new(rank: usize, child: Child, error_file: PathBuf) -> Self {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        Self {
            rank,
            ended: pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()),
            child,
            error_file,
            sent: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Place;

    fn shared(world: usize, cores: usize) -> Shared {
        Shared {
            world,
            address: "127.0.0.1:4321".parse().unwrap(),
            secret: "00ff".into(),
            supervisor: 77,
            cores,
        }
    }

    fn value(variables: &[(&str, OsString)], name: &str) -> Option<String> {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| value.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_rank_finds_its_place_in_what_the_supervisor_sets() {
        for rank in 0..3 {
            let variables = shared(3, 8).variables(rank, Path::new("words"), &|_| false);
            let place = Place::detect(&|name| value(&variables, name))
                .unwrap()
                .unwrap();
            assert_eq!(
                (place.rank, place.local_rank, place.node_rank),
                (rank, rank, 0)
            );
            assert_eq!((place.world, place.local_world), (3, 3));
            assert_eq!(place.address, "127.0.0.1:4321".parse().unwrap());
            assert!(place.supervised && place.secret.is_given());
            assert_eq!(value(&variables, LISTENER).is_some(), rank == 0);
            assert_eq!(value(&variables, ERROR_FILE).unwrap(), "words");
        }
    }

    #[test]
    fn cores_are_divided_unless_the_user_did() {
        let threads = |world, cores, set: &'static str| {
            let variables = shared(world, cores).variables(0, Path::new("w"), &|name| name == set);
            (
                value(&variables, "RAYON_NUM_THREADS"),
                value(&variables, "OMP_NUM_THREADS"),
            )
        };
        assert_eq!(threads(2, 9, ""), (Some("4".into()), Some("4".into())));
        assert_eq!(threads(4, 2, ""), (Some("1".into()), Some("1".into())));
        assert_eq!(threads(2, 8, "OMP_NUM_THREADS"), (Some("4".into()), None));
    }

    /// Supervise shell scripts, one a rank; they know where their last words go.
    fn scripts(scripts: &[&str]) -> (Result<()>, Duration) {
        let clock = Clock::machine();
        let result = watch(scripts.len(), |rank, error_file| {
            let mut command = Command::new("sh");
            command
                .args(["-c", scripts[rank]])
                .env(ERROR_FILE, error_file)
                .stdin(Stdio::null());
            command
        });
        (result, clock.now())
    }

    fn failure(list: &[&str]) -> (String, Duration) {
        let (result, time) = scripts(list);
        (result.unwrap_err().to_string(), time)
    }

    #[test]
    fn all_succeed() {
        scripts(&["exit 0", "sleep 0.05", "true"]).0.unwrap();
    }

    #[test]
    fn a_failure_ends_the_others_at_once() {
        let (text, time) = failure(&["exec sleep 60", "exit 3", "exec sleep 60"]);
        assert!(text.contains("rank 1 ended with exit code 3"), "{text}");
        assert!(time < GRACE, "{time:?}");
    }

    #[test]
    fn a_killed_rank_is_named_with_its_signal() {
        let (text, _) = failure(&["exec sleep 60", "exec sleep 60", "kill -9 $$"]);
        assert_eq!(text, "rank 2 was killed by signal 9 (SIGKILL)");
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
        let error = watch(2, |rank, _| {
            let mut command = Command::new(["sleep", "./no such program"][rank]);
            command.arg("60");
            command
        });
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("rank 1 of 2") && text.contains("no such program"),
            "{text}"
        );
        assert!(clock.now() < Duration::from_secs(10));
    }
}
