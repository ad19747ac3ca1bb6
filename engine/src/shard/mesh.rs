//! The shape in which ranks stand: replicas of groups that shard. Ranks of a group follow one another, so that the fold
//! over a group, then over groups, is the canonical tree over all ranks when a group's size is a power of two.

use crate::{
    comm::Rank,
    error::{Error, Result},
};

/// `replicas` groups of `shards` ranks: rank = replica x shards + shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// How many groups.
    pub replicas: usize,
    /// How many ranks in each.
    pub shards: usize,
}

impl Mesh {
    /// One group of all ranks.
    pub fn flat(world: usize) -> Self {
        Self {
            replicas: 1,
            shards: world,
        }
    }

    /// `world` ranks in groups of `shards`.
    ///
    /// # Errors
    /// When the world cannot be divided so.
    pub fn new(world: usize, shards: usize) -> Result<Self> {
        if shards == 0 || !world.is_multiple_of(shards) {
            let divisors = (1..=world).filter(|shards| world.is_multiple_of(*shards));
            let divisors = divisors.map(|shards| shards.to_string());
            return Err(Error::argument(
                format!("{world} ranks do not divide into groups of {shards}"),
                format!(
                    "Shard over groups of {} ranks",
                    divisors.collect::<Vec<_>>().join(", ")
                ),
            ));
        }
        Ok(Self {
            replicas: world / shards,
            shards,
        })
    }

    /// Ranks in all.
    pub fn world(&self) -> usize {
        self.replicas * self.shards
    }

    /// Which slice `rank` holds.
    pub fn shard(&self, rank: Rank) -> usize {
        rank % self.shards
    }

    /// In which group `rank` is.
    pub fn replica(&self, rank: Rank) -> usize {
        rank / self.shards
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_one_place() {
        let mesh = Mesh::new(6, 3).unwrap();
        let places = (0..6).map(|rank| (mesh.replica(rank), mesh.shard(rank)));
        assert_eq!(
            places.collect::<Vec<_>>(),
            [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
        );
    }

    #[test]
    fn a_world_that_does_not_divide_is_told_how_it_would() {
        let text = Mesh::new(6, 4).unwrap_err().to_string();
        assert!(text.contains("groups of 1, 2, 3, 6 ranks"), "{text}");
    }
}
