//! The watch over one communicator: a thread that looks whether what was started is done, whether its time is up, and
//! whether NCCL or anybody else has failed; then it aborts NCCL's communicator, so that no stream waits for ever.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, Weak},
    thread::JoinHandle,
    time::Duration,
};

use super::{Comm, flight::Flight};
use crate::{
    clock::Clock,
    comm::{
        Rank,
        host::{Host, Reporter},
        trace::{Event, Trace},
    },
    error::{Error, Result},
    signal::Signal,
    wire::{frame::OpCode, ledger::Ledger},
};

const SHORTEST_NAP: Duration = Duration::from_micros(200);
const LONGEST_NAP: Duration = Duration::from_millis(10);

/// Follows what was submitted, until it is done.
pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    rank: Rank,
    size: usize,
    clock: Clock,
    signal: Signal,
    ledger: Ledger,
    trace: Trace,
    reporter: Reporter,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    flights: VecDeque<(Flight, Duration)>, // and when it was submitted
    comm: Weak<Comm>,
    is_over: bool,
}

impl Watch {
    /// A watch beside the hosts' communicator, over whose control line failures are told.
    pub(super) fn new(host: &Host) -> Result<Self> {
        use crate::comm::Communicator;
        let rank = host.rank();
        let shared = Arc::new(Shared {
            rank,
            size: host.size(),
            clock: host.clock().clone(),
            signal: host.aborter().signal().clone(),
            ledger: host.ledger().clone(),
            trace: host.trace(),
            reporter: host.reporter(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let own = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("fabric-nccl-{rank}"))
            .spawn(move || own.run())
            .map_err(|error| Error::io(rank, "start the watch over NCCL", error))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Abort this one when something fails.
    pub(super) fn guard(&self, comm: &Arc<Comm>) {
        self.shared.lock().comm = Arc::downgrade(comm);
    }

    /// See this one to its end.
    pub(super) fn follow(&self, flight: Flight) {
        let now = self.shared.clock.now();
        self.shared.lock().flights.push_back((flight, now));
        self.shared.changed.notify_all();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there was a mistake, and has been printed
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics halfway through a change.
        self.state.lock().unwrap_or_else(|held| held.into_inner())
    }

    fn run(&self) {
        let mut nap = SHORTEST_NAP;
        loop {
            let mut state = self.lock();
            if state.is_over {
                return;
            }
            if state.flights.is_empty() {
                // Nothing runs on the device that a failure could leave waiting.
                nap = SHORTEST_NAP;
                drop(self.changed.wait(state));
                continue;
            }
            let before = state.flights.len();
            let trouble = self.look(&mut state);
            let (landed, comm) = (state.flights.len() < before, state.comm.clone());
            drop(state);
            let failed = comm.upgrade().and_then(|comm| comm.async_error().err());
            if let Some(error) = trouble.or(failed).or_else(|| self.signal.first()) {
                self.fail(error);
                return;
            }
            nap = match landed {
                true => SHORTEST_NAP,
                false => (nap * 2).min(LONGEST_NAP),
            };
            drop(self.signal.wait(nap));
        }
    }

    /// Let go what is done; the error of what is late, or has failed.
    fn look(&self, state: &mut State) -> Option<Error> {
        while let Some((flight, begun)) = state.flights.front() {
            match flight.done.is_past() {
                Ok(true) => {
                    let sequence = flight.stamp.sequence;
                    self.trace.note(Event::Completed { sequence });
                    if flight.stamp.op != OpCode::SendRecv {
                        let others = (0..self.size).filter(|peer| *peer != self.rank);
                        others.for_each(|peer| self.ledger.saw(peer, sequence));
                    }
                    state.flights.pop_front();
                    if state.flights.is_empty() {
                        self.ledger.leave();
                    }
                }
                Ok(false) if self.clock.now() > begun.saturating_add(flight.patience) => {
                    return Some(Error::Timeout {
                        rank: self.rank,
                        operation: flight.stamp.to_string(),
                        waiting_for: (0..self.size).filter(|peer| *peer != self.rank).collect(),
                        after: flight.patience,
                    });
                }
                Ok(false) => return None,
                Err(error) => return Some(Error::kernel(self.rank, flight.stamp)(error)),
            }
        }
        None
    }

    /// Tell everybody, and let the streams go on.
    fn fail(&self, error: Error) {
        let first = self.reporter.fail(error);
        let mut state = self.lock();
        let comm = state.comm.clone();
        state.flights.clear();
        drop(state);
        if let Some(comm) = comm.upgrade()
            && let Err(error) = comm.abort(first.to_string())
        {
            tracing::warn!(%error, "NCCL's communicator was not aborted");
        }
    }
}
