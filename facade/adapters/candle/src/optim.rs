//! Candle's own optimizers under Fabric: they see their variables and an ordinary gradient store.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var, backprop::GradStore};
use fabric::{
    model::{Gradients, Model, ParamId},
    optim::{Optimizer, OptimizerState},
};
use fabric_engine::{
    Error, Result as EngineResult,
    kernels::{self, Dtype, Element, Span, SpanMut},
};

use crate::{model::CandleModel, shelf::Shelf};

/// An optimizer of candle's (`candle_nn::SGD`, `candle_nn::AdamW`, or any other that implements its trait). Its state is
/// its own secret: to save and restore it, use `fabric::optim`'s optimizers instead. They are also faster on a device, where each
/// gradient goes to this one by way of the host.
pub struct CandleOptimizer<O> {
    inner: O,
    shelf: Arc<Shelf>,
}

impl<O: candle_nn::Optimizer> CandleOptimizer<O> {
    /// `make` gets the model's variables: `CandleOptimizer::new(&model, |vars| candle_nn::SGD::new(vars, 0.1))`.
    ///
    /// # Errors
    /// `make`'s.
    pub fn new<M>(
        model: &CandleModel<M>,
        make: impl FnOnce(Vec<Var>) -> Result<O>,
    ) -> Result<Self> {
        let shelf = model.shelf();
        let inner = shelf
            .with_vars(|params| make(params.iter().map(|param| param.var.clone()).collect()))?;
        Ok(Self { inner, shelf })
    }
}

impl<O: candle_nn::Optimizer + Send> Optimizer for CandleOptimizer<O> {
    fn step(&mut self, model: &dyn Model, grads: &Gradients<'_>) -> EngineResult<()> {
        if self.shelf.events().is_none() {
            return Err(Error::argument(
                "this optimizer has the variables of another model, which was not set up",
                "Make it from the model that it is set up with: CandleOptimizer::new(&model, ...)",
            ));
        }
        let own = self
            .shelf
            .params()
            .iter()
            .map(|param| param.meta.clone())
            .collect::<Vec<_>>();
        if own != model.params() {
            return Err(Error::argument(
                "candle's optimizers update the whole parameters of the model that they were made from, and nothing else",
                "Use fabric::optim's optimizers where ranks update shards (zero1), and make each from its own model",
            ));
        }
        self.shelf.need_all()?;
        let inner = &mut self.inner;
        self.shelf
            .with_vars(|params| {
                let mut store = empty_store()?;
                for (index, param) in params.iter().enumerate() {
                    if let Some(grad) = grads.get(ParamId(index)) {
                        store.insert(&param.var, tensor_of(grad, grads.scale(), &param.var)?);
                    }
                }
                inner.step(&store)
            })
            .map_err(|error| Error::library("a step of candle's optimizer", error))
    }

    fn scales(&self) -> bool {
        true
    }

    fn learning_rate(&self) -> f64 {
        self.inner.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.inner.set_learning_rate(lr);
    }

    fn state(&self, _: &dyn Model) -> EngineResult<OptimizerState> {
        Err(secret())
    }

    fn load_state(&mut self, _: &dyn Model, _: OptimizerState) -> EngineResult<()> {
        Err(secret())
    }
}

fn secret() -> Error {
    Error::argument(
        "candle's optimizers hide their state, so that it cannot be saved",
        "Use fabric::optim::AdamW or Sgd, or leave the optimizer out of the State",
    )
}

/// Candle has no public constructor of an empty store, but every backward returns one.
fn empty_store() -> Result<GradStore> {
    let seed = Var::new(0f32, &Device::Cpu)?;
    let mut store = seed.as_tensor().affine(1.0, 0.0)?.backward()?;
    store.remove(&seed);
    Ok(store)
}

/// A copy of a gradient times `scale`, in the variable's type and shape.
fn tensor_of(grad: Span<'_>, scale: f64, var: &Var) -> Result<Tensor> {
    fn copy<T: Element + candle_core::WithDType>(
        grad: Span<'_>,
        scale: f64,
        var: &Var,
    ) -> Result<Tensor> {
        let mut values = vec![<T as candle_core::WithDType>::from_f64(0.0); grad.len()];
        kernels::cast_scaled(grad, SpanMut::of(&mut values), scale)
            .map_err(crate::away::wrapped)?;
        Tensor::from_vec(values, var.shape(), var.device())
    }
    match (var.dtype(), grad.dtype()) {
        (DType::F64, _) => copy::<f64>(grad, scale, var),
        (_, Dtype::F64) => copy::<f64>(grad, scale, var)?.to_dtype(var.dtype()),
        _ => copy::<f32>(grad, scale, var)?.to_dtype(var.dtype()),
    }
}
