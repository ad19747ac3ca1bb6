//! An optimizer's states on their way to a file and back: vectors called `kind.parameter`, and a count called
//! `step.parameter` for each parameter.

use std::collections::{HashMap, HashSet};

use fabric_engine::{
    Error, Result,
    buffer::Slab,
    kernels::{self, Dtype},
};

use super::{Lent, LentState, OptimizerState, STEP};
use crate::model::{Model, ParamMeta};

/// What is kept for one parameter.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// Its steps; one that had no gradient yet has taken none.
    pub(super) steps: u64,
    /// Its states, in the optimizer's order; none before the first step.
    pub(super) states: Vec<Slab>,
}

/// The type in which states of a parameter are kept.
pub(super) fn state_dtype(param: &ParamMeta) -> Dtype {
    param.dtype.accumulator()
}

/// Records, each with the names of its states, under the parameters' names.
pub(super) fn lend<'a>(
    model: &dyn Model,
    records: impl Iterator<Item = (&'a [&'static str], &'a Record)>,
) -> LentState<'a> {
    let mut lent = LentState::default();
    for (param, (kinds, record)) in model.params().iter().zip(records) {
        lent.steps = lent.steps.max(record.steps);
        for (kind, state) in kinds.iter().zip(&record.states) {
            let tensor = (format!("{kind}.{}", param.name), Lent::Here(state));
            lent.tensors.push(tensor);
        }
        // What is frozen takes no steps. Rows that update pieces have no piece of it, and their files no count.
        if !param.trainable && record.states.is_empty() {
            continue;
        }
        // i64, which every reader of safetensors knows: candle refuses a file with a u64 in it.
        let steps = Slab::from_slice(&[record.steps as i64]);
        let steps = (format!("{STEP}.{}", param.name), Lent::Made(steps));
        lent.tensors.push(steps);
    }
    lent
}

pub(super) fn copy_of(slab: &Slab) -> Slab {
    let all = 0..slab.numel();
    let mut copy = Slab::zeroed(slab.dtype(), slab.numel()); // on the host, wherever the state lies
    kernels::cast(slab.part(all.clone()), copy.part_mut(all)).expect("a copy within one dtype");
    copy
}

/// Every vector of `state` must be one of its parameter's `kinds`, and be as long; of one parameter all are there, or none.
pub(super) fn check(
    model: &dyn Model,
    kinds: &[&[&'static str]],
    state: &OptimizerState,
) -> Result<()> {
    let params = model.params();
    let by_name = params.iter().enumerate();
    let by_name = by_name.map(|(index, param)| (param.name.as_str(), index));
    let by_name: HashMap<_, _> = by_name.collect();
    let mut seen = HashSet::new();
    for (name, slab) in &state.tensors {
        let owner = name.split_once('.').and_then(|(kind, param)| {
            let index = *by_name.get(param)?;
            let known = kind == STEP || kinds[index].contains(&kind);
            known.then_some((kind, index))
        });
        let (kind, index) = owner.ok_or_else(|| unknown(name))?;
        check_vector(kind, &params[index], slab)?;
        if !seen.insert((kind, index)) {
            return Err(Error::argument(
                format!("the saved optimizer state has '{name}' twice"),
                "Load a checkpoint that this library wrote",
            ));
        }
    }
    for (index, kinds) in kinds.iter().enumerate() {
        let (there, missing): (Vec<&str>, Vec<&str>) = kinds
            .iter()
            .partition(|kind| seen.contains(&(*kind, index)));
        if let (Some(kind), Some(other)) = (there.first(), missing.first()) {
            let name = &params[index].name;
            return Err(Error::argument(
                format!("the saved optimizer state has '{kind}.{name}' and no '{other}.{name}'"),
                "Load the state of the same kind of optimizer and model",
            ));
        }
    }
    Ok(())
}

fn unknown(name: &str) -> Error {
    Error::argument(
        format!("the saved optimizer state has '{name}', which this optimizer does not know"),
        "Load the state of the same kind of optimizer and model",
    )
}

fn check_vector(kind: &str, param: &ParamMeta, slab: &Slab) -> Result<()> {
    let (numel, dtype) = match kind {
        STEP => (1, Dtype::I64),
        _ => (param.numel(), state_dtype(param)),
    };
    if (slab.numel(), slab.dtype()) != (numel, dtype) {
        return Err(Error::argument(
            format!(
                "the saved {kind} of '{}' is {} x {}, this model needs {numel} x {dtype}",
                param.name,
                slab.numel(),
                slab.dtype(),
            ),
            "Load the checkpoint of the same model",
        ));
    }
    if kind == STEP && slab.as_slice::<i64>()[0] < 0 {
        return Err(Error::argument(
            format!(
                "the saved {kind} of '{}' is {}, and steps are counted from 0",
                param.name,
                slab.as_slice::<i64>()[0]
            ),
            "Load a checkpoint that this library wrote",
        ));
    }
    Ok(())
}

/// The records in a state that was checked, by parameter.
pub(super) fn unpack(
    model: &dyn Model,
    kinds: &[&[&'static str]],
    state: OptimizerState,
) -> Vec<Record> {
    let mut tensors: HashMap<_, _> = state.tensors.into_iter().collect();
    let params = model.params().iter().zip(kinds);
    let record = |(param, kinds): (&ParamMeta, &&[&'static str])| {
        let mut take = |kind: &str| tensors.remove(&format!("{kind}.{}", param.name));
        let states: Vec<_> = kinds.iter().filter_map(|kind| take(kind)).collect();
        let counted = take(STEP).map(|count| count.as_slice::<i64>()[0].unsigned_abs());
        // Files in which SGD was saved without counts know how often the whole optimizer stepped. Whoever has a momentum
        // has taken its first step.
        let steps = counted.unwrap_or_else(|| match (kinds.is_empty(), states.is_empty()) {
            (false, true) => 0,
            (false, false) => state.steps.max(1),
            (true, _) => state.steps,
        });
        Record { steps, states }
    };
    params.map(record).collect()
}
