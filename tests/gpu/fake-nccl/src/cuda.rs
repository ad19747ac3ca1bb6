//! The driver, as far as NCCL needs it here: whatever libcuda the loader finds.

use std::{
    ffi::{c_int, c_void},
    sync::{LazyLock, Mutex},
};

use libloading::Library;

use crate::code::{Code, Result};

type Pointer = *mut c_void;

/// A context, a stream or an event of the driver's, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle(pub usize);

impl Handle {
    fn raw(self) -> Pointer {
        std::ptr::with_exposed_provenance_mut(self.0)
    }
}

/// The functions that are called.
struct Driver {
    get_current: unsafe extern "C" fn(*mut Pointer) -> c_int,
    push: unsafe extern "C" fn(Pointer) -> c_int,
    pop: unsafe extern "C" fn(*mut Pointer) -> c_int,
    attribute: unsafe extern "C" fn(Pointer, c_int, u64) -> c_int,
    event_create: unsafe extern "C" fn(*mut Pointer, u32) -> c_int,
    event_destroy: unsafe extern "C" fn(Pointer) -> c_int,
    event_record: unsafe extern "C" fn(Pointer, Pointer) -> c_int,
    wait_event: unsafe extern "C" fn(Pointer, Pointer, u32) -> c_int,
    host_func: unsafe extern "C" fn(Pointer, unsafe extern "C" fn(Pointer), Pointer) -> c_int,
    alloc: unsafe extern "C" fn(*mut u64, usize) -> c_int,
    free: unsafe extern "C" fn(u64) -> c_int,
    _library: Library,
}

static DRIVER: LazyLock<std::result::Result<Driver, String>> =
    LazyLock::new(|| Driver::load().map_err(|e| e.to_string()));
static ORDER: Mutex<()> = Mutex::new(()); // what is put into streams together stays together

impl Driver {
    fn load() -> std::result::Result<Self, libloading::Error> {
        // SAFETY: the driver's initialisers may run in any process.
        let library = unsafe { Library::new("libcuda.so.1") }?;
        macro_rules! symbol {
            ($name:literal) => {{
                // SAFETY: the field's type is the driver's declaration of this function.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }?
            }};
        }
        Ok(Self {
            get_current: symbol!("cuCtxGetCurrent"),
            push: symbol!("cuCtxPushCurrent_v2"),
            pop: symbol!("cuCtxPopCurrent_v2"),
            attribute: symbol!("cuPointerGetAttribute"),
            event_create: symbol!("cuEventCreate"),
            event_destroy: symbol!("cuEventDestroy_v2"),
            event_record: symbol!("cuEventRecord"),
            wait_event: symbol!("cuStreamWaitEvent"),
            host_func: symbol!("cuLaunchHostFunc"),
            alloc: symbol!("cuMemAlloc_v2"),
            free: symbol!("cuMemFree_v2"),
            _library: library,
        })
    }
}

fn driver() -> Result<&'static Driver> {
    DRIVER
        .as_ref()
        .map_err(|error| Code::CUDA.because(format!("no libcuda.so.1: {error}")))
}

fn check(name: &str, code: c_int) -> Result {
    match code {
        0 => Ok(()),
        code => Err(Code::CUDA.because(format!("Cuda failure {code} in {name}"))),
    }
}

/// The context of the caller's thread.
pub fn current() -> Result<Handle> {
    let mut context = std::ptr::null_mut();
    // SAFETY: a place for a handle.
    check("cuCtxGetCurrent", unsafe {
        (driver()?.get_current)(&mut context)
    })?;
    if context.is_null() {
        return Err(Code::CUDA.because("no CUDA context is current on this thread"));
    }
    Ok(Handle(context.expose_provenance()))
}

/// Do something with `context` as the thread's.
pub fn within<T>(context: Handle, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let driver = driver()?;
    // SAFETY: the driver refuses a context that is no more.
    check("cuCtxPushCurrent", unsafe { (driver.push)(context.raw()) })?;
    let result = body();
    // SAFETY: what was pushed above is popped; nobody asks which it was.
    check("cuCtxPopCurrent", unsafe {
        (driver.pop)(std::ptr::null_mut())
    })?;
    result
}

