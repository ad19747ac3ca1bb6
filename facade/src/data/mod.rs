//! Data: what there is ([`Dataset`], or without a number [`Stream`]), in which order it comes and whose share it is
//! ([`Sampler`]), and how it comes in batches ([`DataLoader`], [`StreamLoader`]).

mod batches;
mod dataset;
mod epoch;
mod loader;
mod position;
mod sampler;
mod stream;
mod uneven;
mod workers;

pub use batches::Batches;
pub use dataset::{Dataset, Subset};
pub use epoch::LoaderState;
pub use loader::DataLoader;
pub use sampler::{
    BatchSampler, DistributedSampler, RandomSampler, Sampler, SequentialSampler,
    WeightedRandomSampler,
};
pub use stream::{Items, Part, Stream, StreamLoader, Streaming};
pub use uneven::{Joined, Uneven};

use crate::{Error, Result};

/// What `fabric.setup_dataloaders` takes: a loader, or several in a tuple.
pub trait Distribute {
    /// Load only `rank`'s share of `world` shares. Shares are equally long on all ranks: the first samples of the epoch
    /// are repeated where the last turn is not full, as in Lightning; `drop_last` still speaks of batches.
    ///
    /// # Errors
    /// When the loader has been distributed before, or `rank` is not below `world`.
    fn distribute(&mut self, rank: usize, world: usize) -> Result<()>;
}

macro_rules! distribute_tuple {
    ($($loader:ident $index:tt),*) => {
        impl<$($loader: Distribute),*> Distribute for ($($loader,)*) {
            fn distribute(&mut self, rank: usize, world: usize) -> Result<()> {
                $(self.$index.distribute(rank, world)?;)*
                Ok(())
            }
        }
    };
}
distribute_tuple!(A 0, B 1);
distribute_tuple!(A 0, B 1, C 2);
distribute_tuple!(A 0, B 1, C 2, D 3);

/// Workers for a loader, so that those of all ranks of a machine and the ranks themselves have a core each.
///
/// # Errors
/// When `local_world` is 0.
pub fn suggested_max_num_workers(local_world: usize) -> Result<usize> {
    if local_world == 0 {
        return Err(Error::argument(
            "workers for 0 ranks on this machine",
            "Give the number of ranks, at least 1",
        ));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from); // by the affinity
    Ok((cores / local_world).saturating_sub(1).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Line 30, UTIL-32.
    #[test]
    fn line_30_workers_leave_a_core_to_each_rank() {
        let cores = std::thread::available_parallelism().unwrap().get();
        assert_eq!(suggested_max_num_workers(1).unwrap(), (cores - 1).max(1));
        assert_eq!(suggested_max_num_workers(10 * cores).unwrap(), 1);
        assert!(suggested_max_num_workers(0).is_err());
    }
}
