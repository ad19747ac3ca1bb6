//! Checkpoints: models, optimizers and values by name, saved by all ranks together and loaded by all, under any strategy
//! and in any number.
//!
//! There are two forms, and [`Fabric::load`] recognises both. `"full"` is one safetensors file, which rank 0 writes; what
//! only others hold comes to it a few megabytes at a time. `"sharded"` is a folder: each rank writes the elements that it
//! holds, and of what several hold, one of them writes it; `manifest.json` says which elements of which tensor stand in
//! which file. Nothing in either form depends on who wrote it:
//!
//! ```text
//! saved under fsdp on 2 ranks                     loaded under fsdp on 3
//!   rank-00000.safetensors  model.w[0..18]  ---->   rank 0 reads  0..12
//!                                           \-->   rank 1 reads 12..24, from both files
//!   rank-00001.safetensors  model.w[18..36] --/->   rank 2 reads 24..36
//!   manifest.json           model.w: f32 [6, 6], two pieces
//! ```
//!
//! [`consolidate`] makes the one file of a folder, without ranks, and [`inspect`] says what either holds; `fabric consolidate` and
//! `fabric inspect` do so on the command line.
//!
//! Where parameters are updated in a wider type than the model computes with, that type is saved, and loaded again. A
//! checkpoint may hold floats of fewer bits than are needed, which lose nothing; a rounded value is never loaded.
//!
//! Either form is written beside its place, synced, and renamed: under its name stands a whole checkpoint, or the one
//! before. What a killed job leaves is called `.NAME.tmp-XXXXXX` and can be removed.

mod catalog;
mod consolidate;
mod dtype;
mod file;
mod holding;
mod inspect;
mod load;
mod manifest;
mod place;
mod save;
mod states;
mod stored;
mod values;

use std::{collections::HashMap, path::Path, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

pub use consolidate::{consolidate, consolidate_with};
pub use inspect::{ListedPiece, ListedTensor, Listing, inspect};

use crate::{
    callback::Ema,
    error::{Error, Result},
    fabric::{Fabric, FabricOptimizer},
    model::{Core, FabricModule, Model},
    optim::Optimizer,
};
use states::Stateful;
use values::Saved;

const VALUES: &str = "fabric"; // the name under which values stand in the metadata of the one file
const CHUNK_BYTES: usize = 4 << 20; // of a tensor, read or written at once

/// The form in which `fabric.save` writes a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateDictType {
    /// One safetensors file, written by rank 0.
    Full,
    /// A folder to which every rank writes what it holds.
    Sharded,
}

impl StateDictType {
    /// Read "full" or "sharded", in any case.
    ///
    /// # Errors
    /// When the text is neither.
    pub fn parse(text: &str) -> Result<Self> {
        match text.trim().to_ascii_lowercase().as_str() {
            "full" => Ok(Self::Full),
            "sharded" => Ok(Self::Sharded),
            _ => Err(Error::argument(
                format!("state_dict_type '{text}' is not known"),
                "Choose one of full, sharded",
            )),
        }
    }
}

impl std::fmt::Display for StateDictType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Full => "full",
            Self::Sharded => "sharded",
        })
    }
}

/// What a checkpoint holds, by name: models, optimizers, and values that serde knows.
///
/// ```no_run
/// # use fabric::{Fabric, State, vec::VecModel, optim::Sgd};
/// # fn example(fabric: &Fabric) -> fabric::Result<()> {
/// let (model, mut optimizer) = fabric.setup(VecModel::new([("w", vec![0f32; 4])]), Sgd::new(0.1))?;
/// let mut step = 100u64;
/// let state = State::new().model("model", &model).optimizer("optimizer", &mut optimizer).value("step", &mut step);
/// fabric.save("out/last.safetensors", state)?;
/// # Ok(()) }
/// ```
#[derive(Default)]
pub struct State<'a> {
    entries: Vec<(String, Entry<'a>)>,
    filters: Filters<'a>,
    is_lenient: bool,
}

/// Whether a tensor, by its name in its entry, is saved or loaded; by the entry's name.
#[derive(Default)]
struct Filters<'a>(HashMap<String, Keep<'a>>);

type Keep<'a> = Box<dyn Fn(&str) -> bool + 'a>;

impl Filters<'_> {
    /// Whether the tensor `own` of the entry `name` is meant.
    fn keeps(&self, name: &str, own: &str) -> bool {
        self.0.get(name).is_none_or(|keep| keep(own))
    }
}

