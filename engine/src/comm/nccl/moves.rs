//! How our operations become NCCL's: addresses at nccl-tests' positions, and groups of calls where NCCL has no single one.

use std::ops::Range;

use fabric_kernels::{Dtype, cuda::Queue};

use super::{Comm, Operands, StreamHandle, Version, dtype::reduced, group};
use crate::{
    buffer::Slab,
    comm::{Call, Data, Op, Rank},
    error::Result,
};

/// Refuses what NCCL does not have, before anything is started.
pub(super) fn check(
    rank: Rank,
    call: &Call,
    data: &Data,
    dtype: Dtype,
    version: Version,
) -> Result<()> {
    let is_empty = match data {
        Data::InPlace(slab) => slab.numel() == 0,
        _ => false,
    };
    match call.op.reduce().filter(|_| !is_empty) {
        Some(op) => reduced(rank, dtype, op, version).map(drop),
        None => Ok(()),
    }
}

/// Put a call, which fits its data, into the stream of `own`.
pub(super) fn submit(comm: &Comm, call: &Call, data: &Data, own: &Queue) -> Result<()> {
    let stream = StreamHandle::from_raw(own.raw_stream());
    match data {
        Data::None => Ok(()),
        Data::Many(slabs) => group(comm.library(), || {
            slabs.iter().try_for_each(|slab| {
                let ends = Ends::new(slab, slab);
                Move {
                    comm,
                    call,
                    ends,
                    stream,
                }
                .go()
            })
        }),
        Data::InPlace(slab) => {
            let ends = Ends::new(slab, slab);
            Move {
                comm,
                call,
                ends,
                stream,
            }
            .go()
        }
        Data::Out { from, into } => {
            let ends = Ends::new(from, into);
            Move {
                comm,
                call,
                ends,
                stream,
            }
            .go()
        }
    }
}

/// Input and output.
#[derive(Clone, Copy)]
struct Ends<'a> {
    from: &'a Slab,
    into: &'a Slab,
}

impl<'a> Ends<'a> {
    fn new(from: &'a Slab, into: &'a Slab) -> Self {
        Self { from, into }
    }

    fn is_in_place(&self) -> bool {
        std::ptr::eq(self.from, self.into)
    }
}

/// One call on one pair of slabs.
struct Move<'a> {
    comm: &'a Comm,
    call: &'a Call,
    ends: Ends<'a>,
    stream: StreamHandle,
}

