//! Goal: NaN, infinities, both zeros and the ends of every range behave as written. Method: by hand, value by value.

use half::{bf16, f16};

use super::*;
use crate::{F8E4M3, F8E5M2, Fold, Span, SpanMut, SumSquares};

fn cast_one<A: Float, B: Float>(from: A) -> B {
    let mut into = [B::encode(0.0)];
    crate::cast(Span::of(&[from]), SpanMut::of(&mut into)).unwrap();
    into[0]
}

fn fold_one<T: Float>(op: Fold, into: f64, with: f64) -> f64 {
    let mut target = [T::encode(into)];
    crate::fold(op, SpanMut::of(&mut target), Span::of(&[T::encode(with)])).unwrap();
    target[0].decode()
}

#[test]
fn overflow_is_infinite_in_sixteen_bits_and_saturates_in_eight() {
    assert_eq!(cast_one::<f32, f16>(65519.0), f16::MAX);
    assert_eq!(cast_one::<f32, f16>(65520.0), f16::INFINITY);
    assert_eq!(cast_one::<f64, f16>(-1e300), f16::NEG_INFINITY);
    assert_eq!(cast_one::<f32, bf16>(f32::MAX), bf16::INFINITY);
    assert_eq!(cast_one::<f64, f32>(1e39), f32::INFINITY);
    for huge in [449.0, 464.0, 500.0, 1e30, f32::INFINITY] {
        assert_eq!(cast_one::<f32, F8E4M3>(huge), F8E4M3(0x7e));
        assert_eq!(cast_one::<f32, F8E4M3>(-huge), F8E4M3(0xfe));
    }
    for huge in [57345.0, 61440.0, 1e300, f64::INFINITY] {
        assert_eq!(cast_one::<f64, F8E5M2>(huge), F8E5M2(0x7b));
        assert_eq!(cast_one::<f64, F8E5M2>(-huge), F8E5M2(0xfb));
    }
    assert_eq!(cast_one::<F8E5M2, f32>(F8E5M2(0xfc)), f32::NEG_INFINITY);
    assert_eq!(cast_one::<F8E5M2, F8E4M3>(F8E5M2(0x7c)), F8E4M3(0x7e));
}

fn check_specials<A: Float, B: Float>() {
    assert!(cast_one::<A, B>(A::encode(f64::NAN)).decode().is_nan());
    assert!(cast_one::<A, B>(A::encode(-f64::NAN)).decode().is_nan());
    let zero = cast_one::<A, B>(A::encode(-0.0)).decode();
    assert!(zero == 0.0 && zero.is_sign_negative());
    let zero = cast_one::<A, B>(A::encode(0.0)).decode();
    assert!(zero == 0.0 && zero.is_sign_positive());
}

#[test]
fn nan_stays_nan_and_zero_keeps_its_sign() {
    for_float_pairs!(check_specials);
    // A NaN whose payload lies only in the bits that are cut off.
    assert!(cast_one::<f32, bf16>(f32::from_bits(0x7f80_0001)).is_nan());
    assert!(cast_one::<f32, f16>(f32::from_bits(0xff80_0001)).is_nan());
    assert!(cast_one::<f64, f16>(f64::from_bits(0x7ff0_0000_0000_0001)).is_nan());
}

#[test]
fn subnormals_are_neither_flushed_nor_missed() {
    assert_eq!(cast_one::<f32, f16>(2.0f32.powi(-24)).to_bits(), 1);
    assert_eq!(cast_one::<f32, f16>(2.0f32.powi(-25)).to_bits(), 0);
    assert_eq!(cast_one::<f32, f16>(2.0f32.powi(-25) * 1.001).to_bits(), 1);
    assert_eq!(
        cast_one::<f32, bf16>(f32::from_bits(0x0001_8000)).to_bits(),
        2
    );
    assert_eq!(cast_one::<f64, f32>(2.0f64.powi(-149)).to_bits(), 1);
    assert_eq!(cast_one::<f64, f16>(f64::from_bits(1)).to_bits(), 0);
    assert_eq!(cast_one::<f32, F8E4M3>(2.0f32.powi(-9)), F8E4M3(1));
    assert_eq!(cast_one::<f32, F8E4M3>(2.0f32.powi(-10)), F8E4M3(0));
    assert_eq!(cast_one::<f32, F8E5M2>(3.0 * 2.0f32.powi(-17)), F8E5M2(2));
}

