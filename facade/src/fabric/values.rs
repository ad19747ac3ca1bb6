//! Collectives on whatever serde knows: numbers, structs, maps, lists of them. They travel as MessagePack, which keeps NaN and
//! describes itself.

use fabric_engine::comm::{Collectives, ReduceOp};
use rmpv::Value;
use serde::{Serialize, de::DeserializeOwned};

use super::Fabric;
use crate::{
    data::{DataLoader, Dataset},
    error::{Error, Result},
};

impl Fabric {
    /// Fold all ranks' values: every number in them, however deep, by itself. Whole numbers are added as such, and their mean
    /// is cut towards zero; everything that is no number (text, bool, nothing) stays this rank's.
    ///
    /// ```
    /// use fabric::{Fabric, ReduceOp};
    /// use serde::{Deserialize, Serialize};
    ///
    /// #[derive(Serialize, Deserialize, PartialEq, Debug)]
    /// struct Metrics { name: String, loss: f64, correct: u64, by_class: Vec<f32> }
    ///
    /// let fabric = Fabric::builder().devices(2).build()?;
    /// fabric.launch_threads(|fabric| {
    ///     let rank = fabric.global_rank() as u64;
    ///     let mine = Metrics { name: "test".into(), loss: rank as f64, correct: rank, by_class: vec![1.0, 3.0] };
    ///     let sum = fabric.all_reduce_value(mine, ReduceOp::Sum)?;
    ///     assert_eq!(sum, Metrics { name: "test".into(), loss: 1.0, correct: 1, by_class: vec![2.0, 6.0] });
    ///     assert_eq!(fabric.all_reduce_value(rank as f64, ReduceOp::Avg)?, 0.5);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// Before launch, when a rank is gone, when ranks give other numbers of numbers, or when the value cannot be written or
    /// read.
    pub fn all_reduce_value<T: Serialize + DeserializeOwned>(
        &self,
        value: T,
        op: ReduceOp,
    ) -> Result<T> {
        let mut tree = rmpv::ext::to_value(&value).map_err(unwritable)?;
        let (mut floats, mut whole) = (Vec::new(), Vec::new());
        each_number(&mut tree, &mut |number| match number {
            Number::Float(float) => floats.push(*float),
            Number::Whole(number) => whole.push(*number),
        })?;
        let comm = self.comm()?;
        let mut comm = comm.lock();
        comm.all_reduce(&mut floats, op)?;
        if !whole.is_empty() {
            comm.all_reduce(&mut whole, op)?;
        }
        drop(comm);
        let (mut floats, mut whole) = (floats.into_iter(), whole.into_iter());
        each_number(&mut tree, &mut |number| match number {
            Number::Float(float) => *float = floats.next().unwrap_or(f64::NAN),
            Number::Whole(number) => *number = whole.next().unwrap_or_default(),
        })?;
        rmpv::ext::from_value(tree).map_err(|error| {
            Error::argument(
                format!("a folded value cannot be read back: {error}"),
                "A sum may not fit its type: fold wider numbers",
            )
        })
    }

