//! Small formats to and from f32, by shifting bits.

/// The f32 that `bits` mean: exact. `SPECIAL` is the smallest magnitude that is no number (infinity, or NaN where there
/// is none); `width` is the number of bits.
#[inline(always)]
pub(super) fn grow<const FRACTION: u32, const BIAS: u32, const SPECIAL: u32>(
    bits: u32,
    width: u32,
) -> f32 {
    if BIAS == 127 {
        return f32::from_bits(bits << (32 - width)); // the upper bits of an f32
    }
    let sign = (bits >> (width - 1)) << 31;
    let magnitude = bits & ((1 << (width - 1)) - 1);
    let shifted = magnitude << (23 - FRACTION);
    let normal = shifted + ((127 - BIAS) << 23);
    // A subnormal is the fraction of one more than the smallest normal number, less that number. Multiplying the
    // subnormal f32 in `shifted` instead would cost an assist of a hundred cycles.
    let smallest = (128 - BIAS) << 23;
    let subnormal = (f32::from_bits(smallest + shifted) - f32::from_bits(smallest)).to_bits();
    let number = if magnitude < (1 << FRACTION) {
        subnormal
    } else {
        normal
    };
    let special = shifted | 0x7f80_0000;
    f32::from_bits(
        sign | if magnitude >= SPECIAL {
            special
        } else {
            number
        },
    )
}

/// The bits nearest to `value`, ties to even; magnitudes beyond the range become `OVERFLOW`.
#[inline(always)]
pub(super) fn shrink<const FRACTION: u32, const BIAS: u32, const OVERFLOW: u32, const NAN: u32>(
    value: f32,
    width: u32,
) -> u32 {
    if BIAS == 127 {
        // The exponents are f32's own, subnormals included, and a carry out of the largest number makes infinity.
        let (bits, drop) = (value.to_bits(), 32 - width);
        let rounded = bits.wrapping_add((1 << (drop - 1)) - 1 + ((bits >> drop) & 1)) >> drop;
        return if value.is_nan() { NAN } else { rounded };
    }
    let sign = (value.to_bits() >> 31) << (width - 1);
    let magnitude = value.to_bits() & 0x7fff_ffff;
    let drop = 23 - FRACTION;
    // Half of the last place kept, less one, plus the last kept bit: rounds up above the tie, and at it if odd.
    let rounded = magnitude.wrapping_add((1 << (drop - 1)) - 1 + ((magnitude >> drop) & 1));
    let normal = (rounded >> drop).wrapping_sub((127 - BIAS) << FRACTION);
    // Adding a number whose last place is the smallest subnormal makes the adder round there.
    let anchor = f32::from_bits((127 + 24 - BIAS - FRACTION) << 23);
    let subnormal = (f32::from_bits(magnitude) + anchor)
        .to_bits()
        .wrapping_sub(anchor.to_bits());
    let number = if magnitude < ((128 - BIAS) << 23) {
        subnormal
    } else {
        normal
    };
    let number = if number > OVERFLOW { OVERFLOW } else { number };
    sign | if magnitude > 0x7f80_0000 { NAN } else { number }
}

/// An f32 beside `value`: itself where it is one, else of its two neighbours the one with an odd last bit.
///
/// Rounding that once more, to any format with at least two bits fewer, gives what rounding `value` at once would: the
/// odd bit remembers that something was cut off, so a tie is a tie only if it was one (Boldo, Melquiond, "Emulation of
/// FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE TC 2008).
#[inline(always)]
pub(super) fn to_odd(value: f64) -> f32 {
    let near = value as f32;
    let bits = near.to_bits();
    let exact = f64::from(near) == value;
    let beyond = f64::from(near).abs() > value.abs();
    // Of an even neighbour the other one is a bit nearer to zero or a bit farther, and odd either way. Infinity that
    // was not one becomes the largest number; NaN goes to some NaN.
    let other = if beyond {
        bits.wrapping_sub(1)
    } else {
        bits | 1
    };
    f32::from_bits(if exact || bits & 1 == 1 { bits } else { other })
}
