//! A formula for one element, and the elements it is applied to: what a user writes to bring an optimizer of their own,
//! and how the kernels' fused rules say the same.

use fabric_engine::{
    Error, Result,
    kernels::{self, KernelError, Rule, Span, SpanMut},
};

/// The most states that an [`Elementwise`] may have.
pub const MOST_STATES: usize = 8;

/// Elements that [`Elements::each`] casts at once: with two states, sixteen kilobytes that stay in the first cache.
const CHUNK_ELEMS: usize = 512;

/// An optimizer in which an element's update depends on nothing but that element's parameter, gradient and states. Because
/// of that it makes no difference where shards are cut: it runs under every strategy, to the same bits.
///
/// It is the hyperparameters and the formula. [`ByElement`](crate::optim::ByElement) keeps the states, one set for each
/// parameter, counts the steps, and saves both.
///
/// ```
/// use fabric::{Fabric, engine::Result, optim::{ByElement, Elements, Elementwise}, vec::VecModel};
///
/// /// Steps of one size, in the direction of the mean gradient's sign (Bernstein et al. 2018).
/// #[derive(Clone)]
/// struct Signum { lr: f64, beta: f64 }
///
/// impl Elementwise for Signum {
///     fn name(&self) -> &str { "signum" }
///     fn states(&self) -> &[&'static str] { &["mean"] }
///     fn learning_rate(&self) -> f64 { self.lr }
///     fn set_learning_rate(&mut self, lr: f64) { self.lr = lr }
///     fn update(&self, elements: Elements<'_, '_>) -> Result<()> {
///         elements.each(|param, grad, [mean]| {
///             *mean = self.beta * *mean + (1.0 - self.beta) * grad;
///             *param -= self.lr * mean.signum();
///         })
///     }
/// }
///
/// let fabric = Fabric::builder().devices(2).strategy("zero1").build()?;
/// fabric.launch_threads(|fabric| {
///     let model = VecModel::new([("w", vec![1f32; 3])]);
///     let (model, mut optimizer) = fabric.setup(model, ByElement::of(Signum { lr: 0.25, beta: 0.5 }))?;
///     fabric.backward(model.gradients(vec![Some(vec![8.0, -8.0, 2.0])]))?;
///     optimizer.step()?;
///     assert_eq!(model.read("w"), [0.75, 1.25, 0.75]);
///     Ok(())
/// })?;
/// # Ok::<(), fabric::Error>(())
/// ```
pub trait Elementwise: Clone + Send {
    /// What errors call it.
    fn name(&self) -> &str;

    /// The names of the states, one vector each as long as the parameter, in the order in which [`Elements`] holds them.
    /// They begin as zeros, at a parameter's first step. Files call them `name.parameter`, so that a name holds no dot,
    /// and none is "step".
    fn states(&self) -> &[&'static str];

    /// The learning rate.
    fn learning_rate(&self) -> f64;

    /// Change the learning rate.
    fn set_learning_rate(&mut self, lr: f64);

    /// Whether the hyperparameters make sense: asked before the first step.
    ///
    /// # Errors
    /// When they do not: says which.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Move the parameter against its gradient, and the states with it.
    ///
    /// # Errors
    /// The arithmetic's refusal.
    fn update(&self, elements: Elements<'_, '_>) -> Result<()>;
}

/// Elements of one parameter in one step: all of it, or the piece that this rank updates. All spans are of one length.
#[non_exhaustive]
#[derive(Debug)]
pub struct Elements<'a, 's> {
    /// The parameter's name, for errors.
    pub name: &'a str,
    /// The number of this step for this parameter, from 1.
    pub step: u64,
    /// What the gradient is to be multiplied by: a loss scale undone, clipping. [`Elements::each`] does.
    pub grad_scale: f64,
    /// The parameter.
    pub param: SpanMut<'a>,
    /// The gradient, of any float type.
    pub grad: Span<'a>,
    /// The states, in the order of [`Elementwise::states`], in the accumulator type of the parameter: f64 for f64, f32 for
    /// every other.
    pub states: &'a mut [SpanMut<'s>],
    /// Where the new parameter is to be written too, cast to this span's type: the copy that the model computes with,
    /// where that is a smaller type.
    pub copy: Option<SpanMut<'a>>,
}

