//! Goal: a constant fills what it should and nothing else, and a bound is the bound of the host. Method: bit equality with
//! the pattern, and with `scalar::clamp`, at all places.

use fabric_kernels::Element;
use fabric_kernels::scalar::{self, Float};

use crate::table::{
    AROUND_CHUNK, CHUNK, Case, GRIDS, Slots, every_length, launch, moves, offsets, parts,
};
use crate::values::{Dense, floats, for_floats};

fn check_fill<T: Element>(bits: u64, lengths: &[usize], offset: usize, grid: u32) {
    let value: T = bytemuck::pod_read_unaligned(&bits.to_le_bytes()[..size_of::<T>()]);
    let rows: Vec<Vec<T>> = lengths.iter().map(|len| vec![value; *len]).collect();
    let expected: Vec<&[T]> = rows.iter().map(Vec::as_slice).collect();
    let mut target = Slots::new::<T>(lengths, offset);
    let entries = target.addresses().into_iter().zip(lengths);
    // There is no source, not even an address of one.
    let (table, chunks) = moves(entries.map(|(into, len)| (0, into, *len)), CHUNK);
    let kernel = format!("fill_{}", size_of::<T>());
    launch(
        &kernel,
        grid,
        (&table, chunks),
        &[bytemuck::bytes_of(&bits)],
    );
    target.expect_bytes(&expected, || format!("{kernel} at {offset}, grid {grid}"));
}

#[test]
fn a_constant_fills_every_length_at_every_misalignment() {
    fn check<T: Element>() {
        let lengths: Vec<usize> = (1..=257).collect();
        for offset in offsets::<T>() {
            // Bits above those of the element have no say.
            check_fill::<T>(
                0x0123_4567_89ab_cdef,
                &lengths,
                offset,
                1 + offset as u32 % 3,
            );
        }
        for grid in GRIDS {
            check_fill::<T>(0xfedc_ba98_7654_3210, &AROUND_CHUNK, 1, grid);
        }
    }
    check::<u8>();
    check::<u16>();
    check::<u32>();
    check::<u64>();
}

fn check_clamp<T: Float>(source: &[&[T]], limit: f64, offsets: (usize, usize), grid: u32) {
    let rows: Vec<Vec<T>> = source
        .iter()
        .map(|entry| entry.iter().map(|x| scalar::clamp(*x, limit)).collect())
        .collect();
    let expected: Vec<&[T]> = rows.iter().map(Vec::as_slice).collect();
    Case {
        kernel: &format!("clamp_{}", T::DTYPE),
        from: source,
        before: None,
        expected: &expected,
        offsets,
        grid,
        more: &[bytemuck::bytes_of(&limit)],
    }
    .check();
}

#[test]
fn clamp_equals_the_oracle_at_every_length_and_misalignment() {
    fn check<T: Float>() {
        let source = floats::<T>(1, 3 * 257);
        let ranges = every_length();
        for from in offsets::<T>() {
            for into in offsets::<T>() {
                let grid = 1 + (from + into) as u32 % 3;
                check_clamp(&parts(&source, &ranges), 0.3, (from, into), grid);
            }
        }
        let around = AROUND_CHUNK.map(|len| floats::<T>(2, len));
        for grid in GRIDS {
            check_clamp(&around.each_ref().map(Vec::as_slice), 1.7, (0, 0), grid);
        }
    }
    for_floats!(check);
}

/// Limits that round, that no number reaches, that saturate, and none at all.
#[test]
fn clamp_equals_the_oracle_for_every_limit() {
    fn check<T: Dense>() {
        let source = T::dense();
        let source = &source[source.len() / 5..][..source.len().min(200_000) * 4 / 5];
        for limit in [
            0.0,
            -0.0,
            0.1,
            1.0,
            450.0,
            65519.0,
            1e-9,
            1e39,
            f64::MAX,
            f64::INFINITY,
        ] {
            check_clamp(&[source], limit, (0, 0), 2);
        }
    }
    for_floats!(check);
}