    /// Whether all ranks (with `all`), or any of them, decided so: the same answer everywhere.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn reduce_boolean_decision(&self, decision: bool, all: bool) -> Result<bool> {
        let op = if all { ReduceOp::Min } else { ReduceOp::Max };
        let mut flag = vec![u8::from(decision)];
        self.all_reduce(&mut flag, op)?;
        Ok(flag[0] != 0)
    }

    /// Every rank's value, by rank. They may be of any size each.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`], or when the value cannot be written or read.
    pub fn all_gather_object<T: Serialize + DeserializeOwned>(&self, value: &T) -> Result<Vec<T>> {
        let rows = self.comm()?.lock().all_gather_bytes(&pack(value)?)?;
        rows.iter().map(|row| unpack(row)).collect()
    }

    /// Every rank's values for the samples of `loader`'s latest batch, one a sample, by rank; those of samples that only fill up
    /// the last turn, which another rank has too, are left out: a metric over an epoch counts every sample once.
    ///
    /// ```
    /// use fabric::{Fabric, data::DataLoader};
    ///
    /// let fabric = Fabric::builder().devices(2).build()?;
    /// fabric.launch_threads(|fabric| {
    ///     let loader = fabric.setup_dataloaders(DataLoader::new(vec![10, 11, 12, 13, 14]).batch_size(2))?;
    ///     let mut seen = Vec::new();
    ///     for batch in &loader {
    ///         seen.extend(fabric.gather_for_metrics(&loader, batch?)?);
    ///     }
    ///     assert_eq!(seen, [10, 12, 11, 13, 14]); // not 10 twice
    ///     Ok(())
    /// })?;
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Fabric::all_gather_object`], or when there are fewer values than samples.
    pub fn gather_for_metrics<T, D, B>(
        &self,
        loader: &DataLoader<D, B>,
        mut values: Vec<T>,
    ) -> Result<Vec<T>>
    where
        T: Serialize + DeserializeOwned,
        D: Dataset,
    {
        let real = loader.real_samples();
        if values.len() < real {
            return Err(Error::argument(
                format!("{} values for {real} samples", values.len()),
                "Give one value for each sample of the batch that the loader gave last",
            ));
        }
        values.truncate(real);
        Ok(self
            .all_gather_object(&values)?
            .into_iter()
            .flatten()
            .collect())
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

    /// Give a value to rank `dst`, which calls [`Fabric::recv_object`]; no other rank takes part.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`], or when the value cannot be written.
    pub fn send_object<T: Serialize>(&self, value: &T, dst: usize) -> Result<()> {
        let bytes = pack(value)?;
        let comm = self.comm()?;
        let mut comm = comm.lock();
        comm.send(&vec![bytes.len() as u64], dst)?;
        Ok(comm.send(&bytes, dst)?)
    }

    /// The value that rank `src` sends.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`], or when the value cannot be read.
    pub fn recv_object<T: DeserializeOwned>(&self, src: usize) -> Result<T> {
        let comm = self.comm()?;
        let mut comm = comm.lock();
        let mut length = vec![0u64];
        comm.recv(&mut length, src)?;
        let mut bytes = vec![0u8; usize::try_from(length[0])?];
        comm.recv(&mut bytes, src)?;
        drop(comm);
        unpack(&bytes)
    }
}

enum Number<'a> {
    Float(&'a mut f64),
    Whole(&'a mut i64),
}

/// Show `see` every number of a value, which it may change, in an order that only the value's form decides.
fn each_number(value: &mut Value, see: &mut dyn FnMut(Number<'_>)) -> Result<()> {
    match value {
        Value::F64(float) => see(Number::Float(float)),
        Value::F32(float) => {
            let mut wide = f64::from(*float);
            see(Number::Float(&mut wide));
            *float = wide as f32;
        }
        Value::Integer(number) => {
            let mut wide = number.as_i64().ok_or_else(|| {
                Error::argument(
                    format!("{number} is folded as an i64, which it does not fit"),
                    "Fold smaller numbers, or floats",
                )
            })?;
            see(Number::Whole(&mut wide));
            *value = Value::from(wide);
        }
        Value::Array(values) => {
            for value in values {
                each_number(value, see)?;
            }
        }
        Value::Map(entries) => {
            // By key: a HashMap has an order of its own on every rank, and numbers are folded by their place.
            let mut sorted: Vec<_> = entries.iter_mut().collect();
            sorted.sort_by_cached_key(|(key, _)| key.to_string());
            for (_, value) in sorted {
                each_number(value, see)?;
            }
        }
        Value::Nil | Value::Boolean(_) | Value::String(_) | Value::Binary(_) | Value::Ext(..) => {}
    }
    Ok(())
}

fn unwritable(error: impl std::fmt::Display) -> Error {
    Error::argument(
        format!("a value cannot be written for the other ranks: {error}"),
        "Give what serde can write",
    )
}

fn pack<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    rmp_serde::to_vec_named(value).map_err(unwritable)
}

fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    rmp_serde::from_slice(bytes).map_err(|error| {
        Error::argument(
            format!("a value of another rank cannot be read: {error}"),
            "Broadcast and gather the same type on all ranks",
        )
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    // Every HashMap has an order of its own, on every rank.
    #[test]
    fn a_map_is_folded_key_by_key_whatever_its_order() {
        let fabric = Fabric::builder().devices(3).build().unwrap();
        let folded = fabric.launch_threads(|fabric| {
            let rank = fabric.global_rank() as f64;
            let number = |key: u32| (format!("metric_{key}"), f64::from(key) * 100.0 + rank);
            let mine: HashMap<_, _> = (0..26).map(number).collect();
            fabric.all_reduce_value(mine, ReduceOp::Sum)
        });
        for folded in folded.unwrap() {
            for key in 0..26 {
                let expected = 300.0 * f64::from(key) + 3.0;
                assert_eq!(folded[&format!("metric_{key}")], expected, "metric_{key}");
            }
        }
    }
}
