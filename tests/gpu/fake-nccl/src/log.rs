//! What was called, for tests: one line each, in order.

use std::{
    ffi::{CString, c_char},
    sync::Mutex,
};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Note a call.
pub fn note(line: String) {
    LINES
        .lock()
        .unwrap_or_else(|held| held.into_inner())
        .push(line);
}

/// All calls so far, one a line: the function, `comm=` its number in this process, `rank=`, and for an operation
/// `stream=`, `numel=`, `dtype=`. The caller keeps the text; it is never freed.
#[unsafe(no_mangle)]
extern "C" fn fake_nccl_log() -> *const c_char {
    let lines = LINES
        .lock()
        .unwrap_or_else(|held| held.into_inner())
        .join("\n");
    CString::new(lines).unwrap_or_default().into_raw()
}
