//! Strategies as data: where parameters, gradients and optimizer state stand, and which collective carries a tensor
//! from one placement to another.

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

/// A strategy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Its name, as users write it.
    pub name: &'static str,
    /// Where parameters stand between steps.
    pub param: Placement,
    /// Where gradients stand between micro-batches.
    pub grad: Placement,
    /// Where optimizer state stands, and so where the update happens.
    pub optim: Placement,
}

/// One device: nothing moves.
pub const SINGLE: Row = Row {
    name: "single",
    param: Placement::Replicate,
    grad: Placement::Replicate,
    optim: Placement::Replicate,
};

/// Distributed data parallelism: gradients are averaged, everything is replicated.
pub const DDP: Row = Row {
    name: "ddp",
    param: Placement::Replicate,
    grad: Placement::Partial(ReduceOp::Avg),
    optim: Placement::Replicate,
};

/// ZeRO stage 1 (Rajbhandari et al. 2020): optimizer state, and so the update, is sharded; parameters are replicated.
pub const ZERO1: Row = Row {
    name: "zero1",
    param: Placement::Replicate,
    grad: Placement::Partial(ReduceOp::Avg),
    optim: Placement::Shard,
};

/// All rows that can be run.
pub const ROWS: [Row; 3] = [SINGLE, DDP, ZERO1];

/// Other names for rows.
const ALIASES: [(&str, Row); 1] = [("deepspeed_stage_1", ZERO1)];

impl Row {
    /// The row called `name` (in any case), or that has it as another name.
    pub fn named(name: &str) -> Option<Self> {
        let aliases = ALIASES.into_iter();
        ROWS.into_iter()
            .map(|row| (row.name, row))
            .chain(aliases)
            .find_map(|(known, row)| known.eq_ignore_ascii_case(name).then_some(row))
    }

    /// Whether each rank updates a slice of its own.
    pub fn shards_update(&self) -> bool {
        self.optim == Placement::Shard
    }

    /// What brings updated parameters back to where they stand between steps.
    pub fn after_step(&self) -> Transition {
        transition(self.optim, self.param)
    }

    /// What turns a gradient as it stands after the last micro-batch into what the optimizer reads.
    pub fn reduction(&self) -> Transition {
        transition(self.grad, self.optim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_reduce_as_the_table_says() {
        assert_eq!(SINGLE.reduction(), Transition::Local);
        assert_eq!(DDP.reduction(), Transition::AllReduce(ReduceOp::Avg));
        assert_eq!(ZERO1.reduction(), Transition::ReduceScatter(ReduceOp::Avg));
        let after = [SINGLE, DDP, ZERO1].map(|row| row.after_step());
        assert_eq!(
            after,
            [Transition::Local, Transition::Local, Transition::AllGather]
        );
    }

    #[test]
    fn a_row_is_found_by_its_name_in_any_case() {
        assert_eq!(Row::named("DDP"), Some(DDP));
        assert_eq!(Row::named("DeepSpeed_stage_1"), Some(ZERO1));
        assert_eq!(Row::named("dpp"), None);
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
