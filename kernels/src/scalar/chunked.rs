//! The sum of squares as a device adds it, chunk by chunk.
//!
//! [Note: chunk order] A chunk is [`CHUNK`] elements, the last of a span shorter. Its element i belongs to lane
//! (i / v) mod 256, where v elements are 16 bytes; each lane adds squares in order of i. Then lane t below 32 takes in lanes
//! t + 32, t + 64, ..., t + 224, in this order; and then t takes in t + 16, t + 8, t + 4, t + 2, t + 1. The sums of all
//! chunks are one row, of which sum i belongs to lane i mod 256, and the lanes are added in the same way.

use super::float::Float;

/// Elements in a chunk.
pub const CHUNK: usize = 8192;

const LANES: usize = 256;

/// What [`chunk_squares`] found.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct ChunkSquares {
    /// The sum of the squares of the finite elements. Infinite only when f64 elements are huge.
    pub sum: f64,
    /// How many elements are infinite.
    pub infinities: u64,
    /// How many elements are NaN.
    pub nans: u64,
}

/// The squares of one chunk, at most [`CHUNK`] elements.
pub fn chunk_squares<A: Float>(chunk: &[A]) -> ChunkSquares {
    assert!(chunk.len() <= CHUNK);
    let neighbours = 16 / size_of::<A>();
    let mut lanes = [0.0f64; LANES];
    let (mut infinities, mut nans) = (0, 0);
    for (index, element) in chunk.iter().enumerate() {
        let value = element.decode();
        if value.is_finite() {
            lanes[index / neighbours % LANES] += value * value;
        } else if value.is_infinite() {
            infinities += 1;
        } else {
            nans += 1;
        }
    }
    ChunkSquares {
        sum: together(&lanes),
        infinities,
        nans,
    }
}

/// The sum of the sums of all chunks, in the order of their numbers.
pub fn end_squares(sums: &[f64]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for (index, sum) in sums.iter().enumerate() {
        lanes[index % LANES] += sum;
    }
    together(&lanes)
}

fn together(lanes: &[f64; LANES]) -> f64 {
    let mut row = [0.0f64; 32];
    for (lane, sum) in row.iter_mut().enumerate() {
        let mut others = lanes.iter().skip(lane).step_by(32);
        *sum = *others.next().expect("every lane below 32 is there");
        others.for_each(|other| *sum += other);
    }
    for apart in [16, 8, 4, 2, 1] {
        for lane in 0..apart {
            row[lane] += row[lane + apart];
        }
    }
    row[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Beside 2^60 a square below 129 is rounded away, unless it first meets enough others of its kind.
    #[test]
    fn lanes_are_added_as_the_note_says() {
        let mut chunk = vec![0.0f32; CHUNK];
        chunk[0] = 2.0f32.powi(30);
        // In the lane of the large one, after it: lost. 4 f32 are 16 bytes.
        chunk[1] = 1.0;
        chunk[4 * LANES] = 1.0;
        assert_eq!(chunk_squares(&chunk).sum, 2.0f64.powi(60));
        // In lane 1, which meets lane 0 last: 512, enough to be seen.
        for round in 0..8 {
            chunk[4 + round * 4 * LANES..][..4].fill(4.0);
        }
        assert_eq!(chunk_squares(&chunk).sum, 2.0f64.powi(60) + 512.0);
    }

    #[test]
    fn what_is_not_finite_is_counted_and_not_added() {
        let chunk = [3.0, f64::NAN, f64::INFINITY, 4.0, f64::NEG_INFINITY];
        let found = chunk_squares(&chunk);
        assert_eq!((found.sum, found.infinities, found.nans), (25.0, 2, 1));
        assert_eq!(chunk_squares(&[1e200f64]).sum, f64::INFINITY);
    }

    #[test]
    fn the_sum_of_no_chunks_is_nothing() {
        assert_eq!(end_squares(&[]), 0.0);
        assert_eq!(end_squares(&[1.0; 1000]), 1000.0);
    }
}
