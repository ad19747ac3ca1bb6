//! Stores past the caches.
//!
//! [Note: streaming] An ordinary store first loads the line that it writes to, and pushes another out of the caches. A
//! streaming one does neither, if whole lines are stored; it goes through a buffer of the processor from which it may
//! arrive after later ordinary stores. So what signals to others that elements are there (a release store, which on
//! this processor is an ordinary one) must come after a fence: [`settle`], once, at the end.
//!
//! [Note: same place in a page] A processor that compares only twelve bits of addresses takes a load for one of what a
//! store on its way stores when both have the same place in their pages, and lets it wait. Streams to several targets
//! are long on their way: where a target is a few lines further on in its page than a source, going up meets that at
//! every step, and takes up to five times as long; where it is a few lines back, going down does. (Zen 3, two sources, two
//! targets 256 bytes further on, 16 MiB by two cores: 3.5 ms going up, 1.6 going down.)

use std::ptr;

use super::{Streamer, launch_streamer};
use crate::combine::Store;
use crate::span::{Span, SpanMut};

pub(super) const LINE_BYTES: usize = 64;

const NEAR_BYTES: usize = 1 << 10; // about what is on its way to one of two targets

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

/// In which order spans are streamed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Course {
    /// Elements before the first that starts a line in all targets.
    pub(super) lead: usize,
    /// From the last line to the first.
    pub(super) is_down: bool,
}

impl Course {
    /// The order in which no load waits for a store: [Note: same place in a page]. None if there is none, or if the
    /// targets' lines do not begin together. Elements have `size` bytes.
    #[inline(never)] // long spans only
    pub(super) fn of(sources: &[*const u8], targets: &[SpanMut<'_>], size: usize) -> Option<Self> {
        const PAGE_BYTES: usize = 4 << 10;
        let first = lead(targets[0].as_ptr());
        let is_even = targets.iter().all(|target| lead(target.as_ptr()) == first);
        let further = |source: &*const u8| {
            let source = source.addr();
            let targets = targets.iter();
            targets.map(move |target| target.as_ptr().addr().wrapping_sub(source) % PAGE_BYTES)
        };
        let is_several = targets.len() > 1;
        let mut pairs = sources.iter().flat_map(further).filter(|_| is_several);
        let waits_up = pairs.clone().any(|bytes| (1..NEAR_BYTES).contains(&bytes));
        let waits_down = pairs.any(|bytes| bytes > PAGE_BYTES - NEAR_BYTES);
        let can = is_even && !(waits_up && waits_down);
        can.then_some(Self {
            lead: first / size,
            is_down: waits_up,
        })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: streams run so that no load meets a store in its page. Method: targets some bytes further on than sources.
    #[test]
    fn the_course_avoids_what_is_on_its_way() {
        let mut memory = vec![0u8; 16 << 10];
        let page = memory.as_ptr().align_offset(4096);
        let mut course = |sources: [usize; 2], targets: &[usize]| {
            let sources = sources.map(|at| memory.as_ptr().wrapping_add(page + at));
            let mut rest = &mut memory[page..];
            let mut before = 0;
            let mut spans = Vec::new();
            for at in targets {
                rest = rest.split_at_mut(at - before).1;
                let (span, after) = rest.split_at_mut(1);
                spans.push(SpanMut::of(span));
                (rest, before) = (after, at + 1);
            }
            Course::of(&sources, &spans, 4)
        };
        let up = |lead| {
            Some(Course {
                lead,
                is_down: false,
            })
        };
        let down = |lead| {
            Some(Course {
                lead,
                is_down: true,
            })
        };
        assert_eq!(course([0, 4096], &[0, 8192]), up(0), "the same places");
        assert_eq!(course([0, 4096], &[2048, 8192 + 2048]), up(0), "far on");
        assert_eq!(course([0, 64], &[4096 + 256, 8192 + 256]), down(0));
        assert_eq!(
            course([0, 0], &[4096 + 40, 8192 + 40]),
            down(6),
            "24 bytes before a line"
        );
        assert_eq!(course([256, 256], &[4096, 8192]), up(0), "a few lines back");
        assert_eq!(
            course([0, 512], &[256, 4096 + 256]),
            None,
            "further on, and back"
        );
        assert_eq!(
            course([0, 512], &[256]),
            up(0),
            "one target alone is soon stored"
        );
        assert_eq!(course([0, 0], &[2048, 4096 + 32]), None, "no common line");
    }
}
