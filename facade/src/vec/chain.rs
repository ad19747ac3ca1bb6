//! Blocks one behind the other that compute their own gradients: the path for programs and libraries without hooks. Only
//! what flows between blocks is kept; a block's backward computes again what it needs (activation checkpointing, Chen et
//! al. 2016), so that parameters can be dropped after its forward and its gradients leave while the next block computes.

use std::sync::PoisonError;

use fabric_engine::{Error, Result, kernels::Element};

use super::{VecModel, memory::Slot, scaled};
use crate::model::{Backward, Edge, ParamId, UnitId};

/// A function of parameters and an input that can compute its gradients.
pub trait Block<T: Element>: Send + Sync {
    /// The output. `params`: in the order in which the [`Link`] names them.
    fn forward(&self, params: &[&[T]], input: &[T]) -> Vec<T>;

    /// Given the loss's gradient by the output: adds the gradients by the parameters to `grads`, which are as long as
    /// they and start at zero, and returns the gradient by the input.
    fn backward(
        &self,
        params: &[&[T]],
        input: &[T],
        output_grad: &[T],
        grads: &mut [Vec<T>],
    ) -> Vec<T>;
}

/// A block's place in a chain: its unit, its parameters, and what it computes.
pub struct Link<T: Element> {
    unit: Option<UnitId>,
    params: Vec<ParamId>,
    block: Box<dyn Block<T>>,
}

impl<T: Element> Link<T> {
    /// The unit called `unit`, with its parameters in registration order.
    ///
    /// # Errors
    /// When the model has no such unit.
    pub fn new(model: &VecModel<T>, unit: &str, block: impl Block<T> + 'static) -> Result<Self> {
        let Some(index) = model.units.iter().position(|name| name == unit) else {
            return Err(Error::argument(
                format!("no unit is called '{unit}'"),
                "Name the units of the model: VecModel::in_units",
            ));
        };
        let id = UnitId(index);
        let members = model.params.iter().enumerate();
        let members = members.filter(|(_, param)| param.unit == Some(id));
        Ok(Self {
            unit: Some(id),
            params: members.map(|(index, _)| ParamId(index)).collect(),
            block: Box::new(block),
        })
    }

    /// A block outside of all units.
    pub fn outside(params: Vec<ParamId>, block: impl Block<T> + 'static) -> Self {
        let (unit, block) = (None, Box::new(block));
        Self {
            unit,
            params,
            block,
        }
    }

    /// The same, with further parameters behind the unit's: those that it shares with other blocks.
    ///
    /// # Errors
    /// When one belongs to another unit alone.
    pub fn with(mut self, model: &VecModel<T>, params: &[&str]) -> Result<Self> {
        for name in params {
            let id = model.id(name);
            let home = model.params[id.0].home();
            if home.is_some() && home != self.unit {
                return Err(Error::argument(
                    format!("'{name}' belongs to another unit, and is gathered for that one only"),
                    "Say that it is shared: VecModel::tie",
                ));
            }
            if !self.params.contains(&id) {
                self.params.push(id);
            }
        }
        Ok(self)
    }
}

/// Links, in forward order.
pub struct Chain<T: Element> {
    links: Vec<Link<T>>,
}

/// A forward that was made: its output, and the inputs of all blocks.
pub struct Pass<'a, T: Element> {
    model: &'a VecModel<T>,
    chain: &'a Chain<T>,
    inputs: Vec<Vec<T>>,
    output: Vec<T>,
}

/// A pass and its loss's gradient by its output, for `fabric.backward`.
pub struct PassLoss<'a, T: Element> {
    pass: Pass<'a, T>,
    output_grad: Vec<T>,
}

impl<T: Element> Chain<T> {
    /// A chain.
    pub fn new(links: Vec<Link<T>>) -> Self {
        Self { links }
    }

