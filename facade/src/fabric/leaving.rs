//! Leaving the job: loggers are told how it ended, what connects the ranks is let go.

use std::sync::Arc;

use fabric_engine::Error as EngineError;

use super::{Fabric, lock};
use crate::{
    error::{Error, Result},
    logger::Status,
};

impl Fabric {
    /// Leave the job now, and not where [`Fabric::launch`]'s body ends: loggers are finalized, the communicators closed (their
    /// threads, sockets and shared memory with them, once models and loaders that use them are dropped), and whatever needs the other
    /// ranks is refused from here on. All ranks come to this; a second call does nothing. A program that keeps its Fabric after
    /// `launch` need not call it: there everything has been left already.
    ///
    /// ```
    /// use fabric::Fabric;
    ///
    /// let fabric = Fabric::builder().devices(2).build()?;
    /// fabric.launch_threads(|fabric| {
    ///     fabric.barrier()?;
    ///     fabric.teardown()?;
    ///     assert!(fabric.barrier().is_err());
    ///     Ok(())
    /// })?;
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// When a rank is gone before it came here.
    pub fn teardown(&self) -> Result<()> {
        if self.lock_world().is_none() {
            return Ok(());
        }
        let met = self.barrier();
        self.leave(met.as_ref().err());
        met
    }

    /// Leave the job; with an own error, end it for everybody.
    pub(super) fn leave(&self, error: Option<&Error>) {
        self.finalize_loggers(error);
        *lock(&self.inner.models) = Arc::default(); // they hold the communicator
        if let Some(world) = self.lock_world().take() {
            world.leave(error);
        }
    }

    /// Run `body`; loggers hear of its panic, which goes on.
    pub(super) fn unless_it_panics<T>(&self, body: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        struct Watch<'a>(&'a Fabric);
        impl Drop for Watch<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.finalize_with(Status::Failed, true);
                }
            }
        }
        let _watch = Watch(self);
        self.to_the_end(body)
    }

    /// Run `body`, and see what it gave to a device to its end.
    pub(super) fn to_the_end<T>(&self, body: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let value = body(self)?;
        self.await_device()?;
        Ok(value)
    }

    /// What a device was given is over, and nothing of it has failed: nobody has waited for the last of it yet, whose error
    /// would be told by a call that never comes.
    fn await_device(&self) -> Result<()> {
        let world = self.lock_world();
        let Some(comm) = world.as_ref().map(|world| world.comm.clone()) else {
            return Ok(()); // it has left before
        };
        drop(world);
        let Some(device) = comm.device() else {
            return Ok(());
        };
        let settled = device.settle();
        comm.aborter().signal().check()?; // says more than a device that was let go
        Ok(settled.map_err(|error| EngineError::library("wait for the device", error))?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    // GAP-34, BUG-23
    #[test]
    fn who_has_left_is_told_so_and_may_leave_again() {
        let fabric = Fabric::builder().devices(2).build().unwrap();
        let done = fabric.launch_threads(|fabric| {
            assert_eq!(fabric.world_size(), 2);
            fabric.teardown()?;
            fabric.teardown()?;
            let error = fabric.barrier().unwrap_err().to_string();
            assert!(error.contains("this rank has left the job"), "{error}");
            Ok(fabric.world_size())
        });
        assert_eq!(done.unwrap(), [1, 1]);
        fabric.teardown().unwrap(); // never launched
    }

    // STR-02: the wire is the program's to choose, and said.
    #[test]
    fn the_wire_that_was_asked_for_connects_and_explains_itself() {
        for (asked, expected, line) in [
            ("shm", "shm", "wire = shm: asked for"),
            ("Unix", "unix", "wire = unix: asked for"),
            ("tcp", "tcp", "wire = tcp: asked for"),
            ("auto", "shm", "wire = shm: all ranks share memory"),
        ] {
            let fabric = Fabric::builder().devices(2).wire(asked).build().unwrap();
            assert!(
                !fabric.explain().contains("wire = "),
                "nothing is known yet"
            );
            let wires = fabric.launch_threads(|fabric| {
                assert!(fabric.explain().contains(line), "{}", fabric.explain());
                Ok(fabric.wire())
            });
            assert_eq!(wires.unwrap(), [Some(expected); 2]);
        }
        let solo = Fabric::builder().wire("tcp").build().unwrap();
        assert_eq!(solo.launch(|fabric| Ok(fabric.wire())).unwrap(), Some(None));
    }

    // STR-02: the time-out itself.
    #[test]
    fn line_14_a_rank_that_does_not_come_is_named_after_the_time_that_was_asked_for() {
        let fabric = Fabric::builder()
            .devices(2)
            .timeout(Duration::from_millis(50));
        let fabric = fabric.build().unwrap();
        let error = fabric.launch_threads(|fabric| match fabric.global_rank() {
            0 => fabric.barrier(),
            _ => {
                let signal = fabric.aborter()?.signal().clone();
                assert!(signal.wait(Duration::from_secs(60)).is_some()); // until rank 0 has given up
                Ok(())
            }
        });
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("rank 1") && text.contains("FABRIC_TIMEOUT_S"),
            "{text}"
        );
    }
}
