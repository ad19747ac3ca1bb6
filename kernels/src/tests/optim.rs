//! Goal: the optimizers take torch's steps. Method: bit equality with the oracle over every length; steps worked out by
//! hand; and many steps against a plain f64 rendering of torch's documentation.

use std::ops::Range;

use half::{bf16, f16};

use proptest::prelude::*;

use super::steps::{AdamWStep, SgdStep, adamw, sgd};
use super::*;
use crate::simd::on_every_isa;
use crate::{Adam, Lion, Rule, Sgd, Span, SpanMut};
use crate::{scalar, update};

const SGD: SgdStep = SgdStep {
    lr: 0.1,
    momentum: 0.0,
    dampening: 0.0,
    weight_decay: 0.0,
    nesterov: false,
    maximize: false,
    grad_scale: 1.0,
    first: false,
};

const ADAMW: AdamWStep = AdamWStep {
    lr: 1e-3,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.01,
    step: 1,
    grad_scale: 1.0,
};

const PLAIN: Sgd = Sgd {
    lr: 0.1,
    momentum: 0.0,
    dampening: 0.0,
    weight_decay: 0.0,
    nesterov: false,
    maximize: false,
};

const ADAM: Adam = Adam {
    lr: 1e-3,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.01,
};

const LION: Lion = Lion {
    lr: 1e-4,
    beta1: 0.9,
    beta2: 0.99,
    weight_decay: 0.1,
};

