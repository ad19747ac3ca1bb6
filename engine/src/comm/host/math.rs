//! What happens to elements on their way, the same in both executors: the lift into the accumulator's type, the fold,
//! the finish by an element's owner.

use fabric_kernels::{self as kernels, Finish, Fold, KernelError, Span, SpanMut};

use super::super::ReduceOp;
use crate::wire::frame::{ReduceCode, Stamp};

/// What the arithmetic of one call needs to know.
pub(super) struct Math<'a> {
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) reduce: ReduceOp,
    pub(super) stamp: &'a Stamp,
}

impl Math<'_> {
    /// From the buffer's type to the accumulator's.
    pub(super) fn lift(&self) -> Action {
        Action::lift(self.reduce)
    }

    /// From the accumulator's type to the buffer's: what the owner of an element does once.
    pub(super) fn finish(&self) -> Action {
        match self.reduce {
            ReduceOp::Avg if self.stamp.dtype.is_float() => Action::Scale(1.0 / self.size as f64),
            ReduceOp::Avg => Action::Divide(self.size as u64),
            _ => Action::Cast,
        }
    }
}

impl Math<'_> {
    /// Elements of several ranks meet.
    pub(super) fn reduces(&self) -> bool {
        self.stamp.reduce != ReduceCode::None
    }

    /// The same for [`kernels::combine`] of so many leaves. One alone is the answer as it is.
    pub(super) fn finishing(&self, leaves: usize) -> Finish {
        match self.finish() {
            _ if leaves == 1 => Finish::Cast,
            Action::Scale(factor) => Finish::Scale(factor),
            Action::Divide(by) => Finish::Divide(by),
            Action::Cast | Action::Fold(_) => Finish::Cast,
        }
    }
}

/// What happens to elements on their way from one place to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Action {
    Cast,
    Scale(f64),
    Divide(u64),
    Fold(Fold),
}

impl Action {
    /// From the buffer's type to the accumulator's, on the rank that reduces with `reduce`.
    pub(super) fn lift(reduce: ReduceOp) -> Self {
        match reduce {
            ReduceOp::PreMulSum(factor) => Self::Scale(factor),
            _ => Self::Cast,
        }
    }

    pub(super) fn apply(self, into: SpanMut<'_>, from: Span<'_>) -> Result<(), KernelError> {
        match self {
            Self::Cast => kernels::cast(from, into),
            Self::Scale(factor) => kernels::cast_scaled(from, into, factor),
            Self::Divide(by) => kernels::divide(from, into, by),
            Self::Fold(op) => kernels::fold(op, into, from),
        }
    }
}