/// That `bytes` at `address` are one allocation's.
pub fn check_memory(what: &str, address: usize, bytes: usize) -> Result {
    let mut numbers = [0usize; 2];
    for (number, attribute) in numbers.iter_mut().zip([11, 12]) {
        let place: *mut usize = number;
        // SAFETY: these two attributes, the first address and the bytes, are as wide as a pointer.
        let code = unsafe { (driver()?.attribute)(place.cast(), attribute, address as u64) };
        if code != 0 {
            return Err(
                Code::ARGUMENT.because(format!("{what} {address:#x} is not a valid pointer"))
            );
        }
    }
    let [base, length] = numbers;
    match address + bytes <= base + length {
        true => Ok(()),
        false => {
            let left = base + length - address;
            Err(Code::ARGUMENT.because(format!("{what} has {left} bytes, and {bytes} are needed")))
        }
    }
}

/// An event without a time.
pub fn event() -> Result<Handle> {
    let mut event = std::ptr::null_mut();
    // SAFETY: a place for a handle; 2 is the flag that leaves out times.
    check("cuEventCreate", unsafe {
        (driver()?.event_create)(&mut event, 2)
    })?;
    Ok(Handle(event.expose_provenance()))
}

/// The end of an event; what waits for it still does.
pub fn end_event(event: Handle) {
    if let Ok(driver) = driver() {
        // SAFETY: the driver refuses an event that is no more.
        let _ = unsafe { (driver.event_destroy)(event.raw()) };
    }
}

fn record(event: Handle, stream: Handle) -> Result {
    // SAFETY: the driver refuses handles that are no more.
    check("cuEventRecord", unsafe {
        (driver()?.event_record)(event.raw(), stream.raw())
    })
}

fn wait(stream: Handle, event: Handle) -> Result {
    // SAFETY: as above.
    check("cuStreamWaitEvent", unsafe {
        (driver()?.wait_event)(stream.raw(), event.raw(), 0)
    })
}

/// Put `body` into streams: it runs when all of them have come to it, and they go on when it is over, as does whatever
/// waits for `done`. `before`: what it waits for besides.
pub fn launch(
    streams: &[Handle],
    done: Handle,
    before: bool,
    body: Box<dyn FnOnce() + Send>,
) -> Result {
    let _order = ORDER.lock().unwrap_or_else(|held| held.into_inner());
    let first = streams[0];
    if before {
        wait(first, done)?;
    }
    for stream in &streams[1..] {
        let here = event()?;
        record(here, *stream)?;
        wait(first, here)?;
        end_event(here);
    }
    let data = Box::into_raw(Box::new(body));
    // SAFETY: the function takes back the box, once: the driver calls it once at most.
    let code = unsafe { (driver()?.host_func)(first.raw(), run, data.cast()) };
    if code != 0 {
        // SAFETY: the driver has refused, and will not call the function.
        drop(unsafe { Box::from_raw(data) });
    }
    check("cuLaunchHostFunc", code)?;
    record(done, first)?;
    streams[1..]
        .iter()
        .try_for_each(|stream| wait(*stream, done))
}

unsafe extern "C" fn run(data: Pointer) {
    let body: *mut Box<dyn FnOnce() + Send> = data.cast();
    // SAFETY: made in `launch` for this one call.
    let body = unsafe { Box::from_raw(body) };
    body();
}

/// Memory on the current context's device.
pub fn allocate(bytes: usize) -> Result<usize> {
    let mut address = 0;
    // SAFETY: a place for the address.
    check("cuMemAlloc", unsafe {
        (driver()?.alloc)(&mut address, bytes)
    })?;
    Ok(address as usize)
}

/// Its end.
pub fn free(address: usize) -> Result {
    // SAFETY: the driver refuses what it has not allocated.
    check("cuMemFree", unsafe { (driver()?.free)(address as u64) })
}
