//! What the bits of a float mean, and which bits mean a number: through f64, which holds every value of every smaller
//! format exactly.

use half::{bf16, f16};

use crate::dtype::{Element, F8E4M3, F8E5M2};

/// A float that the oracle can read and write.
pub trait Float: Element {
    /// The value, exactly.
    fn decode(self) -> f64;
    /// The nearest representable value, ties to the even one; see [Note: one rounding] for overflow.
    fn encode(value: f64) -> Self;
}

impl Float for f64 {
    fn decode(self) -> f64 {
        self
    }
    fn encode(value: f64) -> Self {
        value
    }
}

impl Float for f32 {
    fn decode(self) -> f64 {
        f64::from(self)
    }
    fn encode(value: f64) -> Self {
        value as f32
    }
}

impl Float for f16 {
    fn decode(self) -> f64 {
        F16.decode(u32::from(self.to_bits()))
    }
    fn encode(value: f64) -> Self {
        f16::from_bits(F16.encode(value) as u16)
    }
}

impl Float for bf16 {
    fn decode(self) -> f64 {
        BF16.decode(u32::from(self.to_bits()))
    }
    fn encode(value: f64) -> Self {
        bf16::from_bits(BF16.encode(value) as u16)
    }
}

impl Float for F8E4M3 {
    fn decode(self) -> f64 {
        E4M3.decode(u32::from(self.0))
    }
    fn encode(value: f64) -> Self {
        F8E4M3(E4M3.encode(value) as u8)
    }
}

impl Float for F8E5M2 {
    fn decode(self) -> f64 {
        E5M2.decode(u32::from(self.0))
    }
    fn encode(value: f64) -> Self {
        F8E5M2(E5M2.encode(value) as u8)
    }
}

/// A small format: sign, exponent, fraction, from the highest bit to the lowest.
struct Format {
    exponent_bits: u32,
    fraction_bits: u32,
    /// Magnitude bits of infinity; everything above is NaN.
    infinity: u32,
    /// Magnitude bits that overflow becomes.
    overflow: u32,
    /// Magnitude bits of the NaN that is written.
    nan: u32,
}

const F16: Format = Format {
    exponent_bits: 5,
    fraction_bits: 10,
    infinity: 0x7c00,
    overflow: 0x7c00,
    nan: 0x7e00,
};
const BF16: Format = Format {
    exponent_bits: 8,
    fraction_bits: 7,
    infinity: 0x7f80,
    overflow: 0x7f80,
    nan: 0x7fc0,
};
// No infinity: its place, one below the only NaN, is the largest finite number, which `decode` must not call infinite.
const E4M3: Format = Format {
    exponent_bits: 4,
    fraction_bits: 3,
    infinity: u32::MAX,
    overflow: 0x7e,
    nan: 0x7f,
};
const E5M2: Format = Format {
    exponent_bits: 5,
    fraction_bits: 2,
    infinity: 0x7c,
    overflow: 0x7b,
    nan: 0x7e,
};

impl Format {
    fn bias(&self) -> i32 {
        (1 << (self.exponent_bits - 1)) - 1
    }

    fn sign_bit(&self) -> u32 {
        1 << (self.exponent_bits + self.fraction_bits)
    }

    fn is_nan(&self, magnitude: u32) -> bool {
        if self.infinity == u32::MAX {
            magnitude == self.nan
        } else {
            magnitude > self.infinity
        }
    }

    fn decode(&self, bits: u32) -> f64 {
        let sign = if bits & self.sign_bit() == 0 {
            1.0
        } else {
            -1.0
        };
        let magnitude = bits & (self.sign_bit() - 1);
        if self.is_nan(magnitude) {
            return f64::NAN;
        }
        if magnitude == self.infinity {
            return sign * f64::INFINITY;
        }
        let exponent = (magnitude >> self.fraction_bits) as i32;
        let fraction = magnitude & ((1 << self.fraction_bits) - 1);
        // Subnormals have the exponent of the smallest normal numbers and no hidden one.
        let (exponent, digits) = match exponent {
            0 => (1, fraction),
            normal => (normal, fraction + (1 << self.fraction_bits)),
        };
        sign * f64::from(digits) * power_of_two(exponent - self.bias() - self.fraction_bits as i32)
    }

    fn encode(&self, value: f64) -> u32 {
        let sign = if value.is_sign_negative() {
            self.sign_bit()
        } else {
            0
        };
        if value.is_nan() {
            return sign | self.nan;
        }
        let magnitude = value.abs();
        if magnitude.is_infinite() {
            return sign | self.overflow;
        }
        // The exponent of the value, but never below that of the subnormals, tells the distance between neighbours.
        let smallest = 1 - self.bias();
        let exponent = ((magnitude.to_bits() >> 52) as i32 - 1023).max(smallest);
        let spacing = power_of_two(exponent - self.fraction_bits as i32);
        // Dividing by a power of two is exact here; the only rounding is this one.
        let digits = (magnitude / spacing).round_ties_even() as u64;
        // A carry out of the fraction runs into the exponent, which is just what it should do.
        let binade = u64::try_from(exponent - smallest).expect("exponent was raised to smallest");
        let bits = (binade << self.fraction_bits) + digits;
        sign | bits.min(u64::from(self.overflow)) as u32
    }
}

/// 2^exponent, for exponents of normal f64 numbers.
fn power_of_two(exponent: i32) -> f64 {
    let biased = u64::try_from(exponent + 1023).expect("exponent of a normal f64");
    assert!((1..2047).contains(&biased), "exponent of a normal f64");
    f64::from_bits(biased << 52)
}
