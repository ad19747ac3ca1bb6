//! Fabric's verbs on candle's tensors: building models in the precision's types, casting, and collectives, through which
//! gradients can flow.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Result as CandleResult, Shape,
    Tensor,
};
use candle_nn::VarBuilder;
use fabric::{
    Error, Fabric, ReduceOp, Result, bail,
    engine::{buffer::Slab, kernels::Dtype},
};

use crate::{
    CandleModel, away, build, build_deferred, cuda,
    made::Made,
    storage::{blank, dtype_of, lend, open, take},
};

/// What a [`Fabric`] can do with candle's tensors. What comes out of a collective is on the device of what went in.
///
/// ```
/// use candle_core::Tensor;
/// use fabric::{Fabric, ReduceOp};
/// use fabric_candle::CandleFabric;
///
/// let fabric = Fabric::builder().devices(2).build()?;
/// fabric.launch_threads(|fabric| {
///     let mine = Tensor::new(&[fabric.global_rank() as f32, 5.0], &fabric.tensor_device()?)?;
///     let all = fabric.all_gather_tensor(&mine, false)?;
///     assert_eq!(all.to_vec2::<f32>()?, [[0.0, 5.0], [1.0, 5.0]]);
///     let mean = fabric.all_reduce_tensor(&mine, ReduceOp::Avg)?;
///     assert_eq!(mean.to_vec1::<f32>()?, [0.5, 5.0]);
///     Ok(())
/// })?;
/// # Ok::<(), fabric::Error>(())
/// ```
pub trait CandleFabric {
    /// The device of this rank's tensors: for [`Fabric::device`]'s `cuda:0`, candle's, which this process opens once, on one
    /// stream for all its threads; the CPU where ranks compute in the host's memory.
    ///
    /// # Errors
    /// When the device cannot be opened.
    fn tensor_device(&self) -> Result<Device>;

    /// The type that the precision computes in.
    fn compute_dtype(&self) -> DType;

