//! The kernels that this machine can run: those compiled for the host. Before one runs, what its arguments point to is
//! looked at, because a stray pointer must be the context's error and not the end of the process.

use std::ffi::c_void;

use crate::{
    code::{Code, Result},
    memory,
};

/// Bytes of each of a kernel's arguments, if there is such a kernel.
pub fn arguments(kernel: &str) -> Option<&'static [usize]> {
    fabric_kernels_host::arguments(kernel)
}

/// Run a kernel on the caller's thread.
pub fn launch(kernel: &str, grid: u32, block: u32, values: &mut [*mut c_void]) -> Result {
    // SAFETY: `values` are as many as `arguments` says, each of its size; what they point to was looked at by `check`, and
    // beyond that a kernel is as free to go wrong as on a device.
    let run = unsafe { fabric_kernels_host::launch(kernel, grid, block, values.as_mut_ptr()) };
    run.map_err(|_| Code::NOT_FOUND)
}

/// Whether a kernel's first argument, which is a pointer in all of them, is memory of one of these devices or the host.
pub fn check(_kernel: &str, values: &[Vec<u8>], devices: &[i32]) -> Result {
    let Some(first) = values
        .first()
        .and_then(|value| value.as_slice().try_into().ok())
    else {
        return Ok(());
    };
    let found = memory::inside(usize::from_ne_bytes(first), 1)?;
    match found.place.device() {
        Some(device) if !devices.contains(&device) => Err(Code::ILLEGAL_ADDRESS),
        _ => Ok(()),
    }
}
