//! A callback that ends training when a metric no longer gets better.

use serde::{Deserialize, Serialize};

use super::{
    Callback, Mode, Moment,
    monitor::{from_state, to_state},
};
use crate::{Fabric, Result, number::Number};

/// Asks for the end, on all ranks, when the metric `monitor` has not become better in `patience` looks, is not finite, or
/// has passed a threshold. A rank looks at its own number; what one rank finds counts for all.
///
/// ```
/// use fabric::{Fabric, callback::{EarlyStopping, Hook, LoopState}};
///
/// let fabric = Fabric::builder().callback(EarlyStopping::new("val_loss").patience(2)).build()?;
/// fabric.launch(|fabric| {
///     let (mut state, mut looks) = (LoopState::default(), 0);
///     for val_loss in [0.5, 0.25, 0.3, 0.25, 0.1] {
///         state.metrics.set("val_loss", val_loss);
///         fabric.notify(Hook::ValidationEnd, &mut state.moment())?;
///         looks += 1;
///         if state.stopped().is_some() {
///             break;
///         }
///     }
///     assert_eq!((looks, state.stopped()), (4, Some("val_loss has not become better than 0.25 in 2 looks")));
///     Ok(())
/// })?;
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EarlyStopping {
    monitor: String,
    mode: Mode,
    patience: u64,
    min_delta: f64,
    stopping_threshold: Option<f64>,
    divergence_threshold: Option<f64>,
    check_finite: bool,
    at_epoch_end: bool,
    state: State,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    best: Option<Number>,
    waited: u64,
}

impl EarlyStopping {
    /// Watch `monitor`, of which small values are good, at the end of each validation, with a patience of 3.
    pub fn new(monitor: &str) -> Self {
        Self {
            monitor: monitor.into(),
            mode: Mode::Min,
            patience: 3,
            min_delta: 0.0,
            stopping_threshold: None,
            divergence_threshold: None,
            check_finite: true,
            at_epoch_end: false,
            state: State::default(),
        }
    }

    /// Whether small or large values are good.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// How many looks without a better value are one too many.
    pub fn patience(mut self, looks: u64) -> Self {
        self.patience = looks;
        self
    }

    /// By more than what a value has to be better.
    pub fn min_delta(mut self, delta: f64) -> Self {
        self.min_delta = delta.abs();
        self
    }

    /// A value that is good enough.
    pub fn stopping_threshold(mut self, value: f64) -> Self {
        self.stopping_threshold = Some(value);
        self
    }

    /// A value so bad that all hope is lost.
    pub fn divergence_threshold(mut self, value: f64) -> Self {
        self.divergence_threshold = Some(value);
        self
    }

    /// Whether NaN and infinities end training; they do.
    pub fn check_finite(mut self, check: bool) -> Self {
        self.check_finite = check;
        self
    }

    /// Look at the end of each epoch of training, and not at the end of validations.
    pub fn at_train_epoch_end(mut self) -> Self {
        self.at_epoch_end = true;
        self
    }

    /// The best value so far, on this rank.
    pub fn best(&self) -> Option<f64> {
        self.state.best.map(|Number(best)| best)
    }

    /// Looks since then.
    pub fn waited(&self) -> u64 {
        self.state.waited
    }

    /// Look, agree, and ask for the end if need be.
    fn look(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        let value = moment.metrics.require(&self.monitor, "EarlyStopping");
        let own = match &value {
            Ok(value) => self.verdict(*value),
            Err(error) => Some(error.to_string()), // the other ranks wait to hear of it
        };
        let all = fabric.all_gather_object(&own)?;
        value?;
        let first = all
            .into_iter()
            .enumerate()
            .find_map(|(rank, reason)| Some((rank, reason?)));
        match (own, first) {
            (Some(reason), _) => moment.stop(reason),
            (None, Some((rank, reason))) => moment.stop(format!("rank {rank}: {reason}")),
            (None, None) => {}
        }
        Ok(())
    }

