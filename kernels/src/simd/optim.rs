//! Optimizer loops: parameter, gradient and state in one pass, so that each is read and written once.

use super::lane::{Acc, Lane};
use super::raw::{Reader, Writer};
use super::{Kernel, launch};
use crate::optim::{AdamWStep, SgdStep};
use crate::scalar;
use crate::span::{Span, SpanMut};

/// The caller passes `momentum` exactly when the step has some.
pub(crate) fn sgd<P: Lane, G: Lane, C: Acc>(
    param: SpanMut<'_>,
    grad: Span<'_>,
    momentum: Option<SpanMut<'_>>,
    step: &SgdStep,
) {
    let rule = SgdRule {
        // The sign goes with the scale: negating is exact, so the order does not matter.
        scale: C::narrow(if step.maximize {
            -step.grad_scale
        } else {
            step.grad_scale
        }),
        decay: (step.weight_decay != 0.0).then(|| C::narrow(step.weight_decay)),
        momentum: C::narrow(step.momentum),
        kept: C::narrow(1.0 - step.dampening),
        nesterov: step.nesterov,
        lr: C::narrow(step.lr),
    };
    let (param, grad) = (Writer::<P>::of(param), Reader::<G>::of(grad));
    match momentum.map(Writer::<C>::of) {
        None => launch(SgdPlain { param, grad, rule }),
        Some(momentum) if step.first => launch(SgdMomentum::<_, _, _, true> {
            param,
            grad,
            momentum,
            rule,
        }),
        Some(momentum) => launch(SgdMomentum::<_, _, _, false> {
            param,
            grad,
            momentum,
            rule,
        }),
    }
}

pub(crate) fn adamw<P: Lane, G: Lane, C: Acc>(
    param: SpanMut<'_>,
    grad: Span<'_>,
    exp_avg: SpanMut<'_>,
    exp_avg_sq: SpanMut<'_>,
    step: &AdamWStep,
) {
    let correction1 = 1.0 - scalar::power(step.beta1, step.step);
    let correction2 = 1.0 - scalar::power(step.beta2, step.step);
    launch(AdamW {
        param: Writer::<P>::of(param),
        grad: Reader::<G>::of(grad),
        exp_avg: Writer::<C>::of(exp_avg),
        exp_avg_sq: Writer::<C>::of(exp_avg_sq),
        scale: C::narrow(step.grad_scale),
        shrink: C::narrow(1.0 - step.lr * step.weight_decay),
        beta1: C::narrow(step.beta1),
        rest1: C::narrow(1.0 - step.beta1),
        beta2: C::narrow(step.beta2),
        rest2: C::narrow(1.0 - step.beta2),
        correction: C::narrow(correction2.sqrt()),
        eps: C::narrow(step.eps),
        stride: C::narrow(step.lr / correction1),
    });
}

/// The hyperparameters of one step, in the accumulator.
struct SgdRule<C> {
    scale: C,
    decay: Option<C>,
    momentum: C,
    kept: C,
    nesterov: bool,
    lr: C,
}

impl<C: Acc> SgdRule<C> {
    /// The gradient, scaled and with weight decay.
    #[inline(always)]
    fn slope(&self, param: C, grad: C) -> C {
        let scaled = grad * self.scale;
        match self.decay {
            None => scaled,
            Some(decay) => scaled + decay * param,
        }
    }
}

struct SgdPlain<'a, P, G, C> {
    param: Writer<'a, P>,
    grad: Reader<'a, G>,
    rule: SgdRule<C>,
}

impl<P: Lane, G: Lane, C: Acc> Kernel for SgdPlain<'_, P, G, C> {
    type Out = ();

    #[inline(always)]
    fn run(mut self) {
        assert_eq!(self.grad.len(), self.param.len());
        for index in 0..self.param.len() {
            // SAFETY: the loop ends at param.len(). `sgd_equals_the_oracle` runs every length.
            let p = C::load(unsafe { self.param.at(index) });
            // SAFETY: grad.len() is param.len(), asserted above; the same test.
            let g = C::load(unsafe { self.grad.at(index) });
            let moved = p - self.rule.lr * self.rule.slope(p, g);
            // SAFETY: as for the first load.
            unsafe { self.param.set(index, moved.store()) };
        }
    }
}

struct SgdMomentum<'a, P, G, C, const FIRST: bool> {
    param: Writer<'a, P>,
    grad: Reader<'a, G>,
    momentum: Writer<'a, C>,
    rule: SgdRule<C>,
}

impl<P: Lane, G: Lane, C: Acc, const FIRST: bool> Kernel for SgdMomentum<'_, P, G, C, FIRST> {
    type Out = ();

    #[inline(always)]
    fn run(mut self) {
        assert_eq!(self.grad.len(), self.param.len());
        assert_eq!(self.momentum.len(), self.param.len());
        let rule = &self.rule;
        for index in 0..self.param.len() {
            // SAFETY: the loop ends at param.len(). `sgd_equals_the_oracle` runs every length.
            let p = C::load(unsafe { self.param.at(index) });
            // SAFETY: grad.len() is param.len(), asserted above; the same test.
            let g = rule.slope(p, C::load(unsafe { self.grad.at(index) }));
            let m = if FIRST {
                g
            } else {
                // SAFETY: momentum.len() is param.len(), asserted above; the same test.
                rule.momentum * unsafe { self.momentum.at(index) } + rule.kept * g
            };
            // SAFETY: as for its load.
            unsafe { self.momentum.set(index, m) };
            let direction = if rule.nesterov {
                g + rule.momentum * m
            } else {
                m
            };
            // SAFETY: as for the first load.
            unsafe { self.param.set(index, (p - rule.lr * direction).store()) };
        }
    }
}

struct AdamW<'a, P, G, C> {
    param: Writer<'a, P>,
    grad: Reader<'a, G>,
    exp_avg: Writer<'a, C>,
    exp_avg_sq: Writer<'a, C>,
    scale: C,
    shrink: C,
    beta1: C,
    rest1: C,
    beta2: C,
    rest2: C,
    correction: C,
    eps: C,
    stride: C,
}

impl<P: Lane, G: Lane, C: Acc> Kernel for AdamW<'_, P, G, C> {
    type Out = ();

    #[inline(always)]
    fn run(mut self) {
        assert_eq!(self.grad.len(), self.param.len());
        assert_eq!(self.exp_avg.len(), self.param.len());
        assert_eq!(self.exp_avg_sq.len(), self.param.len());
        for index in 0..self.param.len() {
            // SAFETY: the loop ends at param.len(). `adamw_equals_the_oracle` runs every length.
            let p = C::load(unsafe { self.param.at(index) }) * self.shrink;
            // SAFETY: grad.len() is param.len(), asserted above; the same test.
            let g = C::load(unsafe { self.grad.at(index) }) * self.scale;
            // SAFETY: exp_avg.len() is param.len(), asserted above; the same test.
            let m = self.beta1 * unsafe { self.exp_avg.at(index) } + self.rest1 * g;
            // SAFETY: exp_avg_sq.len() is param.len(), asserted above; the same test.
            let v = self.beta2 * unsafe { self.exp_avg_sq.at(index) } + self.rest2 * (g * g);
            // SAFETY: as for its load.
            unsafe { self.exp_avg.set(index, m) };
            // SAFETY: as for its load.
            unsafe { self.exp_avg_sq.set(index, v) };
            let denominator = v.root() / self.correction + self.eps;
            let moved = p - self.stride * (m / denominator);
            // SAFETY: as for the first load.
            unsafe { self.param.set(index, moved.store()) };
        }
    }
}
