//! Plain vectors as a model: the smallest adapter there is, for programs that compute their own gradients, and the
//! reference that the tests of everything else are held to.

mod chain;
mod dense;
mod memory;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use fabric_engine::{
    Error, Result,
    buffer::Buffer,
    kernels::{self, Dtype, Element, Span, SpanMut},
};

pub use chain::{Block, Chain, Link, Pass, PassLoss};
pub use dense::Dense;

use crate::model::{Backward, Events, Model, ParamId, ParamMeta, UnitId};
use memory::{Slot, Spare};

/// Named vectors of `T`, with gradients supplied by the caller.
///
/// ```
/// use fabric::vec::VecModel;
/// let model = VecModel::new([("weight", vec![0f32; 6]), ("bias", vec![0f32; 2])]);
/// assert_eq!(model.read("bias"), [0.0, 0.0]);
/// ```
pub struct VecModel<T: Element = f32> {
    params: Vec<ParamMeta>,
    units: Vec<String>,
    values: Vec<Mutex<Slot<T>>>,
    spare: Spare<T>,
    events: OnceLock<Arc<dyn Events>>,
}

/// The first values of a parameter, made when they are needed.
pub type Init<T> = Box<dyn Fn() -> Vec<T> + Send + Sync>;

impl<T: Element> VecModel<T> {
    /// A model of these parameters, in this order.
    pub fn new<N: Into<String>>(params: impl IntoIterator<Item = (N, Vec<T>)>) -> Self {
        let params = params.into_iter();
        Self::of(params.map(|(name, value)| (name.into(), value.len(), Slot::Here(value))))
    }

    /// A model whose parameters get their first values when it is set up, one after the other, on the rank whose values
    /// count: name, number of elements, and what makes them. Where parameters are sharded no rank ever holds all of them.
    pub fn deferred<N: Into<String>>(
        params: impl IntoIterator<Item = (N, usize, Init<T>)>,
    ) -> Self {
        let params = params.into_iter();
        Self::of(params.map(|(name, numel, init)| (name.into(), numel, Slot::Deferred(init))))
    }

    fn of(params: impl Iterator<Item = (String, usize, Slot<T>)>) -> Self {
        let (mut metas, mut values) = (Vec::new(), Vec::new());
        for (name, numel, slot) in params {
            metas.push(ParamMeta::new(name, &[numel], T::DTYPE));
            values.push(Mutex::new(slot));
        }
        Self {
            params: metas,
            units: Vec::new(),
            values,
            spare: Spare::default(),
            events: OnceLock::new(),
        }
    }

    /// The same, cut into units, in forward order: the parameters whose names lie under a unit's name, as `block.0.weight`
    /// lies under `block.0`, are gathered together where a strategy shards parameters.
    ///
    /// # Errors
    /// When a parameter would be in two units.
    pub fn in_units<N: Into<String>>(mut self, units: impl IntoIterator<Item = N>) -> Result<Self> {
        self.units = units.into_iter().map(Into::into).collect();
        for param in &mut self.params {
            let below = |unit: &&String| {
                param
                    .name
                    .strip_prefix(unit.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            };
            let mut owners = self.units.iter().filter(below);
            let (first, second) = (owners.next(), owners.next());
            if let (Some(first), Some(second)) = (first, second) {
                return Err(Error::argument(
                    format!("'{}' is in two units, '{first}' and '{second}'", param.name),
                    "Declare units side by side, not inside one another",
                ));
            }
            let index = first.and_then(|name| self.units.iter().position(|unit| unit == name));
            param.unit = index.map(UnitId);
        }
        Ok(self)
    }

    /// The same, with a parameter that is used in another place too: in `unit`, or outside of all. It is then kept by the
    /// root.
    ///
    /// # Panics
    /// When there is no parameter or unit of this name.
    pub fn tie(mut self, param: &str, unit: Option<&str>) -> Self {
        let place = unit.map(|name| {
            let index = self.units.iter().position(|unit| unit == name);
            UnitId(index.unwrap_or_else(|| panic!("no unit is called '{name}'")))
        });
        let id = self.id(param);
        self.params[id.0].tied.push(place);
        self
    }

    /// The same, with a parameter that gets no gradients.
    ///
    /// # Panics
    /// When there is no parameter of this name.
    pub fn freeze(mut self, param: &str) -> Self {
        let id = self.id(param);
        self.params[id.0].trainable = false;
        self
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        T::DTYPE
    }

    /// A copy of one parameter.
    ///
    /// # Panics
    /// When there is no parameter of this name, or it has no values at present (it is sharded, and not in use).
    pub fn read(&self, name: &str) -> Vec<T> {
        match &*self.lock(self.id(name).0) {
            Slot::Here(values) => values.clone(),
            _ => panic!("'{name}' has no values outside its unit: it is sharded"),
        }
    }

    /// The number of the parameter called `name`.
    ///
    /// # Panics
    /// When there is none.
    pub fn id(&self, name: &str) -> ParamId {
        let index = self.params.iter().position(|param| param.name == name);
        ParamId(index.unwrap_or_else(|| panic!("no parameter is called '{name}'")))
    }

    /// Gradients, by parameter, in registration order; `None` where the loss does not depend on it. Give them to
    /// `fabric.backward`.
    pub fn gradients(&self, grads: Vec<Option<Vec<T>>>) -> VecLoss<'_, T> {
        VecLoss { model: self, grads }
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, Slot<T>> {
        self.values[index]
            .lock()
            .unwrap_or_else(|held| held.into_inner())
    }

    fn events(&self) -> Result<&Arc<dyn Events>> {
        self.events.get().ok_or_else(|| {
            Error::argument(
                "these gradients belong to a model that was not set up",
                "Call fabric.setup(model, optimizer) first",
            )
        })
    }

    fn absent(&self, param: ParamId) -> Error {
        Error::argument(
            format!(
                "'{}' has no values outside its unit: it is sharded",
                self.params[param.0].name
            ),
            "Use it between ForwardEnter and ForwardLeave of its unit, or tie it",
        )
    }
}

impl<T: Element> Model for VecModel<T> {
    fn params(&self) -> &[ParamMeta] {
        &self.params
    }

