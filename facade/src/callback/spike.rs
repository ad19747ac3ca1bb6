//! A callback that ends training when the loss jumps, and says which batches to leave out next time.

use std::{collections::VecDeque, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    Callback, Mode, Moment,
    monitor::{from_state, to_state},
};
use crate::{Error, Fabric, ReduceOp, Result, logger::replace_file};

const FILE: &str = "skip_batches.json";

/// Looks at the loss of every batch, from batch `warmup` on. A loss is a spike when it is not finite, or when it is no better
/// than the one before, and at least `atol`, and at least `rtol` times the mean of the last `window` losses, away from that
/// mean. Each rank looks at its own; one rank's spike ends training on all, with a [`TrainingSpike`], after the numbers of the
/// batch and of the one before, whose update may have caused it, were added to `skip_batches.json`.
///
/// ```
/// use fabric::{Fabric, callback::{Hook, LoopState, SpikeDetection, TrainingSpike}};
///
/// let folder = tempfile::tempdir()?;
/// let fabric = Fabric::builder().callback(SpikeDetection::new(folder.path())).build()?;
/// let error = fabric.launch(|fabric| {
///     let mut state = LoopState::default();
///     for (batch, loss) in [1.0, 0.5, 0.25, 3.0].into_iter().enumerate() {
///         fabric.notify(Hook::TrainBatchEnd, &mut state.moment().loss(loss).batch(batch as u64))?;
///     }
///     Ok(())
/// }).unwrap_err();
/// assert_eq!(error.downcast_ref::<TrainingSpike>(), Some(&TrainingSpike { batch: 3 }));
/// let skip: Vec<u64> = serde_json::from_slice(&std::fs::read(folder.path().join("skip_batches.json"))?)?;
/// assert_eq!(skip, [2, 3]);
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SpikeDetection {
    path: PathBuf,
    mode: Mode,
    window: usize,
    warmup: u64,
    atol: Option<f64>,
    rtol: Option<f64>,
    finite_only: bool,
    state: State,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    last: Option<f64>,
    recent: VecDeque<f64>, // finite
    bad_batches: Vec<u64>,
}

/// The loss has jumped, on this rank or another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Training spike detected in batch {batch}")]
pub struct TrainingSpike {
    /// In which batch.
    pub batch: u64,
}

