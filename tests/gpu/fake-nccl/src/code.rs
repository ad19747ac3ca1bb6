//! Result codes, their texts, and the last error in words.

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char, c_void},
    sync::Mutex,
};

use fabric_engine::Error;

/// A result other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub i32);

/// The result of everything that can fail.
pub type Result<T = ()> = std::result::Result<T, Code>;

impl Code {
    pub const SUCCESS: i32 = 0;
    pub const CUDA: Self = Self(1);
    pub const SYSTEM: Self = Self(2);
    pub const INTERNAL: Self = Self(3);
    pub const ARGUMENT: Self = Self(4);
    pub const USAGE: Self = Self(5);
    pub const REMOTE: Self = Self(6);
    pub const IN_PROGRESS: Self = Self(7);

    /// This, and why.
    pub fn because(self, why: impl Into<String>) -> Self {
        *last() = why.into();
        self
    }

    /// What an error of the engine is to NCCL.
    pub fn of(error: &Error) -> Self {
        let code = match error {
            Error::PeerLost(_) | Error::Aborted { .. } => Self::REMOTE,
            Error::Diverged { .. } | Error::Argument { .. } => Self::USAGE,
            Error::Rendezvous { .. } | Error::Io { .. } => Self::SYSTEM,
            _ => Self::INTERNAL,
        };
        code.because(error.to_string())
    }
}

static LAST: Mutex<String> = Mutex::new(String::new());

fn last() -> std::sync::MutexGuard<'static, String> {
    LAST.lock().unwrap_or_else(|held| held.into_inner())
}

thread_local! {
    static WORDS: RefCell<CString> = RefCell::default();
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_comm: *mut c_void) -> *const c_char {
    let words = CString::new(last().replace('\0', " ")).unwrap_or_default();
    WORDS.with_borrow_mut(|kept| {
        *kept = words;
        kept.as_ptr()
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(code: i32) -> *const c_char {
    let text: &CStr = match code {
        0 => c"no error",
        1 => c"unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        2 => c"unhandled system error (run with NCCL_DEBUG=INFO for details)",
        3 => c"internal error - please report this issue to the NCCL developers",
        4 => c"invalid argument (run with NCCL_DEBUG=WARN for details)",
        5 => c"invalid usage (run with NCCL_DEBUG=WARN for details)",
        6 => c"remote process exited or there was a network error",
        7 => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}
