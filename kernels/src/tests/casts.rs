//! Goal: every cast rounds to nearest even exactly once. Method: all small inputs exhaustively against the `half` crate
//! and against tables built from the formats' definition; f64 by the distance to both neighbours.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::simd::on_every_isa;
use crate::{F8E4M3, F8E5M2, Span, SpanMut};

fn cast_all<A: Element, B: Float>(from: &[A]) -> Vec<B> {
    let mut into = vec![B::encode(0.0); from.len()];
    crate::cast(Span::of(from), SpanMut::of(&mut into)).unwrap();
    into
}

/// All 2^16 bit patterns.
fn patterns() -> impl Iterator<Item = u16> {
    0..=u16::MAX
}

#[test]
fn every_f16_and_bf16_widens_as_half_does() {
    let halves: Vec<f16> = patterns().map(f16::from_bits).collect();
    let brains: Vec<bf16> = patterns().map(bf16::from_bits).collect();
    on_every_isa(|isa| {
        let expected: Vec<f32> = halves.iter().map(|h| h.to_f32()).collect();
        assert_same(&cast_all::<_, f32>(&halves), &expected, || {
            format!("f16->f32 {isa:?}")
        });
        let expected: Vec<f64> = halves.iter().map(|h| h.to_f64()).collect();
        assert_same(&cast_all::<_, f64>(&halves), &expected, || {
            format!("f16->f64 {isa:?}")
        });
        let expected: Vec<f32> = brains.iter().map(|b| b.to_f32()).collect();
        assert_same(&cast_all::<_, f32>(&brains), &expected, || {
            format!("bf16->f32 {isa:?}")
        });
        let expected: Vec<f64> = brains.iter().map(|b| b.to_f64()).collect();
        assert_same(&cast_all::<_, f64>(&brains), &expected, || {
            format!("bf16->f64 {isa:?}")
        });
        let expected: Vec<bf16> = halves.iter().map(|h| bf16::from_f32(h.to_f32())).collect();
        assert_same(&cast_all::<_, bf16>(&halves), &expected, || {
            format!("f16->bf16 {isa:?}")
        });
        let expected: Vec<f16> = brains.iter().map(|b| f16::from_f32(b.to_f32())).collect();
        assert_same(&cast_all::<_, f16>(&brains), &expected, || {
            format!("bf16->f16 {isa:?}")
        });
    });
}

#[test]
fn f32_narrows_as_half_does() {
    // Every upper half with the lower halves around a tie and around its neighbours.
    let tails = [
        0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff, 0x5a5a,
    ];
    let from: Vec<f32> = patterns()
        .flat_map(|high| tails.map(|low| f32::from_bits(u32::from(high) << 16 | low)))
        .collect();
    let halves: Vec<f16> = from.iter().map(|x| f16::from_f32(*x)).collect();
    let brains: Vec<bf16> = from.iter().map(|x| bf16::from_f32(*x)).collect();
    on_every_isa(|isa| {
        assert_same(&cast_all::<_, f16>(&from), &halves, || {
            format!("f32->f16 {isa:?}")
        });
        assert_same(&cast_all::<_, bf16>(&from), &brains, || {
            format!("f32->bf16 {isa:?}")
        });
    });
}

/// The value of an f8, from the words of its definition and nothing else: hidden one, bias, subnormals.
fn table(fraction_bits: i32, bias: i32, last_finite: u8) -> Vec<f64> {
    (0..=last_finite)
        .map(|bits| {
            let exponent = i32::from(bits) >> fraction_bits;
            let fraction =
                f64::from(i32::from(bits) % (1 << fraction_bits)) / f64::from(1 << fraction_bits);
            if exponent == 0 {
                fraction * 2.0f64.powi(1 - bias)
            } else {
                (1.0 + fraction) * 2.0f64.powi(exponent - bias)
            }
        })
        .collect()
}

