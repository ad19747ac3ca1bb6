//! A reduction that comes again and again: [`Combiner`].

use crate::combine::{Finish, Joiner, NO_FACTOR, Store, combine, joiner};
use crate::dtype::Dtype;
use crate::error::KernelError;
use crate::fold::Fold;
use crate::simd;
use crate::span::{Span, SpanMut};

/// A [`combine`] of which everything but the elements is known beforehand. The commonest, of two, four or eight sources
/// without factors, are looked up and checked once, which of a few hundred elements takes as long as the arithmetic.
#[derive(Copy, Clone, Debug)]
pub struct Combiner {
    op: Fold,
    dtype: Dtype,
    sources: usize,
    finish: Finish,
    factor: f64,
    join: Option<Joiner>, // none: the long way
}

impl Combiner {
    /// What is to be done with `sources` spans of `dtype`. What cannot be done is refused when it is run.
    pub fn new(op: Fold, dtype: Dtype, sources: usize, finish: Finish) -> Self {
        let factor = match finish {
            Finish::Cast => Some(NO_FACTOR),
            Finish::Scale(factor) if dtype.is_float() => Some(factor),
            Finish::Scale(_) | Finish::Divide(_) => None,
        };
        let is_few = matches!(sources, 2 | 4) || (sources == 8 && op == Fold::Sum);
        let can = is_few && op.takes(dtype) && factor.is_some();
        Self {
            op,
            dtype,
            sources,
            finish,
            factor: factor.unwrap_or(NO_FACTOR),
            join: can.then(|| joiner(op, dtype, dtype, sources)),
        }
    }

    /// As [`combine`] without factors.
    ///
    /// ```
    /// use fabric_kernels::{Combiner, Dtype, Finish, Fold, Span, SpanMut, Store};
    /// let sum = Combiner::new(Fold::Sum, Dtype::F32, 2, Finish::Cast);
    /// let mut into = [0.0f32; 2];
    /// let sources = [Span::of(&[1.0f32, 2.0]), Span::of(&[3.0f32, 4.0])];
    /// sum.run(&sources, &mut [SpanMut::of(&mut into)], Store::Cached)?;
    /// assert_eq!(into, [4.0, 6.0]);
    /// # Ok::<(), fabric_kernels::KernelError>(())
    /// ```
    #[inline]
    pub fn run(
        &self,
        sources: &[Span<'_>],
        targets: &mut [SpanMut<'_>],
        store: Store,
    ) -> Result<(), KernelError> {
        if let Some(join) = self.join
            && self.is_plain(sources, targets)
            && join(self.op, sources, self.factor, targets, store)
        {
            simd::settle(store);
            return Ok(());
        }
        combine(self.op, sources, None, self.finish, targets, store) // which says what is wrong
    }

    /// There are so many sources as was said, at least one target, and all are alike and on the host.
    #[inline]
    fn is_plain(&self, sources: &[Span<'_>], targets: &[SpanMut<'_>]) -> bool {
        let Some(len) = targets.first().map(SpanMut::len) else {
            return false;
        };
        let mut is_plain = sources.len() == self.sources && len > 0;
        for span in sources {
            is_plain &= span.is_on_host() & (span.dtype() == self.dtype) & (span.len() == len);
        }
        for span in targets {
            let is_on_host = span.device().is_none();
            is_plain &= is_on_host & (span.dtype() == self.dtype) & (span.len() == len);
        }
        is_plain
    }
}