impl Move<'_> {
    fn rank(&self) -> Rank {
        self.comm.rank()
    }

    /// `numel` elements, `from` elements into the input and `into` elements into the output.
    fn operands(&self, from: usize, into: usize, numel: usize) -> Operands {
        let dtype = match self.ends.from.numel() {
            0 => self.ends.into.dtype(),
            _ => self.ends.from.dtype(),
        };
        let at = |slab: &Slab, elements: usize| (slab.address() + elements * dtype.size()) as u64;
        Operands {
            from: at(self.ends.from, from),
            into: at(self.ends.into, into),
            numel,
            dtype,
        }
    }

    fn go(&self) -> Result<()> {
        let (size, rank, stream) = (self.comm.size(), self.rank(), self.stream);
        let (input, output) = (self.ends.from.numel(), self.ends.into.numel());
        let counts = self.call.counts.as_deref();
        let is_in_place = self.ends.is_in_place();
        match self.call.op {
            Op::Barrier => Ok(()),
            Op::AllReduce(op) => {
                let data = self.operands(0, 0, output);
                // SAFETY: as of all calls here, `check_shapes` has seen that both slabs hold as many elements; they are of this
                // device, and stay where they are until the stream has done the operation: their owner, the `Landing`, frees
                // them after it in their queue's order. Test: `tests/gpu`, collectives, by poison in freed memory.
                unsafe { self.comm.all_reduce(data, op, stream) }
            }
            Op::ReduceScatter(op) if counts.is_none() => {
                let part = input / size;
                let own = if is_in_place { rank * part } else { 0 };
                let data = self.operands(0, own, part);
                // SAFETY: as in AllReduce.
                unsafe { self.comm.reduce_scatter(data, op, stream) }
            }
            Op::ReduceScatter(op) => self.each(counts, input, |peer, part| {
                let own = if is_in_place { part.start } else { 0 };
                let data = self.operands(part.start, own, part.len());
                // SAFETY: as in AllReduce; the output is written on the root of each part alone.
                unsafe { self.comm.reduce(data, op, peer, stream) }
            }),
            Op::AllGather if counts.is_none() => {
                let part = output / size;
                let own = if is_in_place { rank * part } else { 0 };
                let data = self.operands(own, 0, part);
                // SAFETY: as in AllReduce.
                unsafe { self.comm.all_gather(data, stream) }
            }
            Op::AllGather => self.each(counts, output, |peer, part| {
                let own = if is_in_place { part.start } else { 0 };
                let data = self.operands(own, part.start, part.len());
                // SAFETY: as in AllReduce; the input is read on the root of each part alone.
                unsafe { self.comm.broadcast(data, peer, stream) }
            }),
            Op::Broadcast { root } => {
                let data = self.operands(0, 0, output);
                // SAFETY: as in AllReduce; the input is read on the root alone.
                unsafe { self.comm.broadcast(data, root, stream) }
            }
            Op::Reduce { op, root } => {
                let data = self.operands(0, 0, input);
                // SAFETY: as in AllReduce; the output is written on the root alone.
                unsafe { self.comm.reduce(data, op, root, stream) }
            }
            Op::Gather { root } => self.gather(root),
            Op::Scatter { root } => self.scatter(root),
            Op::AllToAll if counts.is_none() => {
                let data = self.operands(0, 0, input / size);
                // SAFETY: as in AllReduce.
                unsafe { self.comm.all_to_all(data, stream) }
            }
            Op::AllToAll => self.all_to_all_v(counts.unwrap_or_default()),
            Op::Send { to } => self.send(to, 0..input),
            Op::Recv { from } => self.recv(from, 0..output),
            Op::SendRecv { to, from } => group(self.comm.library(), || {
                self.send(to, 0..input)?;
                self.recv(from, 0..output)
            }),
        }
    }

    /// One call for each rank's part of a vector of `numel`, as a group.
    fn each(
        &self,
        counts: Option<&[usize]>,
        numel: usize,
        mut call: impl FnMut(Rank, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let parts = parts(counts, numel, self.comm.size());
        group(self.comm.library(), || {
            let mut parts = parts.into_iter().enumerate();
            parts.try_for_each(|(peer, part)| match part.is_empty() {
                true => Ok(()),
                false => call(peer, part),
            })
        })
    }

    /// Everybody's part to the root. In place the root's own is there already.
    fn gather(&self, root: Rank) -> Result<()> {
        let (rank, is_in_place) = (self.rank(), self.ends.is_in_place());
        let is_root = rank == root;
        group(self.comm.library(), || {
            if !(is_root && is_in_place) {
                self.send(root, 0..self.ends.from.numel())?;
            }
            if !is_root {
                return Ok(());
            }
            let counts = self.call.counts.as_deref();
            let parts = parts(counts, self.ends.into.numel(), self.comm.size());
            let mut others = parts.into_iter().enumerate();
            others.try_for_each(|(peer, part)| match peer == rank && is_in_place {
                true => Ok(()),
                false => self.recv(peer, part),
            })
        })
    }

    /// The root's parts to everybody. In place the root's own stays.
    fn scatter(&self, root: Rank) -> Result<()> {
        let (rank, is_in_place) = (self.rank(), self.ends.is_in_place());
        let is_root = rank == root;
        group(self.comm.library(), || {
            if is_root {
                let counts = self.call.counts.as_deref();
                let parts = parts(counts, self.ends.from.numel(), self.comm.size());
                let mut others = parts.into_iter().enumerate();
                others.try_for_each(|(peer, part)| match peer == rank && is_in_place {
                    true => Ok(()),
                    false => self.send(peer, part),
                })?;
            }
            match is_root && is_in_place {
                true => Ok(()),
                false => self.recv(root, 0..self.ends.into.numel()),
            }
        })
    }

    /// `counts[from * size + to]` elements from one rank to another.
    fn all_to_all_v(&self, counts: &[usize]) -> Result<()> {
        let (rank, size) = (self.rank(), self.comm.size());
        let sent = &counts[rank * size..(rank + 1) * size];
        let taken: Vec<usize> = counts.iter().skip(rank).step_by(size).copied().collect();
        group(self.comm.library(), || {
            for (peer, part) in parts(Some(sent), 0, size).into_iter().enumerate() {
                self.send(peer, part)?;
            }
            let taken = parts(Some(&taken), 0, size).into_iter().enumerate();
            taken
                .into_iter()
                .try_for_each(|(peer, part)| self.recv(peer, part))
        })
    }

    fn send(&self, to: Rank, part: Range<usize>) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let data = self.operands(part.start, 0, part.len());
        // SAFETY: as in `go`; the output is not touched.
        unsafe { self.comm.send(data, to, self.stream) }
    }

    fn recv(&self, from: Rank, part: Range<usize>) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let data = self.operands(0, part.start, part.len());
        // SAFETY: as in `go`; the input is not touched.
        unsafe { self.comm.recv(data, from, self.stream) }
    }
}

/// Each rank's part of a vector: by counts, or even.
fn parts(counts: Option<&[usize]>, numel: usize, size: usize) -> Vec<Range<usize>> {
    let mut end = 0;
    let of = |rank: usize| counts.map_or(numel / size, |counts| counts[rank]);
    let part = |rank| {
        let start = end;
        end += of(rank);
        start..end
    };
    (0..size).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_one_another() {
        assert_eq!(parts(None, 6, 3), [0..2, 2..4, 4..6]);
        assert_eq!(parts(Some(&[2, 0, 1]), 3, 3), [0..2, 2..2, 2..3]);
    }
}
