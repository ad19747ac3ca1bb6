//! Candle's CPU memory as the engine's buffers: lent for reading, opened for writing, and moved between tensors.

use std::{
    cell::RefCell,
    ops::{Deref, Range},
    sync::Mutex,
};

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use fabric_engine::{
    Error, Result as EngineResult,
    buffer::Buffer,
    kernels::{Dtype, Span, SpanMut},
};
use half::{bf16, f16};

use crate::away;

/// The engine's name of a candle type.
pub(crate) fn dtype_of(dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::U8 => Dtype::U8,
        DType::U32 => Dtype::U32,
        DType::I64 => Dtype::I64,
        other => bail!("parameters of type {other:?} are not supported: use f32, f64, bf16 or f16"),
    })
}

/// A contiguous CPU tensor, lent for reading.
pub(crate) struct Lent<S> {
    storage: S, // the guard of candle's lock
    range: Range<usize>,
    dtype: Dtype,
}

pub(crate) fn lend(tensor: &Tensor) -> Result<Lent<impl Deref<Target = Storage> + '_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a gradient that is not contiguous cannot be lent");
    };
    Ok(Lent {
        storage,
        range: start..end,
        dtype: dtype_of(tensor.dtype())?,
    })
}

impl<S: Deref<Target = Storage>> Buffer for Lent<S> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn numel(&self) -> usize {
        self.range.len()
    }
    fn span(&self) -> Option<Span<'_>> {
        let range = self.range.clone();
        let Storage::Cpu(storage) = &*self.storage else {
            return None;
        };
        match storage {
            CpuStorage::F64(values) => Some(Span::of(&values[range])),
            CpuStorage::F32(values) => Some(Span::of(&values[range])),
            CpuStorage::F16(values) => Some(Span::of(&values[range])),
            CpuStorage::BF16(values) => Some(Span::of(&values[range])),
            CpuStorage::U8(values) => Some(Span::of(&values[range])),
            CpuStorage::U32(values) => Some(Span::of(&values[range])),
            CpuStorage::I64(values) => Some(Span::of(&values[range])),
            _ => None,
        }
    }
}

/// A CPU storage, open for writing.
struct Open<'a> {
    storage: &'a mut CpuStorage,
    range: Range<usize>,
    dtype: Dtype,
}

impl Buffer for Open<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn numel(&self) -> usize {
        self.range.len()
    }
    fn span(&self) -> Option<Span<'_>> {
        let range = self.range.clone();
        match &*self.storage {
            CpuStorage::F64(values) => Some(Span::of(&values[range])),
            CpuStorage::F32(values) => Some(Span::of(&values[range])),
            CpuStorage::F16(values) => Some(Span::of(&values[range])),
            CpuStorage::BF16(values) => Some(Span::of(&values[range])),
            CpuStorage::U8(values) => Some(Span::of(&values[range])),
            CpuStorage::U32(values) => Some(Span::of(&values[range])),
            CpuStorage::I64(values) => Some(Span::of(&values[range])),
            _ => None,
        }
    }
    fn span_mut(&mut self) -> Option<SpanMut<'_>> {
        let range = self.range.clone();
        match &mut *self.storage {
            CpuStorage::F64(values) => Some(SpanMut::of(&mut values[range])),
            CpuStorage::F32(values) => Some(SpanMut::of(&mut values[range])),
            CpuStorage::F16(values) => Some(SpanMut::of(&mut values[range])),
            CpuStorage::BF16(values) => Some(SpanMut::of(&mut values[range])),
            CpuStorage::U8(values) => Some(SpanMut::of(&mut values[range])),
            CpuStorage::U32(values) => Some(SpanMut::of(&mut values[range])),
            CpuStorage::I64(values) => Some(SpanMut::of(&mut values[range])),
            _ => None,
        }
    }
}

/// What is done with an open buffer.
pub(crate) type Visit<'a> = dyn FnMut(&mut dyn Buffer) -> EngineResult<()> + 'a;

