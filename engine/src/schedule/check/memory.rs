//! All ranks' buffers at once, on symbols: executes the shared-memory lowering phase by phase and stops at the first
//! hazard. A phase is what lies between two syncs; within it, ranks run in any order.

use std::ops::Range;

use super::flaw::{Cell, Flaw, Value};
use crate::schedule::{Problem, Rank, Ranks, Region, Shared};

/// Everyone's memory, in the full vector's coordinates.
pub(super) struct Memory<'a> {
    problem: &'a Problem,
    in_place: bool,
    inputs: Vec<Vec<Value>>,
    /// Empty in place: the inputs are the outputs.
    outputs: Vec<Vec<Value>>,
    /// Copies of inputs, of the ranks that posted theirs.
    posts: Vec<Option<Vec<Value>>>,
    /// For each rank's Input, then each rank's Output: who read and who wrote each element in this phase.
    reads: Vec<Vec<Users>>,
    writes: Vec<Vec<Users>>,
}

/// Between which syncs a phase lies.
#[derive(Clone, Copy)]
struct Guard {
    met: bool,
    will_meet: bool,
}

/// Nobody, one rank, or one rank and somebody else.
#[derive(Clone, Copy, Default)]
struct Users {
    one: Option<Rank>,
    another: Option<Rank>,
}

impl Users {
    fn add(&mut self, rank: Rank) {
        match self.one {
            None => self.one = Some(rank),
            Some(one) if one != rank => self.another = Some(rank),
            Some(_) => {}
        }
    }

    /// A user that is not `rank`.
    fn besides(self, rank: Rank) -> Option<Rank> {
        if self.one != Some(rank) {
            self.one
        } else {
            self.another
        }
    }
}

impl<'a> Memory<'a> {
    pub(super) fn new(problem: &'a Problem, in_place: bool) -> Memory<'a> {
        let (world, elems) = (problem.world, problem.elems());
        let leaf = |rank: Rank, elem: usize| {
            if problem.input(rank).contains(&elem) {
                Value::Leaf { rank, elem }
            } else {
                Value::Nothing
            }
        };
        Memory {
            problem,
            in_place,
            inputs: (0..world)
                .map(|rank| (0..elems).map(|elem| leaf(rank, elem)).collect())
                .collect(),
            outputs: if in_place {
                Vec::new()
            } else {
                vec![vec![Value::Nothing; elems]; world]
            },
            posts: vec![None; world],
            reads: vec![Vec::new(); 2 * world],
            writes: vec![Vec::new(); 2 * world],
        }
    }

    /// Executes one phase, of so many, of all ranks.
    pub(super) fn phase<'s>(
        &mut self,
        steps: impl Iterator<Item = &'s [Shared]>,
        phase: usize,
        phases: usize,
    ) -> Result<(), Flaw> {
        let guard = Guard {
            met: phase > 0,
            will_meet: phase + 1 < phases,
        };
        for users in self.reads.iter_mut().chain(&mut self.writes) {
            users.clear();
            users.resize(self.problem.elems(), Users::default());
        }
        let mut stores = Vec::new();
        for (rank, own) in steps.enumerate() {
            for step in own {
                let Shared::LoadFoldStore { ranges, from, into } = step else {
                    self.posts[rank] = Some(self.inputs[rank].clone());
                    continue;
                };
                for elem in ranges.iter().cloned().flatten() {
                    self.element(rank, elem, *from, *into, guard, &mut stores)?;
                }
            }
        }
        for (owner, elem, value) in stores {
            let memory = if self.in_place {
                &mut self.inputs
            } else {
                &mut self.outputs
            };
            memory[owner][elem] = value;
        }
        self.hazards()
    }

