//! A callback that saves the loop's state now and then, and keeps the best of it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    Callback, Mode, Moment,
    monitor::{from_state, to_state},
};
use crate::{Error, Fabric, Result, logger::replace_file, number::Number, rank_zero};

const LAST: &str = "last";
const RECORD: &str = "checkpoints.json";
const ENDING: &str = ".ckpt";

/// Saves, by the loop's own way ([`Moment::save`]), into a folder, and keeps the `save_top_k` checkpoints with the best value of
/// a metric, or the latest where none is monitored. An old one is removed when the new one is whole and on the disk, and not
/// before. `last` in the folder is a link to the newest, from which [`ModelCheckpoint::latest`] lets a program go on.
///
/// What is decided is rank 0's decision, by its own numbers. What the folder holds stands in `checkpoints.json` there, so that
/// a run that goes on ([`Fabric::load_callback_states`]) goes on removing; a new run leaves other runs' files alone. Several may
/// share a folder when they save at other times, or by another metric. A name that is taken gets `-v1`, `-v2`, ... behind it.
///
/// ```no_run
/// use fabric::{Fabric, callback::{Mode, ModelCheckpoint}};
///
/// let keep = ModelCheckpoint::new("out").monitor("val_accuracy", Mode::Max).save_top_k(3);
/// let fabric = Fabric::builder().callback(keep.filename("{epoch}-{val_accuracy}")).build()?;
/// if let Some(path) = ModelCheckpoint::latest("out")? {
///     // fabric.load(path, state)?
/// }
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ModelCheckpoint {
    folder: PathBuf,
    filename: String,
    monitor: Option<(String, Mode)>,
    top: Option<usize>,
    keep_last: bool,
    when: When,
    state: State,
    saved_at: Option<u64>, // the step
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Steps(u64),
    Epochs(u64),
    Validations,
}

/// What the folder holds, the oldest first.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    kept: Vec<Kept>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Kept {
    name: String,
    score: Option<Number>,
}

/// What rank 0 has decided.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Decision {
    Save(Kept),
    Leave,
    Refuse(String),
}

