//! Candle's memory as the engine's buffers: lent for reading, opened for writing, and moved between tensors. On a processor or
//! on a CUDA device; what differs there is in `cuda.rs`.

use std::{
    any::Any,
    cell::RefCell,
    ops::{Deref, Range},
    sync::Mutex,
};

use candle_core::{
    CpuStorage, CudaStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor,
    backend::BackendDevice, bail, op::BackpropOp,
};
use fabric_engine::{
    Error, Result as EngineResult,
    buffer::Buffer,
    kernels::{Dtype, Span, SpanMut},
};
use half::{bf16, f16};

use crate::{away, cuda};

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

/// Refuse a device whose memory this build cannot move.
pub(crate) fn check_device(device: &Device) -> Result<()> {
    match device {
        Device::Cpu => Ok(()),
        Device::Cuda(_) if cfg!(feature = "cuda") => Ok(()),
        Device::Cuda(_) => bail!(
            "this program was built without CUDA: build fabric-candle with --features cuda, or use Device::Cpu"
        ),
        Device::Metal(_) => bail!(
            "this version of fabric-candle moves tensors of the CPU and of CUDA devices: use Device::Cpu"
        ),
    }
}

/// A contiguous tensor, lent for reading.
pub(crate) struct Lent<'a, S> {
    place: Place<S>,
    tensor: &'a Tensor,
    range: Range<usize>,
    dtype: Dtype,
}

/// The guard of candle's lock, and what it guards.
enum Place<S> {
    Cpu(S),
    Cuda(cuda::Lent<S>),
}

pub(crate) fn lend(tensor: &Tensor) -> Result<Lent<'_, impl Deref<Target = Storage> + '_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a tensor that is not contiguous cannot be lent");
    };
    let (range, dtype) = (start..end, dtype_of(tensor.dtype())?);
    let place = if tensor.device().is_cpu() {
        Place::Cpu(storage)
    } else {
        check_device(tensor.device())?;
        Place::Cuda(cuda::Lent::new(storage, range.clone(), dtype)?)
    };
    Ok(Lent {
        place,
        tensor,
        range,
        dtype,
    })
}

impl<S: Deref<Target = Storage>> Buffer for Lent<'_, S> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn numel(&self) -> usize {
        self.range.len()
    }
    fn hold(&self) -> Option<Box<dyn Any + Send>> {
        match &self.place {
            Place::Cpu(_) => None,
            // Candle writes no gradient again once it is complete, so that to keep it is to keep it unchanged.
            Place::Cuda(_) => Some(Box::new(self.tensor.clone())),
        }
    }
    fn span(&self) -> Option<Span<'_>> {
        match &self.place {
            Place::Cpu(storage) => match &**storage {
                Storage::Cpu(storage) => span_of(storage, self.range.clone()),
                _ => None,
            },
            Place::Cuda(lent) => Some(lent.span()),
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
        span_of(self.storage, self.range.clone())
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

/// A range of a CPU storage; `None` where there is none, or no type of ours.
pub(crate) fn span_of(storage: &CpuStorage, range: Range<usize>) -> Option<Span<'_>> {
    Some(match storage {
        CpuStorage::F64(values) => Span::of(&values[range]),
        CpuStorage::F32(values) => Span::of(&values[range]),
        CpuStorage::F16(values) => Span::of(&values[range]),
        CpuStorage::BF16(values) => Span::of(&values[range]),
        CpuStorage::U8(values) => Span::of(&values[range]),
        CpuStorage::U32(values) => Span::of(&values[range]),
        CpuStorage::I64(values) => Span::of(&values[range]),
        _ => return None,
    })
}

/// What is done with an open buffer.
pub(crate) type Visit<'a> = dyn FnMut(&mut dyn Buffer) -> EngineResult<()> + 'a;

