//! An operation in flight, [`Work`], and the [`Desk`] at which its result is left and fetched. A desk's slots are used again
//! and again, so that submitting allocates nothing once there are as many as are in flight at once.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::Data;
use crate::{
    error::{Error, Result},
    signal::Signal,
};

const SLOTS: usize = 16; // there from the start
const YIELDS: u32 = 4; // before a waiter sleeps: many operations are over sooner than a thread is back

/// An operation in flight, which owns its memory. Dropping it early is allowed: the operation runs on (peers count on
/// it), and its memory is freed afterwards.
#[must_use = "an operation's memory comes back from wait()"]
#[derive(Debug)]
pub struct Work(State);

#[derive(Debug)]
enum State {
    Done(Result<Data>),
    Flying(Ticket),
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    Ahead(Box<dyn Ahead>),
}

/// An operation that a device does in the order of its queue: to wait for it is to let the queue wait.
pub(super) trait Ahead: Send + std::fmt::Debug {
    /// Whether the device has done it.
    fn is_done(&self) -> bool;

    /// Let later work of the queue come after it, and take the memory back.
    fn wait(self: Box<Self>) -> Result<Data>;

    /// Wait on this thread until the device has done it.
    fn block(&self) -> Result<()>;
}

impl Work {
    /// An operation that is complete already.
    pub fn done(result: Result<Data>) -> Self {
        Self(State::Done(result))
    }

    /// An operation that a device does.
    #[cfg(feature = "cuda")]
    pub(super) fn ahead(work: Box<dyn Ahead>) -> Self {
        Self(State::Ahead(work))
    }

    /// Whether it is over.
    pub fn is_done(&self) -> bool {
        match &self.0 {
            State::Done(_) => true,
            State::Flying(ticket) => ticket.is_done(),
            State::Ahead(work) => work.is_done(),
        }
    }

    /// Wait on this thread until it is over, also where [`Work::wait`] lets a device wait instead.
    ///
    /// # Errors
    /// The operation's error, or the communicator's first, where a device does it. Others are left for [`Work::wait`].
    pub fn block(&self) -> Result<()> {
        match &self.0 {
            State::Done(_) => Ok(()),
            State::Flying(ticket) => {
                ticket.block();
                Ok(())
            }
            State::Ahead(work) => work.block(),
        }
    }

    /// Wait for the end and take the memory back. What a device does is waited for by its queue, not by this thread: work
    /// that is given to it later comes after the operation.
    ///
    /// # Errors
    /// The operation's error, or the communicator's first. The communicator keeps the memory then.
    pub fn wait(self) -> Result<Data> {
        match self.0 {
            State::Done(result) => result,
            State::Flying(ticket) => ticket.wait(),
            State::Ahead(work) => work.wait(),
        }
    }
}

/// Where a communicator's thread leaves results, and callers fetch them. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Desk(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    shelf: Mutex<Shelf>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Shelf {
    slots: Vec<Slot>,
    free: Vec<usize>, // those that are nobody's, with room for all
    asleep: usize,    // threads that wait for a change
}

/// One result's place. A promise and a ticket share it; the last of the two to let go frees it.
#[derive(Debug)]
enum Slot {
    Free,
    /// The operation runs, and somebody will ask for it.
    Open,
    /// The operation runs, and nobody will ask for it.
    Forgotten,
    /// The operation is over.
    Kept(Result<Data>),
    /// Nobody runs the operation any more.
    Broken,
}

impl Desk {
    /// A desk with slots for a few operations.
    pub(super) fn new() -> Self {
        let desk = Self::default();
        desk.shelf().grow(SLOTS);
        desk
    }

    /// An operation in flight, and where its result is to be left.
    pub(super) fn open(&self, signal: Signal) -> (Promise, Work) {
        let mut shelf = self.shelf();
        if shelf.free.is_empty() {
            let more = shelf.slots.len().max(1);
            shelf.grow(more);
        }
        let slot = shelf.free.pop().expect("there are more now");
        shelf.slots[slot] = Slot::Open;
        drop(shelf);
        let promise = Promise {
            desk: self.clone(),
            slot,
            is_kept: false,
        };
        let ticket = Ticket {
            desk: self.clone(),
            slot,
            is_used: false,
            signal,
        };
        (promise, Work(State::Flying(ticket)))
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        // Nothing in here panics halfway through a change.
        self.0.shelf.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// The promise lets go. A result that nobody wants is given back, to be dropped without the lock.
    fn settle(&self, slot: usize, end: Slot) -> Option<Slot> {
        let mut shelf = self.shelf();
        if let Slot::Forgotten = shelf.slots[slot] {
            shelf.release(slot);
            return Some(end);
        }
        shelf.slots[slot] = end;
        if shelf.asleep > 0 {
            self.0.changed.notify_all(); // each waits for a slot of its own
        }
        None
    }
}

impl Shelf {
    fn grow(&mut self, more: usize) {
        let first = self.slots.len();
        self.slots.extend((0..more).map(|_| Slot::Free));
        self.free.reserve(self.slots.len());
        self.free.extend(first..self.slots.len());
    }

