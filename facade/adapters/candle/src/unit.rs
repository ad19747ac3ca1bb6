//! A unit: the part of a model whose parameters are gathered together, used together and dropped together.

use std::{fmt, sync::Arc};

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use candle_nn::VarBuilder;
use fabric::model::{Edge, Events, UnitId};

use crate::{
    backend::whose,
    checkpoint::{self, Entrance},
    made::Made,
    shelf::Shelf,
    storage::copy,
};

/// A part of a model, usually a block, declared where the block is built and run where it runs. A strategy that shards
/// parameters gathers a unit's before it runs, in forward and in backward, and drops them afterwards.
///
/// ```
/// use candle_core::{DType, Device, Result, Tensor};
/// use candle_nn::{Linear, Module, VarBuilder, linear};
/// use fabric::model::Model;
/// use fabric_candle::{Unit, build};
///
/// struct Block {
///     unit: Unit,
///     up: Linear,
///     down: Linear,
/// }
///
/// impl Block {
///     fn new(vb: VarBuilder) -> Result<Self> {
///         Ok(Self {
///             unit: Unit::new(&vb)?, // everything under vb's prefix
///             up: linear(4, 16, vb.pp("up"))?,
///             down: linear(16, 4, vb.pp("down"))?,
///         })
///     }
///
///     fn forward(&self, x: &Tensor) -> Result<Tensor> {
///         self.unit.run(x, |x| x + self.down.forward(&self.up.forward(x)?.relu()?)?)
///     }
/// }
///
/// # fn main() -> Result<()> {
/// let model = build(&Device::Cpu, DType::F32, |vb| {
///     (0..2).map(|layer| Block::new(vb.pp(format!("block.{layer}")))).collect::<Result<Vec<_>>>()
/// })?;
/// assert_eq!(model.units(), ["block.0", "block.1"]);
/// # Ok(()) }
/// ```
///
/// Declare units in the order in which the forward pass runs them. A parameter belongs to the unit under whose prefix its
/// name lies; those outside all units, and those whose name is asked for more than once (tied), are there always.
#[derive(Clone)]
pub struct Unit {
    place: Option<(Arc<Shelf>, UnitId)>, // none in a model that is not Fabric's
}

impl Unit {
    /// The unit of all parameters under `vb`'s prefix, which is its name.
    ///
    /// With a `VarBuilder` that is not [`build`](crate::build)'s, like one that reads weights for inference without Fabric,
    /// the unit does nothing but run what it is given, so that the same model code serves both.
    ///
    /// # Errors
    /// Without a prefix, with one that has its unit already, and after the model was built. Units that share a
    /// parameter, and one that has none, are errors at the end of [`build`](crate::build).
    pub fn new(vb: &VarBuilder) -> Result<Self> {
        let Some((shelf, name)) = whose(vb) else {
            return Ok(Self { place: None });
        };
        if name.is_empty() {
            bail!(
                "a unit needs a prefix, by which its parameters are told from the others: give the block one with vb.pp(...)"
            );
        }
        if shelf.is_closed() {
            bail!(
                "the unit '{name}' is declared after the model was built: call Unit::new inside fabric_candle::build"
            );
        }
        let mut units = shelf.units();
        if units.contains(&name) {
            bail!(
                "there are two units '{name}': a block that is used twice keeps one Unit, and blocks that differ have \
                 different prefixes"
            );
        }
        units.push(name);
        let id = UnitId(units.len() - 1);
        drop(units);
        let place = Some((shelf, id));
        Ok(Self { place })
    }

    /// Run `f` on `x` while the unit's parameters are there. They are there again when the backward of its output begins.
    ///
    /// Where a strategy shards parameters the output is copied once: that copy's backward is the beginning of the unit's.
    ///
    /// # Errors
    /// `f`'s, and the job's, when the parameters cannot be gathered.
    pub fn run(&self, x: &Tensor, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let Some((shelf, unit)) = &self.place else {
            return f(x);
        };
        let Some(events) = shelf.events() else {
            return f(x).map_err(|error| shelf.explain(error));
        };
        let announced = shelf.comes_and_goes();
        self.pass(shelf, *unit, events, || {
            let output = f(x)?;
            if announced && output.track_op() {
                Exit::put_behind(&output, *unit, events)
            } else {
                Ok(output)
            }
        })
    }

    /// [`Unit::run`] that keeps none of `f`'s intermediate results for the backward, which runs `f` again instead:
    /// activation checkpointing. The gradients have the same bits.
    ///
    /// `f` must do the same in both runs (no dropout without a seed of its own). Gradients leave it through `x` and
    /// through the parameters of this unit only: what else it uses must not depend on parameters, and its parameters must
    /// not be used outside, nor twice in one forward. Before the model is set up this is [`Unit::run`].
    ///
    /// ```
    /// # use candle_core::{Result, Tensor};
    /// # use candle_nn::{Linear, Module};
    /// # use fabric_candle::Unit;
    /// #[derive(Clone)] // a clone of tensors shares their memory
    /// struct Block {
    ///     unit: Unit,
    ///     up: Linear,
    /// }
    ///
    /// impl Block {
    ///     fn forward(&self, x: &Tensor) -> Result<Tensor> {
    ///         let block = self.clone();
    ///         self.unit.checkpoint(x, move |x| block.up.forward(x)?.relu())
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    /// As [`Unit::run`].
    pub fn checkpoint(
        &self,
        x: &Tensor,
        f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let Some((shelf, unit)) = &self.place else {
            return f(x);
        };
        let Some(events) = shelf.events() else {
            return f(x).map_err(|error| shelf.explain(error));
        };
        self.pass(shelf, *unit, events, || {
            let enter = Entrance {
                shelf: shelf.clone(),
                unit: *unit,
                events: events.clone(),
            };
            checkpoint::forget(x, f, enter)
        })
    }

    /// The forward of the unit, between its edges.
    fn pass(
        &self,
        shelf: &Shelf,
        unit: UnitId,
        events: &Arc<dyn Events>,
        f: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        shelf.begin(unit);
        events
            .unit(unit, Edge::ForwardEnter)
            .map_err(crate::away::wrapped)?;
        let output = f().map_err(|error| shelf.explain(error));
        // Also after an error, which a program may survive: what is entered is left.
        let left = events
            .unit(unit, Edge::ForwardLeave)
            .map_err(crate::away::wrapped);
        let output = output?;
        left.map(|()| output)
    }
}

impl fmt::Debug for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self
            .place
            .as_ref()
            .map(|(shelf, unit)| shelf.units()[unit.0].clone());
        f.debug_tuple("Unit").field(&name).finish()
    }
}

/// The identity at a unit's end, whose backward is the beginning of the unit's backward.
struct Exit {
    unit: UnitId,
    events: Arc<dyn Events>,
    output: Made,
}

impl Exit {
    /// `output`, through an exit of `unit`. A copy, because an operation's output has memory of its own, and candle may
    /// need the original in the backward.
    fn put_behind(output: &Tensor, unit: UnitId, events: &Arc<dyn Events>) -> Result<Tensor> {
        output.apply_op1(Self {
            unit,
            events: events.clone(),
            output: Made::new(copy(output)?),
        })
    }
}

impl CustomOp1 for Exit {
    fn name(&self) -> &'static str {
        "fabric-unit-exit"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((self.output.on_cpu()?, layout.shape().clone()))
    }

    fn cuda_fwd(&self, _: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((self.output.on_cuda()?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.events
            .unit(self.unit, Edge::BackwardEnter)
            .map_err(crate::away::wrapped)?;
        Ok(Some(grad.clone()))
    }
}