    /// Why this rank should stop, if it should.
    fn verdict(&mut self, value: f64) -> Option<String> {
        let (name, mode) = (&self.monitor, self.mode);
        if self.check_finite && !value.is_finite() {
            return Some(format!("{name} is {value}"));
        }
        if let Some(threshold) = self.stopping_threshold
            && mode.is_better(value, threshold, 0.0)
        {
            return Some(format!("{name} is {value}, better than {threshold}"));
        }
        if let Some(threshold) = self.divergence_threshold
            && mode.is_better(threshold, value, 0.0)
        {
            return Some(format!("{name} is {value}, worse than {threshold}"));
        }
        let best = self.state.best.map_or(f64::NAN, |Number(best)| best);
        if mode.is_better(value, best, self.min_delta) {
            self.state = State {
                best: Some(Number(value)),
                waited: 0,
            };
            return None;
        }
        self.state.waited += 1;
        let looks = self.state.waited;
        (looks >= self.patience)
            .then(|| format!("{name} has not become better than {best} in {looks} looks"))
    }
}

impl Callback for EarlyStopping {
    fn on_validation_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        match self.at_epoch_end {
            true => Ok(()),
            false => self.look(fabric, moment),
        }
    }

    fn on_train_epoch_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        match self.at_epoch_end {
            true => self.look(fabric, moment),
            false => Ok(()),
        }
    }

    fn twin(&self) -> Option<Box<dyn Callback>> {
        Some(Box::new(self.clone()))
    }

    fn state(&self) -> Result<serde_json::Value> {
        to_state(&self.state)
    }

    fn load_state(&mut self, state: &serde_json::Value) -> Result<()> {
        self.state = from_state(self.name(), state)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At which look training ends, and why.
    fn looks(mut stopping: EarlyStopping, values: &[f64]) -> (usize, Option<String>) {
        for (index, value) in values.iter().enumerate() {
            if let Some(reason) = stopping.verdict(*value) {
                return (index, Some(reason));
            }
        }
        (values.len(), None)
    }

    #[test]
    fn each_rule_has_its_reason() {
        let new = || EarlyStopping::new("x").patience(2);
        for (stopping, values, at, reason) in [
            (new(), &[3.0, 2.0, 1.0, 0.5][..], 4, None),
            (
                new(),
                &[1.0, 1.0, 1.0],
                2,
                Some("not become better than 1 in 2 looks"),
            ),
            (
                new().min_delta(-0.5),
                &[1.0, 0.6, 0.55],
                2,
                Some("better than 1"),
            ),
            (
                new().mode(Mode::Max),
                &[1.0, 2.0, 0.0, 1.5],
                3,
                Some("better than 2"),
            ),
            (new(), &[1.0, f64::INFINITY], 1, Some("x is inf")),
            (new(), &[f64::NAN], 0, Some("x is NaN")),
            (
                new().check_finite(false),
                &[f64::NAN, 1.0, f64::NAN, f64::NAN],
                3,
                Some("2 looks"),
            ),
            (
                new().stopping_threshold(0.1),
                &[1.0, 0.1, 0.09],
                2,
                Some("better than 0.1"),
            ),
            (
                new().divergence_threshold(9.0),
                &[8.0, 10.0],
                1,
                Some("worse than 9"),
            ),
        ] {
            let (stopped, why) = looks(stopping, values);
            assert_eq!(stopped, at, "{values:?}: {why:?}");
            let why = why.unwrap_or_default();
            assert!(why.contains(reason.unwrap_or_default()), "{why}");
        }
    }

    #[test]
    fn patience_survives_a_restart() {
        let mut first = EarlyStopping::new("x").patience(3).check_finite(false);
        assert!(first.verdict(f64::NEG_INFINITY).is_none() && first.verdict(1.0).is_none());
        let mut second = EarlyStopping::new("x").patience(3).check_finite(false);
        second.load_state(&first.state().unwrap()).unwrap();
        assert_eq!(
            (second.best(), second.waited()),
            (Some(f64::NEG_INFINITY), 1)
        );
        assert!(second.verdict(1.0).is_none());
        assert!(second.verdict(1.0).is_some());
        assert!(
            second
                .load_state(&serde_json::json!({"best": "x"}))
                .is_err()
        );
    }
}