/// Index of the nearest entry of an ascending table, the even one of two equally near; the last for all beyond.
fn nearest(table: &[f64], magnitude: f64) -> u8 {
    let above = table.partition_point(|entry| *entry < magnitude);
    if above == table.len() {
        return (table.len() - 1) as u8;
    }
    if table[above] == magnitude {
        return above as u8;
    }
    // The distances to both neighbours are exact: the table has few digits, and the halfway point one more.
    let halfway = (table[above - 1] + table[above]) / 2.0;
    let up = magnitude > halfway || (magnitude == halfway && above % 2 == 0);
    if up { above as u8 } else { (above - 1) as u8 }
}

#[test]
fn every_f8_widens_as_its_definition_says() {
    let (e4m3, e5m2) = (table(3, 7, 0x7e), table(2, 15, 0x7b));
    assert_eq!((e4m3[0x7e], e5m2[0x7b]), (448.0, 57344.0));
    assert_eq!((e4m3[1], e5m2[1]), (2.0f64.powi(-9), 2.0f64.powi(-16)));
    on_every_isa(|_| {
        let found = cast_all::<F8E4M3, f64>(&(0..=255).map(F8E4M3).collect::<Vec<_>>());
        for bits in 0..=255u8 {
            let value = found[usize::from(bits)];
            match e4m3.get(usize::from(bits & 0x7f)) {
                Some(magnitude) => assert_eq!(value.abs(), *magnitude),
                None => assert!(value.is_nan()),
            }
            assert!(value.is_nan() || value.is_sign_negative() == (bits >= 0x80));
        }
        let found = cast_all::<F8E5M2, f64>(&(0..=255).map(F8E5M2).collect::<Vec<_>>());
        for bits in 0..=255u8 {
            let value = found[usize::from(bits)];
            match (e5m2.get(usize::from(bits & 0x7f)), bits & 0x7f) {
                (Some(magnitude), _) => assert_eq!(value.abs(), *magnitude),
                (None, 0x7c) => assert_eq!(value.abs(), f64::INFINITY),
                (None, _) => assert!(value.is_nan()),
            }
            assert!(value.is_nan() || value.is_sign_negative() == (bits >= 0x80));
        }
    });
}

#[test]
fn every_f16_and_bf16_narrows_to_the_nearest_f8() {
    let (e4m3, e5m2) = (table(3, 7, 0x7e), table(2, 15, 0x7b));
    let check = |value: f64, four: F8E4M3, five: F8E5M2| {
        if value.is_nan() {
            assert!(
                four.0 & 0x7f == 0x7f && five.0 & 0x7f > 0x7c,
                "{value} {four:?} {five:?}"
            );
            return;
        }
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        assert_eq!(four.0, sign | nearest(&e4m3, value.abs()), "{value}");
        assert_eq!(five.0, sign | nearest(&e5m2, value.abs()), "{value}");
    };
    on_every_isa(|_| {
        let halves: Vec<f16> = patterns().map(f16::from_bits).collect();
        let brains: Vec<bf16> = patterns().map(bf16::from_bits).collect();
        let (four, five) = (cast_all(&halves), cast_all(&halves));
        (0..halves.len()).for_each(|i| check(halves[i].to_f64(), four[i], five[i]));
        let (four, five) = (cast_all(&brains), cast_all(&brains));
        (0..brains.len()).for_each(|i| check(brains[i].to_f64(), four[i], five[i]));
        // Through f64 too, and a hair beside each value: an f32 in between would lose the hair.
        for hair in [1.0, 1.0 + f64::EPSILON, 1.0 - f64::EPSILON] {
            let wide: Vec<f64> = halves.iter().map(|h| h.to_f64() * hair).collect();
            let (four, five) = (cast_all(&wide), cast_all(&wide));
            (0..wide.len()).for_each(|i| check(wide[i], four[i], five[i]));
        }
    });
}

