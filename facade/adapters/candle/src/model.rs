//! A candle model as Fabric's: built through a `VarBuilder` of ours, so that its parameters are known and hooked.

use std::{
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use fabric::model::{Backward, Events, Model, ParamId, ParamMeta};
use fabric_engine::{Error, Result as EngineResult, buffer::Buffer};

use crate::{
    hook::{Outlet, hook},
    init,
    storage::{dtype_of, open, put, take},
};

/// What to do about a parameter that no gradient reached: the operations of candle 0.11 that cut gradients silently.
pub const UNUSED_HINT: &str = "Check that the loss depends on it, and look for operations of candle that cut gradients \
     without a word: LayerNorm's and RmsNorm's forward (write the norm out, or use RmsNorm::forward_diff), \
     ops::layer_norm, ops::rms_norm, ops::softmax_last_dim (use ops::softmax), ops::sdpa, and rotary_emb::rope, \
     rope_i and rope_thd (use rope_slow), attention::flash_attn on the CPU, ConcatKvCache and InterleavedKvCache, and \
     quantized layers";

/// Build a model: `f` gets a `VarBuilder` from which unmodified candle-nn code takes its parameters. Their first values
/// are decided by `fabric.seed_everything` and their names. A name that is asked for twice is one parameter (tied).
///
/// # Errors
/// `f`'s, or candle's; and for a device that is not the CPU.
pub fn build<M>(
    device: &Device,
    dtype: DType,
    f: impl FnOnce(VarBuilder<'static>) -> Result<M>,
) -> Result<CandleModel<M>> {
    if !device.is_cpu() {
        bail!("this version of fabric-candle moves tensors of the CPU: use Device::Cpu");
    }
    let shelf = Arc::new(Shelf::default());
    let backend = Box::new(Backend(shelf.clone()));
    let module = f(VarBuilder::from_backend(backend, dtype, device.clone()))?;
    let metas = shelf
        .params()
        .iter()
        .map(|param| param.meta.clone())
        .collect::<Vec<_>>();
    shelf.close();
    Ok(CandleModel {
        module,
        metas,
        shelf,
    })
}

/// A candle model whose parameters are known to Fabric. It is the model (`Deref`).
pub struct CandleModel<M> {
    module: M,
    metas: Vec<ParamMeta>,
    shelf: Arc<Shelf>,
}

/// The parameters of one model, and where their gradients are reported.
#[derive(Default)]
pub(crate) struct Shelf {
    params: Mutex<Vec<Param>>,
    outlet: Outlet,
    closed: AtomicBool, // the model is built: no further parameter
    lent: AtomicBool,   // the variables have the memory
}

/// One parameter: the shell that candle's optimizers know, and the hooked tensor that has the memory.
#[derive(Clone)]
pub(crate) struct Param {
    pub(crate) meta: ParamMeta,
    pub(crate) var: Var,
    tensor: Tensor,
}

impl Shelf {
    pub(crate) fn params(&self) -> MutexGuard<'_, Vec<Param>> {
        self.params.lock().unwrap_or_else(|held| held.into_inner())
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(crate) fn is_set_up(&self) -> bool {
        self.outlet.get().is_some()
    }

    /// Run `f` while the variables hold their memory.
    pub(crate) fn with_vars<T>(&self, f: impl FnOnce(&[Param]) -> Result<T>) -> Result<T> {
        if self.lent.swap(true, Ordering::AcqRel) {
            bail!(
                "the variables have their memory already: with_vars, or a step of candle's optimizer, ran inside with_vars"
            );
        }
        let params = self.params().clone();
        let mut lent = Lending {
            shelf: self,
            params: &params,
            moved: 0,
        };
        for param in &params {
            put(&param.var, take(&param.tensor)?)?;
            lent.moved += 1;
        }
        let result = f(&params);
        drop(lent);
        result
    }
}

/// Gives the memory back to the hooked tensors, also when `f` panics.
struct Lending<'a> {
    shelf: &'a Shelf,
    params: &'a [Param],
    moved: usize,
}

impl Drop for Lending<'_> {
    fn drop(&mut self) {
        for param in &self.params[..self.moved] {
            let back = take(&param.var).and_then(|memory| put(&param.tensor, memory));
            back.expect("memory that was moved out of a tensor moves back into it");
        }
        self.shelf.lent.store(false, Ordering::Release);
    }
}