fn check_min_max<T: Float>() {
    for op in [Fold::Min, Fold::Max] {
        assert!(fold_one::<T>(op, f64::NAN, 1.0).is_nan());
        assert!(fold_one::<T>(op, 1.0, f64::NAN).is_nan());
        for (a, b) in [(0.0, -0.0), (-0.0, 0.0)] {
            let zero = fold_one::<T>(op, a, b);
            assert!(
                zero == 0.0 && zero.is_sign_negative() == (op == Fold::Min),
                "{op} of {a} and {b}"
            );
        }
    }
    assert_eq!(fold_one::<T>(Fold::Min, 2.0, -3.0), -3.0);
    assert_eq!(fold_one::<T>(Fold::Max, 2.0, -3.0), 2.0);
}

#[test]
fn min_and_max_propagate_nan_and_order_the_zeros() {
    for_types!(check_min_max; floats);
}

#[test]
fn bf16_sums_round_once_from_f32() {
    // 256 + 1 + 1: each bf16 addition loses the one, an f32 partial sum keeps it.
    let one = [bf16::ONE];
    let mut small = [bf16::from_f32(256.0)];
    let mut wide = [256.0f32];
    for _ in 0..2 {
        crate::fold(Fold::Sum, SpanMut::of(&mut small), Span::of(&one)).unwrap();
        crate::fold(Fold::Sum, SpanMut::of(&mut wide), Span::of(&one)).unwrap();
    }
    assert_eq!((small[0].to_f32(), wide[0]), (256.0, 258.0));
}

#[test]
fn integers_wrap_and_divide_toward_zero() {
    let mut sum = [i8::MAX, i8::MIN];
    crate::fold(Fold::Sum, SpanMut::of(&mut sum), Span::of(&[1i8, -1])).unwrap();
    assert_eq!(sum, [i8::MIN, i8::MAX]);
    let mut quotient = [0i32; 4];
    crate::divide(
        Span::of(&[7i32, -7, -1, i32::MIN]),
        SpanMut::of(&mut quotient),
        2,
    )
    .unwrap();
    assert_eq!(quotient, [3, -3, 0, i32::MIN / 2]);
    let mut quotient = [0i8; 3];
    crate::divide(
        Span::of(&[i8::MIN, i8::MAX, -127]),
        SpanMut::of(&mut quotient),
        128,
    )
    .unwrap();
    assert_eq!(quotient, [-1, 0, 0]);
    let mut product = [0u8; 2];
    crate::cast_scaled(Span::of(&[3u8, 100]), SpanMut::of(&mut product), 3.0).unwrap();
    assert_eq!(product, [9, 44]);
}

#[test]
fn a_norm_knows_whether_all_is_finite() {
    let of = |x: &[f32]| crate::sum_squares(Span::of(x)).unwrap();
    assert_eq!(
        of(&[]),
        SumSquares {
            sum: 0.0,
            finite: true
        }
    );
    assert_eq!(
        of(&[3.0, 4.0]),
        SumSquares {
            sum: 25.0,
            finite: true
        }
    );
    assert_eq!(
        of(&[1.0, f32::NEG_INFINITY]),
        SumSquares {
            sum: f64::INFINITY,
            finite: false
        }
    );
    assert!(!of(&[f32::NAN; 9]).finite);
    // Squares that only f64 can hold, and finite elements whose squares nothing can.
    assert_eq!(of(&[1e30]).sum, f64::from(1e30f32) * f64::from(1e30f32));
    let huge = crate::sum_squares(Span::of(&[1e300f64])).unwrap();
    assert_eq!(
        huge,
        SumSquares {
            sum: f64::INFINITY,
            finite: true
        }
    );
}
