//! The identity operation on a parameter whose backward reports the gradient. Made once, when the model is built; the
//! same node of the graph serves every step.

use std::sync::{Arc, Mutex, OnceLock};

use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor, Var, bail};
use fabric::model::{Events, Keep, ParamId};

use crate::storage::{lend, take};

/// Where gradients are reported; empty until the model is set up.
pub(crate) type Outlet = Arc<OnceLock<Arc<dyn Events>>>;

struct Hook {
    param: ParamId,
    outlet: Outlet,
    memory: Mutex<Option<CpuStorage>>,
}

/// The hooked tensor of `var`: it has the variable's memory, and the variable becomes an empty shell. (A copy instead
/// would go stale at the first optimizer step.)
pub(crate) fn hook(var: &Var, param: ParamId, outlet: Outlet) -> Result<Tensor> {
    let memory = Mutex::new(Some(take(var)?));
    var.apply_op1(Hook {
        param,
        outlet,
        memory,
    })
}

impl CustomOp1 for Hook {
    fn name(&self) -> &'static str {
        "fabric-gradient-ready"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match self
            .memory
            .lock()
            .unwrap_or_else(|held| held.into_inner())
            .take()
        {
            Some(memory) => Ok((memory, layout.shape().clone())),
            None => bail!("the hook of a parameter runs forward once, when the model is built"),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Some(events) = self.outlet.get() else {
            return Ok(Some(grad.clone())); // not set up: candle as usual
        };
        let grad = grad.contiguous()?;
        // The argument is a variable, so that nothing need be stored for it: the engine holds the gradient.
        let keep = events
            .ready(self.param, &lend(&grad)?)
            .map_err(Error::wrap)?;
        Ok((keep == Keep::Keep).then_some(grad))
    }
}
