//! A span: elements in memory that somebody else owns, with their dtype, number and place.
//!
//! A span may lie over memory that another process writes between two kernels, or over device memory, so it is a raw
//! pointer and never becomes a slice. Kernels load and store through it, element by element.

use std::marker::PhantomData;
use std::ops::Range;

use crate::device::Device;
use crate::dtype::{Dtype, Element, Memory};

/// Elements that a kernel may read.
#[derive(Copy, Clone, Debug)]
pub struct Span<'a> {
    pub(crate) ptr: *const u8,
    pub(crate) dtype: Dtype,
    pub(crate) len: usize,
    pub(crate) device: Option<&'a dyn Device>,
    pub(crate) lifetime: PhantomData<&'a [u8]>,
}

/// Elements that a kernel may read and write, and nobody else meanwhile.
#[derive(Debug)]
pub struct SpanMut<'a> {
    pub(crate) ptr: *mut u8,
    pub(crate) dtype: Dtype,
    pub(crate) len: usize,
    pub(crate) device: Option<&'a dyn Device>,
    pub(crate) lifetime: PhantomData<&'a mut [u8]>,
}

impl<'a> Span<'a> {
    /// All elements of a slice.
    ///
    /// ```
    /// use fabric_kernels::{Dtype, Span};
    /// let span = Span::of(&[1.0f32, 2.0, 3.0]);
    /// assert_eq!((span.dtype(), span.len(), span.bytes()), (Dtype::F32, 3, 12));
    /// ```
    pub fn of<T: Element>(elements: &'a [T]) -> Self {
        Span {
            ptr: elements.as_ptr().cast(),
            dtype: T::DTYPE,
            len: elements.len(),
            device: None,
            lifetime: PhantomData,
        }
    }

    /// Elements of `dtype` out of bytes: any bytes are elements. Panics when they are no whole number of them, or do not start
    /// at a multiple of one.
    ///
    /// ```
    /// use fabric_kernels::{Dtype, Span};
    /// assert_eq!(Span::of_bytes(&[0; 12], Dtype::I8).len(), 12);
    /// ```
    #[inline]
    pub fn of_bytes(bytes: &'a [u8], dtype: Dtype) -> Self {
        let (ptr, size) = (bytes.as_ptr(), dtype.size());
        assert!(
            (ptr.addr() | bytes.len()) & (size - 1) == 0,
            "{} bytes at {ptr:?} are no {dtype}",
            bytes.len()
        );
        Span {
            ptr,
            dtype,
            len: bytes.len() >> size.trailing_zeros(),
            device: None,
            lifetime: PhantomData,
        }
    }

    /// The elements in `range`. Panics, as slices do, when the range is not inside the span.
    #[inline]
    pub fn slice(self, range: Range<usize>) -> Span<'a> {
        let (start, len) = inside(range, self.len);
        Span {
            ptr: self.ptr.wrapping_add(start * self.dtype.size()),
            len,
            ..self
        }
    }

    /// What one element is.
    #[inline]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of elements.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Without elements.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of bytes.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    /// Where the elements lie.
    pub fn memory(&self) -> Memory {
        self.device.map_or(Memory::Host, |device| device.memory())
    }

    /// Whose memory it is, and on which queue it is worked on; `None` is the host's.
    #[inline]
    pub fn device(&self) -> Option<&'a dyn Device> {
        self.device
    }

    /// Whether host kernels may touch them.
    #[inline]
    pub(crate) fn is_on_host(&self) -> bool {
        self.device.is_none()
    }

    /// The address of the first element.
    #[inline]
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr
    }
}

impl<'a> SpanMut<'a> {
    /// All elements of a slice.
    pub fn of<T: Element>(elements: &'a mut [T]) -> Self {
        SpanMut {
            ptr: elements.as_mut_ptr().cast(),
            dtype: T::DTYPE,
            len: elements.len(),
            device: None,
            lifetime: PhantomData,
        }
    }

    /// The elements in `range`, for as long as this span is borrowed. Panics, as slices do, when the range is not
    /// inside the span.
    #[inline]
    pub fn slice(&mut self, range: Range<usize>) -> SpanMut<'_> {
        let (start, len) = inside(range, self.len);
        let ptr = self.ptr.wrapping_add(start * self.dtype.size());
        SpanMut {
            ptr,
            len,
            ..self.reborrow()
        }
    }

    /// The elements in `range`, for as long as this span would have lived. Panics as [`SpanMut::slice`] does.
    pub fn into_slice(self, range: Range<usize>) -> SpanMut<'a> {
        let (start, len) = inside(range, self.len);
        let ptr = self.ptr.wrapping_add(start * self.dtype.size());
        SpanMut { ptr, len, ..self }
    }

    /// The same elements, for as long as this span is borrowed.
    #[inline]
    pub fn reborrow(&mut self) -> SpanMut<'_> {
        SpanMut {
            ptr: self.ptr,
            dtype: self.dtype,
            len: self.len,
            device: self.device,
            lifetime: PhantomData,
        }
    }

    /// The same elements, to read only.
    pub fn as_span(&self) -> Span<'_> {
        Span {
            ptr: self.ptr,
            dtype: self.dtype,
            len: self.len,
            device: self.device,
            lifetime: PhantomData,
        }
    }

    /// What one element is.
    #[inline]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of elements.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Without elements.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of bytes.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    /// Where the elements lie.
    pub fn memory(&self) -> Memory {
        self.device.map_or(Memory::Host, |device| device.memory())
    }

    /// Whose memory it is, and on which queue it is worked on; `None` is the host's.
    #[inline]
    pub fn device(&self) -> Option<&'a dyn Device> {
        self.device
    }

    /// Whether host kernels may touch them.
    #[inline]
    pub(crate) fn is_on_host(&self) -> bool {
        self.device.is_none()
    }

    /// The address of the first element.
    #[inline]
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr
    }

    /// The address of the first element, to write.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr
    }
}

/// Start and length of `range`, which must lie in `0..len`.
#[inline]
#[track_caller]
fn inside(range: Range<usize>, len: usize) -> (usize, usize) {
    if range.start > range.end || range.end > len {
        outside(range, len);
    }
    (range.start, range.end - range.start)
}

#[cold]
#[track_caller]
fn outside(range: Range<usize>, len: usize) -> ! {
    panic!(
        "range {}..{} is not inside a span of {len} elements",
        range.start, range.end
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_count_elements_and_addresses_count_bytes() {
        let mut data = [0u16; 10];
        let mut span = SpanMut::of(&mut data);
        let base = span.as_ptr() as usize;
        let mut inner = span.slice(3..7);
        assert_eq!(inner.as_ptr() as usize, base + 6);
        assert_eq!((inner.len(), inner.bytes()), (4, 8));
        assert_eq!(inner.slice(4..4).len(), 0);
        let read = span.as_span().slice(9..10);
        assert_eq!((read.as_ptr() as usize, read.len()), (base + 18, 1));
    }

    #[test]
    #[should_panic(expected = "range 3..11 is not inside a span of 10 elements")]
    fn a_range_beyond_the_end_panics() {
        let _ = Span::of(&[0u8; 10]).slice(3..11);
    }

    #[test]
    #[should_panic(expected = "is not inside")]
    #[allow(clippy::reversed_empty_ranges)]
    fn a_reversed_range_panics() {
        let _ = SpanMut::of(&mut [0u8; 10]).slice(4..3);
    }

    #[test]
    fn spans_cross_threads() {
        fn is_send<T: Send>() {}
        is_send::<Span<'_>>();
        is_send::<SpanMut<'_>>();
    }
}
