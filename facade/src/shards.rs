//! The pieces of a model that this rank updates, as a model of their own: an optimizer that works on buffers updates
//! shards as it updates whole parameters.

use std::{collections::HashMap, ops::Range, sync::Arc};

use fabric_engine::{
    Result,
    buffer::Buffer,
    kernels::{Dtype, Span, SpanMut},
    shard::{mains::Mains, plan::Piece, sequencer::Sequencer},
};

use crate::model::{Events, Model, ParamId, ParamMeta, UpdateParam};

/// This rank's pieces: parameter i of this model is piece i.
pub(crate) struct Shards {
    model: Arc<dyn Model>,
    mains: Arc<Mains>,
    pieces: Vec<Piece>,
    places: Vec<Place>, // by piece
    metas: Vec<ParamMeta>,
    by_name: HashMap<String, usize>,
    are_slices: Vec<bool>, // by piece: other ranks update other elements of the bucket
}

/// Where the values of a piece are.
enum Place {
    /// In the model, where they lie.
    Model,
    /// In the main values of the piece's bucket, at this range.
    Main(Range<usize>),
    /// There too, and rounded in the model.
    Both(Range<usize>),
}

impl Shards {
    /// The pieces of `model` that this rank updates by the sequencer's plan; `None` when it updates whole parameters in the
    /// model.
    pub(crate) fn of(model: &Arc<dyn Model>, sequencer: &Sequencer) -> Option<Self> {
        let plan = sequencer.plan();
        if !plan.updates_pieces() {
            return None;
        }
        let pieces = plan.pieces(sequencer.rank());
        let meta = |piece: &Piece| {
            let Range { start, end } = piece.range;
            let whole = plan.param(piece.param);
            let dtype = plan.buckets()[piece.bucket].main_dtype;
            let name = format!("{}[{start}..{end}]", whole.name);
            // A piece that is all of a parameter has its shape, for optimizers that look at matrices.
            match end - start == whole.numel() {
                true => ParamMeta::new(name, &whole.shape, dtype),
                false => ParamMeta::new(name, &[end - start], dtype),
            }
        };
        let place = |piece: &Piece| {
            let bucket = &plan.buckets()[piece.bucket];
            let start = plan.own(piece.bucket, sequencer.rank()).start;
            let range = piece.place.start - start..piece.place.end - start;
            match (bucket.has_main(), bucket.axis.shards_param()) {
                (false, _) => Place::Model,
                (true, true) => Place::Main(range),
                (true, false) => Place::Both(range),
            }
        };
        let is_slice = |piece: &Piece| plan.buckets()[piece.bucket].axis.shards_update();
        let metas: Vec<_> = pieces.iter().map(meta).collect();
        let names = metas.iter().enumerate();
        Some(Self {
            model: model.clone(),
            mains: sequencer.mains(),
            by_name: names
                .map(|(index, meta)| (meta.name.clone(), index))
                .collect(),
            are_slices: pieces.iter().map(is_slice).collect(),
            metas,
            places: pieces.iter().map(place).collect(),
            pieces,
        })
    }

    /// The pieces.
    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The number of the piece called `name`.
    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Whether other ranks do not update this piece too, or only those of other replicas do.
    pub(crate) fn is_slice(&self, piece: usize) -> bool {
        self.are_slices[piece]
    }
}

impl Model for Shards {
    fn params(&self) -> &[ParamMeta] {
        &self.metas
    }

    fn whole_params(&self) -> &[ParamMeta] {
        self.model.params()
    }

    fn whole(&self, param: ParamId) -> ParamId {
        self.pieces[param.0].param
    }

    fn with(&self, param: ParamId, f: &mut dyn FnMut(&mut dyn Buffer) -> Result<()>) -> Result<()> {
        self.update(param, &mut |buffer, copy| {
            f(buffer)?;
            let Some(copy) = copy else { return Ok(()) };
            match buffer.span() {
                Some(span) => copy.write(0..span.len(), span),
                None => unreachable!("main values lie in one piece"),
            }
        })
    }

    fn update(&self, param: ParamId, f: &mut UpdateParam<'_>) -> Result<()> {
        let piece = &self.pieces[param.0];
        let in_model = |f: &mut dyn FnMut(&mut Part<'_>) -> Result<()>| {
            self.model.with(piece.param, &mut |whole| {
                let range = piece.range.clone();
                f(&mut Part { whole, range })
            })
        };
        let in_main = |range: &Range<usize>, f: &mut dyn FnMut(&mut Part<'_>) -> Result<()>| {
            let mut slab = self
                .mains
                .lock(piece.bucket)
                .expect("this bucket has main values");
            let (whole, range) = (&mut *slab, range.clone());
            f(&mut Part { whole, range })
        };
        match &self.places[param.0] {
            Place::Model => in_model(&mut |part| f(part, None)),
            Place::Main(range) => in_main(range, &mut |part| f(part, None)),
            Place::Both(range) => {
                in_main(range, &mut |main| in_model(&mut |copy| f(main, Some(copy))))
            }
        }
    }

    fn attach(&self, _: Arc<dyn Events>) {
        // Gradients are the whole model's.
    }
}

/// A range of a buffer, as a buffer.
struct Part<'a> {
    whole: &'a mut dyn Buffer,
    range: Range<usize>,
}

impl Part<'_> {
    fn inner(&self, range: &Range<usize>) -> Range<usize> {
        self.range.start + range.start..self.range.start + range.end
    }
}

impl Buffer for Part<'_> {
    fn dtype(&self) -> Dtype {
        self.whole.dtype()
    }
    fn numel(&self) -> usize {
        self.range.len()
    }
    fn read(&self, range: Range<usize>, into: SpanMut<'_>) -> Result<()> {
        self.whole.read(self.inner(&range), into)
    }
    fn write(&mut self, range: Range<usize>, from: Span<'_>) -> Result<()> {
        let range = self.inner(&range);
        self.whole.write(range, from)
    }
    fn span(&self) -> Option<Span<'_>> {
        Some(self.whole.span()?.slice(self.range.clone()))
    }
    fn span_mut(&mut self) -> Option<SpanMut<'_>> {
        Some(self.whole.span_mut()?.into_slice(self.range.clone()))
    }
}
