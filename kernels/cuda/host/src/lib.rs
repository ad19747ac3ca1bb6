//! The CUDA kernels on the processor: the same text that nvcc compiles, behind a shim, launched by name as
//! `cuLaunchKernel` does. They are tested with it here, and stand in for a device elsewhere.
//!
//! ```
//! use std::ffi::c_void;
//!
//! /// A table's entry, as `abi.cuh` has it.
//! #[repr(C)]
//! struct Move { from: u64, into: u64, numel: u64, first: u64 }
//!
//! let (source, mut target) = ([1.0f32, 2.0, 3.0], [0.0f64; 3]);
//! let (from, into) = (source.as_ptr() as u64, target.as_mut_ptr() as u64);
//! let table = [Move { from, into, numel: 3, first: 0 }];
//! let (mut table, mut count, mut chunks, mut scale) = (table.as_ptr(), 1u32, 1u64, 0.5f64);
//! let mut arguments: [*mut c_void; 4] = [
//!     (&raw mut table).cast(),
//!     (&raw mut count).cast(),
//!     (&raw mut chunks).cast(),
//!     (&raw mut scale).cast(),
//! ];
//! assert_eq!(fabric_kernels_host::arguments("move_f32_f64"), Some(&[8, 4, 8, 8][..]));
//! // SAFETY: the arguments are those of the kernel, and the entry's memory is that of two live arrays.
//! unsafe { fabric_kernels_host::launch("move_f32_f64", 1, 256, arguments.as_mut_ptr()) }?;
//! assert_eq!(target, [0.5, 1.0, 1.5]);
//! # Ok::<(), fabric_kernels_host::Unknown>(())
//! ```

use std::collections::HashMap;
use std::error::Error;
use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::sync::LazyLock;

/// Threads in a block of every kernel: `THREADS` in `abi.cuh`.
pub const THREADS: u32 = 256;

/// The bytes of each argument of a kernel, in order; none if there is no such kernel.
pub fn arguments(kernel: &str) -> Option<&'static [usize]> {
    TABLE.get(kernel).map(|known| known.sizes)
}

/// Runs all blocks of a kernel, on the calling thread, before it returns. Several threads may launch at once.
///
/// Panics when `block` is not [`THREADS`] or `grid` is 0, which no kernel is made for.
///
/// # Safety
///
/// `arguments` points to as many pointers as [`arguments`] has sizes, each to a value of that size, and the values are
/// what `abi.cuh` says: the tables' memory is there, aligned to its elements, and nobody else touches it meanwhile.
pub unsafe fn launch(
    kernel: &str,
    grid: u32,
    block: u32,
    arguments: *mut *mut c_void,
) -> Result<(), Unknown> {
    assert_eq!(
        block, THREADS,
        "{kernel} runs with {THREADS} threads a block"
    );
    assert_ne!(grid, 0, "{kernel} runs with one block or more");
    let Some(known) = TABLE.get(kernel) else {
        let kernel = kernel.to_owned();
        return Err(Unknown { kernel });
    };
    // SAFETY: the caller keeps what the kernel asks for. The tests in tests/kernels run every kernel.
    unsafe { (known.run)(grid, block, arguments) };
    Ok(())
}

/// The names of all kernels, sorted.
pub fn kernels() -> impl Iterator<Item = &'static str> {
    let mut names: Vec<_> = TABLE.keys().copied().collect();
    names.sort_unstable();
    names.into_iter()
}

/// There is no kernel of this name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    kernel: String,
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "there is no kernel named '{}'; `kernels()` names the {} that there are",
            self.kernel,
            TABLE.len()
        )
    }
}

impl Error for Unknown {}

/// One kernel, as this crate knows it.
struct Known {
    run: Run,
    sizes: &'static [usize],
}

type Run = unsafe extern "C" fn(u32, u32, *mut *mut c_void);

/// `shim::Kernel` in `shim.h`.
#[repr(C)]
struct Kernel {
    name: *const c_char,
    run: Run,
    sizes: *const usize,
    count: usize,
}

// SAFETY: written by build.rs and the shim, to the layout above; never changed afterwards.
unsafe extern "C" {
    static shim_count: usize;
    /// The first of `shim_count` pointers.
    static shim_kernels: *const Kernel;
}

static TABLE: LazyLock<HashMap<&'static str, Known>> = LazyLock::new(|| {
    // SAFETY: a constant of the table that build.rs writes.
    let count = unsafe { shim_count };
    // SAFETY: as many pointers lie there, side by side, says build.rs; constants live for ever.
    let kernels = unsafe { std::slice::from_raw_parts(&raw const shim_kernels, count) };
    kernels.iter().map(|kernel| known(*kernel)).collect()
});

fn known(kernel: *const Kernel) -> (&'static str, Known) {
    // SAFETY: an entry of the table points to a constant, defined beside its kernel in shim.h.
    let kernel = unsafe { &*kernel };
    // SAFETY: a literal, which ends with a zero.
    let name = unsafe { CStr::from_ptr(kernel.name) };
    // SAFETY: `count` sizes of a constant array; Describe in shim.h takes both from one signature.
    let sizes = unsafe { std::slice::from_raw_parts(kernel.sizes, kernel.count) };
    let run = kernel.run;
    (
        name.to_str().expect("names are ASCII"),
        Known { run, sizes },
    )
}
