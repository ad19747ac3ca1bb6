//! Memory pools: what stream-ordered allocations count against.

use std::{
    ffi::c_void,
    sync::{Arc, Mutex},
};

use crate::{
    code::{Code, Result},
    driver::{self, call},
    outside::{In, Out},
    registry::{Handle, Registry, lock},
};

/// All pools.
pub static POOLS: Registry<Pool> = Registry::new();

/// A pool.
pub struct Pool {
    /// The device in whose memory it is.
    pub device: i32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    reuse: [i32; 3],
    threshold: u64,
    used: u64,
    used_high: u64,
}

impl Pool {
    /// An empty one.
    pub fn new(device: i32) -> Self {
        let state = State {
            reuse: [1; 3],
            ..State::default()
        };
        Self {
            device,
            state: Mutex::new(state),
        }
    }

    /// Something was allocated.
    pub fn grow(&self, bytes: usize) {
        let mut state = lock(&self.state);
        state.used += bytes as u64;
        state.used_high = state.used_high.max(state.used);
    }

    /// Something was freed.
    pub fn shrink(&self, bytes: usize) {
        lock(&self.state).used -= bytes as u64;
    }
}

/// The pool that a device began with, and the one that it uses.
fn pools(device: i32) -> Result<(Handle, Handle)> {
    let device = driver::device(device)?;
    let mut pools = lock(&device.pools);
    Ok(*pools.get_or_insert_with(|| {
        let handle = POOLS.add(device.pool.clone());
        (handle, handle)
    }))
}

/// The pool that a device uses.
pub fn current(device: i32) -> Result<Arc<Pool>> {
    POOLS.get(pools(device)?.1)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetDefaultMemPool(pool: Out<Handle>, device: i32) -> i32 {
    call("cuDeviceGetDefaultMemPool", || pool.give(pools(device)?.0))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetMemPool(pool: Out<Handle>, device: i32) -> i32 {
    call("cuDeviceGetMemPool", || pool.give(pools(device)?.1))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceSetMemPool(device: i32, pool: Handle) -> i32 {
    call("cuDeviceSetMemPool", || {
        let (first, _) = pools(device)?;
        if POOLS.get(pool)?.device != device {
            return Err(Code::INVALID_DEVICE);
        }
        *lock(&driver::device(device)?.pools) = Some((first, pool));
        Ok(())
    })
}

/// Of the properties only the place is read: its type (1: a device) and number are the third and fourth.
#[unsafe(no_mangle)]
extern "C" fn cuMemPoolCreate(pool: Out<Handle>, properties: In<i32>) -> i32 {
    call("cuMemPoolCreate", || {
        if properties.at(2)? != 1 {
            return Err(Code::INVALID_VALUE);
        }
        let device = driver::device(properties.at(3)?)?.ordinal;
        pool.give(POOLS.add(Arc::new(Pool::new(device))))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemPoolDestroy(pool: Handle) -> i32 {
    call("cuMemPoolDestroy", || {
        let found = POOLS.get(pool)?;
        let (first, used) = pools(found.device)?;
        if pool == first {
            return Err(Code::INVALID_VALUE);
        }
        if pool == used {
            *lock(&driver::device(found.device)?.pools) = Some((first, first));
        }
        POOLS.remove(pool).map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemPoolTrimTo(pool: Handle, _keep: usize) -> i32 {
    call("cuMemPoolTrimTo", || POOLS.get(pool).map(drop))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemPoolGetAttribute(pool: Handle, attribute: i32, value: *mut c_void) -> i32 {
    call("cuMemPoolGetAttribute", || {
        let pool = POOLS.get(pool)?;
        let state = lock(&pool.state);
        let number = match attribute {
            1..=3 => return Out::of(value.cast()).give(state.reuse[attribute as usize - 1]),
            4 => state.threshold,
            5 | 7 => state.used,
            6 | 8 => state.used_high,
            _ => return Err(Code::INVALID_VALUE),
        };
        Out::of(value.cast()).give(number)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemPoolSetAttribute(pool: Handle, attribute: i32, value: *mut c_void) -> i32 {
    call("cuMemPoolSetAttribute", || {
        let pool = POOLS.get(pool)?;
        let mut state = lock(&pool.state);
        match attribute {
            1..=3 => {
                state.reuse[attribute as usize - 1] = In::of(value.cast_const().cast()).at(0)?
            }
            4 => state.threshold = In::of(value.cast_const().cast()).at(0)?,
            6 | 8 if In::of(value.cast_const().cast::<u64>()).at(0)? == 0 => {
                state.used_high = state.used
            }
            _ => return Err(Code::INVALID_VALUE),
        }
        Ok(())
    })
}
