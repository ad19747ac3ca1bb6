//! Goal: rounding by chance is the same everywhere, for one seed. Method: bit equality with `scalar::cast_stochastic` and
//! `scalar::random_bits` at all places and for all values.

use fabric_kernels::scalar::{self, Float};
use fabric_kernels::{F8E4M3, F8E5M2};
use half::{bf16, f16};

use crate::table::{
    AROUND_CHUNK, CHUNK, Case, GRIDS, Slots, every_length, launch, moves, offsets, parts,
};
use crate::values::{Dense, floats};

macro_rules! for_pairs {
    ($check:ident) => {
        $check::<f32, f16>();
        $check::<f32, bf16>();
        $check::<f32, F8E4M3>();
        $check::<f32, F8E5M2>();
        $check::<f16, bf16>();
        $check::<f16, F8E4M3>();
        $check::<f16, F8E5M2>();
        $check::<bf16, F8E4M3>();
        $check::<bf16, F8E5M2>();
    };
}

fn name<A: Float, B: Float>() -> String {
    format!("stochastic_{}_{}", A::DTYPE, B::DTYPE)
}

fn oracle<A: Float, B: Float>(entries: &[&[A]], scale: f64, seed: u64) -> Vec<Vec<B>> {
    let round = |entry: u32, source: &[A]| {
        (0..)
            .zip(source)
            .map(|(element, x)| {
                scalar::cast_stochastic(*x, scale, scalar::random_bits(seed, entry, element))
            })
            .collect()
    };
    (0..)
        .zip(entries)
        .map(|(entry, source)| round(entry, source))
        .collect()
}

fn check_all<A: Float, B: Float>(
    from: &[&[A]],
    (scale, seed): (f64, u64),
    places: impl Iterator<Item = ((usize, usize), u32)>,
) {
    let rows = oracle::<A, B>(from, scale, seed);
    let expected: Vec<&[B]> = rows.iter().map(Vec::as_slice).collect();
    for (offsets, grid) in places {
        Case {
            kernel: &name::<A, B>(),
            from,
            before: None,
            expected: &expected,
            offsets,
            grid,
            more: &[bytemuck::bytes_of(&scale), bytemuck::bytes_of(&seed)],
        }
        .check();
    }
}

#[test]
fn every_length_at_every_misalignment_equals_the_oracle() {
    fn check<A: Float, B: Float>() {
        let source = floats::<A>(1, 3 * 257);
        let places = offsets::<A>().flat_map(|from| offsets::<B>().map(move |into| (from, into)));
        let places = places.map(|(from, into)| ((from, into), 1 + (from + into) as u32 % 3));
        check_all::<A, B>(&parts(&source, &every_length()), (1.0 / 3.0, 42), places);
    }
    for_pairs!(check);
}

#[test]
fn entries_around_a_chunk_are_the_same_under_every_grid() {
    fn check<A: Float, B: Float>() {
        let source = AROUND_CHUNK.map(|len| floats::<A>(2, len));
        let entries = source.each_ref().map(Vec::as_slice);
        let places = GRIDS
            .into_iter()
            .flat_map(|grid| [((0, 0), grid), ((1, 1), grid)]);
        check_all::<A, B>(&entries, (0.7, u64::MAX), places);
    }
    for_pairs!(check);
}

#[test]
fn every_small_value_and_every_kind_of_large_one_equals_the_oracle() {
    fn check<A: Dense, B: Float>() {
        let source = A::dense();
        for (scale, seed) in [(1.0, 1), (2.0f64.powi(-13), 2), (1.0 / 3.0, 3)] {
            check_all::<A, B>(&[&source], (scale, seed), std::iter::once(((0, 0), 2)));
        }
    }
    for_pairs!(check);
}

/// Where the random number is the fraction itself, or one less: the choice goes from down to up.
#[test]
fn the_last_number_that_goes_up_is_below_the_fraction() {
    let seed = 11;
    // 16 bits of an f32 go on the way to bf16, so these are the numbers that a fraction can equal.
    let whole = |element: &u64| scalar::random_bits(seed, 0, *element) & 0xffff == 0;
    let elements: Vec<u64> = (0..1 << 19).filter(whole).collect();
    assert!(elements.len() > 2, "of 2^19 about 8 are expected");
    let mut source = vec![1.0f32; 1 << 19];
    for above in [0, 1] {
        for element in &elements {
            let fraction = (scalar::random_bits(seed, 0, *element) >> 16) + above;
            source[*element as usize] = f32::from_bits(1.0f32.to_bits() + fraction);
        }
        let places = std::iter::once(((0, 0), 3));
        check_all::<f32, bf16>(&[&source], (1.0, seed), places);
    }
}

/// The mean of 2^17 roundings of one number, of its own accord.
#[test]
fn the_mean_of_what_was_rounded_is_the_value() {
    let (value, count) = (1.0f32 + 0.3 * 2.0f32.powi(-7), 1 << 17);
    let mut source = Slots::of(&[&vec![value; count][..]], 0);
    let mut target = vec![bf16::ZERO; count];
    let into = target.as_mut_ptr().expose_provenance() as u64;
    let (table, chunks) = moves([(source.addresses()[0], into, count)], CHUNK);
    let more = [bytemuck::bytes_of(&1.0f64), bytemuck::bytes_of(&9u64)];
    launch("stochastic_f32_bf16", 7, (&table, chunks), &more);
    let up = target.iter().filter(|x| f32::from(**x) > 1.0).count() as f64 / count as f64;
    // Of the share's deviation, sqrt(0.3 * 0.7 / 2^17) = 0.0013, five.
    assert!(
        (up - 0.3).abs() < 0.0064,
        "{up} of all went up, 0.3 of the way"
    );
}
