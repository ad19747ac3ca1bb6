//! The driver: whether it is there, what it has found, and its errors in our words.

use std::sync::OnceLock;

use cudarc::driver::{result, sys};

use crate::dtype::Memory;
use crate::error::KernelError;

/// CUDA 11.2 brought memory that is allocated and freed in stream order.
const OLDEST: i32 = 11020;

/// The names under which the driver's library is looked for, in this order, by the dynamic loader's rules.
const NAMES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

/// Whether the driver can be called.
///
/// # Errors
/// When it cannot: what was looked for, as the end of a sentence.
pub fn ready() -> Result<(), String> {
    static READY: OnceLock<Result<(), String>> = OnceLock::new();
    READY.get_or_init(look).clone()
}

fn look() -> Result<(), String> {
    let open = |name: &&str| {
        // SAFETY: the driver's library runs its own initialisers, which touch nothing of ours; cudarc would load it just so.
        // Test: `no_driver_is_said`.
        unsafe { libloading::Library::new(*name) }
    };
    // Kept open: cudarc opens it again, under one of these names, and panics where it cannot.
    let library = NAMES.iter().find_map(|name| open(name).ok());
    let Some(library) = library else {
        let names = NAMES.join(" or ");
        return Err(format!(
            "the NVIDIA driver's library was not found ({names}); install the driver, or point LD_LIBRARY_PATH to it"
        ));
    };
    std::mem::forget(library);
    result::init()
        .map_err(|error| format!("the NVIDIA driver refused to start: {}", say(error)))?;
    let mut version = 0;
    // SAFETY: the driver writes one number. Test: any that opens a queue.
    let answer = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    if answer != sys::CUresult::CUDA_SUCCESS || version < OLDEST {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(format!(
            "the NVIDIA driver is for CUDA {major}.{minor}, and 11.2 is the oldest that frees memory in stream order; update it"
        ));
    }
    Ok(())
}

/// The devices that this process may use, by ordinal: the driver's names. It heeds CUDA_VISIBLE_DEVICES.
///
/// # Errors
/// When there is none: what was looked for, as the end of a sentence.
pub fn devices() -> Result<Vec<String>, String> {
    ready()?;
    let failed = |error| {
        format!(
            "the NVIDIA driver does not list its devices: {}",
            say(error)
        )
    };
    let count = result::device::get_count().map_err(failed)?;
    if count == 0 {
        return Err("the NVIDIA driver lists no device".into());
    }
    let name = |ordinal| {
        let device = result::device::get(ordinal)?;
        result::device::get_name(device)
    };
    (0..count)
        .map(|ordinal| name(ordinal).map_err(failed))
        .collect()
}

/// "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory".
pub(super) fn say(error: result::DriverError) -> String {
    let name = error
        .error_name()
        .map(|name| name.to_string_lossy().into_owned());
    let text = error
        .error_string()
        .map(|text| text.to_string_lossy().into_owned());
    let name = name.unwrap_or_else(|_| "CUDA error".into());
    match text {
        Ok(text) => format!("{name} ({}): {text}", error.0 as i32),
        Err(_) => format!("{name} ({})", error.0 as i32),
    }
}

/// The driver's refusal of `doing` on device `ordinal`, with what to try.
pub(super) fn refused(
    ordinal: u32,
    doing: impl Into<String>,
) -> impl FnOnce(result::DriverError) -> KernelError {
    let doing = doing.into();
    move |error| {
        use sys::CUresult as Code;
        let hint = match error.0 {
            Code::CUDA_ERROR_OUT_OF_MEMORY => {
                ". Use smaller batches, shard more (zero1, zero2, fsdp), or end what else uses the device"
            }
            Code::CUDA_ERROR_NO_DEVICE | Code::CUDA_ERROR_INVALID_DEVICE => {
                ". Choose a device that is listed by `fabric env`; CUDA_VISIBLE_DEVICES hides others"
            }
            Code::CUDA_ERROR_NO_BINARY_FOR_GPU | Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
                ". The kernels need compute capability 8.0 or newer and a driver for CUDA 11.2 or newer"
            }
            Code::CUDA_ERROR_ILLEGAL_ADDRESS
            | Code::CUDA_ERROR_LAUNCH_FAILED
            | Code::CUDA_ERROR_MISALIGNED_ADDRESS => {
                ". The device is lost to this process: start it again, from its last checkpoint; \
                 CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer show which kernel it was"
            }
            _ => "",
        };
        KernelError::Driver {
            memory: Memory::Cuda(ordinal),
            doing,
            what: format!("{}{hint}", say(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_driver_is_said() {
        match devices() {
            Ok(names) => assert!(!names.is_empty()),
            Err(why) => assert!(why.contains("NVIDIA driver"), "{why}"),
        }
    }
}
