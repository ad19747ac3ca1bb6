//! The convenient forms of the collectives, written once, over any communicator and any buffer.

use fabric_kernels::Dtype;

use super::{Call, Communicator, Data, Label, Op, Rank, ReduceOp};
use crate::{
    buffer::{Buffer, Slab},
    error::{Error, Result},
};

/// Blocking collectives on buffers. Implemented for every communicator.
pub trait Collectives {
    /// Replace `buffer` on every rank by the fold of all ranks' buffers.
    ///
    /// # Errors
    /// When ranks disagree, one is gone, or the buffer refuses.
    fn all_reduce(&mut self, buffer: &mut dyn Buffer, op: ReduceOp) -> Result<()>;

    /// Every rank's `buffer`, by rank: `world size x numel` elements.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn all_gather(&mut self, buffer: &dyn Buffer) -> Result<Slab>;

    /// This rank's slice of the fold of all ranks' buffers; their length is a multiple of the world size.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn reduce_scatter(&mut self, buffer: &dyn Buffer, op: ReduceOp) -> Result<Slab>;

    /// Replace `buffer` on every rank by the root's.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn broadcast(&mut self, buffer: &mut dyn Buffer, root: Rank) -> Result<()>;

    /// The root's bytes, on every rank; only the root's `bytes` are read, and their length need not be known elsewhere.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn broadcast_bytes(&mut self, bytes: &[u8], root: Rank) -> Result<Vec<u8>>;

    /// Every rank's bytes, by rank; lengths may differ.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Leave when every rank has come.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn barrier(&mut self) -> Result<()>;
}

impl<C: Communicator + ?Sized> Collectives for C {
    fn all_reduce(&mut self, buffer: &mut dyn Buffer, op: ReduceOp) -> Result<()> {
        let slab = load(self, buffer)?;
        let slab = now(self, Op::AllReduce(op), Label::User, Data::InPlace(slab))?;
        buffer.write(0..slab.numel(), slab.part(0..slab.numel()))
    }

    fn all_gather(&mut self, buffer: &dyn Buffer) -> Result<Slab> {
        let from = load(self, buffer)?;
        let into = self.alloc(from.dtype(), from.numel() * self.size())?;
        now(self, Op::AllGather, Label::User, Data::Out { from, into })
    }

    fn reduce_scatter(&mut self, buffer: &dyn Buffer, op: ReduceOp) -> Result<Slab> {
        let from = load(self, buffer)?;
        let into = self.alloc(from.dtype(), from.numel() / self.size())?;
        now(
            self,
            Op::ReduceScatter(op),
            Label::User,
            Data::Out { from, into },
        )
    }

    fn broadcast(&mut self, buffer: &mut dyn Buffer, root: Rank) -> Result<()> {
        let slab = if self.rank() == root {
            load(self, buffer)?
        } else {
            self.alloc(buffer.dtype(), buffer.numel())?
        };
        let slab = now(
            self,
            Op::Broadcast { root },
            Label::User,
            Data::InPlace(slab),
        )?;
        buffer.write(0..slab.numel(), slab.part(0..slab.numel()))
    }

    fn broadcast_bytes(&mut self, bytes: &[u8], root: Rank) -> Result<Vec<u8>> {
        let length = Slab::from_slice(&[if self.rank() == root {
            bytes.len() as u64
        } else {
            0
        }]);
        let length = now(
            self,
            Op::Broadcast { root },
            Label::Facade(0),
            Data::InPlace(length),
        )?;
        let length = usize_of(length.as_slice::<u64>()[0])?;
        let mut slab = self.alloc(Dtype::U8, length)?;
        if self.rank() == root {
            slab.as_bytes_mut().copy_from_slice(bytes);
        }
        let slab = now(
            self,
            Op::Broadcast { root },
            Label::Facade(1),
            Data::InPlace(slab),
        )?;
        Ok(slab.as_bytes().to_vec())
    }

    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let from = Slab::from_slice(&[bytes.len() as u64]);
        let into = self.alloc(Dtype::U64, self.size())?;
        let lengths = now(
            self,
            Op::AllGather,
            Label::Facade(2),
            Data::Out { from, into },
        )?;
        let lengths = lengths
            .as_slice::<u64>()
            .iter()
            .map(|n| usize_of(*n))
            .collect::<Result<Vec<_>>>()?;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut from = self.alloc(Dtype::U8, longest)?;
        from.as_bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        let into = self.alloc(Dtype::U8, longest * self.size())?;
        let rows = now(
            self,
            Op::AllGather,
            Label::Facade(3),
            Data::Out { from, into },
        )?;
        let row =
            |(rank, length): (usize, usize)| rows.as_bytes()[rank * longest..][..length].to_vec();
        Ok(lengths.into_iter().enumerate().map(row).collect())
    }

    fn barrier(&mut self) -> Result<()> {
        self.submit(Call::new(Op::Barrier).blocking(), Data::None)?
            .wait()
            .map(drop)
    }
}

fn load<C: Communicator + ?Sized>(comm: &C, buffer: &dyn Buffer) -> Result<Slab> {
    let mut slab = comm.alloc(buffer.dtype(), buffer.numel())?;
    buffer.read(0..buffer.numel(), slab.part_mut(0..buffer.numel()))?;
    Ok(slab)
}

fn now<C: Communicator + ?Sized>(comm: &mut C, op: Op, label: Label, data: Data) -> Result<Slab> {
    comm.submit(Call::new(op).label(label).blocking(), data)?
        .wait()
        .map(Data::into_output)
}

fn usize_of(length: u64) -> Result<usize> {
    usize::try_from(length).map_err(|_| {
        Error::argument(
            format!("a peer announced an object of {length} bytes"),
            "Ranks must run the same program",
        )
    })
}