    fn with(&self, param: ParamId, f: &mut dyn FnMut(&mut dyn Buffer) -> Result<()>) -> Result<()> {
        match &mut *self.lock(param.0) {
            Slot::Here(values) => f(values),
            _ => Err(self.absent(param)),
        }
    }

    fn units(&self) -> &[String] {
        &self.units
    }

    fn initialize(&self, param: ParamId) -> Result<()> {
        let mut slot = self.lock(param.0);
        if let Slot::Deferred(init) = &*slot {
            let values = init();
            let meta = &self.params[param.0];
            if values.len() != meta.numel() {
                return Err(Error::argument(
                    format!(
                        "the first values of '{}' are {}, and {} were announced",
                        meta.name,
                        values.len(),
                        meta.numel()
                    ),
                    "Give VecModel::deferred the number that the initialisation makes",
                ));
            }
            *slot = Slot::Here(self.spare.reuse(values));
        }
        Ok(())
    }

    fn release(&self, param: ParamId) -> Result<()> {
        if let Slot::Here(values) = std::mem::replace(&mut *self.lock(param.0), Slot::Away) {
            self.spare.give(values);
        }
        Ok(())
    }

    fn acquire(&self, param: ParamId) -> Result<()> {
        let mut slot = self.lock(param.0);
        if !matches!(*slot, Slot::Here(_)) {
            *slot = Slot::Here(self.spare.take(self.params[param.0].numel()));
        }
        Ok(())
    }

    fn attach(&self, events: Arc<dyn Events>) {
        // A model is set up once; fabric.setup refuses the second time.
        let _ = self.events.set(events);
    }
}

/// The caller's gradients on their way to `fabric.backward`.
pub struct VecLoss<'a, T: Element> {
    model: &'a VecModel<T>,
    grads: Vec<Option<Vec<T>>>,
}

impl<T: Element> Backward for VecLoss<'_, T> {
    fn backward(self, scale: f32) -> Result<()> {
        let events = self.model.events()?;
        if self.grads.len() != self.model.params.len() {
            return Err(Error::argument(
                format!(
                    "{} gradients for {} parameters",
                    self.grads.len(),
                    self.model.params.len()
                ),
                "Give one entry a parameter, None where there is no gradient",
            ));
        }
        for (index, grad) in self.grads.into_iter().enumerate().rev() {
            let Some(mut grad) = grad else { continue };
            scaled(&mut grad, scale)?;
            events.ready(ParamId(index), &grad)?;
        }
        Ok(())
    }
}

fn scaled<T: Element>(grad: &mut [T], scale: f32) -> Result<()> {
    if scale == 1.0 {
        return Ok(());
    }
    let copy = grad.to_vec();
    kernels::cast_scaled(Span::of(&copy), SpanMut::of(grad), f64::from(scale))
        .map_err(|error| Error::library("scale a gradient", error))
}
