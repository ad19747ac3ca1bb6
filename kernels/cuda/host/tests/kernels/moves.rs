//! Goal: a cast on the device is the cast of the host. Method: bit equality with `scalar::cast_scaled`, at all places and
//! for all values.

use fabric_kernels::scalar::{self, Float};

use crate::table::{
    AROUND_CHUNK, CHUNK, Case, GRIDS, Slots, every_length, launch, moves, offsets, parts,
};
use crate::values::{Dense, Stream, floats, for_float_pairs};

fn name<A: Float, B: Float>() -> String {
    format!("move_{}_{}", A::DTYPE, B::DTYPE)
}

fn check_at<A: Float, B: Float>(
    from: &[&[A]],
    expected: &[&[B]],
    offsets: (usize, usize),
    grid: u32,
    scale: f64,
) {
    Case {
        kernel: &name::<A, B>(),
        from,
        before: None,
        expected,
        offsets,
        grid,
        more: &[bytemuck::bytes_of(&scale)],
    }
    .check();
}

fn oracle<A: Float, B: Float>(source: &[A], scale: f64) -> Vec<B> {
    source
        .iter()
        .map(|x| scalar::cast_scaled(*x, scale))
        .collect()
}

fn check_lengths<A: Float, B: Float>() {
    let scale = 1.0 / 3.0;
    let source = floats::<A>(1, 3 * 257);
    let result = oracle::<A, B>(&source, scale);
    let ranges = every_length();
    let (entries, expected) = (parts(&source, &ranges), parts(&result, &ranges));
    for from in offsets::<A>() {
        for into in offsets::<B>() {
            check_at(
                &entries,
                &expected,
                (from, into),
                1 + (from + into) as u32 % 3,
                scale,
            );
        }
    }
}

#[test]
fn every_length_at_every_misalignment_equals_the_oracle() {
    for_float_pairs!(check_lengths);
}

fn check_chunks<A: Float, B: Float>() {
    for (seed, (from, into)) in [(0, 0), (1, 1), (0, 1)].into_iter().enumerate() {
        let sources = AROUND_CHUNK.map(|len| floats::<A>(seed as u64, len));
        let results = sources.each_ref().map(|source| oracle::<A, B>(source, 0.7));
        for grid in GRIDS {
            check_at(
                &sources.each_ref().map(Vec::as_slice),
                &results.each_ref().map(Vec::as_slice),
                (from, into),
                grid,
                0.7,
            );
        }
    }
}

#[test]
fn entries_around_a_chunk_are_the_same_under_every_grid() {
    for_float_pairs!(check_chunks);
}

fn check_dense<A: Dense, B: Float>() {
    let source = A::dense();
    // The factors: a cast; an inexact one; one that leads out of a small range, and one that leads far below it.
    for scale in [1.0, 1.0 / 3.0, 1e6, 2.0f64.powi(-13)] {
        let source = if scale == 1.0 || source.len() < 1 << 17 {
            &source[..]
        } else {
            // A part that is not a period of the pattern.
            &source[source.len() / 3..source.len() / 3 + 100_003]
        };
        check_at(
            &[source],
            &[&oracle::<A, B>(source, scale)],
            (0, 0),
            2,
            scale,
        );
    }
}

#[test]
fn every_small_value_and_every_kind_of_large_one_is_rounded_as_the_oracle_says() {
    for_float_pairs!(check_dense);
}

#[test]
fn factors_of_every_kind_equal_the_oracle() {
    fn check<A: Float, B: Float>() {
        let source = floats::<A>(5, 1000);
        let mut stream = Stream(6);
        let odd = [
            0.0,
            -0.0,
            -1.0,
            f64::INFINITY,
            f64::NAN,
            1e300,
            1e-300,
            1e-40,
        ];
        for scale in odd.into_iter().chain((0..4).map(|_| stream.bits())) {
            check_at(
                &[&source[..]],
                &[&oracle::<A, B>(&source, scale)],
                (0, 0),
                1,
                scale,
            );
        }
    }
    for_float_pairs!(check);
}

#[test]
fn a_target_may_be_its_source_where_elements_have_one_size() {
    fn check<A: Float, B: Float>() {
        if size_of::<A>() != size_of::<B>() {
            return;
        }
        for offset in offsets::<A>() {
            let source = floats::<A>(7, CHUNK + 100);
            let mut slots = Slots::of(&[&source[..]], offset);
            let address = slots.addresses()[0];
            let (table, chunks) = moves([(address, address, source.len())], CHUNK);
            launch(
                &name::<A, B>(),
                2,
                (&table, chunks),
                &[bytemuck::bytes_of(&0.3)],
            );
            slots.expect(&[&oracle::<A, B>(&source, 0.3)], || {
                format!("{} in place", name::<A, B>())
            });
        }
    }
    for_float_pairs!(check);
}

fn check_copy(lengths: &[usize], (from, into): (usize, usize), grid: u32) {
    let source: Vec<u8> = {
        let mut stream = Stream(9);
        (0..lengths.iter().max().unwrap() + 16)
            .map(|_| stream.next() as u8)
            .collect()
    };
    let entries: Vec<&[u8]> = lengths
        .iter()
        .enumerate()
        .map(|(at, len)| &source[at % 16..at % 16 + len])
        .collect();
    let mut sources = Slots::of(&entries, from);
    let mut targets = Slots::new::<u8>(lengths, into);
    let addresses = sources.addresses().into_iter().zip(targets.addresses());
    let (table, chunks) = moves(
        addresses
            .zip(lengths)
            .map(|((from, into), len)| (from, into, *len)),
        4 * CHUNK,
    );
    launch("copy_bytes", grid, (&table, chunks), &[]);
    targets.expect_bytes(&entries, || {
        format!("copy_bytes from + {from} into + {into}, grid {grid}")
    });
}

#[test]
fn bytes_are_copied_at_every_length_and_misalignment() {
    let lengths: Vec<usize> = (1..=257).collect();
    for from in 0..16 {
        for into in 0..16 {
            check_copy(&lengths, (from, into), 1 + (from + into) as u32 % 3);
        }
    }
}

#[test]
fn bytes_around_a_chunk_are_the_same_under_every_grid() {
    for (from, into) in [(0, 0), (3, 3), (1, 9), (2, 6), (5, 7), (8, 1)] {
        for grid in GRIDS {
            check_copy(&AROUND_CHUNK.map(|len| 4 * len - 1), (from, into), grid);
        }
    }
}
