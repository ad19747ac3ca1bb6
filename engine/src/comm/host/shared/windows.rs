//! Private buffers: what peers cannot reach goes through stages in the arenas.
//!
//! With the first meeting every rank announces where its buffers lie, or that they are private; when any rank's are, all
//! ranks run the same schedule window by window on the stages instead, and copy in before and out after. Elements are
//! folded alone, so the bits are the same. A window ends with the schedule's last meeting: nobody then still loads from a
//! stage, and what peers have stored in ours stays until they store the next window, which is after the meeting to which we
//! come only once we have copied out.

use std::{ops::Range, sync::Arc};

use fabric_kernels as kernels;

use super::{
    super::super::Data,
    Place,
    hand::Hand,
    outline::{Key, Outline},
    pass::Pass,
};
use crate::{
    error::Result,
    schedule::{Kind, Problem},
    wire::shm::{STAGE_BYTES, STAGE_IN, STAGE_OUT},
};

impl Pass<'_> {
    pub(super) fn windows(&mut self, outline: &Outline, data: &mut Data) -> Result<()> {
        let (problem, size) = (&outline.problem, self.math.size);
        let hand = Hand::new(outline, data);
        let stages = Place {
            input: STAGE_IN,
            output: STAGE_OUT,
        };
        self.places.resize(size, stages);
        let (tuning, rank, dtype) = (self.tuning, self.math.rank, self.math.stamp.dtype);
        let make = |key: &Key| Outline::new(key, tuning, size, rank);
        if let Some(windows) = outline.windows(dtype) {
            for window in windows {
                let small = self.outlines.get(window.key.clone(), make);
                self.window(problem, window, &small, &hand, data)?;
            }
            return Ok(());
        }
        let mut last: Option<(Key, Arc<Outline>)> = None;
        for window in windows(problem, dtype) {
            let small = match last.take() {
                Some((key, small)) if key == window.key => small,
                _ => Arc::new(make(&window.key)),
            };
            self.window(problem, &window, &small, &hand, data)?;
            last = Some((window.key, small));
        }
        Ok(())
    }

    fn window(
        &mut self,
        whole: &Problem,
        window: &Window,
        small: &Outline,
        hand: &Hand,
        data: &mut Data,
    ) -> Result<()> {
        self.copy_in(whole, &small.problem, window, hand, data)?;
        self.steps(small, &small.steps)?;
        self.copy_out(whole, &small.problem, window, hand, data)
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
            hand.read(data, part, |slab, range| {
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

const KEPT_PIECES: usize = if cfg!(test) { 8 } else { 8 << 10 }; // the tests see both ways

/// Pieces of the full vector, one out of each part, and where each starts in the window's own.
pub(super) struct Window {
    pieces: Vec<(Range<usize>, usize)>,
    key: Key, // of the window as a problem of its own
}

/// The windows of a problem. They are cut out of each slice where ranks have their own, and out of the vector where all have
/// the whole.
fn windows(problem: &Problem, dtype: kernels::Dtype) -> impl ExactSizeIterator<Item = Window> {
    let (parts, held) = match problem.kind {
        Kind::AllToAll => (problem.blocks.clone(), problem.world),
        Kind::ReduceScatter | Kind::AllGather | Kind::Gather { .. } | Kind::Scatter { .. } => {
            (problem.slices.clone(), problem.world)
        }
        _ => (std::iter::once(0..problem.elems()).collect(), 1),
    };
    let width = STAGE_BYTES / dtype.size() / held; // of what one rank holds at most
    let longest = parts.iter().map(ExactSizeIterator::len).max();
    let starts = (0..longest.unwrap_or(0)).step_by(width);
    starts.map(move |start| Window::new(problem, dtype, &parts, start, width))
}

/// The same, to be kept; `None` where there are so many pieces that they are better cut anew each time.
pub(super) fn few_windows(problem: &Problem, dtype: kernels::Dtype) -> Option<Vec<Window>> {
    let windows = windows(problem, dtype);
    let parts = problem.blocks.len().max(problem.world);
    (windows.len() * parts <= KEPT_PIECES).then(|| windows.collect())
}

impl Window {
    fn new(
        problem: &Problem,
        dtype: kernels::Dtype,
        parts: &[Range<usize>],
        start: usize,
        width: usize,
    ) -> Self {
        let mut numel = 0;
        let pieces = parts.iter().map(|part| {
            let from = part.end.min(part.start + start);
            let piece = from..part.end.min(from + width);
            let place = numel;
            numel += piece.len();
            (piece, place)
        });
        let pieces: Vec<_> = pieces.collect();
        let counts = pieces.iter().map(|(piece, _)| piece.len());
        let is_even = counts.clone().all(|count| count == pieces[0].0.len());
        let key = Key {
            kind: problem.kind,
            lifted: problem.lifted,
            dtype,
            numel,
            counts: (!is_even).then(|| counts.collect()),
            is_window: true,
        };
        Self { pieces, key }
    }

    /// The pieces that lie in a part of the full vector; none crosses its border.
    fn within(&self, part: &Range<usize>) -> impl Iterator<Item = (Range<usize>, usize)> {
        let inside = |piece: &Range<usize>| piece.start >= part.start && piece.end <= part.end;
        let pieces = self.pieces.iter();
        let pieces = pieces.filter(move |(piece, _)| inside(piece) && !piece.is_empty());
        pieces.cloned()
    }
}
