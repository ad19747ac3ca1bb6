//! Goal: the kernels are the oracle. Method: every length from 0 to 257 at eight offsets, every dtype pair, every
//! instruction set of this processor; the elements around the target must not change.

use super::*;
use crate::simd::on_every_isa;
use crate::{Bool, Dtype, Fold, Span, SpanMut, scalar};

/// Runs `kernel` over all shapes and compares with `oracle`, which maps (target element, source element) to the result.
#[track_caller]
fn compare<A: Float, B: Float>(
    what: &str,
    oracle: impl Fn(B, A) -> B,
    kernel: impl Fn(Span<'_>, SpanMut<'_>),
) {
    let from = floats::<A>(1, ROOM);
    let old = floats::<B>(2, ROOM);
    on_every_isa(|isa| {
        for (len, offset, other) in shapes() {
            let mut into = old.clone();
            let source = offset + 1..offset + 1 + len;
            let target = other + 1..other + 1 + len;
            kernel(
                Span::of(&from).slice(source.clone()),
                SpanMut::of(&mut into).slice(target.clone()),
            );
            let mut expected = old.clone();
            for (e, f) in expected[target].iter_mut().zip(&from[source]) {
                *e = oracle(*e, *f);
            }
            assert_same(&into, &expected, || {
                format!(
                    "{what} {}->{}, {isa:?}, {len} from {offset} to {other}",
                    A::DTYPE,
                    B::DTYPE
                )
            });
        }
    });
}

fn check_cast<A: Float, B: Float>() {
    // Equal dtypes are copied, and tested as copies below.
    if A::DTYPE != B::DTYPE {
        compare::<A, B>(
            "cast",
            |_, f| scalar::cast(f),
            |from, into| crate::cast(from, into).unwrap(),
        );
    }
}

#[test]
fn casts_equal_the_oracle() {
    for_float_pairs!(check_cast);
}

fn check_copies<T: Element>() {
    let mut stream = Stream(3);
    let from: Vec<T> = (0..ROOM).map(|_| any_bits(&mut stream)).collect();
    let old: Vec<T> = (0..ROOM).map(|_| any_bits(&mut stream)).collect();
    for (len, offset, other) in shapes() {
        let mut into = old.clone();
        let target = other + 1..other + 1 + len;
        let source = offset + 1..offset + 1 + len;
        crate::cast(
            Span::of(&from).slice(source.clone()),
            SpanMut::of(&mut into).slice(target.clone()),
        )
        .unwrap();
        let mut expected = old.clone();
        expected[target].copy_from_slice(&from[source]);
        assert_eq!(
            bytemuck::cast_slice::<T, u8>(&into),
            bytemuck::cast_slice::<T, u8>(&expected)
        );
    }
}

#[test]
fn every_dtype_copies_exactly_its_elements() {
    for_types!(check_copies; floats);
    for_types!(check_copies; integers);
    check_copies::<Bool>();
}

fn check_scaled<A: Float, B: Float>() {
    for factor in [1.0 / 3.0, -1.5] {
        compare::<A, B>(
            "cast_scaled",
            |_, f| scalar::cast_scaled(f, factor),
            |from, into| crate::cast_scaled(from, into, factor).unwrap(),
        );
    }
}

#[test]
fn scaled_casts_equal_the_oracle() {
    for_float_pairs!(check_scaled);
}

fn check_fold<A: Float, B: Float>() {
    for op in Fold::ALL.into_iter().filter(|op| op.takes(B::DTYPE)) {
        compare::<A, B>(
            op.name(),
            |e, f| scalar::fold(op, e, f),
            |from, into| crate::fold(op, into, from).unwrap(),
        );
    }
}

#[test]
fn folds_equal_the_oracle() {
    for_float_pairs!(check_fold);
}

/// As `compare`, for equal integers.
#[track_caller]
fn compare_integers<T: Integer>(
    what: &str,
    oracle: impl Fn(T, T) -> T,
    kernel: impl Fn(Span<'_>, SpanMut<'_>),
) {
    let from = integers::<T>(4, ROOM);
    let old = integers::<T>(5, ROOM);
    on_every_isa(|isa| {
        for (len, offset, other) in shapes() {
            let mut into = old.clone();
            let source = offset + 1..offset + 1 + len;
            let target = other + 1..other + 1 + len;
            kernel(
                Span::of(&from).slice(source.clone()),
                SpanMut::of(&mut into).slice(target.clone()),
            );
            let mut expected = old.clone();
            for (e, f) in expected[target].iter_mut().zip(&from[source]) {
                *e = oracle(*e, *f);
            }
            let (found, expected) = (
                bytemuck::cast_slice::<T, u8>(&into),
                bytemuck::cast_slice(&expected),
            );
            assert_eq!(
                found,
                expected,
                "{what} {}, {isa:?}, {len} from {offset} to {other}",
                T::DTYPE
            );
        }
    });
}

