//! What one step makes of one element, rule by rule. The order of the operations is that of the oracle.

use crate::optim::{Adam, Lion, Sgd};
use crate::scalar;
use crate::simd::lane::Acc;

/// What one step makes of one parameter, its gradient and its states.
pub(super) trait Apply<C, const STATES: usize>: Copy {
    fn apply(&self, param: C, grad: C, states: [C; STATES]) -> (C, [C; STATES]);
}

/// The gradient, scaled and with an L2 penalty.
#[derive(Copy, Clone)]
struct Slope<C> {
    scale: C,
    decay: Option<C>,
}

impl<C: Acc> Slope<C> {
    fn new(scale: f64, weight_decay: f64) -> Self {
        Slope {
            scale: C::narrow(scale),
            decay: (weight_decay != 0.0).then(|| C::narrow(weight_decay)),
        }
    }

    #[inline(always)]
    fn of(&self, param: C, grad: C) -> C {
        let scaled = grad * self.scale;
        match self.decay {
            None => scaled,
            Some(decay) => scaled + decay * param,
        }
    }
}

/// A running mean: beta * old + (1 - beta) * new
#[derive(Copy, Clone)]
struct Mean<C> {
    beta: C,
    rest: C,
}

impl<C: Acc> Mean<C> {
    fn new(beta: f64) -> Self {
        Mean {
            beta: C::narrow(beta),
            rest: C::narrow(1.0 - beta),
        }
    }

    #[inline(always)]
    fn of(&self, old: C, new: C) -> C {
        self.beta * old + self.rest * new
    }
}

/// Without momentum.
#[derive(Copy, Clone)]
pub(super) struct SgdRule<C> {
    slope: Slope<C>,
    momentum: C,
    kept: C,
    nesterov: bool,
    lr: C,
}

impl<C: Acc> SgdRule<C> {
    pub(super) fn new(rule: &Sgd, grad_scale: f64) -> Self {
        // The sign goes with the scale: negating is exact, so the order does not matter.
        let sign = if rule.maximize { -1.0 } else { 1.0 };
        SgdRule {
            slope: Slope::new(sign * grad_scale, rule.weight_decay),
            momentum: C::narrow(rule.momentum),
            kept: C::narrow(1.0 - rule.dampening),
            nesterov: rule.nesterov,
            lr: C::narrow(rule.lr),
        }
    }

    /// The parameter, moved along the buffer `m`, or beyond it.
    #[inline(always)]
    fn moved(&self, param: C, g: C, m: C) -> C {
        let direction = if self.nesterov {
            g + self.momentum * m
        } else {
            m
        };
        param - self.lr * direction
    }
}

impl<C: Acc> Apply<C, 0> for SgdRule<C> {
    #[inline(always)]
    fn apply(&self, param: C, grad: C, _: [C; 0]) -> (C, [C; 0]) {
        (param - self.lr * self.slope.of(param, grad), [])
    }
}

/// With momentum.
#[derive(Copy, Clone)]
pub(super) struct Momentum<C>(pub(super) SgdRule<C>);

impl<C: Acc> Apply<C, 1> for Momentum<C> {
    #[inline(always)]
    fn apply(&self, param: C, grad: C, [m]: [C; 1]) -> (C, [C; 1]) {
        let rule = &self.0;
        let g = rule.slope.of(param, grad);
        let m = rule.momentum * m + rule.kept * g;
        (rule.moved(param, g, m), [m])
    }
}

/// With momentum, on the first step, which does not look at the buffer.
#[derive(Copy, Clone)]
pub(super) struct FirstMomentum<C>(pub(super) SgdRule<C>);

impl<C: Acc> Apply<C, 1> for FirstMomentum<C> {
    #[inline(always)]
    fn apply(&self, param: C, grad: C, _: [C; 1]) -> (C, [C; 1]) {
        let m = self.0.slope.of(param, grad);
        (self.0.moved(param, m, m), [m])
    }
}

/// Adam, with the weight decay in the gradient or, `DECOUPLED`, in the parameter.
#[derive(Copy, Clone)]
pub(super) struct AdamRule<C, const DECOUPLED: bool> {
    slope: Slope<C>,
    shrink: C,
    first: Mean<C>,
    second: Mean<C>,
    correction: C,
    eps: C,
    stride: C,
}

impl<C: Acc, const DECOUPLED: bool> AdamRule<C, DECOUPLED> {
    pub(super) fn new(rule: &Adam, step: u64, grad_scale: f64) -> Self {
        let correction1 = 1.0 - scalar::power(rule.beta1, step);
        let correction2 = 1.0 - scalar::power(rule.beta2, step);
        AdamRule {
            slope: Slope::new(grad_scale, if DECOUPLED { 0.0 } else { rule.weight_decay }),
            shrink: C::narrow(1.0 - rule.lr * rule.weight_decay),
            first: Mean::new(rule.beta1),
            second: Mean::new(rule.beta2),
            correction: C::narrow(correction2.sqrt()),
            eps: C::narrow(rule.eps),
            stride: C::narrow(rule.lr / correction1),
        }
    }
}

impl<C: Acc, const DECOUPLED: bool> Apply<C, 2> for AdamRule<C, DECOUPLED> {
    #[inline(always)]
    fn apply(&self, param: C, grad: C, [m, v]: [C; 2]) -> (C, [C; 2]) {
        let g = self.slope.of(param, grad);
        let p = if DECOUPLED {
            param * self.shrink
        } else {
            param
        };
        let m = self.first.of(m, g);
        let v = self.second.of(v, g * g);
        let denominator = v.root() / self.correction + self.eps;
        (p - self.stride * (m / denominator), [m, v])
    }
}

/// The sign of a mean.
#[derive(Copy, Clone)]
pub(super) struct LionRule<C> {
    scale: C,
    shrink: C,
    ahead: Mean<C>,
    kept: Mean<C>,
    lr: C,
}

impl<C: Acc> LionRule<C> {
    pub(super) fn new(rule: &Lion, grad_scale: f64) -> Self {
        LionRule {
            scale: C::narrow(grad_scale),
            shrink: C::narrow(1.0 - rule.lr * rule.weight_decay),
            ahead: Mean::new(rule.beta1),
            kept: Mean::new(rule.beta2),
            lr: C::narrow(rule.lr),
        }
    }
}

impl<C: Acc> Apply<C, 1> for LionRule<C> {
    #[inline(always)]
    fn apply(&self, param: C, grad: C, [m]: [C; 1]) -> (C, [C; 1]) {
        let (zero, one) = (C::narrow(0.0), C::narrow(1.0));
        let g = grad * self.scale;
        let ahead = self.ahead.of(m, g);
        // Zeros stay, and so does NaN.
        let sign = if ahead > zero { one } else { ahead };
        let sign = if ahead < zero { -one } else { sign };
        let moved = param * self.shrink - self.lr * sign;
        (moved, [self.kept.of(m, g)])
    }
}
