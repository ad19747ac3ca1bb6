//! Stores past the caches.
//!
//! [Note: streaming] An ordinary store first loads the line that it writes to, and pushes another out of the caches. A
//! streaming one does neither, if whole lines are stored; it goes through a buffer of the processor from which it may
//! arrive after later ordinary stores. So what signals to others that elements are there (a release store, which on
//! this processor is an ordinary one) must come after a fence: [`settle`], once, at the end.

use std::ptr;

use super::{Streamer, launch_streamer};
use crate::combine::Store;
use crate::span::{Span, SpanMut};

pub(super) const LINE_BYTES: usize = 64;

/// The bytes of one span into another of the same dtype and length, in host memory.
pub(crate) fn store(from: Span<'_>, into: SpanMut<'_>, store: Store) {
    if from.as_ptr() == into.as_ptr() {
        return; // the elements are where they belong
    }
    match store {
        Store::Cached => super::copy(from, into),
        Store::Streaming => stream(from, into),
    }
}

/// Orders streamed elements before what this thread stores next.
pub(crate) fn settle(store: Store) {
    #[cfg(target_arch = "x86_64")]
    if store == Store::Streaming {
        // SAFETY: every x86-64 has sse, and a fence touches no memory.
        unsafe { std::arch::x86_64::_mm_sfence() };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = store;
}

/// A hint that the line around an address is soon wanted; any address will do.
#[inline(always)]
pub(super) fn expect(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has sse, and a hint changes no memory and faults on none.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Elements before the first that starts a line.
pub(crate) fn to_line(span: &SpanMut<'_>) -> usize {
    lead(span.as_ptr()) / span.dtype().size()
}

pub(super) fn lead(ptr: *const u8) -> usize {
    ptr.addr().wrapping_neg() % LINE_BYTES
}

/// Whole lines of the target are streamed; what is before the first and after the last is copied.
fn stream(from: Span<'_>, mut into: SpanMut<'_>) {
    assert_eq!(from.dtype(), into.dtype());
    assert_eq!(from.len(), into.len());
    assert!(from.is_on_host() && into.is_on_host());
    let bytes = from.bytes();
    let (source, target) = (from.as_ptr(), into.as_mut_ptr());
    let head = lead(target).min(bytes);
    let lines = (bytes - head) / LINE_BYTES;
    let tail = head + lines * LINE_BYTES;
    // SAFETY: `head` is no more than the bytes of both spans, which are valid by their makers' promise and do not
    // overlap: they start at different places, checked in `store`. The tests of `combine` see a byte too many or too
    // few.
    unsafe { ptr::copy_nonoverlapping(source, target, head) };
    launch_streamer(Lines {
        from: source.wrapping_add(head),
        into: target.wrapping_add(head),
        count: lines,
    });
    let (from, into) = (source.wrapping_add(tail), target.wrapping_add(tail));
    // SAFETY: as for the head: the rest of the bytes.
    unsafe { ptr::copy_nonoverlapping(from, into, bytes - tail) };
}

/// A vector, by which lines are streamed.
pub(super) trait Line {
    /// Moves one line.
    ///
    /// # Safety
    ///
    /// `from` is valid for reads of a line, and `into` for writes of another, which it starts; the processor has the
    /// instruction set that the vector belongs to.
    unsafe fn stream(from: *const u8, into: *mut u8);
}

/// What every processor has.
pub(super) struct Portable;

#[cfg(not(target_arch = "x86_64"))]
impl Line for Portable {
    #[inline(always)]
    unsafe fn stream(from: *const u8, into: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { ptr::copy_nonoverlapping(from, into, LINE_BYTES) };
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LINE_BYTES, Line, Portable};

    /// 32 bytes.
    pub(in crate::simd) struct Avx;
    /// 64 bytes.
    pub(in crate::simd) struct Avx512;

    macro_rules! lines {
        ($($line:ty: $vector:ty, $store:ident;)*) => {$(
            impl Line for $line {
                #[inline(always)]
                unsafe fn stream(from: *const u8, into: *mut u8) {
                    for offset in (0..LINE_BYTES).step_by(size_of::<$vector>()) {
                        let from = from.wrapping_add(offset).cast::<$vector>();
                        let into = into.wrapping_add(offset).cast();
                        // SAFETY: the vector lies within the line, for which the caller vouches. The tests of `combine`
                        // see a wrong element.
                        let vector = unsafe { from.read_unaligned() };
                        // SAFETY: as above, and aligned, because vectors divide lines. A breach changes bytes that the
                        // tests of `combine` guard, or faults in them.
                        unsafe { $store(into, vector) };
                    }
                }
            }
        )*};
    }

    lines! {
        Portable: __m128i, _mm_stream_si128;
        Avx: __m256i, _mm256_stream_si256;
        Avx512: __m512i, _mm512_stream_si512;
    }
}

/// Lines of plain bytes.
struct Lines {
    from: *const u8,
    into: *mut u8,
    count: usize,
}

impl Streamer for Lines {
    #[inline(always)]
    fn run<L: Line>(self) {
        for offset in (0..self.count * LINE_BYTES).step_by(LINE_BYTES) {
            let (from, into) = (
                self.from.wrapping_add(offset),
                self.into.wrapping_add(offset),
            );
            // SAFETY: `stream` made this of so many lines of two spans, and `into` starts one; it was launched for the
            // instruction set of `L`. A breach changes bytes that the tests of `combine` guard, or faults in them.
            unsafe { L::stream(from, into) };
        }
    }
}
