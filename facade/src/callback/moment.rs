//! What a loop shows to its callbacks: how far it is, its numbers, its model, a way to save, and a place to ask for the end.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ModelView;
use crate::{
    Error, Result,
    model::{FabricModule, Model},
};

/// How far a loop is. A loop counts these itself; they can be saved with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The epoch, from 0.
    pub epoch: u64,
    /// The batch in this epoch, from 0.
    pub batch: u64,
    /// Batches that this rank has seen, in all epochs.
    pub batches: u64,
    /// Steps that the optimizer has taken: the number under which things are logged.
    pub steps: u64,
    /// Samples that this rank has seen.
    pub samples: u64,
    /// Items in them (tokens, say), where the loop counts them.
    pub items: Option<u64>,
    /// How many epochs there will be, where that is known.
    pub of_epochs: Option<u64>,
    /// How many batches an epoch has, where that is known.
    pub of_batches: Option<u64>,
}

/// Numbers by name, in the order in which the names came.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics(Vec<(String, f64)>);

impl Metrics {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Set a number.
    pub fn set(&mut self, name: impl Into<String>, value: f64) {
        let name = name.into();
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    /// A number.
    pub fn get(&self, name: &str) -> Option<f64> {
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| *value)
    }

    /// A number that must be there: `who` needs it.
    ///
    /// # Errors
    /// When it is not there: names those that are.
    pub fn require(&self, name: &str, who: &str) -> Result<f64> {
        self.get(name).ok_or_else(|| {
            let known: Vec<_> = self.iter().map(|(known, _)| known).collect();
            Error::argument(
                format!("{who} looks for the metric '{name}', and the loop has {known:?}"),
                "Set it in the loop's metrics before this moment, or give another name",
            )
        })
    }

    /// Forget all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names and numbers.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

impl<N: Into<String>> FromIterator<(N, f64)> for Metrics {
    fn from_iter<I: IntoIterator<Item = (N, f64)>>(pairs: I) -> Self {
        let mut metrics = Self::new();
        pairs
            .into_iter()
            .for_each(|(name, value)| metrics.set(name, value));
        metrics
    }
}

/// What a loop keeps from moment to moment, and shows to callbacks.
///
/// ```
/// use fabric::callback::LoopState;
///
/// let mut state = LoopState::default();
/// state.metrics.set("val_loss", 0.25);
/// state.learning_rates.set("lr", 1e-3);
/// state.moment().stop("good enough");
/// assert_eq!(state.stopped(), Some("good enough"));
/// ```
#[derive(Clone, Debug, Default)]
pub struct LoopState {
    /// How far the loop is.
    pub progress: Progress,
    /// Its latest numbers: "loss", "val_loss".
    pub metrics: Metrics,
    /// Learning rates, by the name of the optimizer or group.
    pub learning_rates: Metrics,
    stop: Option<String>,
}

impl LoopState {
    /// A moment, to be announced by [`crate::Fabric::notify`].
    pub fn moment(&mut self) -> Moment<'_> {
        Moment {
            progress: self.progress,
            metrics: &mut self.metrics,
            learning_rates: &self.learning_rates,
            stop: &mut self.stop,
            model: None,
            loss: None,
            batch: None,
            skipped: false,
            error: None,
            save: None,
        }
    }

    /// Why a callback has asked for the end, if one has. The rank's own: a callback that asks on one rank only has to tell
    /// the others.
    pub fn stopped(&self) -> Option<&str> {
        self.stop.as_deref()
    }

    /// Go on in spite of it.
    pub fn resume(&mut self) {
        self.stop = None;
    }
}

/// The loop's way to save its state: all ranks call it with the same path, or none.
pub type Save<'a> = dyn FnMut(&Path) -> Result<()> + 'a;

