//! The door: where bare addresses become spans, and spans become typed elements.

use std::marker::PhantomData;
use std::ptr;

use crate::dtype::{Dtype, Element, Memory};
use crate::span::{Span, SpanMut};

impl<'a> Span<'a> {
    /// `len` elements from `ptr` on. Panics when `ptr` is not aligned to the element.
    ///
    /// # Safety
    ///
    /// For the whole of `'a`, `ptr` must be valid for reads of `len * dtype.size()` bytes, initialised, in `memory`;
    /// and while a kernel runs over the span, nobody may write them. Between kernels others may.
    pub unsafe fn from_raw(ptr: *const u8, dtype: Dtype, len: usize, memory: Memory) -> Span<'a> {
        assert_aligned(ptr, dtype);
        Span {
            ptr,
            dtype,
            len,
            memory,
            lifetime: PhantomData,
        }
    }
}

impl<'a> SpanMut<'a> {
    /// `len` elements from `ptr` on. Panics when `ptr` is not aligned to the element.
    ///
    /// # Safety
    ///
    /// For the whole of `'a`, `ptr` must be valid for reads and writes of `len * dtype.size()` bytes, initialised, in
    /// `memory`; no other span of this process may lie over them; and while a kernel runs over the span, nobody else
    /// may read or write them. Between kernels others may.
    pub unsafe fn from_raw(ptr: *mut u8, dtype: Dtype, len: usize, memory: Memory) -> SpanMut<'a> {
        assert_aligned(ptr, dtype);
        SpanMut {
            ptr,
            dtype,
            len,
            memory,
            lifetime: PhantomData,
        }
    }
}

// SAFETY: a span is a borrow of plain bytes, without interior mutability and without ties to a thread; `of` borrows a
// slice of `Element`s, which are Send and Sync, and the caller of `from_raw` promises the same for any address. The
// test `spans_cross_threads` asks for it; no test can refute it.
unsafe impl Send for Span<'_> {}
// SAFETY: as above, of an exclusive borrow: it may move to another thread because it is the only one.
unsafe impl Send for SpanMut<'_> {}

#[track_caller]
fn assert_aligned(ptr: *const u8, dtype: Dtype) {
    assert!(
        ptr.addr().is_multiple_of(dtype.size()),
        "a span of {dtype} must start at a multiple of {} bytes, not at {ptr:?}",
        dtype.size()
    );
}

/// The bytes of one span into another of the same dtype and length, in host memory.
pub(crate) fn copy(from: Span<'_>, into: SpanMut<'_>) {
    assert_eq!(from.dtype, into.dtype);
    assert_eq!(from.len, into.len);
    assert_eq!((from.memory, into.memory), (Memory::Host, Memory::Host));
    // SAFETY: both are valid for `from.bytes()` bytes: who made the spans promised it, and the lengths were compared
    // above. `ptr::copy` allows overlap. `every_dtype_copies_exactly_its_elements` sees a byte too many or too few.
    unsafe { ptr::copy(from.ptr, into.ptr, from.bytes()) }
}

/// A host span whose element type is known.
#[derive(Copy, Clone)]
pub(super) struct Reader<'a, T> {
    ptr: *const T,
    len: usize,
    lifetime: PhantomData<&'a [T]>,
}

impl<'a, T: Element> Reader<'a, T> {
    pub(super) fn of(span: Span<'a>) -> Self {
        assert_eq!(span.dtype, T::DTYPE);
        assert_eq!(span.memory, Memory::Host);
        Reader {
            ptr: span.ptr.cast(),
            len: span.len,
            lifetime: PhantomData,
        }
    }

    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Element `index`.
    ///
    /// # Safety
    ///
    /// `index < self.len()`.
    #[inline(always)]
    pub(super) unsafe fn at(&self, index: usize) -> T {
        debug_assert!(index < self.len);
        // SAFETY: index < len, says the caller, and the span's maker promised len elements. The debug assertion above
        // fails in the equality tests when a loop runs too far.
        let element = unsafe { self.ptr.add(index) };
        // SAFETY: valid, initialised and aligned, by the span's promise; T is Pod, so any bytes are a T. The equality
        // tests at every offset see a wrong element.
        unsafe { element.read() }
    }
}

/// An exclusive host span whose element type is known.
pub(super) struct Writer<'a, T> {
    ptr: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

impl<'a, T: Element> Writer<'a, T> {
    pub(super) fn of(span: SpanMut<'a>) -> Self {
        assert_eq!(span.dtype, T::DTYPE);
        assert_eq!(span.memory, Memory::Host);
        Writer {
            ptr: span.ptr.cast(),
            len: span.len,
            lifetime: PhantomData,
        }
    }

    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Element `index`.
    ///
    /// # Safety
    ///
    /// `index < self.len()`.
    #[inline(always)]
    pub(super) unsafe fn at(&self, index: usize) -> T {
        debug_assert!(index < self.len);
        // SAFETY: index < len, says the caller, and the span's maker promised len elements. The debug assertion above
        // fails in the equality tests when a loop runs too far.
        let element = unsafe { self.ptr.add(index) };
        // SAFETY: valid, initialised and aligned, by the span's promise; T is Pod, so any bytes are a T. The equality
        // tests at every offset see a wrong element.
        unsafe { element.read() }
    }

    /// Replaces element `index`.
    ///
    /// # Safety
    ///
    /// `index < self.len()`.
    #[inline(always)]
    pub(super) unsafe fn set(&mut self, index: usize, value: T) {
        debug_assert!(index < self.len);
        // SAFETY: index < len, says the caller, and the span's maker promised len elements. The debug assertion above
        // fails in the equality tests when a loop runs too far.
        let element = unsafe { self.ptr.add(index) };
        // SAFETY: valid for writes and aligned, by the span's promise, and ours alone while a kernel runs. The equality
        // tests compare the elements before and after the span, which must not change.
        unsafe { element.write(value) }
    }
}

/// A span over device memory, which no host kernel may touch.
#[cfg(test)]
pub(crate) fn away(dtype: Dtype) -> Span<'static> {
    // SAFETY: no elements, so nothing is promised about the address. A kernel that read it would fault in the test
    // `device_memory_is_refused_on_the_host`.
    unsafe { Span::from_raw(ptr::null(), dtype, 0, Memory::Cuda(1)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_spans_are_the_spans_of_their_slices() {
        let data = [1.0f32, 2.0, 3.0];
        let mut into = [0.0f32; 3];
        // SAFETY: `data` is three initialised f32, outlives the span, and is not written. Miri would tell.
        let from = unsafe { Span::from_raw(data.as_ptr().cast(), Dtype::F32, 3, Memory::Host) };
        let ptr = into.as_mut_ptr().cast();
        // SAFETY: `into` is three initialised f32, outlives the span, and is not looked at meanwhile. Miri would tell.
        let target = unsafe { SpanMut::from_raw(ptr, Dtype::F32, 3, Memory::Host) };
        crate::cast(from, target).unwrap();
        assert_eq!(into, data);
    }

    #[test]
    #[should_panic(expected = "a span of f32 must start at a multiple of 4 bytes")]
    fn a_crooked_address_panics() {
        let crooked = ptr::without_provenance(6);
        // SAFETY: no elements, so nothing is promised about the address; the call panics, or the test fails.
        let _ = unsafe { Span::from_raw(crooked, Dtype::F32, 0, Memory::Host) };
    }
}
