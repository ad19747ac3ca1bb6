//! Fabric's collectives on buffers: none of them needs a barrier, and none copies more than its wire asks for. Those on numbers
//! and values are in `values`.
//!
//! All ranks call the same operations in the same order; ranks that do not are told so, with both sides named.

use fabric_engine::{
    buffer::{Buffer, Slab},
    comm::{Call, Collectives, Data, Op, ReduceOp, Work},
    kernels::Dtype,
};

use super::Fabric;
use crate::error::Result;

impl Fabric {
    /// Leave when every rank has come.
    ///
    /// # Errors
    /// Before launch, or when a rank is gone.
    pub fn barrier(&self) -> Result<()> {
        Ok(self.comm()?.lock().barrier()?)
    }

    /// Replace `buffer` on every rank by the fold of all ranks' buffers. Lightning's default is [`ReduceOp::Avg`].
    ///
    /// # Errors
    /// Before launch, or when ranks disagree or one is gone.
    pub fn all_reduce(&self, buffer: &mut dyn Buffer, op: ReduceOp) -> Result<()> {
        Ok(self.comm()?.lock().all_reduce(buffer, op)?)
    }

    /// [`Fabric::all_reduce`] of many buffers of one type, as one operation.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn all_reduce_coalesced(
        &self,
        buffers: &mut [&mut dyn Buffer],
        op: ReduceOp,
    ) -> Result<()> {
        Ok(self.comm()?.lock().all_reduce_coalesced(buffers, op)?)
    }

    /// Replace `buffer` on every rank by rank `src`'s, as it lies in memory: nothing is serialised. For values, see
    /// [`Fabric::broadcast`].
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn broadcast_buffer(&self, buffer: &mut dyn Buffer, src: usize) -> Result<()> {
        Ok(self.comm()?.lock().broadcast(buffer, src)?)
    }

    /// Every rank's `buffer`, by rank: `[world size, numel]` elements, also with one rank.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn all_gather(&self, buffer: &dyn Buffer) -> Result<Slab> {
        Ok(self.comm()?.lock().all_gather(buffer)?)
    }

    /// Every rank's `buffer` of any length, by rank: the elements, and how many each rank gave.
    ///
    /// ```
    /// use fabric::Fabric;
    ///
    /// let fabric = Fabric::builder().devices(3).build()?;
    /// fabric.launch_threads(|fabric| {
    ///     let mine = vec![fabric.global_rank() as f32; fabric.global_rank()];
    ///     let (all, counts) = fabric.all_gather_uneven(&mine)?;
    ///     assert_eq!(all.as_slice::<f32>(), [1.0, 2.0, 2.0]);
    ///     assert_eq!(counts, [0, 1, 2]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn all_gather_uneven(&self, buffer: &dyn Buffer) -> Result<(Slab, Vec<usize>)> {
        Ok(self.comm()?.lock().all_gather_v(buffer)?)
    }

    /// This rank's slice of the fold of all ranks' buffers; their length is a multiple of the world size.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn reduce_scatter(&self, buffer: &dyn Buffer, op: ReduceOp) -> Result<Slab> {
        Ok(self.comm()?.lock().reduce_scatter(buffer, op)?)
    }

    /// Block `rank` of every rank's `buffer`, by rank. Its length is a multiple of the world size.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn all_to_all(&self, buffer: &dyn Buffer) -> Result<Slab> {
        Ok(self.comm()?.lock().all_to_all(buffer)?)
    }

    /// [`Fabric::all_to_all`] with blocks of `counts[to]` elements; also how many came from each rank.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn all_to_all_uneven(
        &self,
        buffer: &dyn Buffer,
        counts: &[usize],
    ) -> Result<(Slab, Vec<usize>)> {
        Ok(self.comm()?.lock().all_to_all_v(buffer, counts)?)
    }

    /// Replace rank `dst`'s `buffer` by the fold of all ranks' buffers; the others keep theirs.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn reduce(&self, buffer: &mut dyn Buffer, op: ReduceOp, dst: usize) -> Result<()> {
        Ok(self.comm()?.lock().reduce(buffer, op, dst)?)
    }

    /// Every rank's `buffer`, by rank, on rank `dst`; nothing elsewhere.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn gather(&self, buffer: &dyn Buffer, dst: usize) -> Result<Option<Slab>> {
        Ok(self.comm()?.lock().gather(buffer, dst)?)
    }

    /// This rank's slice of rank `src`'s buffer, into `into`; `src` alone gives `from`, of `world size x numel` elements.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn scatter(
        &self,
        from: Option<&dyn Buffer>,
        into: &mut dyn Buffer,
        src: usize,
    ) -> Result<()> {
        Ok(self.comm()?.lock().scatter(from, into, src)?)
    }

    /// Give `buffer` to rank `dst`, which calls [`Fabric::recv`]; no other rank takes part.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn send(&self, buffer: &dyn Buffer, dst: usize) -> Result<()> {
        Ok(self.comm()?.lock().send(buffer, dst)?)
    }

    /// Replace `buffer` by what rank `src` sends.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    pub fn recv(&self, buffer: &mut dyn Buffer, src: usize) -> Result<()> {
        Ok(self.comm()?.lock().recv(buffer, src)?)
    }

    /// Memory of the host that the ranks' wire reaches without a copy, for [`Fabric::submit`]. It is not cleared.
    ///
    /// # Errors
    /// Before launch, or when there is no memory.
    pub fn alloc(&self, dtype: Dtype, numel: usize) -> Result<Slab> {
        Ok(self.comm()?.lock().alloc_host(dtype, numel)?)
    }

    /// Begin any collective and return at once. It owns its memory, which [`Work::wait`] gives back; several may be in
    /// flight, and they run in the order in which they were submitted.
    ///
    /// ```
    /// use fabric::{Fabric, ReduceOp, engine::comm::{Call, Data, Op}, engine::kernels::Dtype};
    ///
    /// let fabric = Fabric::builder().devices(2).build()?;
    /// fabric.launch_threads(|fabric| {
    ///     let mut slab = fabric.alloc(Dtype::F32, 4)?;
    ///     slab.as_mut_slice::<f32>().fill(1.0);
    ///     let work = fabric.submit(Call::new(Op::AllReduce(ReduceOp::Sum)), Data::InPlace(slab))?;
    ///     // ... compute meanwhile ...
    ///     let slab = work.wait()?.into_output();
    ///     assert_eq!(slab.as_slice::<f32>(), [2.0; 4]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// Before launch, or when the call does not fit the data. The operation's own errors come from [`Work::wait`].
    pub fn submit(&self, call: Call, data: Data) -> Result<Work> {
        Ok(self.comm()?.lock().submit(call, data)?)
    }

    /// [`Fabric::all_reduce`] that returns at once: `wait()?.into_output()` is the fold.
    ///
    /// # Errors
    /// As [`Fabric::submit`].
    pub fn all_reduce_async(&self, slab: Slab, op: ReduceOp) -> Result<Work> {
        self.submit(Call::new(Op::AllReduce(op)), Data::InPlace(slab))
    }
}
