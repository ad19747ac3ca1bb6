//! The convenient forms of the collectives, written once, over any communicator and any buffer.

use fabric_kernels::{Dtype, Memory};

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

    /// Replace the root's `buffer` by the fold of all ranks' buffers; the others keep theirs.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn reduce(&mut self, buffer: &mut dyn Buffer, op: ReduceOp, root: Rank) -> Result<()>;

    /// Every rank's `buffer`, by rank, on the root: `world size x numel` elements. Elsewhere nothing.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn gather(&mut self, buffer: &dyn Buffer, root: Rank) -> Result<Option<Slab>>;

    /// This rank's slice of the root's buffer, into `into`; the root alone gives `from`, of `world size x numel` elements.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn scatter(
        &mut self,
        from: Option<&dyn Buffer>,
        into: &mut dyn Buffer,
        root: Rank,
    ) -> Result<()>;

    /// Block `rank` of every rank's `buffer`, by rank. Its length is a multiple of the world size.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn all_to_all(&mut self, buffer: &dyn Buffer) -> Result<Slab>;

    /// As [`Collectives::all_to_all`] with blocks of `counts[to]` elements; also how many came from each rank. Ranks tell one
    /// another their counts first.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn all_to_all_v(&mut self, buffer: &dyn Buffer, counts: &[usize])
    -> Result<(Slab, Vec<usize>)>;

    /// Every rank's `buffer`, by rank, of any lengths: the elements, and how many each rank gave. Ranks tell one another
    /// their lengths first.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn all_gather_v(&mut self, buffer: &dyn Buffer) -> Result<(Slab, Vec<usize>)>;

    /// All buffers at once, each replaced by its fold: one operation, however many they are. They have one dtype.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn all_reduce_coalesced(&mut self, buffers: &mut [&mut dyn Buffer], op: ReduceOp)
    -> Result<()>;

    /// Give `buffer` to rank `to`, which calls [`Collectives::recv`]; no other rank takes part.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn send(&mut self, buffer: &dyn Buffer, to: Rank) -> Result<()>;

    /// Replace `buffer` by what rank `from` sends.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn recv(&mut self, buffer: &mut dyn Buffer, from: Rank) -> Result<()>;

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
        let into = like(self, buffer, from.numel() * self.size())?;
        now(self, Op::AllGather, Label::User, Data::Out { from, into })
    }

    fn reduce_scatter(&mut self, buffer: &dyn Buffer, op: ReduceOp) -> Result<Slab> {
        let from = load(self, buffer)?;
        let into = like(self, buffer, from.numel() / self.size())?;
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
            like(self, buffer, buffer.numel())?
        };
        let slab = now(
            self,
            Op::Broadcast { root },
            Label::User,
            Data::InPlace(slab),
        )?;
        buffer.write(0..slab.numel(), slab.part(0..slab.numel()))
    }

    fn reduce(&mut self, buffer: &mut dyn Buffer, op: ReduceOp, root: Rank) -> Result<()> {
        let slab = load(self, buffer)?;
        let slab = now(
            self,
            Op::Reduce { op, root },
            Label::User,
            Data::InPlace(slab),
        )?;
        if self.rank() == root {
            buffer.write(0..slab.numel(), slab.part(0..slab.numel()))?;
        }
        Ok(())
    }

    fn gather(&mut self, buffer: &dyn Buffer, root: Rank) -> Result<Option<Slab>> {
        let from = load(self, buffer)?;
        let is_root = self.rank() == root;
        let numel = if is_root {
            from.numel() * self.size()
        } else {
            0
        };
        let into = like(self, buffer, numel)?;
        let data = Data::Out { from, into };
        let slab = now(self, Op::Gather { root }, Label::User, data)?;
        Ok(Some(slab).filter(|_| is_root))
    }

    fn scatter(
        &mut self,
        from: Option<&dyn Buffer>,
        into: &mut dyn Buffer,
        root: Rank,
    ) -> Result<()> {
        let from = match from {
            Some(from) if self.rank() == root => load(self, from)?,
            None if self.rank() == root => {
                return Err(Error::argument(
                    "a scatter whose root gives nothing",
                    "Pass Some(buffer) on the root",
                ));
            }
            _ => like(self, into, 0)?,
        };
        let target = like(self, into, into.numel())?;
        let data = Data::Out { from, into: target };
        let slab = now(self, Op::Scatter { root }, Label::User, data)?;
        into.write(0..slab.numel(), slab.part(0..slab.numel()))
    }

    fn all_to_all(&mut self, buffer: &dyn Buffer) -> Result<Slab> {
        let from = load(self, buffer)?;
        let into = like(self, buffer, from.numel())?;
        now(self, Op::AllToAll, Label::User, Data::Out { from, into })
    }

    fn all_to_all_v(
        &mut self,
        buffer: &dyn Buffer,
        counts: &[usize],
    ) -> Result<(Slab, Vec<usize>)> {
        let (rank, size) = (self.rank(), self.size());
        let sum = counts.iter().copied().try_fold(0, usize::checked_add);
        if counts.len() != size || sum != Some(buffer.numel()) {
            let what = format!(
                "rank {rank}: all_to_all_v of {} elements with {} counts among {size} ranks",
                buffer.numel(),
                counts.len()
            );
            let hint = "Give one count for each rank; together they are the buffer's elements";
            return Err(Error::argument(what, hint));
        }
        let matrix = tell(self, counts)?;
        let taken: Vec<usize> = matrix.iter().skip(rank).step_by(size).copied().collect();
        let from = load(self, buffer)?;
        let into = like(self, buffer, taken.iter().sum())?;
        let call = Call::new(Op::AllToAll).counts(matrix).blocking();
        let data = self.submit(call, Data::Out { from, into })?.wait()?;
        Ok((data.into_output(), taken))
    }

    fn all_gather_v(&mut self, buffer: &dyn Buffer) -> Result<(Slab, Vec<usize>)> {
        let counts = tell(self, &[buffer.numel()])?;
        let from = load(self, buffer)?;
        let into = like(self, buffer, counts.iter().sum())?;
        let call = Call::new(Op::AllGather).counts(&counts[..]).blocking();
        let data = self.submit(call, Data::Out { from, into })?.wait()?;
        Ok((data.into_output(), counts))
    }

    fn all_reduce_coalesced(
        &mut self,
        buffers: &mut [&mut dyn Buffer],
        op: ReduceOp,
    ) -> Result<()> {
        if buffers.is_empty() {
            return Ok(());
        }
        let slabs = buffers.iter().map(|buffer| load(self, &**buffer));
        let data = Data::Many(slabs.collect::<Result<_>>()?);
        let call = Call::new(Op::AllReduce(op)).blocking();
        let slabs = self.submit(call, data)?.wait()?.into_many();
        for (buffer, slab) in buffers.iter_mut().zip(&slabs) {
            buffer.write(0..slab.numel(), slab.part(0..slab.numel()))?;
        }
        Ok(())
    }

    fn send(&mut self, buffer: &dyn Buffer, to: Rank) -> Result<()> {
        let slab = load(self, buffer)?;
        now(self, Op::Send { to }, Label::User, Data::InPlace(slab)).map(drop)
    }

    fn recv(&mut self, buffer: &mut dyn Buffer, from: Rank) -> Result<()> {
        let slab = like(self, buffer, buffer.numel())?;
        let slab = now(self, Op::Recv { from }, Label::User, Data::InPlace(slab))?;
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
        let mut slab = self.alloc_host(Dtype::U8, length)?;
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
        let lengths = tell(self, &[bytes.len()])?;
        let mut from = self.alloc_host(Dtype::U8, bytes.len())?;
        from.as_bytes_mut().copy_from_slice(bytes);
        let into = self.alloc_host(Dtype::U8, lengths.iter().sum())?;
        let call = Call::new(Op::AllGather).label(Label::Facade(3));
        let call = call.counts(&lengths[..]).blocking();
        let all = self
            .submit(call, Data::Out { from, into })?
            .wait()?
            .into_output();
        let mut rest = all.as_bytes();
        let mut next = |length| {
            let (own, after) = rest.split_at(length);
            rest = after;
            own.to_vec()
        };
        Ok(lengths.into_iter().map(&mut next).collect())
    }

    fn barrier(&mut self) -> Result<()> {
        self.run(&Call::new(Op::Barrier), &mut Data::None)
    }
}