/// Casting `value` at once must choose the neighbour that is nearer in f64, where the distance is exact.
fn check_f64_to<B: Float>(tie: B, next: B) {
    let (low, high) = (tie.decode(), next.decode());
    if !low.is_finite() || !high.is_finite() {
        return;
    }
    let halfway = low / 2.0 + high / 2.0;
    let below = f64::from_bits(halfway.to_bits() - 1);
    let above = f64::from_bits(halfway.to_bits() + 1);
    let found: Vec<B> = cast_all(&[below, above, -below, -above]);
    let expected = [low, high, -low, -high];
    for (f, e) in found.iter().zip(expected) {
        assert_eq!(f.decode(), e, "around {halfway} into {}", B::DTYPE);
    }
    // At the tie itself the even bits win.
    let even = if bytemuck::bytes_of(&tie)[0] & 1 == 0 {
        low
    } else {
        high
    };
    assert_eq!(
        cast_all::<f64, B>(&[halfway])[0].decode(),
        even,
        "tie {halfway} into {}",
        B::DTYPE
    );
}

#[test]
fn f64_beside_a_tie_rounds_once() {
    on_every_isa(|_| {
        for bits in 0..0x7fffu16 {
            check_f64_to(f16::from_bits(bits), f16::from_bits(bits + 1));
            check_f64_to(bf16::from_bits(bits), bf16::from_bits(bits + 1));
        }
        for bits in 0..0x7f {
            check_f64_to(F8E4M3(bits), F8E4M3(bits + 1));
            check_f64_to(F8E5M2(bits), F8E5M2(bits + 1));
        }
    });
}

#[test]
fn the_double_rounding_that_f32_would_do_is_not_done() {
    // 1 + 2^-11 + 2^-40: above the tie between two f16, but on it after rounding to f32.
    let value = 1.0 + 2.0f64.powi(-11) + 2.0f64.powi(-40);
    assert_eq!(f16::from_f32(value as f32).to_bits(), 0x3c00);
    assert_eq!(cast_all::<_, f16>(&[value])[0].to_bits(), 0x3c01);
    let value = 1.0 + 2.0f64.powi(-8) + 2.0f64.powi(-40);
    assert_eq!(bf16::from_f32(value as f32).to_bits(), 0x3f80);
    assert_eq!(cast_all::<_, bf16>(&[value])[0].to_bits(), 0x3f81);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_f32_and_f64_cast_as_the_oracle(seed in any::<u64>()) {
        fn check<A: Float, B: Float>(seed: u64) {
            let mut stream = Stream(seed);
            let from: Vec<A> = (0..1024).map(|_| any_bits(&mut stream)).collect();
            let expected: Vec<B> = from.iter().map(|x| crate::scalar::cast(*x)).collect();
            assert_same(&cast_all::<A, B>(&from), &expected, || format!("{}->{}", A::DTYPE, B::DTYPE));
        }
        /// f64 whose exponents the small formats have: random bits are mostly far too large or too small.
        fn near<B: Float>(seed: u64) {
            let mut stream = Stream(seed);
            let from: Vec<f64> = (0..1024)
                .map(|_| f64::from_bits(stream.next() & !(0x7ff << 52) | (1023 - 30 + stream.next() % 60) << 52))
                .collect();
            let expected: Vec<B> = from.iter().map(|x| B::encode(*x)).collect();
            assert_same(&cast_all::<f64, B>(&from), &expected, || format!("f64->{}", B::DTYPE));
        }
        on_every_isa(|_| {
            check::<f32, f16>(seed);
            check::<f32, bf16>(seed);
            check::<f32, F8E4M3>(seed);
            check::<f32, F8E5M2>(seed);
            check::<f64, f32>(seed);
            check::<f64, bf16>(seed);
            near::<f16>(seed);
            near::<bf16>(seed);
            near::<F8E4M3>(seed);
            near::<F8E5M2>(seed);
        });
    }
}
