//! Optimizer updates, each one pass over parameter, gradient and state.
//!
//! Parameters are f64, f32, f16 or bf16. The arithmetic and the state are f64 for f64 parameters and f32 for the
//! others; the parameter is rounded once. Gradients may be any float.

use crate::dtype::Dtype;
use crate::error::{KernelError, on_host, same_length};
use crate::simd;
use crate::span::{Span, SpanMut};

/// One step of stochastic gradient descent, with the words and the meaning of `torch.optim.SGD`.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct SgdStep {
    /// Learning rate.
    pub lr: f64,
    /// How much of the momentum buffer survives; 0 is none, and the buffer is neither asked for nor touched.
    pub momentum: f64,
    /// How much of the gradient is kept out of the buffer.
    pub dampening: f64,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f64,
    /// Look ahead by one momentum step. Needs momentum and no dampening.
    pub nesterov: bool,
    /// Ascend instead of descend.
    pub maximize: bool,
    /// Gradients are multiplied by this first (one over the loss scale, or the clipping factor; 1 is nothing).
    pub grad_scale: f64,
    /// The buffer holds nothing yet: it becomes the gradient, undampened.
    pub first: bool,
}

/// One step of Adam with decoupled weight decay, with the words and the meaning of `torch.optim.AdamW`.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the gradient's running mean.
    pub beta1: f64,
    /// Decay of the squared gradient's running mean.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// The parameter shrinks by `lr * weight_decay` of itself.
    pub weight_decay: f64,
    /// The number of this step, from 1.
    pub step: u64,
    /// Gradients are multiplied by this first.
    pub grad_scale: f64,
}

/// Moves `param` against `grad`, and `momentum` with it.
///
/// ```text
/// g = ±grad * grad_scale + weight_decay * param          (- when maximizing)
/// m = g                                    on the first step, then
/// m = momentum * m + (1 - dampening) * g
/// param -= lr * (g + momentum * m  if nesterov  else  m  if momentum  else  g)
/// ```
pub fn sgd(
    param: SpanMut<'_>,
    grad: Span<'_>,
    momentum: Option<SpanMut<'_>>,
    step: &SgdStep,
) -> Result<(), KernelError> {
    const OP: &str = "sgd";
    on_host(OP, [param.memory(), grad.memory()])?;
    same_length(OP, param.len(), grad.len())?;
    if step.nesterov && (step.momentum <= 0.0 || step.dampening != 0.0) {
        return Err(KernelError::Step {
            op: OP,
            reason: "nesterov needs a positive momentum and zero dampening; set both, or switch nesterov off",
        });
    }
    let momentum = if step.momentum == 0.0 { None } else { momentum };
    match &momentum {
        Some(state) => check_state(OP, &param, state)?,
        None if step.momentum != 0.0 => {
            return Err(KernelError::Step {
                op: OP,
                reason: "momentum is not zero but no momentum buffer was passed; pass one as long as the parameter",
            });
        }
        None => {}
    }
    with_param!(OP, param.dtype(), grad.dtype(), |P, G, C| {
        simd::sgd::<P, G, C>(param, grad, momentum, step);
        Ok(())
    })
}

/// Moves `param` against `grad`, and both running means with it.
///
/// ```text
/// g = grad * grad_scale
/// param *= 1 - lr * weight_decay
/// exp_avg = beta1 * exp_avg + (1 - beta1) * g
/// exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
/// param -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps)
/// ```
pub fn adamw(
    param: SpanMut<'_>,
    grad: Span<'_>,
    exp_avg: SpanMut<'_>,
    exp_avg_sq: SpanMut<'_>,
    step: &AdamWStep,
) -> Result<(), KernelError> {
    const OP: &str = "adamw";
    on_host(OP, [param.memory(), grad.memory()])?;
    same_length(OP, param.len(), grad.len())?;
    check_state(OP, &param, &exp_avg)?;
    check_state(OP, &param, &exp_avg_sq)?;
    if step.step == 0 {
        return Err(KernelError::Step {
            op: OP,
            reason: "steps are counted from 1; pass 1 for the first",
        });
    }
    with_param!(OP, param.dtype(), grad.dtype(), |P, G, C| {
        simd::adamw::<P, G, C>(param, grad, exp_avg, exp_avg_sq, step);
        Ok(())
    })
}

/// State lies on the host, is as long as the parameter, and has its accumulator's dtype.
fn check_state(
    op: &'static str,
    param: &SpanMut<'_>,
    state: &SpanMut<'_>,
) -> Result<(), KernelError> {
    on_host(op, [state.memory()])?;
    same_length(op, param.len(), state.len())?;
    if !is_param(param.dtype()) {
        return Err(KernelError::Unsupported {
            op,
            dtype: param.dtype(),
        });
    }
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

/// The dtypes in which parameters are updated. Eight bits are too few to make a step of.
fn is_param(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}
