//! Updates by SGD and AdamW with everything about a step in one place, as the tests write them.

use crate::{Adam, KernelError, Rule, Sgd, Span, SpanMut, update};

/// One step of [`sgd`].
#[derive(Copy, Clone, Debug, PartialEq)]
pub(super) struct SgdStep {
    /// Learning rate.
    pub(super) lr: f64,
    /// How much of the momentum buffer survives; 0 is none, and the buffer is neither asked for nor touched.
    pub(super) momentum: f64,
    /// How much of the gradient is kept out of the buffer.
    pub(super) dampening: f64,
    /// L2 penalty, added to the gradient.
    pub(super) weight_decay: f64,
    /// Look ahead by one momentum step. Needs momentum and no dampening.
    pub(super) nesterov: bool,
    /// Ascend instead of descend.
    pub(super) maximize: bool,
    /// Gradients are multiplied by this first (one over the loss scale, or the clipping factor; 1 is nothing).
    pub(super) grad_scale: f64,
    /// The buffer holds nothing yet: it becomes the gradient, undampened.
    pub(super) first: bool,
}

/// [`update`] by [`Rule::Sgd`], without a copy.
pub(super) fn sgd(
    param: SpanMut<'_>,
    grad: Span<'_>,
    momentum: Option<SpanMut<'_>>,
    step: &SgdStep,
) -> Result<(), KernelError> {
    let rule = Rule::Sgd(Sgd {
        lr: step.lr,
        momentum: step.momentum,
        dampening: step.dampening,
        weight_decay: step.weight_decay,
        nesterov: step.nesterov,
        maximize: step.maximize,
    });
    let number = if step.first { 1 } else { 2 };
    let mut momentum = momentum.filter(|_| step.momentum != 0.0);
    let states = momentum.as_mut_slice();
    update(&rule, number, step.grad_scale, param, grad, states, None)
}

/// One step of [`adamw`].
#[derive(Copy, Clone, Debug, PartialEq)]
pub(super) struct AdamWStep {
    /// Learning rate.
    pub(super) lr: f64,
    /// Decay of the gradient's running mean.
    pub(super) beta1: f64,
    /// Decay of the squared gradient's running mean.
    pub(super) beta2: f64,
    /// Added to the denominator.
    pub(super) eps: f64,
    /// The parameter shrinks by `lr * weight_decay` of itself.
    pub(super) weight_decay: f64,
    /// The number of this step, from 1.
    pub(super) step: u64,
    /// Gradients are multiplied by this first.
    pub(super) grad_scale: f64,
}

/// [`update`] by [`Rule::AdamW`], without a copy.
pub(super) fn adamw(
    param: SpanMut<'_>,
    grad: Span<'_>,
    exp_avg: SpanMut<'_>,
    exp_avg_sq: SpanMut<'_>,
    step: &AdamWStep,
) -> Result<(), KernelError> {
    let rule = Rule::AdamW(Adam {
        lr: step.lr,
        beta1: step.beta1,
        beta2: step.beta2,
        eps: step.eps,
        weight_decay: step.weight_decay,
    });
    let states = &mut [exp_avg, exp_avg_sq];
    update(&rule, step.step, step.grad_scale, param, grad, states, None)
}
