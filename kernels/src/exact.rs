//! The sum of squares as one long fixed-point number: exact, and therefore in no order at all.
//!
//! [Note: order-free squares] The square of every float is a whole multiple of 2^-2148, the square of the smallest f64.
//! [`SquareBins`] counts those units in 134 bins of 32 bits, so it forgets nothing and rounds nothing, and integer
//! addition has no order. Its bits depend on the multiset of the elements only: no cut into shards, no order, no
//! chunk, no instruction set and no number of ranks changes them. The one rounding is the one on the way out.
//!
//! ```text
//! bin      133        ...    67    66    ...   0                        bin b counts 2^(32 b - 2148)
//! weight   2^2108          2^-4   2^-36      2^-2148
//!          carries of      squares near 1    the square of the
//!          2^60 elements                     smallest f64
//! ```
//!
//! Limits: fewer than 2^63 elements together, over fewer than 2^31 ranks. A sum is below 2^63 * 2^2048 = 2^2111, and
//! there is room to 2^2140. A bin of one rank is below 2^32, so what an all-reduce adds up stays below 2^63.

use crate::error::KernelError;
use crate::simd;
use crate::span::Span;

const BINS: usize = 134;
const BIN_BITS: usize = 32;
const BIN_MASK: i64 = (1 << BIN_BITS) - 1;
/// Exponent of the unit of bin 0.
const LOWEST: i32 = -2148;
/// Entries between two carries. Each changes a bin by less than 2^32.
const ENTRIES: u32 = 1 << 16;
const _: () = assert!((ENTRIES as i64 + 1) << BIN_BITS < i64::MAX / 2);

/// The exact sum of squares of all elements it was given; see [Note: order-free squares] in its file.
///
/// Equal sums of equally many infinities and NaNs are equal bins.
///
/// ```
/// use fabric_kernels::{Span, SquareBins};
///
/// // Two ranks with a shard each. A plain integer sum of their words is what an all-reduce returns.
/// let (mut a, mut b) = (SquareBins::new(), SquareBins::new());
/// a.add(Span::of(&[3.0f32, 1e30]))?;
/// b.add(Span::of(&[4.0f32, 1e-30]))?;
/// let mut words = a.words();
/// words.iter_mut().zip(b.words()).for_each(|(sum, word)| *sum += word);
///
/// let mut whole = SquareBins::new();
/// whole.add(Span::of(&[1e-30f32, 4.0, 3.0, 1e30]))?;
/// assert_eq!(SquareBins::from_words(&words), whole);
/// assert_eq!(whole.norm(), f64::from(1e30f32));
/// # Ok::<(), fabric_kernels::KernelError>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct SquareBins {
    /// Between calls each is in `0..2^32`. While elements come in they may leave that range, on both sides.
    bins: [i64; BINS],
    /// Entries since the last carry.
    entries: u32,
    infinities: i64,
    nans: i64,
}

impl SquareBins {
    /// Words of a sum: its bins, from the lowest, then how many infinities, then how many NaNs. 1088 bytes, less than one
    /// Ethernet frame.
    pub const WORDS: usize = BINS + 2;

    /// The sum of nothing.
    pub fn new() -> Self {
        SquareBins {
            bins: [0; BINS],
            entries: 0,
            infinities: 0,
            nans: 0,
        }
    }

    /// The sum of the sums that were added up, word by word, to `words`.
    ///
    /// Panics when a word is negative: then more than 2^31 sums were added, or something else.
    pub fn from_words(words: &[i64; Self::WORDS]) -> Self {
        assert!(
            words.iter().all(|word| *word >= 0),
            "a word is negative, so these are not the words of fewer than 2^31 sums of squares"
        );
        let mut sum = Self::new();
        sum.bins.copy_from_slice(&words[..BINS]);
        [sum.infinities, sum.nans] = [words[BINS], words[BINS + 1]];
        sum.carry();
        sum
    }

    /// Adds the square of every element. Floats only.
    pub fn add(&mut self, x: Span<'_>) -> Result<(), KernelError> {
        self.add_all(&[x])
    }

