//! The reductions by the names of nccl-tests, and which element types each takes.

use fabric_engine::{
    comm::{Rank, ReduceOp},
    kernels::Dtype,
};

/// How the ranks' elements become one, without the factor that the engine's `PreMulSum` carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redop {
    /// Sum.
    Sum,
    /// Product.
    Prod,
    /// Smallest.
    Min,
    /// Largest.
    Max,
    /// Mean.
    Avg,
    /// Sum of each rank's elements times [`Redop::factor`].
    MulSum,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Bitwise exclusive or.
    Xor,
}

impl Redop {
    /// All, in the order of nccl-tests, the bitwise ones last.
    pub const ALL: [Self; 9] = [
        Self::Sum,
        Self::Prod,
        Self::Min,
        Self::Max,
        Self::Avg,
        Self::MulSum,
        Self::And,
        Self::Or,
        Self::Xor,
    ];

    /// Its name on the command line and in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Prod => "prod",
            Self::Min => "min",
            Self::Max => "max",
            Self::Avg => "avg",
            Self::MulSum => "mulsum",
            Self::And => "band",
            Self::Or => "bor",
            Self::Xor => "bxor",
        }
    }

    /// Whether it works on the bits of integers.
    pub fn is_bitwise(self) -> bool {
        matches!(self, Self::And | Self::Or | Self::Xor)
    }

    /// Whether elements of `dtype` can be reduced so.
    pub fn takes(self, dtype: Dtype) -> bool {
        match self {
            Self::Min | Self::Max => true,
            _ if self.is_bitwise() => !dtype.is_float(),
            _ => dtype != Dtype::Bool,
        }
    }

    /// What [`Redop::MulSum`] multiplies `rank`'s elements by: a power of two, so that nothing is rounded.
    pub fn factor(rank: Rank) -> u32 {
        1 + (rank as u32) % 2
    }

    /// The engine's word for it on `rank`.
    pub fn on_rank(self, rank: Rank) -> ReduceOp {
        match self {
            Self::Sum => ReduceOp::Sum,
            Self::Prod => ReduceOp::Prod,
            Self::Min => ReduceOp::Min,
            Self::Max => ReduceOp::Max,
            Self::Avg => ReduceOp::Avg,
            Self::MulSum => ReduceOp::PreMulSum(f64::from(Self::factor(rank))),
            Self::And => ReduceOp::BitAnd,
            Self::Or => ReduceOp::BitOr,
            Self::Xor => ReduceOp::BitXor,
        }
    }
}
