//! Goal: a step on the device is the step of the host. Method: bit equality of parameters, states and copies with
//! `scalar::update`, for every rule in every form, every dtype of parameter, gradient and copy, at all places.

use bytemuck::{Pod, Zeroable};
use fabric_kernels::scalar::{self, Float};
use fabric_kernels::{Adam, Lion, Rule, Sgd};

use crate::table::{AROUND_CHUNK, CHUNK, GRIDS, Slots, every_length, launch, lengths, parts};
use crate::values::floats;

/// `Update` in `abi.cuh`.
#[repr(C)]
#[derive(Copy, Clone, Default, Pod, Zeroable)]
struct Update {
    param: u64,
    grad: u64,
    states: [u64; 2],
    copy: u64,
    numel: u64,
    first: u64,
    unused: u64,
}

/// `Rule` in `abi.cuh`.
#[repr(C)]
#[derive(Copy, Clone, Default, Pod, Zeroable)]
struct Numbers {
    lr: f64,
    a: f64,
    a_rest: f64,
    b: f64,
    b_rest: f64,
    c: f64,
    d: f64,
    e: f64,
    grad_scale: f64,
    unused0: f64,
    flags: u32,
    grad_dtype: u32,
    copy_dtype: u32,
    unused1: u32,
}

/// base^exponent by repeated squaring, as the host has it.
fn power(base: f64, exponent: u64) -> f64 {
    let (mut result, mut square) = (1.0, base);
    for bit in 0..64 - exponent.leading_zeros() {
        if exponent >> bit & 1 == 1 {
            result *= square;
        }
        square *= square;
    }
    result
}

/// One step: a rule, its number, and the gradient's scale.
type Step = (Rule, u64, f64);

/// The numbers of a step, each in f64, by the table in `abi.cuh`.
fn numbers((rule, step, grad_scale): Step) -> Numbers {
    let plain = Numbers {
        grad_scale,
        ..Numbers::default()
    };
    let adam = |rule: &Adam| Numbers {
        lr: rule.lr / (1.0 - power(rule.beta1, step)),
        a: rule.beta1,
        a_rest: 1.0 - rule.beta1,
        b: rule.beta2,
        b_rest: 1.0 - rule.beta2,
        c: rule.weight_decay,
        d: (1.0 - power(rule.beta2, step)).sqrt(),
        e: rule.eps,
        ..plain
    };
    match &rule {
        Rule::Sgd(rule) => Numbers {
            lr: rule.lr,
            a: rule.momentum,
            b: 1.0 - rule.dampening,
            c: rule.weight_decay,
            flags: u32::from(rule.maximize)
                | u32::from(rule.nesterov) << 1
                | u32::from(step == 1) << 2
                | u32::from(rule.momentum != 0.0) << 3,
            ..plain
        },
        Rule::Adam(rule) => adam(rule),
        Rule::AdamW(rule) => Numbers {
            c: 1.0 - rule.lr * rule.weight_decay,
            flags: 16,
            ..adam(rule)
        },
        Rule::Lion(rule) => Numbers {
            lr: rule.lr,
            a: rule.beta1,
            a_rest: 1.0 - rule.beta1,
            b: rule.beta2,
            b_rest: 1.0 - rule.beta2,
            c: 1.0 - rule.lr * rule.weight_decay,
            ..plain
        },
    }
}

fn kernel<P: Float>(rule: &Rule) -> String {
    let name = if rule.name() == "adamw" {
        "adam"
    } else {
        rule.name()
    };
    format!("{name}_{}", P::DTYPE)
}

