//! Exact values that are bits: integers, bool, copies of anything, and the smallest and largest of floats.

use bytemuck::Pod;
use fabric_engine::{comm::Rank, kernels::Dtype};

use super::{
    inputs::{BLOCK_ELEMS, Recipe, hash, rank_key},
    redop::Redop,
};

/// Write `rank`'s elements into `bytes`, a block at most.
pub(super) fn write(recipe: &Recipe, rank: Rank, seeds: &[u32], bytes: &mut [u8]) {
    match recipe.dtype.size() {
        1 => fill::<u8>(recipe, rank, seeds, bytes),
        2 => fill::<u16>(recipe, rank, seeds, bytemuck::cast_slice_mut(bytes)),
        4 => fill::<u32>(recipe, rank, seeds, bytemuck::cast_slice_mut(bytes)),
        _ => fill::<u64>(recipe, rank, seeds, bytemuck::cast_slice_mut(bytes)),
    }
}

/// Write elements of the reduction into `bytes`, a block at most.
pub(super) fn reduced(recipe: &Recipe, seeds: &[u32], bytes: &mut [u8]) {
    match recipe.dtype.size() {
        1 => fold::<u8>(recipe, seeds, bytes),
        2 => fold::<u16>(recipe, seeds, bytemuck::cast_slice_mut(bytes)),
        4 => fold::<u32>(recipe, seeds, bytemuck::cast_slice_mut(bytes)),
        _ => fold::<u64>(recipe, seeds, bytemuck::cast_slice_mut(bytes)),
    }
}

/// An unsigned integer of an element's size.
trait Word: Pod + Ord + std::ops::BitAnd<Output = Self> + std::ops::BitOr<Output = Self> {
    const ZERO: Self;
    /// The bit that is the sign, in signed integers and floats.
    const SIGN: Self;
    fn random(key: u32, seed: u32) -> Self;
    /// A one or a zero.
    fn bit(self) -> Self;
    fn odd(self) -> Self;
    fn xor(self, other: Self) -> Self;
    fn not(self) -> Self;
    fn plus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn small(value: u32) -> Self;
    fn divided(self, by: usize, signed: bool) -> Self;
    /// The same, with fewer bits where it was no number of that float type.
    fn without_nan(self, dtype: Dtype) -> Self;
}

macro_rules! words {
    ($($word:ty, $signed:ty, $random:expr;)*) => {$(
        impl Word for $word {
            const ZERO: Self = 0;
            const SIGN: Self = 1 << (<$word>::BITS - 1);
            #[inline(always)]
            fn random(key: u32, seed: u32) -> Self { ($random)(key, seed) }
            #[inline(always)]
            fn bit(self) -> Self { self & 1 }
            #[inline(always)]
            fn odd(self) -> Self { self | 1 }
            #[inline(always)]
            fn xor(self, other: Self) -> Self { self ^ other }
            #[inline(always)]
            fn not(self) -> Self { !self }
            #[inline(always)]
            fn plus(self, other: Self) -> Self { self.wrapping_add(other) }
            #[inline(always)]
            fn times(self, other: Self) -> Self { self.wrapping_mul(other) }
            #[inline(always)]
            fn small(value: u32) -> Self { value as $word }
            #[inline(always)]
            fn divided(self, by: usize, signed: bool) -> Self {
                if signed { (self as $signed / by as $signed) as $word } else { self / by as $word }
            }
            #[inline(always)]
            fn without_nan(self, dtype: Dtype) -> Self {
                let infinity = infinity(dtype) as $word;
                let magnitude = self & !Self::SIGN;
                if magnitude > infinity { self & (Self::SIGN | infinity) } else { self }
            }
        }
    )*};
}

words! {
    u8, i8, |key, seed| (hash(key, seed) >> 24) as u8;
    u16, i16, |key, seed| (hash(key, seed) >> 16) as u16;
    u32, i32, hash;
    u64, i64, |key, seed| u64::from(hash(key, seed)) << 32 | u64::from(hash(key ^ 0x68bc_21eb, seed));
}

/// The bits of the largest magnitude that is a number and stays itself.
fn infinity(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F64 => 0x7ff0_0000_0000_0000,
        Dtype::F32 => 0x7f80_0000,
        Dtype::F16 => 0x7c00,
        Dtype::BF16 => 0x7f80,
        Dtype::F8E4M3 => 0x7e, // 448; there is no infinity
        Dtype::F8E5M2 => 0x7b, // 57344; folds saturate infinities
        _ => u64::MAX >> 1,
    }
}

