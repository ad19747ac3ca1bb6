//! The kernels that this machine can run: those compiled for the host. Before one runs, what its arguments point to is
//! looked at, because a stray pointer must be the context's error and not the end of the process.

use std::ffi::c_void;

use crate::{
    code::{Code, Result},
    memory,
};

/// Bytes of each of a kernel's arguments, if there is such a kernel.
pub fn arguments(_kernel: &str) -> Option<&'static [usize]> {
    None
}

/// Run a kernel on the caller's thread.
pub fn launch(_kernel: &str, _grid: u32, _block: u32, _values: &mut [*mut c_void]) -> Result {
    Err(Code::NOT_FOUND)
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
