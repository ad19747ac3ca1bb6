//! The named moments of a training loop, and what listens to them: one list makes the enum, the trait's methods and the
//! way from one to the other.

use std::any::Any;

use super::Moment;
use crate::{Error, Fabric, Result};

macro_rules! hooks {
    ($($(#[$doc:meta])* $hook:ident => $method:ident),* $(,)?) => {
        /// A moment of a training loop that has a name of its own in Lightning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Hook {
            $($(#[$doc])* $hook,)*
        }

        impl Hook {
            /// All of them, in the order of a run.
            pub const ALL: &[Hook] = &[$(Hook::$hook),*];

            /// Lightning's name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Hook::$hook => stringify!($method),)*
                }
            }
        }

        /// Something that listens to moments of a training loop. All methods do nothing unless implemented.
        ///
        /// Fabric itself announces two moments, `on_after_setup` and `on_after_optimizer_step`; the others are announced
        /// by the loop, with [`Fabric::notify`]. Every rank calls its callbacks, so that one may run a collective. What a
        /// callback announces itself is not told to it again.
        ///
        /// ```
        /// use fabric::{Fabric, callback::{Callback, Hook, LoopState, Moment}};
        ///
        /// struct Patience(u32);
        /// impl Callback for Patience {
        ///     fn on_train_batch_end(&mut self, _: &Fabric, moment: &mut Moment<'_>) -> fabric::Result<()> {
        ///         if self.0 == 0 {
        ///             moment.stop("patience is at its end");
        ///         }
        ///         self.0 = self.0.saturating_sub(1);
        ///         Ok(())
        ///     }
        /// }
        ///
        /// let fabric = Fabric::builder().callback(Patience(2)).build()?;
        /// fabric.launch(|fabric| {
        ///     let mut state = LoopState::default();
        ///     while state.stopped().is_none() {
        ///         fabric.notify(Hook::TrainBatchEnd, &mut state.moment().loss(0.5))?;
        ///         state.progress.batches += 1;
        ///     }
        ///     assert_eq!(state.progress.batches, 3);
        ///     Ok(())
        /// })?;
        /// # Ok::<(), fabric::Error>(())
        /// ```
        pub trait Callback: Any + Send {
            $($(#[$doc])*
            ///
            /// # Errors
            /// Whatever should end the loop.
            fn $method(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
                let _ = (fabric, moment);
                Ok(())
            })*

            /// The moment `hook` has come: by default, the method of its name is called.
            ///
            /// # Errors
            /// Whatever should end the loop.
            fn notify(&mut self, hook: Hook, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
                match hook {
                    $(Hook::$hook => self.$method(fabric, moment),)*
                }
            }

            /// A moment that the program has named itself has come ([`Fabric::call`]). Names that it does not know are
            /// none of its business.
            ///
            /// # Errors
            /// Whatever should end the loop.
            fn call(&mut self, fabric: &Fabric, hook: &str, payload: &mut dyn Any) -> Result<()> {
                let _ = (fabric, hook, payload);
                Ok(())
            }

            /// Another of its kind, in the same state, for another rank of [`Fabric::launch_threads`]. Without one the
            /// ranks share this one and take turns, and a collective in it would wait for ever for those who wait for
            /// their turn.
            fn twin(&self) -> Option<Box<dyn Callback>> {
                None
            }

            /// The name under which its state is saved ([`Fabric::callback_states`]).
            fn name(&self) -> &str {
                let name = std::any::type_name::<Self>();
                let name = name.split('<').next().unwrap_or(name);
                name.rsplit("::").next().unwrap_or(name)
            }

            /// What it has to remember from one run to the next, finite numbers only; null for nothing.
            ///
            /// # Errors
            /// When it cannot be written.
            fn state(&self) -> Result<serde_json::Value> {
                Ok(serde_json::Value::Null)
            }

            /// Go on from a saved state.
            ///
            /// # Errors
            /// When it does not fit.
            fn load_state(&mut self, state: &serde_json::Value) -> Result<()> {
                let _ = state;
                Err(Error::argument(
                    format!("'{}' has no state to load", self.name()),
                    "Load the states of the same callbacks as were saved",
                ))
            }
        }
    };
}

hooks! {
    /// A model and its optimizer were set up; Fabric announces it.
    AfterSetup => on_after_setup,
    /// Training begins.
    TrainStart => on_train_start,
    /// An epoch of training begins.
    TrainEpochStart => on_train_epoch_start,
    /// A batch of training begins.
    TrainBatchStart => on_train_batch_start,
    /// The loss is known; its backward comes.
    BeforeBackward => on_before_backward,
    /// Gradients are there.
    AfterBackward => on_after_backward,
    /// The optimizer is about to step: gradients are reduced, and clipped if they are.
    BeforeOptimizerStep => on_before_optimizer_step,
    /// The optimizer has stepped; Fabric announces it.
    AfterOptimizerStep => on_after_optimizer_step,
    /// Gradients are about to be forgotten.
    BeforeZeroGrad => on_before_zero_grad,
    /// A batch of training has ended.
    TrainBatchEnd => on_train_batch_end,
    /// Validation begins.
    ValidationStart => on_validation_start,
    /// The model is about to be put into its state for evaluation.
    ValidationModelEval => on_validation_model_eval,
    /// An epoch of validation begins.
    ValidationEpochStart => on_validation_epoch_start,
    /// A batch of validation begins.
    ValidationBatchStart => on_validation_batch_start,
    /// A batch of validation has ended.
    ValidationBatchEnd => on_validation_batch_end,
    /// An epoch of validation has ended; its metrics are there.
    ValidationEpochEnd => on_validation_epoch_end,
    /// The model is about to be put back into its state for training.
    ValidationModelTrain => on_validation_model_train,
    /// Validation has ended.
    ValidationEnd => on_validation_end,
    /// An epoch of training has ended.
    TrainEpochEnd => on_train_epoch_end,
    /// Training has ended.
    TrainEnd => on_train_end,
    /// The loop ends with [`Moment::error`].
    Exception => on_exception,
}

impl std::fmt::Display for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callback::LoopState;

    #[derive(Default)]
    struct Seen(Vec<&'static str>);
    impl Callback for Seen {
        fn on_train_epoch_end(&mut self, _: &Fabric, _: &mut Moment<'_>) -> Result<()> {
            self.0.push("epoch");
            Ok(())
        }
        fn on_exception(&mut self, _: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
            assert_eq!(moment.error.unwrap().to_string(), "out of data");
            self.0.push("exception");
            Ok(())
        }
    }

    #[test]
    fn every_hook_reaches_the_method_of_its_name() {
        let fabric = Fabric::builder().devices(1).build().unwrap();
        let (mut seen, mut state) = (Seen::default(), LoopState::default());
        let error = Error::new("out of data");
        for hook in Hook::ALL {
            let mut moment = state.moment().error(&error);
            seen.notify(*hook, &fabric, &mut moment).unwrap();
        }
        assert_eq!(seen.0, ["epoch", "exception"]);
        assert_eq!((seen.name(), Hook::ALL.len()), ("Seen", 21));
        assert_eq!(
            Hook::ValidationBatchEnd.to_string(),
            "on_validation_batch_end"
        );
        assert!(seen.load_state(&serde_json::Value::Null).is_err());
    }
}