impl ModelCheckpoint {
    /// Save into `folder` at the end of each epoch, and keep the latest.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            filename: "epoch={epoch}-step={step}".into(),
            monitor: None,
            top: Some(1),
            keep_last: true,
            when: When::Epochs(1),
            state: State::default(),
            saved_at: None,
        }
    }

    /// Keep those with the best values of this metric, which the loop's metrics have whenever something is to be saved.
    pub fn monitor(mut self, metric: &str, mode: Mode) -> Self {
        self.monitor = Some((metric.into(), mode));
        self
    }

    /// How many to keep.
    pub fn save_top_k(mut self, count: usize) -> Self {
        self.top = Some(count);
        self
    }

    /// Keep all.
    pub fn keep_all(mut self) -> Self {
        self.top = None;
        self
    }

    /// Whether the newest is kept beside the best, with a link called `last`; it is.
    pub fn save_last(mut self, wanted: bool) -> Self {
        self.keep_last = wanted;
        self
    }

    /// Save every so many steps of the optimizer, after the batch.
    pub fn every_n_steps(mut self, steps: u64) -> Self {
        self.when = When::Steps(steps.max(1));
        self
    }

    /// Save at the end of every so many epochs.
    pub fn every_n_epochs(mut self, epochs: u64) -> Self {
        self.when = When::Epochs(epochs.max(1));
        self
    }

    /// Save at the end of each validation.
    pub fn after_validation(mut self) -> Self {
        self.when = When::Validations;
        self
    }

    /// Names: `{epoch}`, `{step}` and `{METRIC}` are replaced by numbers, and `.ckpt` comes behind.
    pub fn filename(mut self, pattern: &str) -> Self {
        self.filename = pattern.into();
        self
    }

    /// The best so far, by the metric, or the latest without one.
    pub fn best_path(&self) -> Option<PathBuf> {
        let best = self
            .state
            .kept
            .iter()
            .reduce(|best, kept| match self.is_better(kept, best) {
                true => kept,
                false => best,
            });
        best.map(|kept| self.folder.join(&kept.name))
    }

    /// The newest.
    pub fn last_path(&self) -> Option<PathBuf> {
        let last = self.state.kept.last();
        last.map(|kept| self.folder.join(&kept.name))
    }

    /// The newest checkpoint in `folder`, to go on from: where `last` leads, else the one with the highest step in its name.
    ///
    /// # Errors
    /// When the folder is there and cannot be read.
    pub fn latest(folder: impl AsRef<Path>) -> Result<Option<PathBuf>> {
        let folder = folder.as_ref();
        if let Ok(name) = fs::read_link(folder.join(LAST)) {
            let path = folder.join(name);
            if path.exists() {
                return Ok(Some(path));
            }
        }
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", folder, &error)),
        };
        let mut found = None;
        for entry in entries {
            let name = entry
                .map_err(|error| failed("read", folder, &error))?
                .file_name();
            let step = name.to_str().and_then(step_in);
            found = found.max(step.map(|step| (step, folder.join(&name))));
        }
        Ok(found.map(|(_, path)| path))
    }

    /// Is one better than another, which is older? Of equals the older is.
    fn is_better(&self, kept: &Kept, than: &Kept) -> bool {
        let score = |kept: &Kept| kept.score.map_or(f64::NAN, |Number(score)| score);
        match &self.monitor {
            Some((_, mode)) => mode.is_better(score(kept), score(than), 0.0),
            None => true,
        }
    }

    /// Those that a new one would leave no room for, by number: of the old ones and it.
    fn surplus(&self, new: &Kept) -> Vec<usize> {
        let Some(top) = self.top else {
            return Vec::new();
        };
        let all: Vec<&Kept> = self.state.kept.iter().chain([new]).collect();
        let mut order: Vec<usize> = Vec::new(); // the best first
        for index in 0..all.len() {
            let worse = |other: &usize| self.is_better(all[index], all[*other]);
            let place = order.iter().position(worse).unwrap_or(order.len());
            order.insert(place, index);
        }
        let newest = all.len() - 1;
        let surplus = order.into_iter().skip(top);
        surplus
            .filter(|index| !self.keep_last || *index != newest)
            .collect()
    }

    fn decide(&self, moment: &Moment<'_>) -> Decision {
        let score = match &self.monitor {
            None => None,
            Some((metric, _)) => match moment.metrics.require(metric, "ModelCheckpoint") {
                Ok(score) => Some(Number(score)),
                Err(error) => return Decision::Refuse(error.to_string()),
            },
        };
        let name = self.name_at(moment);
        if name.contains(['/', '{', '}']) || name.starts_with('.') {
            return Decision::Refuse(format!(
                "ModelCheckpoint cannot name a file '{name}'. The loop has the names epoch, step, and its metrics'"
            ));
        }
        let mut kept = Kept { name, score };
        let surplus = self.surplus(&kept);
        if surplus.contains(&self.state.kept.len()) {
            return Decision::Leave;
        }
        let is_again = step_in(&kept.name) == Some(moment.progress.steps);
        let own = self.state.kept.iter().enumerate();
        let replaceable = own.filter(|(index, _)| is_again || surplus.contains(index));
        let replaceable: Vec<_> = replaceable.map(|(_, old)| &old.name).collect();
        let is_free = |name: &String| {
            replaceable.contains(&name) || self.folder.join(name).symlink_metadata().is_err()
        };
        if !is_free(&kept.name) {
            let stem = kept.name.trim_end_matches(ENDING);
            let mut names = (1u64..).map(|version| format!("{stem}-v{version}{ENDING}"));
            kept.name = names
                .find(is_free)
                .expect("there are fewer files than numbers");
        }
        Decision::Save(kept)
    }

    fn name_at(&self, moment: &Moment<'_>) -> String {
        let mut name = self
            .filename
            .replace("{epoch}", &moment.progress.epoch.to_string());
        name = name.replace("{step}", &moment.progress.steps.to_string());
        for (metric, value) in moment.metrics.iter() {
            name = name.replace(&format!("{{{metric}}}"), &format!("{value:.4}"));
        }
        name + ENDING
    }

    /// Save now, if rank 0 decides so. All ranks call this together.
    fn consider(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        if self.saved_at == Some(moment.progress.steps) {
            return Ok(()); // nothing has changed since
        }
        let kept = match fabric.broadcast(self.decide(moment), 0)? {
            Decision::Save(kept) => kept,
            Decision::Leave => return Ok(()),
            Decision::Refuse(why) => return Err(Error::new(why)),
        };
        let save = moment.save.as_mut().ok_or_else(|| {
            Error::argument(
                "ModelCheckpoint was shown no way to save",
                "Show it: fabric.notify(hook, &mut state.moment().saving(&mut save))",
            )
        })?;
        save(&self.folder.join(&kept.name))?; // whole, on all ranks, when this returns
        self.saved_at = Some(moment.progress.steps);
        self.state.kept.retain(|old| old.name != kept.name);
        let mut surplus = self.surplus(&kept);
        surplus.sort_unstable();
        self.state.kept.push(kept);
        let mut remove = |index| self.state.kept.remove(index);
        let removed: Vec<Kept> = surplus.into_iter().rev().map(&mut remove).collect();
        match fabric.is_global_zero() {
            true => self.tidy(&removed),
            false => Ok(()),
        }
    }

    /// First the link and the record, then remove: whoever is killed in between has too much, never too little.
    fn tidy(&self, removed: &[Kept]) -> Result<()> {
        if let (true, Some(last)) = (self.keep_last, self.state.kept.last()) {
            self.link(&last.name)
                .map_err(|error| failed("link", &self.folder, &error))?;
        }
        let mut records = self.records()?;
        records.insert(self.key(), self.state.clone());
        replace_file(
            &self.folder.join(RECORD),
            &serde_json::to_vec_pretty(&records)?,
        )?;
        for kept in removed {
            let path = self.folder.join(&kept.name);
            let result = match path.symlink_metadata() {
                Ok(entry) if entry.is_dir() => fs::remove_dir_all(&path),
                Ok(_) => fs::remove_file(&path),
                Err(_) => Ok(()), // somebody else has
            };
            if let Err(error) = result {
                let path = path.display();
                rank_zero::rank_zero_warn(format!("an old checkpoint stays: {path}: {error}"));
            }
        }
        Ok(())
    }

    /// Which of the folder's records is this one's: two that share a folder must not take one another's files for their own.
    fn key(&self) -> String {
        match &self.monitor {
            Some((metric, mode)) => format!("{:?} {mode:?} {metric}", self.when),
            None => format!("{:?}", self.when),
        }
    }

    /// What stands in the folder's record.
    fn records(&self) -> Result<BTreeMap<String, State>> {
        match fs::read(self.folder.join(RECORD)) {
            Ok(bytes) => from_state(RECORD, &serde_json::from_slice(&bytes)?),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(failed("read the record", &self.folder, &error)),
        }
    }

    /// In one step.
    fn link(&self, name: &str) -> std::io::Result<()> {
        let temporary = self.folder.join(format!(".{LAST}.{}", std::process::id()));
        let _ = fs::remove_file(&temporary);
        std::os::unix::fs::symlink(name, &temporary)?;
        fs::rename(temporary, self.folder.join(LAST))
    }
}

