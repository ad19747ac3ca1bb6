//! Devices: their numbers, names, sizes and attributes.

use std::{
    ffi::c_char,
    sync::{Arc, Mutex},
};

use crate::{
    code::{Code, Result},
    context::Context,
    driver::{self, call, settings},
    outside::Out,
    pool::Pool,
    registry::Handle,
};

/// Multiprocessors of a device: few, so that a persistent grid is small.
pub const MULTIPROCESSORS: i32 = 4;
/// Threads that one of them holds.
pub const THREADS_PER_MULTIPROCESSOR: i32 = 2048;

/// A device.
pub struct Device {
    /// Its number.
    pub ordinal: i32,
    /// Its primary context, and how often that is retained.
    pub primary: Mutex<Option<(Handle, Arc<Context>, usize)>>,
    /// The pool it began with, and the one it uses.
    pub pools: Mutex<Option<(Handle, Handle)>>,
    /// What the first of them knows.
    pub pool: Arc<Pool>,
}

// SAFETY: handles are numbers that look like pointers; nobody follows them.
unsafe impl Sync for Device {}
// SAFETY: as for Sync.
unsafe impl Send for Device {}

impl Device {
    /// Device number `ordinal`.
    pub fn new(ordinal: usize) -> Self {
        let ordinal = ordinal as i32;
        Self {
            ordinal,
            primary: Mutex::new(None),
            pools: Mutex::new(None),
            pool: Arc::new(Pool::new(ordinal)),
        }
    }
}

/// A device's attribute. What is asked of other attributes is answered with 0: this device cannot do it.
fn attribute(device: &Device, number: i32) -> Result<i32> {
    Ok(match number {
        1..=3 => 1024,               // threads a block, and its x and y
        4 => 64,                     // and its z
        5 => i32::MAX,               // blocks in x
        6 | 7 => 65_535,             // blocks in y, z
        8 => 48 << 10,               // shared memory a block
        9 => 64 << 10,               // constant memory
        10 => 32,                    // warp
        11 => i32::MAX,              // pitch
        12 | 82 => 65_536,           // registers a block, and a multiprocessor
        13 => 1_410_000,             // clock, kHz
        14 => 512,                   // texture alignment
        15 | 19 | 31 | 41 | 78 => 1, // overlap, mapped host memory, concurrent kernels, unified addressing, priorities
        16 => MULTIPROCESSORS,
        33 => device.ordinal + 1, // PCI bus
        36 => 1_215_000,          // memory clock, kHz
        37 => 5120,               // memory bus, bits
        38 => 40 << 20,           // L2
        39 => THREADS_PER_MULTIPROCESSOR,
        40 => 3, // copy engines
        75 => settings().capability / 10,
        76 => settings().capability % 10,
        81 => 164 << 10, // shared memory a multiprocessor
        97 => 163 << 10, // shared memory a block, if asked for
        106 => 32,       // blocks a multiprocessor
        115 => 1,        // memory pools
        _ if (1..=160).contains(&number) => 0,
        _ => return Err(Code::INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: Out<i32>, ordinal: i32) -> i32 {
    call("cuDeviceGet", || {
        device.give(driver::device(ordinal)?.ordinal)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: Out<i32>) -> i32 {
    call("cuDeviceGetCount", || {
        count.give(driver::devices()?.len() as i32)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: Out<c_char>, room: i32, device: i32) -> i32 {
    call("cuDeviceGetName", || {
        driver::device(device)?;
        name.write("Fake CUDA device", room)
    })
}

fn uuid(uuid: Out<[u8; 16]>, device: i32) -> Result {
    let mut bytes = *b"fake-cuda-device";
    bytes[15] = driver::device(device)?.ordinal as u8;
    uuid.give(bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid(id: Out<[u8; 16]>, device: i32) -> i32 {
    call("cuDeviceGetUuid", || uuid(id, device))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid_v2(id: Out<[u8; 16]>, device: i32) -> i32 {
    call("cuDeviceGetUuid_v2", || uuid(id, device))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) -> i32 {
    call("cuDeviceTotalMem_v2", || {
        driver::device(device)?;
        bytes.give(settings().memory)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: Out<i32>, number: i32, device: i32) -> i32 {
    call("cuDeviceGetAttribute", || {
        value.give(attribute(driver::device(device)?, number)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetPCIBusId(text: Out<c_char>, room: i32, device: i32) -> i32 {
    call("cuDeviceGetPCIBusId", || {
        let bus = driver::device(device)?.ordinal + 1;
        text.write(&format!("0000:{bus:02X}:00.0"), room)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceCanAccessPeer(can: Out<i32>, device: i32, peer: i32) -> i32 {
    call("cuDeviceCanAccessPeer", || {
        let (device, peer) = (driver::device(device)?, driver::device(peer)?);
        can.give(i32::from(device.ordinal != peer.ordinal))
    })
}
