//! Types of elements, as safetensors calls them.

use fabric_engine::kernels::Dtype;
use safetensors::Dtype as TensorDtype;

/// What safetensors calls a type.
pub(super) fn tensor_dtype(dtype: Dtype) -> TensorDtype {
    match dtype {
        Dtype::F64 => TensorDtype::F64,
        Dtype::F32 => TensorDtype::F32,
        Dtype::F16 => TensorDtype::F16,
        Dtype::BF16 => TensorDtype::BF16,
        Dtype::F8E4M3 => TensorDtype::F8_E4M3,
        Dtype::F8E5M2 => TensorDtype::F8_E5M2,
        Dtype::I8 => TensorDtype::I8,
        Dtype::I16 => TensorDtype::I16,
        Dtype::I32 => TensorDtype::I32,
        Dtype::I64 => TensorDtype::I64,
        Dtype::U8 => TensorDtype::U8,
        Dtype::U16 => TensorDtype::U16,
        Dtype::U32 => TensorDtype::U32,
        Dtype::U64 => TensorDtype::U64,
        Dtype::Bool => TensorDtype::BOOL,
    }
}

/// Which of ours a type of safetensors is, if any.
pub(super) fn own_dtype(dtype: TensorDtype) -> Option<Dtype> {
    let mut all = Dtype::ALL.into_iter();
    all.find(|own| tensor_dtype(*own) == dtype)
}

/// Whether every value of `from` is one of `into`: the same type, or a float of more bits in both parts.
pub(super) fn holds_exactly(from: Dtype, into: Dtype) -> bool {
    let wider = matches!(into, Dtype::F32 | Dtype::F64) && from.size() < into.size();
    from == into || (from.is_float() && wider)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_comes_back() {
        assert!(
            Dtype::ALL
                .iter()
                .all(|dtype| own_dtype(tensor_dtype(*dtype)) == Some(*dtype))
        );
        assert_eq!(own_dtype(TensorDtype::C64), None);
    }

    #[test]
    fn only_floats_widen() {
        assert!(holds_exactly(Dtype::BF16, Dtype::F32));
        assert!(holds_exactly(Dtype::F32, Dtype::F64));
        assert!(holds_exactly(Dtype::I8, Dtype::I8));
        assert!(!holds_exactly(Dtype::F32, Dtype::BF16));
        assert!(!holds_exactly(Dtype::F16, Dtype::BF16));
        assert!(!holds_exactly(Dtype::I32, Dtype::F64));
    }
}
