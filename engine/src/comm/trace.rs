//! What happened, in order: a bounded record of gradients that became ready and operations that were submitted and
//! completed, from [`Trace::start`] on. Tests assert order from it; `to_chrome` gives the picture to people.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{clock::Clock, wire::frame::Label};

const CAPACITY: usize = 1 << 16; // events kept; the oldest are forgotten

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A backward began; `sync`: its gradients will be reduced.
    Backward {
        /// Whether this backward ends with a reduction.
        sync: bool,
    },
    /// The gradient of a parameter is ready.
    Ready {
        /// The parameter's position in the model's registration order.
        param: usize,
    },
    /// An operation was submitted.
    Submitted {
        /// Its number on its communicator.
        sequence: u64,
        /// What for.
        label: Label,
        /// The operation's name.
        op: &'static str,
        /// Bytes of the full vector.
        bytes: usize,
    },
    /// An operation is complete.
    Completed {
        /// Its number on its communicator.
        sequence: u64,
    },
}

/// An event and when it happened, on the communicator's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// When.
    pub at: Duration,
    /// What.
    pub event: Event,
}

/// The record. Clones share it.
#[derive(Clone, Debug)]
pub struct Trace {
    clock: Clock,
    book: Arc<Book>,
}

#[derive(Debug)]
struct Book {
    is_open: AtomicBool,
    records: Mutex<VecDeque<Record>>,
}

impl Trace {
    /// An empty record on `clock`, in which nothing is noted yet.
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            book: Arc::new(Book {
                is_open: AtomicBool::new(false),
                records: Mutex::default(),
            }),
        }
    }

    /// Note from now on what happens: a tenth of a microsecond for an operation, which its caller may find long.
    pub fn start(&self) {
        self.lock().reserve(CAPACITY);
        self.book.is_open.store(true, Ordering::Release);
    }

    /// The clock by which things are noted.
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Whether anything is noted.
    pub fn is_on(&self) -> bool {
        self.book.is_open.load(Ordering::Relaxed)
    }

    /// Note that `event` happened now, if anything is noted.
    pub fn note(&self, event: Event) {
        if !self.is_on() {
            return;
        }
        let mut records = self.lock();
        if records.len() == CAPACITY {
            records.pop_front();
        }
        records.push_back(Record {
            at: self.clock.now(),
            event,
        });
    }

    /// Everything noted, oldest first.
    pub fn records(&self) -> Vec<Record> {
        self.lock().iter().cloned().collect()
    }

    /// Forget everything.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// The record as a Chrome trace (JSON): open it in a trace viewer to see what overlaps what.
    pub fn to_chrome(&self, rank: usize) -> String {
        let records = self.records();
        let micros = |at: Duration| at.as_secs_f64() * 1e6;
        let events = records.iter().enumerate().filter_map(|(index, record)| match &record.event {
            Event::Submitted { sequence, label, op, bytes } => {
                let end = records[index..].iter().find(
                    |later| matches!(later.event, Event::Completed { sequence: done } if done == *sequence),
                )?;
                Some(serde_json::json!({
                    "name": format!("{op} {label}{bytes} B"), "ph": "X", "pid": rank, "tid": "collectives",
                    "ts": micros(record.at), "dur": micros(end.at - record.at), "args": {"sequence": sequence},
                }))
            }
            Event::Ready { param } => Some(serde_json::json!({
                "name": format!("gradient {param}"), "ph": "i", "s": "t", "pid": rank, "tid": "backward",
                "ts": micros(record.at),
            })),
            Event::Backward { sync } => Some(serde_json::json!({
                "name": if *sync { "backward" } else { "backward (no sync)" }, "ph": "i", "s": "p", "pid": rank,
                "tid": "backward", "ts": micros(record.at),
            })),
            Event::Completed { .. } => None,
        });
        serde_json::json!({ "traceEvents": events.collect::<Vec<_>>() }).to_string()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Record>> {
        let records = &self.book.records;
        records.lock().unwrap_or_else(|held| held.into_inner())
    }
}
