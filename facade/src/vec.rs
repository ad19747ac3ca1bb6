//! Plain vectors as a model: the smallest adapter there is, for programs that compute their own gradients, and the
//! reference that the tests of everything else are held to.

use std::sync::{Arc, Mutex, OnceLock};

use fabric_engine::{
    Error, Result,
    buffer::Buffer,
    kernels::{Dtype, Element},
};

use crate::model::{Backward, Events, Model, ParamId, ParamMeta};

/// Named vectors of `T`, with gradients supplied by the caller.
///
/// ```
/// use fabric::vec::VecModel;
/// let model = VecModel::new([("weight", vec![0f32; 6]), ("bias", vec![0f32; 2])]);
/// assert_eq!(model.read("bias"), [0.0, 0.0]);
/// ```
pub struct VecModel<T: Element = f32> {
    params: Vec<ParamMeta>,
    values: Vec<Mutex<Vec<T>>>,
    events: OnceLock<Arc<dyn Events>>,
}

impl<T: Element> VecModel<T> {
    /// A model of these parameters, in this order.
    pub fn new<N: Into<String>>(params: impl IntoIterator<Item = (N, Vec<T>)>) -> Self {
        let (mut metas, mut values) = (Vec::new(), Vec::new());
        for (name, value) in params {
            metas.push(ParamMeta::new(name, &[value.len()], T::DTYPE));
            values.push(Mutex::new(value));
        }
        Self {
            params: metas,
            values,
            events: OnceLock::new(),
        }
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        T::DTYPE
    }

    /// A copy of one parameter.
    ///
    /// # Panics
    /// When there is no parameter of this name.
    pub fn read(&self, name: &str) -> Vec<T> {
        self.lock(self.id(name).0).clone()
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

    fn lock(&self, index: usize) -> std::sync::MutexGuard<'_, Vec<T>> {
        self.values[index]
            .lock()
            .unwrap_or_else(|held| held.into_inner())
    }
}

impl<T: Element> Model for VecModel<T> {
    fn params(&self) -> &[ParamMeta] {
        &self.params
    }

    fn with(&self, param: ParamId, f: &mut dyn FnMut(&mut dyn Buffer) -> Result<()>) -> Result<()> {
        f(&mut *self.lock(param.0))
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
        let Some(events) = self.model.events.get() else {
            return Err(Error::argument(
                "these gradients belong to a model that was not set up",
                "Call fabric.setup(model, optimizer) first",
            ));
        };
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
            if scale != 1.0 {
                let copy = grad.clone();
                let (from, into) = (
                    fabric_engine::kernels::Span::of(&copy),
                    fabric_engine::kernels::SpanMut::of(&mut grad),
                );
                fabric_engine::kernels::cast_scaled(from, into, f64::from(scale))
                    .map_err(|error| Error::library("scale a gradient", error))?;
            }
            events.ready(ParamId(index), &grad)?;
        }
        Ok(())
    }
}