/// Every rule in every form that takes another path, with the number of the step and the gradient's scale.
fn rules() -> Vec<(Rule, u64, f64)> {
    let momentum = Sgd {
        momentum: 0.9,
        dampening: 0.3,
        weight_decay: 0.01,
        ..PLAIN
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
    let free = Adam {
        weight_decay: 0.0,
        ..ADAM
    };
    vec![
        (Rule::Sgd(PLAIN), 1, 1.0),
        (Rule::Sgd(penalty), 2, 0.3),
        (Rule::Sgd(momentum), 2, 1.0),
        (Rule::Sgd(ascent), 1, 1.0),
        (Rule::Sgd(nesterov), 7, 1.0 / 3.0),
        (Rule::Sgd(nesterov), 1, 1.0),
        (Rule::Adam(ADAM), 1, 1.0),
        (Rule::Adam(free), 1000, 0.7),
        (Rule::AdamW(ADAM), 1, 1.0),
        (Rule::AdamW(free), 1000, 0.7),
        (Rule::Lion(LION), 1, 1.0),
        (Rule::Lion(LION), 3, 0.7),
    ]
}

/// States of which any is allowed to stand for a mean square.
fn states<S: Float>(rule: &Rule, count: usize) -> Vec<Vec<S>> {
    let one = |seed| {
        let mut stream = Stream(seed);
        (0..count).map(move |_| S::encode(unit(&mut stream).abs()))
    };
    (2..)
        .zip(rule.states())
        .map(|(seed, _)| one(seed).collect())
        .collect()
}

/// Updates the elements in `range` of all buffers.
fn take<P: Element, S: Element, G: Element, K: Element>(
    (rule, step, scale): (&Rule, u64, f64),
    range: Range<usize>,
    param: &mut [P],
    grad: &[G],
    states: &mut [Vec<S>],
    copy: Option<&mut [K]>,
) {
    let mut states: Vec<SpanMut<'_>> = states
        .iter_mut()
        .map(|state| SpanMut::of(&mut state[range.clone()]))
        .collect();
    let copy = copy.map(|copy| SpanMut::of(&mut copy[range.clone()]));
    let param = SpanMut::of(&mut param[range.clone()]);
    let grad = Span::of(&grad[range]);
    update(rule, step, scale, param, grad, &mut states, copy).unwrap();
}

fn check_rules<P: Float, S: Float, G: Float>() {
    let param = floats::<P>(1, ROOM);
    let grad = floats::<G>(3, ROOM);
    for (rule, step, scale) in rules() {
        let old = states::<S>(&rule, ROOM);
        let oracle: Vec<(P, Vec<f64>)> = (0..ROOM)
            .map(|i| {
                let state: Vec<f64> = old.iter().map(|state| state[i].decode()).collect();
                scalar::update(&rule, step, scale, param[i], grad[i], &state)
            })
            .collect();
        on_every_isa(|isa| {
            for len in 0..=257 {
                let range = 1 + len % 8..1 + len % 8 + len;
                let (mut p, mut all) = (param.clone(), old.clone());
                let mut copy = vec![bf16::ONE; ROOM];
                // Half of the lengths without a copy, which is another path.
                let target = (len % 2 == 1).then_some(&mut copy[..]);
                let how = (&rule, step, scale);
                take(how, range.clone(), &mut p, &grad, &mut all, target);
                let what = || format!("{} {}, {isa:?}, {len}, {rule:?}", P::DTYPE, G::DTYPE);
                for i in 0..ROOM {
                    let inside = range.contains(&i);
                    let expected = if inside { oracle[i].0 } else { param[i] };
                    assert!(same(p[i], expected), "{}: param {i}", what());
                    for (k, state) in all.iter().enumerate() {
                        let expected = if inside {
                            S::encode(oracle[i].1[k])
                        } else {
                            old[k][i]
                        };
                        assert!(same(state[i], expected), "{}: state {k} {i}", what());
                    }
                    let copied = if inside && len % 2 == 1 {
                        scalar::cast(p[i])
                    } else {
                        bf16::ONE
                    };
                    assert!(same(copy[i], copied), "{}: copy {i}", what());
                }
            }
        });
    }
}

/// All gradients of one parameter type.
macro_rules! for_grads {
    ($check:ident, $param:ty, $state:ty) => {
        $check::<$param, $state, f64>();
        $check::<$param, $state, f32>();
        $check::<$param, $state, f16>();
        $check::<$param, $state, bf16>();
        $check::<$param, $state, crate::F8E4M3>();
        $check::<$param, $state, crate::F8E5M2>();
    };
}

#[test]
fn every_rule_equals_the_oracle() {
    for_grads!(check_rules, f64, f64);
    for_grads!(check_rules, f32, f32);
    for_grads!(check_rules, f16, f32);
    for_grads!(check_rules, bf16, f32);
}

fn check_copy<G: Float, K: Float>() {
    const COUNT: usize = 5000; // two blocks and more
    let (param, grad) = (floats::<f32>(1, COUNT), floats::<G>(3, COUNT));
    for (rule, step, scale) in rules() {
        let how = (&rule, step, scale);
        let (mut alone, mut fused) = (param.clone(), param.clone());
        let (mut state, mut other) = (states::<f32>(&rule, COUNT), states::<f32>(&rule, COUNT));
        let mut copy = vec![K::encode(0.0); COUNT];
        take::<_, _, _, K>(how, 0..COUNT, &mut alone, &grad, &mut state, None);
        take(
            how,
            0..COUNT,
            &mut fused,
            &grad,
            &mut other,
            Some(&mut copy[..]),
        );
        let mut expected = vec![K::encode(0.0); COUNT];
        crate::cast(Span::of(&alone), SpanMut::of(&mut expected)).unwrap();
        assert_same(&fused, &alone, || {
            format!("param beside {}, {rule:?}", K::DTYPE)
        });
        assert_same(&copy, &expected, || {
            format!("copy in {}, {rule:?}", K::DTYPE)
        });
        for (found, expected) in other.iter().zip(&state) {
            assert_same(found, expected, || {
                format!("state beside {}, {rule:?}", K::DTYPE)
            });
        }
    }
}

#[test]
fn a_copy_is_what_a_cast_afterwards_would_write() {
    for_float_pairs!(check_copy);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn where_a_shard_was_cut_changes_no_bit(seed in any::<u64>(), count in 1usize..5000) {
        let mut stream = Stream(seed);
        let (param, grad) = (floats::<bf16>(seed, count), floats::<f16>(!seed, count));
        for (rule, step, scale) in rules() {
            let how = (&rule, step, scale);
            let (mut whole, mut all) = (param.clone(), states::<f32>(&rule, count));
            let mut copy = vec![f16::ZERO; count];
            take(how, 0..count, &mut whole, &grad, &mut all, Some(&mut copy[..]));
            let (mut cut, mut some) = (param.clone(), states::<f32>(&rule, count));
            let mut pieces = vec![f16::ZERO; count];
            let mut start = 0;
            while start < count {
                let end = count.min(start + 1 + stream.next() as usize % 1500);
                take(how, start..end, &mut cut, &grad, &mut some, Some(&mut pieces[..]));
                start = end;
            }
            assert_same(&cut, &whole, || format!("param, {rule:?}"));
            assert_same(&pieces, &copy, || format!("copy, {rule:?}"));
            for (found, expected) in some.iter().zip(&all) {
                assert_same(found, expected, || format!("state, {rule:?}"));
            }
        }
    }
}

/// One update of one f64 without a copy.
fn one(rule: &Rule, step: u64, scale: f64, p: &mut f64, grad: f64, states: &mut [f64]) {
    let (param, grad) = (SpanMut::of(std::slice::from_mut(p)), [grad]);
    let mut states: Vec<SpanMut<'_>> = states.chunks_mut(1).map(SpanMut::of).collect();
    update(rule, step, scale, param, Span::of(&grad), &mut states, None).unwrap();
}

#[test]
fn two_adam_steps_by_hand() {
    let rule = |weight_decay| {
        Rule::Adam(Adam {
            lr: 0.1,
            eps: 0.0,
            weight_decay,
            ..ADAM
        })
    };
    let (mut p, mut states) = (1.0, [0.0; 2]);
    // g = 2 * 0.25 - 1 * 1 = -0.5: the first step moves by lr against its sign, as in AdamW, but without shrinking.
    one(&rule(-1.0), 1, 2.0, &mut p, 0.25, &mut states);
    assert_close(p, 1.1, 1e-12);
    assert_close(states[0], -0.05, 1e-12);
    assert_close(states[1], 0.00025, 1e-12);
    // g = 0.5: m = -0.045 + 0.05 = 0.005, / 0.19; v = 0.25 unbiased, its root 0.5.
    one(&rule(0.0), 2, 1.0, &mut p, 0.5, &mut states);
    assert_close(p, 1.1 - 0.1 * (0.005 / 0.19) / 0.5, 1e-12);
    // An L2 penalty alone moves a parameter by lr, whatever the penalty; decoupled, by lr times the penalty.
    let (mut p, mut states) = (3.0, [0.0; 2]);
    one(&rule(0.01), 1, 1.0, &mut p, 0.0, &mut states);
    assert_close(p, 2.9, 1e-12);
}

#[test]
fn three_lion_steps_by_hand() {
    let rule = Rule::Lion(Lion {
        lr: 0.1,
        beta1: 0.5,
        beta2: 0.75,
        weight_decay: 0.5,
    });
    let (mut p, mut m) = (2.0, [0.0]);
    // c = 2 > 0; p = 2 * 0.95 - 0.1; m = 1
    one(&rule, 1, 0.5, &mut p, 8.0, &mut m);
    assert_close(p, 1.8, 1e-15);
    assert_eq!(m, [1.0]);
    // c = 0.5 - 0.25 > 0, against the gradient's own sign; m = 0.75 - 0.125
    one(&rule, 2, 1.0, &mut p, -0.5, &mut m);
    assert_close(p, 1.8 * 0.95 - 0.1, 1e-15);
    assert_eq!(m, [0.625]);
    // c = 0.3125 - 0.3125 = 0: only the decay moves.
    let before = p;
    one(&rule, 3, 1.0, &mut p, -0.625, &mut m);
    assert_close(p, before * 0.95, 1e-15);
    assert_eq!(m, [0.3125]);
    // NaN stays NaN.
    one(&rule, 4, 1.0, &mut p, f64::NAN, &mut m);
    assert!(p.is_nan() && m[0].is_nan());
}

#[track_caller]
fn assert_close(found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs().max(1.0),
        "{found} is not {expected}"
    );
}

