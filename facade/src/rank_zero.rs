//! What rank 0 does for everybody, outside of any Fabric: a message that is said once and not by every rank.
//!
//! The rank is this thread's under [`crate::Fabric::launch_threads`], else this process's: as it has joined the job, or as its
//! launcher has told it in the environment.

use std::{
    cell::Cell,
    collections::HashSet,
    fmt::Display,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

const UNKNOWN: usize = usize::MAX;

thread_local! {
    static THREAD: Cell<Option<usize>> = const { Cell::new(None) };
}
static PROCESS: AtomicUsize = AtomicUsize::new(UNKNOWN);
static SAID: WarningCache = WarningCache::new();

/// This rank; `None` outside of any job.
pub fn rank() -> Option<usize> {
    let joined = match PROCESS.load(Ordering::Relaxed) {
        UNKNOWN => None,
        rank => Some(rank),
    };
    let told = || from_environment(&|name| std::env::var(name).ok());
    THREAD.get().or(joined).or_else(told)
}

/// As launchers tell it: Fabric's own supervisor, then the order of Lightning.
fn from_environment(get: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    let names = [
        "FABRIC_RANK",
        "RANK",
        "LOCAL_RANK",
        "SLURM_PROCID",
        "JSM_NAMESPACE_RANK",
    ];
    let mut numbers = names
        .into_iter()
        .filter_map(|name| get(name)?.trim().parse().ok());
    numbers.next()
}

/// This thread is this rank from now on.
pub(crate) fn this_thread_is(rank: usize) {
    THREAD.set(Some(rank));
}

/// This process is this rank from now on.
pub(crate) fn this_process_is(rank: usize) {
    PROCESS.store(rank, Ordering::Relaxed);
}

/// Run `f` on rank 0, and outside of any job; elsewhere nothing, and `None`.
///
/// ```
/// use fabric::{Fabric, rank_zero::rank_zero_only};
///
/// let done = Fabric::builder().devices(2).build()?.launch_threads(|_| Ok(rank_zero_only(|| 7)))?;
/// assert_eq!(done, [Some(7), None]);
/// # Ok::<(), fabric::Error>(())
/// ```
pub fn rank_zero_only<T>(f: impl FnOnce() -> T) -> Option<T> {
    (rank().unwrap_or(0) == 0).then(f)
}

/// Tell, on rank 0: to the program's subscriber of `tracing`, else to stderr.
pub fn rank_zero_info(text: impl Display) {
    rank_zero_only(|| match tracing::dispatcher::has_been_set() {
        true => tracing::info!("{text}"),
        false => eprintln!("fabric: {text}"),
    });
}

/// Warn, on rank 0: to the program's subscriber of `tracing`, else to stderr.
pub fn rank_zero_warn(text: impl Display) {
    rank_zero_only(|| match tracing::dispatcher::has_been_set() {
        true => tracing::warn!("{text}"),
        false => eprintln!("fabric: warning: {text}"),
    });
}

/// Tell what only a search for an error needs, on rank 0, to the program's subscriber of `tracing` alone.
pub fn rank_zero_debug(text: impl Display) {
    rank_zero_only(|| tracing::debug!("{text}"));
}

/// Warn, on rank 0, of what this process has not been warned of before.
pub fn warn_once(text: impl Display) {
    let text = text.to_string();
    if SAID.is_new(&text) {
        rank_zero_warn(text);
    }
}

/// `[rank: 1] message`, for lines of which every rank prints its own; the message alone outside of any job.
///
/// ```
/// assert_eq!(fabric::rank_zero::rank_prefixed_message("ready", Some(1)), "[rank: 1] ready");
/// assert_eq!(fabric::rank_zero::rank_prefixed_message("ready", None), "ready");
/// ```
pub fn rank_prefixed_message(message: impl Display, rank: Option<usize>) -> String {
    match rank {
        Some(rank) => format!("[rank: {rank}] {message}"),
        None => message.to_string(),
    }
}

/// What was said already.
///
/// ```
/// use fabric::rank_zero::WarningCache;
///
/// static CACHE: WarningCache = WarningCache::new();
/// assert!(CACHE.is_new("the loss is not finite"));
/// assert!(!CACHE.is_new("the loss is not finite"));
/// ```
#[derive(Debug, Default)]
pub struct WarningCache(Mutex<Option<HashSet<String>>>);

impl WarningCache {
    /// Nothing was said.
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Whether this is the first time.
    pub fn is_new(&self, text: &str) -> bool {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.get_or_insert_default().insert(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // UTIL-30, line 60
    #[test]
    fn line_60_the_environments_variables_have_an_order() {
        let names = [
            "JSM_NAMESPACE_RANK",
            "SLURM_PROCID",
            "LOCAL_RANK",
            "RANK",
            "FABRIC_RANK",
        ];
        for known in 0..=names.len() {
            let get = |name: &str| {
                let place = names[..known].iter().position(|known| *known == name)?;
                Some(place.to_string())
            };
            assert_eq!(from_environment(&get), known.checked_sub(1));
        }
        assert_eq!(from_environment(&|_| Some("many".into())), None);
    }

    // UTIL-30, line 60
    #[test]
    fn a_threads_rank_is_its_own() {
        let ranks = [0, 1].map(|rank| {
            let thread = std::thread::spawn(move || {
                this_thread_is(rank);
                (super::rank(), rank_zero_only(|| "done"))
            });
            thread.join().unwrap()
        });
        assert_eq!(ranks, [(Some(0), Some("done")), (Some(1), None)]);
    }
}
