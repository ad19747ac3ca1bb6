//! The pieces of a model that this rank updates, as a model of their own: an optimizer that works on buffers updates
//! shards as it updates whole parameters. And back again: what all ranks know of their pieces, as whole states.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use fabric_engine::{
    Error, Result,
    buffer::{Buffer, Slab},
    comm::Collectives,
    kernels::{Dtype, Span, SpanMut},
    shard::{SharedComm, mains::Mains, plan::Piece, sequencer::Sequencer},
};
use serde::{Deserialize, Serialize};

use crate::{
    model::{Events, Model, ParamId, ParamMeta, UpdateParam},
    optim::{OptimizerState, STEP},
};

/// This rank's pieces: parameter i of this model is piece i.
pub(crate) struct Shards {
    model: Arc<dyn Model>,
    mains: Arc<Mains>,
    pieces: Vec<Piece>,
    places: Vec<Place>, // by piece
    metas: Vec<ParamMeta>,
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
            ParamMeta::new(
                format!("{}[{start}..{end}]", whole.name),
                &[end - start],
                dtype,
            )
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
        Some(Self {
            model: model.clone(),
            mains: sequencer.mains(),
            metas: pieces.iter().map(meta).collect(),
            places: pieces.iter().map(place).collect(),
            pieces,
        })
    }

    /// The pieces.
    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
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

/// One rank's state of one piece, on its way to rank 0.
#[derive(Serialize, Deserialize)]
struct Row {
    kind: String,
    param: usize,
    range: Range<usize>,
    dtype: u8,
    #[serde(with = "serde_bytes")]
    bytes: Vec<u8>,
}

/// All ranks' states of pieces as the state of whole parameters; the same on all ranks.
pub(crate) fn gather_state(
    shards: &Shards,
    state: Result<OptimizerState>,
    comm: &SharedComm,
) -> Result<OptimizerState> {
    let mine = state.and_then(|state| Ok((state.steps, rows(shards, &state)?)));
    let packed = match &mine {
        Ok((steps, rows)) => rmp_serde::to_vec(&(steps, rows)),
        Err(_) => rmp_serde::to_vec(&(0u64, Vec::<Row>::new())),
    };
    let packed = packed.map_err(|error| Error::library("pack an optimizer's state", error))?;
    let all = comm.lock().all_gather_bytes(&packed)?;
    mine?; // the others fail alike: all have the same optimizer
    let mut whole = Whole {
        shards,
        steps: 0,
        tensors: BTreeMap::new(),
    };
    for bytes in all {
        let (steps, rows): (u64, Vec<Row>) = rmp_serde::from_slice(&bytes)
            .map_err(|error| Error::library("read another rank's optimizer state", error))?;
        whole.steps = whole.steps.max(steps);
        rows.into_iter().try_for_each(|row| whole.put(row))?;
    }
    let tensors = whole.tensors.into_iter().map(|((kind, param), slab)| {
        (
            format!("{kind}.{}", shards.model.params()[param].name),
            slab,
        )
    });
    Ok(OptimizerState {
        steps: whole.steps,
        tensors: tensors.collect(),
    })
}

/// A kind has no dot, a parameter's name may: `exp_avg.a.w` is `a.w`'s and not `w`'s.
fn rows(shards: &Shards, state: &OptimizerState) -> Result<Vec<Row>> {
    let row = |(name, slab): &(String, Slab)| {
        let found = name.split_once('.').and_then(|(kind, owner)| {
            let index = shards.metas.iter().position(|meta| meta.name == owner)?;
            Some((kind, &shards.pieces[index]))
        });
        let (kind, piece) = found.ok_or_else(|| unknown(name))?;
        Ok(Row {
            kind: kind.into(),
            param: piece.param.0,
            range: piece.range.clone(),
            dtype: slab.dtype().code(),
            bytes: slab.as_bytes().to_vec(),
        })
    };
    state.tensors.iter().map(row).collect()
}

fn unknown(name: &str) -> Error {
    Error::argument(
        format!("an optimizer's state has '{name}', which belongs to no parameter"),
        "Name states `kind.parameter`",
    )
}

/// States of whole parameters, as they are put together.
struct Whole<'a> {
    shards: &'a Shards,
    steps: u64,
    tensors: BTreeMap<(String, usize), Slab>,
}

impl Whole<'_> {
    fn put(&mut self, row: Row) -> Result<()> {
        let misfit = || unknown(&format!("{} of parameter {}", row.kind, row.param));
        let param = self
            .shards
            .model
            .params()
            .get(row.param)
            .ok_or_else(misfit)?;
        let dtype = Dtype::from_code(row.dtype).ok_or_else(misfit)?;
        // A counter is the parameter's, not an element's.
        let (numel, range) = match row.kind.as_str() {
            STEP => (1, 0..1),
            _ => (param.numel(), row.range.clone()),
        };
        if range.end > numel || row.bytes.len() != range.len() * dtype.size() {
            return Err(misfit());
        }
        let slab = self.tensors.entry((row.kind.clone(), row.param));
        let slab = slab.or_insert_with(|| Slab::zeroed(dtype, numel));
        let bytes = range.start * dtype.size()..range.end * dtype.size();
        slab.as_bytes_mut()[bytes].copy_from_slice(&row.bytes);
        Ok(())
    }
}

/// This rank's part of a state of whole parameters.
pub(crate) fn cut_state(shards: &Shards, state: &OptimizerState) -> Result<OptimizerState> {
    let mut tensors = Vec::new();
    for (name, slab) in &state.tensors {
        let params = shards.model.params();
        let found = name.split_once('.').and_then(|(kind, owner)| {
            let index = params.iter().position(|param| param.name == owner)?;
            Some((kind, index))
        });
        let (kind, param) = found.ok_or_else(|| unknown(name))?;
        let own = shards.pieces.iter().zip(&shards.metas);
        for (piece, meta) in own.filter(|(piece, _)| piece.param.0 == param) {
            let range = if kind == STEP {
                0..1
            } else {
                piece.range.clone()
            };
            if range.end > slab.numel() {
                return Err(Error::argument(
                    format!("the saved '{name}' has {} elements, too few", slab.numel()),
                    "Load the checkpoint of the same model",
                ));
            }
            let mut part = Slab::zeroed(slab.dtype(), range.len());
            let bytes = range.start * slab.dtype().size()..range.end * slab.dtype().size();
            part.as_bytes_mut().copy_from_slice(&slab.as_bytes()[bytes]);
            tensors.push((format!("{kind}.{}", meta.name), part));
        }
    }
    Ok(OptimizerState {
        steps: state.steps,
        tensors,
    })
}