fn is_signed(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64)
}

fn fill<W: Word>(recipe: &Recipe, rank: Rank, seeds: &[u32], out: &mut [W]) {
    let (dtype, key) = (recipe.dtype, rank_key(rank));
    let random = |seed: u32, key| W::random(key, seed);
    // A bit that is set with a probability of 31/32, or 1/32: 64 of them leave something of either kind.
    let five = |seed: u32, join: fn(W, W) -> W| {
        (1..5).fold(random(seed, key), |bits, turn| {
            join(bits, random(seed, key ^ (turn * 0x1b87_3593)))
        })
    };
    let many = |seed| five(seed, |a, b| a | b);
    let few = |seed| five(seed, |a, b| a & b);
    if dtype == Dtype::Bool {
        return match recipe.op {
            Some(Redop::Min | Redop::And) => put(seeds, out, |seed| many(seed).bit()),
            Some(Redop::Max | Redop::Or) => put(seeds, out, |seed| few(seed).bit()),
            _ => put(seeds, out, |seed| random(seed, key).bit()),
        };
    }
    match recipe.op {
        Some(Redop::And) => put(seeds, out, many),
        Some(Redop::Or) => put(seeds, out, few),
        Some(Redop::Prod) => put(seeds, out, |seed| random(seed, key).odd()),
        Some(Redop::Min | Redop::Max) if dtype.is_float() => {
            put(seeds, out, |seed| random(seed, key).without_nan(dtype));
        }
        _ => put(seeds, out, |seed| random(seed, key)),
    }
}

#[inline(always)]
fn put<W>(seeds: &[u32], out: &mut [W], value: impl Fn(u32) -> W) {
    (out.iter_mut().zip(seeds)).for_each(|(out, seed)| *out = value(*seed));
}

fn fold<W: Word>(recipe: &Recipe, seeds: &[u32], out: &mut [W]) {
    let (dtype, op) = (recipe.dtype, recipe.op.unwrap_or(Redop::Sum));
    let mut scratch = [W::ZERO; BLOCK_ELEMS];
    let next = &mut scratch[..out.len()];
    for rank in 0..recipe.ranks {
        fill(recipe, rank, seeds, next);
        let factor = W::small(Redop::factor(rank));
        match op {
            Redop::MulSum => each(next, |x, _| x.times(factor), None),
            Redop::Min | Redop::Max => each(next, |x, _| key(dtype, x), None),
            _ => {}
        }
        if rank == 0 {
            out.copy_from_slice(next);
            continue;
        }
        let with = Some(&*next);
        match op {
            Redop::Sum | Redop::Avg | Redop::MulSum => each(out, W::plus, with),
            Redop::Prod => each(out, W::times, with),
            Redop::Min => each(out, W::min, with),
            Redop::Max => each(out, W::max, with),
            Redop::And => each(out, |a, b| a & b, with),
            Redop::Or => each(out, |a, b| a | b, with),
            Redop::Xor => each(out, W::xor, with),
        }
    }
    match op {
        Redop::Min | Redop::Max => each(out, |x, _| unkey(dtype, x), None),
        Redop::Avg => each(out, |x, _| x.divided(recipe.ranks, is_signed(dtype)), None),
        _ => {}
    }
}

#[inline(always)]
fn each<W: Word>(out: &mut [W], join: impl Fn(W, W) -> W, with: Option<&[W]>) {
    match with {
        Some(with) => (out.iter_mut().zip(with)).for_each(|(out, with)| *out = join(*out, *with)),
        None => out.iter_mut().for_each(|out| *out = join(*out, W::ZERO)),
    }
}

/// Unsigned order of the result is the order of the elements; -0 comes before +0.
#[inline(always)]
fn key<W: Word>(dtype: Dtype, x: W) -> W {
    if dtype.is_float() {
        if x & W::SIGN == W::ZERO {
            x | W::SIGN
        } else {
            x.not()
        }
    } else if is_signed(dtype) {
        x.xor(W::SIGN)
    } else {
        x
    }
}

#[inline(always)]
fn unkey<W: Word>(dtype: Dtype, x: W) -> W {
    if dtype.is_float() {
        if x & W::SIGN == W::ZERO {
            x.not()
        } else {
            x.xor(W::SIGN)
        }
    } else {
        key(dtype, x)
    }
}
