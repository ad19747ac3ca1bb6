//! Memory that NCCL knows beforehand: its own allocations, and buffers that are registered so that they need no copy on
//! the way.

use std::{
    ffi::c_void,
    sync::{Arc, Weak},
};

use super::{
    comm::{Comm, Inner},
    library::Library,
    raw::RawComm,
};
use crate::error::{Error, Result};

type Release = unsafe extern "C" fn(RawComm, *mut c_void) -> i32;

/// A buffer that a communicator knows. It is forgotten when this is dropped, or the communicator ends.
#[derive(Debug)]
pub struct Registration {
    comm: Weak<Inner>,
    handle: Handle,
    release: Release,
    name: &'static str,
}

#[derive(Debug)]
struct Handle(*mut c_void);

// SAFETY: the handle is NCCL's number for a buffer; it is given back to NCCL alone.
unsafe impl Send for Handle {}
// SAFETY: as for Send.
unsafe impl Sync for Handle {}

impl Comm {
    /// Let NCCL know `bytes` at `address`, on this rank alone (2.19).
    ///
    /// # Errors
    /// When the library is older, or refuses the memory.
    ///
    /// # Safety
    /// The memory is on the communicator's device, and not freed before the registration is dropped.
    pub unsafe fn register(&self, address: u64, bytes: usize) -> Result<Registration> {
        let functions = &self.library().functions;
        let (Some(register), Some(release)) = (functions.register, functions.deregister) else {
            return Err(self
                .library()
                .lacks(Some(self.rank()), "ncclCommRegister", "2.19"));
        };
        let mut handle = std::ptr::null_mut();
        self.0.side_call("ncclCommRegister", |comm| {
            // SAFETY: a communicator that is alive, kept so by the lock; memory that the caller promises; a place.
            unsafe { register(comm, pointer(address), bytes, &mut handle) }
        })?;
        Ok(self.registration(handle, release, "ncclCommDeregister"))
    }

    /// Let NCCL know `bytes` at `address` as one window of all ranks, who call this together, each with memory of
    /// [`Memory`] (2.27). `is_symmetric`: at the same place in it on all of them.
    ///
    /// # Errors
    /// As [`Comm::register`].
    ///
    /// # Safety
    /// As for [`Comm::register`].
    pub unsafe fn register_window(
        &self,
        address: u64,
        bytes: usize,
        is_symmetric: bool,
    ) -> Result<Registration> {
        let functions = &self.library().functions;
        let (Some(register), Some(release)) =
            (functions.register_window, functions.deregister_window)
        else {
            return Err(self
                .library()
                .lacks(Some(self.rank()), "ncclCommWindowRegister", "2.27"));
        };
        let mut handle = std::ptr::null_mut();
        self.0.call("ncclCommWindowRegister", |comm| {
            // SAFETY: as in `register`.
            unsafe {
                register(
                    comm,
                    pointer(address),
                    bytes,
                    &mut handle,
                    i32::from(is_symmetric),
                )
            }
        })?;
        Ok(self.registration(handle, release, "ncclCommWindowDeregister"))
    }

    fn registration(
        &self,
        handle: *mut c_void,
        release: Release,
        name: &'static str,
    ) -> Registration {
        Registration {
            comm: Arc::downgrade(&self.0),
            handle: Handle(handle),
            release,
            name,
        }
    }
}

impl Registration {
    /// Let NCCL forget the buffer.
    ///
    /// # Errors
    /// When the communicator has ended, or the library refuses.
    pub fn deregister(mut self) -> Result<()> {
        self.forget()
    }

    fn forget(&mut self) -> Result<()> {
        let handle = std::mem::replace(&mut self.handle.0, std::ptr::null_mut());
        let Some(comm) = self.comm.upgrade().filter(|_| !handle.is_null()) else {
            return Ok(()); // with the communicator it was forgotten
        };
        comm.side_call(self.name, |comm| {
            // SAFETY: a communicator that is alive, kept so by the lock, and a handle of its own, which is used once.
            unsafe { (self.release)(comm, handle) }
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _ = self.forget(); // it fails only when the communicator has ended
    }
}

/// Device memory of NCCL's own, which every kind of registration takes (2.19).
#[derive(Debug)]
pub struct Memory {
    library: Arc<Library>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// `bytes` on the device that is current on this thread.
    ///
    /// # Errors
    /// When the library is older, or the device has no more.
    pub fn new(library: &Arc<Library>, bytes: usize) -> Result<Self> {
        let Some(allocate) = library.functions.mem_alloc else {
            return Err(library.lacks(None, "ncclMemAlloc", "2.19"));
        };
        let mut pointer = std::ptr::null_mut();
        // SAFETY: a place for the address.
        let code = unsafe { allocate(&mut pointer, bytes) };
        library.check(None, "ncclMemAlloc", code, std::ptr::null_mut())?;
        if pointer.is_null() {
            let what = format!("NCCL gave no memory for {bytes} bytes");
            return Err(Error::argument(what, "Ask for at least one byte"));
        }
        Ok(Self {
            library: library.clone(),
            address: pointer.expose_provenance() as u64,
            bytes,
        })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(free) = self.library.functions.mem_free {
            // SAFETY: allocated in `new`, and freed once. Whoever computed with it has waited for that.
            let code = unsafe { free(pointer(self.address)) };
            if let Err(error) = self
                .library
                .check(None, "ncclMemFree", code, std::ptr::null_mut())
            {
                tracing::warn!(%error, "memory of NCCL's is left behind");
            }
        }
    }
}

fn pointer(address: u64) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address as usize)
}
