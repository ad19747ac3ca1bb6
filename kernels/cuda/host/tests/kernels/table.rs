//! Tables of entries, the memory that they point to with its guards, and the launch.

use std::ffi::c_void;

use bytemuck::{Pod, Zeroable};
use fabric_kernels::Element;
use fabric_kernels::scalar::Float;

/// `CHUNK` in `abi.cuh`.
pub const CHUNK: usize = 8192;

/// Lengths on both sides of a chunk's end, in an order that lets a search for an entry go wrong.
pub const AROUND_CHUNK: [usize; 7] = [
    1,
    CHUNK,
    3 * CHUNK + 17,
    CHUNK - 1,
    CHUNK + 1,
    2 * CHUNK,
    130,
];

/// Blocks in a grid: one, fewer than chunks, and more.
pub const GRIDS: [u32; 3] = [1, 5, 40];

/// `Move` in `abi.cuh`.
#[repr(C)]
#[derive(Copy, Clone, Pod, Zeroable)]
pub struct Move {
    pub from: u64,
    pub into: u64,
    pub numel: u64,
    pub first: u64,
}

/// A table of moves, with `first` filled in, and how many chunks it has.
pub fn moves(
    entries: impl IntoIterator<Item = (u64, u64, usize)>,
    chunk: usize,
) -> (Vec<Move>, u64) {
    let (mut table, mut first) = (Vec::new(), 0);
    for (from, into, numel) in entries {
        let numel = numel as u64;
        table.push(Move {
            from,
            into,
            numel,
            first,
        });
        first += numel.div_ceil(chunk as u64);
    }
    (table, first)
}

/// Launches a kernel that takes a table, and `more` behind it.
pub fn launch<E: Pod>(kernel: &str, grid: u32, (table, chunks): (&[E], u64), more: &[&[u8]]) {
    let address = table.as_ptr().expose_provenance() as u64;
    let count = table.len() as u32;
    let head = [
        bytemuck::bytes_of(&address),
        bytemuck::bytes_of(&count),
        bytemuck::bytes_of(&chunks),
    ];
    launch_with(kernel, grid, &[&head, more].concat());
}

/// Launches a kernel with the bytes of its arguments.
pub fn launch_with(kernel: &str, grid: u32, values: &[&[u8]]) {
    let sizes: Vec<usize> = values.iter().map(|value| value.len()).collect();
    assert_eq!(
        fabric_kernels_host::arguments(kernel),
        Some(&sizes[..]),
        "arguments of {kernel}"
    );
    let mut rooms: Vec<Vec<u128>> = values
        .iter()
        .map(|value| {
            let mut room = vec![0u128; value.len().div_ceil(16)];
            bytemuck::cast_slice_mut::<u128, u8>(&mut room)[..value.len()].copy_from_slice(value);
            room
        })
        .collect();
    let mut pointers: Vec<*mut c_void> = rooms
        .iter_mut()
        .map(|room| room.as_mut_ptr().cast())
        .collect();
    // SAFETY: as many arguments, of the sizes, as the kernel has, asserted above; tables point into `Room`s that the
    // test owns, and whose guards tell where a kernel wrote besides.
    unsafe {
        fabric_kernels_host::launch(
            kernel,
            grid,
            fabric_kernels_host::THREADS,
            pointers.as_mut_ptr(),
        )
    }
    .unwrap();
}

/// Memory that begins at a multiple of 16 bytes.
struct Room {
    words: Vec<u128>,
}

/// What lies around targets, and around sources: other bytes, so that a guard that is copied is a guard broken.
const TARGET_GUARD: u8 = 0xa5;
const SOURCE_GUARD: u8 = 0x5a;

impl Room {
    /// `bytes` of guards.
    fn new(bytes: usize, guard: u8) -> Self {
        let words = vec![u128::from_ne_bytes([guard; 16]); bytes.div_ceil(16) + 1];
        Room { words }
    }

    fn put<T: Element>(&mut self, at: usize, elements: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(elements);
        self.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.words)
    }

    /// The address of a byte, for kernels to read and to write.
    fn address(&mut self, at: usize) -> u64 {
        (self.words.as_mut_ptr().expose_provenance() + at) as u64
    }
}

/// One piece of memory with a slot for each entry of a table, guards between them.
pub struct Slots {
    room: Room,
    guard: u8,
    size: usize,
    /// Byte at which each begins, and elements.
    slots: Vec<(usize, usize)>,
}

impl Slots {
    /// A slot for each length, each beginning `offset` elements behind a multiple of 16 bytes.
    pub fn new<T: Element>(lengths: &[usize], offset: usize) -> Self {
        Self::guarded::<T>(lengths, offset, TARGET_GUARD)
    }

    fn guarded<T: Element>(lengths: &[usize], offset: usize, guard: u8) -> Self {
        let size = size_of::<T>();
        let (mut slots, mut end) = (Vec::new(), 16);
        for &len in lengths {
            slots.push((end + offset * size, len));
            // At least 16 bytes between the end of one and the begin of the next.
            end = (end + (offset + len) * size).next_multiple_of(16) + 16;
        }
        let room = Room::new(end, guard);
        Slots {
            room,
            guard,
            size,
            slots,
        }
    }

