//! Optimizer updates: one pass that unscales and clips the gradient, moves parameter and states, and casts the compute
//! copy.
//!
//! [Note: updates] Parameters are f64, f32, f16 or bf16. The arithmetic and the states are f64 for f64 parameters and
//! f32 for the others; the parameter is rounded once. Gradients may be any float; one that is wider than the arithmetic
//! is rounded to it first. All is elementwise: what becomes of an element does not depend on where its shard was cut.

use crate::cast;
use crate::device::{Device, Task};
use crate::dtype::{Dtype, Element, Memory};
use crate::error::{KernelError, same_length};
use crate::simd;
use crate::span::{Span, SpanMut};

/// How a parameter moves against its gradient, with torch's words and torch's meaning.
///
/// `g` is the gradient times `grad_scale`:
///
/// ```text
/// Sgd     g = ±g + weight_decay * param                  (- when maximizing)
///         m = g                                          on step 1, then
///         m = momentum * m + (1 - dampening) * g
///         param -= lr * (g + momentum * m  if nesterov  else  m  if momentum  else  g)
///
/// Adam    g += weight_decay * param                      AdamW    param *= 1 - lr * weight_decay
///         m = beta1 * m + (1 - beta1) * g
///         v = beta2 * v + (1 - beta2) * g^2
///         param -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
///
/// Lion    c = beta1 * m + (1 - beta1) * g
///         param = param * (1 - lr * weight_decay) - lr * sign(c)
///         m = beta2 * m + (1 - beta2) * g
/// ```
#[derive(Copy, Clone, Debug, PartialEq)]
pub enum Rule {
    /// Stochastic gradient descent, as `torch.optim.SGD`.
    Sgd(Sgd),
    /// Adam with the weight decay in the gradient, as `torch.optim.Adam` (Kingma & Ba 2015).
    Adam(Adam),
    /// Adam with decoupled weight decay, as `torch.optim.AdamW` (Loshchilov & Hutter 2019).
    AdamW(Adam),
    /// The sign of a mean (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", program 1).
    Lion(Lion),
}

/// Hyperparameters of [`Rule::Sgd`].
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// How much of the momentum buffer survives; 0 is none, and there is no buffer.
    pub momentum: f64,
    /// How much of the gradient is kept out of the buffer.
    pub dampening: f64,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f64,
    /// Look ahead by one momentum step. Needs momentum and no dampening.
    pub nesterov: bool,
    /// Ascend instead of descend.
    pub maximize: bool,
}

/// Hyperparameters of [`Rule::Adam`] and [`Rule::AdamW`].
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Adam {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the gradient's running mean.
    pub beta1: f64,
    /// Decay of the squared gradient's running mean.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// L2 penalty, added to the gradient; decoupled, the parameter shrinks by `lr * weight_decay` of itself.
    pub weight_decay: f64,
}

/// Hyperparameters of [`Rule::Lion`].
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Lion {
    /// Learning rate: how far every parameter moves.
    pub lr: f64,
    /// Decay of the mean whose sign is taken.
    pub beta1: f64,
    /// Decay of the mean that is kept.
    pub beta2: f64,
    /// The parameter shrinks by `lr * weight_decay` of itself.
    pub weight_decay: f64,
}

impl Rule {
    /// The names of the states, one buffer each as long as the parameter, in the order in which [`update`] takes them.
    /// All begin as zeros.
    pub fn states(&self) -> &'static [&'static str] {
        match self {
            Rule::Sgd(rule) if rule.momentum == 0.0 => &[],
            Rule::Sgd(_) => &["momentum_buffer"],
            Rule::Adam(_) | Rule::AdamW(_) => &["exp_avg", "exp_avg_sq"],
            Rule::Lion(_) => &["exp_avg"],
        }
    }

    /// The lower-case name: `"sgd"`, `"adam"`, `"adamw"`, `"lion"`.
    pub fn name(&self) -> &'static str {
        match self {
            Rule::Sgd(_) => "sgd",
            Rule::Adam(_) => "adam",
            Rule::AdamW(_) => "adamw",
            Rule::Lion(_) => "lion",
        }
    }
}

