//! Where a model's values stand between steps: of each parameter, the type in which it is updated, the ranks that hold its
//! elements, and this rank's own, in the model or beside it.

use std::{ops::Range, sync::Arc};

use fabric_engine::{
    Error, Result,
    kernels::{self, Dtype, Span, SpanMut},
    shard::{
        mains::Mains,
        plan::{Piece, Plan},
    },
};

use crate::model::{Core, Model, ParamId, ParamMeta};

/// A model's values.
pub(super) struct Holding {
    model: Arc<dyn Model>,
    mains: Arc<Mains>,
    plan: Plan,
    rank: usize,
}

/// Elements of a tensor, and the rank that holds them; `None` is every rank.
pub(super) type Held = (Option<usize>, Range<usize>);

impl Holding {
    pub(super) fn of(core: &Core) -> Self {
        let sequencer = core.sequencer();
        Self {
            model: core.model.clone(),
            mains: sequencer.mains(),
            plan: sequencer.plan().clone(),
            rank: sequencer.rank(),
        }
    }

    /// The parameters, frozen ones too.
    pub(super) fn params(&self) -> &[ParamMeta] {
        self.plan.params()
    }

    /// Whether the engine keeps values that the model's are copies of.
    pub(super) fn has_mains(&self) -> bool {
        self.plan.buckets().iter().any(|bucket| bucket.has_main())
    }

    /// The type in which `param` is updated and saved.
    pub(super) fn dtype(&self, param: ParamId) -> Dtype {
        match self.main(param) {
            Some((bucket, _)) => self.plan.buckets()[bucket].main_dtype,
            None => self.plan.param(param).dtype,
        }
    }

    /// Who holds which elements of `param`. Of several replicas, the first.
    pub(super) fn holders(&self, param: ParamId) -> Vec<Held> {
        match self.main(param) {
            Some((bucket, entry)) if self.plan.buckets()[bucket].axis.shards_update() => {
                let ranks = 0..self.plan.mesh().shards;
                let part = |rank| Some((Some(rank), self.plan.part(bucket, entry, rank)?.range));
                ranks.filter_map(part).collect()
            }
            _ => vec![(None, 0..self.plan.param(param).numel())],
        }
    }

    /// The elements of `param` that this rank holds.
    pub(super) fn own(&self, param: ParamId) -> Range<usize> {
        match self.main(param) {
            Some((bucket, entry)) => {
                let part = self.plan.part(bucket, entry, self.rank);
                part.map_or(0..0, |part| part.range)
            }
            None => 0..self.plan.param(param).numel(),
        }
    }

    /// Copy elements of `param` that this rank holds.
    pub(super) fn read(
        &self,
        param: ParamId,
        range: Range<usize>,
        mut into: SpanMut<'_>,
    ) -> Result<()> {
        if let Some((piece, start)) = self.piece(param) {
            let slab = self.mains.lock(piece.bucket).ok_or_else(gone)?;
            let place = inside(&piece, start, &range);
            return kernels::cast(slab.part(place), into)
                .map_err(Error::kernel(self.rank, "read parameters"));
        }
        let mut calls = 0;
        self.model.with(param, &mut |buffer| {
            calls += 1;
            buffer.read(range.clone(), into.reborrow())
        })?;
        self.once(param, calls)
    }

    /// Replace elements of `param` that this rank holds, cast on the way.
    pub(super) fn write(&self, param: ParamId, range: Range<usize>, from: Span<'_>) -> Result<()> {
        if let Some((piece, start)) = self.piece(param) {
            let mut slab = self.mains.lock(piece.bucket).ok_or_else(gone)?;
            let place = inside(&piece, start, &range);
            return kernels::cast(from, slab.part_mut(place))
                .map_err(Error::kernel(self.rank, "write parameters"));
        }
        let mut calls = 0;
        self.model.with(param, &mut |buffer| {
            calls += 1;
            buffer.write(range.clone(), from)
        })?;
        self.once(param, calls)
    }

    /// The bucket and the entry of a parameter whose values are beside the model.
    fn main(&self, param: ParamId) -> Option<(usize, usize)> {
        let place = self.plan.place(param);
        place.filter(|(bucket, _)| self.plan.buckets()[*bucket].has_main())
    }

    /// This rank's part of such a parameter, and where in the bucket its main values begin.
    fn piece(&self, param: ParamId) -> Option<(Piece, usize)> {
        let (bucket, entry) = self.main(param)?;
        let piece = self.plan.part(bucket, entry, self.rank)?;
        Some((piece, self.plan.own(bucket, self.rank).start))
    }

    /// What was not read would be saved as zeros.
    fn once(&self, param: ParamId, calls: usize) -> Result<()> {
        let name = &self.plan.param(param).name;
        match calls {
            1 => Ok(()),
            _ => Err(Error::argument(
                format!("Model::with has called back {calls} times for '{name}'"),
                "Call `f` once for each call of `with`",
            )),
        }
    }
}

/// Where elements `range` of a parameter are among this rank's main values.
fn inside(piece: &Piece, start: usize, range: &Range<usize>) -> Range<usize> {
    let place = |at: usize| piece.place.start - start + at - piece.range.start;
    place(range.start)..place(range.end)
}

fn gone() -> Error {
    Error::argument(
        "the main values of a bucket are missing",
        "This is a fault of the library: report it",
    )
}
