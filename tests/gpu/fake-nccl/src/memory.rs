//! Memory that the library gives out, and buffers that it is told of.

use std::{
    collections::HashSet,
    ffi::c_void,
    sync::{
        LazyLock, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{
    code::{Code, Result},
    comm::Comm,
    cuda, log,
    settings::{call, since},
};

/// What is registered, and with which communicator.
static KNOWN: LazyLock<Mutex<HashSet<(usize, usize)>>> = LazyLock::new(Mutex::default);
static NUMBER: AtomicUsize = AtomicUsize::new(1);

fn known() -> MutexGuard<'static, HashSet<(usize, usize)>> {
    KNOWN.lock().unwrap_or_else(|held| held.into_inner())
}

#[unsafe(no_mangle)]
extern "C" fn ncclMemAlloc(pointer: *mut *mut c_void, bytes: usize) -> i32 {
    call("ncclMemAlloc", || {
        since(21_900)?;
        cuda::current()?;
        let address = cuda::allocate(bytes.next_multiple_of(4096))?; // windows begin and end at multiples of this
        // SAFETY: the interface demands a place.
        unsafe { pointer.write(std::ptr::with_exposed_provenance_mut(address)) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclMemFree(pointer: *mut c_void) -> i32 {
    call("ncclMemFree", || cuda::free(pointer.addr()))
}

fn register(
    name: &str,
    comm: &Comm,
    buffer: *mut c_void,
    bytes: usize,
    handle: *mut *mut c_void,
) -> Result {
    log::note(format!(
        "{name} comm={} rank={} bytes={bytes}",
        comm.number,
        comm.rank()
    ));
    comm.ready()?;
    cuda::check_memory("buff", buffer.addr(), bytes)?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    known().insert((comm.number, number));
    // SAFETY: the interface demands a place.
    unsafe { handle.write(std::ptr::without_provenance_mut(number)) };
    Ok(())
}

fn deregister(name: &str, comm: &Comm, handle: *mut c_void) -> Result {
    log::note(format!("{name} comm={} rank={}", comm.number, comm.rank()));
    match known().remove(&(comm.number, handle.addr())) {
        true => Ok(()),
        false => Err(Code::ARGUMENT.because("no such registration")),
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommRegister(
    comm: *mut c_void,
    buffer: *mut c_void,
    bytes: usize,
    handle: *mut *mut c_void,
) -> i32 {
    call("ncclCommRegister", || {
        since(21_900)?;
        register(
            "ncclCommRegister",
            &*Comm::get(comm)?,
            buffer,
            bytes,
            handle,
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDeregister(comm: *mut c_void, handle: *mut c_void) -> i32 {
    call("ncclCommDeregister", || {
        deregister("ncclCommDeregister", &*Comm::get(comm)?, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommWindowRegister(
    comm: *mut c_void,
    buffer: *mut c_void,
    bytes: usize,
    window: *mut *mut c_void,
    _flags: i32,
) -> i32 {
    call("ncclCommWindowRegister", || {
        since(22_700)?;
        let comm = Comm::get(comm)?;
        register("ncclCommWindowRegister", &comm, buffer, bytes, window)?;
        comm.begun()
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommWindowDeregister(comm: *mut c_void, window: *mut c_void) -> i32 {
    call("ncclCommWindowDeregister", || {
        deregister("ncclCommWindowDeregister", &*Comm::get(comm)?, window)
    })
}