    /// Run all blocks. `model` is the one that was set up; its units are gathered and dropped on the way.
    ///
    /// # Errors
    /// Before it was set up, when a rank is gone, or a block uses what is not there.
    pub fn forward<'a>(&'a self, model: &'a VecModel<T>, input: Vec<T>) -> Result<Pass<'a, T>> {
        let events = model.events()?;
        let (mut inputs, mut flow) = (Vec::with_capacity(self.links.len()), input);
        for link in &self.links {
            if let Some(unit) = link.unit {
                events.unit(unit, Edge::ForwardEnter)?;
            }
            let output = model.lent(&link.params, |params| link.block.forward(params, &flow))?;
            if let Some(unit) = link.unit {
                events.unit(unit, Edge::ForwardLeave)?;
            }
            inputs.push(std::mem::replace(&mut flow, output));
        }
        Ok(Pass {
            model,
            chain: self,
            inputs,
            output: flow,
        })
    }
}

impl<'a, T: Element> Pass<'a, T> {
    /// What the last block put out.
    pub fn output(&self) -> &[T] {
        &self.output
    }

    /// The loss, by its gradient by the output.
    pub fn loss(self, output_grad: Vec<T>) -> PassLoss<'a, T> {
        let pass = self;
        PassLoss { pass, output_grad }
    }
}

impl<T: Element> Backward for PassLoss<'_, T> {
    fn backward(self, scale: f32) -> Result<()> {
        let Pass {
            model,
            chain,
            mut inputs,
            ..
        } = self.pass;
        let events = model.events()?;
        let mut flow = self.output_grad;
        scaled(&mut flow, scale)?;
        // Gradients of parameters that several blocks share are complete after the first of them.
        let mut open: Vec<(ParamId, Vec<T>)> = Vec::new();
        for (index, link) in chain.links.iter().enumerate().rev() {
            if let Some(unit) = link.unit {
                events.unit(unit, Edge::BackwardEnter)?;
            }
            let mut grads = Vec::with_capacity(link.params.len());
            for param in &link.params {
                let begun = open.iter().position(|(other, _)| other == param);
                grads.push(match begun {
                    Some(begun) => open.swap_remove(begun).1,
                    None => model.spare.zeros(model.params[param.0].numel()),
                });
            }
            let input = inputs.pop().unwrap_or_default();
            flow = model.lent(&link.params, |params| {
                link.block.backward(params, &input, &flow, &mut grads)
            })?;
            let earlier = &chain.links[..index];
            for (param, grad) in link.params.iter().zip(grads).rev() {
                if earlier.iter().any(|link| link.params.contains(param)) {
                    open.push((*param, grad));
                    continue;
                }
                if model.params[param.0].trainable {
                    events.ready(*param, &grad)?;
                }
                model.spare.give(grad);
            }
            if let Some(unit) = link.unit {
                events.unit(unit, Edge::BackwardLeave)?;
            }
        }
        Ok(())
    }
}

impl<T: Element> VecModel<T> {
    /// Call `f` with the values of some parameters. A parameter may be named twice.
    ///
    /// # Errors
    /// When one has no values at present.
    pub fn lent<R>(&self, params: &[ParamId], f: impl FnOnce(&[&[T]]) -> R) -> Result<R> {
        let first = |param: &ParamId| params.iter().position(|other| other == param);
        let lock = |(index, param): (usize, &ParamId)| {
            let slot = || self.values[param.0].lock();
            // A second lock of one parameter would wait for the first.
            (first(param) == Some(index)).then(|| slot().unwrap_or_else(PoisonError::into_inner))
        };
        let slots = params.iter().enumerate().map(lock).collect::<Vec<_>>();
        let values = |param: &ParamId| {
            let slot = first(param).and_then(|index| slots[index].as_deref());
            match slot {
                Some(Slot::Here(values)) => Ok(values.as_slice()),
                _ => Err(self.absent(*param)),
            }
        };
        Ok(f(&params.iter().map(values).collect::<Result<Vec<_>>>()?))
    }
}
