//! Optimizers: what one must do to be driven by Fabric, and SGD and AdamW over any model's buffers, with states that
//! can be saved.

use fabric_engine::{
    Error, Result,
    buffer::Slab,
    kernels::{self, AdamWStep, Dtype, SgdStep, Span, SpanMut},
};

use crate::model::{Gradients, Model, ParamId};

/// What `fabric.setup` takes as an optimizer.
pub trait Optimizer: Send {
    /// Update the model's parameters from its gradients; parameters without one are left alone.
    ///
    /// # Errors
    /// The library's or the arithmetic's refusal.
    fn step(&mut self, model: &dyn Model, grads: &Gradients<'_>) -> Result<()>;

    /// The learning rate.
    fn learning_rate(&self) -> f64;

    /// Change the learning rate: schedules are the caller's.
    fn set_learning_rate(&mut self, lr: f64);

    /// The state to save: named vectors, and counters.
    ///
    /// # Errors
    /// When the optimizer hides its state.
    fn state(&self, model: &dyn Model) -> Result<OptimizerState>;

    /// Whether [`Optimizer::load_state`] will take `state`: asked before a checkpoint changes anything.
    ///
    /// # Errors
    /// When it does not fit: says what.
    fn check_state(&self, model: &dyn Model, state: &OptimizerState) -> Result<()> {
        let _ = (model, state);
        Ok(())
    }

    /// Go on from a saved state.
    ///
    /// # Errors
    /// When it does not fit; nothing is changed then.
    fn load_state(&mut self, model: &dyn Model, state: OptimizerState) -> Result<()>;
}

/// An optimizer's state: the number of steps taken, and vectors named `kind.parameter`, each as long as the parameter;
/// except that `step.parameter` is one count.
#[derive(Debug, Default)]
pub struct OptimizerState {
    /// Steps taken.
    pub steps: u64,
    /// The vectors.
    pub tensors: Vec<(String, Slab)>,
}

/// Stochastic gradient descent with momentum, Nesterov and weight decay, as torch defines them.
#[derive(Debug)]
pub struct Sgd {
    step: SgdStep,
    steps: u64,
    momentum: Vec<Option<Slab>>,
}

impl Sgd {
    /// Plain SGD.
    pub fn new(lr: f64) -> Self {
        let step = SgdStep {
            lr,
            momentum: 0.0,
            dampening: 0.0,
            weight_decay: 0.0,
            nesterov: false,
            maximize: false,
            grad_scale: 1.0,
            first: false,
        };
        Self {
            step,
            steps: 0,
            momentum: Vec::new(),
        }
    }

    /// With momentum.
    pub fn momentum(mut self, momentum: f64) -> Self {
        self.step.momentum = momentum;
        self
    }

    /// With Nesterov's momentum.
    pub fn nesterov(mut self, nesterov: bool) -> Self {
        self.step.nesterov = nesterov;
        self
    }

    /// With weight decay, added to the gradient.
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.step.weight_decay = weight_decay;
        self
    }
}

impl Optimizer for Sgd {
    fn step(&mut self, model: &dyn Model, grads: &Gradients<'_>) -> Result<()> {
        self.momentum.resize_with(model.params().len(), || None);
        for (index, meta) in model.params().iter().enumerate() {
            let Some(grad) = grads.get(ParamId(index)) else {
                continue;
            };
            let mut step = self.step;
            let slot = &mut self.momentum[index];
            if step.momentum != 0.0 && slot.is_none() {
                *slot = Some(Slab::zeroed(state_dtype(meta.dtype), meta.numel()));
                step.first = true;
            }
            let slot = slot.as_mut();
            update(model, ParamId(index), |param| {
                kernels::sgd(param, grad, slot.map(whole_mut), &step)
            })?;
        }
        self.steps += 1;
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.step.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.step.lr = lr;
    }

    fn state(&self, model: &dyn Model) -> Result<OptimizerState> {
        Ok(OptimizerState {
            steps: self.steps,
            tensors: pack(model, "momentum", &self.momentum),
        })
    }

    fn check_state(&self, model: &dyn Model, state: &OptimizerState) -> Result<()> {
        check(model, &["momentum"], state)
    }

    fn load_state(&mut self, model: &dyn Model, mut state: OptimizerState) -> Result<()> {
        self.check_state(model, &state)?;
        self.momentum = unpack(model, "momentum", &mut state);
        self.steps = state.steps;
        Ok(())
    }
}

/// Adam with decoupled weight decay (Loshchilov & Hutter 2019), as torch defines it.
#[derive(Debug)]
pub struct AdamW {
    step: AdamWStep,
    steps: Vec<u64>, // by parameter: one that had no gradient yet has taken no step
    average: Vec<Option<Slab>>,
    square: Vec<Option<Slab>>,
}

impl AdamW {
    /// AdamW with torch's defaults: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
    pub fn new(lr: f64) -> Self {
        let step = AdamWStep {
            lr,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            step: 1,
            grad_scale: 1.0,
        };
        Self {
            step,
            steps: Vec::new(),
            average: Vec::new(),
            square: Vec::new(),
        }
    }

