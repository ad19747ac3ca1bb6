//! How fast the kernels are on one core, beside a plain copy.
//!
//! `cargo run --release -p fabric-kernels --example speeds [combine]`. GB/s counts every byte read and every byte
//! written once; a time is the best of several. A `combine` is beside its limit: as many bytes copied, by the same kind
//! of stores.

use std::time::{Duration, Instant};

use fabric_kernels::{Adam, Lion, Rule, Sgd, update};
use fabric_kernels::{Element, Span, SpanMut, SquareBins, cast, sum_squares};
use fabric_kernels::{Finish, Fold, KernelError, Store, combine};
use half::bf16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args().nth(1).as_deref() == Some("combine") {
        return Ok(combines()?);
    }
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
    Ok(combines()?)
}

fn combines() -> Result<(), KernelError> {
    println!("# combine: operand, sources -> targets");
    for bytes in [8 << 10, 64 << 10, 512 << 10, 64 << 20] {
        for store in [Store::Cached, Store::Streaming] {
            sums("f32", bytes, store, |i| i as f32)?;
            sums("bf16", bytes, store, |i| bf16::from_f32(i as f32))?;
        }
    }
    println!("# combine: a call, 2 -> 2");
    for elems in [1, 2, 8, 16, 32, 63, 64] {
        let (a, b) = (vec![1.0f32; elems], vec![2.0f32; elems]);
        let (mut x, mut y) = (a.clone(), b.clone());
        let mut targets = [SpanMut::of(&mut x), SpanMut::of(&mut y)];
        let time = best(1 << 16, || {
            let sources = [Span::of(&a), Span::of(&b)];
            let (sources, targets) = std::hint::black_box((&sources, &mut targets));
            combine(
                Fold::Sum,
                sources,
                None,
                Finish::Cast,
                targets,
                Store::Cached,
            )
        })?;
        println!("{elems:>12} f32  {:>8.1} ns", time * 1e9);
    }
    Ok(())
}

/// Sums of 2 and 4 sources for 2 and 4 targets, each operand with so many bytes.
fn sums<T: Element>(
    name: &str,
    bytes: usize,
    store: Store,
    value: impl Fn(usize) -> T,
) -> Result<(), KernelError> {
    const LINE_BYTES: usize = 64; // every operand starts a line
    let (elems, slack) = (bytes / size_of::<T>(), LINE_BYTES / size_of::<T>());
    let buffer = || -> Vec<T> { (0..elems + slack).map(&value).collect() };
    let (from, mut into) = ([(); 4].map(|()| buffer()), [(); 4].map(|()| buffer()));
    let lead = |buffer: &[T]| {
        let start = buffer.as_ptr().cast::<[u8; 1]>();
        start.align_offset(LINE_BYTES) / size_of::<T>()
    };
    let sources = from
        .each_ref()
        .map(|buffer| Span::of(&buffer[lead(buffer)..][..elems]));
    let mut targets = into.each_mut().map(|buffer| {
        let lead = lead(buffer);
        SpanMut::of(&mut buffer[lead..][..elems])
    });
    for (s, t) in [(2, 2), (2, 4), (4, 2), (4, 4)] {
        let repeats = ((1 << 26) / (bytes * (s + t))).max(1);
        let time = best(repeats, || {
            let (from, into) = (&sources[..s], &mut targets[..t]);
            combine(Fold::Sum, from, None, Finish::Cast, into, store)
        })?;
        let limit = best(repeats, || {
            for copy in 0..(s + t) / 2 {
                let (from, into) = (&sources[copy % s..][..1], &mut targets[copy % t..][..1]);
                combine(Fold::Sum, from, None, Finish::Cast, into, store)?;
            }
            Ok(())
        })?;
        let speed = |time: f64| (bytes * (s + t)) as f64 / time / 1e9;
        println!(
            "{:>10} KiB {name:>5} {s} -> {t} {store:?}  {:>8.1} GB/s, copied {:>8.1} GB/s, time {:.2} of it",
            bytes >> 10,
            speed(time),
            speed(limit),
            time / limit
        );
    }
    Ok(())
}

/// Seconds of one call, in the best of several runs of `repeats` calls.
fn best(
    repeats: usize,
    mut kernel: impl FnMut() -> Result<(), KernelError>,
) -> Result<f64, KernelError> {
    let mut best = Duration::MAX;
    for _ in 0..9 {
        let start = Instant::now();
        for _ in 0..repeats {
            kernel()?;
        }
        best = best.min(start.elapsed());
    }
    Ok(best.as_secs_f64() / repeats as f64)
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
