//! Contexts: what belongs to one device and one program, which of them a thread uses, and the error after which
//! nothing works on one any more.

use std::{
    cell::RefCell,
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
    thread::ThreadId,
};

use crate::{
    code::{Code, Result},
    driver::{self, call, within},
    memory,
    outside::Out,
    registry::{Handle, Registry, lock},
    stream::{STREAMS, Stream},
};

static CONTEXTS: Registry<Context> = Registry::new();

thread_local! {
    static STACK: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

/// A context.
pub struct Context {
    /// Its device's number.
    pub device: i32,
    /// The legacy default stream.
    pub null: Arc<Stream>,
    /// The others, as long as they are there.
    pub streams: Mutex<Vec<Arc<Stream>>>,
    /// Held while work is submitted, because the legacy stream waits for what was before it and others wait for it.
    pub order: Mutex<()>,
    per_thread: Mutex<HashMap<ThreadId, Arc<Stream>>>,
    failed: Arc<AtomicI32>,
    is_over: AtomicBool,
    peers: Mutex<Vec<i32>>,
}

impl Context {
    fn new(device: i32) -> Arc<Self> {
        let failed = Arc::new(AtomicI32::new(0));
        Arc::new(Self {
            device,
            null: Stream::new(device, failed.clone(), true),
            streams: Mutex::default(),
            order: Mutex::default(),
            per_thread: Mutex::default(),
            failed,
            is_over: AtomicBool::new(false),
            peers: Mutex::default(),
        })
    }

    /// `Err` with the error after which nothing works any more.
    pub fn check(&self) -> Result {
        if self.is_over.load(Ordering::Acquire) {
            return Err(Code::CONTEXT_IS_DESTROYED);
        }
        match self.failed.load(Ordering::Acquire) {
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }

    /// From now on nothing works. The first error stays.
    pub fn fail(&self, code: Code) {
        fail(&self.failed, code);
    }

    /// The stream of a handle, which may be one of those that are always there.
    pub fn stream(&self, handle: Handle) -> Result<Arc<Stream>> {
        match handle.number() {
            0 | 1 => Ok(self.null.clone()),
            2 => {
                let mut streams = lock(&self.per_thread);
                let stream = streams
                    .entry(std::thread::current().id())
                    .or_insert_with(|| {
                        let stream = Stream::new(self.device, self.failed.clone(), true);
                        lock(&self.streams).push(stream.clone());
                        stream
                    });
                Ok(stream.clone())
            }
            _ => {
                let stream = STREAMS.get(handle)?;
                match Arc::ptr_eq(&stream.failed, &self.failed) {
                    true => Ok(stream),
                    false => Err(Code::INVALID_HANDLE), // another context's
                }
            }
        }
    }

    /// A stream that waits for the legacy one, and that one for it, or not.
    pub fn open(&self, is_blocking: bool) -> Arc<Stream> {
        let stream = Stream::new(self.device, self.failed.clone(), is_blocking);
        lock(&self.streams).push(stream.clone());
        stream
    }

    /// Every stream, the legacy one too.
    pub fn all_streams(&self) -> Vec<Arc<Stream>> {
        let mut streams = lock(&self.streams).clone();
        streams.push(self.null.clone());
        streams
    }

    /// Wait for everything.
    pub fn drain(&self) {
        for stream in self.all_streams() {
            stream.drain();
        }
    }

    /// The devices whose memory kernels of this context may touch.
    pub fn peers_and_self(&self) -> Vec<i32> {
        let mut devices = lock(&self.peers).clone();
        devices.push(self.device);
        devices
    }

    fn end(&self) {
        self.drain();
        self.is_over.store(true, Ordering::Release);
        for stream in self.all_streams() {
            stream.close();
        }
    }
}

/// Keep `code` if it is the first.
pub fn fail(failed: &AtomicI32, code: Code) {
    let _ = failed.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Acquire);
}

/// The context of the caller's thread.
pub fn current() -> Result<Arc<Context>> {
    driver::devices()?;
    let handle = STACK.with_borrow(|stack| stack.last().copied());
    let handle = handle
        .filter(|handle| !handle.0.is_null())
        .ok_or(Code::INVALID_CONTEXT)?;
    CONTEXTS.get(handle).map_err(|_| Code::CONTEXT_IS_DESTROYED)
}

fn set_current(handle: Handle) -> Result {
    if !handle.0.is_null() {
        CONTEXTS.get(handle).map_err(|_| Code::INVALID_CONTEXT)?;
    }
    STACK.with_borrow_mut(|stack| {
        stack.pop();
        stack.push(handle);
    });
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: i32) -> i32 {
    call("cuDevicePrimaryCtxRetain", || {
        let mut primary = lock(&driver::device(device)?.primary);
        let (handle, _, retains) = primary.get_or_insert_with(|| {
            let context = Context::new(device);
            (CONTEXTS.add(context.clone()), context, 0)
        });
        *retains += 1;
        context.give(*handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> i32 {
    call("cuDevicePrimaryCtxRelease_v2", || {
        let mut primary = lock(&driver::device(device)?.primary);
        let (handle, context, retains) = primary.as_mut().ok_or(Code::INVALID_CONTEXT)?;
        *retains -= 1;
        if *retains == 0 {
            context.end();
            CONTEXTS.remove(*handle)?;
            memory::forget(device);
            *primary = None;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxReset_v2(device: i32) -> i32 {
    call("cuDevicePrimaryCtxReset_v2", || {
        let mut primary = lock(&driver::device(device)?.primary);
        if let Some((handle, context, _)) = primary.take() {
            context.end();
            CONTEXTS.remove(handle)?;
            memory::forget(device);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, is_active: Out<i32>) -> i32 {
    call("cuDevicePrimaryCtxGetState", || {
        flags.give(0)?;
        is_active.give(i32::from(lock(&driver::device(device)?.primary).is_some()))
    })
}

fn create(context: Out<Handle>, device: i32) -> Result {
    let handle = CONTEXTS.add(Context::new(driver::device(device)?.ordinal));
    STACK.with_borrow_mut(|stack| stack.push(handle));
    context.give(handle)
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxCreate_v2(context: Out<Handle>, _flags: u32, device: i32) -> i32 {
    call("cuCtxCreate_v2", || create(context, device))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxCreate_v3(
    context: Out<Handle>,
    _params: Handle,
    _count: i32,
    _flags: u32,
    device: i32,
) -> i32 {
    call("cuCtxCreate_v3", || create(context, device))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxCreate_v4(
    context: Out<Handle>,
    _params: Handle,
    _flags: u32,
    device: i32,
) -> i32 {
    call("cuCtxCreate_v4", || create(context, device))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxDestroy_v2(context: Handle) -> i32 {
    call("cuCtxDestroy_v2", || {
        let found = CONTEXTS
            .remove(context)
            .map_err(|_| Code::INVALID_CONTEXT)?;
        found.end();
        STACK.with_borrow_mut(|stack| stack.retain(|handle| *handle != context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Handle) -> i32 {
    call("cuCtxSetCurrent", || set_current(context))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(context: Out<Handle>) -> i32 {
    call("cuCtxGetCurrent", || {
        driver::devices()?;
        let handle = STACK.with_borrow(|stack| stack.last().copied());
        context.give(handle.unwrap_or(Handle(std::ptr::null_mut())))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> i32 {
    call("cuCtxPushCurrent_v2", || {
        CONTEXTS.get(context).map_err(|_| Code::INVALID_CONTEXT)?;
        STACK.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPopCurrent_v2(context: Out<Handle>) -> i32 {
    call("cuCtxPopCurrent_v2", || {
        let handle = STACK
            .with_borrow_mut(Vec::pop)
            .ok_or(Code::INVALID_CONTEXT)?;
        context.offer(handle);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: Out<i32>) -> i32 {
    call("cuCtxGetDevice", || device.give(current()?.device))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> i32 {
    within("cuCtxSynchronize", |context| {
        context.drain();
        context.check()
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetFlags(flags: Out<u32>) -> i32 {
    within("cuCtxGetFlags", |_| flags.give(0))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetFlags(_flags: u32) -> i32 {
    within("cuCtxSetFlags", |_| Ok(()))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetApiVersion(_context: Handle, version: Out<u32>) -> i32 {
    call("cuCtxGetApiVersion", || version.give(3020))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetLimit(value: Out<usize>, limit: i32) -> i32 {
    within("cuCtxGetLimit", |_| match limit {
        0 => value.give(1024),    // stack
        1 => value.give(1 << 20), // printf
        2 => value.give(8 << 20), // malloc
        _ => Err(Code::INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetLimit(limit: i32, _value: usize) -> i32 {
    within("cuCtxSetLimit", |_| match limit {
        0..=2 => Ok(()),
        _ => Err(Code::INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCacheConfig(config: Out<i32>) -> i32 {
    within("cuCtxGetCacheConfig", |_| config.give(0))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCacheConfig(_config: i32) -> i32 {
    within("cuCtxSetCacheConfig", |_| Ok(()))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) -> i32 {
    within("cuCtxGetStreamPriorityRange", |_| {
        least.offer(0);
        greatest.offer(-5);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxEnablePeerAccess(peer: Handle, flags: u32) -> i32 {
    within("cuCtxEnablePeerAccess", |context| {
        let peer = CONTEXTS
            .get(peer)
            .map_err(|_| Code::INVALID_CONTEXT)?
            .device;
        let mut peers = lock(&context.peers);
        match () {
            () if flags != 0 => Err(Code::INVALID_VALUE),
            () if peer == context.device => Err(Code::INVALID_DEVICE),
            () if peers.contains(&peer) => Err(Code::PEER_ACCESS_ALREADY_ENABLED),
            () => {
                peers.push(peer);
                Ok(())
            }
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxDisablePeerAccess(peer: Handle) -> i32 {
    within("cuCtxDisablePeerAccess", |context| {
        let peer = CONTEXTS
            .get(peer)
            .map_err(|_| Code::INVALID_CONTEXT)?
            .device;
        let mut peers = lock(&context.peers);
        let place = peers.iter().position(|device| *device == peer);
        peers.swap_remove(place.ok_or(Code::PEER_ACCESS_NOT_ENABLED)?);
        Ok(())
    })
}
