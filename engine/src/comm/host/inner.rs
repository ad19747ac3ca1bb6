//! What a communicator's caller and its thread have in common: the executor, the first error, and the counts.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};
use std::time::Duration;

use fabric_kernels::Dtype;

use super::{
    super::{
        Call, Data, Rank, Spent,
        trace::{Event, Trace},
    },
    Begun, GRACE, Job, Options,
    messages::Messages,
    queue::Taker,
    shared::SharedMemory,
};
use crate::{
    error::{Error, PeerLost, Result},
    rendezvous::Control,
    schedule::choose::WireKind,
    signal::Signal,
    wire::{frame::Stamp, ledger::Ledger, shm::Arena},
};

/// What runs schedules.
pub(super) enum Executor {
    Messages(Box<Messages>),
    Shared(Box<SharedMemory>),
}

impl Executor {
    pub(super) fn run(
        &mut self,
        begun: &Begun,
        call: &Call,
        data: &mut Data,
        patience: Duration,
        ledger: &Ledger,
    ) -> Result<Spent> {
        match self {
            Self::Messages(messages) => {
                ledger.enter(&begun.stamp);
                messages.run(&begun.stamp, call, data, patience)
            }
            Self::Shared(shared) => shared.run(begun, call, data, patience), // which enters when it finds the time
        }
    }

    pub(super) fn price(&mut self, call: &Call, dtype: Dtype, numel: usize) -> Spent {
        match self {
            Self::Messages(messages) => messages.price(call, dtype, numel),
            Self::Shared(shared) => shared.price(call, dtype, numel),
        }
    }
}

/// What both hold.
pub(super) struct Shared {
    pub(super) rank: Rank,
    pub(super) size: usize,
    pub(super) options: Options,
    pub(super) signal: Signal,
    pub(super) ledger: Ledger,
    pub(super) control: Option<Control>,
    pub(super) trace: Trace,
    pub(super) kind: WireKind,
    pub(super) arena: Option<Arc<Arena>>, // where slabs come from, when peers can reach them
    pub(super) executor: Mutex<Executor>,
    pub(super) spent: Account,
}

/// What was spent: written by whoever holds the executor, read by anybody.
#[derive(Default)]
pub(super) struct Account {
    collectives: AtomicU64,
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl Account {
    fn add(&self, cost: Spent) {
        for (sum, cost) in [
            (&self.collectives, cost.collectives),
            (&self.messages, cost.messages),
            (&self.bytes, cost.bytes),
        ] {
            sum.store(sum.load(Ordering::Relaxed) + cost, Ordering::Relaxed);
        }
    }

    pub(super) fn read(&self) -> Spent {
        Spent {
            collectives: self.collectives.load(Ordering::Relaxed),
            messages: self.messages.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    /// On failure the executor keeps the memory.
    pub(super) fn run(&self, begun: &Begun, call: &Call, data: &mut Data) -> Result<()> {
        let patience = call.deadline.unwrap_or(self.options.deadline);
        let mut executor = self
            .executor
            .lock()
            .unwrap_or_else(|held| held.into_inner());
        match executor.run(begun, call, data, patience, &self.ledger) {
            Ok(cost) => {
                self.ledger.leave();
                self.spent.add(cost);
                if self.trace.is_on() {
                    self.trace.note(Event::Completed {
                        sequence: begun.stamp.sequence,
                    });
                }
                Ok(())
            }
            Err(error) => Err(self.failed(&begun.stamp, error)),
        }
    }

    #[cold]
    fn failed(&self, stamp: &Stamp, error: Error) -> Error {
        let first = self.fail(error);
        // The first error, which may have been raised just before this operation began.
        self.check(stamp).err().unwrap_or(first)
    }

    /// Has somebody failed? A peer that was lost while nobody waited for it is missed by `stamp` now.
    #[inline]
    pub(super) fn check(&self, stamp: &Stamp) -> Result<()> {
        match self.signal.is_raised() {
            false => Ok(()),
            true => self.failed_before(stamp),
        }
    }

    #[cold]
    fn failed_before(&self, stamp: &Stamp) -> Result<()> {
        self.signal.amend(|error| match error {
            Error::PeerLost(lost) if lost.waiting.is_none() => {
                let waiting = Some(format!("{stamp} on rank {}", self.rank));
                *error = Error::PeerLost(Arc::new(PeerLost {
                    waiting,
                    ..PeerLost::clone(lost)
                }));
            }
            _ => {}
        });
        self.signal.check()
    }

    /// Keep the first error, tell everybody, and prefer the hub's story about a peer that is gone to our own.
    pub(super) fn fail(&self, error: Error) -> Error {
        let Some(control) = &self.control else {
            return self.signal.raise(error);
        };
        match &error {
            Error::PeerLost(lost) => {
                control.report_lost(lost.peer, lost.how.clone());
                self.signal
                    .wait(GRACE)
                    .unwrap_or_else(|| self.signal.raise(error))
            }
            Error::Aborted { .. } => self.signal.raise(error),
            // NCCL sees a peer's end as a broken connection; the hub knows whose it was, and where it stood.
            Error::Nccl { .. } if error.is_from_peer() => self
                .signal
                .wait(GRACE)
                .unwrap_or_else(|| self.signal.raise(error)),
            _ if self.signal.is_raised() => self.signal.raise(error),
            _ => {
                let first = self.signal.raise(error.clone());
                control.abort(self.rank, error.to_string());
                first
            }
        }
    }
}

/// The worker's life: one job after the other, in order of submission.
pub(super) fn work(shared: &Shared, jobs: &Taker<Job>, pending: &AtomicUsize) {
    while let Some(job) = jobs.take() {
        let mut held = Held {
            shared,
            data: Some(job.data),
        };
        let data = held.data.as_mut().expect("put there above");
        let result =
            (shared.check(&job.begun.stamp)).and_then(|()| shared.run(&job.begun, &job.call, data));
        let data = held.data.take().expect("it is still there");
        pending.fetch_sub(1, Ordering::AcqRel);
        job.promise.keep(result.map(|()| data));
    }
}

/// The memory of a job that runs. If the job panics, which is a mistake in Fabric, everybody is told, and the memory is never
/// used again, because peers may still store there.
struct Held<'a> {
    shared: &'a Shared,
    data: Option<Data>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(data) = self.data.take() {
            std::mem::forget(data);
            let reason = "the communicator's thread panicked; its output says where";
            self.shared
                .fail(Error::argument(reason, "This is a mistake in Fabric"));
        }
    }
}
