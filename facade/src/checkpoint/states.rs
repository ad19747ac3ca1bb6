//! Optimizers' states, which are named after what their rank updates, as tensors of whole parameters; and back again.
//! Vectors are called `kind.parameter`, a count is called `step.parameter`.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use fabric_engine::{
    buffer::Slab,
    kernels::{self, Dtype, SpanMut},
};
use serde::{Deserialize, Serialize};

use super::stored::Stored;
use crate::{
    callback::{Ema, ModelView},
    error::{Error, Result},
    fabric::FabricOptimizer,
    model::{Core, Model},
    optim::{Lent, LentState, Optimizer, OptimizerState, STEP},
    shards::Shards,
};

/// An optimizer, whatever its type.
pub(super) trait Stateful {
    fn core(&self) -> &Core;
    fn lend(&self) -> Result<LentState<'_>>;
    fn check(&self, state: &OptimizerState) -> Result<()>;
    fn load(&mut self, state: OptimizerState) -> Result<()>;
}

impl<O: Optimizer> Stateful for &mut FabricOptimizer<O> {
    fn core(&self) -> &Core {
        self.parts().1
    }
    fn lend(&self) -> Result<LentState<'_>> {
        let (optimizer, core) = self.parts();
        Ok(optimizer.lend_state(core.updated())?)
    }
    fn check(&self, state: &OptimizerState) -> Result<()> {
        let (optimizer, core) = self.parts();
        Ok(optimizer.check_state(core.updated(), state)?)
    }
    fn load(&mut self, state: OptimizerState) -> Result<()> {
        let (optimizer, core) = self.parts_mut();
        Ok(optimizer.load_state(core.updated(), state)?)
    }
}

/// A moving average of a model's parameters: to a checkpoint it is an optimizer's state.
pub(super) struct AverageOf<'a> {
    pub(super) ema: &'a mut Ema,
    pub(super) model: ModelView,
}

impl Stateful for AverageOf<'_> {
    fn core(&self) -> &Core {
        self.model.core()
    }
    fn lend(&self) -> Result<LentState<'_>> {
        self.ema.lend(&self.model)
    }
    fn check(&self, state: &OptimizerState) -> Result<()> {
        self.ema.check(&self.model, state)
    }
    fn load(&mut self, state: OptimizerState) -> Result<()> {
        self.ema.load(&self.model, &state)
    }
}

/// This rank's part of an optimizer's state, by the names of whole parameters.
pub(super) struct States<'a> {
    pub(super) steps: u64,
    vectors: BTreeMap<String, (Part, Lent<'a>)>,
    tells: bool, // of several replicas only the first does
}

/// What a vector of this rank is of a whole one.
struct Part {
    whole: String,
    numel: usize,        // of the whole
    range: Range<usize>, // of it, here
    is_slice: bool,      // or the same on every rank
}

/// What one rank tells the others of its part of a state: what only it, or its replica, has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Told {
    steps: u64,
    slices: Vec<Slice>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Slice {
    name: String,
    numel: usize,
    range: Range<usize>,
    dtype: u8,
}

/// A vector of all ranks: its length, its type, and who holds what of it.
pub(super) struct Whole {
    pub(super) numel: usize,
    pub(super) dtype: Dtype,
    pub(super) held: Vec<super::holding::Held>,
}

impl<'a> States<'a> {
    pub(super) fn of(optimizer: &'a dyn Stateful) -> Result<Self> {
        let LentState { steps, tensors } = optimizer.lend()?;
        let core = optimizer.core();
        let mut vectors = BTreeMap::new();
        for (name, slab) in tensors {
            let part = match &core.shards {
                Some(shards) => Part::of(shards, &name, &slab)?,
                None => Some(Part {
                    whole: name.clone(),
                    numel: slab.numel(),
                    range: 0..slab.numel(),
                    is_slice: false,
                }),
            };
            let Some(part) = part else { continue };
            if vectors.insert(part.whole.clone(), (part, slab)).is_some() {
                return Err(Error::argument(
                    format!("an optimizer's state has '{name}' twice"),
                    "Give every vector its own name",
                ));
            }
        }
        let sequencer = core.sequencer();
        let tells = sequencer.plan().mesh().replica(sequencer.rank()) == 0;
        Ok(Self {
            steps,
            vectors,
            tells,
        })
    }

    pub(super) fn told(&self) -> Told {
        let slices = self.vectors.values().filter(|(part, _)| part.is_slice);
        let slice = |(part, slab): &(Part, Lent<'_>)| Slice {
            name: part.whole.clone(),
            numel: part.numel,
            range: part.range.clone(),
            dtype: slab.dtype().code(),
        };
        let slices = slices.filter(|_| self.tells).map(slice).collect();
        let steps = self.steps;
        Told { steps, slices }
    }

    /// Copy elements `range` of the vector `name`, which this rank has.
    pub(super) fn read(&self, name: &str, range: Range<usize>, into: SpanMut<'_>) -> Result<()> {
        let (part, slab) = &self.vectors[name];
        let start = part.range.start;
        let from = slab.part(range.start - start..range.end - start);
        Ok(kernels::cast(from, into)?)
    }