impl<M> CandleModel<M> {
    /// Run `f` with the model's variables, by name and holding their memory: for whatever in candle wants `Var`s. Do
    /// not run the model inside, and do not keep the variables' values: they are empty again afterwards.
    ///
    /// # Errors
    /// `f`'s; and inside another `with_vars` of the same model, before anything is moved.
    pub fn with_vars<T>(&self, f: impl FnOnce(&[(String, Var)]) -> Result<T>) -> Result<T> {
        self.shelf.with_vars(|params| {
            let vars = params
                .iter()
                .map(|param| (param.meta.name.clone(), param.var.clone()));
            f(&vars.collect::<Vec<_>>())
        })
    }

    pub(crate) fn shelf(&self) -> Arc<Shelf> {
        self.shelf.clone()
    }
}

impl<M> Deref for CandleModel<M> {
    type Target = M;
    fn deref(&self) -> &M {
        &self.module
    }
}

impl<M: Send + Sync + 'static> Model for CandleModel<M> {
    fn params(&self) -> &[ParamMeta] {
        &self.metas
    }

    fn with(
        &self,
        param: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> EngineResult<()>,
    ) -> EngineResult<()> {
        if self.shelf.lent.load(Ordering::Acquire) {
            return Err(Error::argument(
                format!(
                    "'{}' is wanted while its variable has its memory",
                    self.metas[param.0].name
                ),
                "Save, load, clip and step outside with_vars",
            ));
        }
        let tensor = self.shelf.params()[param.0].tensor.clone();
        open(&tensor, f)
    }

    fn attach(&self, events: Arc<dyn Events>) {
        // fabric.setup takes the model by value, so that there is no second time.
        let _ = self.shelf.outlet.set(events);
    }

    fn unused_hint(&self) -> &str {
        UNUSED_HINT
    }
}

/// The `VarBuilder`'s side: makes parameters, and hooks each once.
struct Backend(Arc<Shelf>);

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let mut params = self.0.params();
        if let Some(param) = params.iter().find(|param| param.meta.name == name) {
            if param.tensor.shape() != &shape || param.tensor.dtype() != dtype {
                bail!(
                    "'{name}' is asked for as {dtype:?} {shape:?} and as {:?} {:?}: a tied parameter has one type and one \
                     shape",
                    param.tensor.dtype(),
                    param.tensor.shape()
                );
            }
            return Ok(param.tensor.clone());
        }
        if self.0.closed.load(Ordering::Acquire) {
            bail!(
                "'{name}' is asked for after the model was built: make all parameters inside fabric_candle::build"
            );
        }
        let meta = ParamMeta::new(name, shape.dims(), dtype_of(dtype)?);
        let var = Var::from_tensor(&init::value(init, name, &shape, dtype, device)?)?;
        let tensor = hook(&var, ParamId(params.len()), self.0.outlet.clone())?;
        params.push(Param {
            meta,
            var,
            tensor: tensor.clone(),
        });
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        match self.0.params().iter().find(|param| param.meta.name == name) {
            Some(param) => Ok(param.tensor.clone()),
            None => bail!("'{name}' is asked for without a shape, and was not made before"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.params().iter().any(|param| param.meta.name == name)
    }
}

/// A loss of candle's, for `fabric.backward`.
pub struct Loss<'a>(pub &'a Tensor);

impl Backward for Loss<'_> {
    fn backward(self, scale: f32) -> EngineResult<()> {
        let library = |error| Error::library("candle's backward", error);
        let scaled = if scale == 1.0 {
            self.0.clone()
        } else {
            self.0.affine(f64::from(scale), 0.0).map_err(library)?
        };
        scaled.backward().map(drop).map_err(library)
    }
}