/// Everybody's numbers, by rank; all give as many.
fn tell<C: Communicator + ?Sized>(comm: &mut C, numbers: &[usize]) -> Result<Vec<usize>> {
    let numbers: Vec<u64> = numbers.iter().map(|number| *number as u64).collect();
    let into = comm.alloc_host(Dtype::U64, numbers.len() * comm.size())?;
    let from = Slab::from_slice(&numbers);
    let all = now(
        comm,
        Op::AllGather,
        Label::Facade(2),
        Data::Out { from, into },
    )?;
    all.as_slice::<u64>().iter().map(|n| usize_of(*n)).collect()
}

fn load<C: Communicator + ?Sized>(comm: &C, buffer: &dyn Buffer) -> Result<Slab> {
    let mut slab = like(comm, buffer, buffer.numel())?;
    buffer.read(0..buffer.numel(), slab.part_mut(0..buffer.numel()))?;
    Ok(slab)
}

/// Memory for a result of `buffer`: of the device where the buffer is on one, else of the host.
fn like<C: Communicator + ?Sized>(comm: &C, buffer: &dyn Buffer, numel: usize) -> Result<Slab> {
    match buffer.memory() {
        Memory::Host => comm.alloc_host(buffer.dtype(), numel),
        Memory::Cuda(_) => comm.alloc(buffer.dtype(), numel),
    }
}

fn now<C: Communicator + ?Sized>(
    comm: &mut C,
    op: Op,
    label: Label,
    mut data: Data,
) -> Result<Slab> {
    comm.run(&Call::new(op).label(label), &mut data)?;
    Ok(data.into_output())
}

fn usize_of(length: u64) -> Result<usize> {
    usize::try_from(length).map_err(|_| {
        Error::argument(
            format!("a peer announced an object of {length} bytes"),
            "Ranks must run the same program",
        )
    })
}
