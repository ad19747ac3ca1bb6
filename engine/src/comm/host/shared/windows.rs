//! Private buffers: what peers cannot reach goes through stages in the arenas, a window at a time.
//!
//! With the first meeting every rank announces where its buffers lie, or that they are private; when any rank's are, all
//! ranks take this way. In a window each stages what others want of its input, all meet, and each fetches what it wants from
//! the others' stages, into the caller's memory at once. Of a vector that all hold, and more than two ranks fold, each
//! first folds its own slice onto a stage, and they meet again. Elements are folded alone, so the bits are the same.
//!
//! [Note: two stages] There are two stages, which are written in turns, with a meeting after each. Who writes a stage has
//! been to the meeting that followed the writing of the other; whoever came there had done with what was here before. This
//! holds from one call to the next, so that who is private can fill a stage before the first meeting.

use std::ops::Range;

use fabric_kernels::{self as kernels, Dtype, Finish, Span, SpanMut, Store};
use smallvec::SmallVec;

use super::{
    super::super::Data,
    hand::Hand,
    outline::{Outline, Work, own},
    pass::Pass,
};
use crate::{
    error::Result,
    schedule::{self, Kind, Problem},
    wire::shm::{STAGE_BYTES, STAGES},
};

const LINE_ELEMS: usize = 64; // of one byte

/// How a problem goes through the stages.
pub(super) struct Windows {
    /// How many.
    count: usize,
    /// Elements of each part in a window.
    width: usize,
    /// What others load of this rank's input, in its own coordinates: each has its place on the stage.
    parts: Vec<Part>,
    /// What this rank's output is made of.
    works: Vec<Staged>,
    /// All hold the whole vector, and each folds a slice of every window for all; has it an output?
    split: Option<bool>,
}

/// A part of this rank's input.
struct Part {
    slot: usize,
    range: Range<usize>,
    /// Only this rank has a use for it.
    is_own: bool,
}

/// A part of this rank's output, of which a window has a cut.
struct Staged {
    whole: Work,
    /// Where on the sources' stages it lies.
    slot: usize,
    /// Where in this rank's input it starts, if that is one of the sources.
    input: Option<usize>,
}

impl Windows {
    pub(super) fn new(problem: &Problem, rank: usize, dtype: Dtype) -> Self {
        let slots = match problem.kind {
            Kind::ReduceScatter | Kind::Scatter { .. } | Kind::AllToAll => problem.world,
            _ => 1,
        };
        let parts_of = (0..problem.world).flat_map(|rank| parts(problem, rank));
        let longest = parts_of.map(|part| part.len()).max().unwrap_or(0);
        // At least two, where they are not too short, so that one rank fetches while another fills.
        let bytes = longest * dtype.size() * slots / 2;
        let bytes = bytes.clamp(STAGE_BYTES / 8, STAGE_BYTES);
        let width = bytes / dtype.size() / slots;
        let width = match width / LINE_ELEMS * LINE_ELEMS {
            0 => width,
            lines => lines,
        };
        let own = own(problem, rank);
        let split =
            matches!(problem.kind, Kind::AllReduce | Kind::Reduce { .. } if problem.world > 2);
        let mine = parts(problem, rank).into_iter().enumerate();
        let mine = mine.map(|(slot, range)| Part {
            slot,
            is_own: !split && own.start <= range.start && range.end <= own.end,
            range,
        });
        let has_output = problem.output_elems(rank) > 0;
        Self {
            count: longest.div_ceil(width),
            width,
            parts: mine.collect(),
            works: works(problem, rank, dtype),
            split: split.then_some(has_output),
        }
    }

    /// What window `index` has of a part: where it starts there, and how many elements.
    fn cut(&self, index: usize, elems: usize) -> Range<usize> {
        let start = (index * self.width).min(elems);
        start..elems.min(start + self.width)
    }
}

/// The parts of a rank's input that go to different ranks, in its own coordinates.
fn parts(problem: &Problem, rank: usize) -> Vec<Range<usize>> {
    let input = problem.input(rank);
    let parts = match problem.kind {
        Kind::ReduceScatter => problem.slices.clone(),
        Kind::Scatter { root } if root == rank => problem.slices.clone(),
        Kind::AllToAll => (0..problem.world)
            .map(|to| problem.block(rank, to))
            .collect(),
        _ => vec![input.clone()],
    };
    let parts = parts.into_iter();
    parts
        .map(|part| part.start - input.start..part.end - input.start)
        .collect()
}