#[test]
fn three_sgd_steps_by_hand() {
    // param 1, grad 0.5 each time, lr 0.1, momentum 0.9, dampening 0.5: the buffer starts undampened.
    let (mut p, mut m) = ([1.0f64], [7.0f64]);
    let step = SgdStep {
        momentum: 0.9,
        dampening: 0.5,
        ..SGD
    };
    let mut take = |step: &SgdStep| {
        sgd(
            SpanMut::of(&mut p),
            Span::of(&[0.5f64]),
            Some(SpanMut::of(&mut m)),
            step,
        )
        .unwrap();
        (p[0], m[0])
    };
    let (p, m) = take(&SgdStep {
        first: true,
        ..step
    });
    assert_close(m, 0.5, 1e-15);
    assert_close(p, 0.95, 1e-15);
    let (p, m) = take(&step);
    assert_close(m, 0.7, 1e-15);
    assert_close(p, 0.88, 1e-15);
    let (p, m) = take(&step);
    assert_close(m, 0.88, 1e-15);
    assert_close(p, 0.792, 1e-15);
}

#[test]
fn nesterov_decay_and_ascent_by_hand() {
    let (mut p, mut m) = ([2.0f64], [1.0f64]);
    let step = SgdStep {
        momentum: 0.5,
        weight_decay: 0.1,
        nesterov: true,
        maximize: true,
        grad_scale: 2.0,
        ..SGD
    };
    sgd(
        SpanMut::of(&mut p),
        Span::of(&[3.0f64]),
        Some(SpanMut::of(&mut m)),
        &step,
    )
    .unwrap();
    // g = -(3 * 2) + 0.1 * 2 = -5.8; m = 0.5 - 5.8 = -5.3; p = 2 - 0.1 * (-5.8 - 2.65) = 2.845
    assert_close(m[0], -5.3, 1e-15);
    assert_close(p[0], 2.845, 1e-15);
}

