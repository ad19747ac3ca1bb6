//! Rounding by chance: up or down with the probability of the distance, so that the mean of many is the value.
//!
//! [Note: chance] The product is taken to f32 as any other, then rounded by chance. The random bits of an element are a pure
//! function of a seed, the number of its entry in a table and its own number in the entry: not of the grid, not of the
//! alignment. Values that the type holds stay. Beyond its largest finite number there is nothing to choose between, and
//! [Note: one rounding] says what becomes of a value; so chance makes no infinity of what would be finite.

use super::float::Float;
use crate::dtype::Dtype;

/// from * factor in f32, rounded away from zero if `random` / 2^32 is below the fraction of the way there.
///
/// Into f16, bf16 and the two f8, from no more than f32.
pub fn cast_stochastic<A: Float, B: Float>(from: A, factor: f64, random: u32) -> B {
    assert!(A::DTYPE != Dtype::F64 && B::DTYPE.size() <= 2);
    let value = f64::from(from.decode() as f32 * factor as f32);
    let nearest = B::encode(value);
    let largest = largest::<B>();
    if value.is_nan() || value.abs() > largest || nearest.decode() == value {
        return nearest;
    }
    // The neighbours of the value: the one that is nearest, and one of those beside it.
    let (toward_zero, away) = if nearest.decode().abs() < value.abs() {
        (nearest, beside(nearest, 1))
    } else {
        (beside(nearest, -1), nearest)
    };
    let (low, high) = (toward_zero.decode().abs(), away.decode().abs());
    // Exact: both differences have few digits, and neighbours are a power of two apart.
    let way = (value.abs() - low) / (high - low);
    if f64::from(random) < (way * 2.0f64.powi(32)).floor() {
        away
    } else {
        toward_zero
    }
}

/// The random bits of one element: two neighbours share one number of splitmix64 (Steele, Lea and Flood 2014, "Fast
/// splittable pseudorandom number generators"), the first having its lower half; an entry's sequence begins at a number of
/// the seed's.
pub fn random_bits(seed: u64, entry: u32, element: u64) -> u32 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let start = mix(seed.wrapping_add((u64::from(entry) + 1).wrapping_mul(GOLDEN)));
    let number = mix(start.wrapping_add((element / 2).wrapping_mul(GOLDEN)));
    (number >> (32 * (element % 2))) as u32
}

/// The output function of splitmix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn largest<B: Float>() -> f64 {
    let overflow = B::encode(f64::INFINITY);
    if overflow.decode().is_finite() {
        overflow.decode()
    } else {
        beside(overflow, -1).decode()
    }
}

/// The number whose bits, as an integer, are `by` more: with the same sign, further from zero.
fn beside<B: Float>(x: B, by: i8) -> B {
    match bytemuck::bytes_of(&x) {
        [byte] => bytemuck::pod_read_unaligned(&[byte.wrapping_add_signed(by)]),
        [low, high] => {
            let bits = u16::from_ne_bytes([*low, *high]).wrapping_add_signed(by.into());
            bytemuck::pod_read_unaligned(&bits.to_ne_bytes())
        }
        _ => unreachable!("the caller asserts that B has one or two bytes"),
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::{F8E4M3, F8E5M2};

    /// A quarter of the way up, a quarter of all random numbers goes up; the last that does and the first that does not.
    #[test]
    fn the_way_up_is_the_share_of_random_numbers_that_go_up() {
        let value = 1.0f32 + 0.25 * 2.0f32.powi(-7);
        let round = |x: f32, random| f32::from(cast_stochastic::<f32, bf16>(x, 1.0, random));
        assert_eq!(round(value, (1 << 30) - 1), 1.0 + 2.0f32.powi(-7));
        assert_eq!(round(value, 1 << 30), 1.0);
        assert_eq!(round(-value, (1 << 30) - 1), -1.0 - 2.0f32.powi(-7));
        assert_eq!(round(-value, 1 << 30), -1.0);
    }

    #[test]
    fn the_mean_of_many_is_the_value() {
        let value = 0.3f32;
        let sum: f64 = (0..40_000)
            .map(|element| {
                let random = random_bits(7, 3, element);
                cast_stochastic::<f32, F8E5M2>(value, 1.0, random).decode()
            })
            .sum();
        // Neighbours are 1/16 apart: one rounding's deviation is below 1/32, that of this mean below 1/6400.
        assert!((sum / 40_000.0 - f64::from(value)).abs() < 5.0 / 6400.0);
    }

    #[test]
    fn what_a_type_holds_stays_whatever_the_chance() {
        for bits in 0..=u8::MAX {
            let x = F8E4M3(bits).decode() as f32;
            for random in [0, u32::MAX] {
                let back = cast_stochastic::<f32, F8E4M3>(x, 1.0, random);
                assert!(back == F8E4M3(bits) || x.is_nan() && back.decode().is_nan());
            }
        }
    }

    #[test]
    fn beyond_the_largest_number_rounding_is_what_it_always_is() {
        for random in [0, u32::MAX] {
            let round = |x| cast_stochastic::<f32, f16>(x, 1.0, random);
            assert_eq!(round(65519.0), f16::MAX);
            assert_eq!(round(-65520.0), f16::NEG_INFINITY);
            assert!(round(f32::NAN).is_nan());
            assert_eq!(
                cast_stochastic::<f32, F8E4M3>(f32::INFINITY, 1.0, random).decode(),
                448.0
            );
        }
    }

    /// The smallest subnormals have zero beside them.
    #[test]
    fn between_zero_and_the_smallest_number_there_is_a_choice() {
        let round = |x, random| cast_stochastic::<f32, f16>(x, 1.0, random).to_bits();
        let half = 2.0f32.powi(-25);
        assert_eq!(round(half, (1 << 31) - 1), 1);
        assert_eq!(round(half, 1 << 31), 0);
        assert_eq!(round(-half, 1 << 31), 0x8000);
        // Further down than 32 bits of chance reach.
        assert_eq!(round(2.0f32.powi(-60), 0), 0);
    }

    #[test]
    fn random_bits_depend_on_all_three() {
        let bits = random_bits(1, 2, 3);
        assert_eq!(bits, random_bits(1, 2, 3));
        for other in [(0, 2, 3), (1, 3, 3), (1, 2, 2), (1, 2, 4)] {
            assert_ne!(bits, random_bits(other.0, other.1, other.2));
        }
    }
}
