//! The operations. Each is put into a stream and returns when it is there; the stream does it.

use std::ffi::{c_int, c_void};

use fabric_kernels::Dtype;

use super::{
    comm::Comm,
    dtype::{Reduction, carried, reduced},
    group::group,
    raw::{self, Code, RawComm, RawStream},
};
use crate::{
    buffer::Slab,
    comm::{Rank, ReduceOp},
    error::{Error, Result},
};

/// A CUDA stream, by the driver's handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHandle(usize);

impl StreamHandle {
    /// From the driver's handle. Null is the legacy default stream.
    pub fn from_raw(stream: *mut c_void) -> Self {
        Self(stream.expose_provenance())
    }

    fn raw(self) -> RawStream {
        std::ptr::with_exposed_provenance_mut(self.0)
    }
}

/// Memory of an operation: addresses on a device, and what lies there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operands {
    /// Where the input begins.
    pub from: u64,
    /// Where the output begins; may be the input, at nccl-tests' positions.
    pub into: u64,
    /// Elements, as NCCL counts them: of one rank's part in a reduce_scatter, an all_gather and an all_to_all.
    pub numel: usize,
    /// What they are.
    pub dtype: Dtype,
}

impl Operands {
    fn source(&self) -> *const c_void {
        std::ptr::with_exposed_provenance(self.from as usize)
    }

    fn target(&self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.into as usize)
    }
}

/// # Safety of all operations
///
/// The addresses are memory that the communicator's device reaches, of as many elements as the operation reads and
/// writes; the stream is one of that device's; neither is freed, nor the memory used otherwise, before the stream has
/// done the operation.
impl Comm {
    /// Everybody gets the fold of everybody's elements.
    ///
    /// # Errors
    /// When NCCL has no such reduction, or refuses the call.
    ///
    /// # Safety
    /// See above: `numel` elements at both addresses.
    pub unsafe fn all_reduce(
        &self,
        data: Operands,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        let function = self.0.library.functions.all_reduce;
        self.reduction("ncclAllReduce", data, op, |dtype, op, comm| {
            // SAFETY: the caller promises the memory and the stream; the communicator is alive, kept so by its lock.
            unsafe {
                function(
                    data.source(),
                    data.target(),
                    data.numel,
                    dtype,
                    op,
                    comm,
                    stream.raw(),
                )
            }
        })
    }

