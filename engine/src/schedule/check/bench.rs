//! One rank's memory, on symbols: regions, bounds, and what was touched when.

use std::ops::Range;

use super::flaw::{Cell, Flaw, Value};
use crate::schedule::{Loc, Problem, Rank, Region, Schedule};

/// Where a region lies in a rank's arrays. Array 0 is Input's, 1 is Output's unless in place, then slots.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) array: usize,
    pub(super) start: usize,
    pub(super) len: usize,
}

/// One rank's memory.
pub(super) struct Bench {
    pub(super) arrays: Vec<Vec<Value>>,
    /// When a cell was last sent (odd) or received (even and not zero): `2 * round + 1`, `2 * round + 2`.
    pub(super) marks: Vec<Vec<usize>>,
    pub(super) input: Place,
    pub(super) output: Place,
    /// Where Input and Output begin in the memory they share in place.
    pub(super) shadow: (usize, usize),
    /// Which of that memory Output was written to; nothing where there is no such form.
    written: Vec<bool>,
}

/// A location, and when and by whom it is used.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) rank: Rank,
    pub(super) round: usize,
    pub(super) loc: &'a Loc,
}

impl At<'_> {
    pub(super) fn cell(&self, index: usize) -> Cell {
        Cell {
            rank: self.rank,
            region: self.loc.region,
            index,
        }
    }
}

impl Bench {
    pub(super) fn new(problem: &Problem, schedule: &Schedule, rank: Rank, in_place: bool) -> Bench {
        // Input in the full vector's coordinates, and where Output begins there; an all-to-all's does nowhere.
        let (elems, input) = (problem.elems(), problem.input(rank));
        let start = problem.outputs(rank).next().map_or(0, |part| part.start);
        let output = start..start + problem.output_elems(rank);
        let mut first = vec![Value::Nothing; if in_place { elems } else { input.len() }];
        let base = if in_place { input.start } else { 0 };
        for elem in input.clone() {
            first[base + elem - input.start] = Value::Leaf { rank, elem };
        }
        let second = vec![Value::Nothing; if in_place { 0 } else { output.len() }];
        let mut arrays = vec![first, second];
        arrays.extend(
            schedule
                .scratch
                .iter()
                .map(|slot| vec![Value::Nothing; slot.elems]),
        );
        let place = |array, range: &Range<usize>| Place {
            array: if in_place { 0 } else { array },
            start: if in_place { range.start } else { 0 },
            len: range.len(),
        };
        Bench {
            marks: arrays.iter().map(|array| vec![0; array.len()]).collect(),
            arrays,
            input: place(0, &input),
            output: place(1, &output),
            shadow: (input.start, output.start),
            written: vec![false; if problem.has_in_place() { elems } else { 0 }],
        }
    }

    /// The cells of one range of a location.
    pub(super) fn cells(
        &self,
        at: At<'_>,
        range: &Range<usize>,
    ) -> Result<(usize, Range<usize>), Flaw> {
        let place = match at.loc.region {
            Region::Input => self.input,
            Region::Output => self.output,
            Region::Scratch(slot) => Place {
                array: 2 + slot,
                start: 0,
                len: self.arrays[2 + slot].len(),
            },
        };
        if range.start > range.end || range.end > place.len {
            return Err(Flaw::Bounds {
                cell: at.cell(range.end.max(1) - 1),
                round: at.round,
                len: place.len,
            });
        }
        Ok((
            place.array,
            place.start + range.start..place.start + range.end,
        ))
    }

    /// All cells of a location, as (array, cell, index in the region).
    pub(super) fn list(&self, at: At<'_>) -> Result<Vec<(usize, usize, usize)>, Flaw> {
        let mut list = Vec::new();
        for range in &at.loc.ranges {
            let (array, cells) = self.cells(at, range)?;
            list.extend(
                cells
                    .enumerate()
                    .map(|(index, cell)| (array, cell, range.start + index)),
            );
        }
        Ok(list)
    }

    /// Source and target of a local move are the same memory (a copy onto itself) or have none in common.
    pub(super) fn disjoint(
        &self,
        into: At<'_>,
        fold: bool,
        sources: &[(usize, usize, usize)],
        targets: &[(usize, usize, usize)],
    ) -> Result<(), Flaw> {
        let same =
            |(a, b): (&(usize, usize, usize), &(usize, usize, usize))| (a.0, a.1) == (b.0, b.1);
        let (Some(source), Some(target)) = (sources.first(), targets.first()) else {
            return Ok(());
        };
        if source.0 != target.0 || (!fold && sources.iter().zip(targets).all(same)) {
            return Ok(());
        }
        let mut touched = vec![false; self.arrays[source.0].len()];
        sources.iter().for_each(|source| touched[source.1] = true);
        match targets.iter().find(|target| touched[target.1]) {
            Some(target) => Err(Flaw::Overlap {
                cell: into.cell(target.2),
                round: into.round,
            }),
            None => Ok(()),
        }
    }

    pub(super) fn read(
        &self,
        at: At<'_>,
        array: usize,
        cell: usize,
        index: usize,
    ) -> Result<Value, Flaw> {
        let late = self.written.get(self.shadow.0 + index) == Some(&true);
        if at.loc.region == Region::Input && late {
            return Err(Flaw::LateInput {
                cell: at.cell(index),
                round: at.round,
            });
        }
        match self.arrays[array][cell] {
            Value::Nothing => Err(Flaw::Undefined {
                cell: at.cell(index),
                round: at.round,
            }),
            value => Ok(value),
        }
    }

    pub(super) fn write(
        &mut self,
        at: At<'_>,
        array: usize,
        cell: usize,
        index: usize,
        value: Value,
    ) -> Result<(), Flaw> {
        match at.loc.region {
            Region::Input => {
                return Err(Flaw::Target {
                    cell: at.cell(index),
                    round: at.round,
                });
            }
            Region::Output => {
                if let Some(written) = self.written.get_mut(self.shadow.1 + index) {
                    *written = true;
                }
            }
            Region::Scratch(_) => {}
        }
        self.arrays[array][cell] = value;
        Ok(())
    }
}
