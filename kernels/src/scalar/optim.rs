//! Optimizer updates of one parameter, twice: with every operation in f64, and with every operation rounded to f32.
//! The order of the operations is the law; both follow it word for word.

use super::float::Float;
use crate::dtype::Dtype;
use crate::optim::{Adam, Lion, Rule, Sgd};

/// One parameter and its states after one step; see [`crate::update`]. The states are in f64 and, for parameters smaller
/// than f64, hold an f32.
pub fn update<P: Float, G: Float>(
    rule: &Rule,
    step: u64,
    grad_scale: f64,
    param: P,
    grad: G,
    states: &[f64],
) -> (P, Vec<f64>) {
    let wide = P::DTYPE == Dtype::F64;
    let number = |value| Number::new(value, wide);
    let p = number(param.decode());
    let g = number(grad.decode()).times(number(grad_scale));
    let states: Vec<Number> = states.iter().map(|state| number(*state)).collect();
    let (moved, states) = match rule {
        Rule::Sgd(rule) => sgd(rule, step, p, g, &states),
        Rule::Adam(rule) => {
            let g = decayed(g, rule.weight_decay, p);
            adam(rule, step, p, g, &states)
        }
        Rule::AdamW(rule) => {
            let p = p.times(number(1.0 - rule.lr * rule.weight_decay));
            adam(rule, step, p, g, &states)
        }
        Rule::Lion(rule) => lion(rule, p, g, &states),
    };
    let states = states.iter().map(|state| state.value).collect();
    (P::encode(moved.value), states)
}

fn sgd(rule: &Sgd, step: u64, p: Number, g: Number, states: &[Number]) -> (Number, Vec<Number>) {
    let g = if rule.maximize { g.negated() } else { g };
    let g = decayed(g, rule.weight_decay, p);
    let lr = p.like(rule.lr);
    let [m] = states else {
        return (p.minus(lr.times(g)), Vec::new());
    };
    let momentum = p.like(rule.momentum);
    let m = if step == 1 {
        g
    } else {
        let kept = momentum.times(*m);
        kept.plus(p.like(1.0 - rule.dampening).times(g))
    };
    let direction = if rule.nesterov {
        g.plus(momentum.times(m))
    } else {
        m
    };
    (p.minus(lr.times(direction)), vec![m])
}

fn adam(rule: &Adam, step: u64, p: Number, g: Number, states: &[Number]) -> (Number, Vec<Number>) {
    let m = mean(rule.beta1, states[0], g);
    let v = mean(rule.beta2, states[1], g.times(g));
    let correction1 = 1.0 - power(rule.beta1, step);
    let correction2 = 1.0 - power(rule.beta2, step);
    let root = v.root().over(p.like(correction2.sqrt()));
    let ratio = m.over(root.plus(p.like(rule.eps)));
    let moved = p.minus(p.like(rule.lr / correction1).times(ratio));
    (moved, vec![m, v])
}

fn lion(rule: &Lion, p: Number, g: Number, states: &[Number]) -> (Number, Vec<Number>) {
    let direction = mean(rule.beta1, states[0], g).sign();
    let m = mean(rule.beta2, states[0], g);
    let p = p.times(p.like(1.0 - rule.lr * rule.weight_decay));
    (p.minus(p.like(rule.lr).times(direction)), vec![m])
}

/// The gradient with an L2 penalty; none leaves it alone, even beside an infinite parameter.
fn decayed(g: Number, weight_decay: f64, p: Number) -> Number {
    if weight_decay == 0.0 {
        g
    } else {
        g.plus(p.like(weight_decay).times(p))
    }
}

/// beta * old + (1 - beta) * new
fn mean(beta: f64, old: Number, new: Number) -> Number {
    let kept = new.like(beta).times(old);
    kept.plus(new.like(1.0 - beta).times(new))
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

    /// Another number in the same accumulator.
    fn like(self, value: f64) -> Number {
        Number::new(value, self.wide)
    }

    // An f64 result rounded to f32 is the f32 result for +, -, *, / and the square root of two f32: f64 has more than
    // twice the digits plus two, so the double rounding is innocuous (Figueroa, "When is double rounding innocuous?").
    fn plus(self, other: Number) -> Number {
        self.like(self.value + other.value)
    }
    fn minus(self, other: Number) -> Number {
        self.like(self.value - other.value)
    }
    fn times(self, other: Number) -> Number {
        self.like(self.value * other.value)
    }
    fn over(self, other: Number) -> Number {
        self.like(self.value / other.value)
    }
    fn root(self) -> Number {
        self.like(self.value.sqrt())
    }
    fn negated(self) -> Number {
        self.like(-self.value)
    }
    /// 1, -1, or what is neither: a zero or NaN.
    fn sign(self) -> Number {
        if self.value > 0.0 {
            self.like(1.0)
        } else if self.value < 0.0 {
            self.like(-1.0)
        } else {
            self
        }
    }
}
