//! Work that is put off, to be done together: pieces of one kind become one launch over a table of addresses.
//!
//! [Note: order of what is put off] Pieces of work that touch no common byte may be done in any order, so that one joins the
//! launch of its kind, whatever came between. As soon as a piece touches memory that waits already, all that waits is
//! launched first. Two that only read the same bytes are kept apart too: it is rare, and one list of ranges is enough.
//!
//! Work over the memory of another queue makes that one a host, and this one its guest: before a host takes or gives
//! anything more, its guests launch what waits. So all is in the order in which it was given, on however many queues.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Weak};

use cudarc::driver::result;

use super::abi;
use super::driver::refused;
use super::memory::Piece;
use super::queue::Queue;
use crate::device::{Block, Device};
use crate::dtype::Dtype;
use crate::error::KernelError;

/// What a launch is the same in for all pieces of work.
#[derive(Copy, Clone, Debug, PartialEq)]
pub(super) enum Kernel {
    /// Bytes as they are.
    Copy,
    /// A cast, times a factor.
    Move {
        from: Dtype,
        into: Dtype,
        factor: f64,
    },
    /// `op` as the kernels count it: sum, prod, min, max.
    Fold { from: Dtype, into: Dtype, op: u32 },
    /// An element of this size, by its bits.
    Fill { bytes: usize, bits: u64 },
    /// A bound.
    Clamp { dtype: Dtype, limit: f64 },
    /// An optimizer's formula: "sgd", "adam", "lion".
    Update {
        formula: &'static str,
        param: Dtype,
        rule: abi::Rule,
    },
}

impl Kernel {
    fn name(self) -> String {
        match self {
            Kernel::Copy => "copy_bytes".into(),
            Kernel::Move { from, into, .. } => format!("move_{from}_{into}"),
            Kernel::Fold { from, into, .. } => format!("fold_{from}_{into}"),
            Kernel::Fill { bytes, .. } => format!("fill_{bytes}"),
            Kernel::Clamp { dtype, .. } => format!("clamp_{dtype}"),
            Kernel::Update { formula, param, .. } => format!("{formula}_{param}"),
        }
    }

    /// The kernel's last argument: its bits, from the first byte on.
    fn scalar(self) -> [u64; size_of::<abi::Rule>() / 8] {
        let one = |bits| {
            let mut words = [0; size_of::<abi::Rule>() / 8];
            words[0] = bits;
            words
        };
        match self {
            Kernel::Copy => one(0),
            Kernel::Move { factor, .. } => one(factor.to_bits()),
            Kernel::Clamp { limit, .. } => one(limit.to_bits()),
            Kernel::Fold { op, .. } => one(u64::from(op)),
            Kernel::Fill { bits, .. } => one(bits),
            Kernel::Update { rule, .. } => bytemuck::cast(rule),
        }
    }

    /// Elements (bytes, of a copy) of a chunk.
    fn chunk(self) -> u64 {
        match self {
            Kernel::Copy => abi::COPY_CHUNK,
            _ => abi::CHUNK,
        }
    }
}

/// Addresses and length of one piece of work, before it has its place in a table.
#[derive(Copy, Clone, Debug)]
pub(super) enum Entry {
    Move(abi::Move),
    Update(abi::Update),
}

/// Pieces of work of one kind, which become one launch.
struct Launch {
    kernel: Kernel,
    moves: Vec<abi::Move>,
    updates: Vec<abi::Update>,
    chunks: u64,
}

/// All that waits.
#[derive(Default)]
pub(super) struct Pending {
    launches: Vec<Launch>,
    taken: BTreeMap<u64, u64>, // disjoint ranges of memory that waiting work touches: begin, end
    holds: Vec<Box<dyn Any + Send>>,
    others: Vec<Arc<dyn Device>>, // queues whose memory waiting work touches
    guests: Vec<Weak<Queue>>,     // queues whose waiting work touches memory of this one
}