    /// Rank r gets part r of the fold. `numel` is that of a part.
    ///
    /// # Errors
    /// As [`Comm::all_reduce`].
    ///
    /// # Safety
    /// See above: `size * numel` elements of input, `numel` of output.
    pub unsafe fn reduce_scatter(
        &self,
        data: Operands,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        let function = self.0.library.functions.reduce_scatter;
        self.reduction("ncclReduceScatter", data, op, |dtype, op, comm| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                function(
                    data.source(),
                    data.target(),
                    data.numel,
                    dtype,
                    op,
                    comm,
                    stream.raw(),
                )
            }
        })
    }

    /// The root gets the fold of everybody's elements.
    ///
    /// # Errors
    /// As [`Comm::all_reduce`].
    ///
    /// # Safety
    /// See above: `numel` elements of input, and on the root of output.
    pub unsafe fn reduce(
        &self,
        data: Operands,
        op: ReduceOp,
        root: Rank,
        stream: StreamHandle,
    ) -> Result<()> {
        let root = self.peer("ncclReduce", root)?;
        let function = self.0.library.functions.reduce;
        self.reduction("ncclReduce", data, op, |dtype, op, comm| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                function(
                    data.source(),
                    data.target(),
                    data.numel,
                    dtype,
                    op,
                    root,
                    comm,
                    stream.raw(),
                )
            }
        })
    }

    /// Everybody gets everybody's elements, by rank. `numel` is that of a part.
    ///
    /// # Errors
    /// When NCCL refuses the call.
    ///
    /// # Safety
    /// See above: `numel` elements of input, `size * numel` of output.
    pub unsafe fn all_gather(&self, data: Operands, stream: StreamHandle) -> Result<()> {
        let (function, (dtype, numel)) = (self.0.library.functions.all_gather, self.carry(&data)?);
        self.0.call("ncclAllGather", |comm| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                function(
                    data.source(),
                    data.target(),
                    numel,
                    dtype,
                    comm,
                    stream.raw(),
                )
            }
        })
    }

    /// Everybody gets the root's elements.
    ///
    /// # Errors
    /// As [`Comm::all_gather`].
    ///
    /// # Safety
    /// See above: `numel` elements of output, and on the root of input.
    pub unsafe fn broadcast(&self, data: Operands, root: Rank, stream: StreamHandle) -> Result<()> {
        let root = self.peer("ncclBroadcast", root)?;
        let (function, (dtype, numel)) = (self.0.library.functions.broadcast, self.carry(&data)?);
        self.0.call("ncclBroadcast", |comm| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                function(
                    data.source(),
                    data.target(),
                    numel,
                    dtype,
                    root,
                    comm,
                    stream.raw(),
                )
            }
        })
    }

    /// The input goes to another rank, which calls [`Comm::recv`].
    ///
    /// # Errors
    /// As [`Comm::all_gather`].
    ///
    /// # Safety
    /// See above: `numel` elements of input; the output's address is not used.
    pub unsafe fn send(&self, data: Operands, to: Rank, stream: StreamHandle) -> Result<()> {
        let to = self.peer("ncclSend", to)?;
        let (function, (dtype, numel)) = (self.0.library.functions.send, self.carry(&data)?);
        self.0.call("ncclSend", |comm| {
            // SAFETY: as in `all_reduce`.
            unsafe { function(data.source(), numel, dtype, to, comm, stream.raw()) }
        })
    }

    /// The output comes from another rank, which calls [`Comm::send`].
    ///
    /// # Errors
    /// As [`Comm::all_gather`].
    ///
    /// # Safety
    /// See above: `numel` elements of output; the input's address is not used.
    pub unsafe fn recv(&self, data: Operands, from: Rank, stream: StreamHandle) -> Result<()> {
        let from = self.peer("ncclRecv", from)?;
        let (function, (dtype, numel)) = (self.0.library.functions.recv, self.carry(&data)?);
        self.0.call("ncclRecv", |comm| {
            // SAFETY: as in `all_reduce`.
            unsafe { function(data.target(), numel, dtype, from, comm, stream.raw()) }
        })
    }

    /// Rank r gets block r of everybody's elements, by rank. `numel` is that of a block. Before 2.28 these are sends and
    /// receives in a group.
    ///
    /// # Errors
    /// As [`Comm::all_gather`].
    ///
    /// # Safety
    /// See above: `size * numel` elements at both addresses, which do not overlap.
    pub unsafe fn all_to_all(&self, data: Operands, stream: StreamHandle) -> Result<()> {
        let Some(function) = self.0.library.functions.all_to_all else {
            return group(self.library(), || {
                (0..self.size()).try_for_each(|peer| {
                    let skip = (peer * data.numel * data.dtype.size()) as u64;
                    let block = Operands {
                        from: data.from + skip,
                        into: data.into + skip,
                        ..data
                    };
                    // SAFETY: a block of the memory that the caller promises.
                    unsafe { self.send(block, peer, stream) }?;
                    // SAFETY: as above.
                    unsafe { self.recv(block, peer, stream) }
                })
            });
        };
        let (dtype, numel) = self.carry(&data)?;
        self.0.call("ncclAlltoAll", |comm| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                function(
                    data.source(),
                    data.target(),
                    numel,
                    dtype,
                    comm,
                    stream.raw(),
                )
            }
        })
    }

    /// NCCL's dtype and count of elements that are only carried.
    fn carry(&self, data: &Operands) -> Result<(c_int, usize)> {
        let (dtype, times) = carried(data.dtype, self.library().version());
        let numel = data.numel.checked_mul(times).ok_or_else(|| {
            let what = format!(
                "rank {}: {} elements of {}",
                self.rank(),
                data.numel,
                data.dtype
            );
            Error::argument(what, "There is not that much memory")
        })?;
        Ok((dtype, numel))
    }

    fn peer(&self, operation: &str, peer: Rank) -> Result<c_int> {
        if peer < self.size() {
            return Ok(peer as c_int); // the size fits, since `init`
        }
        let what = format!(
            "rank {}: {operation} with rank {peer} of {}",
            self.rank(),
            self.size()
        );
        Err(Error::argument(what, "Name a rank of the group"))
    }

    /// A call with a reduction, which may have to be made for it.
    fn reduction(
        &self,
        operation: &str,
        data: Operands,
        op: ReduceOp,
        call: impl FnOnce(c_int, c_int, RawComm) -> Code,
    ) -> Result<()> {
        let (dtype, reduction) = reduced(self.rank(), data.dtype, op, self.library().version())?;
        let factor = match reduction {
            Reduction::Known(op) => return self.0.call(operation, |comm| call(dtype, op, comm)),
            Reduction::PreMulSum(factor) => factor,
        };
        let functions = &self.0.library.functions;
        let mut scalar = scalar(self.rank(), data.dtype, factor)?;
        self.0.call(operation, |comm| {
            let mut op = 0;
            let value = scalar.as_bytes_mut().as_mut_ptr().cast();
            // SAFETY: a place for the reduction, and one element of the dtype, which is read before this returns.
            let code = unsafe {
                (functions.create_pre_mul_sum)(&mut op, value, dtype, raw::HOST_IMMEDIATE, comm)
            };
            if code != raw::SUCCESS {
                return code;
            }
            let code = call(dtype, op, comm);
            // SAFETY: made above for this communicator; the call that it was for has returned.
            let destroyed = unsafe { (functions.destroy_op)(op, comm) };
            match code {
                raw::SUCCESS if destroyed != raw::SUCCESS => destroyed,
                _ => code,
            }
        })
    }
}

/// A number as one element, rounded once.
fn scalar(rank: usize, dtype: Dtype, value: f64) -> Result<Slab> {
    let mut one = Slab::zeroed(dtype, 1);
    if dtype.is_integer() {
        // Whole and in range, which `reduced` has seen to: 64 bits of it are exact.
        let bytes = match value < 0.0 {
            true => (value as i64).to_ne_bytes(),
            false => (value as u64).to_ne_bytes(),
        };
        one.as_bytes_mut().copy_from_slice(&bytes[..dtype.size()]);
        return Ok(one);
    }
    let from = Slab::from_slice(&[value]);
    fabric_kernels::cast(from.part(0..1), one.part_mut(0..1))
        .map_err(Error::kernel(rank, "PreMulSum's factor"))?;
    Ok(one)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn factors_become_elements_of_the_dtype() {
        let bytes = |dtype, value| scalar(0, dtype, value).unwrap().as_bytes().to_vec();
        assert_eq!(bytes(Dtype::F32, 0.1), 0.1f32.to_ne_bytes());
        assert_eq!(bytes(Dtype::BF16, 0.1), bf16::from_f64(0.1).to_ne_bytes());
        assert_eq!(bytes(Dtype::I32, -3.0), (-3i32).to_ne_bytes());
        assert_eq!(bytes(Dtype::U8, 255.0), [255]);
        let most = 2f64.powi(64) - 2048.0;
        assert_eq!(bytes(Dtype::U64, most), (most as u64).to_ne_bytes());
    }
}
