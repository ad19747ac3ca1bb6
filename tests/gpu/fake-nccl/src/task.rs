//! One operation as it was called.

use fabric_engine::{
    buffer::Slab,
    comm::ReduceOp,
    kernels::{self, Dtype},
};

use crate::{
    code::{Code, Result},
    comm::Comm,
    cuda::{self, Handle},
    settings,
};

/// Which.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    AllReduce(ReduceOp),
    ReduceScatter(ReduceOp),
    AllGather,
    Broadcast(usize),
    Reduce(ReduceOp, usize),
    AllToAll,
    Send(usize),
    Recv(usize),
}

/// An operation.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    pub kind: Kind,
    pub from: usize,
    pub into: usize,
    pub numel: usize,
    pub dtype: Dtype,
    pub stream: Handle,
}

impl Task {
    /// Elements of input and output on this rank.
    pub fn sizes(&self, rank: usize, size: usize) -> (usize, usize) {
        let numel = self.numel;
        match self.kind {
            Kind::AllReduce(_) => (numel, numel),
            Kind::ReduceScatter(_) => (numel * size, numel),
            Kind::AllGather => (numel, numel * size),
            Kind::Broadcast(root) => (if rank == root { numel } else { 0 }, numel),
            Kind::Reduce(_, root) => (numel, if rank == root { numel } else { 0 }),
            Kind::AllToAll => (numel * size, numel * size),
            Kind::Send(_) => (numel, 0),
            Kind::Recv(_) => (0, numel),
        }
    }

    /// That the memory is there, before anything starts.
    pub fn check(&self, comm: &Comm) -> Result {
        let (from, into) = self.sizes(comm.rank(), comm.size());
        for (what, address, numel) in [("sendbuff", self.from, from), ("recvbuff", self.into, into)]
        {
            if numel > 0 {
                cuda::check_memory(what, address, numel * self.dtype.size())?;
            }
        }
        let peer = match self.kind {
            Kind::Broadcast(peer) | Kind::Reduce(_, peer) | Kind::Send(peer) | Kind::Recv(peer) => {
                peer
            }
            _ => 0,
        };
        if peer >= comm.size() {
            return Err(Code::ARGUMENT.because(format!("rank {peer} of {}", comm.size())));
        }
        Ok(())
    }

    /// The input, copied.
    pub fn read(&self, numel: usize) -> Slab {
        let mut slab = Slab::zeroed(self.dtype, numel);
        let source = std::ptr::with_exposed_provenance::<u8>(self.from);
        let target = slab.as_bytes_mut().as_mut_ptr();
        // SAFETY: `check` has found the memory; whoever called the operation promises that it stays until the stream is
        // past it.
        unsafe { std::ptr::copy_nonoverlapping(source, target, slab.bytes()) };
        slab
    }

    /// The output.
    pub fn write(&self, slab: &Slab) {
        let target = std::ptr::with_exposed_provenance_mut::<u8>(self.into);
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(slab.as_bytes().as_ptr(), target, slab.bytes()) };
    }
}

/// The dtype of NCCL's number.
pub fn dtype(number: i32) -> Result<Dtype> {
    let dtype = match number {
        0 => Dtype::I8,
        1 => Dtype::U8,
        2 => Dtype::I32,
        3 => Dtype::U32,
        4 => Dtype::I64,
        5 => Dtype::U64,
        6 => Dtype::F16,
        7 => Dtype::F32,
        8 => Dtype::F64,
        9 => Dtype::BF16,
        10 if settings::version() >= 22_400 => Dtype::F8E4M3,
        11 if settings::version() >= 22_400 => Dtype::F8E5M2,
        _ => return Err(Code::ARGUMENT.because(format!("invalid type {number}"))),
    };
    Ok(dtype)
}

/// The reduction of NCCL's number; from 5 on they are a communicator's own.
pub fn reduction(comm: &Comm, number: i32, dtype: Dtype) -> Result<ReduceOp> {
    let op = match number {
        0 => ReduceOp::Sum,
        1 => ReduceOp::Prod,
        2 => ReduceOp::Max,
        3 => ReduceOp::Min,
        4 => ReduceOp::Avg,
        _ => {
            let (of, factor) = comm.own_op(number)?;
            if of != dtype {
                return Err(Code::ARGUMENT.because(format!("a reduction of {of} with {dtype}")));
            }
            ReduceOp::PreMulSum(factor)
        }
    };
    Ok(op)
}

/// One element as a number.
pub fn scalar(place: *const u8, dtype: Dtype) -> Result<f64> {
    if place.is_null() {
        return Err(Code::ARGUMENT.because("scalar is NULL"));
    }
    let mut one = Slab::zeroed(dtype, 1);
    // SAFETY: the interface demands one element of this dtype there.
    unsafe { std::ptr::copy_nonoverlapping(place, one.as_bytes_mut().as_mut_ptr(), dtype.size()) };
    let bytes = one.as_bytes();
    let mut wide = [if matches!(dtype, Dtype::I8 | Dtype::I32 | Dtype::I64)
        && bytes[bytes.len() - 1] >= 0x80
    {
        0xff
    } else {
        0
    }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    if !dtype.is_float() {
        return Ok(match dtype {
            Dtype::I8 | Dtype::I32 | Dtype::I64 => i64::from_le_bytes(wide) as f64,
            _ => u64::from_le_bytes(wide) as f64,
        });
    }
    let mut number = Slab::zeroed(Dtype::F64, 1);
    kernels::cast(one.part(0..1), number.part_mut(0..1))
        .map_err(|error| Code::INTERNAL.because(error.to_string()))?;
    Ok(number.as_slice::<f64>()[0])
}
