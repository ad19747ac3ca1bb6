//! The driver as a whole: its settings, its devices, and the way in that every call takes, where calls are counted and
//! where those that were told to fail do.

use std::{
    cell::Cell,
    collections::HashMap,
    ffi::c_char,
    sync::{
        LazyLock, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    code::{Code, Result},
    context,
    device::Device,
    outside::{In, Out},
    registry::lock,
    settings::Settings,
};

const VERSION: i32 = 13_000;

static SETTINGS: LazyLock<Settings> = LazyLock::new(Settings::read);
static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
static IS_UP: AtomicBool = AtomicBool::new(false);
static COUNTS: LazyLock<Mutex<HashMap<String, u64>>> = LazyLock::new(Mutex::default);

thread_local! {
    static IS_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

/// The environment's settings.
pub fn settings() -> &'static Settings {
    &SETTINGS
}

/// All devices.
pub fn devices() -> Result<&'static [Device]> {
    match DEVICES.get() {
        Some(devices) if IS_UP.load(Ordering::Acquire) => Ok(devices),
        _ => Err(Code::NOT_INITIALIZED),
    }
}

/// The device with this number.
pub fn device(ordinal: i32) -> Result<&'static Device> {
    let index = usize::try_from(ordinal).map_err(|_| Code::INVALID_DEVICE)?;
    devices()?.get(index).ok_or(Code::INVALID_DEVICE)
}

/// What every call does: count itself, fail if it was told to, and turn its result into a number.
pub fn call(name: &str, body: impl FnOnce() -> Result) -> i32 {
    let result = enter(name).and_then(|()| body());
    result.map_or_else(|code| code.0, |()| 0)
}

/// A call that only the caller's thread's context permits: one that is there and has not failed.
pub fn within(name: &str, body: impl FnOnce(&context::Context) -> Result) -> i32 {
    call(name, || {
        let context = context::current()?;
        context.check()?;
        body(&context)
    })
}

fn enter(name: &str) -> Result {
    if IS_HOST_FUNCTION.get() {
        return Err(Code::NOT_PERMITTED);
    }
    let name = base(name);
    let mut counts = lock(&COUNTS);
    let count = counts.entry(name.into()).or_default();
    *count += 1;
    let fault = SETTINGS
        .faults
        .iter()
        .find(|(function, call, _)| base(function) == name && call == count);
    let Some(fault) = fault else {
        return Ok(());
    };
    drop(counts);
    let code = Code(fault.2);
    if code.is_sticky()
        && let Ok(context) = context::current()
    {
        context.fail(code);
    }
    Err(code)
}

/// The name as the manual has it.
fn base(name: &str) -> &str {
    let cut = name
        .rfind("_v")
        .filter(|at| name[at + 2..].parse::<u8>().is_ok());
    &name[..cut.unwrap_or(name.len())]
}

/// Run a host function, in which the driver may not be called.
pub fn as_host_function(body: impl FnOnce()) {
    IS_HOST_FUNCTION.set(true);
    body();
    IS_HOST_FUNCTION.set(false);
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: u32) -> i32 {
    call("cuInit", || {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if SETTINGS.devices == 0 {
            return Err(Code::NO_DEVICE);
        }
        DEVICES.get_or_init(|| (0..SETTINGS.devices).map(Device::new).collect());
        IS_UP.store(true, Ordering::Release);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: Out<i32>) -> i32 {
    call("cuDriverGetVersion", || version.give(VERSION))
}

/// How often a function of the driver was called so far; the number at its name's end does not matter.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_count(name: In<c_char>) -> u64 {
    let name = name.text().unwrap_or_default();
    lock(&COUNTS).get(base(&name)).copied().unwrap_or(0)
}

/// How many allocations of a device are alive.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_live(ordinal: i32) -> u64 {
    crate::memory::live(ordinal)
}
