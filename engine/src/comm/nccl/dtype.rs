//! Which of our dtypes and reductions NCCL has, by its version, and under which numbers.

use std::ffi::c_int;

use fabric_kernels::Dtype;

use super::library::Version;
use crate::{
    comm::ReduceOp,
    error::{Error, Result},
};

const F8_SINCE: Version = Version::from_code(22_400);
const BYTES: c_int = 1; // ncclUint8

/// NCCL's number of a dtype that it can compute with.
fn number(dtype: Dtype) -> Option<c_int> {
    Some(match dtype {
        Dtype::I8 => 0,
        Dtype::U8 => BYTES,
        Dtype::I32 => 2,
        Dtype::U32 => 3,
        Dtype::I64 => 4,
        Dtype::U64 => 5,
        Dtype::F16 => 6,
        Dtype::F32 => 7,
        Dtype::F64 => 8,
        Dtype::BF16 => 9,
        Dtype::F8E4M3 => 10,
        Dtype::F8E5M2 => 11,
        Dtype::I16 | Dtype::U16 | Dtype::Bool => return None,
    })
}

/// How elements travel that are not computed with: NCCL's dtype, and how many of it one element is.
pub(super) fn carried(dtype: Dtype, version: Version) -> (c_int, usize) {
    match number(dtype) {
        Some(number) if is_known(dtype, version) => (number, 1),
        _ => (BYTES, dtype.size()),
    }
}

fn is_known(dtype: Dtype, version: Version) -> bool {
    !matches!(dtype, Dtype::F8E4M3 | Dtype::F8E5M2) || version >= F8_SINCE
}

/// NCCL's reduction. What multiplies first is made at the call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Reduction {
    Known(c_int),
    PreMulSum(f64),
}

/// NCCL's dtype and reduction.
///
/// # Errors
/// When NCCL has no such reduction of such elements.
pub(super) fn reduced(
    rank: usize,
    dtype: Dtype,
    op: ReduceOp,
    version: Version,
) -> Result<(c_int, Reduction)> {
    let refuse =
        |what: String, hint: &str| Err(Error::argument(format!("rank {rank}: {what}"), hint));
    let reduction = match op {
        ReduceOp::Sum => Reduction::Known(0),
        ReduceOp::Prod => Reduction::Known(1),
        ReduceOp::Max => Reduction::Known(2),
        ReduceOp::Min => Reduction::Known(3),
        ReduceOp::Avg => Reduction::Known(4),
        ReduceOp::PreMulSum(factor) => Reduction::PreMulSum(factor),
        ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor => {
            let what = format!("NCCL has no {op:?}");
            return refuse(
                what,
                "Reduce bits in the host's memory, or with Min and Max where they are flags",
            );
        }
    };
    if dtype == Dtype::Bool {
        return match op {
            ReduceOp::Min | ReduceOp::Max => Ok((BYTES, reduction)),
            _ => refuse(
                format!("{op:?} of bool"),
                "Of bool there are Min (all) and Max (any)",
            ),
        };
    }
    let Some(number) = number(dtype) else {
        return refuse(
            format!("NCCL does not compute with {dtype}"),
            "Cast to i32 or f32 first",
        );
    };
    if !is_known(dtype, version) {
        let what = format!("NCCL {version} does not compute with {dtype}");
        return refuse(what, "Install NCCL 2.24 or newer, or cast to bf16 first");
    }
    if let ReduceOp::PreMulSum(factor) = op
        && dtype.is_integer()
        && !fits(dtype, factor)
    {
        let what = format!("PreMulSum by {factor}, which is no {dtype}");
        return refuse(
            what,
            "NCCL multiplies in the elements' own type: give a whole number, or cast to f32 first",
        );
    }
    Ok((number, reduction))
}

/// Whether an integer type holds exactly this number.
fn fits(dtype: Dtype, factor: f64) -> bool {
    let bits = 8 * dtype.size() as i32;
    let is_signed = matches!(dtype, Dtype::I8 | Dtype::I32 | Dtype::I64);
    let (least, past) = match is_signed {
        true => (-(2f64.powi(bits - 1)), 2f64.powi(bits - 1)),
        false => (0.0, 2f64.powi(bits)),
    };
    factor.fract() == 0.0 && (least..past).contains(&factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Version = Version::from_code(22_803);
    const OLD: Version = Version::from_code(21_805);

    fn refusal(dtype: Dtype, op: ReduceOp, version: Version) -> String {
        reduced(3, dtype, op, version).unwrap_err().to_string()
    }

    #[test]
    fn every_dtype_travels() {
        for dtype in Dtype::ALL {
            for version in [OLD, NEW] {
                let (number, times) = carried(dtype, version);
                let bytes = [1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1][number as usize];
                assert_eq!(bytes * times, dtype.size(), "{dtype}");
                assert!(number < 10 || version == NEW);
            }
        }
    }

    #[test]
    fn what_nccl_has_no_arithmetic_for_is_refused_before_any_call() {
        for dtype in [Dtype::I16, Dtype::U16] {
            let said = refusal(dtype, ReduceOp::Sum, NEW);
            assert!(
                said.contains(dtype.name()) && said.contains("rank 3"),
                "{said}"
            );
        }
        assert!(refusal(Dtype::F8E4M3, ReduceOp::Sum, OLD).contains("2.24"));
        assert_eq!(reduced(0, Dtype::F8E4M3, ReduceOp::Sum, NEW).unwrap().0, 10);
        for op in [ReduceOp::BitAnd, ReduceOp::BitOr, ReduceOp::BitXor] {
            assert!(refusal(Dtype::I32, op, NEW).contains("has no Bit"));
        }
        for op in [
            ReduceOp::Sum,
            ReduceOp::Avg,
            ReduceOp::Prod,
            ReduceOp::PreMulSum(1.0),
        ] {
            assert!(refusal(Dtype::Bool, op, NEW).contains("Min (all) and Max (any)"));
        }
        assert_eq!(
            reduced(0, Dtype::Bool, ReduceOp::Max, NEW).unwrap(),
            (1, Reduction::Known(2))
        );
    }

    #[test]
    fn factors_of_integers_are_whole_and_in_range() {
        for (dtype, factor, is_right) in [
            (Dtype::I8, -128.0, true),
            (Dtype::I8, 128.0, false),
            (Dtype::U32, -1.0, false),
            (Dtype::U64, 2f64.powi(64), false),
            (Dtype::I32, 0.5, false),
            (Dtype::I64, f64::NAN, false),
            (Dtype::F32, 0.5, true),
        ] {
            let is_accepted = reduced(0, dtype, ReduceOp::PreMulSum(factor), NEW).is_ok();
            assert_eq!(is_accepted, is_right, "{factor} of {dtype}");
        }
    }
}
