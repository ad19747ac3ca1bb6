//! Memory that the engine owns, [`Slab`], and how several pieces of it are borrowed at once.
//!
//! [Note: slab ownership] A `Slab` is the only handle to its bytes: it is not `Clone`, `split_at` divides the range,
//! and a collective takes it by value. Peers reach the bytes of an arena's slab only between the submission that takes
//! it and the completion that gives it back, so that a slice handed out by a slab in the caller's hands is private.
#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    any::Any,
    ops::Range,
    ptr::NonNull,
    sync::Arc,
};

use fabric_kernels::{Device, Dtype, Element, KernelError, Memory, Span, SpanMut, device};

/// Slabs start at a multiple of this many bytes: two cache lines, because the prefetcher fetches pairs.
pub const SLAB_ALIGN: usize = 128;

/// How a fresh slab of so many bytes is aligned: long ones start a page.
///
/// Where inputs and outputs start pages, what is loaded next is not where something was just stored: the kernels'
/// [Note: same place in a page]. (An all_reduce of 64 MiB between two ranks, into an output that starts 256 bytes further
/// on in its page: 11.7 ms, and 7.0 where both start pages; of 1 MiB 43 and 30 us.)
pub(crate) fn align_of_slab(bytes: usize) -> usize {
    const PAGE_BYTES: usize = 4 << 10;
    match bytes < 4 * PAGE_BYTES {
        true => SLAB_ALIGN,
        false => PAGE_BYTES,
    }
}

/// Memory of one dtype that the engine owns: `numel` elements in one piece, aligned to [`SLAB_ALIGN`] when fresh.
pub struct Slab {
    block: Arc<Block>,
    offset: usize, // bytes from the block's base
    dtype: Dtype,
    numel: usize,
}

/// The memory that one or several slabs divide among themselves.
struct Block {
    base: NonNull<u8>,
    bytes: usize,
    home: Home,
    device: Option<Arc<dyn Device>>, // whose memory it is; none: the host's
}

enum Home {
    Heap(Layout),
    /// Memory of somebody else (an arena); the guard gives it back when dropped.
    Guarded {
        _guard: Box<dyn Any + Send + Sync>,
    },
}

// SAFETY: the block is plain memory without thread affinity; see [Note: slab ownership]: every byte belongs to exactly
// one slab, so that sharing the block shares no byte. Test: `halves_of_a_slab_are_written_from_two_threads`.
unsafe impl Send for Block {}
// SAFETY: as for Send: `Block` itself offers no access to the bytes, only slabs do, each to its own.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        if let Home::Heap(layout) = self.home
            && layout.size() > 0
        {
            // SAFETY: `base` came from `alloc_zeroed` with this very layout, in `Slab::zeroed`, and nobody else
            // frees it. Test: every test under a leak or address checker.
            unsafe { dealloc(self.base.as_ptr(), layout) };
        }
    }
}

impl Slab {
    /// `numel` zeros of `dtype` on the heap.
    pub fn zeroed(dtype: Dtype, numel: usize) -> Self {
        let bytes = numel
            .checked_mul(dtype.size())
            .expect("a slab of more bytes than the address space");
        let layout = Layout::from_size_align(bytes, align_of_slab(bytes))
            .expect("a slab of more bytes than isize holds");
        let base = if bytes == 0 {
            // SAFETY: SLAB_ALIGN is not zero; the pointer is aligned, dangling and never dereferenced, as no byte is ours.
            unsafe { NonNull::new_unchecked(std::ptr::without_provenance_mut::<u8>(SLAB_ALIGN)) }
        } else {
            // SAFETY: the layout's size is not zero, checked on the line above.
            let raw = unsafe { alloc_zeroed(layout) };
            NonNull::new(raw).unwrap_or_else(|| handle_alloc_error(layout))
        };
        let block = Block {
            base,
            bytes,
            home: Home::Heap(layout),
            device: None,
        };
        Self {
            block: Arc::new(block),
            offset: 0,
            dtype,
            numel,
        }
    }