/// Call `f` with the memory of a CPU tensor.
pub(crate) fn open(tensor: &Tensor, f: &mut Visit<'_>) -> EngineResult<()> {
    struct Opening<'a, 'b> {
        visit: RefCell<&'a mut Visit<'b>>,
        result: RefCell<EngineResult<()>>,
        dtype: Dtype,
    }
    impl InplaceOp1 for Opening<'_, '_> {
        fn name(&self) -> &'static str {
            "fabric-open"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let Some((start, end)) = layout.contiguous_offsets() else {
                bail!("a parameter that is not contiguous");
            };
            let mut buffer = Open {
                storage,
                range: start..end,
                dtype: self.dtype,
            };
            *self.result.borrow_mut() = (self.visit.borrow_mut())(&mut buffer);
            Ok(())
        }
    }
    let library = |error| Error::library("open a candle tensor", error);
    let dtype = dtype_of(tensor.dtype()).map_err(library)?;
    let opening = Opening {
        visit: RefCell::new(f),
        result: RefCell::new(Ok(())),
        dtype,
    };
    tensor.inplace_op1(&opening).map_err(library)?;
    opening.result.into_inner()
}

/// New memory of zeros, in a type that parameters can have.
pub(crate) fn allocate(dtype: DType, len: usize) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F64 => CpuStorage::F64(vec![0.0; len]),
        DType::F32 => CpuStorage::F32(vec![0.0; len]),
        DType::F16 => CpuStorage::F16(vec![f16::ZERO; len]),
        DType::BF16 => CpuStorage::BF16(vec![bf16::ZERO; len]),
        other => bail!(
            "trainable parameters of type {other:?} are not supported: use f32, f64, bf16 or f16"
        ),
    })
}

/// Take the memory out of a CPU tensor, which keeps its shape; using it is an error from now on.
pub(crate) fn take(tensor: &Tensor) -> Result<CpuStorage> {
    exchange(tensor, away::mark())
}

/// A copy of a tensor's values: row-major, in memory of its own.
pub(crate) fn copy(tensor: &Tensor) -> Result<CpuStorage> {
    take(&tensor.detach().force_contiguous()?)
}

/// Put memory into a shell.
pub(crate) fn put(tensor: &Tensor, storage: CpuStorage) -> Result<()> {
    exchange(tensor, storage).map(drop)
}

fn exchange(tensor: &Tensor, storage: CpuStorage) -> Result<CpuStorage> {
    struct Exchange(Mutex<CpuStorage>);
    impl InplaceOp1 for Exchange {
        fn name(&self) -> &'static str {
            "fabric-exchange"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
            std::mem::swap(
                storage,
                &mut *self.0.lock().unwrap_or_else(|held| held.into_inner()),
            );
            Ok(())
        }
    }
    let exchange = Exchange(Mutex::new(storage));
    tensor.inplace_op1(&exchange)?;
    Ok(exchange
        .0
        .into_inner()
        .unwrap_or_else(|held| held.into_inner()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn memory_moves_between_tensors_without_a_copy() {
        let var = Var::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
        let storage = take(&var).unwrap();
        let CpuStorage::F32(values) = &storage else {
            panic!("f32")
        };
        let address = values.as_ptr();
        let other = Var::new(&[0f32; 3], &Device::Cpu).unwrap();
        put(&other, storage).unwrap();
        assert_eq!(other.to_vec1::<f32>().unwrap(), [1.0, 2.0, 3.0]);
        let (guard, _) = other.storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(values)) = &*guard else {
            panic!("f32")
        };
        assert_eq!(values.as_ptr(), address);
    }

    #[test]
    fn a_tensor_opens_for_writing_where_it_lies() {
        let tensor = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        open(&tensor, &mut |buffer| {
            assert_eq!((buffer.numel(), buffer.dtype()), (4, Dtype::F32));
            buffer.write(1..3, Span::of(&[7f32, 8.0]))
        })
        .unwrap();
        assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[1.0, 7.0], [8.0, 4.0]]);
    }

    #[test]
    fn a_slice_of_a_tensor_is_lent_at_its_offset() {
        let tensor = Tensor::new(&[[1f64, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let row = tensor.narrow(0, 1, 1).unwrap();
        let mut into = [0f64; 2];
        lend(&row)
            .unwrap()
            .read(0..2, SpanMut::of(&mut into))
            .unwrap();
        assert_eq!(into, [3.0, 4.0]);
        assert!(lend(&tensor.t().unwrap()).is_err());
    }
}
