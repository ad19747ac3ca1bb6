//! What a plan costs one rank in memory: what stays, and what is needed for a moment. Activations, and what the tensor
//! library itself holds of a gradient before it hands it over, are the program's.

use super::{BucketPlan, Plan, Reshard, ShardBy};
use crate::comm::Rank;

/// Bytes on one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// The parameters that the model holds between steps.
    pub params: usize,
    /// The values that are updated, where the model does not hold them: slices, or wider ones.
    pub mains: usize,
    /// Gradients, between micro-batches.
    pub grads: usize,
    /// The optimizer's states.
    pub optim: usize,
    /// Blocks in which parameters and gradients travel.
    pub travel: usize,
    /// Units that are whole while they are used.
    pub units: usize,
}

impl Footprint {
    /// All together.
    pub fn total(&self) -> usize {
        self.params + self.mains + self.grads + self.optim + self.travel + self.units
    }

    /// What stays between steps.
    pub fn states(&self) -> usize {
        self.params + self.mains + self.grads + self.optim
    }
}

impl Plan {
    /// What `rank` needs, with an optimizer that keeps `states` vectors beside each parameter.
    pub fn footprint(&self, rank: Rank, states: usize) -> Footprint {
        let mut bytes = Footprint::default();
        for (index, param) in self.params().iter().enumerate() {
            let bucket = self.places[index].map(|(bucket, _)| &self.buckets()[bucket]);
            if !bucket.is_some_and(|bucket| bucket.axis.shards_param()) {
                bytes.params += param.numel() * param.dtype.size();
            }
        }
        for (index, bucket) in self.buckets().iter().enumerate() {
            let own = self.own(index, rank);
            if bucket.has_main() {
                bytes.mains += own.len() * bucket.main_dtype.size();
            }
            if bucket.trainable {
                bytes.grads += self.grad_bytes(index, bucket, own.len());
                let real = bucket.layout.filled(&own);
                bytes.optim += states * real * bucket.main_dtype.accumulator().size();
            }
        }
        for (size, count) in [self.gather_blocks(), self.reduce_blocks()] {
            bytes.travel += size * count;
        }
        bytes.units = self.whole_units();
        bytes
    }

    /// The same, of the rank that needs most: the first, unless slices end where parameters do.
    pub fn largest_footprint(&self, states: usize) -> Footprint {
        let ranks = match self.options().shard_by {
            ShardBy::Element => 1,
            ShardBy::Tensor => self.mesh().shards,
        };
        let all = (0..ranks).map(|rank| self.footprint(rank, states));
        all.max_by_key(Footprint::total).unwrap_or_default()
    }

    /// What bucket `index` keeps of gradients.
    fn grad_bytes(&self, index: usize, bucket: &BucketPlan, own: usize) -> usize {
        let (whole, sum) = (
            bucket.padded * bucket.dtype.size(),
            own * bucket.dtype.accumulator().size(),
        );
        match (self.reduces_each(index), self.has_replicas()) {
            (true, _) => sum,
            (false, true) => whole + sum,
            (false, false) => whole,
        }
    }

    /// The units that are whole at once, in the model's own memory, and the slices that are kept to gather them again.
    fn whole_units(&self) -> usize {
        let unit = |unit: usize| {
            let own = self
                .buckets()
                .iter()
                .filter(|bucket| bucket.unit.is_some_and(|other| other.0 == unit));
            own.map(|bucket| bucket.layout.filled(&(0..bucket.padded)) * bucket.param_dtype.size())
                .sum::<usize>()
        };
        let units = (0..self.units().len()).map(unit);
        let all = || units.clone().sum::<usize>();
        let largest = units.clone().max().unwrap_or(0);
        match self.options().reshard_after_forward {
            Reshard::Yes => largest,
            Reshard::No => all(),
            Reshard::Within(ranks) => largest + all() / ranks,
        }
    }
}