impl Elements<'_, '_> {
    /// Give every element to `update` in f64, whatever its type: the parameter, to change; the gradient, scaled; the states,
    /// to change. What it leaves is rounded once.
    ///
    /// # Errors
    /// When there are not `N` states, or for memory or types that the kernels do not take.
    pub fn each<const N: usize>(
        mut self,
        mut update: impl FnMut(&mut f64, f64, &mut [f64; N]),
    ) -> Result<()> {
        if self.states.len() != N {
            return Err(Error::argument(
                format!(
                    "the update of '{}' takes {N} states, and the optimizer has {}",
                    self.name,
                    self.states.len()
                ),
                "Let the closure's last argument name as many states as Elementwise::states lists",
            ));
        }
        let name = self.name;
        self.chunks(&mut update)
            .map_err(|error| Error::library(format!("update '{name}'"), error))
    }

    fn chunks<const N: usize>(
        &mut self,
        update: &mut impl FnMut(&mut f64, f64, &mut [f64; N]),
    ) -> Result<(), KernelError> {
        let mut param = [0f64; CHUNK_ELEMS];
        let mut grad = [0f64; CHUNK_ELEMS];
        let mut states = [[0f64; CHUNK_ELEMS]; N];
        let numel = self.param.len();
        for start in (0..numel).step_by(CHUNK_ELEMS) {
            let range = start..numel.min(start + CHUNK_ELEMS);
            let chunk = range.len();
            let span = self.param.as_span().slice(range.clone());
            kernels::cast(span, SpanMut::of(&mut param[..chunk]))?;
            let span = self.grad.slice(range.clone());
            kernels::cast_scaled(span, SpanMut::of(&mut grad[..chunk]), self.grad_scale)?;
            for (own, state) in states.iter_mut().zip(&*self.states) {
                let span = state.as_span().slice(range.clone());
                kernels::cast(span, SpanMut::of(&mut own[..chunk]))?;
            }
            for index in 0..chunk {
                let mut own = std::array::from_fn(|state| states[state][index]);
                update(&mut param[index], grad[index], &mut own);
                for (state, value) in states.iter_mut().zip(own) {
                    state[index] = value;
                }
            }
            for (own, state) in states.iter().zip(&mut *self.states) {
                kernels::cast(Span::of(&own[..chunk]), state.slice(range.clone()))?;
            }
            kernels::cast(Span::of(&param[..chunk]), self.param.slice(range.clone()))?;
            if let Some(copy) = &mut self.copy {
                // From the rounded parameter: the copy is its cast, as after a fused rule.
                kernels::cast(self.param.as_span().slice(range.clone()), copy.slice(range))?;
            }
        }
        Ok(())
    }
}

/// A rule chosen at run time. One pass over memory un-scales, updates and writes the copy.
impl Elementwise for Rule {
    fn name(&self) -> &str {
        Rule::name(self)
    }

    fn states(&self) -> &[&'static str] {
        states(self)
    }

    fn learning_rate(&self) -> f64 {
        match self {
            Rule::Sgd(sgd) => sgd.lr,
            Rule::Adam(adam) | Rule::AdamW(adam) => adam.lr,
            Rule::Lion(lion) => lion.lr,
        }
    }

    fn set_learning_rate(&mut self, lr: f64) {
        match self {
            Rule::Sgd(sgd) => sgd.lr = lr,
            Rule::Adam(adam) | Rule::AdamW(adam) => adam.lr = lr,
            Rule::Lion(lion) => lion.lr = lr,
        }
    }