    /// The vectors of all ranks, from what each has told, and the steps.
    pub(super) fn gather<'b>(
        &self,
        all: impl Iterator<Item = &'b Told>,
    ) -> Result<(u64, BTreeMap<String, Whole>)> {
        let mut steps = self.steps;
        let alike = self.vectors.values().filter(|(part, _)| !part.is_slice);
        let alike = alike.map(|(part, slab)| {
            let whole = Whole {
                numel: part.numel,
                dtype: slab.dtype(),
                held: vec![(None, 0..part.numel)],
            };
            (part.whole.clone(), whole)
        });
        let mut wholes: BTreeMap<String, Whole> = alike.collect();
        for (rank, told) in all.enumerate() {
            steps = steps.max(told.steps);
            for slice in &told.slices {
                let differs = || {
                    Error::argument(
                        format!(
                            "rank {rank} keeps '{}' in another type or length than other ranks",
                            slice.name
                        ),
                        "Set up the same optimizer with the same options on all ranks",
                    )
                };
                let dtype = Dtype::from_code(slice.dtype).ok_or_else(differs)?;
                let whole = wholes.entry(slice.name.clone()).or_insert_with(|| Whole {
                    numel: slice.numel,
                    dtype,
                    held: Vec::new(),
                });
                if (whole.numel, whole.dtype) != (slice.numel, dtype) {
                    return Err(differs());
                }
                whole.held.push((Some(rank), slice.range.clone()));
            }
        }
        Ok((steps, wholes))
    }
}

impl Part {
    /// Of what the vector `name` of a piece is a part; `None` for a count that another rank saves: it is the parameter's,
    /// not an element's.
    fn of(shards: &Shards, name: &str, slab: &Slab) -> Result<Option<Self>> {
        let owner = name.split_once('.');
        let owner = owner.and_then(|(kind, piece)| Some((kind, shards.find(piece)?)));
        let (kind, index) = owner.ok_or_else(|| unknown(name))?;
        let piece = &shards.pieces()[index];
        let param = &shards.whole_params()[piece.param.0];
        let (numel, range) = match kind {
            STEP => (1, 0..1),
            _ => (param.numel(), piece.range.clone()),
        };
        if slab.numel() != range.len() {
            return Err(Error::argument(
                format!(
                    "the optimizer's state '{name}' has {} elements, the parameter's piece {}",
                    slab.numel(),
                    range.len()
                ),
                "Keep vectors as long as the parameter, and counts under 'step'",
            ));
        }
        let elsewhere = kind == STEP && piece.range.start > 0;
        Ok((!elsewhere).then(|| Self {
            whole: format!("{kind}.{}", param.name),
            numel,
            range,
            is_slice: shards.is_slice(index),
        }))
    }
}

/// What this rank needs of the state that was saved under `name`, read from the checkpoint and named as its optimizer
/// names it.
pub(super) fn own_state(
    stored: &Stored,
    name: &str,
    steps: u64,
    core: &Core,
    keeps: &dyn Fn(&str) -> bool,
) -> Result<OptimizerState> {
    let mut tensors = Vec::new();
    let Some(shards) = &core.shards else {
        for (key, vector) in stored.below(name).filter(|(_, vector)| keeps(vector)) {
            let slab = stored.slab(key, 0..stored.numel(key)?)?;
            tensors.push((vector.to_string(), slab));
        }
        return Ok(OptimizerState { steps, tensors });
    };
    let params = shards.whole_params().iter();
    let mut pieces: HashMap<&str, (usize, Vec<usize>)> = params
        .map(|param| (param.name.as_str(), (param.numel(), Vec::new())))
        .collect();
    for (index, piece) in shards.pieces().iter().enumerate() {
        let whole = &shards.whole_params()[piece.param.0].name;
        let known = pieces.get_mut(whole.as_str());
        known.expect("a piece of a parameter").1.push(index);
    }
    for (key, vector) in stored.below(name).filter(|(_, vector)| keeps(vector)) {
        let owner = vector.split_once('.');
        let owner = owner.and_then(|(kind, param)| Some((kind, pieces.get(param)?)));
        let (kind, (due, own)) = owner.ok_or_else(|| unknown(vector))?;
        let (due, numel) = (if kind == STEP { 1 } else { *due }, stored.numel(key)?);
        if numel != due {
            return Err(Error::argument(
                format!("the saved '{vector}' has {numel} elements, this model needs {due}"),
                "Load the checkpoint of the same model",
            ));
        }
        for index in own {
            let range = match kind {
                STEP => 0..1,
                _ => shards.pieces()[*index].range.clone(),
            };
            let own = format!("{kind}.{}", shards.params()[*index].name);
            tensors.push((own, stored.slab(key, range)?));
        }
    }
    Ok(OptimizerState { steps, tensors })
}

fn unknown(name: &str) -> Error {
    Error::argument(
        format!("an optimizer's state has '{name}', which belongs to no parameter"),
        "Name states `kind.parameter`",
    )
}
