//! One rank before the others: for a download that only one should make.

use std::time::Duration;

use fabric_engine::comm::{Call, Data, Op};

use super::Fabric;
use crate::error::{Error, Result};

const PATIENT: Duration = Duration::from_secs(10_000 * 24 * 3600); // a download may take as long as it likes

impl Fabric {
    /// Rank 0 runs `body` first, then all others at once. It may take as long as it likes. When rank 0 fails, the others fail
    /// with its error instead of running.
    ///
    /// # Errors
    /// `body`'s, rank 0's, or a collective's.
    pub fn rank_zero_first<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        self.some_first(0, self.is_global_zero(), body)
    }

    /// As [`Fabric::rank_zero_first`], with the first rank of every machine: for a download to a disk of its own.
    ///
    /// # Errors
    /// As [`Fabric::rank_zero_first`].
    pub fn local_rank_zero_first<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let place = self.node_rank();
        // Not local rank 0, who may be in no group, or in another.
        let places = self.all_gather_object(&place)?;
        let first = places.iter().position(|other| *other == place);
        self.some_first(place, first == Some(self.global_rank()), body)
    }

    /// Those that are `first` run before the others of their `place`.
    fn some_first<T>(
        &self,
        place: usize,
        first: bool,
        body: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.comm()?; // before launch nothing runs
        if first {
            let result = body();
            let told = self.tell_failures(place, result.as_ref().err().map(Error::to_string));
            let value = result?; // the first cause
            return told.map(|_| value);
        }
        match self.tell_failures(place, None)? {
            None => body(),
            // Not this rank's own failure: what is told to the world is that rank's.
            Some((rank, failure)) => Err(fabric_engine::Error::Aborted {
                rank: self.global_rank(),
                reason: format!("rank {rank} failed first: {failure}"),
            }
            .into()),
        }
    }

    /// Tell all ranks of an own failure; the first of this place's ranks that failed, and what it said.
    fn tell_failures(
        &self,
        place: usize,
        failure: Option<String>,
    ) -> Result<Option<(usize, String)>> {
        self.wait_for_all()?;
        let all = self.all_gather_object(&(place, failure))?;
        if all.iter().any(|(_, failure)| failure.is_some()) {
            self.all_have_heard()?;
        }
        let mut here = all.into_iter().enumerate();
        Ok(here
            .find_map(|(rank, (other, failure))| Some((rank, failure.filter(|_| other == place)?))))
    }

    /// Leave when every rank has come, however long that takes.
    pub(crate) fn wait_for_all(&self) -> Result<()> {
        let mut call = Call::new(Op::Barrier).blocking();
        call.deadline = Some(PATIENT);
        self.comm()?.lock().submit(call, Data::None)?.wait()?;
        Ok(())
    }

    /// Who has told the others waits for nobody; one that leaves in anger would stop those who have not read it yet.
    pub(crate) fn all_have_heard(&self) -> Result<()> {
        self.barrier()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A group of a machine's third and fourth rank has a first one, too: when it fails, the other does not run.
    #[test]
    fn a_group_without_local_rank_0_has_a_first_rank() {
        let fabric = Fabric::builder().devices(4).build().unwrap();
        let failed = fabric.launch_threads(|fabric| {
            let pair = fabric.split(u32::try_from(fabric.global_rank() / 2)?, 0)?;
            let body = || match pair.global_rank() {
                0 => Err(Error::new("no room on the disk")),
                _ => Ok(()),
            };
            let outcome = pair.local_rank_zero_first(body);
            fabric.barrier()?;
            Ok(outcome.is_err())
        });
        assert_eq!(failed.unwrap(), [true; 4]);
    }
}
