//! The kernels that this machine can run: those compiled for the processor. Before one runs, the memory that it would
//! touch is looked at, in its tables too, because a stray pointer must be the context's error and not the process's end.

use std::ffi::c_void;

use crate::{
    code::{Code, Result},
    memory,
};

/// Bytes of each of a kernel's arguments, if there is such a kernel.
pub fn arguments(kernel: &str) -> Option<&'static [usize]> {
    fabric_kernels_host::arguments(kernel)
}

/// Run a kernel on the caller's thread, with pointers to its arguments' values, which [`check`] has seen.
pub fn launch(kernel: &str, grid: u32, block: u32, values: &mut [*mut c_void]) -> Result {
    if block != fabric_kernels_host::THREADS {
        return Err(Code::LAUNCH_OUT_OF_RESOURCES); // they are made for this many
    }
    // SAFETY: the values were copied by the sizes of this kernel's arguments, and what they point to is allocated, as
    // `check` has seen. That nobody else touches it meanwhile is what the test is about.
    let launched = unsafe { fabric_kernels_host::launch(kernel, grid, block, values.as_mut_ptr()) };
    launched.map_err(|_| Code::NOT_FOUND)
}

/// That all memory a kernel would touch is of one of these devices, or the host's.
pub fn check(kernel: &str, values: &[Vec<u8>], devices: &[i32]) -> Result {
    let words: Vec<&str> = kernel.split('_').collect();
    let size = |index: usize| words.get(index).map_or(0, |name| bytes(name));
    let memory = Memory { devices };
    match words[0] {
        "move" | "stochastic" | "fold" => memory.moves(values, size(1), size(2)),
        "copy" => memory.moves(values, 1, 1),
        "fill" => memory.moves(values, 0, words[1].parse().map_err(|_| Code::NOT_FOUND)?),
        "clamp" => memory.moves(values, size(1), size(1)),
        "squares" if words.get(1) == Some(&"end") => {
            memory.touch(number(&values[0], 0), 8 * number(&values[1], 0))?;
            memory.touch(number(&values[2], 0), 8)
        }
        "squares" => {
            memory.moves(values, size(1), 0)?;
            memory.touch(number(&values[3], 0), 8 * number(&values[2], 0))?;
            memory.touch(number(&values[4], 0), 16)
        }
        "sgd" | "adam" | "lion" => memory.updates(values, size(1)),
        "quantize" | "dequantize" => memory.blocks(values, size(1), size(2)),
        _ => Err(Code::NOT_FOUND),
    }
}

/// Bytes of an element.
fn bytes(dtype: &str) -> usize {
    match dtype {
        "f64" => 8,
        "f32" => 4,
        "f16" | "bf16" => 2,
        _ => 1,
    }
}

/// Bytes of an element, by its dtype's code.
fn coded(code: u32) -> usize {
    [8, 4, 2, 2].get(code as usize).copied().unwrap_or(1)
}

/// The 8 bytes at `at`, or the 4 that there are.
fn number(value: &[u8], at: usize) -> usize {
    let mut wide = [0; 8];
    let part = &value[at..value.len().min(at + 8)];
    wide[..part.len()].copy_from_slice(part);
    usize::from_ne_bytes(wide)
}

/// The memory that a context's kernels reach.
struct Memory<'a> {
    devices: &'a [i32],
}

impl Memory<'_> {
    /// That these bytes are there.
    fn touch(&self, address: usize, bytes: usize) -> Result {
        if bytes == 0 {
            return Ok(());
        }
        match memory::inside(address, bytes)?.place.device() {
            Some(device) if !self.devices.contains(&device) => Err(Code::ILLEGAL_ADDRESS),
            _ => Ok(()),
        }
    }

    /// The entries of a table, each of so many bytes.
    fn table(&self, values: &[Vec<u8>], entry: usize) -> Result<Vec<Vec<u8>>> {
        let (start, count) = (number(&values[0], 0), number(&values[1], 0));
        self.touch(start, count.max(1) * entry)?;
        let at = |index| std::ptr::with_exposed_provenance::<u8>(start + index * entry);
        let read = |index| {
            // SAFETY: all of the table was just found to be allocated, and host memory is initialised when it is.
            let entry = unsafe { std::slice::from_raw_parts(at(index), entry) };
            entry.to_vec()
        };
        Ok((0..count).map(read).collect())
    }

    /// `Move`: from, into, numel, first.
    fn moves(&self, values: &[Vec<u8>], from: usize, into: usize) -> Result {
        for entry in self.table(values, 32)? {
            let numel = number(&entry, 16);
            self.touch(number(&entry, 0), numel * from)?;
            self.touch(number(&entry, 8), numel * into)?;
        }
        Ok(())
    }

    /// `Update`: param, grad, state0, state1, copy, numel, first. `Rule`: the dtypes' codes at 84 and 88.
    fn updates(&self, values: &[Vec<u8>], param: usize) -> Result {
        let code = |at: usize| coded(number(&values[3], at) as u32);
        let state = param.max(4);
        let sizes = [param, code(84), state, state, code(88)];
        for entry in self.table(values, 64)? {
            let numel = number(&entry, 40);
            for (index, size) in sizes.into_iter().enumerate() {
                let address = number(&entry, 8 * index);
                if address != 0 || index < 2 {
                    self.touch(address, numel * size)?;
                }
            }
        }
        Ok(())
    }

    /// `Blocks`: from, into, scales, numel, first.
    fn blocks(&self, values: &[Vec<u8>], from: usize, into: usize) -> Result {
        for entry in self.table(values, 48)? {
            let numel = number(&entry, 24);
            self.touch(number(&entry, 0), numel * from)?;
            self.touch(number(&entry, 8), numel * into)?;
            self.touch(number(&entry, 16), 4 * numel.div_ceil(128))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel whose arguments are not understood would be run unseen, or not at all.
    #[test]
    fn every_kernel_is_understood() {
        for kernel in fabric_kernels_host::kernels() {
            let sizes = arguments(kernel).expect("it is in the table");
            let values: Vec<Vec<u8>> = sizes.iter().map(|size| vec![0; *size]).collect();
            assert_ne!(
                check(kernel, &values, &[0]),
                Err(Code::NOT_FOUND),
                "{kernel}"
            );
        }
    }
}
