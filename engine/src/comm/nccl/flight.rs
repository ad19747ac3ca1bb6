//! An operation on its way: what the watch follows, [`Flight`], and what its submitter waits for, [`Landing`].

use std::{fmt, sync::Arc, time::Duration};

use fabric_kernels::{Device, KernelError, device::Moment};

use crate::{
    comm::{Data, Rank, work::Ahead},
    error::{Error, Result},
    signal::Signal,
    wire::frame::Stamp,
};

const NAP: Duration = Duration::from_micros(100); // between two looks at an event, for a host that waits

/// An operation that a device is to do before its time is up.
pub(super) struct Flight {
    pub(super) stamp: Stamp,
    pub(super) patience: Duration,
    pub(super) done: Arc<dyn Moment>,
}

impl Flight {
    pub(super) fn new(stamp: Stamp, patience: Duration, done: Arc<dyn Moment>) -> Self {
        Self {
            stamp,
            patience,
            done,
        }
    }
}

/// The memory of an operation, and when it may be used again.
pub(super) struct Landing {
    rank: Rank,
    data: Option<Data>, // until it is fetched
    done: Arc<dyn Moment>,
    homes: Vec<Arc<dyn Device>>, // the queues that work on it before and afterwards
    signal: Signal,
}

impl Landing {
    pub(super) fn new(
        rank: Rank,
        data: Data,
        done: Arc<dyn Moment>,
        homes: Vec<Arc<dyn Device>>,
        signal: Signal,
    ) -> Self {
        Self {
            rank,
            data: Some(data),
            done,
            homes,
            signal,
        }
    }

    /// Let the queues go on after the operation.
    fn order(&self) -> Result<(), KernelError> {
        let waits = self.homes.iter().map(|home| home.wait_for(&*self.done));
        waits.fold(Ok(()), Result::and)
    }

    fn failed(&self) -> impl FnOnce(KernelError) -> Error + use<> {
        Error::kernel(self.rank, "wait for a collective")
    }
}

impl Ahead for Landing {
    fn is_done(&self) -> bool {
        // An error is an end too: `wait` tells it.
        self.signal.is_raised() || self.done.is_past().unwrap_or(true)
    }

    fn wait(mut self: Box<Self>) -> Result<Data> {
        self.signal.check()?; // the memory is freed after the operation: see Drop
        self.order().map_err(self.failed())?;
        Ok(self.data.take().expect("it is fetched once"))
    }

    fn block(&self) -> Result<()> {
        loop {
            self.signal.check()?;
            if self.done.is_past().map_err(self.failed())? {
                return Ok(());
            }
            drop(self.signal.wait(NAP)); // an error ends the nap
        }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let Some(data) = self.data.take() else { return };
        // Freed in its queue's order: after the operation. Where that cannot be said, not at all.
        if self.order().is_err() {
            std::mem::forget(data);
        }
    }
}

impl fmt::Debug for Landing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Landing({:?})", self.data)
    }
}
