//! The `VarBuilder`'s side of a model that is being built: makes parameters, and hooks each once.

use std::{cell::RefCell, sync::Arc};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use fabric::model::ParamMeta;

use crate::{shelf::Shelf, storage::dtype_of};

/// Asked of a `VarBuilder` for a tensor that nobody has: see [`whose`].
const WHOSE: &str = "fabric-candle: whose is this?";

thread_local! {
    /// The model whose backend was asked [`WHOSE`], and the prefix under which it was asked.
    static ANSWER: RefCell<Option<(Arc<Shelf>, String)>> = const { RefCell::new(None) };
}

/// The model that takes its parameters from `vb`, and `vb`'s prefix as the model sees it; `None` for a `VarBuilder` of
/// candle's own.
///
/// A `VarBuilder` hides its backend, but hands it every name: the backend knows this one, and leaves its answer beside the
/// call. (A "model that is being built" for each thread would not see which of two `vb` belongs to, nor that a block is
/// built on another thread, nor the names under which a renamed `vb` asks.)
pub(crate) fn whose(vb: &VarBuilder) -> Option<(Arc<Shelf>, String)> {
    ANSWER.take();
    vb.contains_tensor(WHOSE);
    ANSWER.take()
}

pub(crate) struct Backend {
    pub(crate) shelf: Arc<Shelf>,
    /// Parameters get no memory yet.
    pub(crate) deferred: bool,
}

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let ours = self.shelf.device();
        if !device.same_device(ours) {
            bail!(
                "'{name}' is asked for on {device:?}, and the model is built on {ours:?}: all parameters of a model are on \
                 one device"
            );
        }
        if let Some(tensor) = self.tied(name) {
            let (ours, dims) = (tensor.dtype(), tensor.shape());
            if dims != &shape || ours != dtype {
                bail!(
                    "'{name}' is asked for as {dtype:?} {shape:?} and as {ours:?} {dims:?}: a tied parameter has one type \
                     and one shape"
                );
            }
            return Ok(tensor);
        }
        if self.shelf.is_closed() {
            bail!(
                "'{name}' is asked for after the model was built: make all parameters inside fabric_candle::build"
            );
        }
        let meta = ParamMeta::new(name, shape.dims(), dtype_of(dtype)?);
        self.shelf
            .add(meta, dtype, init, self.deferred)
            .map_err(crate::away::wrapped)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        match self.tied(name) {
            Some(tensor) => Ok(tensor),
            None => bail!("'{name}' is asked for without a shape, and was not made before"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        if let Some(prefix) = name.strip_suffix(WHOSE) {
            let prefix = prefix.strip_suffix('.').unwrap_or(prefix).to_owned();
            ANSWER.set(Some((self.shelf.clone(), prefix)));
            return false;
        }
        self.shelf
            .params()
            .iter()
            .any(|param| param.meta.name == name)
    }
}

impl Backend {
    /// The parameter of this name, if there is one; it is tied now.
    fn tied(&self, name: &str) -> Option<Tensor> {
        let mut params = self.shelf.params();
        let param = params.iter_mut().find(|param| param.meta.name == name)?;
        param.tied = true;
        Some(param.tensor.clone())
    }
}
