//! Private buffers: what peers cannot reach goes through stages in the arenas.
//!
//! With the first meeting every rank announces where its buffers lie, or that they are private; when any rank's are, all
//! ranks run the same schedule window by window on the stages instead, and copy in before and out after. Elements are
//! folded alone, so the bits are the same. A window ends with the schedule's last meeting: nobody then still loads from a
//! stage, and what peers have stored in ours stays until they store the next window, which is after the meeting to which we
//! come only once we have copied out.

use std::ops::Range;

use fabric_kernels as kernels;

use super::{
    super::super::Data,
    Place,
    outline::{Key, Outline},
    pass::{Hand, Pass},
};
use crate::{
    error::Result,
    schedule::{Kind, Problem},
    wire::shm::{STAGE_BYTES, STAGE_IN, STAGE_OUT},
};

impl Pass<'_> {
    pub(super) fn windows(&mut self, outline: &Outline, data: &mut Data) -> Result<()> {
        let (problem, size, dtype) = (&outline.problem, self.math.size, self.math.stamp.dtype);
        let hand = Hand::new(outline, data);
        let parts = Parts::of(problem);
        let width = STAGE_BYTES / dtype.size() / parts.held;
        let longest = parts.parts.iter().map(ExactSizeIterator::len).max();
        let stages = Place {
            input: STAGE_IN,
            output: STAGE_OUT,
        };
        self.places.resize(size, stages);
        for start in (0..longest.unwrap_or(0)).step_by(width) {
            let window = parts.window(start, width);
            let key = window.key(problem, dtype);
            let (tuning, rank) = (self.tuning, self.math.rank);
            let small = self
                .outlines
                .get(key, |key| Outline::new(key, tuning, size, rank));
            self.copy_in(problem, &small.problem, &window, &hand, data)?;
            self.steps(&small, &small.steps)?;
            self.copy_out(problem, &small.problem, &window, &hand, data)?;
        }
        Ok(())
    }

    fn copy_in(
        &mut self,
        whole: &Problem,
        small: &Problem,
        window: &Window,
        hand: &Hand,
        data: &Data,
    ) -> Result<()> {
        let (rank, dtype) = (self.math.rank, self.math.stamp.dtype);
        let (own, base) = (whole.input(rank), small.input(rank).start);
        for (large, at) in window.within(&own) {
            let mut at = STAGE_IN + ((at - base) * dtype.size()) as u64;
            let part = large.start - own.start..large.end - own.start;
            hand.read_part(data, part, |slab, range| {
                let stage = self.group.own().mapping();
                let stage = stage.span_mut(at, dtype, range.len());
                at += (range.len() * dtype.size()) as u64;
                kernels::cast(slab.part(range), stage).map_err(self.refused())
            })?;
        }
        Ok(())
    }

    fn copy_out(
        &mut self,
        whole: &Problem,
        small: &Problem,
        window: &Window,
        hand: &Hand,
        data: &mut Data,
    ) -> Result<()> {
        let (rank, dtype) = (self.math.rank, self.math.stamp.dtype);
        let mut staged = 0;
        let mut before = 0; // elements of the output before this part
        debug_assert!(small.output_elems(rank) * dtype.size() <= STAGE_BYTES);
        for own in whole.outputs(rank) {
            for (large, _) in window.within(&own) {
                let start = before + large.start - own.start;
                let at = STAGE_OUT + (staged * dtype.size()) as u64;
                staged += large.len();
                hand.write(data, start..start + large.len(), |slab, range, skip| {
                    let stage = self.group.own().mapping();
                    let at = at + (skip * dtype.size()) as u64;
                    let stage = stage.span(at, dtype, range.len());
                    kernels::cast(stage, slab.part_mut(range)).map_err(self.refused())
                })?;
            }
            before += own.len();
        }
        Ok(())
    }
}

/// What a window is cut out of: each slice where ranks have their own, the vector where all have the whole.
struct Parts {
    parts: Vec<Range<usize>>,
    held: usize, // how many of them one rank holds at most
}

impl Parts {
    fn of(problem: &Problem) -> Self {
        match problem.kind {
            Kind::AllToAll => Self {
                parts: problem.blocks.clone(),
                held: problem.world,
            },
            Kind::ReduceScatter | Kind::AllGather | Kind::Gather { .. } | Kind::Scatter { .. } => {
                Self {
                    parts: problem.slices.clone(),
                    held: problem.world,
                }
            }
            _ => Self {
                parts: std::iter::once(0..problem.elems()).collect(),
                held: 1,
            },
        }
    }

    fn window(&self, start: usize, width: usize) -> Window {
        let mut at = 0;
        let pieces = self.parts.iter().map(|part| {
            let from = part.end.min(part.start + start);
            let piece = from..part.end.min(from + width);
            let place = at;
            at += piece.len();
            (piece, place)
        });
        Window(pieces.collect())
    }
}

/// Pieces of the full vector, and where each starts in the window's own.
struct Window(Vec<(Range<usize>, usize)>);

impl Window {
    /// The window, as a problem of its own.
    fn key(&self, problem: &Problem, dtype: kernels::Dtype) -> Key {
        let numel = self.0.iter().map(|(piece, _)| piece.len()).sum();
        let first = self.0[0].0.len();
        let is_even = self.0.iter().all(|(piece, _)| piece.len() == first);
        Key {
            kind: problem.kind,
            lifted: problem.lifted,
            dtype,
            numel,
            counts: (!is_even).then(|| self.0.iter().map(|(piece, _)| piece.len()).collect()),
            is_window: true,
        }
    }

    /// The pieces that lie in a part of the full vector, none of which crosses its border.
    fn within(&self, part: &Range<usize>) -> impl Iterator<Item = (Range<usize>, usize)> {
        let inside = |piece: &Range<usize>| piece.start >= part.start && piece.end <= part.end;
        let pieces = self
            .0
            .iter()
            .filter(move |(piece, _)| inside(piece) && !piece.is_empty());
        pieces.cloned()
    }
}
