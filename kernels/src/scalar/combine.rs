//! A reduction of one element from several sources: the tree as a recursion, over the other functions of the oracle.

use super::arithmetic::{cast, cast_scaled, fold};
use super::float::Float;
use super::integer::{Integer, divide, fold_bool, fold_integer, multiply};
use crate::combine::Finish;
use crate::dtype::Bool;
use crate::fold::Fold;

/// The sources in the canonical tree, in `C`, the accumulator of `T`.
pub fn combine<T: Float, C: Float>(
    op: Fold,
    sources: &[T],
    factors: Option<&[f64]>,
    finish: Finish,
) -> T {
    if let ([source], None, Finish::Cast) = (sources, factors, finish) {
        return *source;
    }
    let leaf = |index: usize| match factors {
        None => cast::<T, C>(sources[index]),
        Some(factors) => cast_scaled::<T, C>(sources[index], factors[index]),
    };
    let leaves: Vec<C> = (0..sources.len()).map(leaf).collect();
    let value = tree(&leaves, &|a, b| fold(op, a, b));
    match finish {
        Finish::Cast => cast(value),
        Finish::Scale(factor) => cast_scaled(value, factor),
        Finish::Divide(_) => panic!("floats are not divided"),
    }
}

/// The sources in the canonical tree.
pub fn combine_integer<T: Integer>(
    op: Fold,
    sources: &[T],
    factors: Option<&[f64]>,
    finish: Finish,
) -> T {
    let leaf = |index: usize| match factors {
        None => sources[index],
        Some(factors) => multiply(sources[index], factors[index]),
    };
    let leaves: Vec<T> = (0..sources.len()).map(leaf).collect();
    let value = tree(&leaves, &|a, b| fold_integer(op, a, b));
    match finish {
        Finish::Cast => value,
        Finish::Divide(by) => divide(value, by),
        Finish::Scale(_) => panic!("integers are not scaled"),
    }
}

/// The sources in the canonical tree; a single one keeps its byte.
pub fn combine_bool(op: Fold, sources: &[Bool]) -> Bool {
    tree(sources, &|a, b| fold_bool(op, a, b))
}

/// The left side is the largest power of two that leaves something to the right.
fn tree<C: Copy>(leaves: &[C], fold: &impl Fn(C, C) -> C) -> C {
    match leaves {
        [leaf] => *leaf,
        _ => {
            let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
            fold(tree(left, fold), tree(right, fold))
        }
    }
}