    /// With other betas.
    pub fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        (self.step.beta1, self.step.beta2) = (beta1, beta2);
        self
    }

    /// With another epsilon.
    pub fn eps(mut self, eps: f64) -> Self {
        self.step.eps = eps;
        self
    }

    /// With another weight decay.
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.step.weight_decay = weight_decay;
        self
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, model: &dyn Model, grads: &Gradients<'_>) -> Result<()> {
        let params = model.params();
        self.steps.resize(params.len(), 0);
        self.average.resize_with(params.len(), || None);
        self.square.resize_with(params.len(), || None);
        for (index, meta) in params.iter().enumerate() {
            let Some(grad) = grads.get(ParamId(index)) else {
                continue;
            };
            let fresh = || Slab::zeroed(state_dtype(meta.dtype), meta.numel());
            let average = self.average[index].get_or_insert_with(fresh);
            let square = self.square[index].get_or_insert_with(fresh);
            self.steps[index] += 1;
            let step = AdamWStep {
                step: self.steps[index],
                ..self.step
            };
            update(model, ParamId(index), |param| {
                kernels::adamw(param, grad, whole_mut(average), whole_mut(square), &step)
            })?;
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.step.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.step.lr = lr;
    }

    fn state(&self, model: &dyn Model) -> Result<OptimizerState> {
        let mut tensors = pack(model, "exp_avg", &self.average);
        tensors.extend(pack(model, "exp_avg_sq", &self.square));
        let steps = self.steps.iter().zip(model.params());
        tensors.extend(steps.map(|(steps, param)| {
            // i64, which every reader of safetensors knows: candle refuses a file with a u64 in it.
            (
                format!("{STEP}.{}", param.name),
                Slab::from_slice(&[*steps as i64]),
            )
        }));
        Ok(OptimizerState {
            steps: self.steps.iter().copied().max().unwrap_or(0),
            tensors,
        })
    }

    fn check_state(&self, model: &dyn Model, state: &OptimizerState) -> Result<()> {
        check(model, &["exp_avg", "exp_avg_sq", STEP], state)
    }

    fn load_state(&mut self, model: &dyn Model, mut state: OptimizerState) -> Result<()> {
        self.check_state(model, &state)?;
        self.average = unpack(model, "exp_avg", &mut state);
        self.square = unpack(model, "exp_avg_sq", &mut state);
        let steps = unpack(model, STEP, &mut state).into_iter();
        self.steps = steps
            .map(|slab| slab.map_or(0, |slab| slab.as_slice::<i64>()[0].unsigned_abs()))
            .collect();
        Ok(())
    }
}

pub(crate) const STEP: &str = "step"; // a counter for each parameter, beside the vectors

/// The type in which states of a parameter are kept.
fn state_dtype(param: Dtype) -> Dtype {
    param.accumulator()
}

fn whole_mut(slab: &mut Slab) -> SpanMut<'_> {
    slab.part_mut(0..slab.numel())
}

/// Apply `f` to a parameter where it lies, or to a copy that is written back.
fn update(
    model: &dyn Model,
    param: ParamId,
    f: impl FnOnce(SpanMut<'_>) -> Result<(), kernels::KernelError>,
) -> Result<()> {
    let name = || format!("update '{}'", model.params()[param.0].name);
    let mut f = Some(f);
    model.with(param, &mut |buffer| {
        let f = f.take().ok_or_else(|| {
            Error::argument(
                "Model::with called back twice",
                "Call `f` once for each call of `with`",
            )
        })?;
        if let Some(span) = buffer.span_mut() {
            return f(span).map_err(|error| Error::library(name(), error));
        }
        let numel = buffer.numel();
        let mut copy = Slab::zeroed(buffer.dtype(), numel);
        buffer.read(0..numel, copy.part_mut(0..numel))?;
        f(copy.part_mut(0..numel)).map_err(|error| Error::library(name(), error))?;
        buffer.write(0..numel, copy.part(0..numel))
    })
}

fn pack(model: &dyn Model, kind: &str, slots: &[Option<Slab>]) -> Vec<(String, Slab)> {
    let named = slots.iter().zip(model.params());
    named
        .filter_map(|(slot, param)| {
            let slab = slot.as_ref()?;
            Some((
                format!("{kind}.{}", param.name),
                copy_of(slab.part(0..slab.numel())),
            ))
        })
        .collect()
}

fn copy_of(span: Span<'_>) -> Slab {
    let mut copy = Slab::zeroed(span.dtype(), span.len());
    kernels::cast(span, copy.part_mut(0..span.len())).expect("a copy within one dtype");
    copy
}

/// Each vector of `state` must be of one of `kinds`, belong to a parameter, and be as long.
fn check(model: &dyn Model, kinds: &[&str], state: &OptimizerState) -> Result<()> {
    for (name, slab) in &state.tensors {
        let owner = kinds.iter().find_map(|kind| {
            let name = name.strip_prefix(kind)?.strip_prefix('.')?;
            let param = model.params().iter().find(|param| param.name == name)?;
            Some((*kind, param))
        });
        let Some((kind, param)) = owner else {
            return Err(Error::argument(
                format!(
                    "the saved optimizer state has '{name}', which this optimizer does not know"
                ),
                "Load the state of the same kind of optimizer and model",
            ));
        };
        let (numel, dtype) = match kind {
            STEP => (1, Dtype::I64),
            _ => (param.numel(), state_dtype(param.dtype)),
        };
        if (slab.numel(), slab.dtype()) != (numel, dtype) {
            return Err(Error::argument(
                format!(
                    "the saved {kind} of '{}' is {} x {}, this model needs {numel} x {dtype}",
                    param.name,
                    slab.numel(),
                    slab.dtype(),
                ),
                "Load the checkpoint of the same model",
            ));
        }
    }
    Ok(())
}

/// The vectors of `kind`, by parameter.
fn unpack(model: &dyn Model, kind: &str, state: &mut OptimizerState) -> Vec<Option<Slab>> {
    let mut take = |name: String| {
        let index = state.tensors.iter().position(|(other, _)| *other == name)?;
        Some(state.tensors.swap_remove(index).1)
    };
    let params = model.params().iter();
    params
        .map(|param| take(format!("{kind}.{}", param.name)))
        .collect()
}
