//! Goal: a fold on the device is the fold of the host. Method: bit equality with `scalar::fold`, at all places, for all
//! pairs of types and all operations.

use fabric_kernels::Fold;
use fabric_kernels::scalar::{self, Float};

use crate::table::{AROUND_CHUNK, Case, GRIDS, every_length, offsets, parts};
use crate::values::{Dense, Stream, floats, for_float_pairs};

/// In the order of their codes.
const OPS: [Fold; 4] = [Fold::Sum, Fold::Prod, Fold::Min, Fold::Max];

/// Entries of sources, of targets before, and of targets after.
type Rows<'a, 'b, A, B> = (&'a [&'b [A]], &'a [&'b [B]], &'a [&'b [B]]);

fn check_at<A: Float, B: Float>(
    code: u32,
    (from, before, expected): Rows<'_, '_, A, B>,
    offsets: (usize, usize),
    grid: u32,
) {
    Case {
        kernel: &format!("fold_{}_{}", A::DTYPE, B::DTYPE),
        from,
        before: Some(before),
        expected,
        offsets,
        grid,
        more: &[bytemuck::bytes_of(&code)],
    }
    .check();
}

fn oracle<A: Float, B: Float>(op: Fold, into: &[B], with: &[A]) -> Vec<B> {
    into.iter()
        .zip(with)
        .map(|(into, with)| scalar::fold(op, *into, *with))
        .collect()
}

fn check_lengths<A: Float, B: Float>() {
    let (with, into) = (floats::<A>(1, 3 * 257), floats::<B>(2, 3 * 257));
    let ranges = every_length();
    let places = offsets::<A>().len() * offsets::<B>().len();
    for (code, op) in (0..).zip(OPS) {
        let result = oracle(op, &into, &with);
        let rows = (
            parts(&with, &ranges),
            parts(&into, &ranges),
            parts(&result, &ranges),
        );
        for from in offsets::<A>() {
            for to in offsets::<B>() {
                // Where places are many each operation takes its share of them.
                if places <= 32 || (from + 2 * to) % 4 == code as usize {
                    check_at(
                        code,
                        (&rows.0, &rows.1, &rows.2),
                        (from, to),
                        1 + (from + to) as u32 % 3,
                    );
                }
            }
        }
    }
}

#[test]
fn every_length_at_every_misalignment_equals_the_oracle() {
    for_float_pairs!(check_lengths);
}

fn check_chunks<A: Float, B: Float>() {
    let (with, into) = (
        AROUND_CHUNK.map(|len| floats::<A>(3, len)),
        AROUND_CHUNK.map(|len| floats::<B>(4, len)),
    );
    for (code, op) in (0..).zip(OPS) {
        let mut pairs = into.iter().zip(&with);
        let result = AROUND_CHUNK.map(|_| {
            pairs
                .next()
                .map(|(into, with)| oracle(op, into, with))
                .unwrap()
        });
        let rows = (
            with.each_ref().map(Vec::as_slice),
            into.each_ref().map(Vec::as_slice),
            result.each_ref().map(Vec::as_slice),
        );
        let grid = GRIDS[code as usize % 3];
        for offsets in [(0, 0), (1, 1), (1, 0)] {
            check_at(code, (&rows.0, &rows.1, &rows.2), offsets, grid);
        }
    }
}

#[test]
fn entries_around_a_chunk_equal_the_oracle_under_every_grid() {
    for_float_pairs!(check_chunks);
}

/// Every value of a small type meets others of its kind and of all other types.
fn check_dense<A: Float, B: Dense>() {
    let into = B::dense();
    let into = &into[..into.len().min(1 << 16)];
    let mut with = floats::<A>(5, into.len());
    let mut stream = Stream(6);
    with.iter_mut().step_by(3).for_each(|x| *x = stream.bits());
    for (code, op) in (0..).zip(OPS) {
        check_at(
            code,
            (&[&with[..]], &[into], &[&oracle(op, into, &with)]),
            (0, 0),
            2,
        );
    }
}

#[test]
fn every_small_value_is_folded_as_the_oracle_says() {
    for_float_pairs!(check_dense);
}

/// All pairs of what is special, zeros of both signs among them.
#[test]
fn specials_meet_specials() {
    fn check<A: Float, B: Float>() {
        let special = [
            0.0,
            -0.0,
            1.0,
            -2.0,
            1e-45,
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            448.0,
            1e30,
        ];
        let pairs = special
            .iter()
            .flat_map(|a| special.iter().map(move |b| (*a, *b)));
        let (with, into): (Vec<A>, Vec<B>) =
            pairs.map(|(a, b)| (A::encode(a), B::encode(b))).unzip();
        for (code, op) in (0..).zip(OPS) {
            check_at(
                code,
                (&[&with[..]], &[&into[..]], &[&oracle(op, &into, &with)]),
                (0, 0),
                1,
            );
        }
    }
    for_float_pairs!(check);
}