fn check_integers<T: Integer>() {
    for op in Fold::ALL {
        compare_integers::<T>(
            op.name(),
            |e, f| scalar::fold_integer(op, e, f),
            |from, into| crate::fold(op, into, from).unwrap(),
        );
    }
    compare_integers::<T>(
        "multiply",
        |_, f| scalar::multiply(f, 7.0),
        |from, into| crate::cast_scaled(from, into, 7.0).unwrap(),
    );
    for by in [1, 3, 127, 128, 1 << 15, 1 << 31, 1 << 63, u64::MAX] {
        compare_integers::<T>(
            "divide",
            |_, f| scalar::divide(f, by),
            |from, into| crate::divide(from, into, by).unwrap(),
        );
    }
}

#[test]
fn integers_fold_multiply_divide_as_the_oracle() {
    for_types!(check_integers; integers);
}

#[test]
fn bools_fold_as_the_oracle_whatever_their_byte() {
    let from: Vec<Bool> = (0..ROOM)
        .map(|i| Bool([0, 1, 2, 255, 0, 128][i % 6]))
        .collect();
    let old: Vec<Bool> = (0..ROOM).map(|i| Bool([0, 0, 1, 7, 255][i % 5])).collect();
    on_every_isa(|_| {
        for op in Fold::ALL.into_iter().filter(|op| op.takes(Dtype::Bool)) {
            for (len, offset, other) in shapes() {
                let mut into = old.clone();
                let source = offset + 1..offset + 1 + len;
                let target = other + 1..other + 1 + len;
                let with = Span::of(&from).slice(source.clone());
                crate::fold(op, SpanMut::of(&mut into).slice(target.clone()), with).unwrap();
                let mut expected = old.clone();
                for (e, f) in expected[target].iter_mut().zip(&from[source]) {
                    *e = scalar::fold_bool(op, *e, *f);
                }
                assert_eq!(into, expected);
            }
        }
    });
}

fn check_norm<T: Float>() {
    let mixed = floats::<T>(6, ROOM);
    let mut stream = Stream(7);
    let tame: Vec<T> = (0..ROOM).map(|_| T::encode(unit(&mut stream))).collect();
    for x in [mixed, tame] {
        on_every_isa(|isa| {
            for (len, offset, _) in shapes() {
                let found = crate::sum_squares(Span::of(&x).slice(offset..offset + len)).unwrap();
                let expected = scalar::sum_squares(&x[offset..offset + len]);
                let what = format!("sum_squares {}, {isa:?}, {len} from {offset}", T::DTYPE);
                assert!(
                    same(found.sum, expected.sum),
                    "{what}: {found:?}, the oracle says {expected:?}"
                );
                assert_eq!(found.finite, expected.finite, "{what}");
            }
        });
    }
}

#[test]
fn norms_equal_the_oracle() {
    for_types!(check_norm; floats);
}

fn check_fill_float<T: Float>() {
    for value in [0.1, -0.0, 1e-3, 1e6, f64::NAN, f64::INFINITY] {
        compare::<T, T>(
            "fill",
            |_, _| T::encode(value),
            |_, into| crate::fill(into, value).unwrap(),
        );
    }
    for limit in [0.0, 0.1, 1.0, 500.0, 1e300, f64::INFINITY] {
        compare::<T, T>(
            "clamp",
            |e, _| scalar::clamp(e, limit),
            |_, into| crate::clamp(into, limit).unwrap(),
        );
    }
}

fn check_fill_integer<T: Integer>() {
    compare_integers::<T>(
        "fill",
        |_, _| T::wrap(100),
        |_, into| crate::fill(into, 100.0).unwrap(),
    );
}

#[test]
fn clamps_and_fills_equal_the_oracle() {
    for_types!(check_fill_float; floats);
    for_types!(check_fill_integer; integers);
    let mut flags = [Bool(9); 5];
    crate::fill(SpanMut::of(&mut flags).slice(1..4), 2.0).unwrap();
    assert_eq!(flags, [9, 1, 1, 1, 9].map(Bool));
    crate::fill(SpanMut::of(&mut flags), 0.0).unwrap();
    assert_eq!(flags, [Bool(0); 5]);
}
