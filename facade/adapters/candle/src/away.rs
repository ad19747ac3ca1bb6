//! The memory that stands in a parameter whose own is away: nothing of any operation of candle's can be read from it, and
//! the error that such an operation then is gets an explanation.

use candle_core::{CpuStorage, DType, Device, Error, Result, Storage};

use crate::{cuda, storage::check_device};

/// What is in the tensor of a parameter whose memory is away.
///
/// [Note: the mark of absence] Candle checks a storage's type before it reads, and its length hardly ever: an empty `F32` would
/// be read out of bounds (`matmul` hands pointers to gemm, strided maps do not check indices), and so would an empty `U8`
/// by `weight.t()?.to_dtype(..)`. `F4` is a type that candle can hold but not compute with: in every operation of its CPU
/// backend the arm of this type is an error. `tests/candle/absence.rs` goes through them.
///
/// So it is in the CUDA backend, where a kernel over memory that is too short would go unnoticed: no kernel is launched
/// over `F4`. What candle 0.11.1 does there, read in cuda_backend/mod.rs and utils.rs, each before any launch: `const_set`,
/// `to_dtype`, `to_cpu_storage` and `transfer_to_device` have an arm for it that is an error, or want another type by
/// `as_cuda_slice`. All that goes by `Map1` and `Map1Any` has one in there (`try_clone`, affine, powf, elu, unary
/// operations, reductions, sorting, im2col, pooling, upsampling, the values of `index_select` and `gather`), and `Map2`,
/// `Map2Any`, `Map2InPlace` and `Map3` refuse every pair that they do not list (binary operations, comparisons, `where_cond`, the
/// direct convolutions, scattering, `index_add`). `matmul`, `copy2d`, `copy_strided_src` and candle-nn's rotary embeddings
/// list the types themselves, and end in an error; indices and conditions must be u8, u32 or i64. `F8E8M0`, another type
/// without arithmetic, would not do: `copy2d` copies it.
pub(crate) fn mark(device: &Device) -> Result<Storage> {
    check_device(device)?;
    match device {
        Device::Cuda(device) => cuda::mark(device).map(Storage::Cuda),
        _ => Ok(Storage::Cpu(CpuStorage::F4(Vec::new()))),
    }
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
        // What candle-nn's fused operations say, some of them of the wrong argument, and the CUDA backend's maps.
        Error::Msg(text) => {
            let starts = ["unsupported dtype", "Map1 does not"];
            text.contains("F4") || starts.iter().any(|start| text.starts_with(start))
        }
        // Tensors of different types are refused before they get that far: this is a storage of another type than its tensor.
        Error::Cuda(error) => {
            let text = error.to_string();
            text.contains("F4") || text.contains("dtype mismatch") || text.contains("Dummy types")
        }
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
