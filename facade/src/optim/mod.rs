//! Optimizers: what one must do to be driven by Fabric, [`Optimizer`], and those that Fabric brings.
//!
//! Most optimizers treat every element alike. Such a one is a few numbers and a formula, [`Elementwise`]; [`ByElement`]
//! drives it over any model's parameters, whole or in shards, in groups, and saves its states.
//!
//! ```
//! use fabric::optim::{AdamW, Optimizer};
//!
//! // A transformer's usual two groups, and a head that learns ten times as fast.
//! let mut optimizer = AdamW::new(3e-4)
//!     .weight_decay(0.1)
//!     .group("head", |param| param.name.starts_with("head."), |options| options.lr(3e-3))
//!     .group("no decay", |param| param.shape.len() < 2, |options| options.weight_decay(0.0));
//! optimizer.set_learning_rate(1e-4); // the head keeps its proportion
//! assert_eq!(optimizer.group_learning_rate("no decay"), Some(1e-4));
//! ```

mod by_element;
mod elementwise;
mod lent;
pub mod rules;
mod saved;
mod scratch;

use fabric_engine::{Result, buffer::Slab};

use crate::model::{Gradients, Model};

pub use by_element::ByElement;
pub use elementwise::{Elements, Elementwise, MOST_STATES};
pub use lent::{Lent, LentState};

/// Stochastic gradient descent with momentum, Nesterov and weight decay, as torch defines them.
pub type Sgd = ByElement<rules::Sgd>;

/// Adam with the weight decay in the gradient, as torch defines it.
pub type Adam = ByElement<rules::Adam>;

/// Adam with decoupled weight decay, as torch defines it.
pub type AdamW = ByElement<rules::AdamW>;

/// The sign of a mean: every element moves by the learning rate.
pub type Lion = ByElement<rules::Lion>;

/// What `fabric.setup` takes as an optimizer.
pub trait Optimizer: Send {
    /// Update the model's parameters from its gradients; parameters without one are left alone.
    ///
    /// # Errors
    /// The library's or the arithmetic's refusal.
    fn step(&mut self, model: &dyn Model, grads: &Gradients<'_>) -> Result<()>;

    /// Whether [`Optimizer::step`] multiplies every gradient by [`Gradients::scale`], in its own pass. Otherwise that is
    /// done before it is called.
    fn scales(&self) -> bool {
        false
    }

    /// How many vectors it keeps beside each parameter, for [`crate::FabricModule::explain`].
    fn states_per_param(&self) -> usize {
        0
    }

    /// The learning rate.
    fn learning_rate(&self) -> f64;

    /// Change the learning rate: schedules are the caller's.
    fn set_learning_rate(&mut self, lr: f64);

    /// The state to save: named vectors, and counters.
    ///
    /// # Errors
    /// When the optimizer hides its state.
    fn state(&self, model: &dyn Model) -> Result<OptimizerState>;

    /// The same, without a copy where the optimizer can lend what it keeps: what `fabric.save` asks for. Names and types
    /// are the same on all ranks that update the same parameters.
    ///
    /// # Errors
    /// As [`Optimizer::state`].
    fn lend_state(&self, model: &dyn Model) -> Result<LentState<'_>> {
        Ok(self.state(model)?.into())
    }

    /// Whether [`Optimizer::load_state`] will take `state`: asked before a checkpoint changes anything.
    ///
    /// # Errors
    /// When it does not fit: says what.
    fn check_state(&self, model: &dyn Model, state: &OptimizerState) -> Result<()> {
        let _ = (model, state);
        Ok(())
    }

    /// Go on from a saved state.
    ///
    /// # Errors
    /// When it does not fit; nothing is changed then.
    fn load_state(&mut self, model: &dyn Model, state: OptimizerState) -> Result<()>;
}

/// An optimizer's state: the number of steps taken, and vectors named `kind.parameter`, each as long as the parameter;
/// except that `step.parameter` is one count.
#[derive(Debug, Default)]
pub struct OptimizerState {
    /// Steps taken.
    pub steps: u64,
    /// The vectors.
    pub tensors: Vec<(String, Slab)>,
}

pub(crate) const STEP: &str = "step"; // a counter for each parameter, beside the vectors
