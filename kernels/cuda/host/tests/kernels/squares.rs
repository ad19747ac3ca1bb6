//! Goal: a norm's bits depend on the elements alone. Method: bit equality with `scalar::chunk_squares` and
//! `scalar::end_squares` at all places, under several grids, and from several threads at once.

use fabric_kernels::scalar::{self, Float};

use crate::table::{
    AROUND_CHUNK, CHUNK, GRIDS, Slots, every_length, launch, launch_with, lengths, moves, offsets,
    parts,
};
use crate::values::{Dense, floats, for_floats};

/// Sums of the chunks, infinities and NaNs as the kernel has them.
fn found<T: Float>(entries: &[&[T]], offset: usize, grid: u32) -> (Vec<u64>, [u64; 2]) {
    let mut source = Slots::of(entries, offset);
    let addresses = source.addresses().into_iter().zip(lengths(entries));
    let (table, chunks) = moves(addresses.map(|(from, len)| (from, 0, len)), CHUNK);
    let guard = 0x5555_5555_5555_5555u64;
    let mut sums = vec![guard; chunks as usize + 1];
    // Counters go on from what they hold.
    let mut odd = [100u64, 200];
    launch(
        &format!("squares_{}", T::DTYPE),
        grid,
        (&table, chunks),
        &[
            bytemuck::bytes_of(&(sums.as_mut_ptr().expose_provenance() as u64)),
            bytemuck::bytes_of(&(odd.as_mut_ptr().expose_provenance() as u64)),
        ],
    );
    assert_eq!(sums.pop(), Some(guard));
    (sums, [odd[0] - 100, odd[1] - 200])
}

fn oracle<T: Float>(entries: &[&[T]]) -> (Vec<u64>, [u64; 2]) {
    let chunks: Vec<_> = entries
        .iter()
        .flat_map(|entry| entry.chunks(CHUNK))
        .map(scalar::chunk_squares)
        .collect();
    (
        chunks.iter().map(|chunk| chunk.sum.to_bits()).collect(),
        [
            chunks.iter().map(|chunk| chunk.infinities).sum(),
            chunks.iter().map(|chunk| chunk.nans).sum(),
        ],
    )
}

#[test]
fn every_length_at_every_misalignment_equals_the_oracle() {
    fn check<T: Float>() {
        let source = floats::<T>(1, 3 * 257);
        let entries = parts(&source, &every_length()[..]);
        let expected = oracle(&entries);
        for offset in offsets::<T>() {
            let grid = 1 + offset as u32 % 3;
            assert_eq!(
                found(&entries, offset, grid),
                expected,
                "squares_{} at {offset}",
                T::DTYPE
            );
        }
    }
    for_floats!(check);
}

#[test]
fn entries_around_a_chunk_are_the_same_under_every_grid_and_at_every_place() {
    fn check<T: Float>() {
        let source = AROUND_CHUNK.map(|len| floats::<T>(2, len));
        let entries = source.each_ref().map(Vec::as_slice);
        let expected = oracle(&entries);
        for grid in GRIDS {
            for offset in [0, 1] {
                assert_eq!(
                    found(&entries, offset, grid),
                    expected,
                    "squares_{} grid {grid}",
                    T::DTYPE
                );
            }
        }
    }
    for_floats!(check);
}

#[test]
fn every_small_value_is_squared_or_counted() {
    fn check<T: Dense>() {
        let source = T::dense();
        let source = &source[source.len() / 3..][..source.len().min(300_000) * 2 / 3];
        assert_eq!(
            found(&[source], 0, 3),
            oracle(&[source]),
            "squares_{}",
            T::DTYPE
        );
    }
    for_floats!(check);
}

#[test]
fn sums_of_chunks_are_added_in_the_written_order() {
    for len in (0..=600).chain([8191, 100_003]) {
        let sums: Vec<f64> = floats::<f32>(3, len)
            .iter()
            .map(|x| f64::from(*x).abs().min(1e9))
            .collect();
        for grid in [1, 4] {
            let mut out = [0.5f64, 0.25];
            launch_with(
                "squares_end",
                grid,
                &[
                    bytemuck::bytes_of(&(sums.as_ptr().expose_provenance() as u64)),
                    bytemuck::bytes_of(&(len as u64)),
                    bytemuck::bytes_of(&(out.as_mut_ptr().expose_provenance() as u64)),
                ],
            );
            assert_eq!(
                out.map(f64::to_bits),
                [scalar::end_squares(&sums).to_bits(), 0.25f64.to_bits()]
            );
        }
    }
}

/// The shim's blocks and fibers belong to the thread that launches.
#[test]
fn several_threads_launch_at_once() {
    let source = floats::<f32>(4, 5 * CHUNK + 77);
    let expected = oracle(&[&source[..]]);
    std::thread::scope(|scope| {
        for grid in 1..=4 {
            let (source, expected) = (&source, &expected);
            scope.spawn(move || {
                for _ in 0..5 {
                    assert_eq!(found(&[&source[..]], 0, grid), *expected);
                }
            });
        }
    });
}
