//! The fold: one span taken into another with an associative operation.

use std::fmt;

use crate::device::{Task, place};
use crate::dtype::Dtype;
use crate::error::{KernelError, same_length};
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
    /// Bitwise "and"; logical for bool; not for floats.
    And,
    /// Bitwise "or"; logical for bool; not for floats.
    Or,
    /// Bitwise "exclusive or"; logical for bool; not for floats.
    Xor,
}

impl Fold {
    /// Every fold.
    pub const ALL: [Fold; 7] = [
        Fold::Sum,
        Fold::Prod,
        Fold::Min,
        Fold::Max,
        Fold::And,
        Fold::Or,
        Fold::Xor,
    ];

    /// The short lower-case name.
    pub const fn name(self) -> &'static str {
        match self {
            Fold::Sum => "sum",
            Fold::Prod => "prod",
            Fold::Min => "min",
            Fold::Max => "max",
            Fold::And => "band",
            Fold::Or => "bor",
            Fold::Xor => "bxor",
        }
    }

    /// Elements of this dtype can be folded so: bits are not a float's arithmetic, and flags are neither added nor
    /// multiplied.
    pub const fn takes(self, dtype: Dtype) -> bool {
        match self {
            Fold::Sum | Fold::Prod => !matches!(dtype, Dtype::Bool),
            Fold::Min | Fold::Max => true,
            Fold::And | Fold::Or | Fold::Xor => !dtype.is_float(),
        }
    }

    /// Refuses a dtype that this fold does not take.
    pub(crate) fn check(self, dtype: Dtype) -> Result<(), KernelError> {
        if self.takes(dtype) {
            return Ok(());
        }
        let op = self.name();
        Err(KernelError::Unsupported { op, dtype })
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
    same_length("fold", into.len(), with.len())?;
    let (target, source) = (into.dtype(), with.dtype());
    if let Some(device) = place([into.device(), with.device()]) {
        op.check(target)?;
        if target != source && !(target.is_float() && source.is_float()) {
            return Err(KernelError::Cast {
                from: source,
                into: target,
            });
        }
        return device.run(Task::Fold { op, into, with });
    }
    if target.is_float() {
        op.check(target)?;
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
    op.check(target)?;
    with_integer!(
        target,
        |T| simd::fold_integers::<T>(op, into, with),
        else simd::fold_bools(op, into, with)
    );
    Ok(())
}
