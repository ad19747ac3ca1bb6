//! What is done with floats between load and store. Each computes in the accumulator `C` and rounds once.

use std::marker::PhantomData;

use super::{Acc, Binary, Lane, Unary};

/// The value itself, in another type.
pub(in crate::simd) struct Convert<C>(pub(in crate::simd) PhantomData<C>);
/// The value itself.
pub(in crate::simd) struct Same;
/// The value times a factor.
pub(in crate::simd) struct Scale<C>(pub(in crate::simd) C);
/// The value within plus and minus this limit, which is not negative.
pub(in crate::simd) struct Clamp<C>(pub(in crate::simd) C);
/// The sum.
pub(in crate::simd) struct Plus<C>(pub(in crate::simd) PhantomData<C>);
/// The product.
pub(in crate::simd) struct Times<C>(pub(in crate::simd) PhantomData<C>);
/// The smaller one, NaN first, then -0, then +0.
pub(in crate::simd) struct Smaller<C>(pub(in crate::simd) PhantomData<C>);
/// The larger one, NaN first, then +0, then -0.
pub(in crate::simd) struct Larger<C>(pub(in crate::simd) PhantomData<C>);

impl<A: Lane, B: Lane, C: Acc> Unary<A, B> for Convert<C> {
    #[inline(always)]
    fn apply(&self, element: A) -> B {
        C::load(element).store()
    }
}

impl<A> Unary<A, A> for Same {
    #[inline(always)]
    fn apply(&self, element: A) -> A {
        element
    }
}

impl<A: Lane, B: Lane, C: Acc> Unary<A, B> for Scale<C> {
    #[inline(always)]
    fn apply(&self, element: A) -> B {
        (C::load(element) * self.0).store()
    }
}

impl<A: Lane, C: Acc> Unary<A, A> for Clamp<C> {
    #[inline(always)]
    fn apply(&self, element: A) -> A {
        let (limit, value) = (self.0, C::load(element));
        let below = if value > limit { limit } else { value };
        let within = if below < -limit { -limit } else { below };
        within.store()
    }
}

impl<B: Lane, A: Lane, C: Acc> Binary<B, A> for Plus<C> {
    #[inline(always)]
    fn apply(&self, ours: B, theirs: A) -> B {
        (C::load(ours) + C::load(theirs)).store()
    }
}

impl<B: Lane, A: Lane, C: Acc> Binary<B, A> for Times<C> {
    #[inline(always)]
    fn apply(&self, ours: B, theirs: A) -> B {
        (C::load(ours) * C::load(theirs)).store()
    }
}

impl<B: Lane, A: Lane, C: Acc> Binary<B, A> for Smaller<C> {
    #[inline(always)]
    fn apply(&self, ours: B, theirs: A) -> B {
        let (a, b) = (C::load(ours), C::load(theirs));
        // Equal numbers have equal bits but for the sign of zero, which "or" keeps.
        let even = if a == b { a.bit_or(b) } else { b };
        let number = if a < b { a } else { even };
        either_nan(a, b, number).store()
    }
}

impl<B: Lane, A: Lane, C: Acc> Binary<B, A> for Larger<C> {
    #[inline(always)]
    fn apply(&self, ours: B, theirs: A) -> B {
        let (a, b) = (C::load(ours), C::load(theirs));
        let even = if a == b { a.bit_and(b) } else { b };
        let number = if a > b { a } else { even };
        either_nan(a, b, number).store()
    }
}

/// NaN if either is, else `number`.
#[inline(always)]
#[allow(clippy::eq_op)]
fn either_nan<C: Acc>(a: C, b: C, number: C) -> C {
    let number = if b != b { b } else { number };
    if a != a { a } else { number }
}
