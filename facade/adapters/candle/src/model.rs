//! A candle model as Fabric's: built through a `VarBuilder` of ours, so that its parameters are known and hooked.

use std::{borrow::Borrow, ops::Deref, sync::Arc};

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::VarBuilder;
use fabric::model::{Backward, Events, Model, ParamId, ParamMeta, UnitId};
use fabric_engine::{Error, Result as EngineResult, kernels::Memory};

use crate::{
    away,
    backend::Backend,
    shelf::{Param, Shelf},
    storage::Visit,
};

/// What to do about a parameter that no gradient reached: the operations of candle 0.11 that cut gradients silently.
pub const UNUSED_HINT: &str = "Check that the loss depends on it, and look for operations of candle that cut gradients \
     without a word: LayerNorm's and RmsNorm's forward (write the norm out, or use RmsNorm::forward_diff), \
     ops::layer_norm, ops::rms_norm, ops::softmax_last_dim (use ops::softmax), ops::sdpa, and rotary_emb::rope, \
     rope_i and rope_thd (use rope_slow), attention::flash_attn on the CPU, ConcatKvCache and InterleavedKvCache, and \
     quantized layers";

/// Build a model: `f` gets a `VarBuilder` from which unmodified candle-nn code takes its parameters. Their first values
/// are decided by `fabric.seed_everything` and their names, whatever the device. A name that is asked for twice is one parameter
/// (tied). They are all on `device`, which is to be the rank's: `fabric.tensor_device()` ([`CandleFabric`](crate::CandleFabric)).
///
/// # Errors
/// `f`'s, or candle's; for a device of Metal's, and in a build without the feature `cuda` for one of CUDA's; and for [`Unit`](crate::Unit)s that share a parameter or have none.
pub fn build<M>(
    device: &Device,
    dtype: DType,
    f: impl FnOnce(VarBuilder<'static>) -> Result<M>,
) -> Result<CandleModel<M>> {
    make(device, dtype, false, f)
}

/// [`build`], but parameters get their memory and their values, the same, when `fabric.setup` asks for them: a model that
/// is larger than this machine's memory can be built for a strategy that shards it. Until then using it is an error. The
/// seed is the one of now.
///
/// # Errors
/// As [`build`].
pub fn build_deferred<M>(
    device: &Device,
    dtype: DType,
    f: impl FnOnce(VarBuilder<'static>) -> Result<M>,
) -> Result<CandleModel<M>> {
    make(device, dtype, true, f)
}

fn make<M>(
    device: &Device,
    dtype: DType,
    deferred: bool,
    f: impl FnOnce(VarBuilder<'static>) -> Result<M>,
) -> Result<CandleModel<M>> {
    let shelf = Arc::new(Shelf::new(device)?);
    let backend = Box::new(Backend {
        shelf: shelf.clone(),
        deferred,
    });
    let vb = VarBuilder::from_backend(backend, dtype, device.clone());
    let module = f(vb).map_err(|error| shelf.explain(error))?;
    shelf.close();
    let units = shelf.units().clone();
    let mut params = shelf.params();
    assign(&mut params, &units)?;
    let metas = params.iter().map(|param| param.meta.clone()).collect();
    drop(params);
    Ok(CandleModel {
        module,
        metas,
        units,
        shelf,
    })
}

/// Assign parameters to units, by name.
fn assign(params: &mut [Param], units: &[String]) -> Result<()> {
    let mut empty = vec![true; units.len()];
    for param in params {
        let (tied, meta) = (param.tied, &mut param.meta);
        let mut owners = (0..units.len()).filter(|unit| is_under(&meta.name, &units[*unit]));
        let (owner, second) = (owners.next(), owners.next());
        if let (Some(one), Some(other)) = (owner, second) {
            bail!(
                "'{}' is in two units, '{}' and '{}': declare a Unit for the one or for the other, not for both",
                meta.name,
                units[one],
                units[other]
            );
        }
        let Some(owner) = owner else {
            continue;
        };
        empty[owner] = false;
        meta.unit = Some(UnitId(owner));
        if tied {
            meta.tied.push(None); // by whom it was asked for again cannot be seen: the root always has it
        }
    }
    match empty.iter().position(|empty| *empty) {
        None => Ok(()),
        Some(unit) => bail!(
            "the unit '{}' has no parameter: give Unit::new the VarBuilder that its parameters are taken from",
            units[unit]
        ),
    }
}

/// Whether a name lies under a prefix, by whole components: "block.1.up" under "block.1", "block.10.up" not.
fn is_under(name: &str, prefix: &str) -> bool {
    let rest = name.strip_prefix(prefix);
    rest.is_some_and(|rest| rest.starts_with('.'))
}

/// A candle model whose parameters are known to Fabric. It is the model (`Deref`).
pub struct CandleModel<M> {
    module: M,
    metas: Vec<ParamMeta>,
    units: Vec<String>,
    shelf: Arc<Shelf>,
}

impl<M> CandleModel<M> {
    /// Run `f` with the model's variables, by name and holding their memory: for whatever in candle wants `Var`s. Do
    /// not run the model inside, and do not keep the variables' values: they are empty again afterwards.
    ///
    /// # Errors
    /// `f`'s; and, before anything is moved, inside another `with_vars` of the same model, and while a parameter has no
    /// memory, because it is deferred or sharded.
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

    fn with(&self, param: ParamId, f: &mut Visit<'_>) -> EngineResult<()> {
        self.shelf.with(param, f)
    }

    fn memory(&self) -> Option<Memory> {
        Some(self.shelf.memory())
    }

    fn units(&self) -> &[String] {
        &self.units
    }

    fn initialize(&self, param: ParamId) -> EngineResult<()> {
        self.shelf.initialize(param)
    }

    fn release(&self, param: ParamId) -> EngineResult<()> {
        self.shelf.release(param)
    }

    fn acquire(&self, param: ParamId) -> EngineResult<()> {
        self.shelf.acquire(param)
    }

    fn attach(&self, events: Arc<dyn Events>) {
        // fabric.setup takes the model by value, so that there is no second time.
        let _ = self.shelf.outlet.set(events);
    }

    fn unused_hint(&self) -> &str {
        UNUSED_HINT
    }
}

/// A loss of candle's, for `fabric.backward`: borrowed, or owned where a function makes it and gives it away.
pub struct Loss<T>(pub T);

impl<T: Borrow<Tensor>> Backward for Loss<T> {
    fn backward(self, scale: f32) -> EngineResult<()> {
        let library = |error| {
            Error::library(
                "candle's backward",
                away::explain(error, || away::HINT.into()),
            )
        };
        let loss = self.0.borrow();
        let scaled = if scale == 1.0 {
            loss.clone()
        } else {
            loss.affine(f64::from(scale), 0.0).map_err(library)?
        };
        scaled.backward().map(drop).map_err(library)
    }
}
