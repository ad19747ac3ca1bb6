//! Fabric's collectives: on buffers, on numbers, and on any value that serde knows. None of them needs a barrier.

use std::time::Duration;

use fabric_engine::{
    buffer::{Buffer, Slab},
    comm::{Call, Collectives, Data, Op, ReduceOp},
};
use serde::{Serialize, de::DeserializeOwned};

use super::Fabric;
use crate::error::{Error, Result};

const PATIENT: Duration = Duration::from_secs(10_000 * 24 * 3600); // a download may take as long as it likes

impl Fabric {
    /// Leave when every rank has come.
    ///
    /// # Errors
    /// Before launch, or when a rank is gone.
    pub fn barrier(&self) -> Result<()> {
        Ok(self.comm()?.lock().barrier()?)
    }

    /// Replace `buffer` on every rank by the fold of all ranks' buffers. Lightning's default is [`ReduceOp::Avg`].
    ///
    /// # Errors
    /// Before launch, or when ranks disagree or one is gone.
    pub fn all_reduce(&self, buffer: &mut dyn Buffer, op: ReduceOp) -> Result<()> {
        Ok(self.comm()?.lock().all_reduce(buffer, op)?)
    }

    /// The fold of one number a rank.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn all_reduce_value(&self, value: f64, op: ReduceOp) -> Result<f64> {
        let mut buffer = vec![value];
        self.all_reduce(&mut buffer, op)?;
        Ok(buffer[0])
    }

    /// Every rank's `buffer`, by rank: `[world size, numel]` elements, also with one rank.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn all_gather(&self, buffer: &dyn Buffer) -> Result<Slab> {
        Ok(self.comm()?.lock().all_gather(buffer)?)
    }

    /// Every rank's value, by rank.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`], or when the value cannot be written or read.
    pub fn all_gather_object<T: Serialize + DeserializeOwned>(&self, value: &T) -> Result<Vec<T>> {
        let rows = self.comm()?.lock().all_gather_bytes(&pack(value)?)?;
        rows.iter().map(|row| unpack(row)).collect()
    }

    /// Rank `src`'s value, on every rank.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`], or when the value cannot be written or read.
    pub fn broadcast<T: Serialize + DeserializeOwned>(&self, value: T, src: usize) -> Result<T> {
        if self.world_size() == 1 && src == 0 {
            self.comm()?;
            return Ok(value);
        }
        let bytes = if self.global_rank() == src {
            pack(&value)?
        } else {
            Vec::new()
        };
        let bytes = self.comm()?.lock().broadcast_bytes(&bytes, src)?;
        unpack(&bytes)
    }

    /// Rank 0 runs `body` first, then all others at once: for a download that only one should make. It may take as long
    /// as it likes. When rank 0 fails, the others fail with its error instead of running.
    ///
    /// # Errors
    /// `body`'s, rank 0's, or a collective's.
    pub fn rank_zero_first<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        self.comm()?; // before launch nothing runs
        if !self.is_global_zero() {
            return match self.hear_from_zero(String::new())?.as_str() {
                "" => body(),
                failure => {
                    self.all_have_heard()?;
                    Err(Error::new(format!("rank 0 failed first: {failure}")))
                }
            };
        }
        let result = body();
        let failure = result
            .as_ref()
            .err()
            .map_or(String::new(), |error| format!("{error} "));
        let failed = result.is_err();
        let mut heard = self.hear_from_zero(failure).map(drop);
        if failed {
            heard = heard.and_then(|()| self.all_have_heard());
        }
        let value = result?; // the first cause
        heard.map(|()| value)
    }

    /// A broadcast's root waits for nobody; one that leaves in anger would stop those who have not read it yet.
    pub(crate) fn all_have_heard(&self) -> Result<()> {
        Ok(self.comm()?.lock().barrier()?)
    }

    /// Leave when every rank has come, however long that takes.
    pub(crate) fn wait_for_all(&self) -> Result<()> {
        let mut call = Call::new(Op::Barrier).blocking();
        call.deadline = Some(PATIENT);
        self.comm()?.lock().submit(call, Data::None)?.wait()?;
        Ok(())
    }

    /// Rank 0's text, on all ranks, however long it takes to come.
    fn hear_from_zero(&self, text: String) -> Result<String> {
        self.wait_for_all()?;
        let bytes = self.comm()?.lock().broadcast_bytes(text.as_bytes(), 0)?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_string())
    }
}

/// MessagePack, because it keeps NaN and describes itself.
fn pack<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    Ok(rmp_serde::to_vec_named(value)?)
}

fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    rmp_serde::from_slice(bytes).map_err(|error| {
        Error::argument(
            format!("a value of another rank cannot be read: {error}"),
            "Broadcast and gather the same type on all ranks",
        )
    })
}
