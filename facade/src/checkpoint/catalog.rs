//! All tensors of a checkpoint that is to be written: which elements of each stand where, and which rank writes them. A
//! function of the plans, and of what ranks have told of their optimizers, so that every rank finds the same by itself.

use std::{
    cmp::Reverse,
    hash::{DefaultHasher, Hash, Hasher},
    ops::Range,
};

use fabric_engine::kernels::{Dtype, SpanMut};
use serde::{Deserialize, Serialize};

use super::{
    Entry, Filters, State,
    holding::{Held, Holding},
    joined,
    manifest::cover,
    states::{self, States},
};
use crate::{
    error::{Error, Result},
    model::ParamId,
};

/// What this rank brings to a checkpoint.
pub(super) struct Contents<'a> {
    filters: &'a Filters<'a>,
    entries: Vec<(&'a str, Content<'a>)>,
}

enum Content<'a> {
    Model(Box<Holding>),
    Optimizer(States<'a>),
    Value,
}

/// What one rank tells the others before they write.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Told {
    names: Vec<String>,
    optimizers: Vec<states::Told>,
}

/// A tensor that is to be written.
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Who holds, and writes, which elements.
    pub(super) pieces: Vec<Held>,
    entry: usize,
    item: Item,
}

enum Item {
    Param(ParamId),
    Vector(String),
}

/// The tensors, and the steps of every optimizer by its name.
pub(super) struct Catalog {
    pub(super) tensors: Vec<Tensor>,
    pub(super) steps: Vec<(String, u64)>,
}

impl<'a> Contents<'a> {
    pub(super) fn of(state: &'a State<'_>) -> Result<Self> {
        let content = |(name, entry): &'a (String, Entry<'_>)| {
            let content = match entry {
                Entry::Model(core) => Content::Model(Box::new(Holding::of(core))),
                Entry::Optimizer(optimizer) => Content::Optimizer(States::of(&**optimizer)?),
                Entry::Value(_) => Content::Value,
            };
            Ok((name.as_str(), content))
        };
        let entries = state.entries.iter().map(content).collect::<Result<_>>()?;
        Ok(Self {
            filters: &state.filters,
            entries,
        })
    }

    pub(super) fn told(&self) -> Told {
        let names = self.entries.iter().map(|(name, content)| match content {
            Content::Model(_) => format!("the model '{name}'"),
            Content::Optimizer(_) => format!("the optimizer '{name}'"),
            Content::Value => format!("the value '{name}'"),
        });
        let optimizers = self
            .entries
            .iter()
            .filter_map(|(_, content)| match content {
                Content::Optimizer(states) => Some(states.told()),
                _ => None,
            });
        Told {
            names: names.collect(),
            optimizers: optimizers.collect(),
        }
    }

    /// Copy elements of a tensor that this rank holds.
    pub(super) fn read(
        &self,
        tensor: &Tensor,
        range: Range<usize>,
        into: SpanMut<'_>,
    ) -> Result<()> {
        match (&self.entries[tensor.entry].1, &tensor.item) {
            (Content::Model(holding), Item::Param(param)) => Ok(holding.read(*param, range, into)?),
            (Content::Optimizer(states), Item::Vector(name)) => states.read(name, range, into),
            _ => unreachable!("a catalog is read with the contents that it was made of"),
        }
    }

    /// The tensors of all ranks, by what each has told.
    pub(super) fn catalog(&self, all: &[Told]) -> Result<Catalog> {
        same_names(all)?;
        let (mut tensors, mut steps, mut optimizers) = (Vec::new(), Vec::new(), 0);
        for (entry, (prefix, content)) in self.entries.iter().enumerate() {
            let keeps = |own: &str| self.filters.keeps(prefix, own);
            match content {
                Content::Model(holding) => {
                    let params = holding.params().iter().enumerate();
                    let params = params.filter(|(_, param)| keeps(&param.name));
                    tensors.extend(params.map(|(index, param)| Tensor {
                        name: joined(prefix, &param.name),
                        dtype: holding.dtype(ParamId(index)),
                        shape: param.shape.clone(),
                        pieces: holding.holders(ParamId(index)),
                        entry,
                        item: Item::Param(ParamId(index)),
                    }));
                }
                Content::Optimizer(states) => {
                    let number = optimizers;
                    optimizers += 1;
                    let told = all.iter().map(|told| &told.optimizers[number]);
                    let (taken, mut wholes) = states.gather(told)?;
                    let had = wholes.len();
                    wholes.retain(|name, _| keeps(name));
                    if had > 0 && wholes.is_empty() {
                        continue; // nothing of it is meant, its count neither
                    }
                    steps.push((prefix.to_string(), taken));
                    tensors.extend(wholes.into_iter().map(|(name, whole)| Tensor {
                        name: joined(prefix, &name),
                        dtype: whole.dtype,
                        shape: vec![whole.numel],
                        pieces: whole.held,
                        entry,
                        item: Item::Vector(name),
                    }));
                }
                Content::Value => {}
            }
        }
        for tensor in &mut tensors {
            tensor.prove()?;
        }
        Ok(Catalog { tensors, steps })
    }
}