impl Pending {
    /// Waiting work touches memory that another queue works on: it comes after what that queue was given so far, and
    /// before what it is given later.
    pub(super) fn beside(&mut self, other: &dyn Device) {
        let same = |known: &Arc<dyn Device>| std::ptr::addr_eq(&raw const **known, other);
        if !self.others.iter().any(same) {
            self.others.push(other.share());
        }
    }

    /// Another queue has waiting work over memory of this one.
    pub(super) fn receive(&mut self, guest: Weak<Queue>) {
        if !self.guests.iter().any(|known| known.ptr_eq(&guest)) {
            self.guests.push(guest);
        }
    }

    /// Those that are to launch before the queue takes anything more.
    pub(super) fn guests(&self) -> impl Iterator<Item = Arc<Queue>> {
        self.guests.iter().filter_map(Weak::upgrade)
    }

    /// Whether this piece of work is to wait until all that waits was launched.
    pub(super) fn refuses(&self, ranges: &[(u64, u64)]) -> bool {
        !self.guests.is_empty() || self.touches(ranges)
    }

    /// Keep what keeps the memory of waiting work.
    pub(super) fn hold(&mut self, hold: Box<dyn Any + Send>) {
        self.holds.push(hold);
    }

    /// Whether waiting work touches any of these ranges.
    fn touches(&self, ranges: &[(u64, u64)]) -> bool {
        let touches = |(begin, end): &(u64, u64)| {
            let before = self.taken.range(..*end).next_back();
            before.is_some_and(|(_, taken_end)| taken_end > begin)
        };
        ranges.iter().any(touches)
    }

    /// Add a piece of work that touches `ranges`, none of which waiting work touches.
    pub(super) fn add(&mut self, kernel: Kernel, entry: Entry, ranges: &[(u64, u64)]) {
        for (begin, end) in ranges {
            // A piece may name a range twice: what it changes in place.
            let known = self.taken.entry(*begin).or_insert(*end);
            *known = (*known).max(*end);
        }
        let found = self
            .launches
            .iter()
            .position(|launch| launch.kernel == kernel);
        let index = found.unwrap_or_else(|| {
            self.launches.push(Launch {
                kernel,
                moves: Vec::new(),
                updates: Vec::new(),
                chunks: 0,
            });
            self.launches.len() - 1
        });
        let launch = &mut self.launches[index];
        let first = launch.chunks;
        let numel = match entry {
            Entry::Move(entry) => {
                launch.moves.push(abi::Move { first, ..entry });
                entry.numel
            }
            Entry::Update(entry) => {
                launch.updates.push(abi::Update { first, ..entry });
                entry.numel
            }
        };
        launch.chunks += numel.div_ceil(kernel.chunk());
    }

    /// Give everything to the driver, and before other queues go on, `more`. What was kept may be let go afterwards.
    pub(super) fn launch_then(
        &self,
        queue: &Queue,
        more: impl FnOnce() -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        for other in &self.others {
            queue.wait_for(&*other.moment()?)?;
        }
        let launched = self
            .launches
            .iter()
            .try_for_each(|launch| launch.go(queue))
            .and_then(|()| more());
        // Also after a failure: what was launched before it runs.
        let ordered = self.order_others(queue);
        launched.and(ordered)
    }

    /// Let the others go on after what was launched.
    fn order_others(&self, queue: &Queue) -> Result<(), KernelError> {
        if self.others.is_empty() {
            return Ok(());
        }
        let moment = queue.moment()?;
        let waits = self.others.iter().map(|other| other.wait_for(&*moment));
        waits.fold(Ok(()), Result::and)
    }
}

