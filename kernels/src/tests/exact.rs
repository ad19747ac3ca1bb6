//! Goal: a sum of squares is exact, whatever the order, the cuts and the number of ranks. Method: equality with the
//! schoolbook oracle over every length; random cuts and permutations; sums whose rounding is known.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::simd::on_every_isa;
use crate::{Bool, Dtype, KernelError, Span, SquareBins, scalar};

fn bins_of<T: Element>(x: &[T]) -> SquareBins {
    let mut bins = SquareBins::new();
    bins.add(Span::of(x)).unwrap();
    bins
}

fn check_lengths<T: Float>() {
    // Mixed numbers, then ordinary ones, then any bits at all, which for f64 are mostly huge or tiny.
    let mut stream = Stream(12);
    let tame: Vec<T> = (0..ROOM).map(|_| T::encode(unit(&mut stream))).collect();
    let wild: Vec<T> = (0..ROOM).map(|_| any_bits(&mut stream)).collect();
    for x in [floats::<T>(11, ROOM), tame, wild] {
        for (len, offset, _) in shapes() {
            let expected = scalar::square_words(&x[offset..offset + len]);
            on_every_isa(|isa| {
                let mut bins = SquareBins::new();
                bins.add(Span::of(&x).slice(offset..offset + len)).unwrap();
                assert_eq!(
                    bins.words(),
                    expected,
                    "{} {isa:?}, {len} from {offset}",
                    T::DTYPE
                );
            });
        }
    }
}

#[test]
fn bins_equal_the_oracle() {
    for_types!(check_lengths; floats);
}

fn check_chunks<T: Float>() {
    // Several chunks, and more entries one by one than fit between two carries.
    for x in [floats::<T>(13, 5000), vec![T::encode(1e300); 40_000]] {
        let expected = scalar::square_words(&x);
        on_every_isa(|isa| assert_eq!(bins_of(&x).words(), expected, "{} {isa:?}", T::DTYPE));
    }
}

#[test]
fn many_chunks_equal_the_oracle() {
    for_types!(check_chunks; floats);
}

#[test]
fn every_small_float_is_squared_exactly() {
    fn check<T: Float>(all: Vec<T>) {
        on_every_isa(|isa| {
            for few in all.chunks(if T::DTYPE.size() == 1 { 1 } else { 509 }) {
                assert_eq!(bins_of(few).words(), scalar::square_words(few), "{isa:?}");
            }
        });
    }
    check((0..=u16::MAX).map(f16::from_bits).collect());
    check((0..=u16::MAX).map(bf16::from_bits).collect());
    check((0..=u8::MAX).map(crate::F8E4M3).collect());
    check((0..=u8::MAX).map(crate::F8E5M2).collect());
}

/// Random elements of a narrow or a wide range of exponents, some of them special.
fn elements<T: Float>(seed: u64, count: usize) -> Vec<T> {
    let mut stream = Stream(seed);
    let span = [1, 8, 40, 200, 2000][stream.next() as usize % 5];
    let special = stream.next().is_multiple_of(3);
    (0..count)
        .map(|_| match stream.next() % 50 {
            0 if special => any_bits(&mut stream),
            1 => T::encode(0.0),
            _ => T::encode(
                unit(&mut stream) * 2.0f64.powi((stream.next() % span) as i32 - span as i32 / 2),
            ),
        })
        .collect()
}

fn shuffle<T>(x: &mut [T], stream: &mut Stream) {
    for i in (1..x.len()).rev() {
        x.swap(i, stream.next() as usize % (i + 1));
    }
}

