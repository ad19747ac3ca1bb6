//! Does the memory fit the call? And the fingerprint of a call that it fits.

use std::sync::Arc;

use fabric_kernels::Dtype;

use super::super::{Call, Data, Op, Rank};
use crate::{
    buffer::Slab,
    error::{Error, Result},
    wire::frame::Stamp,
};

/// The full vector of a call: its length and type. Of a message there is none, and the length is 0.
#[derive(Clone, Copy, Debug)]
pub(in crate::comm) struct Shape {
    pub(in crate::comm) dtype: Dtype,
    pub(in crate::comm) numel: usize,
}

/// Messages are not numbered: only two ranks know of them.
pub(in crate::comm) fn stamp(sequence: u64, call: &Call, shape: Shape) -> Stamp {
    let (op, reduce) = call.op.code();
    let root = call.op.kind().and_then(|kind| kind.root()).unwrap_or(0);
    Stamp {
        sequence: if call.op.kind().is_some() {
            sequence
        } else {
            0
        },
        op,
        reduce,
        dtype: shape.dtype,
        root: root as u32,
        numel: shape.numel as u64,
        label: call.label,
        cut: call.counts.as_deref().map_or(0, cut),
    }
}

/// A fingerprint of uneven slices; not 0.
fn cut(counts: &[usize]) -> u32 {
    // FNV-1a (Fowler, Noll and Vo) over the counts, folded to 24 bits.
    let step =
        |hash: u64, count: &usize| (hash ^ *count as u64).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = counts.iter().fold(0xcbf2_9ce4_8422_2325, step);
    ((hash >> 40 ^ hash) as u32 & 0xff_ffff).max(1)
}

/// The latest call that was found to fit its memory: one like it need not be examined again.
pub(super) struct Latest {
    op: Op,
    counts: Option<Arc<[usize]>>,
    form: Form,
    /// Its fingerprint, but for its number and its label.
    pub(super) stamp: Stamp,
    /// A number that calls like it share, and no others.
    pub(super) kind: u64,
}

/// All of the data that decides whether it fits.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Nothing,
    InPlace((Dtype, usize)),
    Out((Dtype, usize), (Dtype, usize)),
}

impl Form {
    /// None where it takes longer to tell than to examine.
    #[inline(always)]
    fn of(data: &Data) -> Option<Self> {
        let shape = |slab: &Slab| (slab.dtype(), slab.numel());
        match data {
            Data::None => Some(Self::Nothing),
            Data::InPlace(slab) => Some(Self::InPlace(shape(slab))),
            Data::Out { from, into } => Some(Self::Out(shape(from), shape(into))),
            Data::Many(_) => None,
        }
    }
}

impl Latest {
    pub(super) fn new(call: &Call, data: &Data, stamp: Stamp, kind: u64) -> Option<Self> {
        Some(Self {
            op: call.op,
            counts: call.counts.clone(),
            form: Form::of(data)?,
            stamp,
            kind,
        })
    }

    #[inline(always)]
    pub(super) fn is_like(&self, call: &Call, data: &Data) -> bool {
        self.op == call.op && call.is_cut_as(&self.counts) && Form::of(data) == Some(self.form)
    }
}

/// Does the data fit the call?
pub(in crate::comm) fn check_shapes(
    rank: Rank,
    size: usize,
    call: &Call,
    data: &Data,
) -> Result<Shape> {
    let claim = Claim {
        rank,
        size,
        call,
        data,
    };
    if call.op == Op::Barrier {
        return match (data, &call.counts) {
            (Data::None, None) => Ok(Shape {
                dtype: Dtype::U8,
                numel: 0,
            }),
            _ => Err(claim.wrong(
                "has data",
                "Submit a barrier with Data::None, and no counts",
            )),
        };
    }
    match call.op.kind() {
        None => claim.message(),
        Some(_) => claim.collective(),
    }
}

/// A call, and the memory that is claimed to fit it.
struct Claim<'a> {
    rank: Rank,
    size: usize,
    call: &'a Call,
    data: &'a Data,
}