    /// Adds the square of every element of every span; those that lie on one device are read by it together.
    ///
    /// What a device adds is the sum of its finite squares in f64, in an order that follows from their number: the bins
    /// are exact from there on.
    pub fn add_all(&mut self, spans: &[Span<'_>]) -> Result<(), KernelError> {
        const OP: &str = "add squares";
        if let Some(odd) = spans.iter().find(|span| !span.dtype().is_float()) {
            let dtype = odd.dtype();
            return Err(KernelError::Unsupported { op: OP, dtype });
        }
        let mut away = Vec::new();
        for span in spans {
            match span.device() {
                None => self.add_host(*span),
                Some(_) => away.push(*span),
            }
        }
        while let Some(device) = away.first().and_then(Span::device) {
            let is_there = |span: &Span<'_>| {
                let other = span.device();
                other.is_some_and(|other| std::ptr::addr_eq(&raw const *other, &raw const *device))
            };
            let (there, rest) = away.into_iter().partition::<Vec<_>, _>(is_there);
            let found = device.squares(&there)?;
            self.infinities += found.infinities as i64;
            self.nans += found.nans as i64;
            self.enter_sum(found.sum);
            self.carry();
            away = rest;
        }
        Ok(())
    }

    fn add_host(&mut self, x: Span<'_>) {
        with_float!(
            x.dtype(),
            |T| simd::add_squares::<T>(x, self),
            else unreachable!("only floats come here")
        );
        self.carry();
    }

    /// Adds a sum of squares that somebody else has rounded to f64.
    fn enter_sum(&mut self, sum: f64) {
        if sum.is_nan() {
            self.nans += 1;
        } else if sum.is_infinite() {
            self.infinities += 1;
        } else {
            let (digits, exponent) = digits_of(sum);
            // Below 2^-1074 f64 has no digits, so the unit is never smaller than that of bin 0.
            self.enter(digits as i64, exponent);
        }
    }

    /// Adds all that another sum has seen.
    pub fn merge(&mut self, other: &Self) {
        for (ours, theirs) in self.bins.iter_mut().zip(&other.bins) {
            *ours += theirs;
        }
        self.infinities += other.infinities;
        self.nans += other.nans;
        self.carry();
    }

    /// The words whose sums over all ranks [`SquareBins::from_words`] takes.
    pub fn words(&self) -> [i64; Self::WORDS] {
        let mut words = [0; Self::WORDS];
        words[..BINS].copy_from_slice(&self.bins);
        [words[BINS], words[BINS + 1]] = [self.infinities, self.nans];
        words
    }

    /// No element was infinite or NaN.
    pub fn is_finite(&self) -> bool {
        self.infinities == 0 && self.nans == 0
    }

    /// The f64 nearest to the sum, ties to even, rounded once. NaN if an element is, else infinite if an element is, or
    /// if no finite f64 is near.
    pub fn value(&self) -> f64 {
        self.special().unwrap_or_else(|| match self.leading() {
            None => 0.0,
            Some((digits, exponent)) => round(digits, exponent),
        })
    }

    /// The square root of the sum, within one unit in the last place, even where the sum itself is too large or too small
    /// for an f64.
    pub fn norm(&self) -> f64 {
        self.special().unwrap_or_else(|| match self.leading() {
            None => 0.0,
            Some((digits, exponent)) => {
                // The sum is s * 4^half with s between 1 and 4, so the root is root(s) * 2^half; in two factors, as
                // the smallest powers have no reciprocal.
                let half = (exponent + digits.ilog2() as i32).div_euclid(2);
                let root = round(digits, exponent - 2 * half).sqrt();
                root * power_of_two(half / 2) * power_of_two(half - half / 2)
            }
        })
    }

    /// What an infinity or a NaN makes of every sum.
    fn special(&self) -> Option<f64> {
        match (self.nans, self.infinities) {
            (0, 0) => None,
            (0, _) => Some(f64::INFINITY),
            _ => Some(f64::NAN),
        }
    }