/// Deals the elements to some ranks in pieces of random lengths; every rank adds its pieces, the words are added up.
fn dealt<T: Float>(x: &[T], ranks: usize, stream: &mut Stream) -> SquareBins {
    let mut all = vec![SquareBins::new(); ranks];
    let mut start = 0;
    while start < x.len() {
        let end = x.len().min(start + 1 + stream.next() as usize % 900);
        all[stream.next() as usize % ranks]
            .add(Span::of(x).slice(start..end))
            .unwrap();
        start = end;
    }
    let mut words = [0; SquareBins::WORDS];
    for bins in &all {
        words
            .iter_mut()
            .zip(bins.words())
            .for_each(|(sum, word)| *sum += word);
    }
    SquareBins::from_words(&words)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_order_cut_or_number_of_ranks_changes_the_bits(seed in any::<u64>(), count in 0usize..3000, ranks in 1usize..9) {
        fn check<T: Float>(seed: u64, count: usize, ranks: usize) {
            let mut stream = Stream(seed);
            let mut x = elements::<T>(seed, count);
            let whole = bins_of(&x);
            assert_eq!(whole.words(), scalar::square_words(&x), "{}", T::DTYPE);
            on_every_isa(|isa| {
                shuffle(&mut x, &mut stream);
                let found = dealt(&x, ranks, &mut stream);
                assert_eq!(found, whole, "{} {isa:?}", T::DTYPE);
                assert_eq!(found.value().to_bits(), whole.value().to_bits());
                assert_eq!(found.norm().to_bits(), whole.norm().to_bits());
                let (left, right) = x.split_at(count / 3);
                let mut merged = bins_of(right);
                merged.merge(&bins_of(left));
                assert_eq!(merged, whole, "{} {isa:?}", T::DTYPE);
            });
        }
        check::<f64>(seed, count, ranks);
        check::<f32>(seed, count, ranks);
        check::<f16>(seed, count, ranks);
        check::<bf16>(seed, count, ranks);
        check::<crate::F8E4M3>(seed, count, ranks);
        check::<crate::F8E5M2>(seed, count, ranks);
    }

    #[test]
    fn a_value_is_rounded_once(seed in any::<u64>(), count in 1usize..200) {
        // Squares of 53 bits in a window of 20 bits: their sum is a u128, which the language rounds.
        let mut stream = Stream(seed);
        let scale = (stream.next() % 900) as i32 - 450;
        let x: Vec<u64> = (0..count).map(|_| (stream.next() >> 11) >> (stream.next() % 50)).collect();
        let exact: u128 = x.iter().map(|digits| u128::from(*digits).pow(2)).sum();
        let floats: Vec<f64> = x.iter().map(|digits| *digits as f64 * 2.0f64.powi(scale)).collect();
        let expected = exact as f64 * 2.0f64.powi(scale) * 2.0f64.powi(scale);
        let bins = bins_of(&floats);
        prop_assert_eq!(bins.value().to_bits(), expected.to_bits());
        prop_assert!((bins.norm() - expected.sqrt()).abs() <= 2.0 * f64::EPSILON * expected.sqrt());
    }
}

#[test]
fn f32_sums_that_f64_would_round_are_kept() {
    // 1 + 2^-60 + ... : in f64 the small squares vanish one by one; their sum does not.
    let mut x = vec![2.0f32.powi(-30); 1 << 10];
    x.push(1.0);
    x.rotate_right(1);
    assert_eq!(crate::sum_squares(Span::of(&x[..9])).unwrap().sum, 1.0);
    assert_eq!(bins_of(&x).value(), 1.0 + 2.0f64.powi(-50));
}

#[test]
fn ties_go_to_even_and_what_is_below_them_counts() {
    let half = 2.0f64.powi(-27); // its square, 2^-54; twice that is half of the last place of 1
    let value = |x: &[f64]| bins_of(x).value();
    assert_eq!(value(&[1.0, half, half]), 1.0);
    assert_eq!(value(&[1.0, half, half, 1e-160]), 1.0 + f64::EPSILON);
    assert_eq!(
        value(&[1.0, half, half, f64::from_bits(1)]),
        1.0 + f64::EPSILON
    );
    let six = [half; 6];
    assert_eq!(
        value(&[&six[..], &[1.0]].concat()),
        1.0 + 2.0 * f64::EPSILON
    );
    assert_eq!(value(&[&six[1..], &[1.0]].concat()), 1.0 + f64::EPSILON);
}

#[test]
fn sums_below_the_normal_numbers_round_once_too() {
    let value = |x: &[f64]| bins_of(x).value().to_bits();
    let quarter = 2.0f64.powi(-538); // its square is a quarter of the smallest subnormal
    for (count, expected) in [
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 1),
        (5, 1),
        (6, 2),
        (7, 2),
        (9, 2),
        (10, 2),
        (11, 3),
    ] {
        assert_eq!(value(&vec![quarter; count]), expected, "{count} quarters");
    }
    assert_eq!(value(&[quarter, quarter, f64::from_bits(1)]), 1);
    assert_eq!(value(&[f64::from_bits(1)]), 0);
    // The norm is not lost.
    assert_eq!(
        bins_of(&[f64::from_bits(3), f64::from_bits(4)]).norm(),
        f64::from_bits(5)
    );
    assert_eq!(bins_of(&[3e-200f64, 4e-200]).norm(), 5e-200);
    // Just below the smallest normal number.
    let edge = 2.0f64.powi(-511);
    assert_eq!(value(&[edge]), f64::MIN_POSITIVE.to_bits());
}

