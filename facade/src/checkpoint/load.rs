//! Loading a checkpoint: first everything is looked at, on all ranks, and only when it fits on all is anything changed.

use std::{collections::HashMap, path::Path};

use serde_json::Value;

use super::{
    Entry, State,
    dtype::{holds_exactly, tensor_dtype},
    holding::Holding,
    joined,
    states::own_state,
    stored::{Stored, absent},
};
use crate::{
    error::{Error, Result},
    fabric::Fabric,
    model::ParamId,
    optim::OptimizerState,
};

/// What was found for an entry of a state.
enum Fitted {
    /// The parameters to load.
    Model(Box<Holding>, Vec<ParamId>),
    Optimizer(OptimizerState),
    Value,
    /// It is not there, and need not be.
    Nothing,
}

impl Fabric {
    pub(super) fn read(&self, path: &Path, state: State<'_>) -> Result<HashMap<String, Value>> {
        self.read_from(path, Stored::open(path), state)
    }

    /// A file of tensors alone. Returns the names that no parameter has.
    pub(super) fn read_raw(&self, path: &Path, state: State<'_>) -> Result<Vec<String>> {
        let stored = Stored::open_raw(path);
        let left = match (&stored, &state.entries[..]) {
            (Ok(stored), [(_, Entry::Model(core))]) => {
                let params = core.model.params();
                let names = stored.below("").map(|(name, _)| name.to_string());
                names
                    .filter(|name| !params.iter().any(|param| param.name == *name))
                    .collect()
            }
            _ => Vec::new(),
        };
        self.read_from(path, stored, state).map(|_| left)
    }

    fn read_from(
        &self,
        path: &Path,
        stored: Result<Stored>,
        state: State<'_>,
    ) -> Result<HashMap<String, Value>> {
        let found = stored.and_then(|stored| Ok((fit(&stored, &state)?, stored)));
        let (fitted, mut stored) = self.agree_on("load", path, 0, found)?;
        let cores = state.entries.iter().filter_map(|(_, entry)| match entry {
            Entry::Model(core) => Some(core.clone()),
            _ => None,
        });
        let cores: Vec<_> = cores.collect();
        let applied = apply(&mut stored, state, fitted);
        // A disk that fails now leaves some values changed: the job must not go on from them, on any rank.
        let rest = self.agree_on("load", path, 0, applied)?;
        for core in cores {
            if Holding::of(&core).has_mains() {
                core.sequencer().refresh()?;
            }
        }
        Ok(rest)
    }
}

/// Does everything in `state` stand in the checkpoint, and fit? What is to be loaded, by entry.
fn fit(stored: &Stored, state: &State<'_>) -> Result<Vec<Fitted>> {
    state.check_names()?;
    let fit = |(name, entry): &(String, Entry<'_>)| {
        if !matches!(entry, Entry::Model(_))
            && state.is_lenient
            && !stored.values.contains_key(name)
        {
            return Ok(Fitted::Nothing);
        }
        let value = || stored.values.get(name).ok_or_else(|| absent(name));
        match entry {
            Entry::Model(core) => {
                let holding = Box::new(Holding::of(core));
                let params = fit_model(stored, state, name, &holding)?;
                Ok(Fitted::Model(holding, params))
            }
            Entry::Optimizer(optimizer) => {
                let steps = value()?.as_u64().ok_or_else(|| {
                    Error::argument(
                        format!("'{name}' in the checkpoint is no optimizer"),
                        "Load it as what it was saved as",
                    )
                })?;
                let keeps = |own: &str| state.filters.keeps(name, own);
                let state = own_state(stored, name, steps, optimizer.core(), &keeps)?;
                optimizer.check(&state)?;
                Ok(Fitted::Optimizer(state))
            }
            Entry::Value(target) => {
                target.check_json(name, value()?)?;
                Ok(Fitted::Value)
            }
        }
    };
    state.entries.iter().map(fit).collect()
}

/// Whether this rank finds its elements of every parameter that is meant, in a type whose values are all values of the
/// parameter's. Those parameters.
fn fit_model(
    stored: &Stored,
    state: &State<'_>,
    name: &str,
    holding: &Holding,
) -> Result<Vec<ParamId>> {
    let mut meant = Vec::new();
    for (index, param) in holding.params().iter().enumerate() {
        let key = joined(name, &param.name);
        let absent = || state.is_lenient && stored.tensor(&key).is_err();
        if !state.filters.keeps(name, &param.name) || absent() {
            continue;
        }
        let id = ParamId(index);
        meant.push(id);
        let (dtype, saved) = (holding.dtype(id), stored.tensor(&key)?);
        let misfit = |hint: &str| {
            let (own, shape) = (tensor_dtype(dtype), &param.shape);
            let what = format!(
                "'{key}' was saved as {:?} {:?}, the model has {own:?} {shape:?}",
                saved.dtype, saved.shape
            );
            Error::argument(what, hint)
        };
        if saved.shape != param.shape {
            return Err(misfit("Build the model with the sizes that were saved"));
        }
        if !holds_exactly(stored.dtype(&key)?, dtype) {
            return Err(misfit(
                "Build the model in the type that was saved, or, for floats, keep main values of it \
                 (precision \"bf16-mixed\", or plan::Options::main_dtype): no value is rounded on the way in",
            ));
        }
        stored.look(&key, holding.own(id))?;
    }
    Ok(meant)
}

/// Change everything in `state`; returns the values that are left.
fn apply(
    stored: &mut Stored,
    state: State<'_>,
    fitted: Vec<Fitted>,
) -> Result<HashMap<String, Value>> {
    let mut values = std::mem::take(&mut stored.values);
    for ((name, entry), fitted) in state.entries.into_iter().zip(fitted) {
        let value = values.remove(&name);
        match (entry, fitted, value) {
            (_, Fitted::Nothing, _) => {}
            (Entry::Model(_), Fitted::Model(holding, params), _) => {
                load_model(stored, &name, &holding, &params)?;
            }
            (Entry::Optimizer(mut optimizer), Fitted::Optimizer(state), _) => {
                optimizer.load(state)?;
            }
            (Entry::Value(target), _, Some(json)) => target.set_json(&name, &json)?,
            _ => unreachable!("fit() has seen the same entries and values"),
        }
    }
    Ok(values)
}

fn load_model(stored: &Stored, name: &str, holding: &Holding, params: &[ParamId]) -> Result<()> {
    for id in params {
        let key = joined(name, &holding.params()[id.0].name);
        stored.read(&key, holding.own(*id), &mut |range, span| {
            Ok(holding.write(*id, range, span)?)
        })?;
    }
    Ok(())
}