    /// `numel` zeros of `dtype` in the memory of `device`, or on the heap where there is none.
    ///
    /// # Errors
    /// When the device has no more.
    pub fn zeroed_on(
        device: Option<&Arc<dyn Device>>,
        dtype: Dtype,
        numel: usize,
    ) -> Result<Self, KernelError> {
        let Some(device) = device else {
            return Ok(Self::zeroed(dtype, numel));
        };
        let bytes = numel
            .checked_mul(dtype.size())
            .expect("a slab of more bytes than the address space");
        let memory: Arc<dyn device::Block> = device.allocate(bytes.max(1))?;
        let base = std::ptr::without_provenance_mut::<u8>(memory.address());
        let block = Block {
            base: NonNull::new(base).expect("devices hand out no null"),
            bytes,
            home: Home::Guarded {
                _guard: Box::new(memory),
            },
            device: Some(device.clone()),
        };
        Ok(Self {
            block: Arc::new(block),
            offset: 0,
            dtype,
            numel,
        })
    }

    /// A copy of `values`.
    pub fn from_slice<T: Element>(values: &[T]) -> Self {
        let mut slab = Self::zeroed(T::DTYPE, values.len());
        slab.as_mut_slice::<T>().copy_from_slice(values);
        slab
    }

    /// Memory of an arena; `guard` is dropped when the last part of the slab is.
    ///
    /// # Safety
    /// `base` is aligned to [`SLAB_ALIGN`], valid for `numel` elements for as long as `guard` lives, initialised, and
    /// given to no other slab meanwhile.
    pub unsafe fn guarded(
        base: NonNull<u8>,
        dtype: Dtype,
        numel: usize,
        guard: Box<dyn Any + Send + Sync>,
    ) -> Self {
        assert_eq!(
            base.as_ptr().addr() % SLAB_ALIGN,
            0,
            "arenas hand out aligned memory"
        );
        let block = Block {
            base,
            bytes: numel * dtype.size(),
            home: Home::Guarded { _guard: guard },
            device: None,
        };
        Self {
            block: Arc::new(block),
            offset: 0,
            dtype,
            numel,
        }
    }

    /// Where the elements lie.
    pub fn memory(&self) -> Memory {
        self.device().map_or(Memory::Host, |device| device.memory())
    }

    /// Whose memory it is; `None` is the host's.
    #[inline]
    pub fn device(&self) -> Option<&Arc<dyn Device>> {
        self.block.device.as_ref()
    }

