//! Optimizer updates of one parameter, twice: with every operation in f64, and with every operation rounded to f32.
//! The order of the operations is the law; both follow it word for word.

use super::float::Float;
use crate::dtype::Dtype;
use crate::optim::{AdamWStep, SgdStep};

/// A number that rounds every result to the accumulator of the parameter.
#[derive(Copy, Clone)]
struct Number {
    value: f64,
    wide: bool,
}

impl Number {
    fn new(value: f64, wide: bool) -> Self {
        Number {
            value: if wide { value } else { f64::from(value as f32) },
            wide,
        }
    }

    // An f64 result rounded to f32 is the f32 result for +, -, *, / and the square root of two f32: f64 has more than
    // twice the digits plus two, so the double rounding is innocuous (Figueroa, "When is double rounding innocuous?").
    fn plus(self, other: Number) -> Number {
        Number::new(self.value + other.value, self.wide)
    }
    fn minus(self, other: Number) -> Number {
        Number::new(self.value - other.value, self.wide)
    }
    fn times(self, other: Number) -> Number {
        Number::new(self.value * other.value, self.wide)
    }
    fn over(self, other: Number) -> Number {
        Number::new(self.value / other.value, self.wide)
    }
    fn root(self) -> Number {
        Number::new(self.value.sqrt(), self.wide)
    }
}

/// One parameter and its momentum after one step; see [`crate::sgd`]. The momentum is in f64 and, for parameters
/// smaller than f64, holds an f32.
pub fn sgd<P: Float, G: Float>(param: P, grad: G, momentum: f64, step: &SgdStep) -> (P, f64) {
    let wide = P::DTYPE == Dtype::F64;
    let number = |value| Number::new(value, wide);
    let p = number(param.decode());
    let mut g = number(grad.decode()).times(number(step.grad_scale));
    if step.maximize {
        g = number(-g.value);
    }
    if step.weight_decay != 0.0 {
        g = g.plus(number(step.weight_decay).times(p));
    }
    let mut m = number(momentum);
    if step.momentum != 0.0 {
        m = if step.first {
            g
        } else {
            let kept = number(step.momentum).times(m);
            kept.plus(number(1.0 - step.dampening).times(g))
        };
        g = if step.nesterov {
            g.plus(number(step.momentum).times(m))
        } else {
            m
        };
    }
    let moved = p.minus(number(step.lr).times(g));
    (P::encode(moved.value), m.value)
}

/// One parameter, its mean and its mean square after one step; see [`crate::adamw`]. Both means are in f64 and, for
/// parameters smaller than f64, hold an f32.
pub fn adamw<P: Float, G: Float>(
    param: P,
    grad: G,
    exp_avg: f64,
    exp_avg_sq: f64,
    step: &AdamWStep,
) -> (P, f64, f64) {
    let wide = P::DTYPE == Dtype::F64;
    let number = |value| Number::new(value, wide);
    let g = number(grad.decode()).times(number(step.grad_scale));
    let p = number(param.decode()).times(number(1.0 - step.lr * step.weight_decay));
    let m = number(step.beta1)
        .times(number(exp_avg))
        .plus(number(1.0 - step.beta1).times(g));
    let v = number(step.beta2)
        .times(number(exp_avg_sq))
        .plus(number(1.0 - step.beta2).times(g.times(g)));
    let correction1 = 1.0 - power(step.beta1, step.step);
    let correction2 = 1.0 - power(step.beta2, step.step);
    let denominator = v
        .root()
        .over(number(correction2.sqrt()))
        .plus(number(step.eps));
    let moved = p.minus(number(step.lr / correction1).times(m.over(denominator)));
    (P::encode(moved.value), m.value, v.value)
}

/// base^exponent by repeated squaring: the same bits on every machine, which `powf` does not promise.
pub(crate) fn power(base: f64, exponent: u64) -> f64 {
    let (mut result, mut square, mut left) = (1.0, base, exponent);
    while left > 0 {
        if left & 1 == 1 {
            result *= square;
        }
        square *= square;
        left >>= 1;
    }
    result
}