/// Every rule in every form that takes another path.
fn steps() -> Vec<Step> {
    let plain = Sgd {
        lr: 0.1,
        momentum: 0.0,
        dampening: 0.0,
        weight_decay: 0.0,
        nesterov: false,
        maximize: false,
    };
    let momentum = Sgd {
        momentum: 0.9,
        dampening: 0.3,
        weight_decay: 0.01,
        ..plain
    };
    let ascent = Sgd {
        maximize: true,
        ..momentum
    };
    let penalty = Sgd {
        momentum: 0.0,
        ..ascent
    };
    let nesterov = Sgd {
        nesterov: true,
        dampening: 0.0,
        ..momentum
    };
    let adam = Adam {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
    };
    let free = Adam {
        weight_decay: 0.0,
        ..adam
    };
    let lion = Lion {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.99,
        weight_decay: 0.1,
    };
    vec![
        (Rule::Sgd(plain), 1, 1.0),
        (Rule::Sgd(penalty), 2, 0.3),
        (Rule::Sgd(momentum), 2, 1.0),
        (Rule::Sgd(ascent), 1, 1.0),
        (Rule::Sgd(nesterov), 7, 1.0 / 3.0),
        (Rule::Sgd(nesterov), 1, 1.0),
        // Too small a penalty for an f32, and still one.
        (
            Rule::Sgd(Sgd {
                weight_decay: 1e-300,
                ..plain
            }),
            3,
            1.0,
        ),
        (Rule::Adam(adam), 1, 1.0),
        (Rule::Adam(free), 1000, 0.7),
        (Rule::AdamW(adam), 1, 1.0),
        (Rule::AdamW(free), 1000, 0.7),
        (Rule::Lion(lion), 1, 1.0),
        (Rule::Lion(lion), 3, 0.7),
    ]
}

/// One row of elements before a step, and after it as the oracle has it.
struct Rows<P, S, G, K> {
    step: Step,
    param: Vec<P>,
    grad: Vec<G>,
    states: Vec<Vec<S>>,
    moved: Vec<P>,
    moved_states: Vec<Vec<S>>,
    copy: Vec<K>,
}

/// Element offsets of parameter, gradient, states and copy.
type Places = [usize; 5];

impl<P: Float, S: Float, G: Float, K: Float> Rows<P, S, G, K> {
    fn new(step: Step, count: usize) -> Self {
        let (rule, number, grad_scale) = step;
        let param = floats::<P>(1, count);
        let grad = floats::<G>(2, count);
        // Any of them may be a mean square, which is not negative.
        let state = |seed| {
            floats::<S>(seed, count)
                .iter()
                .map(|s| S::encode(s.decode().abs()))
                .collect()
        };
        let states: Vec<Vec<S>> = (3..)
            .zip(rule.states())
            .map(|(seed, _)| state(seed))
            .collect();
        let mut rows = Rows {
            step,
            moved: Vec::new(),
            moved_states: vec![Vec::new(); states.len()],
            copy: Vec::new(),
            param,
            grad,
            states,
        };
        for index in 0..count {
            let before: Vec<f64> = rows
                .states
                .iter()
                .map(|state| state[index].decode())
                .collect();
            let (param, grad) = (rows.param[index], rows.grad[index]);
            let (moved, states) = scalar::update(&rule, number, grad_scale, param, grad, &before);
            rows.moved.push(moved);
            rows.copy.push(scalar::cast(moved));
            for (row, state) in rows.moved_states.iter_mut().zip(states) {
                row.push(S::encode(state));
            }
        }
        rows
    }

    /// Takes the step over one table, whose entries are ranges of the rows.
    fn check(&self, ranges: &[std::ops::Range<usize>], places: Places, grid: u32, with_copy: bool) {
        let param_rows = parts(&self.param, ranges);
        let mut param = Slots::of(&param_rows, places[0]);
        let mut grad = Slots::of(&parts(&self.grad, ranges), places[1]);
        let states = self.states.iter().zip(&places[2..]);
        let mut states: Vec<Slots> = states
            .map(|(state, place)| Slots::of(&parts(state, ranges), *place))
            .collect();
        let mut copy = Slots::new::<K>(&lengths(&param_rows), places[4]);

        let (params, grads, copies) = (param.addresses(), grad.addresses(), copy.addresses());
        let state_rows: Vec<Vec<u64>> = states.iter_mut().map(Slots::addresses).collect();
        let (mut table, mut first) = (Vec::new(), 0);
        for (entry, range) in ranges.iter().enumerate() {
            let state = |index: usize| state_rows.get(index).map_or(0, |row| row[entry]);
            table.push(Update {
                param: params[entry],
                grad: grads[entry],
                states: [state(0), state(1)],
                copy: if with_copy { copies[entry] } else { 0 },
                numel: range.len() as u64,
                first,
                unused: 0,
            });
            first += range.len().div_ceil(CHUNK) as u64;
        }
        let numbers = Numbers {
            grad_dtype: G::DTYPE.code().into(),
            copy_dtype: K::DTYPE.code().into(),
            ..numbers(self.step)
        };
        let name = kernel::<P>(&self.step.0);
        launch(
            &name,
            grid,
            (&table, first),
            &[bytemuck::bytes_of(&numbers)],
        );

        let what = || {
            let (rule, number, scale) = self.step;
            format!(
                "{name} {rule:?} step {number} * {scale}, {} to {}, {places:?}",
                G::DTYPE,
                K::DTYPE
            )
        };
        param.expect(&parts(&self.moved, ranges), what);
        for (state, moved) in states.iter().zip(&self.moved_states) {
            state.expect(&parts(moved, ranges), what);
        }
        if with_copy {
            copy.expect(&parts(&self.copy, ranges), what);
        } else {
            copy.expect_untouched(what);
        }
    }
}