#[test]
fn sums_beyond_f64_are_infinite_and_their_norms_are_not() {
    let bins = bins_of(&[3e200f64, 4e200]);
    assert_eq!((bins.value(), bins.is_finite()), (f64::INFINITY, true));
    assert!((bins.norm() / 5e200 - 1.0).abs() < 1e-15);
    assert_eq!(bins_of(&[f64::MAX]).norm(), f64::MAX);
    let big = 2.0f64.powi(511);
    // (2^511)^2 * 4 = 2^1024: one rounding too far.
    assert_eq!(bins_of(&[big; 4]).value(), f64::INFINITY);
    assert_eq!(bins_of(&[big; 3]).value(), 3.0 * 2.0f64.powi(1022));
    // 2^1024 - 2^970, 54 ones, is the tie between the largest number and infinity; anything less rounds down. Bins 98
    // and 97 begin at 2^988 and 2^956; the sum is given as words, as no few squares are so near.
    let ones = |low: i64| {
        let mut words = [0; SquareBins::WORDS];
        [words[99], words[98], words[97]] = [0xf, 0xffff_ffff, 0xffff_c000];
        words[96] = low;
        words
    };
    let mut words = ones(0);
    assert_eq!(SquareBins::from_words(&words).value(), f64::INFINITY);
    words[97] -= 1;
    assert_eq!(SquareBins::from_words(&words).value(), f64::MAX);
}

#[test]
fn infinities_and_nans_are_counted_and_travel() {
    let mut bins = bins_of(&[1.0f32, f32::INFINITY, f32::NEG_INFINITY]);
    assert_eq!(
        (bins.value(), bins.norm(), bins.is_finite()),
        (f64::INFINITY, f64::INFINITY, false)
    );
    bins.merge(&bins_of(&[bf16::NAN, bf16::ONE]));
    assert!(bins.value().is_nan() && bins.norm().is_nan() && !bins.is_finite());
    let words = bins.words();
    assert_eq!(&words[SquareBins::WORDS - 2..], &[2, 1]);
    assert_eq!(SquareBins::from_words(&words), bins);
    assert_eq!(
        bins_of(&[crate::F8E4M3(0x7f), crate::F8E4M3(0x7e)]).words(),
        {
            let mut words = bins_of(&[448.0f32]).words();
            words[SquareBins::WORDS - 1] = 1;
            words
        }
    );
    assert!(format!("{bins:?}").contains("nans: 1"));
}

#[test]
fn nothing_is_zero() {
    let empty = bins_of::<f32>(&[]);
    assert_eq!(empty, SquareBins::default());
    assert_eq!(
        (
            empty.value().to_bits(),
            empty.norm().to_bits(),
            empty.is_finite()
        ),
        (0, 0, true)
    );
    assert_eq!(bins_of(&[0.0f64, -0.0]), empty);
}

#[test]
fn the_words_of_the_largest_world_do_not_overflow() {
    // All bins full on all of 2^31 - 1 ranks, but for the highest, which no 2^63 elements fill beyond 7.
    let ranks = (1i64 << 31) - 1;
    let mut words = [0xffff_ffff * ranks; SquareBins::WORDS];
    words[SquareBins::WORDS - 3] = 7;
    words[SquareBins::WORDS - 2..].fill(0);
    let sum = SquareBins::from_words(&words);
    // Bin by bin in 128 bits.
    let mut carry = 0i128;
    for (found, word) in sum.words().iter().zip(words).take(SquareBins::WORDS - 2) {
        let total = i128::from(word) + carry;
        assert_eq!(i128::from(*found), total & 0xffff_ffff);
        carry = total >> 32;
    }
    assert_eq!((carry, sum.value()), (0, f64::INFINITY));
}

#[test]
#[should_panic(expected = "a word is negative")]
fn overflown_words_panic() {
    let mut words = [0; SquareBins::WORDS];
    words[5] = -1;
    SquareBins::from_words(&words);
}

#[test]
fn only_floats_on_the_host_are_squared() {
    let mut bins = SquareBins::new();
    let refused = |dtype| {
        Err(KernelError::Unsupported {
            op: "add squares",
            dtype,
        })
    };
    assert_eq!(bins.add(Span::of(&[1i32])), refused(Dtype::I32));
    assert_eq!(bins.add(Span::of(&[Bool(1)])), refused(Dtype::Bool));
    let away = bins.add(crate::simd::away(Dtype::F32));
    assert!(matches!(
        away,
        Err(KernelError::Device {
            op: "add squares",
            ..
        })
    ));
    assert_eq!(bins, SquareBins::new());
}
