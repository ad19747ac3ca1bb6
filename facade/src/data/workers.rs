//! Threads that make a loader's batches ahead of its caller.
//!
//! ```text
//! caller --tickets (batch numbers, at most workers x prefetch ahead)--> workers --(number, batch)--> caller, who
//! puts early ones aside until their turn
//! ```

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::{Error, Result};

/// Running workers. Dropping them stops and joins them, after the batch that each has in hand.
pub(super) struct Workers<B> {
    tickets: Option<Sender<usize>>,
    batches: Receiver<(usize, Result<B>)>,
    early: HashMap<usize, Result<B>>,
    issued: usize,
    taken: usize,
    count: usize, // batches
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl<B: Send + 'static> Workers<B> {
    /// Start `threads` workers on `count` batches.
    pub(super) fn start(
        threads: usize,
        prefetch: usize,
        count: usize,
        make: impl Fn(usize) -> Result<B> + Send + Sync + 'static,
    ) -> Result<Self> {
        // Both channels are bounded by the tickets: the caller issues a new one only when it takes a batch.
        let (tickets, issued) = unbounded();
        let (done, batches) = unbounded();
        let mut workers = Self {
            tickets: Some(tickets),
            batches,
            early: HashMap::new(),
            issued: 0,
            taken: 0,
            count,
            stop: Arc::default(),
            threads: Vec::with_capacity(threads),
        };
        let make = Arc::new(make);
        for number in 0..threads {
            let (make, stop) = (make.clone(), workers.stop.clone());
            let (issued, done) = (issued.clone(), done.clone());
            let body = move || work(&issued, &done, &stop, &*make);
            let thread = std::thread::Builder::new().name(format!("loader {number}"));
            workers.threads.push(thread.spawn(body).map_err(|why| {
                Error::argument(
                    format!("the loader cannot start worker {number} of {threads}: {why}"),
                    "Ask for fewer workers",
                )
            })?);
        }
        for _ in 0..threads.saturating_mul(prefetch).min(count) {
            workers.issue();
        }
        Ok(workers)
    }
}

impl<B> Workers<B> {
    /// The next batch in order.
    pub(super) fn next(&mut self) -> Result<B> {
        let number = self.taken;
        let batch = loop {
            if let Some(batch) = self.early.remove(&number) {
                break batch;
            }
            match self.batches.recv() {
                Ok((done, batch)) => drop(self.early.insert(done, batch)),
                Err(_) => {
                    break Err(Error::new(format!(
                        "the loader's workers ended before batch {number}"
                    )));
                }
            }
        };
        self.taken += 1;
        self.issue();
        batch
    }

    fn issue(&mut self) {
        if self.issued < self.count
            && let Some(tickets) = &self.tickets
        {
            let _ = tickets.send(self.issued); // refused only when no worker is left, which next() reports
            self.issued += 1;
        }
    }
}

fn work<B>(
    tickets: &Receiver<usize>,
    done: &Sender<(usize, Result<B>)>,
    stop: &AtomicBool,
    make: &dyn Fn(usize) -> Result<B>,
) {
    for number in tickets {
        if stop.load(Ordering::Relaxed) || done.send((number, make(number))).is_err() {
            return;
        }
    }
}

impl<B> Drop for Workers<B> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.tickets = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic inside was reported as its batch's error
        }
    }
}
