//! The identity operation on a parameter whose backward reports the gradient. Made once, when the model is built; the
//! same node of the graph serves every step.

use std::sync::{Arc, OnceLock};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var,
    backend::BackendStorage, op::BackpropOp,
};
use fabric::model::{Events, Keep, ParamId};

use crate::storage::{allocate, lend, take};

/// Where gradients are reported; empty until the model is set up.
pub(crate) type Outlet = Arc<OnceLock<Arc<dyn Events>>>;

struct Hook {
    param: ParamId,
    outlet: Outlet,
}

/// A variable, and the hooked tensor that the model computes with. Neither has memory: it is put into the one or the
/// other. (A copy in each would go stale at the first optimizer step.)
pub(crate) fn hooked(
    device: &Device,
    shape: &[usize],
    dtype: DType,
    param: ParamId,
    outlet: Outlet,
) -> Result<(Var, Tensor)> {
    let empty = allocate(device, dtype, 0)?;
    let shell = Tensor::from_storage(empty, shape, BackpropOp::none(), true);
    let var = Var::from_tensor(&shell)?;
    let tensor = var.apply_op1(Hook { param, outlet })?;
    take(&var)?;
    take(&tensor)?;
    Ok((var, tensor))
}

impl CustomOp1 for Hook {
    fn name(&self) -> &'static str {
        "fabric-gradient-ready"
    }

    fn cpu_fwd(&self, empty: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((empty.clone(), layout.shape().clone()))
    }

    fn cuda_fwd(&self, empty: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((empty.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Some(events) = self.outlet.get() else {
            return Ok(Some(grad.clone())); // not set up: candle as usual
        };
        let grad = grad.contiguous()?;
        // The argument is a variable, so that nothing need be stored for it: the engine holds the gradient.
        let keep = events
            .ready(self.param, &lend(&grad)?)
            .map_err(crate::away::wrapped)?;
        Ok((keep == Keep::Keep).then_some(grad))
    }
}
