//! Strategies as data: where parameters, gradients and optimizer state stand on each axis of the mesh, and which
//! collective carries a tensor from one placement to another.

use crate::comm::ReduceOp;

/// Where a tensor's elements stand along one mesh axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Placement {
    /// Every rank holds all of them.
    Replicate,
    /// Every rank holds a term of each: the value is the fold of the ranks'.
    Partial(ReduceOp),
    /// Every rank holds its own slice.
    Shard,
}

/// How a tensor comes from one placement to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Transition {
    /// Not by any one step.
    Impossible,
    /// Without communication: nothing to do, or a rank drops what is not its own.
    Local,
    /// By an all-reduce.
    AllReduce(ReduceOp),
    /// By a reduce-scatter.
    ReduceScatter(ReduceOp),
    /// By an all-gather.
    AllGather,
}

/// What carries a tensor from `from` to `to`.
pub fn transition(from: Placement, to: Placement) -> Transition {
    use Placement::{Partial, Replicate, Shard};
    match (from, to) {
        (Replicate, Replicate | Shard) | (Shard, Shard) => Transition::Local,
        (Partial(a), Partial(b)) if a == b => Transition::Local,
        (Partial(op), Replicate) => Transition::AllReduce(op),
        (Partial(op), Shard) => Transition::ReduceScatter(op),
        (Shard, Replicate) => Transition::AllGather,
        (_, Partial(_)) => Transition::Impossible,
    }
}

/// The three placements along one mesh axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Axis {
    /// Where parameters stand between steps.
    pub param: Placement,
    /// Where gradients stand between micro-batches.
    pub grad: Placement,
    /// Where optimizer state stands, and so where the update happens.
    pub optim: Placement,
}

const MEAN: Placement = Placement::Partial(ReduceOp::Avg);

impl Axis {
    /// Nothing is distributed: one rank.
    pub const ALONE: Self = Self {
        param: Placement::Replicate,
        grad: Placement::Replicate,
        optim: Placement::Replicate,
    };
    /// Everything is replicated; gradients are averaged once.
    pub const REPLICATE: Self = Self {
        param: Placement::Replicate,
        grad: MEAN,
        optim: Placement::Replicate,
    };
    /// Each rank updates a slice.
    pub const SHARD_OPTIM: Self = Self {
        param: Placement::Replicate,
        grad: MEAN,
        optim: Placement::Shard,
    };
    /// Each rank keeps the gradients of a slice, and updates it.
    pub const SHARD_GRAD: Self = Self {
        param: Placement::Replicate,
        grad: Placement::Shard,
        optim: Placement::Shard,
    };
    /// Each rank keeps a slice of everything.
    pub const SHARD_PARAM: Self = Self {
        param: Placement::Shard,
        grad: Placement::Shard,
        optim: Placement::Shard,
    };

    /// Whether each rank updates a slice of its own.
    pub fn shards_update(&self) -> bool {
        self.optim == Placement::Shard
    }

    /// Whether parameters are in slices between their uses.
    pub fn shards_param(&self) -> bool {
        self.param == Placement::Shard
    }

    /// Whether every micro-batch reduces its gradients, because only slices of them are kept.
    pub fn reduces_each(&self) -> bool {
        self.grad == Placement::Shard
    }

    /// What turns the gradients that one rank's backward makes into what the optimizer reads.
    pub fn reduction(&self) -> Transition {
        match self.grad {
            Placement::Replicate => Transition::Local,
            Placement::Partial(_) => transition(self.grad, self.optim),
            Placement::Shard => transition(MEAN, Placement::Shard),
        }
    }

    /// What brings updated parameters back to where they stand between steps.
    pub fn after_step(&self) -> Transition {
        transition(self.optim, self.param)
    }
}

/// A strategy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Its name, as users write it.
    pub name: &'static str,
    /// The placements among ranks that share the work of one replica.
    pub shard: Axis,
    /// Where there are several replicas, each of several ranks: the placements among the ranks that hold the same slice.
    pub replica: Option<Axis>,
}

/// One device: nothing moves.
pub const SINGLE: Row = Row::one("single", Axis::ALONE);

/// Distributed data parallelism: gradients are averaged, everything is replicated.
pub const DDP: Row = Row::one("ddp", Axis::REPLICATE);

/// ZeRO stage 1 (Rajbhandari et al. 2020): optimizer state, and so the update, is sharded; parameters are replicated.
pub const ZERO1: Row = Row::one("zero1", Axis::SHARD_OPTIM);

/// ZeRO stage 2: gradients are sharded too, and reduced in every micro-batch.
pub const ZERO2: Row = Row::one("zero2", Axis::SHARD_GRAD);

/// ZeRO stage 3, fully sharded data parallelism (Zhao et al. 2023): parameters are gathered for each unit's use.
pub const FSDP: Row = Row::one("fsdp", Axis::SHARD_PARAM);

/// Sharded within groups of ranks, replicated across them (Zhao et al. 2023, section 3.2.2).
pub const HSDP: Row = Row {
    name: "hsdp",
    shard: Axis::SHARD_PARAM,
    replica: Some(Axis::REPLICATE),
};

/// All rows that can be run.
pub const ROWS: [Row; 6] = [SINGLE, DDP, ZERO1, ZERO2, FSDP, HSDP];

impl Row {
    const fn one(name: &'static str, shard: Axis) -> Self {
        Self {
            name,
            shard,
            replica: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_reduce_as_the_table_says() {
        use Transition::{AllGather, AllReduce, Local, ReduceScatter};
        let mean = ReduceOp::Avg;
        let reductions = ROWS.map(|row| row.shard.reduction());
        assert_eq!(
            reductions,
            [
                Local,
                AllReduce(mean),
                ReduceScatter(mean),
                ReduceScatter(mean),
                ReduceScatter(mean),
                ReduceScatter(mean)
            ]
        );
        let after = ROWS.map(|row| row.shard.after_step());
        assert_eq!(after, [Local, Local, AllGather, AllGather, Local, Local]);
        let replicas = HSDP.replica.unwrap();
        assert_eq!(replicas.reduction(), AllReduce(mean));
        assert_eq!(replicas.after_step(), Local);
    }

    #[test]
    fn nothing_becomes_a_partial_sum_by_itself() {
        let partial = Placement::Partial(ReduceOp::Sum);
        assert_eq!(
            transition(Placement::Replicate, partial),
            Transition::Impossible
        );
        assert_eq!(
            transition(Placement::Shard, Placement::Replicate),
            Transition::AllGather
        );
    }
}