/// Moves `param` against `grad`, and `states` with it; see [`Rule`]. `step` is the number of this step, from 1.
///
/// Gradients are multiplied by `grad_scale` first: one over the loss scale, or the clipping factor, or both; 1 is nothing.
/// `copy` becomes the new parameter, cast to any float: what a [`cast`](crate::cast()) afterwards would write, without
/// reading the parameter from memory again.
///
/// Where the parameter lies on a device, so do its states, and it is updated there. A gradient that lies elsewhere is
/// fetched first, a copy that lies elsewhere is written afterwards.
///
/// ```
/// use fabric_kernels::{Lion, Rule, Span, SpanMut, update};
/// use half::bf16;
///
/// let rule = Rule::Lion(Lion { lr: 0.25, beta1: 0.5, beta2: 0.5, weight_decay: 0.0 });
/// let (mut param, mut exp_avg, mut copy) = ([1.0f32, 2.0], [0.0f32; 2], [bf16::ZERO; 2]);
/// update(
///     &rule,
///     1,
///     0.5,
///     SpanMut::of(&mut param),
///     Span::of(&[8.0f32, -8.0]),
///     &mut [SpanMut::of(&mut exp_avg)],
///     Some(SpanMut::of(&mut copy)),
/// )?;
/// assert_eq!((param, exp_avg), ([0.75, 2.25], [2.0, -2.0]));
/// assert_eq!(copy.map(f32::from), param);
/// # Ok::<(), fabric_kernels::KernelError>(())
/// ```
pub fn update(
    rule: &Rule,
    step: u64,
    grad_scale: f64,
    param: SpanMut<'_>,
    grad: Span<'_>,
    states: &mut [SpanMut<'_>],
    mut copy: Option<SpanMut<'_>>,
) -> Result<(), KernelError> {
    let number = step;
    let step = Step {
        rule,
        number: step,
        grad_scale,
    };
    check(&step, &param, &grad, states, copy.as_ref())?;
    if let Some(device) = param.device() {
        // A copy of another place is a copy afterwards.
        let (copy, elsewhere) = match copy {
            Some(copy) if copy.memory() != param.memory() => (None, Some(copy)),
            copy => (copy, None),
        };
        let mut param = param;
        let mut states = states.iter_mut().map(SpanMut::reborrow);
        return device
            .run(Task::Update {
                rule,
                step: step.number,
                grad_scale,
                param: param.reborrow(),
                grad,
                states: [states.next(), states.next()],
                copy,
            })
            .and_then(|()| match elsewhere {
                Some(copy) => cast(param.as_span(), copy),
                None => Ok(()),
            });
    }
    if let Some(mut copy) = copy.take_if(|copy| copy.device().is_some()) {
        let mut param = param;
        update(
            rule,
            number,
            grad_scale,
            param.reborrow(),
            grad,
            states,
            None,
        )?;
        return cast(param.as_span(), copy.reborrow());
    }
    if grad.device().is_some() {
        return match param.dtype().accumulator() {
            Dtype::F64 => update_with(&step, param, fetched::<f64>(grad)?, states, copy),
            _ => update_with(&step, param, fetched::<f32>(grad)?, states, copy),
        };
    }
    simd::update(
        &step,
        simd::Spans {
            param,
            grad,
            states,
            copy,
        },
    )
}

/// The gradient, brought to the host in the type of the arithmetic.
fn fetched<T: Element>(grad: Span<'_>) -> Result<Vec<T>, KernelError> {
    let mut here = vec![T::zeroed(); grad.len()];
    cast(grad, SpanMut::of(&mut here))?;
    Ok(here)
}

fn update_with<T: Element>(
    step: &Step<'_>,
    param: SpanMut<'_>,
    grad: Vec<T>,
    states: &mut [SpanMut<'_>],
    copy: Option<SpanMut<'_>>,
) -> Result<(), KernelError> {
    simd::update(
        step,
        simd::Spans {
            param,
            grad: Span::of(&grad),
            states,
            copy,
        },
    )
}

/// What is the same for all elements.
pub(crate) struct Step<'a> {
    pub(crate) rule: &'a Rule,
    /// From 1.
    pub(crate) number: u64,
    pub(crate) grad_scale: f64,
}

/// Refuses what [`update`] does not take, before the first element is touched.
fn check(
    step: &Step<'_>,
    param: &SpanMut<'_>,
    grad: &Span<'_>,
    states: &[SpanMut<'_>],
    copy: Option<&SpanMut<'_>>,
) -> Result<(), KernelError> {
    let op = step.rule.name();
    same_length(op, param.len(), grad.len())?;
    if let Some(copy) = copy {
        same_length(op, copy.len(), param.len())?;
    }
    if step.number == 0 {
        return Err(KernelError::Step {
            op,
            reason: "steps are counted from 1; pass 1 for the first",
        });
    }
    if let Rule::Sgd(rule) = step.rule
        && rule.nesterov
        && (rule.momentum <= 0.0 || rule.dampening != 0.0)
    {
        return Err(KernelError::Step {
            op,
            reason: "nesterov needs a positive momentum and zero dampening; set both, or switch nesterov off",
        });
    }
    if !is_param(param.dtype()) {
        return Err(KernelError::Unsupported {
            op,
            dtype: param.dtype(),
        });
    }
    let wanted = step.rule.states();
    if states.len() != wanted.len() {
        let passed = states.len();
        return Err(KernelError::States { op, wanted, passed });
    }
    for state in states {
        check_state(op, param, state)?;
    }
    let floats = [Some(grad.dtype()), copy.map(SpanMut::dtype)];
    for dtype in floats.into_iter().flatten() {
        if !dtype.is_float() {
            return Err(KernelError::Unsupported { op, dtype });
        }
    }
    Ok(())
}

/// State lies where its parameter does, is as long as the parameter, and has its accumulator's dtype.
fn check_state(
    op: &'static str,
    param: &SpanMut<'_>,
    state: &SpanMut<'_>,
) -> Result<(), KernelError> {
    beside(op, param, state.device())?;
    same_length(op, param.len(), state.len())?;
    let wanted = param.dtype().accumulator();
    if state.dtype() == wanted {
        Ok(())
    } else {
        Err(KernelError::State {
            op,
            param: param.dtype(),
            state: state.dtype(),
            wanted,
        })
    }
}

/// Refuses memory of another place than the parameter's.
fn beside(
    op: &'static str,
    param: &SpanMut<'_>,
    other: Option<&dyn Device>,
) -> Result<(), KernelError> {
    let other = other.map_or(Memory::Host, |device| device.memory());
    match param.memory() {
        memory if memory == other => Ok(()),
        memory => Err(KernelError::Apart { op, memory, other }),
    }
}

/// The dtypes in which parameters are updated. Eight bits are too few to make a step of.
fn is_param(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}