impl Claim<'_> {
    fn wrong(&self, what: impl std::fmt::Display, hint: &str) -> Error {
        let (rank, name) = (self.rank, self.call.op.code().0.name());
        Error::argument(format!("rank {rank}: {name} {what}"), hint)
    }

    fn message(&self) -> Result<Shape> {
        let (to, from) = self.call.op.ends();
        for peer in [to, from].into_iter().flatten() {
            if peer == self.rank || peer >= self.size {
                let what = format!("with rank {peer} of {}", self.size);
                return Err(self.wrong(what, "Name another rank of the group"));
            }
        }
        if self.call.counts.is_some() {
            return Err(self.wrong("with counts", "A message has one length: its slab's"));
        }
        let slab = match (self.data, to.is_some() && from.is_some()) {
            (Data::InPlace(slab), false) => slab,
            (Data::Out { from, into }, true) if from.dtype() == into.dtype() => from,
            _ => {
                return Err(self.wrong(
                    "with other data",
                    "A send or a receive has Data::InPlace, both at once have Data::Out of one dtype",
                ));
            }
        };
        Ok(Shape {
            dtype: slab.dtype(),
            numel: 0,
        })
    }

    fn collective(&self) -> Result<Shape> {
        let op = self.call.op;
        let root = op.kind().and_then(|kind| kind.root());
        if let Some(root) = root.filter(|root| *root >= self.size) {
            let what = format!("with root {root} of {}", self.size);
            return Err(self.wrong(what, "Name a rank of the group as the root"));
        }
        let (dtype, numel) = self.full(root)?;
        if let Some(fold) = op.reduce().map(|reduce| reduce.fold())
            && !fold.takes(dtype)
        {
            let what = format!("with {} of {dtype}", fold.name());
            let hint = "Bits are of integers and bool, sums and products of all but bool";
            return Err(self.wrong(what, hint));
        }
        self.cut(numel)?;
        let shape = Shape { dtype, numel };
        match self.data {
            Data::Out { from, into } => self.apart(from, into, shape, root)?,
            Data::InPlace(slab) if slab.numel() != self.held(numel, root) => {
                let what = format!(
                    "of {} elements in place, where {} are needed",
                    slab.numel(),
                    self.held(numel, root)
                );
                return Err(
                    self.wrong(what, "Give the root the full vector, the others their part")
                );
            }
            _ => {}
        }
        Ok(shape)
    }

    /// The full vector's type and length, read from the slab that says it.
    fn full(&self, root: Option<Rank>) -> Result<(Dtype, usize)> {
        let (op, size) = (self.call.op, self.size);
        let is_root = root.is_none_or(|root| root == self.rank);
        let (slab, times) = match (self.data, op) {
            (Data::None, _) => return Err(self.wrong("without data", "Give it a slab")),
            (Data::Many(slabs), Op::AllReduce(_) | Op::Broadcast { .. } | Op::Reduce { .. }) => {
                let Some(first) = slabs.first() else {
                    return Err(self.wrong("of no slabs", "Give it at least one"));
                };
                if slabs.iter().any(|slab| slab.dtype() != first.dtype()) {
                    return Err(self.wrong("of several dtypes", "Group slabs of one dtype"));
                }
                return Ok((first.dtype(), slabs.iter().map(Slab::numel).sum()));
            }
            (Data::Many(_), _) => {
                let hint = "Only all_reduce, reduce and broadcast take several slabs at once";
                return Err(self.wrong("of several slabs", hint));
            }
            (Data::InPlace(_), Op::AllToAll) => {
                return Err(self.wrong("in place", "Give it an output of its own"));
            }
            (Data::InPlace(slab), Op::Gather { .. } | Op::Scatter { .. }) if !is_root => {
                (slab, size)
            }
            (Data::InPlace(slab), _) => (slab, 1),
            (Data::Out { into, .. }, Op::AllGather) => (into, 1),
            (Data::Out { into, .. }, Op::Broadcast { .. }) => (into, 1),
            (Data::Out { into, .. }, Op::Scatter { .. }) => (into, size),
            (Data::Out { from, .. }, Op::Gather { .. } | Op::AllToAll) => (from, size),
            (Data::Out { from, .. }, _) => (from, 1),
        };
        let numel = match &self.call.counts {
            Some(counts) => self.sum(slab.dtype(), counts)?,
            None => slab.numel() * times,
        };
        Ok((slab.dtype(), numel))
    }

    /// How many elements there are in all, if there can be so many. Counts of other ranks fit no slab of this one.
    fn sum(&self, dtype: Dtype, counts: &[usize]) -> Result<usize> {
        let most = isize::MAX as usize / dtype.size();
        let sum = counts.iter().try_fold(0usize, |sum, count| {
            sum.checked_add(*count).filter(|sum| *sum <= most)
        });
        sum.ok_or_else(|| {
            let what = format!("of more {dtype} elements than memory holds");
            self.wrong(what, "Look for counts that were never set, or less than 0")
        })
    }

    /// Can the full vector be cut as the call says?
    fn cut(&self, numel: usize) -> Result<()> {
        let (op, size) = (self.call.op, self.size);
        let slices = match op {
            Op::AllReduce(_) | Op::Broadcast { .. } | Op::Reduce { .. } => 0,
            Op::AllToAll => size * size,
            _ => size,
        };
        match &self.call.counts {
            Some(_) if slices == 0 => Err(self.wrong(
                "with counts",
                "Every rank has the whole vector: leave them out",
            )),
            Some(counts) if counts.len() != slices => {
                let what = format!("with {} counts among {size} ranks", counts.len());
                let hint = "Give one count for each rank, or in an all_to_all for each pair, the same on all ranks";
                Err(self.wrong(what, hint))
            }
            None if slices > 0 && !numel.is_multiple_of(slices) => {
                let what = format!("of {numel} elements in {slices} slices");
                Err(self.wrong(
                    what,
                    "Pad the vector to a multiple of the world size, or give counts",
                ))
            }
            _ => Ok(()),
        }
    }

    fn apart(&self, from: &Slab, into: &Slab, shape: Shape, root: Option<Rank>) -> Result<()> {
        let (input, output) = self.parts(shape.numel, root);
        let fits = |slab: &Slab, part: Option<usize>| {
            part.is_none_or(|part| slab.numel() == part && slab.dtype() == shape.dtype)
        };
        if fits(from, input) && fits(into, output) {
            return Ok(());
        }
        let (input, output) = (input.unwrap_or(0), output.unwrap_or(0));
        let what = format!(
            "from {} x {} into {} x {}, where {input} go in and {output} come out of {} ranks",
            from.numel(),
            from.dtype(),
            into.numel(),
            into.dtype(),
            self.size
        );
        let hint =
            "Slices are 1/world size of the full vector unless counts say otherwise; use one dtype";
        Err(self.wrong(what, hint))
    }

    /// How many elements this rank gives, and gets; `None` where that slab is left alone.
    fn parts(&self, numel: usize, root: Option<Rank>) -> (Option<usize>, Option<usize>) {
        let (rank, size) = (self.rank, self.size);
        let slice = || match &self.call.counts {
            Some(counts) => counts[rank],
            None => numel / size,
        };
        let at_root = |part: usize| (root == Some(rank)).then_some(part);
        match self.call.op {
            Op::ReduceScatter(_) => (Some(numel), Some(slice())),
            Op::AllGather => (Some(slice()), Some(numel)),
            Op::Broadcast { .. } => (at_root(numel), Some(numel)),
            Op::Reduce { .. } => (Some(numel), at_root(numel)),
            Op::Gather { .. } => (Some(slice()), at_root(numel)),
            Op::Scatter { .. } => (at_root(numel), Some(slice())),
            Op::AllToAll => match &self.call.counts {
                Some(counts) => {
                    let row = counts.chunks(size).nth(rank);
                    let column = counts.iter().skip(rank).step_by(size);
                    (row.map(|row| row.iter().sum()), Some(column.sum()))
                }
                None => (Some(numel / size), Some(numel / size)),
            },
            _ => (Some(numel), Some(numel)),
        }
    }

    /// How many elements a slab in place has.
    fn held(&self, numel: usize, root: Option<Rank>) -> usize {
        let (input, output) = self.parts(numel, root);
        input.unwrap_or(0).max(output.unwrap_or(0))
    }
}
