//! What a plan costs, by the schedules alone.

use super::{Plan, Reshard};
use crate::{
    comm::{Call, Communicator, Spent},
    shard::{SharedComm, groups::Groups},
};
use fabric_kernels::Dtype;

/// What one rank sends, predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// In the forward of one micro-batch: parameters of units.
    pub forward: Spent,
    /// In the backward of a micro-batch that is not the last.
    pub backward: Spent,
    /// In the backward of the last.
    pub last_backward: Spent,
    /// After the update.
    pub step: Spent,
}

fn price(comm: &SharedComm, call: &Call, dtype: Dtype, numel: usize) -> Spent {
    comm.lock().price(call, dtype, numel)
}

impl Plan {
    /// What one synchronised backward will cost this rank on one communicator, parameters aside.
    pub fn predict(&self, comm: &dyn Communicator) -> Spent {
        let mut spent = Spent::default();
        if self.reduces() {
            for (index, bucket) in self.buckets().iter().enumerate() {
                if let Some(call) = self.reduce_call(index) {
                    spent += comm.price(&call, bucket.dtype, bucket.padded);
                }
            }
            let (dtype, numel) = self.control_word();
            spent += comm.price(&self.control_call(), dtype, numel);
        }
        spent
    }

    /// What a step's parts will cost this rank.
    pub fn forecast(&self, groups: &Groups) -> Forecast {
        let mut cost = Forecast::default();
        let again = self.units_gathered_again();
        for (index, bucket) in self.buckets().iter().enumerate() {
            let gather = || {
                price(
                    &groups.gather,
                    &self.gather_call(index),
                    bucket.param_dtype,
                    bucket.padded,
                )
            };
            if bucket.axis.shards_param() {
                cost.forward += gather();
                if bucket.unit.is_some_and(|unit| again.contains(&unit.0)) {
                    let comm = groups.regather.as_ref().unwrap_or(&groups.gather);
                    let gather = price(
                        comm,
                        &self.gather_call(index),
                        bucket.param_dtype,
                        bucket.padded,
                    );
                    cost.backward += gather;
                    cost.last_backward += gather;
                }
            }
            if self.after_step_call(index).is_some() {
                cost.step += gather();
            }
            if let Some(call) = self.reduce_call(index) {
                let reduce = price(&groups.reduce, &call, bucket.dtype, bucket.padded);
                cost.last_backward += reduce;
                if self.reduces_each(index) {
                    cost.backward += reduce;
                }
            }
            if let (Some(call), Some(replica)) = (self.replica_call(index), &groups.replica) {
                let numel = self.own(index, groups.world.rank()).len();
                cost.last_backward += price(replica, &call, bucket.dtype.accumulator(), numel);
            }
        }
        if self.reduces() {
            let (dtype, numel) = self.control_word();
            cost.last_backward += price(&groups.world, &self.control_call(), dtype, numel);
        }
        cost
    }

    /// The units that backward gathers a second time: the last one is still there.
    fn units_gathered_again(&self) -> std::ops::Range<usize> {
        match self.options().reshard_after_forward {
            Reshard::No => 0..0,
            _ => 0..self.units().len().saturating_sub(1),
        }
    }
}