/// Call `f` with the memory of a tensor.
pub(crate) fn open(tensor: &Tensor, f: &mut Visit<'_>) -> EngineResult<()> {
    struct Opening<'a, 'b> {
        visit: RefCell<&'a mut Visit<'b>>,
        result: RefCell<EngineResult<()>>,
        dtype: Dtype,
    }
    impl Opening<'_, '_> {
        fn visit(&self, buffer: &mut dyn Buffer) {
            *self.result.borrow_mut() = (self.visit.borrow_mut())(buffer);
        }
    }
    impl InplaceOp1 for Opening<'_, '_> {
        fn name(&self) -> &'static str {
            "fabric-open"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            self.visit(&mut Open {
                storage,
                range: whole(layout)?,
                dtype: self.dtype,
            });
            Ok(())
        }
        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
            self.visit(&mut cuda::Open::new(storage, whole(layout)?, self.dtype)?);
            Ok(())
        }
    }
    fn whole(layout: &Layout) -> Result<Range<usize>> {
        match layout.contiguous_offsets() {
            Some((start, end)) => Ok(start..end),
            None => bail!("a tensor that is not contiguous cannot be opened"),
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
pub(crate) fn allocate(device: &Device, dtype: DType, len: usize) -> Result<Storage> {
    if let Device::Cuda(device) = device
        && dtype.is_float()
    {
        return device.zeros_impl(&some(len), dtype).map(Storage::Cuda);
    }
    check_device(device)?;
    on_cpu(dtype, len).map(Storage::Cpu)
}

/// The same, on the CPU.
pub(crate) fn on_cpu(dtype: DType, len: usize) -> Result<CpuStorage> {
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

/// A new tensor, of whatever type, to be written.
pub(crate) fn blank(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let Device::Cuda(device) = device else {
        return Tensor::zeros(shape, dtype, device);
    };
    let memory = device.zeros_impl(&some(shape.iter().product()), dtype)?;
    let (memory, op) = (Storage::Cuda(memory), BackpropOp::none());
    Ok(Tensor::from_storage(memory, shape, op, false))
}

/// The shape of `len` elements in CUDA memory, of which there is none without any.
fn some(len: usize) -> Shape {
    len.max(1).into()
}

/// Take the memory out of a tensor, which keeps its shape; using it is an error from now on.
pub(crate) fn take(tensor: &Tensor) -> Result<Storage> {
    exchange(tensor, away::mark(tensor.device())?)
}

/// A copy of a tensor's values: row-major, in memory of its own.
pub(crate) fn copy(tensor: &Tensor) -> Result<Storage> {
    take(&tensor.detach().force_contiguous()?)
}

/// Put memory into a shell.
pub(crate) fn put(tensor: &Tensor, storage: Storage) -> Result<()> {
    exchange(tensor, storage).map(drop)
}

fn exchange(tensor: &Tensor, storage: Storage) -> Result<Storage> {
    struct Exchange(Mutex<Storage>);
    impl Exchange {
        fn other_place<T>(&self) -> Result<T> {
            bail!("memory is put into a tensor of another device")
        }
    }
    impl InplaceOp1 for Exchange {
        fn name(&self) -> &'static str {
            "fabric-exchange"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
            match &mut *self.0.lock().unwrap_or_else(|held| held.into_inner()) {
                Storage::Cpu(other) => std::mem::swap(storage, other),
                _ => return self.other_place(),
            }
            Ok(())
        }
        fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
            match &mut *self.0.lock().unwrap_or_else(|held| held.into_inner()) {
                Storage::Cuda(other) => std::mem::swap(storage, other),
                _ => return self.other_place(),
            }
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
        let Storage::Cpu(CpuStorage::F32(values)) = &storage else {
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

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn memory_of_a_device_that_this_build_cannot_move_is_refused() {
        let device = Device::Cuda(candle_core::CudaDevice);
        for error in [
            allocate(&device, DType::F32, 4).unwrap_err(),
            blank(&device, DType::U32, &[2, 2]).unwrap_err(),
            away::mark(&device).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("cuda"), "{text}");
        }
        let text = check_device(&device).unwrap_err().to_string();
        assert!(text.contains("--features cuda"), "{text}");
    }
}
