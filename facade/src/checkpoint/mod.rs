//! Checkpoints of replicated strategies: models, optimizers and values by name, saved by rank 0 and loaded by all.

mod file;

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::Arc,
};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    error::{Error, Result},
    fabric::{Fabric, FabricOptimizer},
    model::{Core, FabricModule, Model},
    optim::{Optimizer, OptimizerState},
};
use file::{read, write};

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
pub struct State<'a>(Vec<(String, Entry<'a>)>);

enum Entry<'a> {
    Model(Arc<Core>),
    Optimizer(&'a mut dyn Stateful),
    Value(&'a mut dyn Saved),
}

impl<'a> State<'a> {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Add a model: its parameters are called `name.parameter`.
    pub fn model<M: Model>(mut self, name: &str, module: &'a FabricModule<M>) -> Self {
        self.0
            .push((name.into(), Entry::Model(module.core.clone())));
        self
    }

    /// Add an optimizer's state.
    pub fn optimizer<O: Optimizer>(
        mut self,
        name: &str,
        optimizer: &'a mut FabricOptimizer<O>,
    ) -> Self {
        self.0.push((name.into(), Entry::Optimizer(optimizer)));
        self
    }

    /// Add a value; loading writes it back.
    pub fn value<T: Serialize + DeserializeOwned>(mut self, name: &str, value: &'a mut T) -> Self {
        self.0.push((name.into(), Entry::Value(value)));
        self
    }

    /// Everything needs a name of its own, and whatever has tensors one that begins no other's.
    fn check_names(&self) -> Result<()> {
        for (index, (name, entry)) in self.0.iter().enumerate() {
            for (other, twin) in &self.0[index + 1..] {
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

/// Is one of the two the other's, a dot and more?
fn is_inside(name: &str, other: &str) -> bool {
    let below = |long: &str, short: &str| {
        long.strip_prefix(short)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    below(name, other) || below(other, name)
}

/// An optimizer, whatever its type.
trait Stateful {
    fn is_sharded(&self) -> bool;
    fn state(&self) -> Result<OptimizerState>;
    fn check_state(&self, state: &OptimizerState) -> Result<()>;
    fn load_state(&mut self, state: OptimizerState) -> Result<()>;
}

impl<O: Optimizer> Stateful for FabricOptimizer<O> {
    fn is_sharded(&self) -> bool {
        FabricOptimizer::is_sharded(self)
    }
    fn state(&self) -> Result<OptimizerState> {
        FabricOptimizer::state(self)
    }
    fn check_state(&self, state: &OptimizerState) -> Result<()> {
        FabricOptimizer::check_state(self, state)
    }
    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        FabricOptimizer::load_state(self, state)
    }
}

/// The optimizers' states, in the order of the entries; pieces are gathered from all ranks.
fn optimizer_states(state: &State<'_>, zero: bool) -> Result<VecDeque<OptimizerState>> {
    let optimizers = state.0.iter().filter_map(|(_, entry)| match entry {
        Entry::Optimizer(optimizer) => Some(optimizer),
        _ => None,
    });
    let needed = optimizers.filter(|optimizer| zero || optimizer.is_sharded());
    needed.map(|optimizer| optimizer.state()).collect()
}

/// A value, whatever its type.
trait Saved {
    fn to_json(&self, name: &str) -> Result<Value>;
    fn check_json(&self, name: &str, json: &Value) -> Result<()>;
    fn set_json(&mut self, name: &str, json: &Value) -> Result<()>;
}

impl<T: Serialize + DeserializeOwned> Saved for T {
    fn to_json(&self, name: &str) -> Result<Value> {
        let refusal = |why: String| {
            Error::argument(
                format!("the value '{name}' cannot be saved as JSON: {why}"),
                "Store finite numbers, and maps whose keys are text",
            )
        };
        let json = serde_json::to_value(self).map_err(|error| refusal(error.to_string()))?;
        // JSON has no NaN and no infinity: what would not come back is refused now, not after the crash.
        let back = T::deserialize(&json).map_err(|error| refusal(error.to_string()))?;
        if packed_bytes(self) != packed_bytes(&back) {
            return Err(refusal("a number in it would come back as null".into()));
        }
        Ok(json)
    }

    fn check_json(&self, name: &str, json: &Value) -> Result<()> {
        parse::<T>(name, json).map(drop)
    }

    fn set_json(&mut self, name: &str, json: &Value) -> Result<()> {
        *self = parse(name, json)?;
        Ok(())
    }
}

/// How long a value is as MessagePack, which knows NaN: an optional NaN that became nothing is shorter, and the order of
/// a map's entries does not matter.
fn packed_bytes<T: Serialize>(value: &T) -> Option<usize> {
    rmp_serde::to_vec_named(value).ok().map(|bytes| bytes.len())
}

fn parse<T: DeserializeOwned>(name: &str, json: &Value) -> Result<T> {
    T::deserialize(json).map_err(|error| {
        Error::argument(
            format!("the saved value '{name}' has another type: {error}"),
            "Load it into the type that was saved",
        )
    })
}

impl Fabric {
    /// Write a checkpoint: rank 0 writes `path`, the others wait until it is there. An existing file is replaced whole.
    ///
    /// # Errors
    /// On all ranks, when rank 0 cannot write: the old file is then untouched.
    pub fn save(&self, path: impl AsRef<Path>, state: State<'_>) -> Result<()> {
        self.comm()?; // before launch nothing is written
        let path = path.as_ref();
        let states = optimizer_states(&state, self.is_global_zero());
        let written = match states {
            Ok(states) if self.is_global_zero() => write(path, &state, states),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        let failure = written
            .as_ref()
            .err()
            .map_or(String::new(), Error::to_string);
        let heard = self.broadcast(failure, 0);
        written?; // the first cause
        let failure = heard?;
        if failure.is_empty() {
            return Ok(());
        }
        Err(Error::new(format!(
            "rank 0 could not save {}: {failure}",
            path.display()
        )))
    }

    /// Go on from a checkpoint, on all ranks. Everything in `state` must be in the file; what else the file holds as
    /// values is returned. Nothing is changed unless everything fits.
    ///
    /// # Errors
    /// On all ranks, when one cannot read the file or something does not fit.
    pub fn load(&self, path: impl AsRef<Path>, state: State<'_>) -> Result<HashMap<String, Value>> {
        self.comm()?;
        let path = path.as_ref();
        let read = read(path).and_then(|file| Ok((file.fit(&state)?, file)));
        let failure = read.as_ref().err().map_or(String::new(), Error::to_string);
        let failures = self.all_gather_object(&failure);
        let (fitted, file) = read?; // the first cause
        let failures = failures?;
        if let Some(rank) = failures.iter().position(|failure| !failure.is_empty()) {
            let what = format!("rank {rank} could not load {}", path.display());
            return Err(Error::new(format!("{what}: {}", failures[rank])));
        }
        file.apply(state, fitted)
    }
}