/// The number behind `step=` in a checkpoint's name.
fn step_in(name: &str) -> Option<u64> {
    let (_, after) = name.strip_suffix(ENDING)?.split_once("step=")?;
    let digits = after
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(after.len());
    after[..digits].parse().ok()
}

fn failed(doing: &str, folder: &Path, error: &std::io::Error) -> Error {
    Error::argument(
        format!(
            "cannot {doing} in the folder of checkpoints {}: {error}",
            folder.display()
        ),
        "Give ModelCheckpoint a folder that this user may write to",
    )
}

impl Callback for ModelCheckpoint {
    fn on_train_batch_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        match self.when {
            When::Steps(every)
                if moment.progress.steps > 0 && moment.progress.steps.is_multiple_of(every) =>
            {
                self.consider(fabric, moment)
            }
            _ => Ok(()),
        }
    }

    fn on_validation_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        match self.when {
            When::Validations => self.consider(fabric, moment),
            _ => Ok(()),
        }
    }

    fn on_train_epoch_end(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        match self.when {
            When::Epochs(every) if (moment.progress.epoch + 1).is_multiple_of(every) => {
                self.consider(fabric, moment)
            }
            _ => Ok(()),
        }
    }

    fn twin(&self) -> Option<Box<dyn Callback>> {
        Some(Box::new(self.clone()))
    }

    fn state(&self) -> Result<serde_json::Value> {
        to_state(&self.state)
    }

    /// The folder's own record is newer than any that stands in a checkpoint.
    fn load_state(&mut self, state: &serde_json::Value) -> Result<()> {
        self.state = from_state(self.name(), state)?;
        if let Some(own) = self.records()?.remove(&self.key()) {
            self.state = own;
        }
        let folder = &self.folder;
        self.state
            .kept
            .retain(|kept| folder.join(&kept.name).exists());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