impl SpikeDetection {
    /// Lightning's rule: small losses are good, a window of 10, a warm-up of 1, no `atol`, an `rtol` of 2, finite losses only.
    /// `path` is a file that ends in `.json`, or the folder of `skip_batches.json`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let is_file = path.extension().is_some_and(|ending| ending == "json");
        Self {
            path: if is_file { path } else { path.join(FILE) },
            mode: Mode::Min,
            window: 10,
            warmup: 1,
            atol: None,
            rtol: Some(2.0),
            finite_only: true,
            state: State::default(),
        }
    }

    /// Whether small or large values are good.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// Over how many batches the mean is taken, 1 at least.
    pub fn window(mut self, batches: usize) -> Self {
        self.window = batches.max(1);
        self
    }

    /// The first batch that is looked at.
    pub fn warmup(mut self, batch: u64) -> Self {
        self.warmup = batch;
        self
    }

    /// How far from the mean a spike is at least; `None` for as near as you like.
    pub fn atol(mut self, distance: Option<f64>) -> Self {
        self.atol = distance;
        self
    }

    /// How far from the mean a spike is at least, in means; `None` for as near as you like.
    pub fn rtol(mut self, means: Option<f64>) -> Self {
        self.rtol = means;
        self
    }

    /// Whether a loss that is not finite is a spike.
    pub fn finite_only(mut self, only: bool) -> Self {
        self.finite_only = only;
        self
    }

    /// The batches to leave out, so far.
    pub fn bad_batches(&self) -> &[u64] {
        &self.state.bad_batches
    }

    fn is_spike(&self, loss: f64) -> bool {
        if self.finite_only && !loss.is_finite() {
            return true;
        }
        let no_worse = self.state.last.is_some_and(|last| match self.mode {
            Mode::Min => loss - last <= 0.0,
            Mode::Max => loss - last >= 0.0,
        });
        if no_worse || self.state.recent.is_empty() {
            return false;
        }
        let sum: f64 = self.state.recent.iter().sum();
        let mean = sum / self.state.recent.len() as f64;
        let distance = (loss - mean).abs(); // NaN is no distance
        let is_far = |least: f64| distance >= least.abs();
        self.atol.is_none_or(is_far) && self.rtol.is_none_or(|rtol| is_far(rtol * mean))
    }

    fn remember(&mut self, loss: f64) {
        if self.state.recent.len() == self.window {
            self.state.recent.pop_front();
        }
        self.state.recent.push_back(loss);
        self.state.last = Some(loss);
    }

    fn exclude(&mut self, fabric: &Fabric, batch: u64) -> Result<()> {
        self.state.bad_batches.extend(batch.checked_sub(1));
        self.state.bad_batches.push(batch);
        match fabric.is_global_zero() {
            true => self.add_to_file(),
            false => Ok(()),
        }
    }

    /// Those that earlier runs have found stay: a run that begins anew, or before the spike, knows nothing of them.
    fn add_to_file(&self) -> Result<()> {
        let mut all: Vec<u64> = match std::fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                Error::argument(
                    format!("{} is no list of batches: {error}", self.path.display()),
                    "Move that file away, or give SpikeDetection another path",
                )
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        for batch in &self.state.bad_batches {
            if !all.contains(batch) {
                all.push(*batch);
            }
        }
        replace_file(&self.path, &serde_json::to_vec_pretty(&all)?)
    }
}