    /// Build a model on this rank's device, in the type that the precision computes in: [`build`].
    ///
    /// # Errors
    /// `module`'s, and the device's.
    fn init_module<M>(
        &self,
        module: impl FnOnce(VarBuilder<'_>) -> CandleResult<M>,
    ) -> Result<CandleModel<M>>;

    /// The same without memory before `fabric.setup`, which gives each rank its part alone: [`build_deferred`].
    ///
    /// # Errors
    /// `module`'s, and the device's.
    fn init_module_empty<M>(
        &self,
        module: impl FnOnce(VarBuilder<'_>) -> CandleResult<M>,
    ) -> Result<CandleModel<M>>;

    /// A tensor of zeros on this rank's device, in the type that the precision computes in.
    ///
    /// # Errors
    /// Candle's, and the device's.
    fn init_tensor(&self, shape: impl Into<Shape>) -> Result<Tensor>;

    /// A model's input: floats in the type that the precision computes in, anything else as it is.
    ///
    /// # Errors
    /// Candle's.
    fn cast_input(&self, input: &Tensor) -> Result<Tensor>;

    /// A model's output: floats in the type that the precision returns (f32 where it is mixed), anything else as it is.
    ///
    /// # Errors
    /// Candle's.
    fn cast_output(&self, output: &Tensor) -> Result<Tensor>;

    /// Run `forward` in the precision: its input is cast before, its output after.
    ///
    /// # Errors
    /// `forward`'s.
    fn autocast(
        &self,
        input: &Tensor,
        forward: impl FnOnce(&Tensor) -> CandleResult<Tensor>,
    ) -> Result<Tensor>;

    /// Every rank's tensor, of one shape, with a first dimension more: the rank. With `sync_grads`, gradients flow back: that
    /// of a rank's tensor is the sum of all ranks' gradients of it, so that every rank must run the backward.
    ///
    /// # Errors
    /// As [`Fabric::all_gather`].
    fn all_gather_tensor(&self, tensor: &Tensor, sync_grads: bool) -> Result<Tensor>;

    /// Every rank's tensor, one behind the other in their first dimension, whose size may differ.
    ///
    /// # Errors
    /// As [`Fabric::all_gather`].
    fn all_gather_uneven_tensor(&self, tensor: &Tensor) -> Result<Tensor>;

    /// The fold of all ranks' tensors.
    ///
    /// # Errors
    /// As [`Fabric::all_reduce`].
    fn all_reduce_tensor(&self, tensor: &Tensor, op: ReduceOp) -> Result<Tensor>;

    /// Rank `src`'s tensor, on every rank; the others give one of its shape and type.
    ///
    /// # Errors
    /// As [`Fabric::broadcast_buffer`].
    fn broadcast_tensor(&self, tensor: &Tensor, src: usize) -> Result<Tensor>;
}

impl CandleFabric for Fabric {
    fn tensor_device(&self) -> Result<Device> {
        let device = self.device();
        match device.index {
            Some(index) if device.accelerator == "cuda" => Ok(cuda::tensor_device(index)?),
            _ => Ok(Device::Cpu),
        }
    }

    fn compute_dtype(&self) -> DType {
        float(self.precision().policy().param)
    }

    fn init_module<M>(
        &self,
        module: impl FnOnce(VarBuilder<'_>) -> CandleResult<M>,
    ) -> Result<CandleModel<M>> {
        Ok(build(&self.tensor_device()?, self.compute_dtype(), module)?)
    }

    fn init_module_empty<M>(
        &self,
        module: impl FnOnce(VarBuilder<'_>) -> CandleResult<M>,
    ) -> Result<CandleModel<M>> {
        let (device, dtype) = (self.tensor_device()?, self.compute_dtype());
        Ok(build_deferred(&device, dtype, module)?)
    }

    fn init_tensor(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let (device, dtype) = (self.tensor_device()?, self.compute_dtype());
        Ok(Tensor::zeros(shape, dtype, &device)?)
    }

    fn cast_input(&self, input: &Tensor) -> Result<Tensor> {
        cast(input, self.compute_dtype())
    }

    fn cast_output(&self, output: &Tensor) -> Result<Tensor> {
        cast(output, float(self.precision().policy().output))
    }

    fn autocast(
        &self,
        input: &Tensor,
        forward: impl FnOnce(&Tensor) -> CandleResult<Tensor>,
    ) -> Result<Tensor> {
        self.cast_output(&forward(&self.cast_input(input)?)?)
    }

    fn all_gather_tensor(&self, tensor: &Tensor, sync_grads: bool) -> Result<Tensor> {
        let own = tensor.contiguous()?;
        let all = self.all_gather(&lend(&own)?)?;
        let shape = [&[self.world_size()], own.dims()].concat();
        let all = tensor_of(&all, &shape, own.device())?;
        if !sync_grads || own.elem_count() == 0 {
            return Ok(all);
        }
        let gathered = Gathered {
            all: Made::new(take(&all)?),
            shape: shape.into(),
            fabric: self.clone(),
        };
        Ok(own.apply_op1(gathered)?)
    }

    fn all_gather_uneven_tensor(&self, tensor: &Tensor) -> Result<Tensor> {
        let own = tensor.contiguous()?;
        let Some((_, row)) = own.dims().split_first() else {
            bail!("a tensor without dimensions has no first one: use all_gather_tensor");
        };
        let (all, _) = self.all_gather_uneven(&lend(&own)?)?;
        let row_numel: usize = row.iter().product();
        let rows = all.numel().checked_div(row_numel).unwrap_or(0);
        tensor_of(&all, &[&[rows], row].concat(), own.device())
    }

    fn all_reduce_tensor(&self, tensor: &Tensor, op: ReduceOp) -> Result<Tensor> {
        let own = tensor.detach().force_contiguous()?;
        let mut result = Ok(());
        open(&own, &mut |buffer| {
            result = self.all_reduce(buffer, op);
            Ok(())
        })?;
        result.map(|()| own)
    }

    fn broadcast_tensor(&self, tensor: &Tensor, src: usize) -> Result<Tensor> {
        let own = tensor.detach().force_contiguous()?;
        let mut result = Ok(());
        open(&own, &mut |buffer| {
            result = self.broadcast_buffer(buffer, src);
            Ok(())
        })?;
        result.map(|()| own)
    }
}

/// The operation whose result is every rank's argument, and whose backward brings every rank's gradient of this one.
struct Gathered {
    all: Made,
    shape: Shape,
    fabric: Fabric,
}

impl CustomOp1 for Gathered {
    fn name(&self) -> &'static str {
        "fabric-all-gather"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        Ok((self.all.on_cpu()?, self.shape.clone()))
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        Ok((self.all.on_cuda()?, self.shape.clone()))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let own = self.fabric.reduce_scatter(&lend(&grad)?, ReduceOp::Sum);
        let own = own.and_then(|own| tensor_of(&own, arg.dims(), arg.device()));
        own.map(Some)
            .map_err(|error| away::wrapped(error.to_string()))
    }
}

fn cast(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(match tensor.dtype().is_float() {
        true => tensor.to_dtype(dtype)?,
        false => tensor.clone(),
    })
}

/// Candle's name of a type.
fn candle_dtype(dtype: Dtype) -> Option<DType> {
    let all = [
        DType::F64,
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::U8,
        DType::U32,
        DType::I64,
    ];
    let is_it = |known: &DType| dtype_of(*known).is_ok_and(|known| known == dtype);
    all.into_iter().find(is_it)
}

/// Candle's name of a precision's type.
fn float(dtype: Dtype) -> DType {
    candle_dtype(dtype).unwrap_or(DType::F32) // precisions have candle's four floats alone
}

/// A tensor on `device` of a slab's values, wherever they lie.
fn tensor_of(slab: &Slab, shape: &[usize], device: &Device) -> Result<Tensor> {
    let Some(dtype) = candle_dtype(slab.dtype()) else {
        return Err(Error::argument(
            format!("candle has no tensors of {}", slab.dtype()),
            "Gather floats, u8, u32 or i64",
        ));
    };
    let (tensor, all) = (blank(device, dtype, shape)?, 0..slab.numel());
    if all.is_empty() {
        return Ok(tensor); // candle opens none whose strides are 0
    }
    open(&tensor, &mut |buffer| {
        buffer.write(all.clone(), slab.part(all.clone()))
    })?;
    Ok(tensor)
}
