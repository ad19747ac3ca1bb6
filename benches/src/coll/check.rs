//! Is it right? Outputs against the exact values, bit by bit, and the guard zones around every buffer.

use super::{
    collective::Segment,
    inputs::{BLOCK_ELEMS, Recipe},
};

/// Bytes before and after every buffer that nobody may touch; a slab's alignment, so that the buffer is aligned too.
pub const GUARD_BYTES: usize = 128;

/// What was found to be wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wrong {
    /// Elements of outputs with wrong bits.
    pub elements: u64,
    /// Bytes that have changed where nothing may be written: guard zones, and inputs that lie apart from the output.
    pub outside: u64,
}

impl Wrong {
    /// Nothing.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

impl std::ops::AddAssign for Wrong {
    fn add_assign(&mut self, other: Self) {
        self.elements += other.elements;
        self.outside += other.outside;
    }
}

/// How many elements of `bytes` differ from what `segments`, one after the other, must be.
pub fn wrong_elements(recipe: &Recipe, segments: &[Segment], bytes: &[u8]) -> u64 {
    let size = recipe.dtype.size();
    let mut scratch = [0u64; BLOCK_ELEMS]; // aligned for every type
    let (mut rest, mut wrong) = (bytes, 0);
    for segment in segments {
        let mut range = segment.range.clone();
        while !range.is_empty() {
            let elems = range.len().min(BLOCK_ELEMS);
            let (found, behind) = rest.split_at(elems * size);
            let expected = &mut bytemuck::cast_slice_mut(&mut scratch)[..elems * size];
            match segment.of {
                Some(rank) => recipe.write(rank, range.start, expected),
                None => recipe.reduced(range.start, expected),
            }
            if found != expected {
                let pairs = found.chunks(size).zip(expected.chunks(size));
                wrong += pairs.filter(|(found, expected)| found != expected).count() as u64;
            }
            (rest, range.start) = (behind, range.start + elems);
        }
    }
    assert!(rest.is_empty(), "an output longer than its segments");
    wrong
}

/// Fill a guard zone.
pub fn guard(zone: &mut [u8]) {
    for (index, byte) in zone.iter_mut().enumerate() {
        *byte = guard_byte(index);
    }
}

/// How many bytes of a guard zone have changed.
pub fn broken(zone: &[u8]) -> u64 {
    let bytes = zone.iter().enumerate();
    bytes
        .filter(|(index, byte)| **byte != guard_byte(*index))
        .count() as u64
}

fn guard_byte(index: usize) -> u8 {
    0xa5 ^ (index as u8).wrapping_mul(29)
}

#[cfg(test)]
mod tests {
    use fabric_engine::kernels::Dtype;

    use super::*;
    use crate::coll::redop::Redop;

    /// Goal: the checker misses nothing. Method: every single bit of a short output, flipped.
    #[test]
    fn any_flipped_bit_is_one_wrong_element() {
        for dtype in Dtype::ALL {
            let recipe = Recipe {
                dtype,
                op: Some(Redop::Max),
                ranks: 3,
                seed: 1,
            };
            let segment = |of, range| Segment { of, range };
            let segments = [segment(None, 3..20), segment(Some(2), 0..9)];
            let size = dtype.size();
            let mut slab = fabric_engine::buffer::Slab::zeroed(dtype, 26);
            let bytes = slab.as_bytes_mut();
            recipe.reduced(3, &mut bytes[..17 * size]);
            recipe.write(2, 0, &mut bytes[17 * size..]);
            assert_eq!(wrong_elements(&recipe, &segments, bytes), 0);
            for bit in 0..bytes.len() * 8 {
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(
                    wrong_elements(&recipe, &segments, bytes),
                    1,
                    "{dtype} {bit}"
                );
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn a_block_border_hides_nothing() {
        let recipe = Recipe {
            dtype: Dtype::U16,
            op: None,
            ranks: 2,
            seed: 4,
        };
        let segments = [Segment {
            of: Some(1),
            range: 5..3005,
        }];
        let mut words = vec![0u16; 3000];
        recipe.write(1, 5, bytemuck::cast_slice_mut(&mut words));
        for at in [0, BLOCK_ELEMS - 1, BLOCK_ELEMS, 2 * BLOCK_ELEMS, 2999] {
            words[at] ^= 0x100;
        }
        assert_eq!(
            wrong_elements(&recipe, &segments, bytemuck::cast_slice(&words)),
            5
        );
    }

    #[test]
    fn any_wrong_guard_byte_is_found() {
        let mut zone = [0; GUARD_BYTES];
        guard(&mut zone);
        assert_eq!(broken(&zone), 0);
        for at in 0..GUARD_BYTES {
            zone[at] ^= 0x10;
            assert_eq!(broken(&zone), 1);
            zone[at] ^= 0x10;
        }
        assert!(broken(&[0; GUARD_BYTES]) > 120);
        assert!(broken(&[0xff; GUARD_BYTES]) > 120);
    }
}