impl Launch {
    fn go(&self, queue: &Queue) -> Result<(), KernelError> {
        let (table, count): (&[u8], usize) = match self.moves.is_empty() {
            true => (bytemuck::cast_slice(&self.updates), self.updates.len()),
            false => (bytemuck::cast_slice(&self.moves), self.moves.len()),
        };
        let table = upload(queue, table)?;
        let mut address = table.address() as u64;
        let mut count = u32::try_from(count).expect("fewer pieces of work than 2^32");
        let mut chunks = self.chunks;
        let mut scalar = self.kernel.scalar();
        let mut arguments: [*mut c_void; 4] = [
            (&raw mut address).cast(),
            (&raw mut count).cast(),
            (&raw mut chunks).cast(),
            (&raw mut scalar).cast(), // a copy has none, and does not look
        ];
        let (name, stream) = (self.kernel.name(), queue.raw());
        // SAFETY: the arguments are those that `abi.cuh` and the kernel's first lines list, and live during the call, which
        // copies them; the memory in the table is lent by spans, or kept by holds, until it was given to the queue, and freed
        // in its order. Test: `tests/gpu`, kernels, and poison in freed memory.
        unsafe {
            queue
                .functions()
                .launch(&name, chunks, stream, &mut arguments)
        }
        // The table is freed here, in stream order: after the launch.
    }
}

/// Bytes in device memory, for the next launch.
pub(super) fn upload(queue: &Queue, bytes: &[u8]) -> Result<Arc<Piece>, KernelError> {
    let piece = Piece::fresh(queue, bytes.len())?;
    let failed = || refused(queue.ordinal(), "upload a table");
    let mut staging = queue.staging();
    let staged = staging.take(bytes, queue.stream()).map_err(failed())?;
    let bytes = staged.unwrap_or(bytes);
    // SAFETY: the piece has this size. What was staged stays until the stream has read it; of pageable memory, such as every
    // vector's, the driver has a copy when it returns. Test: `tests/gpu`, queues: a fake driver that reads late would read the
    // next table.
    let copied = unsafe { result::memcpy_htod_async(piece.address() as u64, bytes, queue.raw()) };
    copied.map_err(failed())?;
    Ok(Arc::new(piece))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(from: u64, into: u64, numel: u64) -> (Entry, [(u64, u64); 2]) {
        let first = 99; // is given by the table
        let entry = abi::Move {
            from,
            into,
            numel,
            first,
        };
        let bytes = 4 * numel;
        (
            Entry::Move(entry),
            [(from, from + bytes), (into, into + bytes)],
        )
    }

    fn cast(into: Dtype) -> Kernel {
        Kernel::Move {
            from: Dtype::F32,
            into,
            factor: 1.0,
        }
    }

    #[test]
    fn work_of_a_kind_becomes_one_launch_and_is_numbered_by_chunks() {
        let mut pending = Pending::default();
        for (index, numel) in [8192, 8193, 1].into_iter().enumerate() {
            let at = index as u64 * 1_000_000;
            let (piece, ranges) = entry(at + 1000, at + 500_000, numel);
            assert!(!pending.touches(&ranges));
            // Another kind between them makes no difference.
            pending.add(cast(Dtype::BF16), piece, &ranges);
            let (other, ranges) = entry(at + 600_000, at + 700_000, 1);
            pending.add(cast(Dtype::F16), other, &ranges);
        }
        assert_eq!(pending.launches.len(), 2);
        let firsts = pending.launches[0].moves.iter().map(|entry| entry.first);
        assert_eq!(firsts.collect::<Vec<_>>(), [0, 1, 3]);
        assert_eq!(pending.launches[0].chunks, 4);
    }

    #[test]
    fn whatever_touches_waiting_memory_is_noticed() {
        let mut pending = Pending::default();
        let (piece, ranges) = entry(1000, 5000, 100); // to 1400, to 5400
        pending.add(cast(Dtype::F32), piece, &ranges);
        for (range, touches) in [
            ((900, 1000), false),
            ((900, 1001), true),
            ((1399, 1400), true),
            ((1400, 5000), false),
            ((1200, 1300), true),
            ((0, 9000), true),
            ((5400, 6000), false),
        ] {
            assert_eq!(pending.touches(&[range]), touches, "{range:?}");
        }
    }
}