impl Callback for SpikeDetection {
    fn on_train_batch_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        let last = moment.progress.batches.saturating_sub(1);
        let batch = moment.batch.unwrap_or(last);
        let spikes = batch >= self.warmup && moment.loss.is_some_and(|loss| self.is_spike(loss));
        let odd = !moment.loss.is_some_and(f64::is_finite);
        // One collective: has any rank a spike, has any a loss that must not be remembered, has any none?
        let mut word = [spikes, odd, moment.loss.is_none()].map(f64::from).to_vec();
        fabric.all_reduce(&mut word, ReduceOp::Max)?;
        if word[2] > 0.0 {
            return Err(Error::argument(
                "SpikeDetection was shown no loss",
                "Show it: fabric.notify(Hook::TrainBatchEnd, &mut state.moment().loss(loss))",
            ));
        }
        if word[0] > 0.0 {
            self.exclude(fabric, batch)?;
            return Err(TrainingSpike { batch }.into());
        }
        if let (Some(loss), true) = (moment.loss, word[1] == 0.0) {
            self.remember(loss);
        }
        Ok(())
    }

    fn twin(&self) -> Option<Box<dyn Callback>> {
        Some(Box::new(self.clone()))
    }

    fn state(&self) -> Result<serde_json::Value> {
        to_state(&self.state)
    }

    fn load_state(&mut self, state: &serde_json::Value) -> Result<()> {
        self.state = from_state(self.name(), state)?;
        while self.state.recent.len() > self.window {
            self.state.recent.pop_front();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callback::{Hook, LoopState};

    fn run(mut detection: SpikeDetection, losses: &[f64]) -> Option<usize> {
        losses.iter().enumerate().find_map(|(batch, loss)| {
            let is_spike = batch as u64 >= detection.warmup && detection.is_spike(*loss);
            detection.remember(*loss);
            is_spike.then_some(batch)
        })
    }

    // UTIL-20, line 59: what upstream leaves untested
    #[test]
    fn the_rules_one_by_one() {
        let new = || SpikeDetection::new("x");
        for (name, detection, losses, spike) in [
            ("falling", new(), &[3.0, 2.0, 1.0][..], None),
            ("near", new(), &[1.0, 1.0, 2.9], None),
            ("far", new(), &[1.0, 1.0, 3.0], Some(2)),
            (
                "warm-up",
                new().warmup(3),
                &[1.0, 9.0, 40.0, 200.0],
                Some(3),
            ),
            (
                "max",
                new().mode(Mode::Max),
                &[1.0, 9.0, 90.0, -200.0],
                Some(3),
            ),
            (
                "atol",
                new().atol(Some(-5.0)),
                &[1.0, 1.0, 3.0, 20.0],
                Some(3),
            ),
            ("rtol", new().rtol(Some(0.5)), &[1.0, 1.4, 1.8], Some(2)),
            ("neither", new().rtol(None), &[1.0, 1.0, 1.1], Some(2)),
            ("window", new().window(2), &[9.0, 1.0, 1.0, 3.0], Some(3)),
            ("no window", new().window(9), &[9.0, 1.0, 1.0, 3.0], None),
            ("NaN", new().finite_only(false), &[1.0, f64::NAN], None),
            (
                "infinite",
                new().finite_only(false),
                &[1.0, f64::INFINITY],
                Some(1),
            ),
            ("first", new().warmup(0), &[1.0, 0.5], None),
            ("first NaN", new().warmup(0), &[f64::NAN], Some(0)),
        ] {
            assert_eq!(run(detection, losses), spike, "{name}");
        }
    }

    // UTIL-20, line 59: the run that a spike has ended is begun again, from before the spike or anew.
    #[test]
    fn a_later_run_adds_to_the_batches_to_leave_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        for (spike, expected) in [
            (3, vec![2, 3]),
            (7, vec![2, 3, 6, 7]),
            (7, vec![2, 3, 6, 7]),
        ] {
            let fabric = Fabric::builder().callback(SpikeDetection::new(folder.path()));
            let outcome = fabric.devices(1).build().unwrap().launch(|fabric| {
                let mut state = LoopState::default();
                for batch in 0..=spike {
                    let loss = if batch == spike { 9.0 } else { 1.0 };
                    let mut moment = state.moment().loss(loss).batch(batch);
                    fabric.notify(Hook::TrainBatchEnd, &mut moment)?;
                }
                Ok(())
            });
            let error = outcome.unwrap_err();
            assert_eq!(error.downcast_ref(), Some(&TrainingSpike { batch: spike }));
            let skip: Vec<u64> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            assert_eq!(skip, expected);
        }
        std::fs::write(&path, "nonsense").unwrap();
        let fabric = Fabric::builder().devices(1).build().unwrap();
        let outcome = fabric.launch(|fabric| SpikeDetection::new(&path).exclude(fabric, 1));
        assert!(outcome.unwrap_err().to_string().contains(FILE));
        assert_eq!(
            std::fs::read(&path).unwrap(),
            b"nonsense",
            "not overwritten"
        );
    }

    // UTIL-20, BUG-11, line 59
    #[test]
    fn its_state_comes_back() {
        let mut first = SpikeDetection::new("runs");
        assert!(first.path.ends_with("runs/skip_batches.json"));
        assert!(
            SpikeDetection::new("runs/x.json")
                .path
                .ends_with("runs/x.json")
        );
        [1.0, 0.5, 0.25]
            .into_iter()
            .for_each(|loss| first.remember(loss));
        first.state.bad_batches = vec![6, 7];
        let mut second = SpikeDetection::new("runs").window(2);
        second.load_state(&first.state().unwrap()).unwrap();
        assert_eq!(second.state.recent, [0.5, 0.25]);
        assert_eq!(
            (second.state.last, second.bad_batches()),
            (Some(0.25), &[6, 7][..])
        );
        assert!(second.is_spike(1.2) && !second.is_spike(0.3));
    }
}
