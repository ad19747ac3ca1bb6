//! Float arithmetic in the accumulator type: decode, compute once, encode.

use super::float::Float;
use crate::dtype::Dtype;
use crate::fold::Fold;
use crate::norm::SumSquares;

/// The value as another float.
pub fn cast<A: Float, B: Float>(from: A) -> B {
    B::encode(from.decode())
}

/// from * factor, in the accumulator of the two types.
pub fn cast_scaled<A: Float, B: Float>(from: A, factor: f64) -> B {
    let product = if wide::<A, B>() {
        from.decode() * factor
    } else {
        f64::from(from.decode() as f32 * factor as f32)
    };
    B::encode(product)
}

/// into op with, in the accumulator of the two types.
pub fn fold<B: Float, A: Float>(op: Fold, into: B, with: A) -> B {
    let (a, b) = (into.decode(), with.decode());
    let result = match op {
        Fold::Sum if wide::<A, B>() => a + b,
        Fold::Sum => f64::from(a as f32 + b as f32),
        Fold::Prod if wide::<A, B>() => a * b,
        Fold::Prod => f64::from(a as f32 * b as f32),
        // Choosing rounds nothing, so it needs no accumulator.
        Fold::Min => smaller(a, b),
        Fold::Max => -smaller(-a, -b),
        Fold::And | Fold::Or | Fold::Xor => panic!("floats have no {op}"),
    };
    B::encode(result)
}

/// x taken into `[-limit, limit]`, where the limit is first a number of the same type.
pub fn clamp<A: Float>(x: A, limit: f64) -> A {
    if limit.is_infinite() {
        return x;
    }
    let limit = A::encode(limit).decode();
    let value = x.decode();
    if value > limit {
        A::encode(limit)
    } else if value < -limit {
        A::encode(-limit)
    } else {
        x
    }
}

/// The sum of squares in the order of [Note: norm order].
pub fn sum_squares<A: Float>(x: &[A]) -> SumSquares {
    let mut lanes = [0.0f64; 8];
    for (index, element) in x.iter().enumerate() {
        let value = element.decode();
        lanes[index % 8] += value * value;
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    SumSquares {
        sum: ((a + b) + (c + d)) + ((e + f) + (g + h)),
        finite: x.iter().all(|element| element.decode().is_finite()),
    }
}

/// f64 is the accumulator of these two.
fn wide<A: Float, B: Float>() -> bool {
    A::DTYPE == Dtype::F64 || B::DTYPE == Dtype::F64
}

/// NaN if either is, else the smaller, -0 before +0.
fn smaller(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else if a < b || (a == b && a.is_sign_negative()) {
        a
    } else {
        b
    }
}
