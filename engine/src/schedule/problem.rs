//! What is to be done, before anybody says how: the collective, the ranks, and which elements each of them gives and gets.

use std::ops::Range;

use super::{Kind, Rank};

/// What is to be done, the same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The collective.
    pub kind: Kind,
    /// How many ranks take part; at least one.
    pub world: usize,
    /// `slices[r]` is rank r's slice of the full vector, in elements; consecutive, covering `0..elems`. In an all-to-all the
    /// full vector is all inputs, one after the other, and the slice is rank r's input.
    pub slices: Vec<Range<usize>>,
    /// Only in an all-to-all: `blocks[from * world + to]` are the elements that one rank has for another.
    pub blocks: Vec<Range<usize>>,
    /// Leaves are changed before they are folded (premul-sum), so they travel in the accumulator's form.
    pub lifted: bool,
}

impl Problem {
    /// Even slices: the first `elems % world` are one longer; so with an all-to-all's blocks within each slice.
    pub fn even(kind: Kind, world: usize, elems: usize) -> Problem {
        assert!(world > 0, "a world has at least one rank");
        let cut = |elems: usize| {
            (0..world).map(move |rank| elems / world + usize::from(rank < elems % world))
        };
        let counts: Vec<usize> = match kind {
            Kind::AllToAll => cut(elems).flat_map(cut).collect(),
            _ => cut(elems).collect(),
        };
        Problem::with_counts(kind, world, &counts)
    }

    /// Rank r's slice has `counts[r]` elements; in an all-to-all, `counts[from * world + to]` elements go from one rank to
    /// another. Zeros are welcome.
    pub fn with_counts(kind: Kind, world: usize, counts: &[usize]) -> Problem {
        assert!(world > 0, "a world has at least one rank");
        if let Some(root) = kind.root() {
            assert!(root < world, "root {root} is outside a world of {world}");
        }
        let mut start = 0;
        let ranges = counts.iter().map(|count| {
            let range = start..start + count;
            start = range.end;
            range
        });
        let ranges: Vec<_> = ranges.collect();
        let (slices, blocks) = if kind == Kind::AllToAll {
            assert_eq!(counts.len(), world * world, "one count for each pair");
            let rows = ranges.chunks(world);
            let rows = rows.map(|row| row[0].start..row[world - 1].end);
            (rows.collect(), ranges)
        } else {
            assert_eq!(counts.len(), world, "one count for each rank");
            (ranges, Vec::new())
        };
        Problem {
            kind,
            world,
            slices,
            blocks,
            lifted: false,
        }
    }

    /// The same problem with leaves lifted, or not.
    pub fn with_lifted(mut self, lifted: bool) -> Problem {
        self.lifted = lifted;
        self
    }

    /// The full vector's length.
    pub fn elems(&self) -> usize {
        self.slices.last().map_or(0, |slice| slice.end)
    }

    /// The part of the full vector that a rank's Input holds.
    pub fn input(&self, rank: Rank) -> Range<usize> {
        match self.kind {
            Kind::AllReduce | Kind::ReduceScatter | Kind::Reduce { .. } => 0..self.elems(),
            Kind::AllGather | Kind::Gather { .. } | Kind::AllToAll => self.slices[rank].clone(),
            Kind::Broadcast { root } | Kind::Scatter { root } if rank == root => 0..self.elems(),
            Kind::Broadcast { .. } | Kind::Scatter { .. } | Kind::Barrier => 0..0,
        }
    }

    /// The parts of the full vector that a rank's Output holds, in order: one, but for an all-to-all.
    pub fn outputs(&self, rank: Rank) -> impl Iterator<Item = Range<usize>> + Clone {
        let all = 0..self.elems();
        let one = match self.kind {
            Kind::AllReduce | Kind::AllGather | Kind::Broadcast { .. } => all,
            Kind::Reduce { root } | Kind::Gather { root } if rank == root => all,
            Kind::ReduceScatter | Kind::Scatter { .. } => self.slices[rank].clone(),
            Kind::Reduce { .. } | Kind::Gather { .. } | Kind::AllToAll | Kind::Barrier => 0..0,
        };
        let column = self.blocks.iter().skip(rank).step_by(self.world).cloned();
        let one = Some(one).filter(|_| self.blocks.is_empty());
        one.into_iter().chain(column)
    }

    /// How many elements a rank's Output holds.
    pub fn output_elems(&self, rank: Rank) -> usize {
        self.outputs(rank).map(|part| part.len()).sum()
    }

    /// Where in a rank's Output an element of the full vector is, if it is there.
    pub fn output_index(&self, rank: Rank, elem: usize) -> Option<usize> {
        let mut before = 0;
        for part in self.outputs(rank) {
            if part.contains(&elem) {
                return Some(before + elem - part.start);
            }
            before += part.len();
        }
        None
    }

    /// Whether Input and Output may share memory.
    pub fn has_in_place(&self) -> bool {
        self.kind != Kind::AllToAll
    }

    /// What goes from one rank to another in an all-to-all.
    pub(crate) fn block(&self, from: Rank, to: Rank) -> Range<usize> {
        self.blocks[from * self.world + to].clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_slices_differ_by_one_and_cover_the_vector() {
        let problem = Problem::even(Kind::AllReduce, 4, 10);
        assert_eq!(problem.slices, [0..3, 3..6, 6..8, 8..10]);
        assert_eq!(problem.elems(), 10);
    }
}
