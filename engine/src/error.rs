//! Everything that can go wrong, said for the reader at 3 a.m.: who, with whom, doing what, what came, what to try.

use std::{io, sync::Arc, time::Duration};

use fabric_kernels::KernelError;

/// The result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the engine. Cheap to clone, because the first one on a communicator is returned by every later call.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller asked for something impossible.
    #[error("{what}. {hint}")]
    Argument {
        /// What is wrong.
        what: String,
        /// What to do instead.
        hint: String,
    },
    /// The operating system refused something.
    #[error("rank {rank}: {doing}: {source}")]
    Io {
        /// This rank.
        rank: usize,
        /// What was being done, and to what.
        doing: String,
        /// The system's own error.
        source: Arc<io::Error>,
    },
    /// A peer is gone: its process ended, or it has been silent for too long.
    #[error("{0}")]
    PeerLost(Arc<PeerLost>),
    /// An operation did not complete before its deadline.
    #[error(
        "rank {rank}: {operation} was not complete after {} s; waiting for {}. Look at what those ranks are doing, or \
         raise the time-out (FABRIC_TIMEOUT_S)",
        after.as_secs_f32(), ranks(waiting_for)
    )]
    Timeout {
        /// This rank.
        rank: usize,
        /// The operation that did not complete.
        operation: String,
        /// The peers it still waited for.
        waiting_for: Vec<usize>,
        /// How long it waited.
        after: Duration,
    },
    /// Two ranks are not doing the same thing.
    #[error(
        "rank {rank} and rank {peer} have diverged: rank {rank} is in {ours}, rank {peer} is in {theirs}. All ranks \
         must make the same calls in the same order with the same sizes"
    )]
    Diverged {
        /// This rank.
        rank: usize,
        /// The rank that does something else.
        peer: usize,
        /// What this rank is doing.
        ours: String,
        /// What the peer is doing.
        theirs: String,
    },
    /// What came from a peer is not what the peer sent, or not when it sent it.
    #[error(
        "rank {rank}: {operation}: a record from rank {peer} fails authentication ({record}): it was changed, repeated, \
         moved or left out on the way, and nothing of it was used. Somebody or something between these ranks changes what \
         they send: look for a proxy or a broken link, or use a network that you trust"
    )]
    Tampered {
        /// This rank.
        rank: usize,
        /// The rank from which the record should be.
        peer: usize,
        /// The operation that waited for it.
        operation: String,
        /// Which record it is.
        record: String,
    },
    /// Somebody ended the job: another rank's error, a signal, or the caller's own abort.
    #[error("rank {rank}: stopped because {reason}")]
    Aborted {
        /// This rank.
        rank: usize,
        /// The first cause, in words.
        reason: String,
    },
    /// The ranks could not find or recognise each other.
    #[error("rank {rank}: {what}. {hint}")]
    Rendezvous {
        /// This rank.
        rank: usize,
        /// What is wrong.
        what: String,
        /// What to try.
        hint: String,
    },
    /// The model, its hooks or its plan do not fit what was set up.
    #[error("rank {rank}: {what}. {hint}")]
    Model {
        /// This rank.
        rank: usize,
        /// What is wrong.
        what: String,
        /// What to try.
        hint: String,
    },
    /// A tensor library refused something.
    #[error("{doing}: {source}")]
    Library {
        /// What was asked of it.
        doing: String,
        /// Its own error.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// NCCL, or the search for it, failed.
    #[error("{}{operation}: {what}. {hint}", who(*rank))]
    Nccl {
        /// This rank, where there is one already.
        rank: Option<usize>,
        /// The function, or what was done.
        operation: String,
        /// NCCL's result code, where it gave one.
        code: Option<i32>,
        /// What came.
        what: String,
        /// What to try.
        hint: String,
    },
    /// The arithmetic refused its operands.
    #[error("rank {rank}: {operation}: {source}")]
    Kernel {
        /// This rank.
        rank: usize,
        /// The operation that needed it.
        operation: String,
        /// The kernel's own error.
        source: KernelError,
    },
}

/// What is known about a rank that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerLost {
    /// The rank that reports.
    pub rank: usize,
    /// The rank that is gone.
    pub peer: usize,
    /// How that was noticed.
    pub how: String,
    /// The last operation it joined, as far as any survivor knows.
    pub last_joined: Option<String>,
    /// The operation that waits for it.
    pub waiting: Option<String>,
}

impl std::fmt::Display for PeerLost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "rank {}: rank {} is gone ({}). ",
            self.rank, self.peer, self.how
        )?;
        match &self.last_joined {
            Some(operation) => write!(f, "The last operation it joined: {operation}. ")?,
            None => write!(f, "It joined no operation yet. ")?,
        }
        match &self.waiting {
            Some(operation) => write!(f, "Waiting for it: {operation}. ")?,
            None => write!(f, "No operation waits for it yet. ")?,
        }
        write!(f, "Rank {}'s own output says why it stopped", self.peer)
    }
}

impl Error {
    /// The caller's mistake: what is wrong, and what to do instead.
    pub fn argument(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Argument {
            what: what.into(),
            hint: hint.into(),
        }
    }

    /// A refusal of the operating system while `rank` was `doing` something.
    pub fn io(rank: usize, doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            rank,
            doing: doing.into(),
            source: Arc::new(source.into()),
        }
    }

    /// A model, hook or plan that does not fit.
    pub fn model(rank: usize, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Model {
            rank,
            what: what.into(),
            hint: hint.into(),
        }
    }

    /// A rendezvous that failed.
    pub fn rendezvous(rank: usize, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Rendezvous {
            rank,
            what: what.into(),
            hint: hint.into(),
        }
    }

    /// A tensor library's refusal while it was `doing` something.
    pub fn library(
        doing: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self::Library {
            doing: doing.into(),
            source: Arc::new(source),
        }
    }

    /// Arithmetic that was refused during `operation`, which is put into words only then.
    pub fn kernel(
        rank: usize,
        operation: impl std::fmt::Display,
    ) -> impl FnOnce(KernelError) -> Self {
        move |source| Self::Kernel {
            rank,
            operation: operation.to_string(),
            source,
        }
    }

    /// Whether this is the end of another rank rather than a mistake of this one.
    pub fn is_from_peer(&self) -> bool {
        const REMOTE: Option<i32> = Some(6); // ncclRemoteError
        match self {
            Self::PeerLost(_) | Self::Aborted { .. } => true,
            Self::Nccl { code, .. } => *code == REMOTE,
            _ => false,
        }
    }
}

/// A device's refusal at a place that knows no more of it than its own words.
impl From<KernelError> for Error {
    fn from(source: KernelError) -> Self {
        Self::library("work over memory", source)
    }
}

/// "rank 3: ", or nothing.
fn who(rank: Option<usize>) -> String {
    rank.map_or_else(String::new, |rank| format!("rank {rank}: "))
}

/// "rank 3", "ranks 1, 4".
pub(crate) fn ranks(ranks: &[usize]) -> String {
    let list = ranks
        .iter()
        .map(usize::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    format!("rank{} {list}", if ranks.len() == 1 { "" } else { "s" })
}
