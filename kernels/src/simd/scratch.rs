//! Scratch memory on the stack: a few blocks of elements of any dtype, whose bytes are set only when a level is opened,
//! so that making a scratch costs nothing and a short call little.

use std::mem::MaybeUninit;

use crate::dtype::Dtype;
use crate::span::{Span, SpanMut};

/// Bytes of a level: a few of them, and as much of each source, stay in the nearest cache.
pub(crate) const BLOCK_BYTES: usize = 4 << 10;
pub(crate) const LEVELS: usize = 17;

/// Levels of up to [`BLOCK_BYTES`] each, which are opened from the lowest on.
pub(crate) struct Scratch {
    levels: [MaybeUninit<Level>; LEVELS],
    bytes: usize, // of a level that are in use
    open: usize,  // levels that are initialised, up to `bytes`
}

#[repr(C, align(64))]
#[derive(Copy, Clone)]
struct Level([u8; BLOCK_BYTES]);

impl Scratch {
    /// Nothing is open. `bytes` is the most that a level will hold.
    #[inline(always)] // it must not be moved
    pub(crate) fn new(bytes: usize) -> Self {
        assert!(bytes <= BLOCK_BYTES);
        Scratch {
            levels: [MaybeUninit::uninit(); LEVELS],
            bytes,
            open: 0,
        }
    }

    /// `len` elements of a level that is open.
    pub(crate) fn span(&self, level: usize, dtype: Dtype, len: usize) -> Span<'_> {
        assert!(level < self.open && len * dtype.size() <= self.bytes);
        let start = self.levels[level].as_ptr().cast();
        // SAFETY: the level is open, so its first `bytes` bytes are initialised, and they are enough, asserted above;
        // the borrow of self keeps them in place and unwritten. A 64-byte boundary suits every dtype. Miri would see a
        // breach in `combine`'s example.
        unsafe { Span::from_raw(start, dtype, len, None) }
    }

    /// `len` elements of a level, which is opened with those below it.
    pub(crate) fn span_mut(&mut self, level: usize, dtype: Dtype, len: usize) -> SpanMut<'_> {
        self.open(level);
        assert!(len * dtype.size() <= self.bytes);
        let start = self.levels[level].as_mut_ptr().cast();
        // SAFETY: as in `span`, of an exclusive borrow.
        unsafe { SpanMut::from_raw(start, dtype, len, None) }
    }

    /// `len` elements of one level to read, and of another to write.
    pub(crate) fn pair(
        &mut self,
        (from, source): (usize, Dtype),
        (into, target): (usize, Dtype),
        len: usize,
    ) -> (Span<'_>, SpanMut<'_>) {
        assert_ne!(from, into);
        self.open(from.max(into));
        assert!(len * source.size() <= self.bytes && len * target.size() <= self.bytes);
        let base = self.levels.as_mut_ptr();
        // SAFETY: as in `span`; `from < LEVELS`, or `open` would have panicked.
        let read = unsafe { Span::from_raw(base.wrapping_add(from).cast(), source, len, None) };
        // SAFETY: as in `span`, of an exclusive borrow, and `into` is another level than `from`.
        let write = unsafe { SpanMut::from_raw(base.wrapping_add(into).cast(), target, len, None) };
        (read, write)
    }

    fn open(&mut self, level: usize) {
        while self.open <= level {
            let start: *mut u8 = self.levels[self.open].as_mut_ptr().cast();
            // SAFETY: a level has BLOCK_BYTES bytes, and `bytes` is no more, asserted in `new`. Miri would see a breach
            // in `combine`'s example.
            unsafe { start.write_bytes(0, self.bytes) };
            self.open += 1;
        }
    }
}
