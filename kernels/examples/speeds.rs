//! How fast the kernels are on one core, beside a plain copy.
//!
//! `cargo run --release -p fabric-kernels --example speeds`. GB/s counts every byte read and every byte written once; a
//! time is the best of several.

use std::time::{Duration, Instant};

use fabric_kernels::{Adam, Lion, Rule, Sgd, update};
use fabric_kernels::{Element, Span, SpanMut, SquareBins, cast, sum_squares};
use half::bf16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for elems in [1 << 15, 1 << 24] {
        println!("# {elems} elements");
        let x: Vec<f32> = normal(elems, 0);
        let mut y = x.clone();
        row("copy f32", 8 * elems, || {
            cast(Span::of(&x), SpanMut::of(&mut y))
        })?;
        let small: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
        let wide: Vec<f64> = x.iter().map(|v| f64::from(*v) / 3.0).collect();
        let range: Vec<f32> = normal(elems, 100);
        norms("f32", &x)?;
        norms("f32 over 100 binades", &range)?;
        norms("bf16", &small)?;
        norms("f64", &wide)?;
        updates(&x, &small)?;
    }
    Ok(())
}

fn norms<T: Element>(name: &str, x: &[T]) -> Result<(), Box<dyn std::error::Error>> {
    let span = Span::of(x);
    row(&format!("sum_squares {name}"), span.bytes(), || {
        sum_squares(span).map(|_| ())
    })?;
    let mut bins = SquareBins::new();
    row(&format!("SquareBins {name}"), span.bytes(), || {
        bins.add(span)
    })
}

/// f32 parameters and states; f32 or bf16 gradients; a bf16 copy or none.
fn updates(x: &[f32], small: &[bf16]) -> Result<(), Box<dyn std::error::Error>> {
    let mut param = x.to_vec();
    let mut states = [vec![0.0f32; x.len()], vec![0.0f32; x.len()]];
    let mut copy = small.to_vec();
    let sgd = Sgd {
        lr: 1e-6,
        momentum: 0.0,
        dampening: 0.0,
        weight_decay: 1e-2,
        nesterov: false,
        maximize: false,
    };
    let momentum = Sgd {
        momentum: 0.9,
        ..sgd
    };
    let adam = Adam {
        lr: 1e-6,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 1e-2,
    };
    let lion = Lion {
        lr: 1e-6,
        beta1: 0.9,
        beta2: 0.99,
        weight_decay: 1e-2,
    };
    for rule in [
        Rule::Sgd(sgd),
        Rule::Sgd(momentum),
        Rule::Adam(adam),
        Rule::AdamW(adam),
        Rule::Lion(lion),
    ] {
        for (grad, with_copy) in [
            (Span::of(x), false),
            (Span::of(x), true),
            (Span::of(small), false),
            (Span::of(small), true),
        ] {
            let count = rule.states().len();
            let elem = 8 + grad.dtype().size() + 8 * count + if with_copy { 2 } else { 0 };
            let end = if with_copy { ", bf16 copy" } else { "" };
            let name = format!("{} {count} states, {} grad{end}", rule.name(), grad.dtype());
            row(&name, elem * x.len(), || {
                let [first, second] = &mut states;
                let mut spans = [SpanMut::of(first), SpanMut::of(second)];
                let copy = with_copy.then(|| SpanMut::of(&mut copy));
                let (param, states) = (SpanMut::of(&mut param), &mut spans[..count]);
                update(&rule, 10, 0.5, param, grad, states, copy)
            })?;
        }
    }
    Ok(())
}

fn row<E: std::error::Error + 'static>(
    name: &str,
    bytes: usize,
    mut kernel: impl FnMut() -> Result<(), E>,
) -> Result<(), Box<dyn std::error::Error>> {
    let repeats = ((1 << 26) / bytes).max(1);
    let mut best = Duration::MAX;
    for _ in 0..9 {
        let start = Instant::now();
        for _ in 0..repeats {
            kernel()?;
        }
        best = best.min(start.elapsed());
    }
    let speed = (repeats * bytes) as f64 / best.as_secs_f64() / 1e9;
    println!("{name:>40}  {speed:>8.1} GB/s");
    Ok(())
}

/// About normal numbers, each times two to a random power of up to `binades`.
fn normal(count: usize, binades: u64) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        state >> 40
    };
    (0..count)
        .map(|_| {
            let sum: u64 = (0..12).map(|_| uniform()).sum();
            let scale = (uniform() % (binades + 1)) as i32 - binades as i32 / 2;
            (sum as f32 / (1 << 24) as f32 - 6.0) * 2.0f32.powi(scale)
        })
        .collect()
}