    /// The sum as digits * 2^exponent, where digits has 65 to 96 bits and an odd last bit if anything was cut off. That
    /// bit lies far below the last one kept, so it only tells a tie from what is just above.
    fn leading(&self) -> Option<(u128, i32)> {
        let top = self.bins.iter().rposition(|bin| *bin != 0)?;
        // Bins below the lowest are empty.
        let bin = |below: usize| top.checked_sub(below).map_or(0, |at| self.bins[at] as u128);
        let digits = bin(0) << (2 * BIN_BITS) | bin(1) << BIN_BITS | bin(2);
        let lost = self.bins[..top.saturating_sub(2)]
            .iter()
            .any(|bin| *bin != 0);
        let exponent = LOWEST + BIN_BITS as i32 * (top as i32 - 2);
        Some((digits | u128::from(lost), exponent))
    }

    /// Counts one element, whatever it is, by integer arithmetic.
    pub(crate) fn square(&mut self, value: f64) {
        if value.is_nan() {
            self.nans += 1;
        } else if value.is_infinite() {
            self.infinities += 1;
        } else {
            let (digits, exponent) = digits_of(value);
            let square = u128::from(digits) * u128::from(digits); // at most 106 bits
            const HALF: u32 = 53;
            self.enter((square & ((1 << HALF) - 1)) as i64, 2 * exponent);
            self.enter((square >> HALF) as i64, 2 * exponent + HALF as i32);
        }
    }

    /// Adds units * 2^exponent, which may be negative as long as what is entered in one `add` is not.
    pub(crate) fn enter(&mut self, units: i64, exponent: i32) {
        if self.entries == ENTRIES {
            self.carry();
        }
        self.entries += 1;
        let place = usize::try_from(exponent - LOWEST).expect("no square has a smaller unit");
        let bin = place / BIN_BITS;
        // 64 bits and at most 31 more: three bins. The lower two get what is above their own unit, the third the sign.
        let shifted = i128::from(units) << (place % BIN_BITS);
        self.bins[bin] += shifted as i64 & BIN_MASK;
        self.bins[bin + 1] += (shifted >> BIN_BITS) as i64 & BIN_MASK;
        self.bins[bin + 2] += (shifted >> (2 * BIN_BITS)) as i64;
    }

    /// Takes every bin back into `0..2^32`, the highest excepted, which has nowhere to carry to.
    fn carry(&mut self) {
        let mut carry = 0;
        let (top, lower) = self
            .bins
            .split_last_mut()
            .expect("there is more than one bin");
        for bin in lower {
            let sum = *bin + carry;
            *bin = sum & BIN_MASK;
            carry = sum >> BIN_BITS;
        }
        *top += carry;
        self.entries = 0;
    }
}

impl Default for SquareBins {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for SquareBins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let filled = self.bins.iter().enumerate().filter(|(_, bin)| **bin != 0);
        f.debug_struct("SquareBins")
            .field("value", &self.value())
            .field("infinities", &self.infinities)
            .field("nans", &self.nans)
            .field("bins", &filled.collect::<Vec<_>>())
            .finish()
    }
}

/// The magnitude of a finite number as digits * 2^exponent.
fn digits_of(value: f64) -> (u64, i32) {
    let fraction = value.to_bits() & ((1 << 52) - 1);
    match (value.to_bits() >> 52) as i32 & 0x7ff {
        0 => (fraction, -1074),
        field => (fraction | 1 << 52, field - 1075),
    }
}

/// The f64 nearest to digits * 2^exponent, ties to even, where digits has 65 to 96 bits.
fn round(digits: u128, exponent: i32) -> f64 {
    let highest = exponent + digits.ilog2() as i32;
    if highest > 1023 {
        return f64::INFINITY;
    }
    // The last place of a 53-bit number, or of the subnormals.
    let last = (highest - 52).max(-1074);
    let drop = last - exponent;
    if drop > 96 {
        return 0.0; // below half of the smallest subnormal
    }
    let (kept, half) = (digits >> drop, 1u128 << (drop - 1));
    let cut = digits & (2 * half - 1);
    let up = cut > half || (cut == half && kept & 1 == 1);
    // The hidden bit adds one to the exponent of a normal number; a carry out of the fraction adds another, up to infinity.
    f64::from_bits((((last + 1074) as u64) << 52) + kept as u64 + u64::from(up))
}

/// 2^exponent, of a normal number.
fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}