    fn release(&mut self, slot: usize) -> Slot {
        self.free.push(slot);
        std::mem::replace(&mut self.slots[slot], Slot::Free)
    }
}

/// The duty to leave a result. One that is dropped instead tells the [`Work`] that no result will come.
#[derive(Debug)]
pub(super) struct Promise {
    desk: Desk,
    slot: usize,
    is_kept: bool,
}

impl Promise {
    /// Leave the result; its memory is freed here when the [`Work`] was dropped.
    pub(super) fn keep(mut self, result: Result<Data>) {
        self.is_kept = true;
        drop(self.desk.settle(self.slot, Slot::Kept(result)));
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if !self.is_kept {
            self.desk.settle(self.slot, Slot::Broken);
        }
    }
}

/// The right to a result.
#[derive(Debug)]
struct Ticket {
    desk: Desk,
    slot: usize,
    is_used: bool,
    signal: Signal,
}

impl Ticket {
    fn is_done(&self) -> bool {
        !matches!(self.desk.shelf().slots[self.slot], Slot::Open)
    }

    fn block(&self) {
        drop(self.sleep());
    }

    /// The shelf, once the result is there.
    fn sleep(&self) -> MutexGuard<'_, Shelf> {
        let mut shelf = self.desk.shelf();
        while let Slot::Open = shelf.slots[self.slot] {
            shelf.asleep += 1;
            shelf = (self.desk.0.changed.wait(shelf)).unwrap_or_else(|held| held.into_inner());
            shelf.asleep -= 1;
        }
        shelf
    }

    fn wait(mut self) -> Result<Data> {
        for _ in 0..YIELDS {
            if self.is_done() {
                break;
            }
            std::thread::yield_now();
        }
        let mut shelf = self.sleep();
        let end = shelf.release(self.slot);
        drop(shelf);
        self.is_used = true;
        match end {
            Slot::Kept(result) => result,
            // The thread that worked for the communicator is gone, which it is only after a failure.
            _ => Err(self.signal.first().unwrap_or_else(|| {
                Error::argument(
                    "the communicator ended before this operation",
                    "Keep it until all work is done",
                )
            })),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.is_used {
            return;
        }
        let mut shelf = self.desk.shelf();
        let end = match shelf.slots[self.slot] {
            Slot::Open => std::mem::replace(&mut shelf.slots[self.slot], Slot::Forgotten),
            _ => shelf.release(self.slot),
        };
        drop(shelf);
        drop(end); // memory is given back without the lock
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::buffer::Slab;

    fn data() -> Result<Data> {
        Ok(Data::InPlace(Slab::from_slice(&[7u8])))
    }

    fn slots(desk: &Desk) -> (usize, usize) {
        let shelf = desk.shelf();
        (shelf.slots.len(), shelf.free.len())
    }

    #[test]
    fn a_result_waits_for_its_work_and_a_work_for_its_result() {
        let desk = Desk::new();
        let (promise, work) = desk.open(Signal::new());
        promise.keep(data());
        assert!(work.is_done());
        assert_eq!(work.wait().unwrap().into_output().as_bytes(), [7]);
        let (promise, work) = desk.open(Signal::new());
        assert!(!work.is_done());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(20)); // by then the other sleeps
                promise.keep(data());
            });
            assert!(work.wait().is_ok());
        });
        assert_eq!(slots(&desk), (SLOTS, SLOTS));
    }

    #[test]
    fn slots_are_used_again_whoever_lets_go_last() {
        let desk = Desk::new();
        for turn in 0..10 * SLOTS {
            let (promise, work) = desk.open(Signal::new());
            match turn % 4 {
                0 => {
                    drop(work);
                    promise.keep(data());
                }
                1 => {
                    promise.keep(data());
                    drop(work);
                }
                2 => {
                    drop(work);
                    drop(promise);
                }
                _ => {
                    drop(promise);
                    drop(work);
                }
            }
        }
        assert_eq!(slots(&desk), (SLOTS, SLOTS));
        let flying = (0..SLOTS + 1)
            .map(|_| desk.open(Signal::new()))
            .collect::<Vec<_>>();
        assert_eq!(slots(&desk).0, 2 * SLOTS);
        drop(flying);
        assert_eq!(slots(&desk), (2 * SLOTS, 2 * SLOTS));
    }

    #[test]
    fn a_promise_that_is_dropped_is_an_error_and_the_first_error_is_preferred() {
        let signal = Signal::new();
        let (promise, work) = Desk::new().open(signal.clone());
        drop(promise);
        assert!(work.wait().unwrap_err().to_string().contains("ended"));
        let (promise, work) = Desk::new().open(signal.clone());
        drop(promise);
        signal.raise(Error::Aborted {
            rank: 3,
            reason: "the first cause".into(),
        });
        assert!(work.wait().unwrap_err().to_string().contains("first cause"));
    }

    /// Goal: no wake-up is lost, and results reach their own works. Method: several callers on one desk, many turns.
    #[test]
    fn many_threads_fetch_their_own_results() {
        let desk = Desk::new();
        std::thread::scope(|scope| {
            for caller in 0..4u32 {
                let desk = &desk;
                scope.spawn(move || {
                    for turn in 0..2000u32 {
                        let (promise, work) = desk.open(Signal::new());
                        let value = caller << 16 | turn;
                        let (sender, job) = std::sync::mpsc::channel::<Promise>();
                        std::thread::scope(|inner| {
                            if turn % 20 == 0 {
                                inner.spawn(move || {
                                    let slab = Slab::from_slice(&[value]);
                                    job.recv().unwrap().keep(Ok(Data::InPlace(slab)));
                                });
                                sender.send(promise).unwrap();
                            } else {
                                promise.keep(Ok(Data::InPlace(Slab::from_slice(&[value]))));
                            }
                            let slab = work.wait().unwrap().into_output();
                            assert_eq!(slab.as_slice::<u32>(), [value]);
                        });
                    }
                });
            }
        });
    }
}