#[test]
fn two_adamw_steps_by_hand() {
    // The first step moves by lr whatever the gradient: both means are unbiased to g and g^2.
    let (mut p, mut m, mut v) = ([1.0f64], [0.0f64], [0.0f64]);
    let step = AdamWStep {
        lr: 0.1,
        weight_decay: 0.1,
        eps: 0.0,
        ..ADAMW
    };
    let mut take = |grad: f64, step: AdamWStep| {
        let (m, v) = (SpanMut::of(&mut m), SpanMut::of(&mut v));
        adamw(SpanMut::of(&mut p), Span::of(&[grad]), m, v, &step).unwrap();
        p[0]
    };
    // 1 * (1 - 0.01) - 0.1 = 0.89
    assert_close(take(0.5, step), 0.89, 1e-12);
    // Without decay, and -0.5 now: m = 0.045 - 0.05 = -0.005, / 0.19; v = 0.25 unbiased; the move is +0.1 * 0.0526316.
    let expected = 0.89 + 0.1 * (0.005 / 0.19) / 0.5;
    assert_close(
        take(
            -0.5,
            AdamWStep {
                step: 2,
                weight_decay: 0.0,
                ..step
            },
        ),
        expected,
        1e-12,
    );
}

/// Torch's documentation of SGD and AdamW, in f64, written without a look at the kernels' order of operations.
#[test]
fn two_hundred_steps_follow_the_documentation() {
    const STEPS: u64 = 200;
    let (mut p32, mut m32) = ([0.7f32], [0.0f32]);
    let (mut a32, mut ea32, mut es32) = ([0.7f32], [0.0f32], [0.0f32]);
    let (mut p, mut buffer) = (0.7f64, 0.0f64);
    let (mut a, mut ea, mut es) = (0.7f64, 0.0f64, 0.0f64);
    let mut stream = Stream(9);
    for t in 1..=STEPS {
        let grad = [unit(&mut stream) as f32];
        let g = f64::from(grad[0]);
        let step = SgdStep {
            lr: 0.01,
            momentum: 0.9,
            weight_decay: 0.05,
            nesterov: true,
            first: t == 1,
            ..SGD
        };
        sgd(
            SpanMut::of(&mut p32),
            Span::of(&grad),
            Some(SpanMut::of(&mut m32)),
            &step,
        )
        .unwrap();
        let slope = g + 0.05 * p;
        buffer = if t == 1 { slope } else { 0.9 * buffer + slope };
        p -= 0.01 * (slope + 0.9 * buffer);

        let step = AdamWStep {
            step: t,
            lr: 0.01,
            ..ADAMW
        };
        let (m, v) = (SpanMut::of(&mut ea32), SpanMut::of(&mut es32));
        adamw(SpanMut::of(&mut a32), Span::of(&grad), m, v, &step).unwrap();
        a -= 0.01 * 0.01 * a;
        ea += (g - ea) * (1.0 - 0.9);
        es = 0.999 * es + (1.0 - 0.999) * g * g;
        let (mhat, vhat) = (
            ea / (1.0 - 0.9f64.powi(t as i32)),
            es / (1.0 - 0.999f64.powi(t as i32)),
        );
        a -= 0.01 * mhat / (vhat.sqrt() + 1e-8);
    }
    assert_close(f64::from(p32[0]), p, 1e-5);
    assert_close(f64::from(a32[0]), a, 1e-5);
}

#[test]
fn powers_by_squaring_are_powers() {
    for (base, exponent) in [
        (0.9, 1),
        (0.9, 2),
        (0.999, 1000),
        (0.999, 123_457),
        (0.5, 3),
    ] {
        let expected = f64::powf(base, exponent as f64);
        let found = scalar::power(base, exponent);
        assert!(
            (found - expected).abs() <= 1e-12 * expected.max(1e-3),
            "{base}^{exponent}: {found}"
        );
    }
    assert_eq!(scalar::power(0.9, 0), 1.0);
}
