//! The exact values: what every rank puts in, and what must come out, as pure functions of (dtype, op, ranks, seed, rank,
//! index), so that a checker needs nothing from anybody. Equality is of bits, with no tolerance.
//!
//! [Note: exact values] The inputs are such that no order of association changes a bit:
//!
//! | op | inputs | why every order gives the same bits |
//! |---|---|---|
//! | none (copies) | any bits, NaN too | nothing is computed |
//! | integers, any op | any bits; odd ones for `prod`, so that it does not end at 0 | arithmetic modulo 2^bits |
//! | float sum, avg, mulsum | k x 2^e: k a small whole number, e common to all ranks of an index | all partial sums are whole multiples of 2^e that fit the accumulator's fraction |
//! | float prod | powers of two, except for one rank of each index | one factor has a fraction, and exponents stay small |
//! | min, max | any bits but NaN | choosing rounds nothing |
//! | bitwise | any bits, biased so that the result is neither all zeros nor all ones | |
//!
//! For the small floats the exact sum seldom fits the type, so the one rounding at the end is tested as well.

use fabric_engine::{comm::Rank, kernels::Dtype};

use super::{reals, redop::Redop, words};

/// Elements that are made at once: scratch that stays in the first cache.
pub const BLOCK_ELEMS: usize = 1024;

/// Which values.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// The elements' type.
    pub dtype: Dtype,
    /// The reduction, if the values are for one.
    pub op: Option<Redop>,
    /// How many ranks take part.
    pub ranks: usize,
    /// Another seed, other values.
    pub seed: u32,
}

impl Recipe {
    /// Write `rank`'s elements `first..` into `bytes`.
    pub fn write(&self, rank: Rank, first: usize, bytes: &mut [u8]) {
        self.by_blocks(first, bytes, |seeds, bytes| {
            if self.is_real() {
                reals::write(self, rank, seeds, bytes);
            } else {
                words::write(self, rank, seeds, bytes);
            }
        });
    }

    /// Write elements `first..` of the reduction over all ranks into `bytes`.
    pub fn reduced(&self, first: usize, bytes: &mut [u8]) {
        self.by_blocks(first, bytes, |seeds, bytes| {
            if self.is_real() {
                reals::reduced(self, seeds, bytes);
            } else {
                words::reduced(self, seeds, bytes);
            }
        });
    }

    /// Whether the values are numbers to be added or multiplied as floats; otherwise they are bits.
    fn is_real(&self) -> bool {
        let arithmetic = [Redop::Sum, Redop::Prod, Redop::Avg, Redop::MulSum];
        self.dtype.is_float() && self.op.is_some_and(|op| arithmetic.contains(&op))
    }

    fn by_blocks(&self, first: usize, bytes: &mut [u8], mut each: impl FnMut(&[u32], &mut [u8])) {
        let size = self.dtype.size();
        let mut seeds = [0; BLOCK_ELEMS];
        for (block, bytes) in bytes.chunks_mut(BLOCK_ELEMS * size).enumerate() {
            let start = (first + block * BLOCK_ELEMS) as u32; // past 2^32 the values come again
            let seeds = &mut seeds[..bytes.len() / size];
            for (index, seed) in seeds.iter_mut().enumerate() {
                *seed =
                    scatter(start.wrapping_add(index as u32) ^ self.seed.wrapping_mul(0x85eb_ca6b));
            }
            each(seeds, bytes);
        }
    }
}

/// What makes one purpose's, or one rank's, random bits differ from another's.
pub(super) fn key(purpose: usize) -> u32 {
    scatter(0xc2b2_ae35 ^ purpose as u32)
}

/// What makes `rank`'s random bits differ from other ranks'.
pub(super) fn rank_key(rank: Rank) -> u32 {
    key(1000 + rank)
}

/// 32 random bits for each index: made once for all ranks.
#[inline(always)]
fn scatter(mut x: u32) -> u32 {
    x = x.wrapping_mul(0x9e37_79b1);
    x = (x ^ (x >> 15)).wrapping_mul(0x2c1b_3c6d);
    x ^ (x >> 13)
}

/// 32 random bits of an index's seed and a key: one multiplication, because a checker does this for every rank.
#[inline(always)]
pub(super) fn hash(key: u32, seed: u32) -> u32 {
    let x = (seed ^ key).wrapping_mul(0x297a_2d39);
    x ^ (x >> 15)
}