/// Ranks that save different things would wait for one another's tensors.
fn same_names(all: &[Told]) -> Result<()> {
    let first = &all[0].names;
    let other = all.iter().position(|told| told.names != *first);
    let Some(rank) = other else { return Ok(()) };
    let text = |told: &Told| match told.names.is_empty() {
        true => "nothing".into(),
        false => told.names.join(", "),
    };
    Err(Error::argument(
        format!(
            "rank 0 saves {}, and rank {rank} saves {}",
            text(&all[0]),
            text(&all[rank])
        ),
        "Save the same State on all ranks",
    ))
}

impl Tensor {
    /// Every element is held once. Pieces come in the order of their elements.
    fn prove(&mut self) -> Result<()> {
        self.pieces.sort_by_key(|(_, range)| range.start);
        let numel = self.shape.iter().product();
        let ranges = self.pieces.iter().map(|(_, range)| range.clone());
        cover(numel, ranges).map_err(|what| {
            Error::argument(
                format!("'{}' cannot be saved: {what}", self.name),
                "An optimizer keeps the same states for all pieces of a parameter",
            )
        })
    }

    /// Its name in a file that holds `range` of it.
    pub(super) fn key(&self, range: &Range<usize>) -> String {
        match range.len() == self.shape.iter().product::<usize>() {
            true => self.name.clone(),
            false => format!("{}[{}..{}]", self.name, range.start, range.end),
        }
    }
}

impl Catalog {
    /// Let one rank write what all hold: the largest first, each by the rank that has the least to write so far.
    pub(super) fn balance(&mut self, world: usize) {
        let mut loads = vec![0; world];
        let mut free = Vec::new();
        for (index, tensor) in self.tensors.iter().enumerate() {
            for (rank, range) in &tensor.pieces {
                let bytes = range.len() * tensor.dtype.size();
                match rank {
                    Some(rank) => loads[*rank] += bytes,
                    None => free.push((bytes, index)),
                }
            }
        }
        free.sort_by_key(|(bytes, index)| (Reverse(*bytes), *index));
        for (bytes, index) in free {
            let least = (0..world).min_by_key(|rank| loads[*rank]);
            let rank = least.expect("a world has ranks");
            loads[rank] += bytes;
            self.tensors[index].pieces[0].0 = Some(rank);
        }
    }

    /// A number that differs when the ranks would write different things.
    pub(super) fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for tensor in &self.tensors {
            let Tensor {
                name,
                dtype,
                shape,
                pieces,
                ..
            } = tensor;
            (name, dtype.code(), shape, pieces).hash(&mut hasher);
        }
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, pieces: Vec<Held>) -> Tensor {
        let numel = pieces.iter().map(|(_, range)| range.len()).sum();
        Tensor {
            name: name.into(),
            dtype: Dtype::F32,
            shape: vec![numel],
            pieces,
            entry: 0,
            item: Item::Param(ParamId(0)),
        }
    }

    #[test]
    fn what_all_hold_is_written_by_whoever_has_the_least_to_write() {
        let all = |name: &str, numel: usize| tensor(name, vec![(None, 0..numel)]);
        let slices = tensor("s", vec![(Some(0), 0..10), (Some(1), 10..20)]);
        let tensors = vec![all("a", 3), slices, all("b", 8), all("c", 5), all("d", 7)];
        let mut catalog = Catalog {
            tensors,
            steps: Vec::new(),
        };
        catalog.balance(3);
        let writers = catalog.tensors.iter().map(|tensor| tensor.pieces[0].0);
        // b and d go to rank 2, which holds no slice (8, 15), c and a to the others (15, 13).
        assert_eq!(
            writers.collect::<Vec<_>>(),
            [Some(1), Some(0), Some(2), Some(0), Some(2)]
        );
    }

    #[test]
    fn a_state_that_one_rank_lacks_is_not_saved_without_it() {
        let mut holed = tensor("o.momentum.w", vec![(Some(1), 4..8)]);
        holed.shape = vec![8];
        let text = holed.prove().unwrap_err().to_string();
        assert!(
            text.contains("'o.momentum.w' cannot be saved: elements 0..4 are in no piece"),
            "{text}"
        );
    }

    #[test]
    fn ranks_that_save_different_things_hear_of_it() {
        let told = |names: &[&str]| Told {
            names: names.iter().map(ToString::to_string).collect(),
            optimizers: Vec::new(),
        };
        let text = same_names(&[told(&["the model 'm'"]), told(&[])]).unwrap_err();
        assert!(
            text.to_string()
                .contains("rank 0 saves the model 'm', and rank 1 saves nothing")
        );
    }
}