    fn check(&self) -> Result<()> {
        let (decays, sizes) = match *self {
            Rule::Sgd(sgd) => (
                vec![],
                vec![
                    ("momentum", sgd.momentum),
                    ("weight decay", sgd.weight_decay),
                ],
            ),
            Rule::Adam(adam) | Rule::AdamW(adam) => (
                vec![("beta1", adam.beta1), ("beta2", adam.beta2)],
                vec![("eps", adam.eps), ("weight decay", adam.weight_decay)],
            ),
            Rule::Lion(lion) => (
                vec![("beta1", lion.beta1), ("beta2", lion.beta2)],
                vec![("weight decay", lion.weight_decay)],
            ),
        };
        let refuse = |(what, value): (&str, f64), range| {
            Err(Error::argument(
                format!("{}: a {what} of {value}", Rule::name(self)),
                format!("Give a number, {range}"),
            ))
        };
        let sensible = |value: f64| value.is_finite() && value >= 0.0;
        let mut sizes = [("learning rate", self.learning_rate())]
            .into_iter()
            .chain(sizes);
        if let Some(wrong) = sizes.find(|(_, value)| !sensible(*value)) {
            return refuse(wrong, "0 or more");
        }
        let mut decays = decays.into_iter();
        if let Some(wrong) = decays.find(|(_, value)| !(0.0..1.0).contains(value)) {
            return refuse(wrong, "from 0 to below 1");
        }
        Ok(())
    }

    fn update(&self, elements: Elements<'_, '_>) -> Result<()> {
        let name = elements.name;
        kernels::update(
            self,
            elements.step,
            elements.grad_scale,
            elements.param,
            elements.grad,
            elements.states,
            elements.copy,
        )
        .map_err(|error| Error::library(format!("update '{name}'"), error))
    }
}

/// The names by which files know a rule's states.
pub(super) fn states(rule: &Rule) -> &'static [&'static str] {
    match rule {
        Rule::Sgd(sgd) if sgd.momentum != 0.0 => &["momentum"], // the kernels' word is torch's, momentum_buffer
        other => other.states(),
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn elements<'a, 's>(
        param: &'a mut [f32],
        grad: &'a [f32],
        states: &'a mut [SpanMut<'s>],
        copy: &'a mut [bf16],
    ) -> Elements<'a, 's> {
        Elements {
            name: "w",
            step: 2,
            grad_scale: 0.25,
            param: SpanMut::of(param),
            grad: Span::of(grad),
            states,
            copy: Some(SpanMut::of(copy)),
        }
    }

    #[test]
    fn gradients_are_scaled_in_the_pass_of_the_update_by_a_rule_and_by_a_closure() {
        let sgd = kernels::Sgd {
            lr: 0.5,
            momentum: 0.5,
            dampening: 0.0,
            weight_decay: 0.0,
            nesterov: false,
            maximize: false,
        };
        for numel in [
            0,
            1,
            CHUNK_ELEMS - 1,
            CHUNK_ELEMS,
            CHUNK_ELEMS + 1,
            3 * CHUNK_ELEMS,
        ] {
            let grad: Vec<_> = (0..numel).map(|index| index as f32).collect();
            let run = |update: &dyn Fn(Elements<'_, '_>) -> Result<()>| {
                let (mut param, mut mean) = (vec![1f32; numel], vec![8f32; numel]);
                let mut copy = vec![bf16::ZERO; numel];
                let states = &mut [SpanMut::of(&mut mean)];
                update(elements(&mut param, &grad, states, &mut copy)).unwrap();
                (param, mean, copy)
            };
            let by_rule = run(&|elements| Rule::Sgd(sgd).update(elements));
            let by_closure = run(&|elements| {
                elements.each(|param, grad, [mean]| {
                    *mean = 0.5 * *mean + grad;
                    *param -= 0.5 * *mean;
                })
            });
            assert_eq!(by_rule, by_closure);
            let expected: Vec<_> = grad
                .iter()
                .map(|grad| 1.0 - 0.5 * (4.0 + grad / 4.0))
                .collect();
            let cast = expected.iter().map(|value| bf16::from_f32(*value));
            assert_eq!(
                (by_rule.0.clone(), by_rule.2),
                (expected.clone(), cast.collect())
            );
        }
    }
}