    /// The type of one element.
    #[inline]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How many elements.
    #[inline]
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// How many bytes.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.numel * self.dtype.size()
    }

    /// The address of the first byte, as a number: what tells an arena which of its pieces this is.
    #[inline]
    pub fn address(&self) -> usize {
        self.block.base.as_ptr().addr() + self.offset
    }

    /// The same bytes as elements of another type.
    ///
    /// # Panics
    /// When the bytes are no whole number of such elements, or the start is not aligned for them.
    pub fn recast(mut self, dtype: Dtype) -> Self {
        self.retype(dtype);
        self
    }

    /// [`Slab::recast`] of a slab that stays where it is.
    ///
    /// # Panics
    /// As [`Slab::recast`].
    pub fn retype(&mut self, dtype: Dtype) {
        let bytes = self.bytes();
        assert_eq!(
            bytes % dtype.size(),
            0,
            "{bytes} bytes are no whole number of {dtype}"
        );
        assert_eq!(
            self.address() % dtype.size(),
            0,
            "the slab does not start at a multiple of {dtype}"
        );
        self.numel = bytes / dtype.size();
        self.dtype = dtype;
    }

    /// Two owned parts: elements `0..at` and the rest. They may be used on different threads and rejoined.
    ///
    /// # Panics
    /// When `at` is beyond the end.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        assert!(
            at <= self.numel,
            "split at {at} of a slab of {}",
            self.numel
        );
        let right = Self {
            block: self.block.clone(),
            offset: self.offset + at * self.dtype.size(),
            dtype: self.dtype,
            numel: self.numel - at,
        };
        (Self { numel: at, ..self }, right)
    }

    /// Undo [`Slab::split_at`]; gives the parts back when they are not neighbours in this order.
    ///
    /// # Errors
    /// The two parts, unchanged.
    pub fn join(left: Self, right: Self) -> Result<Self, (Self, Self)> {
        let neighbours = Arc::ptr_eq(&left.block, &right.block)
            && left.dtype == right.dtype
            && left.offset + left.bytes() == right.offset;
        if neighbours {
            Ok(Self {
                numel: left.numel + right.numel,
                ..left
            })
        } else {
            Err((left, right))
        }
    }

    /// The elements.
    ///
    /// # Panics
    /// When `T` is not the slab's dtype, or they lie on a device: copy those with [`cast`](fabric_kernels::cast()).
    pub fn as_slice<T: Element>(&self) -> &[T] {
        assert_eq!(T::DTYPE, self.dtype, "a slab of another dtype");
        bytemuck::cast_slice(self.as_bytes())
    }

    /// The elements, to change.
    ///
    /// # Panics
    /// When `T` is not the slab's dtype.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(T::DTYPE, self.dtype, "a slab of another dtype");
        bytemuck::cast_slice_mut(self.as_bytes_mut())
    }

    /// The raw bytes.
    ///
    /// # Panics
    /// When they lie on a device.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        self.assert_on_host();
        // SAFETY: `pointer()..+bytes()` lies inside the block (kept by the constructors and `split_at`), is initialised
        // (zeroed or guaranteed by the arena) and belongs to this slab alone: [Note: slab ownership].
        unsafe { std::slice::from_raw_parts(self.pointer(), self.bytes()) }
    }

    /// The raw bytes, to change.
    ///
    /// # Panics
    /// When they lie on a device.
    #[inline]
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        self.assert_on_host();
        // SAFETY: as in `as_bytes`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.bytes()) }
    }

    /// The raw bytes of elements `range`.
    ///
    /// # Panics
    /// When the range is beyond the end.
    #[inline]
    pub fn bytes_of(&self, range: &Range<usize>) -> &[u8] {
        let size = self.dtype.size();
        &self.as_bytes()[range.start * size..range.end * size]
    }

    /// The raw bytes of elements `range`, to change.
    ///
    /// # Panics
    /// When the range is beyond the end.
    #[inline]
    pub fn bytes_of_mut(&mut self, range: &Range<usize>) -> &mut [u8] {
        let size = self.dtype.size();
        &mut self.as_bytes_mut()[range.start * size..range.end * size]
    }

    /// Elements `range`, for the kernels.
    ///
    /// # Panics
    /// When the range is beyond the end.
    #[inline]
    pub fn part(&self, range: Range<usize>) -> Span<'_> {
        self.whole().slice(range)
    }

    /// Elements `range`, for the kernels to change.
    ///
    /// # Panics
    /// When the range is beyond the end.
    #[inline]
    pub fn part_mut(&mut self, range: Range<usize>) -> SpanMut<'_> {
        if range.start > range.end || range.end > self.numel {
            beyond(&range, self.numel);
        }
        // SAFETY: the range was checked; validity and uniqueness as in `as_bytes_mut`; every dtype's size divides
        // SLAB_ALIGN and offsets are whole elements (`recast` checks), so the pointer is aligned.
        unsafe { self.raw_mut(range) }
    }

    #[inline]
    pub(super) fn whole(&self) -> Span<'_> {
        // SAFETY: validity as in `as_bytes`; alignment as in `part_mut`.
        unsafe {
            Span::from_raw(
                self.pointer(),
                self.dtype,
                self.numel,
                self.block.device.as_deref(),
            )
        }
    }

    /// # Safety
    /// `range` lies within the slab, and no other borrow of those elements lives as long as the result.
    #[inline]
    unsafe fn raw_mut(&self, range: Range<usize>) -> SpanMut<'_> {
        let start = self.pointer().wrapping_add(range.start * self.dtype.size());
        // SAFETY: the caller promises bounds and uniqueness; alignment as in `part_mut`.
        unsafe { SpanMut::from_raw(start, self.dtype, range.len(), self.block.device.as_deref()) }
    }

    #[inline]
    fn assert_on_host(&self) {
        if self.block.device.is_some() {
            self.away();
        }
    }

    #[cold]
    fn away(&self) -> ! {
        panic!(
            "a slab in {} memory is no slice of the host's: copy it with kernels::cast",
            self.memory()
        )
    }

    #[inline]
    fn pointer(&self) -> *mut u8 {
        debug_assert!(self.offset + self.bytes() <= self.block.bytes);
        self.block.base.as_ptr().wrapping_add(self.offset)
    }
}

impl std::fmt::Debug for Slab {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Slab({} x {})", self.numel, self.dtype)
    }
}

