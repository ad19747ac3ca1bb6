//! Pinned memory through which tables go up: from pageable memory the driver may make the host wait for the stream first.
//!
//! ```text
//! [ tables, one behind the other, that the driver may still read | the other half, in use ]
//!                                                               ^ an event, recorded when the half was left
//! ```

use std::ptr;

use cudarc::driver::{CudaEvent, CudaStream, result};

/// Bytes of a half.
const HALF: usize = 1 << 20;

/// Two halves, used in turn.
#[derive(Default)]
pub(super) struct Staging {
    base: Option<Pinned>,
    half: usize,
    used: usize,
    left: [Option<CudaEvent>; 2], // when a half was left
}

struct Pinned(*mut u8);

// SAFETY: pinned memory is the process's, whatever the thread; the queue's lock keeps users apart. Test: `tests/gpu`, queues.
unsafe impl Send for Pinned {}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(Pinned(base)) = self.base.take() {
            // SAFETY: allocated by `allocate`, freed once; the driver waits for copies that still read it. As above.
            let _ = unsafe { result::free_host(base.cast()) };
        }
    }
}

impl Staging {
    /// A copy of `bytes` that stays until the stream has read it; nothing when it is too large. The context is bound.
    pub(super) fn take(
        &mut self,
        bytes: &[u8],
        stream: &CudaStream,
    ) -> Result<Option<&[u8]>, result::DriverError> {
        if bytes.len() > HALF {
            return Ok(None);
        }
        let base = match &self.base {
            Some(Pinned(base)) => *base,
            None => allocate()?,
        };
        self.base = Some(Pinned(base));
        if self.used + bytes.len() > HALF {
            self.left[self.half] = Some(stream.record_event(None)?);
            (self.half, self.used) = (1 - self.half, 0);
            if let Some(event) = self.left[self.half].take() {
                event.synchronize()?; // a megabyte of tables ago: long done
            }
        }
        let place = base.wrapping_add(self.half * HALF + self.used);
        self.used += bytes.len().next_multiple_of(16);
        // SAFETY: the place is inside the block, and no copy reads it any more: those of this half were waited for when it
        // was entered, and it has been given out only once since. As above.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
        // SAFETY: just written, and not written again before its copy is done. As above.
        Ok(Some(unsafe {
            std::slice::from_raw_parts(place, bytes.len())
        }))
    }
}

fn allocate() -> Result<*mut u8, result::DriverError> {
    // SAFETY: the context is bound; the memory is freed by `Staging`. As above.
    unsafe { result::malloc_host(2 * HALF, 0) }.map(|base| base.cast())
}