    /// As `new`, holding the elements of each entry.
    pub fn of<T: Element>(entries: &[&[T]], offset: usize) -> Self {
        let mut slots = Self::guarded::<T>(&lengths(entries), offset, SOURCE_GUARD);
        for (index, entry) in entries.iter().enumerate() {
            let at = slots.slots[index].0;
            slots.room.put(at, entry);
        }
        slots
    }

    pub fn addresses(&mut self) -> Vec<u64> {
        let starts: Vec<usize> = self.slots.iter().map(|slot| slot.0).collect();
        starts.into_iter().map(|at| self.room.address(at)).collect()
    }

    /// Fails where a slot does not hold what is expected (any NaN is any NaN), or a guard was overwritten.
    #[track_caller]
    pub fn expect<T: Float>(&self, expected: &[&[T]], what: impl Fn() -> String) {
        self.expect_that(expected, same, &what);
    }

    /// As `expect`, without leave for anything.
    #[track_caller]
    pub fn expect_bytes<T: Element>(&self, expected: &[&[T]], what: impl Fn() -> String) {
        let equal = |a: T, b: T| bytemuck::bytes_of(&a) == bytemuck::bytes_of(&b);
        self.expect_that(expected, equal, &what);
    }

    /// Fails where anything at all was written.
    #[track_caller]
    pub fn expect_untouched(&self, what: impl Fn() -> String) {
        self.expect_guard(0, self.room.bytes().len(), &what);
    }

    #[track_caller]
    fn expect_that<T: Element>(
        &self,
        expected: &[&[T]],
        equal: fn(T, T) -> bool,
        what: &impl Fn() -> String,
    ) {
        assert_eq!(
            (self.slots.len(), self.size),
            (expected.len(), size_of::<T>())
        );
        let mut guard = 0;
        for (index, (&(at, len), expected)) in self.slots.iter().zip(expected).enumerate() {
            self.expect_guard(guard, at, what);
            guard = at + len * self.size;
            assert_eq!(len, expected.len());
            let found = &self.room.bytes()[at..guard];
            if found == bytemuck::cast_slice::<T, u8>(expected) {
                continue;
            }
            for (element, (found, expected)) in found.chunks(self.size).zip(*expected).enumerate() {
                assert!(
                    equal(bytemuck::pod_read_unaligned(found), *expected),
                    "{}: entry {index} of {len}: element {element} is {found:02x?}, the oracle says {:02x?}",
                    what(),
                    bytemuck::bytes_of(expected)
                );
            }
        }
        self.expect_guard(guard, self.room.bytes().len(), what);
    }

    fn expect_guard(&self, from: usize, to: usize, what: &impl Fn() -> String) {
        let broken = self.room.bytes()[from..to]
            .iter()
            .position(|byte| *byte != self.guard);
        assert_eq!(
            broken,
            None,
            "{}: bytes between the slots at {from} were written",
            what()
        );
    }
}

/// Equal bits, or both NaN.
pub fn same<T: Float>(a: T, b: T) -> bool {
    bytemuck::bytes_of(&a) == bytemuck::bytes_of(&b) || (a.decode().is_nan() && b.decode().is_nan())
}

/// Element offsets that change where a span lies between two multiples of 16 bytes.
pub fn offsets<T: Element>() -> std::ops::Range<usize> {
    0..16 / size_of::<T>()
}

pub fn lengths<T>(entries: &[&[T]]) -> Vec<usize> {
    entries.iter().map(|entry| entry.len()).collect()
}

/// For every length from 1 to 257, in a row of 3 * 257 elements, where an entry of this length lies.
pub fn every_length() -> Vec<std::ops::Range<usize>> {
    (1..=257).map(|len| 2 * len..3 * len).collect()
}

/// The parts of a row of elements.
pub fn parts<'a, T>(row: &'a [T], ranges: &[std::ops::Range<usize>]) -> Vec<&'a [T]> {
    ranges.iter().map(|range| &row[range.clone()]).collect()
}

/// One launch of a kernel over a table of moves, and what it should have written.
pub struct Case<'a, A, B> {
    pub kernel: &'a str,
    pub from: &'a [&'a [A]],
    /// What the targets hold before, where the kernel reads them.
    pub before: Option<&'a [&'a [B]]>,
    pub expected: &'a [&'a [B]],
    /// Element offsets of source and target.
    pub offsets: (usize, usize),
    pub grid: u32,
    /// The arguments behind the table's.
    pub more: &'a [&'a [u8]],
}

impl<A: Element, B: Float> Case<'_, A, B> {
    #[track_caller]
    pub fn check(&self) {
        let lengths = lengths(self.from);
        let mut source = Slots::of(self.from, self.offsets.0);
        let mut target = match self.before {
            None => Slots::new::<B>(&lengths, self.offsets.1),
            Some(before) => Slots::of(before, self.offsets.1),
        };
        let addresses = source.addresses().into_iter().zip(target.addresses());
        let entries = addresses
            .zip(lengths)
            .map(|((from, into), len)| (from, into, len));
        let (table, chunks) = moves(entries, CHUNK);
        launch(self.kernel, self.grid, (&table, chunks), self.more);
        target.expect(self.expected, || {
            format!("{} at {:?}, grid {}", self.kernel, self.offsets, self.grid)
        });
    }
}