#[cold]
fn beyond(range: &Range<usize>, numel: usize) -> ! {
    panic!("elements {range:?} of a slab of {numel}")
}

/// Elements `range` of slab number `slab`, in a slice of slabs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which slab.
    pub slab: usize,
    /// Which elements.
    pub range: Range<usize>,
}

/// Borrow two pieces of one or two slabs at once: one to read, one to change.
///
/// # Panics
/// When they overlap, or lie outside their slabs: a schedule that does so is wrong, and the checker refuses it.
pub fn carve<'a>(slabs: &'a mut [Slab], read: &Piece, write: &Piece) -> (Span<'a>, SpanMut<'a>) {
    for piece in [read, write] {
        let numel = slabs[piece.slab].numel;
        assert!(
            piece.range.start <= piece.range.end && piece.range.end <= numel,
            "{piece:?} of a slab of {numel}"
        );
    }
    let overlap = read.slab == write.slab
        && read.range.start.max(write.range.start) < read.range.end.min(write.range.end);
    assert!(!overlap, "{write:?} is read while it is written");
    let slab = &slabs[read.slab];
    let start = slab
        .pointer()
        .wrapping_add(read.range.start * slab.dtype.size());
    // SAFETY: bounds were checked above; the piece to change does not overlap it, and `&'a mut [Slab]` keeps everybody
    // else away; slabs never share bytes: [Note: slab ownership]. Test: `carve_refuses_overlap`.
    let span = unsafe {
        Span::from_raw(
            start,
            slab.dtype,
            read.range.len(),
            slab.block.device.as_deref(),
        )
    };
    // SAFETY: bounds and absence of overlap were checked above; uniqueness as for the piece to read.
    let span_mut = unsafe { slabs[write.slab].raw_mut(write.range.clone()) };
    (span, span_mut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slab_splits_and_rejoins_in_order_only() {
        let (left, right) = Slab::from_slice(&[1.0f32, 2.0, 3.0]).split_at(1);
        assert_eq!(
            (left.as_slice::<f32>(), right.as_slice::<f32>()),
            (&[1.0][..], &[2.0, 3.0][..])
        );
        let (right, left) = Slab::join(right, left).unwrap_err();
        assert_eq!(
            Slab::join(left, right).unwrap().as_slice::<f32>(),
            &[1.0, 2.0, 3.0]
        );
    }

    #[test]
    fn halves_of_a_slab_are_written_from_two_threads() {
        let (mut left, mut right) = Slab::zeroed(Dtype::U32, 1000).split_at(500);
        std::thread::scope(|scope| {
            scope.spawn(|| left.as_mut_slice::<u32>().fill(1));
            scope.spawn(|| right.as_mut_slice::<u32>().fill(2));
        });
        let whole = Slab::join(left, right).unwrap();
        assert_eq!(whole.as_slice::<u32>().iter().sum::<u32>(), 1500);
    }

    #[test]
    fn carve_lends_disjoint_pieces() {
        let mut slabs = [Slab::from_slice(&[1u8, 2, 3, 4]), Slab::from_slice(&[9u8])];
        let piece = |slab, range| Piece { slab, range };
        for (read, value) in [(piece(0, 0..1), 1), (piece(1, 0..1), 9)] {
            let (from, into) = carve(&mut slabs, &read, &piece(0, 2..3));
            fabric_kernels::cast(from, into).unwrap();
            assert_eq!(slabs[0].as_slice::<u8>(), [1, 2, value, 4]);
        }
        assert_eq!(slabs[0].bytes_of(&(1..2)), [2]);
        slabs[0].bytes_of_mut(&(0..2)).fill(7);
        assert_eq!(slabs[0].as_slice::<u8>(), [7, 7, 9, 4]);
    }

    #[test]
    #[should_panic(expected = "read while it is written")]
    fn carve_refuses_overlap() {
        let mut slabs = [Slab::zeroed(Dtype::U8, 4)];
        let piece = |range| Piece { slab: 0, range };
        carve(&mut slabs, &piece(0..2), &piece(1..3));
    }

    #[test]
    fn an_empty_slab_is_fine() {
        let slab = Slab::zeroed(Dtype::F64, 0);
        assert_eq!(slab.as_slice::<f64>(), &[] as &[f64]);
    }
}
