//! What the stand-ins tell a test about itself, beyond what the real libraries do.

use std::{
    ffi::{CStr, CString},
    path::{Path, PathBuf},
};

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

/// What was called of NCCL in this process so far: see `fake-nccl/src/log.rs`.
///
/// # Panics
/// Off the stage.
pub fn nccl_log() -> Vec<String> {
    let library = library("libnccl.so.2");
    // SAFETY: the stand-in declares it so.
    let log =
        unsafe { library.get::<extern "C" fn() -> *const std::ffi::c_char>(b"fake_nccl_log\0") };
    let text = log.expect("the stand-in")();
    // SAFETY: a text that ends, and is never freed.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().lines().map(str::to_string).collect()
}

/// A copy of the stand-in for NCCL that lacks some functions, as older versions do.
///
/// # Panics
/// Off the stage, or when a name is not in it.
pub fn nccl_without(functions: &[&str]) -> PathBuf {
    let stage = std::env::var_os("FABRIC_STAGE").expect("on the stage");
    let mut bytes = std::fs::read(Path::new(&stage).join("libnccl.so.2")).expect("the library");
    for function in functions {
        let name = format!("\0{function}\0").into_bytes();
        let places = bytes
            .windows(name.len())
            .enumerate()
            .filter(|(_, part)| *part == name);
        let places: Vec<_> = places.map(|(at, _)| at).collect();
        assert!(!places.is_empty(), "there is no {function}");
        for at in places {
            bytes[at + 2] = b'!'; // the loader's hash leads here, and the name is another
        }
    }
    let path = Path::new(&stage).join("libnccl-older.so");
    std::fs::write(&path, bytes).expect("a copy");
    path
}