/// A moment of a loop.
pub struct Moment<'a> {
    /// How far the loop is.
    pub progress: Progress,
    /// Its numbers; a callback may add some.
    pub metrics: &'a mut Metrics,
    /// The learning rates, by name.
    pub learning_rates: &'a Metrics,
    /// The model, where the loop shows it.
    pub model: Option<ModelView>,
    /// The batch's loss, on this rank.
    pub loss: Option<f64>,
    /// The number of the batch: in its epoch, or of validation.
    pub batch: Option<u64>,
    /// Whether the optimizer left the parameters as they were, because a gradient of the scaled loss overflowed.
    pub skipped: bool,
    /// What the loop ends with, for `on_exception`.
    pub error: Option<&'a Error>,
    /// The loop's way to save its state.
    pub save: Option<&'a mut Save<'a>>,
    stop: &'a mut Option<String>,
}

impl<'a> Moment<'a> {
    /// Show the model.
    pub fn model<M: Model>(mut self, module: &FabricModule<M>) -> Self {
        self.model = Some(module.view());
        self
    }

    /// Show a view of the model.
    pub fn view(mut self, view: ModelView) -> Self {
        self.model = Some(view);
        self
    }

    /// Show the loss.
    pub fn loss(mut self, loss: f64) -> Self {
        self.loss = Some(loss);
        self
    }

    /// Show the number of the batch.
    pub fn batch(mut self, batch: u64) -> Self {
        self.batch = Some(batch);
        self
    }

    /// Say whether the optimizer has skipped its step.
    pub fn skipped(mut self, skipped: bool) -> Self {
        self.skipped = skipped;
        self
    }

    /// Show what the loop ends with.
    pub fn error(mut self, error: &'a Error) -> Self {
        self.error = Some(error);
        self
    }

    /// Show how the loop's state is saved.
    ///
    /// ```no_run
    /// # use fabric::{Fabric, State, callback::{Hook, LoopState}, vec::VecModel, optim::Sgd};
    /// # fn example(fabric: &Fabric, mut state: LoopState) -> fabric::Result<()> {
    /// let (model, mut optimizer) = fabric.setup(VecModel::new([("w", vec![0f32; 4])]), Sgd::new(0.1))?;
    /// let (mut progress, mut states) = (state.progress, fabric.callback_states()?);
    /// let mut save = |path: &std::path::Path| {
    ///     let state = State::new().model("model", &model).optimizer("optimizer", &mut optimizer);
    ///     fabric.save(path, state.value("progress", &mut progress).value("callbacks", &mut states))
    /// };
    /// fabric.notify(Hook::TrainBatchEnd, &mut state.moment().model(&model).saving(&mut save))
    /// # }
    /// ```
    pub fn saving(mut self, save: &'a mut Save<'a>) -> Self {
        self.save = Some(save);
        self
    }

    /// Ask the loop to end, with a reason. The first reason stays.
    pub fn stop(&mut self, reason: impl Into<String>) {
        self.stop.get_or_insert_with(|| reason.into());
    }

    /// Why the loop has been asked to end, if it has.
    pub fn stopped(&self) -> Option<&str> {
        self.stop.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_order_and_the_missing_are_named() {
        let mut metrics: Metrics = [("b", 1.0), ("a", 2.0), ("b", 3.0)].into_iter().collect();
        metrics.set("c", f64::NAN);
        let names: Vec<_> = metrics.iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(names, ["b", "a", "c"]);
        assert_eq!((metrics.get("b"), metrics.get("d")), (Some(3.0), None));
        let error = metrics.require("d", "EarlyStopping").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("EarlyStopping looks for the metric 'd'")
        );
        assert!(error.to_string().contains("\"a\""), "{error}");
    }

    #[test]
    fn the_first_reason_to_stop_stays() {
        let mut state = LoopState::default();
        let mut moment = state.moment();
        moment.stop("first");
        moment.stop("second");
        assert_eq!(moment.stopped(), Some("first"));
        assert_eq!(state.stopped(), Some("first"));
        state.resume();
        assert_eq!(state.stopped(), None);
    }
}
