//! Exact values that are numbers: floats to be added or multiplied. See [Note: exact values] in `inputs`.
//!
//! Values are made in the accumulator's type and cast into the elements' type, which loses nothing; expected results are
//! folded in the accumulator's type, where every order is exact, and rounded once.

use bytemuck::Pod;
use fabric_engine::{
    comm::Rank,
    kernels::{self, Dtype, Element, Span, SpanMut},
};
use half::{bf16, f16};

use super::{
    inputs::{BLOCK_ELEMS, Recipe, hash, key, rank_key},
    redop::Redop,
};

/// k has so many bits besides its sign, and 2^e an exponent in `low..low + span`: k x 2^e is a number of the type, and so
/// is the sum of 64 of them times 2, after rounding.
struct Range {
    bits: u32,
    low: i32,
    span: u32, // a power of two
}

fn range(dtype: Dtype) -> Range {
    let (bits, low, span) = match dtype {
        Dtype::F64 => (30, -16, 32),
        Dtype::F16 => (10, -9, 8),
        Dtype::BF16 => (7, -8, 16),
        Dtype::F8E4M3 => (3, -5, 4),
        Dtype::F8E5M2 => (2, -4, 8),
        _ => (16, -16, 32),
    };
    Range { bits, low, span }
}

/// The accumulator's type.
trait Real: Element + Pod + std::ops::Mul<Output = Self> + std::ops::Add<Output = Self> {
    const ZERO: Self;
    fn of(whole: i32) -> Self;
    fn power_of_two(exponent: i32) -> Self;
    fn inverse(ranks: usize) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn of(whole: i32) -> Self {
        whole as f32
    }
    #[inline(always)]
    fn power_of_two(exponent: i32) -> Self {
        Self::from_bits(((127 + exponent) as u32) << 23)
    }
    fn inverse(ranks: usize) -> Self {
        (1.0 / ranks as f64) as f32
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn of(whole: i32) -> Self {
        f64::from(whole)
    }
    #[inline(always)]
    fn power_of_two(exponent: i32) -> Self {
        Self::from_bits(u64::from((1023 + exponent) as u32) << 52)
    }
    fn inverse(ranks: usize) -> Self {
        1.0 / ranks as f64
    }
}

/// Write `rank`'s elements into `bytes`, a block at most.
pub(super) fn write(recipe: &Recipe, rank: Rank, seeds: &[u32], bytes: &mut [u8]) {
    if recipe.dtype == Dtype::F64 {
        return fill::<f64>(recipe, rank, seeds, bytemuck::cast_slice_mut(bytes));
    }
    let mut block = [0f32; BLOCK_ELEMS];
    let block = &mut block[..bytes.len() / recipe.dtype.size()];
    fill(recipe, rank, seeds, block);
    round(recipe.dtype, block, bytes);
}

/// Write elements of the reduction into `bytes`, a block at most.
pub(super) fn reduced(recipe: &Recipe, seeds: &[u32], bytes: &mut [u8]) {
    if recipe.dtype == Dtype::F64 {
        return fold::<f64>(recipe, seeds, bytemuck::cast_slice_mut(bytes));
    }
    let mut block = [0f32; BLOCK_ELEMS];
    let block = &mut block[..bytes.len() / recipe.dtype.size()];
    fold(recipe, seeds, block);
    round(recipe.dtype, block, bytes);
}

/// The one rounding.
fn round(dtype: Dtype, from: &[f32], bytes: &mut [u8]) {
    let into = match dtype {
        Dtype::F16 => SpanMut::of::<f16>(bytemuck::cast_slice_mut(bytes)),
        Dtype::BF16 => SpanMut::of::<bf16>(bytemuck::cast_slice_mut(bytes)),
        Dtype::F8E4M3 => SpanMut::of::<kernels::F8E4M3>(bytemuck::cast_slice_mut(bytes)),
        Dtype::F8E5M2 => SpanMut::of::<kernels::F8E5M2>(bytemuck::cast_slice_mut(bytes)),
        _ => SpanMut::of::<f32>(bytemuck::cast_slice_mut(bytes)),
    };
    kernels::cast(Span::of(from), into).expect("floats of equal number on the host");
}

fn fill<R: Real>(recipe: &Recipe, rank: Rank, seeds: &[u32], out: &mut [R]) {
    let Range { bits, low, span } = range(recipe.dtype);
    let own = rank_key(rank);
    let exponent = |seed: u32| low + (seed & (span - 1)) as i32;
    let whole = |seed| hash(own, seed) as i32 >> (31 - bits);
    if recipe.op != Some(Redop::Prod) {
        return put(seeds, out, |seed| {
            R::of(whole(seed)) * R::power_of_two(exponent(seed))
        });
    }
    // Powers of two whose exponents add up to zero over the ranks, in any part of the ranks to at most half their number;
    // and one rank, another for each index, with a fraction.
    let ranks = recipe.ranks as u32;
    let (special, here) = (key(0), key(1 + rank));
    let there = key(1 + (rank + 1) % recipe.ranks);
    put(seeds, out, |seed| {
        let chosen = ((hash(special, seed) >> 16) * ranks) >> 16;
        let up = (hash(here, seed) >> 31) as i32 - (hash(there, seed) >> 31) as i32;
        let sign = 1 - 2 * (hash(own, seed) & 1) as i32;
        let power = R::of(sign) * R::power_of_two(up);
        if chosen == rank as u32 {
            power * R::of(whole(seed) | 1) * R::power_of_two(low)
        } else {
            power
        }
    });
}

#[inline(always)]
fn put<R>(seeds: &[u32], out: &mut [R], value: impl Fn(u32) -> R) {
    (out.iter_mut().zip(seeds)).for_each(|(out, seed)| *out = value(*seed));
}

fn fold<R: Real>(recipe: &Recipe, seeds: &[u32], out: &mut [R]) {
    let mut scratch = [R::ZERO; BLOCK_ELEMS];
    let next = &mut scratch[..out.len()];
    for rank in 0..recipe.ranks {
        fill(recipe, rank, seeds, next);
        if recipe.op == Some(Redop::MulSum) {
            let factor = R::of(Redop::factor(rank) as i32);
            next.iter_mut().for_each(|x| *x = *x * factor);
        }
        let pairs = out.iter_mut().zip(&*next);
        match recipe.op {
            _ if rank == 0 => out.copy_from_slice(next),
            Some(Redop::Prod) => pairs.for_each(|(out, x)| *out = *out * *x),
            _ => pairs.for_each(|(out, x)| *out = *out + *x),
        }
    }
    if recipe.op == Some(Redop::Avg) {
        let inverse = R::inverse(recipe.ranks);
        out.iter_mut().for_each(|out| *out = *out * inverse);
    }
}
