//! The operations as C calls.

use std::ffi::c_void;

use fabric_engine::comm::ReduceOp;

use crate::{
    code::{Code, Result},
    comm::Comm,
    cuda::Handle,
    group::{enqueue, member},
    log,
    settings::{call, since},
    task::{Kind, Task, dtype, reduction, scalar},
};

/// The arguments that all operations have.
struct Arguments {
    from: *const c_void,
    into: *mut c_void,
    numel: usize,
    dtype: i32,
    comm: *mut c_void,
    stream: *mut c_void,
}

impl Arguments {
    fn start(
        self,
        name: &str,
        kind: impl FnOnce(&Comm, fabric_engine::kernels::Dtype) -> Result<Kind>,
    ) -> i32 {
        member(name, || {
            let comm = Comm::get(self.comm)?;
            let dtype = dtype(self.dtype)?;
            let (rank, number, stream) = (comm.rank(), comm.number, self.stream.addr());
            log::note(format!(
                "{name} comm={number} rank={rank} stream={stream:#x} numel={} dtype={dtype}",
                self.numel
            ));
            comm.ready()?;
            let task = Task {
                kind: kind(&comm, dtype)?,
                from: self.from.expose_provenance(),
                into: self.into.expose_provenance(),
                numel: self.numel,
                dtype,
                stream: Handle(self.stream.expose_provenance()),
            };
            task.check(&comm)?;
            enqueue(comm, task)
        })
    }

    fn reduce(self, name: &str, op: i32, kind: impl FnOnce(ReduceOp) -> Kind) -> i32 {
        self.start(name, |comm, dtype| Ok(kind(reduction(comm, op, dtype)?)))
    }
}

fn rank(number: i32) -> Result<usize> {
    usize::try_from(number)
        .map_err(|_| Code::ARGUMENT.because(format!("invalid root or peer {number}")))
}

macro_rules! arguments {
    ($from:expr, $into:expr, $numel:ident, $dtype:ident, $comm:ident, $stream:ident) => {
        Arguments {
            from: $from,
            into: $into,
            numel: $numel,
            dtype: $dtype,
            comm: $comm,
            stream: $stream,
        }
    };
}

#[unsafe(no_mangle)]
extern "C" fn ncclAllReduce(
    from: *const c_void,
    into: *mut c_void,
    numel: usize,
    dtype: i32,
    op: i32,
    comm: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    arguments!(from, into, numel, dtype, comm, stream).reduce("ncclAllReduce", op, Kind::AllReduce)
}

#[unsafe(no_mangle)]
extern "C" fn ncclReduceScatter(
    from: *const c_void,
    into: *mut c_void,
    numel: usize,
    dtype: i32,
    op: i32,
    comm: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    arguments!(from, into, numel, dtype, comm, stream).reduce(
        "ncclReduceScatter",
        op,
        Kind::ReduceScatter,
    )
}

#[unsafe(no_mangle)]
extern "C" fn ncclReduce(
    from: *const c_void,
    into: *mut c_void,
    numel: usize,
    dtype: i32,
    op: i32,
    root: i32,
    comm: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    arguments!(from, into, numel, dtype, comm, stream).start("ncclReduce", |comm, dtype| {
        Ok(Kind::Reduce(reduction(comm, op, dtype)?, rank(root)?))
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclAllGather(
    from: *const c_void,
    into: *mut c_void,
    numel: usize,
    dtype: i32,
    comm: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    arguments!(from, into, numel, dtype, comm, stream)
        .start("ncclAllGather", |_, _| Ok(Kind::AllGather))
}

#[unsafe(no_mangle)]
extern "C" fn ncclBroadcast(
    from: *const c_void,
    into: *mut c_void,
    numel: usize,
    dtype: i32,
    root: i32,
    comm: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    arguments!(from, into, numel, dtype, comm, stream)
        .start("ncclBroadcast", |_, _| Ok(Kind::Broadcast(rank(root)?)))
}

#[unsafe(no_mangle)]
extern "C" fn ncclAlltoAll(
    from: *const c_void,
    into: *mut c_void,
    numel: usize,
    dtype: i32,
    comm: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    arguments!(from, into, numel, dtype, comm, stream).start("ncclAlltoAll", |_, _| {
        since(22_800)?;
        Ok(Kind::AllToAll)
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclSend(
    from: *const c_void,
    numel: usize,
    dtype: i32,
    peer: i32,
    comm: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    arguments!(from, std::ptr::null_mut(), numel, dtype, comm, stream)
        .start("ncclSend", |_, _| Ok(Kind::Send(rank(peer)?)))
}

#[unsafe(no_mangle)]
extern "C" fn ncclRecv(
    into: *mut c_void,
    numel: usize,
    dtype: i32,
    peer: i32,
    comm: *mut c_void,
    stream: *mut c_void,
) -> i32 {
    arguments!(std::ptr::null(), into, numel, dtype, comm, stream)
        .start("ncclRecv", |_, _| Ok(Kind::Recv(rank(peer)?)))
}

#[unsafe(no_mangle)]
extern "C" fn ncclRedOpCreatePreMulSum(
    op: *mut i32,
    value: *const c_void,
    number: i32,
    residence: i32,
    comm: *mut c_void,
) -> i32 {
    call("ncclRedOpCreatePreMulSum", || {
        let (comm, dtype) = (Comm::get(comm)?, dtype(number)?);
        if residence != 1 || op.is_null() {
            return Err(Code::ARGUMENT.because("only scalars in the host's memory"));
        }
        let made = comm.make_op(dtype, scalar(value.cast(), dtype)?);
        // SAFETY: not null, and the interface demands a place.
        unsafe { op.write(made) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclRedOpDestroy(op: i32, comm: *mut c_void) -> i32 {
    call("ncclRedOpDestroy", || Comm::get(comm)?.end_op(op))
}
