//! How ranks ended, and which of their endings is the first cause. Pure: the supervisor collects, this decides.

use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

use signal_hook::low_level::signal_name;

use super::words::LastWords;

/// A rank of a supervised job failed, and is the first cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct RankFailed {
    rank: usize,
    exit_code: u8,
    text: String,
}

impl RankFailed {
    /// The rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What a shell would say of it: its exit code, or 128 and the number of the signal that killed it.
    pub fn exit_code(&self) -> u8 {
        self.exit_code
    }
}

/// How one rank ended.
#[derive(Clone, Debug)]
pub(super) struct Ending {
    pub(super) rank: usize,
    pub(super) status: ExitStatus,
    pub(super) words: Option<LastWords>,
    /// The signals that the supervisor had sent to it by then.
    pub(super) sent: Vec<i32>,
}

/// Why a rank failed, from the most to the least telling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    Own,
    Peer,
    Stopped,
}

impl Ending {
    /// Why it failed; `None` when it succeeded. A rank that ends by a signal of ours is `Stopped`, whatever it says.
    pub(super) fn cause(&self) -> Option<Cause> {
        if self.status.success() {
            return None;
        }
        let by_us = self.sent.iter().any(|&signal| {
            self.status.signal() == Some(signal) || self.status.code() == Some(128 + signal)
        });
        Some(match &self.words {
            _ if by_us => Cause::Stopped,
            Some(words) if words.from_peer => Cause::Peer,
            _ => Cause::Own,
        })
    }

    pub(super) fn failure(&self) -> RankFailed {
        let code = match (self.status.signal(), self.status.code()) {
            (Some(signal), _) => 128 + signal,
            (None, code) => code.unwrap_or(1),
        };
        RankFailed {
            rank: self.rank,
            exit_code: u8::try_from(code).unwrap_or(1),
            text: self.text(),
        }
    }

    /// "rank 2 was killed by signal 9 (SIGKILL)"; "rank 1 failed: the file is gone".
    pub(super) fn text(&self) -> String {
        let rank = self.rank;
        if let Some(words) = &self.words {
            let echo = format!("rank {rank}: "); // the engine's errors begin so
            let text = words.text.strip_prefix(&echo).unwrap_or(&words.text);
            return format!("rank {rank} failed: {text}");
        }
        match (self.status.signal(), self.status.code()) {
            (Some(signal), _) => {
                let name = signal_name(signal).unwrap_or("an unnamed signal");
                let ours = if self.sent.contains(&signal) {
                    ", which its supervisor sent"
                } else {
                    ""
                };
                format!("rank {rank} was killed by signal {signal} ({name}){ours}")
            }
            (None, Some(101)) => {
                format!("rank {rank} panicked (exit code 101); its own output says where")
            }
            (None, code) => {
                let code = code.unwrap_or(-1);
                format!("rank {rank} ended with exit code {code}; its own output may say why")
            }
        }
    }
}

/// The first cause among `endings`, which are in the order of time: the first failure of a rank's own; without one the
/// first echo of a lost rank; without that the first rank that was stopped.
pub(super) fn first_cause(endings: &[Ending]) -> Option<&Ending> {
    let failed = endings.iter().filter(|ending| ending.cause().is_some());
    failed.min_by_key(|ending| ending.cause()) // the first of equals
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILL: i32 = 9;
    const TERM: i32 = 15;

    fn exited(rank: usize, code: i32) -> Ending {
        Ending {
            rank,
            status: ExitStatus::from_raw(code << 8),
            words: None,
            sent: Vec::new(),
        }
    }

    fn killed(rank: usize, signal: i32, sent: &[i32]) -> Ending {
        Ending {
            status: ExitStatus::from_raw(signal),
            sent: sent.to_vec(),
            ..exited(rank, 0)
        }
    }

    fn failed(rank: usize, text: &str, from_peer: bool) -> Ending {
        let text = text.into();
        Ending {
            words: Some(LastWords { text, from_peer }),
            ..exited(rank, 1)
        }
    }

    fn cause(endings: &[Ending]) -> String {
        first_cause(endings).map(Ending::text).unwrap_or_default()
    }

    #[test]
    fn success_has_no_cause() {
        assert_eq!(cause(&[exited(0, 0), exited(1, 0)]), "");
        assert_eq!(cause(&[]), "");
    }

    #[test]
    fn a_killed_rank_is_shown_before_those_that_missed_it() {
        let endings = [
            failed(0, "rank 2 is gone", true),
            killed(2, KILL, &[TERM]),
            killed(1, TERM, &[TERM]),
        ];
        assert_eq!(cause(&endings), "rank 2 was killed by signal 9 (SIGKILL)");
    }

    #[test]
    fn the_first_own_failure_wins() {
        let endings = [
            exited(3, 0),
            failed(0, "rank 1 is gone", true),
            failed(1, "the file is gone", false),
            exited(2, 1),
        ];
        assert_eq!(cause(&endings), "rank 1 failed: the file is gone");
    }

    #[test]
    fn a_rank_that_we_stopped_is_no_cause_even_if_it_says_so() {
        let mut stopped = failed(1, "it received SIGTERM", false);
        stopped.status = ExitStatus::from_raw((128 + TERM) << 8);
        stopped.sent = vec![TERM];
        assert_eq!(stopped.cause(), Some(Cause::Stopped));
        let endings = [stopped.clone(), failed(0, "rank 2 is gone", true)];
        assert_eq!(cause(&endings), "rank 0 failed: rank 2 is gone");
        stopped.sent.clear(); // somebody else sent it
        assert_eq!(cause(&[stopped]), "rank 1 failed: it received SIGTERM");
    }

    #[test]
    fn our_kill_counts_only_once_it_was_sent() {
        assert_eq!(killed(0, KILL, &[TERM]).cause(), Some(Cause::Own));
        assert_eq!(killed(0, KILL, &[TERM, KILL]).cause(), Some(Cause::Stopped));
        let text = cause(&[killed(0, KILL, &[TERM, KILL])]);
        assert!(text.ends_with("which its supervisor sent"), "{text}");
    }

    #[test]
    fn the_rank_is_named_once() {
        let text = failed(3, "rank 3: no more memory", false).text();
        assert_eq!(text, "rank 3 failed: no more memory");
        let text = failed(0, "rank 3: no more memory", true).text();
        assert_eq!(text, "rank 0 failed: rank 3: no more memory");
    }

    #[test]
    fn a_rank_without_last_words_shows_how_it_ended() {
        assert!(
            exited(4, 3)
                .text()
                .contains("rank 4 ended with exit code 3")
        );
        assert!(exited(4, 101).text().contains("rank 4 panicked"));
    }
}
