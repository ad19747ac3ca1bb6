//! The door: where bare addresses become spans, and spans become typed elements.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;

use super::stream::{Course, LINE_BYTES, Line};
use crate::device::Device;
use crate::dtype::{Dtype, Element};
use crate::span::{Span, SpanMut};

impl<'a> Span<'a> {
    /// `len` elements from `ptr` on. Panics when `ptr` is not aligned to the element.
    ///
    /// # Safety
    ///
    /// For the whole of `'a`, `ptr` must be valid for reads of `len * dtype.size()` bytes, initialised, in the memory of
    /// `device` (`None`: the host's);
    /// and while a kernel runs over the span, nobody may write them, but [`combine`](crate::combine) itself where a
    /// target lies exactly over this source. Between kernels others may.
    #[inline]
    pub unsafe fn from_raw(
        ptr: *const u8,
        dtype: Dtype,
        len: usize,
        device: Option<&'a dyn Device>,
    ) -> Span<'a> {
        assert_aligned(ptr, dtype);
        Span {
            ptr,
            dtype,
            len,
            device,
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
    /// the memory of `device` (`None`: the host's); no other span of this process may lie over them, but a source of [`combine`](crate::combine) that
    /// starts and ends where this span does; and while a kernel runs over the span, nobody else may read or write them.
    /// Between kernels others may.
    #[inline]
    pub unsafe fn from_raw(
        ptr: *mut u8,
        dtype: Dtype,
        len: usize,
        device: Option<&'a dyn Device>,
    ) -> SpanMut<'a> {
        assert_aligned(ptr, dtype);
        SpanMut {
            ptr,
            dtype,
            len,
            device,
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

#[inline]
#[track_caller]
fn assert_aligned(ptr: *const u8, dtype: Dtype) {
    // Sizes are powers of two, and a division takes as long as a short copy.
    if ptr.addr() & (dtype.size() - 1) != 0 {
        crooked(ptr, dtype);
    }
}

#[cold]
#[track_caller]
fn crooked(ptr: *const u8, dtype: Dtype) -> ! {
    panic!(
        "a span of {dtype} must start at a multiple of {} bytes, not at {ptr:?}",
        dtype.size()
    )
}

/// The bytes of one span into another of the same dtype and length, in host memory.
pub(crate) fn copy(from: Span<'_>, into: SpanMut<'_>) {
    assert_eq!(from.dtype, into.dtype);
    assert_eq!(from.len, into.len);
    assert!(from.is_on_host() && into.is_on_host());
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
    #[inline(always)]
    pub(super) fn of(span: Span<'a>) -> Self {
        assert_eq!(span.dtype, T::DTYPE);
        assert!(span.is_on_host());
        Reader {
            ptr: span.ptr.cast(),
            len: span.len,
            lifetime: PhantomData,
        }
    }

    /// The bits of any dtype of the size of `T`.
    #[inline(always)]
    pub(super) fn bits_of(span: Span<'a>) -> Self {
        assert_eq!(span.dtype.size(), T::DTYPE.size());
        assert!(span.is_on_host());
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

    /// A hint that the lines from element `index` on, of `count` elements, are soon wanted.
    #[inline(always)]
    pub(super) fn expect(&self, index: usize, count: usize) {
        for line in (0..count).step_by(LINE_BYTES / size_of::<T>()) {
            super::stream::expect(self.ptr.wrapping_add(index.wrapping_add(line)).cast());
        }
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
        assert!(span.is_on_host());
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

/// Several exclusive host spans whose element type is known, of one length.
pub(super) struct Writers<'t, 'a, T> {
    spans: &'t mut [SpanMut<'a>],
    len: usize,
    element: PhantomData<T>,
}

impl<'t, 'a, T: Element> Writers<'t, 'a, T> {
    /// At least one span, of `T`s or of another dtype of their size, which are then moved about as `T`s.
    #[inline(always)]
    pub(super) fn of(spans: &'t mut [SpanMut<'a>]) -> Self {
        let len = spans[0].len;
        for span in &*spans {
            assert_eq!(span.dtype.size(), T::DTYPE.size());
            assert!(span.is_on_host() && span.len == len);
        }
        Writers {
            spans,
            len,
            element: PhantomData,
        }
    }

    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// How many spans.
    #[inline(always)]
    pub(super) fn count(&self) -> usize {
        self.spans.len()
    }

    /// Replaces the elements from `start` on, in every span.
    ///
    /// # Safety
    ///
    /// `start + values.len() <= self.len()`, and all values are initialised.
    #[inline(always)]
    pub(super) unsafe fn set(&mut self, start: usize, values: &[MaybeUninit<T>]) {
        debug_assert!(start + values.len() <= self.len);
        let put = |span: &mut SpanMut<'a>| {
            let target = span.ptr.cast::<T>().wrapping_add(start);
            // SAFETY: inside the span, says the caller, so valid for writes and aligned by the span's promise, and ours
            // alone while a kernel runs; `values` are the caller's own. The tests of `combine` compare the elements
            // before and after every target.
            unsafe { ptr::copy_nonoverlapping(values.as_ptr().cast(), target, values.len()) };
        };
        self.each(put);
    }

    /// As `set`, past the caches.
    ///
    /// # Safety
    ///
    /// As of `set`; and element `start` starts a line in every span, `values` fill whole lines, and who launched the
    /// kernel calls `settle` before anybody looks.
    #[inline(always)]
    pub(super) unsafe fn stream<L: Line>(&mut self, start: usize, values: &[MaybeUninit<T>]) {
        debug_assert!(start + values.len() <= self.len);
        let per_line = LINE_BYTES / size_of::<T>();
        let put = |span: &mut SpanMut<'a>| {
            let target = span.ptr.cast::<T>().wrapping_add(start);
            for line in (0..values.len()).step_by(per_line) {
                let from = values.as_ptr().wrapping_add(line);
                // SAFETY: as in `set`, of one line, and the caller vouches for its place. A crooked one faults in the
                // tests of `combine`.
                unsafe { L::stream(from.cast(), target.wrapping_add(line).cast()) };
            }
        };
        self.each(put);
    }

    /// In which order they can be streamed while these are loaded.
    pub(super) fn course<A: Element, const N: usize>(
        &self,
        sources: &[Reader<'_, A>; N],
    ) -> Option<Course> {
        let sources = sources.each_ref().map(|source| source.ptr.cast());
        Course::of(&sources, self.spans, size_of::<T>())
    }

    /// One and two spans without a loop, which would take as long as the stores.
    #[inline(always)]
    fn each(&mut self, mut put: impl FnMut(&mut SpanMut<'a>)) {
        match &mut *self.spans {
            [one] => put(one),
            [one, other] => {
                put(one);
                put(other);
            }
            many => many.iter_mut().for_each(put),
        }
    }
}

/// A span over device memory, which no host kernel may touch.
#[cfg(test)]
pub(crate) fn away(dtype: Dtype) -> Span<'static> {
    // SAFETY: no elements, so nothing is promised about the address. A kernel that read it would fault in the test
    // `device_memory_is_refused_on_the_host`.
    unsafe { Span::from_raw(ptr::null(), dtype, 0, Some(&crate::tests::Elsewhere)) }
}

/// The elements of a target, as a source that lies exactly there.
#[cfg(test)]
pub(crate) fn twin<'a>(target: &SpanMut<'a>) -> Span<'a> {
    // SAFETY: the target vouches for the memory as long as it lives, and only tests of `combine` in place come here,
    // which allows a source where a target is. Miri would tell.
    unsafe { Span::from_raw(target.ptr, target.dtype, target.len, target.device) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_spans_are_the_spans_of_their_slices() {
        let data = [1.0f32, 2.0, 3.0];
        let mut into = [0.0f32; 3];
        // SAFETY: `data` is three initialised f32, outlives the span, and is not written. Miri would tell.
        let from = unsafe { Span::from_raw(data.as_ptr().cast(), Dtype::F32, 3, None) };
        let ptr = into.as_mut_ptr().cast();
        // SAFETY: `into` is three initialised f32, outlives the span, and is not looked at meanwhile. Miri would tell.
        let target = unsafe { SpanMut::from_raw(ptr, Dtype::F32, 3, None) };
        crate::cast(from, target).unwrap();
        assert_eq!(into, data);
    }

    #[test]
    #[should_panic(expected = "a span of f32 must start at a multiple of 4 bytes")]
    fn a_crooked_address_panics() {
        let crooked = ptr::without_provenance(6);
        // SAFETY: no elements, so nothing is promised about the address; the call panics, or the test fails.
        let _ = unsafe { Span::from_raw(crooked, Dtype::F32, 0, None) };
    }
}
