//! The fold: one span taken into another with an associative operation.

use std::fmt;

use crate::dtype::Dtype;
use crate::error::{KernelError, on_host, same_length};
use crate::simd;
use crate::span::{Span, SpanMut};

/// How two elements become one.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Fold {
    /// Addition; integers wrap; not for bool.
    Sum,
    /// Multiplication; integers wrap; not for bool.
    Prod,
    /// The smaller; NaN wins, -0 is below +0; "and" for bool.
    Min,
    /// The larger; NaN wins, -0 is below +0; "or" for bool.
    Max,
}

impl Fold {
    /// The short lower-case name.
    pub const fn name(self) -> &'static str {
        match self {
            Fold::Sum => "sum",
            Fold::Prod => "prod",
            Fold::Min => "min",
            Fold::Max => "max",
        }
    }
}

impl fmt::Display for Fold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// `into[i] = into[i] op with[i]`. Two floats of any dtypes meet in f64 if either is f64, else in f32, and the result is
/// rounded once. Integers and bool meet their own dtype only.
pub fn fold(op: Fold, into: SpanMut<'_>, with: Span<'_>) -> Result<(), KernelError> {
    on_host("fold", [into.memory(), with.memory()])?;
    same_length("fold", into.len(), with.len())?;
    let (target, source) = (into.dtype(), with.dtype());
    if target.is_float() {
        return with_float_pair!(
            target, source,
            |B, A, C| { simd::fold_floats::<B, A, C>(op, into, with); Ok(()) },
            else Err(KernelError::Cast { from: source, into: target })
        );
    }
    if target != source {
        return Err(KernelError::Cast {
            from: source,
            into: target,
        });
    }
    match (target, op) {
        (Dtype::Bool, Fold::Sum | Fold::Prod) => Err(KernelError::Unsupported {
            op: op.name(),
            dtype: target,
        }),
        (Dtype::Bool, Fold::Min | Fold::Max) => {
            simd::fold_bools(op, into, with);
            Ok(())
        }
        _ => with_integer!(
            target,
            |T| { simd::fold_integers::<T>(op, into, with); Ok(()) },
            else Err(KernelError::Unsupported { op: op.name(), dtype: target })
        ),
    }
}
