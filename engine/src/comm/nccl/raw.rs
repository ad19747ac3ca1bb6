//! NCCL's C interface, as its header has it: result codes, and the functions that this layer calls.

use std::ffi::{c_char, c_int, c_void};

/// A communicator of NCCL's.
pub(super) type RawComm = *mut c_void;
/// A CUDA stream.
pub(super) type RawStream = *mut c_void;

/// What every function returns.
pub(super) type Code = c_int;

pub(super) const SUCCESS: Code = 0;
pub(super) const INVALID_ARGUMENT: Code = 4;
pub(super) const INVALID_USAGE: Code = 5;
pub(super) const REMOTE_ERROR: Code = 6;
pub(super) const IN_PROGRESS: Code = 7;

/// The name of a result code.
pub(super) fn name(code: Code) -> &'static str {
    match code {
        SUCCESS => "ncclSuccess",
        1 => "ncclUnhandledCudaError",
        2 => "ncclSystemError",
        3 => "ncclInternalError",
        INVALID_ARGUMENT => "ncclInvalidArgument",
        INVALID_USAGE => "ncclInvalidUsage",
        REMOTE_ERROR => "ncclRemoteError",
        IN_PROGRESS => "ncclInProgress",
        8 => "ncclTimeout",
        _ => "an unknown result",
    }
}

/// Where ranks meet.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawId(pub(super) [u8; 128]);

/// No group: what a rank says that is in none after a split.
pub(super) const NO_COLOR: c_int = -1;
/// A scalar that lies in the host's memory, and is read before the function returns.
pub(super) const HOST_IMMEDIATE: c_int = 1;

macro_rules! functions {
    (
        always { $($field:ident = $symbol:literal ( $($argument:ty),* );)* }
        newer { $($new:ident = $new_symbol:literal ( $($new_argument:ty),* );)* }
    ) => {
        /// The library's functions. Those that its oldest accepted version lacks may be missing.
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> Code,)*
            $(pub(super) $new: Option<unsafe extern "C" fn($($new_argument),*) -> Code>,)*
            pub(super) last_error: unsafe extern "C" fn(RawComm) -> *const c_char,
        }

        impl Functions {
            /// All of a library, or the name of one that is missing.
            pub(super) fn resolve(library: &libloading::Library) -> Result<Self, &'static str> {
                $(
                    // SAFETY: the type is the header's declaration of this function.
                    let symbol = unsafe { library.get(concat!($symbol, "\0").as_bytes()) };
                    let $field = *symbol.map_err(|_| $symbol)?;
                )*
                $(
                    // SAFETY: as above.
                    let symbol = unsafe { library.get(concat!($new_symbol, "\0").as_bytes()) };
                    let $new = symbol.ok().map(|symbol| *symbol);
                )*
                // SAFETY: as above.
                let symbol = unsafe { library.get(b"ncclGetLastError\0") };
                let last_error = *symbol.map_err(|_| "ncclGetLastError")?;
                Ok(Self { $($field,)* $($new,)* last_error })
            }
        }
    };
}

type Pointer = *const c_void;
type PointerMut = *mut c_void;

functions! {
    always {
        version = "ncclGetVersion"(*mut c_int);
        unique_id = "ncclGetUniqueId"(*mut RawId);
        init = "ncclCommInitRankConfig"(*mut RawComm, c_int, RawId, c_int, PointerMut);
        finalize = "ncclCommFinalize"(RawComm);
        destroy = "ncclCommDestroy"(RawComm);
        abort = "ncclCommAbort"(RawComm);
        async_error = "ncclCommGetAsyncError"(RawComm, *mut Code);
        count = "ncclCommCount"(RawComm, *mut c_int);
        user_rank = "ncclCommUserRank"(RawComm, *mut c_int);
        group_start = "ncclGroupStart"();
        group_end = "ncclGroupEnd"();
        // Buffers, elements, dtype, then what the operation needs, the communicator, the stream.
        all_reduce = "ncclAllReduce"(Pointer, PointerMut, usize, c_int, c_int, RawComm, RawStream);
        reduce_scatter = "ncclReduceScatter"(Pointer, PointerMut, usize, c_int, c_int, RawComm, RawStream);
        all_gather = "ncclAllGather"(Pointer, PointerMut, usize, c_int, RawComm, RawStream);
        broadcast = "ncclBroadcast"(Pointer, PointerMut, usize, c_int, c_int, RawComm, RawStream);
        reduce = "ncclReduce"(Pointer, PointerMut, usize, c_int, c_int, c_int, RawComm, RawStream);
        send = "ncclSend"(Pointer, usize, c_int, c_int, RawComm, RawStream);
        recv = "ncclRecv"(PointerMut, usize, c_int, c_int, RawComm, RawStream);
        create_pre_mul_sum = "ncclRedOpCreatePreMulSum"(*mut c_int, PointerMut, c_int, c_int, RawComm);
        destroy_op = "ncclRedOpDestroy"(c_int, RawComm);
    }
    newer {
        split = "ncclCommSplit"(RawComm, c_int, c_int, *mut RawComm, PointerMut); // 2.18
        mem_alloc = "ncclMemAlloc"(*mut PointerMut, usize); // 2.19
        mem_free = "ncclMemFree"(PointerMut); // 2.19
        register = "ncclCommRegister"(RawComm, PointerMut, usize, *mut PointerMut); // 2.19
        deregister = "ncclCommDeregister"(RawComm, PointerMut); // 2.19
        register_window = "ncclCommWindowRegister"(RawComm, PointerMut, usize, *mut PointerMut, c_int); // 2.27
        deregister_window = "ncclCommWindowDeregister"(RawComm, PointerMut); // 2.27
        all_to_all = "ncclAlltoAll"(Pointer, PointerMut, usize, c_int, RawComm, RawStream); // 2.28
    }
}
