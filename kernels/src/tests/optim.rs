//! Goal: the optimizers take torch's steps. Method: bit equality with the oracle over every length; steps worked out by
//! hand; and many steps against a plain f64 rendering of torch's documentation.

use half::{bf16, f16};

use super::*;
use crate::simd::on_every_isa;
use crate::{AdamWStep, SgdStep, Span, SpanMut, adamw, scalar, sgd};

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

fn sgd_steps() -> Vec<SgdStep> {
    let momentum = SgdStep {
        momentum: 0.9,
        dampening: 0.3,
        weight_decay: 0.01,
        ..SGD
    };
    vec![
        SGD,
        SgdStep {
            weight_decay: 0.1,
            maximize: true,
            grad_scale: 0.3,
            ..SGD
        },
        momentum,
        SgdStep {
            first: true,
            maximize: true,
            ..momentum
        },
        SgdStep {
            nesterov: true,
            dampening: 0.0,
            grad_scale: 1.0 / 3.0,
            ..momentum
        },
        SgdStep {
            nesterov: true,
            dampening: 0.0,
            first: true,
            ..momentum
        },
    ]
}

fn tame<T: Float>(seed: u64) -> Vec<T> {
    let mut stream = Stream(seed);
    (0..ROOM).map(|_| T::encode(unit(&mut stream))).collect()
}

fn check_sgd<P: Float, S: Float, G: Float>() {
    let (param, state) = (floats::<P>(1, ROOM), tame::<S>(2));
    let grad = floats::<G>(3, ROOM);
    for step in sgd_steps() {
        let oracle: Vec<(P, S)> = (0..ROOM)
            .map(|i| {
                let (p, m) = scalar::sgd(param[i], grad[i], state[i].decode(), &step);
                (p, S::encode(m))
            })
            .collect();
        on_every_isa(|isa| {
            for len in 0..=257 {
                let start = 1 + len % 8;
                let (mut p, mut m) = (param.clone(), state.clone());
                let range = start..start + len;
                let buffer = SpanMut::of(&mut m);
                let mut target = SpanMut::of(&mut p);
                let mut buffer = buffer;
                let buffer = (step.momentum != 0.0).then(|| buffer.slice(range.clone()));
                sgd(
                    target.slice(range.clone()),
                    Span::of(&grad).slice(range.clone()),
                    buffer,
                    &step,
                )
                .unwrap();
                let what = || format!("sgd {} {}, {isa:?}, {len}, {step:?}", P::DTYPE, G::DTYPE);
                for i in 0..ROOM {
                    let (ep, em) = if range.contains(&i) {
                        oracle[i]
                    } else {
                        (param[i], state[i])
                    };
                    assert!(same(p[i], ep), "{}: param {i}", what());
                    assert!(same(m[i], em), "{}: momentum {i}", what());
                }
            }
        });
    }
}

fn check_adamw<P: Float, S: Float, G: Float>() {
    let (param, mean) = (floats::<P>(1, ROOM), tame::<S>(2));
    let square: Vec<S> = tame::<S>(4)
        .into_iter()
        .map(|v| S::encode(v.decode().abs()))
        .collect();
    let grad = floats::<G>(3, ROOM);
    for step in [
        ADAMW,
        AdamWStep {
            step: 1000,
            grad_scale: 0.7,
            weight_decay: 0.0,
            ..ADAMW
        },
    ] {
        let oracle: Vec<(P, S, S)> = (0..ROOM)
            .map(|i| {
                let (m, v) = (mean[i].decode(), square[i].decode());
                let (p, m, v) = scalar::adamw(param[i], grad[i], m, v, &step);
                (p, S::encode(m), S::encode(v))
            })
            .collect();
        on_every_isa(|isa| {
            for len in 0..=257 {
                let start = 1 + len % 8;
                let range = start..start + len;
                let (mut p, mut m, mut v) = (param.clone(), mean.clone(), square.clone());
                adamw(
                    SpanMut::of(&mut p).slice(range.clone()),
                    Span::of(&grad).slice(range.clone()),
                    SpanMut::of(&mut m).slice(range.clone()),
                    SpanMut::of(&mut v).slice(range.clone()),
                    &step,
                )
                .unwrap();
                let what = || format!("adamw {} {}, {isa:?}, {len}", P::DTYPE, G::DTYPE);
                for i in 0..ROOM {
                    let old = (param[i], mean[i], square[i]);
                    let (ep, em, ev) = if range.contains(&i) { oracle[i] } else { old };
                    assert!(same(p[i], ep), "{}: param {i}", what());
                    assert!(same(m[i], em), "{}: exp_avg {i}", what());
                    assert!(same(v[i], ev), "{}: exp_avg_sq {i}", what());
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
fn sgd_equals_the_oracle() {
    for_grads!(check_sgd, f64, f64);
    for_grads!(check_sgd, f32, f32);
    for_grads!(check_sgd, f16, f32);
    for_grads!(check_sgd, bf16, f32);
}

#[test]
fn adamw_equals_the_oracle() {
    for_grads!(check_adamw, f64, f64);
    for_grads!(check_adamw, f32, f32);
    for_grads!(check_adamw, f16, f32);
    for_grads!(check_adamw, bf16, f32);
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