#[cfg(test)]
mod tests {
    use fabric_engine::kernels::{self, Fold, Span, SpanMut};

    use super::*;

    const SPAN: usize = 96;

    fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
        let mut wide = vec![0f64; bytes.len() / dtype.size()];
        match dtype {
            Dtype::F64 => wide.copy_from_slice(bytemuck::cast_slice(bytes)),
            _ => {
                let slab = slab(dtype, bytes);
                kernels::cast(slab.part(0..wide.len()), SpanMut::of(&mut wide)).unwrap();
            }
        }
        wide
    }

    fn slab(dtype: Dtype, bytes: &[u8]) -> fabric_engine::buffer::Slab {
        let mut slab = fabric_engine::buffer::Slab::zeroed(dtype, bytes.len() / dtype.size());
        slab.as_bytes_mut().copy_from_slice(bytes);
        slab
    }

    /// The fold of the ranks in this order, in the accumulator's type, by the kernels; then the end that an owner does.
    fn folded(recipe: &Recipe, order: &[usize]) -> Vec<u8> {
        let (dtype, op) = (recipe.dtype, recipe.op.unwrap());
        let fold = match op {
            Redop::Prod => Fold::Prod,
            Redop::Min => Fold::Min,
            Redop::Max => Fold::Max,
            Redop::And => Fold::And,
            Redop::Or => Fold::Or,
            Redop::Xor => Fold::Xor,
            _ => Fold::Sum,
        };
        let partial = match op {
            Redop::Min | Redop::Max => dtype,
            _ => dtype.accumulator(),
        };
        let lifted = |rank: usize| {
            let mut own = slab(dtype, &vec![0; SPAN * dtype.size()]);
            recipe.write(rank, 5, own.as_bytes_mut());
            let mut lifted = slab(partial, &vec![0; SPAN * partial.size()]);
            let factor = match op {
                Redop::MulSum => f64::from(Redop::factor(rank)),
                _ => 1.0,
            };
            match factor {
                1.0 => kernels::cast(own.part(0..SPAN), lifted.part_mut(0..SPAN)),
                _ => kernels::cast_scaled(own.part(0..SPAN), lifted.part_mut(0..SPAN), factor),
            }
            .unwrap();
            lifted
        };
        let mut sum = lifted(order[0]);
        for rank in &order[1..] {
            let next = lifted(*rank);
            kernels::fold(fold, sum.part_mut(0..SPAN), next.part(0..SPAN)).unwrap();
        }
        let mut end = slab(dtype, &vec![0; SPAN * dtype.size()]);
        match op {
            Redop::Avg if dtype.is_float() => {
                let factor = 1.0 / order.len() as f64;
                kernels::cast_scaled(sum.part(0..SPAN), end.part_mut(0..SPAN), factor)
            }
            Redop::Avg => {
                kernels::divide(sum.part(0..SPAN), end.part_mut(0..SPAN), order.len() as u64)
            }
            _ => kernels::cast(sum.part(0..SPAN), end.part_mut(0..SPAN)),
        }
        .unwrap();
        end.as_bytes().to_vec()
    }

    fn orders(ranks: usize) -> [Vec<usize>; 3] {
        let forward = (0..ranks).collect::<Vec<_>>();
        let backward = forward.iter().rev().copied().collect();
        let mut odd_first = forward.clone();
        odd_first.sort_by_key(|rank| (rank % 2 == 0, *rank * 7 % 64));
        [forward, backward, odd_first]
    }

    /// Goal: no order of association gives other bits than expected. Method: the kernels' folds, in several orders, for
    /// every dtype, op and number of ranks.
    #[test]
    fn every_order_of_ranks_gives_the_expected_bits() {
        for dtype in Dtype::ALL {
            for op in Redop::ALL {
                if !op.takes(dtype) {
                    continue;
                }
                for ranks in 1..=64 {
                    let seed = ranks as u32;
                    let recipe = Recipe {
                        dtype,
                        op: Some(op),
                        ranks,
                        seed,
                    };
                    let mut expected = vec![0; SPAN * dtype.size()];
                    recipe.reduced(5, &mut expected);
                    for order in orders(ranks) {
                        let name = op.name();
                        assert_eq!(folded(&recipe, &order), expected, "{dtype} {name} {ranks}");
                    }
                }
            }
        }
    }

    /// The canonical tree is one more order, with partial results on both sides.
    #[test]
    fn trees_give_the_expected_bits() {
        for dtype in Dtype::ALL.into_iter().filter(|dtype| dtype.is_float()) {
            for op in [Redop::Sum, Redop::Prod] {
                for ranks in [2, 3, 7, 8, 13, 64] {
                    let recipe = Recipe {
                        dtype,
                        op: Some(op),
                        ranks,
                        seed: 3,
                    };
                    let mut level: Vec<Vec<f64>> = (0..ranks)
                        .map(|rank| {
                            let mut bytes = vec![0; SPAN * dtype.size()];
                            recipe.write(rank, 5, &mut bytes);
                            floats(dtype, &bytes)
                        })
                        .collect();
                    let join = |a: f64, b: f64| match (op, dtype) {
                        (Redop::Sum, Dtype::F64) => a + b,
                        (Redop::Sum, _) => f64::from(a as f32 + b as f32),
                        (_, Dtype::F64) => a * b,
                        _ => f64::from(a as f32 * b as f32),
                    };
                    while level.len() > 1 {
                        let pairs = level.chunks(2).map(|pair| match pair {
                            [a, b] => a.iter().zip(b).map(|(a, b)| join(*a, *b)).collect(),
                            _ => pair[0].clone(),
                        });
                        level = pairs.collect();
                    }
                    let mut rounded = slab(dtype, &vec![0; SPAN * dtype.size()]);
                    kernels::cast(Span::of(&level[0]), rounded.part_mut(0..SPAN)).unwrap();
                    let mut expected = vec![0; SPAN * dtype.size()];
                    recipe.reduced(5, &mut expected);
                    assert_eq!(
                        rounded.as_bytes(),
                        expected,
                        "{dtype} {} {ranks}",
                        op.name()
                    );
                }
            }
        }
    }

    #[test]
    fn bitwise_results_have_ones_and_zeros() {
        for op in Redop::ALL.into_iter().filter(|op| op.is_bitwise()) {
            let recipe = Recipe {
                dtype: Dtype::U32,
                op: Some(op),
                ranks: 64,
                seed: 1,
            };
            let mut words = [0u32; SPAN];
            recipe.reduced(7, bytemuck::cast_slice_mut(&mut words));
            assert!(words.iter().any(|word| *word != 0 && *word != u32::MAX));
        }
    }

    #[test]
    fn values_depend_on_rank_seed_and_index_and_not_on_where_a_block_begins() {
        for dtype in Dtype::ALL {
            for op in [None, Some(Redop::Max), Some(Redop::Sum)] {
                if op.is_some_and(|op| !op.takes(dtype)) {
                    continue;
                }
                let recipe = |seed| Recipe {
                    dtype,
                    op,
                    ranks: 4,
                    seed,
                };
                let make = |seed, rank, first, numel| {
                    let mut bytes = vec![0; numel * dtype.size()];
                    recipe(seed).write(rank, first, &mut bytes);
                    bytes
                };
                let whole = make(1, 2, 0, 3000);
                assert_eq!(
                    make(1, 2, 17, 2000),
                    whole[17 * dtype.size()..][..2000 * dtype.size()]
                );
                assert_ne!(make(2, 2, 0, 3000), whole);
                assert_ne!(make(1, 3, 0, 3000), whole);
                assert_ne!(make(1, 2, 1, 3000), whole);
            }
        }
    }

    #[test]
    fn sums_are_numbers_and_small_floats_round_them() {
        for dtype in Dtype::ALL.into_iter().filter(|dtype| dtype.is_float()) {
            let recipe = Recipe {
                dtype,
                op: Some(Redop::Sum),
                ranks: 64,
                seed: 9,
            };
            let mut expected = vec![0; 4096 * dtype.size()];
            recipe.reduced(0, &mut expected);
            let values = floats(dtype, &expected);
            assert!(values.iter().all(|value| value.is_finite()));
            let distinct = values.iter().map(|value| value.to_bits());
            let distinct = distinct.collect::<std::collections::HashSet<_>>().len();
            assert!(distinct > 30, "{dtype}: {distinct} values");
        }
    }
}
