//! Optimizer loops: parameter, gradient, states and copy in one pass, so that each is read and written once.

mod rules;

use std::marker::PhantomData;
use std::ops::Range;

use half::{bf16, f16};

use super::lane::{Acc, Lane};
use super::raw::{Reader, Writer};
use super::{Kernel, launch};
use crate::dtype::Dtype;
use crate::error::KernelError;
use crate::optim::{Rule, Step};
use crate::span::{Span, SpanMut};
use rules::{AdamRule, Apply, FirstMomentum, LionRule, Momentum, SgdRule};

/// The spans of one update, of one length; the states are in the accumulator of the parameter.
pub(crate) struct Spans<'a, 'b> {
    pub(crate) param: SpanMut<'a>,
    pub(crate) grad: Span<'a>,
    pub(crate) states: &'a mut [SpanMut<'b>],
    pub(crate) copy: Option<SpanMut<'a>>,
}

/// The caller has checked all that [`Spans`] says, and that there are as many states as the rule has.
///
/// The casts that training in mixed precision is made of run in the same loop as the step, from f16 and bf16 gradients to
/// f32 parameters and on to f16 and bf16 copies. A loop for every triple of dtypes would be many; the others go in blocks.
pub(crate) fn update(step: &Step<'_>, spans: Spans<'_, '_>) -> Result<(), KernelError> {
    let copy = spans.copy.as_ref().map(SpanMut::dtype);
    let fused = matches!(copy, None | Some(Dtype::F16 | Dtype::BF16));
    match (spans.param.dtype(), spans.grad.dtype()) {
        (Dtype::F32, Dtype::F32) if fused => choose(step, Fused::<f32>::of(spans)),
        (Dtype::F32, Dtype::F16) if fused => choose(step, Fused::<f16>::of(spans)),
        (Dtype::F32, Dtype::BF16) if fused => choose(step, Fused::<bf16>::of(spans)),
        (Dtype::F64, _) => choose(step, Blocks::<f64, f64>::of(spans)),
        (Dtype::F32, _) => choose(step, Blocks::<f32, f32>::of(spans)),
        (Dtype::F16, _) => choose(step, Blocks::<f16, f32>::of(spans)),
        (Dtype::BF16, _) => choose(step, Blocks::<bf16, f32>::of(spans)),
        (other, _) => unreachable!("the caller refuses {other} parameters"),
    }
}

/// Gives a rule, known at run time, to a pass that is compiled for each.
fn choose<C: Acc>(step: &Step<'_>, pass: impl Pass<C>) -> Result<(), KernelError> {
    let (number, scale) = (step.number, step.grad_scale);
    match step.rule {
        Rule::Sgd(rule) if rule.momentum == 0.0 => pass.run(SgdRule::new(rule, scale)),
        Rule::Sgd(rule) if number == 1 => pass.run(FirstMomentum(SgdRule::new(rule, scale))),
        Rule::Sgd(rule) => pass.run(Momentum(SgdRule::new(rule, scale))),
        Rule::Adam(rule) => pass.run(AdamRule::<C, false>::new(rule, number, scale)),
        Rule::AdamW(rule) => pass.run(AdamRule::<C, true>::new(rule, number, scale)),
        Rule::Lion(rule) => pass.run(LionRule::new(rule, scale)),
    }
}

/// A way through all elements.
trait Pass<C> {
    fn run<const STATES: usize>(self, rule: impl Apply<C, STATES>) -> Result<(), KernelError>;
}

/// f32 parameters, all casts in the loop.
struct Fused<'a, 'b, G> {
    spans: Spans<'a, 'b>,
    grad: PhantomData<G>,
}

impl<'a, 'b, G> Fused<'a, 'b, G> {
    fn of(spans: Spans<'a, 'b>) -> Self {
        Fused {
            spans,
            grad: PhantomData,
        }
    }
}

impl<G: Lane> Pass<f32> for Fused<'_, '_, G> {
    fn run<const STATES: usize>(self, rule: impl Apply<f32, STATES>) -> Result<(), KernelError> {
        let spans = self.spans;
        let all = 0..spans.param.len();
        let walk = Walk {
            param: Writer::<f32>::of(spans.param),
            grad: Reader::<G>::of(spans.grad),
            states: writers(spans.states, all),
            copy: Nothing,
            rule,
        };
        match spans.copy {
            None => launch(walk),
            Some(copy) if copy.dtype() == Dtype::F16 => {
                launch(walk.with(Writer::<f16>::of(copy)));
            }
            Some(copy) => launch(walk.with(Writer::<bf16>::of(copy))),
        }
        Ok(())
    }
}

/// Any dtypes: the casts run before and after the loop, on blocks few enough in elements to stay in a cache between.
struct Blocks<'a, 'b, P, C> {
    spans: Spans<'a, 'b>,
    types: PhantomData<(P, C)>,
}

impl<'a, 'b, P, C> Blocks<'a, 'b, P, C> {
    fn of(spans: Spans<'a, 'b>) -> Self {
        Blocks {
            spans,
            types: PhantomData,
        }
    }
}