fn check_dtypes<P: Float, S: Float, G: Float, K: Float>() {
    let ranges = every_length();
    for (index, step) in steps().into_iter().enumerate() {
        let rows = Rows::<P, S, G, K>::new(step, 3 * 257);
        let together = index % 4;
        rows.check(&ranges, [together; 5], 1 + index as u32 % 3, true);
        rows.check(&ranges, [1, 2, 3, 0, index % 16], 2, index % 2 == 0);
    }
}

/// All six gradients, all six copies.
macro_rules! check_dtypes {
    ($p:ty, $s:ty) => {
        check_dtypes!($p, $s; f64, f32, half::f16, half::bf16, fabric_kernels::F8E4M3, fabric_kernels::F8E5M2)
    };
    ($p:ty, $s:ty; $($g:ty),*) => {$(
        check_dtypes::<$p, $s, $g, f64>();
        check_dtypes::<$p, $s, $g, f32>();
        check_dtypes::<$p, $s, $g, half::f16>();
        check_dtypes::<$p, $s, $g, half::bf16>();
        check_dtypes::<$p, $s, $g, fabric_kernels::F8E4M3>();
        check_dtypes::<$p, $s, $g, fabric_kernels::F8E5M2>();
    )*};
}

#[test]
fn f64_parameters_equal_the_oracle_in_all_forms_and_dtypes() {
    check_dtypes!(f64, f64);
}

#[test]
fn f32_parameters_equal_the_oracle_in_all_forms_and_dtypes() {
    check_dtypes!(f32, f32);
}

#[test]
fn f16_parameters_equal_the_oracle_in_all_forms_and_dtypes() {
    check_dtypes!(half::f16, f32);
}

#[test]
fn bf16_parameters_equal_the_oracle_in_all_forms_and_dtypes() {
    check_dtypes!(half::bf16, f32);
}

/// Parameter, gradient, each state and the copy, each at its own distance from 16 bytes.
#[test]
fn every_misalignment_equals_the_oracle() {
    fn check<P: Float, S: Float, G: Float, K: Float>(step: Step) {
        let rows = Rows::<P, S, G, K>::new(step, 3 * 257);
        for place in 0..4usize.pow(5) {
            let places = [0, 1, 2, 3, 4].map(|digit| place / 4usize.pow(digit) % 4);
            rows.check(
                &every_length()[120..140],
                places,
                1 + place as u32 % 3,
                true,
            );
        }
    }
    for step in [steps()[4], steps()[9], steps()[12]] {
        check::<f32, f32, half::bf16, half::bf16>(step);
        check::<half::bf16, f32, f32, half::f16>(step);
        check::<f64, f64, f64, f32>(step);
    }
}

#[test]
fn entries_around_a_chunk_are_the_same_under_every_grid() {
    fn check<P: Float, S: Float, G: Float, K: Float>() {
        let ends = AROUND_CHUNK.iter().scan(0, |end, len| {
            *end += len;
            Some(*end - len..*end)
        });
        let ranges: Vec<_> = ends.collect();
        for step in [steps()[4], steps()[9], steps()[12]] {
            let rows = Rows::<P, S, G, K>::new(step, AROUND_CHUNK.iter().sum());
            for grid in GRIDS {
                rows.check(&ranges, [0; 5], grid, true);
                rows.check(&ranges, [3; 5], grid, false);
            }
        }
    }
    check::<f32, f32, half::bf16, half::bf16>();
    check::<f64, f64, f64, f64>();
    check::<half::f16, f32, half::f16, f32>();
}
