//! The memory that stands in a parameter whose own is away: nothing of any operation of candle's can be read from it, and
//! the error that such an operation then is gets an explanation.

use candle_core::{CpuStorage, DType, Error};

/// What is in the tensor of a parameter whose memory is away.
///
/// [Note: the mark of absence] Candle checks a storage's type before it reads, and its length hardly ever: an empty `F32` would
/// be read out of bounds (`matmul` hands pointers to gemm, strided maps do not check indices), and so would an empty `U8`
/// by `weight.t()?.to_dtype(..)`. `F4` is a type that candle can hold but not compute with: in every operation of its CPU
/// backend the arm of this type is an error. `tests/candle/absence.rs` goes through them.
pub(crate) fn mark() -> CpuStorage {
    CpuStorage::F4(Vec::new())
}

/// What to do about a use of a parameter that has no memory.
pub(crate) const HINT: &str = "The parameters of a unit are only there inside its run, in forward and in backward, and \
     those of build_deferred only after fabric.setup. Declare a Unit where they are used, or ask the VarBuilder for a tied \
     parameter in each place that uses it";

/// Whether this error comes from [`mark`].
pub(crate) fn caused(error: &Error) -> bool {
    match error {
        Error::UnsupportedDTypeForOp(dtype, _) => *dtype == DType::F4,
        Error::DTypeMismatchBinaryOp { lhs, rhs, .. } => [lhs, rhs].contains(&&DType::F4),
        Error::UnexpectedDType { expected, got, .. } => [expected, got].contains(&&DType::F4),
        Error::Context { inner, .. }
        | Error::WithPath { inner, .. }
        | Error::WithBacktrace { inner, .. } => caused(inner),
        // What candle-nn's fused operations say, some of them of the wrong argument.
        Error::Msg(text) => text.contains("F4") || text.starts_with("unsupported dtype"),
        _ => false,
    }
}

/// The error, and before it what to do about it if a parameter without memory caused it.
pub(crate) fn explain(error: Error, explanation: impl FnOnce() -> String) -> Error {
    if caused(&error) {
        error.context(explanation())
    } else {
        error
    }
}

/// An error of ours on its way through candle, without the backtrace that candle's own `wrap` adds to its words.
pub(crate) fn wrapped(error: impl std::fmt::Display + Send + Sync + 'static) -> Error {
    Error::Wrapped(Box::new(error))
}
