//! Does the memory fit the call? And the fingerprint of a call that it fits.

use fabric_kernels::Dtype;

use super::super::{Call, Data, Op, Rank};
use crate::{
    error::{Error, Result},
    wire::frame::Stamp,
};

/// The full vector of a call: its length and type.
#[derive(Clone, Copy, Debug)]
pub(in crate::comm) struct Shape {
    pub(in crate::comm) dtype: Dtype,
    pub(in crate::comm) numel: usize,
}

pub(super) fn stamp(sequence: u64, call: &Call, shape: Shape) -> Stamp {
    let (op, reduce) = call.op.code();
    let root = if let Op::Broadcast { root } = call.op {
        root as u32
    } else {
        0
    };
    Stamp {
        sequence,
        op,
        reduce,
        dtype: shape.dtype,
        root,
        numel: shape.numel as u64,
        label: call.label,
    }
}

/// Does the data fit the call?
pub(in crate::comm) fn check_shapes(
    rank: Rank,
    size: usize,
    call: &Call,
    data: &Data,
) -> Result<Shape> {
    let wrong =
        |what: String, hint: &str| Err(Error::argument(format!("rank {rank}: {what}"), hint));
    let name = call.op.code().0.name();
    if let Op::Broadcast { root } = call.op
        && root >= size
    {
        return wrong(
            format!("broadcast from rank {root} of {size}"),
            "Name a rank of the group as the root",
        );
    }
    let (from, into) = match (call.op, data) {
        (Op::Barrier, Data::None) => {
            return Ok(Shape {
                dtype: Dtype::U8,
                numel: 0,
            });
        }
        (Op::Barrier, _) => {
            return wrong(
                "a barrier with data".into(),
                "Submit a barrier with Data::None",
            );
        }
        (_, Data::None) => return wrong(format!("{name} without data"), "Give it a slab"),
        (_, Data::InPlace(slab)) => {
            let (dtype, numel) = (slab.dtype(), slab.numel());
            if matches!(call.op, Op::ReduceScatter(_) | Op::AllGather) && numel % size != 0 {
                return wrong(
                    format!("{name} of {numel} elements among {size} ranks"),
                    "Pad the vector to a multiple of the world size",
                );
            }
            return Ok(Shape { dtype, numel });
        }
        (_, Data::Out { from, into }) => (from, into),
    };
    if from.dtype() != into.dtype() {
        return wrong(
            format!("{name} from {} into {}", from.dtype(), into.dtype()),
            "Use one dtype",
        );
    }
    let (expected, numel) = match call.op {
        Op::ReduceScatter(_) => (into.numel() * size == from.numel(), from.numel()),
        Op::AllGather => (from.numel() * size == into.numel(), into.numel()),
        Op::Broadcast { root } => (root != rank || from.numel() == into.numel(), into.numel()),
        _ => (from.numel() == into.numel(), from.numel()),
    };
    if !expected {
        let (from, into) = (from.numel(), into.numel());
        return wrong(
            format!("{name} from {from} into {into} elements among {size} ranks"),
            "reduce_scatter's input and all_gather's output have world size x the other's elements; otherwise both are \
             equal",
        );
    }
    Ok(Shape {
        dtype: into.dtype(),
        numel,
    })
}
