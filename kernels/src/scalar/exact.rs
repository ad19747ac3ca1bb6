//! The exact sum of squares, bit by bit.

use super::float::Float;
use crate::exact::SquareBins;

/// The words of [`SquareBins`] by schoolbook: each square in binary, each of its ones added at its place.
pub fn square_words<A: Float>(x: &[A]) -> [i64; SquareBins::WORDS] {
    const BINS: usize = SquareBins::WORDS - 2;
    let mut words = [0i64; SquareBins::WORDS];
    for value in x.iter().map(|element| element.decode()) {
        if value.is_infinite() {
            words[BINS] += 1;
        } else if value.is_nan() {
            words[BINS + 1] += 1;
        } else {
            let (digits, exponent) = whole(value.abs());
            let square = u128::from(digits) * u128::from(digits);
            for place in (0..128).filter(|place| square >> place & 1 == 1) {
                // Bin 0 counts 2^-2148.
                add_one(&mut words, (2148 + 2 * exponent + place) as usize);
            }
        }
    }
    words
}

/// A number as digits * 2^exponent with as few digits as possible.
fn whole(value: f64) -> (u64, i32) {
    if value == 0.0 {
        return (0, 0);
    }
    // Multiplying by a power of two is exact in this direction: no digit is lost and nothing overflows.
    let (mut digits, mut exponent) = (value, 0);
    while digits >= 2.0f64.powi(53) {
        digits /= 2.0;
        exponent += 1;
    }
    while digits.fract() != 0.0 {
        digits *= 2.0;
        exponent -= 1;
    }
    (digits as u64, exponent)
}

/// Adds 2^place to a number of 32 bits a word.
fn add_one(words: &mut [i64], place: usize) {
    let mut word = place / 32;
    let mut one = 1i64 << (place % 32);
    loop {
        words[word] += one;
        if words[word] < 1 << 32 {
            return;
        }
        words[word] -= 1 << 32;
        word += 1;
        one = 1;
    }
}
