//! Ranks among themselves: a group of ranks is a Fabric of its own, whose world they are.

use fabric_engine::shard::SharedComm;

use super::{Fabric, lock};
use crate::error::{Error, Result};

impl Fabric {
    /// The group of all ranks that give the same `color`, ordered by `key`, then by rank: a Fabric whose ranks are numbered
    /// from 0 and whose models, loaders, checkpoints and collectives are the group's. Loggers are the job's: only its rank 0
    /// writes, in whichever group it is. All ranks call this together.
    ///
    /// ```
    /// use fabric::{Fabric, ReduceOp};
    ///
    /// let fabric = Fabric::builder().devices(4).build()?;
    /// fabric.launch_threads(|fabric| {
    ///     let pair = fabric.split(fabric.global_rank() as u32 / 2, 0)?;
    ///     assert_eq!((pair.world_size(), pair.global_rank()), (2, fabric.global_rank() % 2));
    ///     let sum = pair.all_reduce_value(fabric.global_rank(), ReduceOp::Sum)?;
    ///     assert_eq!(sum, if fabric.global_rank() < 2 { 1 } else { 5 });
    ///     Ok(())
    /// })?;
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// Before launch, or when a rank is gone.
    pub fn split(&self, color: u32, key: u32) -> Result<Self> {
        let comm = self.comm()?.lock().split(color, key)?;
        let comm = SharedComm::new(comm);
        let world = self.lock_world().as_ref().map(|world| world.group(comm));
        Ok(self.alike(world, lock(&self.inner.callbacks).clone()))
    }

    /// The group of `ranks`, in this order; `None` on the others. All ranks call this together, with the same list.
    ///
    /// # Errors
    /// Before launch, when a rank is not there or named twice, or when one is gone.
    pub fn new_group(&self, ranks: &[usize]) -> Result<Option<Self>> {
        let world = self.world_size();
        for (index, rank) in ranks.iter().enumerate() {
            if *rank >= world || ranks[..index].contains(rank) {
                return Err(Error::argument(
                    format!("a group of ranks {ranks:?} in a world of {world}"),
                    "Name each rank once, from 0 to world size - 1",
                ));
            }
        }
        let place = ranks.iter().position(|rank| *rank == self.global_rank());
        let group = self.split(
            u32::from(place.is_none()),
            u32::try_from(place.unwrap_or(0))?,
        )?;
        Ok(place.map(|_| group))
    }
}