impl<P: Lane, C: Acc> Pass<C> for Blocks<'_, '_, P, C> {
    fn run<const STATES: usize>(self, rule: impl Apply<C, STATES>) -> Result<(), KernelError> {
        const BLOCK: usize = 2048;
        let mut spans = self.spans;
        let len = spans.param.len();
        // Without casts one block does, whatever its length.
        let plain = spans.grad.dtype() == C::DTYPE && spans.copy.is_none();
        let block = if plain { len.max(1) } else { BLOCK };
        let mut room = [C::narrow(0.0); BLOCK];
        for start in (0..len).step_by(block) {
            let range = start..len.min(start + block);
            let mut grad = spans.grad.slice(range.clone());
            if grad.dtype() != C::DTYPE {
                let room = &mut room[..range.len()];
                crate::cast(grad, SpanMut::of(room))?;
                grad = Span::of(room);
            }
            launch(Walk {
                param: Writer::<P>::of(spans.param.slice(range.clone())),
                grad: Reader::<C>::of(grad),
                states: writers::<C, STATES>(spans.states, range.clone()),
                copy: Nothing,
                rule,
            });
            if let Some(copy) = &mut spans.copy {
                let param = spans.param.as_span().slice(range.clone());
                crate::cast(param, copy.slice(range))?;
            }
        }
        Ok(())
    }
}

fn writers<'a, C: Acc, const STATES: usize>(
    states: &'a mut [SpanMut<'_>],
    range: Range<usize>,
) -> [Writer<'a, C>; STATES] {
    assert_eq!(states.len(), STATES);
    let mut states = states.iter_mut();
    std::array::from_fn(|_| {
        let state = states.next().expect("the number was asserted above");
        Writer::of(state.slice(range.clone()))
    })
}

/// The copy of a pass without one.
struct Nothing;

/// Where the new parameter also goes.
trait Copies<P> {
    /// How many elements it takes, if it takes any.
    fn len(&self) -> Option<usize>;
    /// Element `index`.
    ///
    /// # Safety
    ///
    /// `index` is below the length, if there is one.
    unsafe fn put(&mut self, index: usize, moved: P);
}

impl<P> Copies<P> for Nothing {
    #[inline(always)]
    fn len(&self) -> Option<usize> {
        None
    }
    #[inline(always)]
    unsafe fn put(&mut self, _: usize, _: P) {}
}

impl<P: Acc, K: Lane> Copies<P> for Writer<'_, K> {
    #[inline(always)]
    fn len(&self) -> Option<usize> {
        Some(Writer::len(self))
    }
    #[inline(always)]
    unsafe fn put(&mut self, index: usize, moved: P) {
        // SAFETY: index is below the length, says the caller. `every_rule_equals_the_oracle` runs every length.
        unsafe { self.set(index, moved.store()) };
    }
}

struct Walk<'a, P, G, C, K, R, const STATES: usize> {
    param: Writer<'a, P>,
    grad: Reader<'a, G>,
    states: [Writer<'a, C>; STATES],
    copy: K,
    rule: R,
}

impl<'a, P, G, C, K, R, const STATES: usize> Walk<'a, P, G, C, K, R, STATES> {
    fn with<L>(self, copy: L) -> Walk<'a, P, G, C, L, R, STATES> {
        Walk {
            param: self.param,
            grad: self.grad,
            states: self.states,
            copy,
            rule: self.rule,
        }
    }
}

impl<P: Lane, G: Lane, C: Acc, K: Copies<P>, R: Apply<C, STATES>, const STATES: usize> Kernel
    for Walk<'_, P, G, C, K, R, STATES>
{
    type Out = ();

    #[inline(always)]
    fn run(mut self) {
        assert_eq!(self.grad.len(), self.param.len());
        assert!(self.copy.len().is_none_or(|len| len == self.param.len()));
        for state in &self.states {
            assert_eq!(state.len(), self.param.len());
        }
        for index in 0..self.param.len() {
            // SAFETY: the loop ends at param.len(). `every_rule_equals_the_oracle` runs every length.
            let p = C::load(unsafe { self.param.at(index) });
            // SAFETY: grad.len() is param.len(), asserted above; the same test.
            let g = C::load(unsafe { self.grad.at(index) });
            let mut states = [C::narrow(0.0); STATES];
            for (value, state) in states.iter_mut().zip(&self.states) {
                // SAFETY: state.len() is param.len(), asserted above; the same test.
                *value = unsafe { state.at(index) };
            }
            let (moved, states) = self.rule.apply(p, g, states);
            for (state, value) in self.states.iter_mut().zip(states) {
                // SAFETY: as for its load.
                unsafe { state.set(index, value) };
            }
            let moved: P = moved.store();
            // SAFETY: as for the first load.
            unsafe { self.param.set(index, moved) };
            // SAFETY: a copy is as long as the parameter, asserted above; the same test.
            unsafe { self.copy.put(index, moved) };
        }
    }
}
