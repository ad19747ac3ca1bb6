//! What a plan costs one rank on the wire: by the schedules of real communicators, or, where there are none yet, by what
//! any algorithm must send.

use fabric_kernels::Dtype;

use super::{Plan, Reshard};
use crate::{
    comm::{Call, Op, Spent},
    shard::{groups::Groups, mesh::Mesh},
};

/// Among whom a collective runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// All ranks.
    World,
    /// The ranks that reduce gradients into slices.
    Reduce,
    /// The ranks that gather parameters.
    Gather,
    /// The neighbours that gather them a second time.
    Regather,
    /// The ranks that hold the same slice.
    Replica,
}

/// Whoever knows what a collective costs this rank.
pub trait Prices {
    /// What this rank sends for `call` on `numel` elements of `dtype` (of the full vector).
    fn price(&self, among: Among, call: &Call, dtype: Dtype, numel: usize) -> Spent;
}

impl Prices for Groups {
    fn price(&self, among: Among, call: &Call, dtype: Dtype, numel: usize) -> Spent {
        let comm = match among {
            Among::World => &self.world,
            Among::Reduce => &self.reduce,
            Among::Gather => &self.gather,
            Among::Regather => self.regather.as_ref().unwrap_or(&self.gather),
            Among::Replica => self.replica.as_ref().unwrap_or(&self.world),
        };
        comm.lock().price(call, dtype, numel)
    }
}

/// What any algorithm must send: (n-1)/n of the vector to gather it or to reduce it into slices, twice that to do both
/// (Patarasu & Yuan 2009), in the ring's number of messages.
#[derive(Clone, Copy, Debug)]
pub struct Least {
    /// How the ranks stand.
    pub mesh: Mesh,
    /// The size of a group that gathers a second time.
    pub near: usize,
}

impl Prices for Least {
    fn price(&self, among: Among, call: &Call, dtype: Dtype, numel: usize) -> Spent {
        let ranks = match among {
            Among::World => self.mesh.world(),
            Among::Reduce | Among::Gather => self.mesh.shards,
            Among::Regather => self.near,
            Among::Replica => self.mesh.replicas,
        } as u64;
        let passes = match call.op {
            Op::AllReduce(_) => 2,
            _ => 1,
        };
        let bytes = (numel * dtype.size()) as u64;
        Spent {
            collectives: 1,
            messages: passes * (ranks - 1),
            bytes: passes * (bytes - bytes / ranks),
        }
    }
}

/// What one rank sends, predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// In the forward of one micro-batch: parameters of units.
    pub forward: Spent,
    /// In the forward of each further micro-batch of a step: nothing, where parameters stay until the update.
    pub forward_again: Spent,
    /// In the backward of a micro-batch that is not the last.
    pub backward: Spent,
    /// In the backward of the last.
    pub last_backward: Spent,
    /// After the update.
    pub step: Spent,
    /// Of a step of one micro-batch, what has no computation beside it that could hide it: the first gather, the last
    /// reduction, and all that follows. Without prefetch, every gather.
    pub exposed: Spent,
}

impl Forecast {
    /// A step of `batches` micro-batches.
    pub fn total(&self, batches: usize) -> Spent {
        let mut total = self.last_backward;
        total += self.step;
        total += self.forward;
        for _ in 1..batches {
            total += self.forward_again;
            total += self.backward;
        }
        total
    }
}

impl Plan {
    /// What a step's parts will cost this rank.
    pub fn forecast(&self, prices: &dyn Prices) -> Forecast {
        let mut cost = Forecast::default();
        let again = match self.options().reshard_after_forward {
            Reshard::No => 0..0,
            _ => 0..self.units().len().saturating_sub(1), // the last one is still there
        };
        let (mut first_gather, mut last_reduce) = (Spent::default(), Spent::default());
        for (index, bucket) in self.buckets().iter().enumerate() {
            let gather = |among| {
                let call = self.gather_call(index);
                prices.price(among, &call, bucket.param_dtype, bucket.padded)
            };
            if let Some(unit) = bucket.unit {
                let forward = gather(Among::Gather);
                cost.forward += forward;
                if self.options().reshard_after_forward != Reshard::No {
                    cost.forward_again += forward;
                }
                if unit.0 == 0 || self.options().prefetch == 0 {
                    first_gather += forward;
                }
                if again.contains(&unit.0) {
                    let among = match self.options().reshard_after_forward {
                        Reshard::Within(_) => Among::Regather,
                        _ => Among::Gather,
                    };
                    let backward = gather(among);
                    cost.backward += backward;
                    cost.last_backward += backward;
                    if self.options().prefetch == 0 {
                        first_gather += backward;
                    }
                }
            }
            if self.after_step_call(index).is_some() {
                cost.step += gather(Among::Gather);
            }
            if let Some(call) = self.reduce_call(index) {
                let reduce = prices.price(Among::Reduce, &call, bucket.dtype, bucket.padded);
                cost.last_backward += reduce;
                last_reduce = reduce;
                if self.reduces_each(index) {
                    cost.backward += reduce;
                }
            }
            if let Some(call) = self.replica_call(index) {
                let (dtype, numel) = (bucket.dtype.accumulator(), self.own(index, 0).len());
                let replica = prices.price(Among::Replica, &call, dtype, numel);
                cost.last_backward += replica;
                cost.exposed += replica;
            }
        }
        if self.reduces() {
            let (dtype, numel) = self.control_word();
            let word = prices.price(Among::World, &self.control_call(), dtype, numel);
            cost.last_backward += word;
            cost.exposed += word;
        }
        for part in [first_gather, last_reduce, cost.step] {
            cost.exposed += part;
        }
        cost
    }
}