fn works(problem: &Problem, rank: usize, dtype: Dtype) -> Vec<Staged> {
    let works = Work::all(problem, dtype, rank, &schedule::posted(problem, rank));
    let works = works.into_iter().map(|whole| {
        let skip = whole.skip_bytes / dtype.size();
        let parts = parts(problem, whole.sources.start);
        let slot = parts.iter().position(|part| part.contains(&skip));
        Staged {
            slot: slot.expect("inputs are cut into parts"),
            input: whole.sources.contains(&rank).then_some(skip),
            whole,
        }
    });
    works.collect()
}

/// The way of one call through its windows.
pub(super) struct Way<'a> {
    windows: &'a Windows,
    hand: Hand,
    store: Store, // of outputs
}

impl Pass<'_> {
    pub(super) fn way<'a>(&self, outline: &'a Outline, data: &Data) -> Way<'a> {
        Way {
            windows: outline.windows(self.math.stamp.dtype),
            hand: Hand::new(outline, data),
            store: self.store(outline),
        }
    }

    /// Do all windows. `has_begun`: this rank has filled its stage for the first; `have_all`: so have all.
    pub(super) fn windows(
        &mut self,
        way: &Way,
        data: &mut Data,
        has_begun: bool,
        have_all: bool,
    ) -> Result<()> {
        for index in 0..way.windows.count {
            if index > 0 || !has_begun {
                self.fill(way, index, data)?;
            }
            if index > 0 || !have_all {
                self.meet([0; 6])?;
            }
            match way.windows.split {
                Some(has_output) => self.split(way, index, has_output, data)?,
                None => self.fetch(way, index, data)?,
            }
            *self.turn = self.turn.wrapping_add(1);
        }
        Ok(())
    }

    /// Stage what others want in a window.
    pub(super) fn fill(&self, way: &Way, index: usize, data: &Data) -> Result<()> {
        // In place, what is folded is loaded from the stage, because its place is stored to.
        let is_apart = matches!(data, Data::Out { .. });
        let windows = way.windows;
        for part in &windows.parts {
            if part.is_own && (is_apart || !self.math.reduces()) {
                continue;
            }
            let cut = windows.cut(index, part.range.len());
            let own = match windows.split.filter(|_| is_apart) {
                Some(_) => self.slice(self.math.rank, cut.len()),
                None => 0..0,
            };
            for piece in [0..own.start, own.end..cut.len()] {
                let mut skip = part.slot * windows.width + piece.start;
                let start = part.range.start + cut.start;
                let piece = start + piece.start..start + piece.end;
                way.hand.read(data, piece, |slab, range| {
                    let stage = self.stage_mut(*self.turn, skip, range.len());
                    skip += range.len();
                    kernels::cast(slab.part(range), stage).map_err(self.refused())
                })?;
            }
        }
        Ok(())
    }

    /// A window of this rank's output, from all stages.
    fn fetch(&mut self, way: &Way, index: usize, data: &mut Data) -> Result<()> {
        let windows = way.windows;
        for Staged { whole, slot, input } in &windows.works {
            let sources = &whole.sources;
            let is_here = whole.peers == 0 && self.factors.is_empty();
            let cut = windows.cut(index, whole.elems);
            if cut.is_empty() || (is_here && !matches!(data, Data::Out { .. })) {
                continue; // in place, the elements are where they belong
            }
            self.spend(whole.peers, cut.len());
            let skip = slot * windows.width;
            let part = whole.start + cut.start..whole.start + cut.end;
            if let Data::Out { from, into } = data {
                let own =
                    input.map(|start| from.part(at(&way.hand.input, start + cut.start, cut.len())));
                let target = into.part_mut(at(&way.hand.output, part.start, part.len()));
                self.join(sources, skip, own, target, way.store)?;
                continue;
            }
            way.hand.write(data, part, |slab, range, before| {
                let target = slab.part_mut(range);
                self.join(sources, skip + before, None, target, way.store)
            })?;
        }
        Ok(())
    }

    /// A window of a vector that all hold: this rank folds its slice of it for all.
    fn split(&mut self, way: &Way, index: usize, has_output: bool, data: &mut Data) -> Result<()> {
        let (rank, size) = (self.math.rank, self.math.size);
        let Some(part) = way.windows.parts.first() else {
            return Ok(());
        };
        let cut = way.windows.cut(index, part.range.len());
        let slice = self.slice(rank, cut.len());
        let own = match &*data {
            Data::Out { from, .. } => {
                Some(from.part(at(&way.hand.input, cut.start + slice.start, slice.len())))
            }
            _ => None,
        };
        let target = self.stage_mut(self.turn.wrapping_add(1), slice.start, slice.len());
        self.join(&(0..size), slice.start, own, target, Store::Cached)?;
        self.spend(size - 1, slice.len());
        self.meet([0; 6])?;
        *self.turn = self.turn.wrapping_add(1);
        if !has_output {
            return Ok(());
        }
        for step in 0..size {
            let source = (rank + step) % size; // everybody begins with its own, so that not all load from one rank at once
            let slice = self.slice(source, cut.len());
            let part = cut.start + slice.start..cut.start + slice.end;
            way.hand.write(data, part, |slab, range, before| {
                let staged = self.staged(source, slice.start + before, range.len());
                let target = &mut [slab.part_mut(range)];
                kernels::combine(
                    self.math.reduce.fold(),
                    &[staged],
                    None,
                    Finish::Cast,
                    target,
                    way.store,
                )
                .map_err(self.refused())
            })?;
            self.spent.bytes += self.bytes(if source == rank { 0 } else { slice.len() });
        }
        Ok(())
    }

    /// A rank's slice of a window of so many elements: whole lines, but for the last.
    fn slice(&self, rank: usize, elems: usize) -> Range<usize> {
        let width = elems.div_ceil(self.math.size).next_multiple_of(LINE_ELEMS);
        (rank * width).min(elems)..((rank + 1) * width).min(elems)
    }

    /// Fold elements from stages, `skip` elements from their starts. `own`: this rank's, where they still lie with the caller.
    fn join(
        &self,
        sources: &Range<usize>,
        skip: usize,
        own: Option<Span<'_>>,
        target: SpanMut<'_>,
        store: Store,
    ) -> Result<()> {
        let load = |source: usize| match own {
            Some(own) if source == self.math.rank => own,
            _ => self.staged(source, skip, target.len()),
        };
        let loads: SmallVec<[_; 16]> = sources.clone().map(load).collect();
        let (fold, finish) = (self.math.reduce.fold(), self.math.finishing(loads.len()));
        let factors = self.factors_for(sources);
        kernels::combine(fold, &loads, factors, finish, &mut [target], store)
            .map_err(self.refused())
    }

    fn spend(&mut self, peers: usize, elems: usize) {
        let bytes = self.bytes(peers * elems);
        self.spent.messages += u64::from(bytes > 0);
        self.spent.bytes += bytes;
    }

    fn bytes(&self, elems: usize) -> u64 {
        (elems * self.math.stamp.dtype.size()) as u64
    }

    /// Elements on a rank's stage.
    fn staged(&self, rank: usize, skip: usize, elems: usize) -> Span<'_> {
        let at = self.stage(*self.turn, skip);
        self.group
            .memory(rank)
            .span(at, self.math.stamp.dtype, elems)
    }

    /// Elements of this rank's stage of a turn, to be stored.
    fn stage_mut(&self, turn: u32, skip: usize, elems: usize) -> SpanMut<'_> {
        let (at, own) = (self.stage(turn, skip), self.group.own().mapping());
        own.span_mut(at, self.math.stamp.dtype, elems)
    }

    /// Where on the stage of a turn an element lies.
    fn stage(&self, turn: u32, skip: usize) -> u64 {
        STAGES[turn as usize % 2] + self.bytes(skip)
    }
}

/// So many elements of a range, from one of its own on.
fn at(range: &Range<usize>, start: usize, elems: usize) -> Range<usize> {
    range.start + start..range.start + start + elems
}
