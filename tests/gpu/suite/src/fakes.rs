//! What the stand-ins tell a test about itself, beyond what the real libraries do.

use std::ffi::CString;

use libloading::{Library, Symbol};

fn library(name: &str) -> Library {
    // SAFETY: the stand-ins do nothing when they are loaded.
    unsafe { Library::new(name) }.unwrap_or_else(|error| panic!("not on the stage: {error}"))
}

/// How often a function of the driver was called in this process so far.
///
/// # Panics
/// Off the stage.
pub fn calls(function: &str) -> u64 {
    let library = library("libcuda.so");
    // SAFETY: the stand-in declares it so.
    let count = unsafe {
        library.get::<extern "C" fn(*const std::ffi::c_char) -> u64>(b"fake_cuda_count\0")
    };
    let count: Symbol<_> = count.expect("the stand-in");
    count(CString::new(function).expect("a name").as_ptr())
}

/// How many allocations of a device are alive.
///
/// # Panics
/// Off the stage.
pub fn live(ordinal: i32) -> u64 {
    let library = library("libcuda.so");
    // SAFETY: the stand-in declares it so.
    let live = unsafe { library.get::<extern "C" fn(i32) -> u64>(b"fake_cuda_live\0") };
    live.expect("the stand-in")(ordinal)
}