    /// Loads, folds and keeps the store of one element for the end of the phase: if no rank may see another's store
    /// before the next sync, that is the same.
    fn element(
        &mut self,
        rank: Rank,
        elem: usize,
        from: Ranks,
        into: Ranks,
        guard: Guard,
        stores: &mut Vec<(Rank, usize, Value)>,
    ) -> Result<(), Flaw> {
        let itself = self.in_place && from == into && matches!(from, Ranks::One(_));
        let mut value = Value::Nothing;
        for source in self.members(from) {
            let cell = Cell {
                rank: source,
                region: Region::Input,
                index: elem,
            };
            if !self.problem.input(source).contains(&elem) {
                return Err(Flaw::Bounds {
                    cell,
                    round: 0,
                    len: self.problem.elems(),
                });
            }
            value = match &self.posts[source] {
                Some(_) if !guard.met && source != rank => {
                    return Err(Flaw::Unguarded { cell, rank });
                }
                Some(post) => post[elem],
                None => {
                    if !itself {
                        self.touch(rank, cell, guard, false)?;
                    }
                    self.inputs[source][elem]
                }
            };
            if from == Ranks::All && value != (Value::Leaf { rank: source, elem }) {
                return Err(Flaw::Widened {
                    cell,
                    round: 0,
                    found: value,
                });
            }
        }
        if from == Ranks::All {
            value = Value::Finished { elem };
        }
        for target in self.members(into) {
            let cell = Cell {
                rank: target,
                region: Region::Output,
                index: elem,
            };
            if self.problem.output_index(target, elem).is_none() {
                return Err(Flaw::Bounds {
                    cell,
                    round: 0,
                    len: self.problem.elems(),
                });
            }
            let onto_itself = self.in_place && from == Ranks::One(target);
            if !onto_itself {
                self.touch(rank, cell, guard, true)?;
                stores.push((target, elem, value));
            }
        }
        Ok(())
    }

    /// Notes a load or a store.
    fn touch(&mut self, rank: Rank, cell: Cell, guard: Guard, store: bool) -> Result<(), Flaw> {
        if !(guard.met && guard.will_meet) && cell.rank != rank {
            return Err(Flaw::Unguarded { cell, rank });
        }
        let output = cell.region == Region::Output && !self.in_place;
        let memory = cell.rank + if output { self.problem.world } else { 0 };
        let users = if store {
            &mut self.writes
        } else {
            &mut self.reads
        };
        users[memory][cell.index].add(rank);
        Ok(())
    }

    /// No element that one rank writes is read or written by another.
    fn hazards(&self) -> Result<(), Flaw> {
        let world = self.problem.world;
        for (memory, (reads, writes)) in self.reads.iter().zip(&self.writes).enumerate() {
            for (index, (reader, writer)) in reads.iter().zip(writes).enumerate() {
                let Some(one) = writer.one else { continue };
                if let Some(other) = writer.another.or(reader.besides(one)) {
                    let region = if memory < world && !self.in_place {
                        Region::Input
                    } else {
                        Region::Output
                    };
                    let cell = Cell {
                        rank: memory % world,
                        region,
                        index,
                    };
                    return Err(Flaw::Hazard {
                        cell,
                        writer: one,
                        other,
                    });
                }
            }
        }
        Ok(())
    }

    /// Every output is what the problem asks for.
    pub(super) fn answers(&self) -> Result<(), Flaw> {
        let outputs = if self.in_place {
            &self.inputs
        } else {
            &self.outputs
        };
        for (rank, memory) in outputs.iter().enumerate() {
            for index in self.problem.outputs(rank).flatten() {
                if !memory[index].is_answer(self.problem, index) {
                    return Err(Flaw::Answer {
                        cell: Cell {
                            rank,
                            region: Region::Output,
                            index,
                        },
                        found: memory[index],
                    });
                }
            }
        }
        Ok(())
    }

    fn members(&self, ranks: Ranks) -> Range<Rank> {
        match ranks {
            Ranks::All => 0..self.problem.world,
            Ranks::One(rank) => rank..rank + 1,
        }
    }
}