enum Entry<'a> {
    Model(Arc<Core>),
    Optimizer(Box<dyn Stateful + 'a>),
    Value(&'a mut dyn Saved),
}

impl<'a> State<'a> {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Add a model: its parameters are called `name.parameter`.
    pub fn model<M: Model>(mut self, name: &str, module: &'a FabricModule<M>) -> Self {
        let entry = Entry::Model(module.core.clone());
        self.entries.push((name.into(), entry));
        self
    }

    /// Add an optimizer's state.
    pub fn optimizer<O: Optimizer>(
        mut self,
        name: &str,
        optimizer: &'a mut FabricOptimizer<O>,
    ) -> Self {
        let entry = Entry::Optimizer(Box::new(optimizer));
        self.entries.push((name.into(), entry));
        self
    }

    /// Add a moving average of a model's parameters.
    pub fn average<M: Model>(
        mut self,
        name: &str,
        ema: &'a mut Ema,
        module: &'a FabricModule<M>,
    ) -> Self {
        let model = module.view();
        let entry = Entry::Optimizer(Box::new(states::AverageOf { ema, model }));
        self.entries.push((name.into(), entry));
        self
    }

    /// Add a value; loading writes it back.
    pub fn value<T: Serialize + DeserializeOwned>(mut self, name: &str, value: &'a mut T) -> Self {
        self.entries.push((name.into(), Entry::Value(value)));
        self
    }

    /// Save, or load, only those tensors of the model or optimizer called `name` whose own name passes `keep`:
    /// `|param| param.starts_with("adapter.")`. All ranks give the same.
    pub fn filter(mut self, name: &str, keep: impl Fn(&str) -> bool + 'a) -> Self {
        self.filters.0.insert(name.into(), Box::new(keep));
        self
    }

    /// Whether everything must be in a checkpoint that is loaded, as it must unless told. What is not there, of the entries
    /// and of a model's parameters, stays as it is.
    pub fn strict(mut self, strict: bool) -> Self {
        self.is_lenient = !strict;
        self
    }

    /// Everything needs a name of its own, and whatever has tensors one that begins no other's; a filter needs tensors.
    fn check_names(&self) -> Result<()> {
        for name in self.filters.0.keys() {
            let mut entries = self.entries.iter();
            if !entries.any(|(known, entry)| known == name && entry.has_tensors()) {
                return Err(Error::argument(
                    format!(
                        "a filter for '{name}', which is no model and no optimizer of this state"
                    ),
                    "Give filter the name under which the model or optimizer was added",
                ));
            }
        }
        for (index, (name, entry)) in self.entries.iter().enumerate() {
            for (other, twin) in &self.entries[index + 1..] {
                let what = if name == other {
                    format!("two things in a checkpoint are called '{name}'")
                } else if entry.has_tensors() && twin.has_tensors() && is_inside(name, other) {
                    format!(
                        "the tensors of '{name}' and '{other}' have the same names in a checkpoint"
                    )
                } else {
                    continue;
                };
                return Err(Error::argument(what, "Choose other names"));
            }
        }
        Ok(())
    }
}

impl Entry<'_> {
    fn has_tensors(&self) -> bool {
        !matches!(self, Self::Value(_))
    }
}

/// The name of a tensor of the entry `name`; a nameless entry adds nothing to it.
fn joined(name: &str, own: &str) -> String {
    match name {
        "" => own.into(),
        _ => format!("{name}.{own}"),
    }
}

/// Is one of the two the other's, a dot and more?
fn is_inside(name: &str, other: &str) -> bool {
    let below = |long: &str, short: &str| {
        long.strip_prefix(short)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    below(name, other) || below(other, name)
}

impl Fabric {
    /// Write a checkpoint, in the form that [`crate::Builder::state_dict_type`] has chosen. All ranks call this with the
    /// same names; values are rank 0's, and so is the path. When it returns the checkpoint is whole and on the disk. A
    /// checkpoint that has the name already, in either form, is replaced whole.
    ///
    /// A sharded checkpoint is written by all ranks to one file system, which they share.
    ///
    /// # Errors
    /// On all ranks, when one cannot write: what had the name before is then untouched, and nothing new is left.
    pub fn save(&self, path: impl AsRef<Path>, state: State<'_>) -> Result<()> {
        self.comm()?; // before launch nothing is written
        self.write(path.as_ref(), &state)
    }

    /// Go on from a checkpoint of either form, on all ranks, whatever strategy and number of ranks has saved it. Each rank
    /// reads what it needs. Everything in `state` must be in the checkpoint; what else it holds as values is returned.
    /// Nothing is changed unless everything fits, on all ranks.
    ///
    /// # Errors
    /// On all ranks, when one cannot read the checkpoint or something does not fit; and when a disk fails after that, which
    /// ends the job: parameters may then be half loaded.
    pub fn load(&self, path: impl AsRef<Path>, state: State<'_>) -> Result<HashMap<String, Value>> {
        self.comm()?;
        self.read(path.as_ref(), state)
    }

    /// Load a model from a safetensors file that knows nothing of Fabric, such as a published one: its tensors are called like
    /// the parameters. All ranks call this; each reads what it needs. With `strict` false, parameters that are not in the file
    /// stay as they are. Returns the names in the file that the model does not have.
    ///
    /// # Errors
    /// As [`Fabric::load`].
    pub fn load_raw<M: Model>(
        &self,
        path: impl AsRef<Path>,
        module: &FabricModule<M>,
        strict: bool,
    ) -> Result<Vec<String>> {
        self.comm()?;
        self.read_raw(path.as_ref(), State::new().model("", module).strict(strict))
    }

    /// `own`, when every rank has one and the same number; otherwise the own error, or the first rank's that failed.
    fn agree_on<T>(&self, doing: &str, path: &Path, number: u64, own: Result<T>) -> Result<T> {
        let failure = own.as_ref().err().map(Error::to_string);
        // Disks are slower than collectives may be.
        let all = self.wait_for_all();
        let all = all.and_then(|()| self.all_gather_object(&(failure, number)));
        let is_trouble = |all: &Vec<(Option<String>, u64)>| {
            all.iter()
                .any(|(failure, other)| failure.is_some() || *other != all[0].1)
        };
        if all.as_ref().is_ok_and(is_trouble) {
            // A rank that leaves with its error ends the job: not before all have read whose it is.
            let _ = self.barrier();
        }
        let own = own?; // the first cause
        let all = all?;
        for (rank, (failure, _)) in all.iter().enumerate() {
            if let Some(what) = failure {
                return Err(save::failed(rank, doing, path, what));
            }
        }
        match all.iter().position(|(_, other)| *other != all[0].1) {
            None => Ok(own),
            Some(rank) => Err(Error::argument(
                format!(
                    "rank {rank} holds other tensors than rank 0 for {}",
                    path.display()
                ),
                "Set up the same models and optimizers on all ranks",
            )),
        }
    }
}
