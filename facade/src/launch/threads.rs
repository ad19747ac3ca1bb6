//! Ranks as threads of one process: for tests, and for places that cannot run a program again.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, OnceLock, PoisonError},
};

use crate::{Error, Result};

/// The stack that a rank gets unless told otherwise: deep models recurse, and untouched pages cost nothing.
pub const STACK_BYTES: usize = 64 << 20;

/// Run `body(rank)` on `count` threads and return what they return, by rank. No thread begins before all exist, and all
/// have ended when this returns.
///
/// ```
/// use fabric::launch::threads;
///
/// let squares = threads::run(3, threads::STACK_BYTES, |rank| Ok(rank * rank))?;
/// assert_eq!(squares, [0, 1, 4]);
/// # Ok::<(), fabric::Error>(())
/// ```
///
/// # Errors
/// The first rank's that failed by itself; when all only failed because another did, the first of them. A panic is an
/// error that names the rank and shows the panic's text.
pub fn run<T: Send>(
    count: usize,
    stack_bytes: usize,
    body: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    if count == 0 {
        return Err(Error::argument("0 ranks", "Ask for at least one"));
    }
    let start: OnceLock<bool> = OnceLock::new();
    let failures = Mutex::new(Vec::new()); // in the order of time
    let rank_body = &|rank: usize| {
        if !*start.wait() {
            return None;
        }
        caught(rank, || body(rank))
            .map_err(|error| {
                failures
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(error)
            })
            .ok()
    };
    let results = std::thread::scope(|scope| {
        let mut threads = Vec::with_capacity(count);
        for rank in 0..count {
            let thread = std::thread::Builder::new()
                .name(format!("rank {rank}"))
                .stack_size(stack_bytes);
            match thread.spawn_scoped(scope, move || rank_body(rank)) {
                Ok(handle) => threads.push(handle),
                Err(why) => {
                    let _ = start.set(false);
                    return Err(Error::argument(
                        format!("rank {rank} of {count} cannot have a thread: {why}"),
                        "Ask for fewer ranks or a smaller stack",
                    ));
                }
            }
        }
        let _ = start.set(true);
        Ok(threads
            .into_iter()
            .map(|thread| thread.join().ok().flatten())
            .collect::<Vec<_>>())
    })?;
    let failures = failures
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    match first_own(failures) {
        Some(error) => Err(error),
        None => results
            .into_iter()
            .collect::<Option<_>>()
            .ok_or_else(|| Error::new("a rank's thread ended without a result")),
    }
}

/// What `body` returns; its panic is an error of `rank`.
pub(crate) fn caught<T>(rank: usize, body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic_text(&*panic);
        Err(Error::new(format!("rank {rank} panicked: {text}")))
    })
}

/// The first error that is not the echo of another rank's; else the first.
fn first_own(mut failures: Vec<Error>) -> Option<Error> {
    let is_own = |error: &Error| !error.engine().is_some_and(|error| error.is_from_peer());
    let first = failures.iter().position(is_own).unwrap_or(0);
    (first < failures.len()).then(|| failures.swap_remove(first))
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(a panic without text)")
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    fn echo(rank: usize) -> Error {
        fabric_engine::Error::Aborted {
            rank,
            reason: "rank 2 ended the job".into(),
        }
        .into()
    }

    #[test]
    fn line_11_ranks_run_at_the_same_time_and_return_by_rank() {
        let meet = Barrier::new(4);
        let run = run(4, STACK_BYTES, |rank| {
            meet.wait();
            assert_eq!(
                std::thread::current().name(),
                Some(format!("rank {rank}").as_str())
            );
            Ok(rank * 10)
        });
        assert_eq!(run.unwrap(), [0, 10, 20, 30]);
    }

    #[test]
    fn the_ranks_own_failure_is_returned_before_its_echoes() {
        let echoes = Barrier::new(3);
        let ended = AtomicUsize::new(0);
        let result = run(3, STACK_BYTES, |rank| -> Result<()> {
            if rank == 2 {
                echoes.wait();
                ended.fetch_add(1, Ordering::Relaxed);
                return Err(Error::new("out of data"));
            }
            echoes.wait();
            ended.fetch_add(1, Ordering::Relaxed);
            Err(echo(rank))
        });
        assert_eq!(result.unwrap_err().to_string(), "out of data");
        assert_eq!(ended.into_inner(), 3);
    }

    #[test]
    fn only_echoes_return_the_first() {
        assert!(
            first_own(vec![echo(1), echo(0)])
                .unwrap()
                .to_string()
                .contains("rank 1")
        );
        assert!(first_own(Vec::new()).is_none());
    }

    #[test]
    fn a_panic_names_its_rank_and_its_text() {
        let result = run(2, STACK_BYTES, |rank| {
            assert!(rank == 0, "no luck on {rank}");
            Ok(())
        });
        let text = result.unwrap_err().to_string();
        assert!(
            text.contains("rank 1 panicked") && text.contains("no luck on 1"),
            "{text}"
        );
    }

    #[test]
    fn no_rank_begins_when_one_cannot_have_a_thread() {
        let begun = AtomicUsize::new(0);
        let result = run(2, usize::MAX / 2, |_| {
            begun.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        assert!(
            result
                .unwrap_err()
                .to_string()
                .contains("cannot have a thread")
        );
        assert_eq!(begun.into_inner(), 0);
        assert!(run(0, STACK_BYTES, |_| Ok(())).is_err());
    }
}
