//! The memory of parameters that are away, kept for those that come next: a steady state allocates nothing.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Storage};

use crate::storage::allocate;

/// Free memory by type and length, all of one device.
///
/// What is free and what is in use are together never more than what was in use at once in this pass through the model
/// or the one before it. So the memory of a whole model, which is there before it is sharded, is not kept; and a save
/// that gathers everything is forgotten two passes later.
#[derive(Default)]
pub(crate) struct Pool {
    free: HashMap<(DType, usize), Vec<Storage>>,
    free_bytes: usize,
    used_bytes: usize,
    most_bytes: Option<[usize; 2]>, // used at once: in the last pass, in this one; none before the first pass
}

impl Pool {
    /// A pass through the model begins.
    pub(crate) fn begin_pass(&mut self) {
        let last = self.most_bytes.map_or(0, |[_, this]| this);
        self.most_bytes = Some([last, self.used_bytes]);
        self.trim();
    }

    /// Memory of `device` for `len` elements, for use; what it holds is undefined.
    pub(crate) fn take(&mut self, device: &Device, dtype: DType, len: usize) -> Result<Storage> {
        let (kept, bytes) = (self.free.get_mut(&(dtype, len)), bytes(dtype, len));
        let memory = match kept.and_then(Vec::pop) {
            Some(memory) => {
                self.free_bytes -= bytes;
                memory
            }
            None => allocate(device, dtype, len)?,
        };
        self.used_bytes += bytes;
        if let Some([_, most]) = &mut self.most_bytes {
            *most = (*most).max(self.used_bytes);
        }
        self.trim();
        Ok(memory)
    }

    /// Memory that [`Pool::take`] gave for `len` elements is used no longer.
    pub(crate) fn give(&mut self, memory: Storage, len: usize) {
        let key = (memory.dtype(), len);
        let bytes = bytes(key.0, len);
        self.used_bytes -= bytes;
        self.free_bytes += bytes;
        self.free.entry(key).or_default().push(memory);
        self.trim();
    }

    /// Drop free memory, the longest first, until the bound holds.
    fn trim(&mut self) {
        let [last, this] = self.most_bytes.unwrap_or_default();
        while self.free_bytes > 0 && self.free_bytes + self.used_bytes > last.max(this) {
            let held = self.free.iter().filter(|(_, stack)| !stack.is_empty());
            let longest = held.map(|(key, _)| *key).max_by_key(|(dtype, len)| {
                // The type decides between equals, so that all ranks drop the same.
                (bytes(*dtype, *len), dtype.as_str())
            });
            let stack = longest.and_then(|key| self.free.get_mut(&key));
            if stack.and_then(Vec::pop).is_none() {
                break; // only memory without elements is left
            }
            self.free_bytes -= longest.map_or(0, |(dtype, len)| bytes(dtype, len));
        }
    }
}

fn bytes(dtype: DType, len: usize) -> usize {
    dtype.size_in_bytes() * len
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::CpuStorage;

    const CPU: Device = Device::Cpu;

    fn address(memory: &Storage) -> *const f32 {
        match memory {
            Storage::Cpu(CpuStorage::F32(values)) => values.as_ptr(),
            _ => panic!("f32"),
        }
    }

    #[test]
    fn what_was_given_is_what_is_taken_next() {
        let mut pool = Pool::default();
        pool.begin_pass();
        let mut places = Vec::new();
        for _ in 0..3 {
            let memory = pool.take(&CPU, DType::F32, 8).unwrap();
            places.push(address(&memory));
            pool.give(memory, 8);
            pool.begin_pass();
        }
        assert_eq!(places, [places[0]; 3]);
        // Another length does not fit, and both together were never used at once.
        let other = pool.take(&CPU, DType::F32, 4).unwrap();
        assert_eq!((pool.free_bytes, pool.used_bytes), (0, 16));
        pool.give(other, 4);
        assert_eq!((pool.free_bytes, pool.used_bytes), (16, 0));
    }

    #[test]
    fn what_was_there_before_the_first_pass_is_not_kept() {
        let mut pool = Pool::default();
        let model = [0; 5].map(|_| pool.take(&CPU, DType::F32, 100).unwrap());
        model.into_iter().for_each(|memory| pool.give(memory, 100));
        assert_eq!((pool.free_bytes, pool.used_bytes), (0, 0));
    }

    #[test]
    fn what_is_kept_is_what_was_used_at_once_and_a_peak_is_forgotten() {
        let mut pool = Pool::default();
        let root = pool.take(&CPU, DType::F32, 10).unwrap();
        let pass = |pool: &mut Pool, at_once: usize| {
            pool.begin_pass();
            for _ in 0..4 {
                let used: Vec<_> = (0..at_once)
                    .map(|_| pool.take(&CPU, DType::BF16, 50).unwrap())
                    .collect();
                used.into_iter().for_each(|memory| pool.give(memory, 50));
            }
            pool.free_bytes
        };
        assert_eq!(pass(&mut pool, 2), 200);
        assert_eq!(pass(&mut pool, 7), 700);
        assert_eq!(pass(&mut pool, 2), 700, "it may be needed again");
        assert_eq!(pass(&mut pool, 2), 200, "it was not");
        pool.give(root, 10);
    }

    #[test]
    fn other_types_are_refused() {
        let text = Pool::default()
            .take(&CPU, DType::U32, 1)
            .unwrap_err()
            .to_string();
        assert!(text.contains("U32"), "{text}");
    }
}
