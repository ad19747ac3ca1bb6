//! A part of the graph that is forgotten after the forward and computed again in the backward.

use std::sync::Arc;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, Var,
};
use fabric::model::{Edge, Events, UnitId};

use crate::{
    made::Made,
    shelf::Shelf,
    storage::{allocate, copy},
};

/// Where the backward of a unit begins.
pub(crate) struct Entrance {
    pub(crate) shelf: Arc<Shelf>,
    pub(crate) unit: UnitId,
    pub(crate) events: Arc<dyn Events>,
}

/// `f(x)`, of whose graph only one operation is kept.
pub(crate) fn forget(
    x: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    entrance: Entrance,
) -> Result<Tensor> {
    let output = f(&x.detach())?;
    if !output.track_op() && !x.track_op() {
        return Ok(output); // no gradient passes here
    }
    // Candle keeps an operation only if an argument is tracked, and the input of a first block is not.
    let anchor = Var::new(0f32, x.device())?;
    let again = Again {
        f,
        entrance,
        shape: output.shape().clone(),
        output: Made::new(copy(&output)?),
    };
    x.apply_op2(&anchor, again)
}

/// The whole of a unit as one operation.
struct Again<F> {
    f: F,
    entrance: Entrance,
    shape: Shape,
    output: Made,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> CustomOp2 for Again<F> {
    fn name(&self) -> &'static str {
        "fabric-checkpoint"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((self.output.on_cpu()?, self.shape.clone()))
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((self.output.on_cuda()?, self.shape.clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Entrance {
            shelf,
            unit,
            events,
        } = &self.entrance;
        events
            .unit(*unit, Edge::BackwardEnter)
            .map_err(crate::away::wrapped)?;
        let explain = |error| shelf.explain(error);
        if !x.track_op() {
            let output = (self.f)(x).map_err(explain)?;
            backward_from(&output, grad).map_err(explain)?;
            return Ok((None, None));
        }
        let x = Var::from_tensor(&x.detach())?;
        let output = (self.f)(&x).map_err(explain)?;
        let mut grads = backward_from(&output, grad).map_err(explain)?;
        let grad = match grads.remove(&x) {
            Some(grad) => grad,
            None => x.zeros_like()?, // candle needs some for what it tracks
        };
        Ok((Some(grad), None))
    }
}

/// The backward of `output` whose gradient is `grad`.
fn backward_from(output: &Tensor, grad: &Tensor) -> Result<candle_core::backprop::GradStore> {
    let value = allocate(grad.device(), grad.dtype(), 1)?;
    let seed = Seed {
        grad: grad.clone(),
        value: Made::new(value),
    };
    output.apply_op1(seed)?.backward()
}

/// An operation without a value, whose argument has a given gradient.
struct Seed {
    grad: Tensor,
    value: Made, // some
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "fabric-seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((self.value.on_cpu()?, ().into()))
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((self.value.on_cuda()?, ().into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.grad.clone()))
    }
}
