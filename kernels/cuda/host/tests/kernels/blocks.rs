//! Goal: f8 with scales on the device is that of the host. Method: bit equality of elements and scales with
//! `scalar::quantize_block` and `scalar::dequantize_block`.

use bytemuck::{Pod, Zeroable};
use fabric_kernels::scalar::{self, BLOCK, Float};
use fabric_kernels::{F8E4M3, F8E5M2};
use half::{bf16, f16};

use crate::table::{
    AROUND_CHUNK, CHUNK, GRIDS, Slots, every_length, launch, lengths, offsets, parts,
};
use crate::values::{Dense, Stream, floats};

macro_rules! for_pairs {
    ($check:ident) => {
        $check::<f32, F8E4M3>();
        $check::<f32, F8E5M2>();
        $check::<f16, F8E4M3>();
        $check::<f16, F8E5M2>();
        $check::<bf16, F8E4M3>();
        $check::<bf16, F8E5M2>();
    };
}

/// `Blocks` in `abi.cuh`.
#[repr(C)]
#[derive(Copy, Clone, Pod, Zeroable)]
struct Blocks {
    from: u64,
    into: u64,
    scales: u64,
    numel: u64,
    first: u64,
    unused: u64,
}

fn table(
    from: &mut Slots,
    into: &mut Slots,
    scales: &mut Slots,
    lengths: &[usize],
) -> (Vec<Blocks>, u64) {
    let (from, into, scales) = (from.addresses(), into.addresses(), scales.addresses());
    let (mut table, mut first) = (Vec::new(), 0);
    for (entry, len) in lengths.iter().enumerate() {
        table.push(Blocks {
            from: from[entry],
            into: into[entry],
            scales: scales[entry],
            numel: *len as u64,
            first,
            unused: 0,
        });
        first += len.div_ceil(CHUNK) as u64;
    }
    (table, first)
}

/// What the oracle makes of some entries, and what it makes of that.
struct Expected<A, Q> {
    small: Vec<Vec<Q>>,
    scales: Vec<Vec<f32>>,
    back: Vec<Vec<A>>,
}

impl<A: Float, Q: Float> Expected<A, Q> {
    fn of(entries: &[&[A]]) -> Self {
        let (mut small, mut scales, mut back) = (Vec::new(), Vec::new(), Vec::new());
        for entry in entries {
            let blocks: Vec<_> = entry
                .chunks(BLOCK)
                .map(scalar::quantize_block::<A, Q>)
                .collect();
            let backs = blocks
                .iter()
                .flat_map(|(scale, q)| scalar::dequantize_block(q, *scale));
            back.push(backs.collect());
            scales.push(blocks.iter().map(|block| block.0).collect());
            small.push(blocks.into_iter().flat_map(|block| block.1).collect());
        }
        Expected {
            small,
            scales,
            back,
        }
    }

    /// Both ways, at element offsets of wide elements, small ones, and scales.
    fn check(&self, entries: &[&[A]], (wide, small, scale): (usize, usize, usize), grid: u32) {
        fn rows<T>(rows: &[Vec<T>]) -> Vec<&[T]> {
            rows.iter().map(Vec::as_slice).collect()
        }
        let what = || {
            format!(
                "{} and {} at {wide}, {small}, {scale}, grid {grid}",
                A::DTYPE,
                Q::DTYPE
            )
        };
        let lengths = lengths(entries);
        let scale_lengths: Vec<usize> = lengths.iter().map(|len| len.div_ceil(BLOCK)).collect();
        let mut source = Slots::of(entries, wide);
        let mut target = Slots::new::<Q>(&lengths, small);
        let mut scales = Slots::new::<f32>(&scale_lengths, scale);
        let (blocks, chunks) = table(&mut source, &mut target, &mut scales, &lengths);
        launch(
            &format!("quantize_{}_{}", A::DTYPE, Q::DTYPE),
            grid,
            (&blocks, chunks),
            &[],
        );
        target.expect(&rows(&self.small), what);
        scales.expect(&rows(&self.scales), what);

        let mut back = Slots::new::<A>(&lengths, wide);
        let (blocks, chunks) = table(&mut target, &mut back, &mut scales, &lengths);
        launch(
            &format!("dequantize_{}_{}", Q::DTYPE, A::DTYPE),
            grid,
            (&blocks, chunks),
            &[],
        );
        back.expect(&rows(&self.back), what);
    }
}

#[test]
fn every_length_at_every_misalignment_equals_the_oracle() {
    fn check<A: Float, Q: Float>() {
        let source = floats::<A>(1, 3 * 257);
        let entries = parts(&source, &every_length());
        let expected = Expected::<A, Q>::of(&entries);
        for wide in offsets::<A>() {
            for small in [0, 1, 2, 4, 15] {
                let scale = (wide + small) % 4;
                expected.check(
                    &entries,
                    (wide, small, scale),
                    1 + (wide + small) as u32 % 3,
                );
            }
        }
    }
    for_pairs!(check);
}

#[test]
fn entries_around_a_chunk_are_the_same_under_every_grid() {
    fn check<A: Float, Q: Float>() {
        let source = AROUND_CHUNK.map(|len| floats::<A>(2, len));
        let entries = source.each_ref().map(Vec::as_slice);
        let expected = Expected::<A, Q>::of(&entries);
        for grid in GRIDS {
            expected.check(&entries, (0, 0, 0), grid);
            expected.check(&entries, (1, 3, 2), grid);
        }
    }
    for_pairs!(check);
}

/// Blocks of every magnitude, down to those whose scale would be no normal number, and with every kind of special element.
#[test]
fn scales_of_every_magnitude_equal_the_oracle() {
    fn check<A: Float, Q: Float>() {
        let mut stream = Stream(3);
        let mut source = Vec::new();
        for exponent in -150..128 {
            source.extend((0..BLOCK).map(|_| A::encode(stream.unit() * 2.0f64.powi(exponent))));
        }
        for special in [
            0.0,
            -0.0,
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            1e-45,
            3e38,
        ] {
            source.extend([A::encode(special); BLOCK]);
            let one = stream.next() as usize % BLOCK;
            source.extend((0..BLOCK).map(|at| A::encode(if at == one { special } else { 0.75 })));
        }
        Expected::<A, Q>::of(&[&source[..]]).check(&[&source[..]], (0, 0, 0), 2);
    }
    for_pairs!(check);
}

#[test]
fn every_small_value_in_a_block_equals_the_oracle() {
    fn check<A: Dense, Q: Float>() {
        let source = A::dense();
        let source = &source[source.len() / 7..][..source.len().min(400_000) * 6 / 7];
        Expected::<A, Q>::of(&[source]).check(&[source], (0, 0, 0), 3);
    }
    for_pairs!(check);
}
