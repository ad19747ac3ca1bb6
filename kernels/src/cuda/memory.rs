//! Device memory from the driver's pool, freed in stream order, and events as moments of a queue.

use std::any::Any;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, result, sys};

use super::driver::refused;
use super::queue::Queue;
use crate::device::{Block, Moment};
use crate::error::KernelError;

/// A piece of device memory.
pub(super) struct Piece {
    queue: Arc<Queue>,
    address: sys::CUdeviceptr,
}

impl Piece {
    /// `bytes` bytes for the next work of `queue`.
    pub(super) fn fresh(queue: &Queue, bytes: usize) -> Result<Self, KernelError> {
        Self::new(queue.handle(), bytes)
    }

    /// `bytes` bytes of undefined contents.
    pub(super) fn new(queue: Arc<Queue>, bytes: usize) -> Result<Self, KernelError> {
        queue.bind()?;
        let doing = || format!("allocate {bytes} bytes{}", queue.free_text());
        let address = match queue.context().has_async_alloc() {
            // SAFETY: the stream lives as long as the queue. Test: `tests/gpu`, memory.
            true => unsafe { result::malloc_async(queue.raw(), bytes) },
            // SAFETY: the context is bound to this thread. As above.
            false => unsafe { result::malloc_sync(bytes) },
        };
        let address = address.map_err(|error| refused(queue.ordinal(), doing())(error))?;
        Ok(Self { queue, address })
    }

    /// The same, of zeros.
    pub(super) fn zeroed(queue: Arc<Queue>, bytes: usize) -> Result<Self, KernelError> {
        let piece = Self::new(queue, bytes)?;
        let queue = &piece.queue;
        // SAFETY: the memory was allocated just now, with this size, and is nobody else's. Test: `tests/gpu`, memory.
        let filled = unsafe { result::memset_d8_async(piece.address, 0, bytes, queue.raw()) };
        filled.map_err(refused(queue.ordinal(), format!("clear {bytes} bytes")))?;
        Ok(piece)
    }
}

impl Block for Piece {
    fn address(&self) -> usize {
        self.address as usize
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // What was put off may still name this memory. An error stays with the queue, which returns it from then on.
        let free = || {
            self.queue.bind()?;
            let _ = self.queue.launch_pending(); // the queue remembers what was lost; the memory goes all the same
            let freed = match self.queue.context().has_async_alloc() {
                // SAFETY: allocated by `new` on this queue, freed once, after all that was given to the queue before; who used
                // it from another queue has made this one wait. Test: `tests/gpu`, memory, by poison in freed memory.
                true => unsafe { result::free_async(self.address, self.queue.raw()) },
                // SAFETY: as above; this form waits for the device.
                false => unsafe { result::free_sync(self.address) },
            };
            freed.map_err(refused(self.queue.ordinal(), "free memory"))
        };
        if let Err(error) = free() {
            self.queue.remember(error);
        }
    }
}

/// An event that was recorded on a queue.
pub(super) struct Recorded {
    pub(super) ordinal: u32,
    pub(super) event: CudaEvent,
}

impl Recorded {
    /// Whoever asks may be a thread that never used the device.
    fn bind(&self) -> Result<(), KernelError> {
        let bound = self.event.context().bind_to_thread();
        bound.map_err(refused(self.ordinal, "use the device"))
    }
}

impl Moment for Recorded {
    fn is_past(&self) -> Result<bool, KernelError> {
        self.bind()?;
        let past = self.event.try_is_complete();
        past.map_err(refused(self.ordinal, "ask whether work is done"))
    }

    fn block(&self) -> Result<(), KernelError> {
        self.bind()?;
        let done = self.event.synchronize();
        done.map_err(refused(self.ordinal, "wait for work"))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
