//! The executor that runs schedules by messages: each round exchanges over the wire, then folds and copies in place.
//! Schedules and scratch memory are kept from call to call, so that a training step in its stride allocates no payload.

use std::{collections::HashMap, sync::Arc, time::Duration};

use fabric_kernels::Dtype;

use super::{
    super::{Call, Data, Op, ReduceOp, Spent},
    math::{Action, Math},
};
use crate::{
    buffer::{Piece, Slab, carve},
    error::{Error, Result},
    schedule::{
        self, Form, Kind, Loc, Move, Problem, Region, Schedule,
        choose::{Tuning, WireKind},
        price::Price,
    },
    wire::{Incoming, Outgoing, Wire, frame::Stamp},
};

const POOL: usize = 64; // scratch slabs kept

/// A wire, and what is remembered between calls.
pub(super) struct Messages {
    wire: Box<dyn Wire>,
    kind: WireKind,
    tuning: Tuning,
    plans: HashMap<Key, Arc<Plan>>,
    pool: Vec<Slab>,
}

/// What decides a schedule.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    op: u8,
    root: usize,
    lifted: bool,
    dtype: Dtype,
    numel: usize,
}

struct Plan {
    problem: Problem,
    schedule: Schedule,
}

impl Messages {
    pub(super) fn new(wire: Box<dyn Wire>, kind: WireKind, tuning: Tuning) -> Self {
        Self {
            wire,
            kind,
            tuning,
            plans: HashMap::new(),
            pool: Vec::new(),
        }
    }

    pub(super) fn rank(&self) -> usize {
        self.wire.rank()
    }

    pub(super) fn size(&self) -> usize {
        self.wire.size()
    }

    /// Do `call`; also says what it cost, as the wire counted it.
    pub(super) fn run(
        &mut self,
        stamp: &Stamp,
        call: &Call,
        data: Data,
        deadline: Duration,
    ) -> Result<(Data, Spent)> {
        let plan = self.plan(call.op, stamp.dtype, stamp.numel as usize);
        let before = self.wire.sent();
        let reduce = call.op.reduce().unwrap_or(ReduceOp::Sum);
        let partial = reduce.partial(stamp.dtype);
        let mut board = Board::lay(self, &plan, data, stamp.dtype, partial);
        let math = Math {
            rank: self.wire.rank(),
            size: self.wire.size(),
            reduce,
            stamp,
        };
        for (round, moves) in plan.schedule.rounds.iter().enumerate() {
            board.exchange(&mut *self.wire, stamp, round as u32, &moves.wire, deadline)?;
            for step in &moves.local {
                board.local(step, &math)?;
            }
        }
        let (data, scratch) = board.clear();
        self.pool.extend(scratch);
        self.pool.truncate(POOL);
        let after = self.wire.sent();
        let cost = Spent {
            collectives: 1,
            messages: after.messages - before.messages,
            bytes: after.payload_bytes - before.payload_bytes,
        };
        Ok((data, cost))
    }

    /// What `run` will cost, from the schedule alone.
    pub(super) fn price(&mut self, op: Op, dtype: Dtype, numel: usize) -> Spent {
        let plan = self.plan(op, dtype, numel);
        let price = Price::of(&plan.schedule);
        let partial = op.reduce().map_or(dtype, |reduce| reduce.partial(dtype));
        let bytes = price.bytes(dtype.size(), partial.size());
        Spent {
            collectives: 1,
            messages: price.messages as u64,
            bytes: bytes as u64,
        }
    }

    fn plan(&mut self, op: Op, dtype: Dtype, numel: usize) -> Arc<Plan> {
        let (kind, lifted) = (op.kind(), op.is_lifted());
        let root = if let Op::Broadcast { root } = op {
            root
        } else {
            0
        };
        let key = Key {
            op: op.code().0 as u8,
            root,
            lifted,
            dtype,
            numel,
        };
        let (world, rank) = (self.wire.size(), self.wire.rank());
        let algorithm = self
            .tuning
            .choose(&kind, world, numel * dtype.size(), self.kind);
        self.plans
            .entry(key)
            .or_insert_with(|| {
                let problem = Problem {
                    lifted,
                    ..Problem::even(kind, world, numel)
                };
                let schedule = schedule::messages(algorithm, &problem, rank)
                    .or_else(|| schedule::messages(schedule::Algorithm::Direct, &problem, rank))
                    .expect("direct does every collective");
                Arc::new(Plan { problem, schedule })
            })
            .clone()
    }

    /// A scratch slab, kept from an earlier call if one fits.
    fn scratch(&mut self, dtype: Dtype, numel: usize) -> Slab {
        let bytes = numel * dtype.size();
        match self.pool.iter().position(|slab| slab.bytes() == bytes) {
            Some(index) => self.pool.swap_remove(index).recast(dtype),
            None => Slab::zeroed(dtype, numel),
        }
    }
}

/// All memory of one call, laid out so that a schedule's regions find their slab.
struct Board {
    slabs: Vec<Slab>, // the caller's one or two, then scratch
    in_place: bool,
    empty: bool, // a barrier: slab 0 is nobody's
    input: usize,
    output: usize,
    forms: Vec<Form>, // by scratch slot
}

impl Board {
    fn lay(messages: &mut Messages, plan: &Plan, data: Data, dtype: Dtype, partial: Dtype) -> Self {
        let own = plan.problem.slices[messages.wire.rank()].start;
        let (in_place, empty) = (matches!(data, Data::InPlace(_)), matches!(data, Data::None));
        let (input, output) = match plan.problem.kind {
            Kind::ReduceScatter if in_place => (0, own),
            Kind::AllGather if in_place => (own, 0),
            _ => (0, 0),
        };
        let mut slabs = match data {
            Data::None => vec![Slab::zeroed(dtype, 0)],
            Data::InPlace(slab) => vec![slab],
            Data::Out { from, into } => vec![from, into],
        };
        let forms = plan.schedule.scratch.iter().map(|slot| slot.form).collect();
        slabs.extend(plan.schedule.scratch.iter().map(|slot| {
            let dtype = if slot.form == Form::Partial {
                partial
            } else {
                dtype
            };
            messages.scratch(dtype, slot.elems)
        }));
        Self {
            slabs,
            in_place,
            empty,
            input,
            output,
            forms,
        }
    }

    fn clear(self) -> (Data, impl Iterator<Item = Slab>) {
        let mut slabs = self.slabs.into_iter();
        let first = slabs.next().expect("a board has a first slab");
        let data = match (self.empty, self.in_place) {
            (true, _) => Data::None,
            (_, true) => Data::InPlace(first),
            _ => Data::Out {
                from: first,
                into: slabs.next().expect("an output beside the input"),
            },
        };
        (data, slabs)
    }

    /// The index of the first scratch slab.
    fn first_scratch(&self) -> usize {
        if self.in_place || self.empty { 1 } else { 2 }
    }

    fn pieces(&self, loc: &Loc) -> impl Iterator<Item = Piece> {
        let (slab, base) = match loc.region {
            Region::Input => (0, self.input),
            Region::Output => (self.first_scratch() - 1, self.output),
            Region::Scratch(slot) => (self.first_scratch() + slot, 0),
        };
        loc.ranges.iter().map(move |range| Piece {
            slab,
            range: base + range.start..base + range.end,
        })
    }

    fn form(&self, region: Region) -> Form {
        match region {
            Region::Scratch(slot) => self.forms[slot],
            Region::Input | Region::Output => Form::Payload,
        }
    }

    fn exchange(
        &mut self,
        wire: &mut dyn Wire,
        stamp: &Stamp,
        round: u32,
        moves: &[Move],
        deadline: Duration,
    ) -> Result<()> {
        if moves.is_empty() {
            return Ok(());
        }
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        for step in moves {
            match step {
                Move::Send { from, .. } => reads.extend(self.pieces(from)),
                Move::Recv { into, .. } => writes.extend(self.pieces(into)),
                Move::Fold { .. } | Move::Copy { .. } => {
                    unreachable!("the checker keeps local moves off the wire")
                }
            }
        }
        let (spans, span_muts) = carve(&mut self.slabs, &reads, &writes);
        let (mut spans, mut span_muts) = (spans.into_iter(), span_muts.into_iter());
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        for step in moves {
            match step {
                Move::Send { to, from } => {
                    sends.push(Outgoing {
                        to: *to,
                        parts: spans.by_ref().take(from.ranges.len()).collect(),
                    });
                }
                Move::Recv { from, into } => {
                    recvs.push(Incoming {
                        from: *from,
                        parts: span_muts.by_ref().take(into.ranges.len()).collect(),
                    });
                }
                Move::Fold { .. } | Move::Copy { .. } => {}
            }
        }
        wire.exchange(stamp, round, &sends, recvs, Some(deadline))
    }

    fn local(&mut self, step: &Move, math: &Math<'_>) -> Result<()> {
        let (target, source, action) = match step {
            Move::Fold { into, with } => (into, with, Action::Fold(math.reduce.fold())),
            Move::Copy { from, into } => {
                let action = match (self.form(from.region), self.form(into.region)) {
                    (Form::Payload, Form::Partial) => math.lift(),
                    (Form::Partial, Form::Payload) => math.finish(),
                    _ => Action::Cast,
                };
                (into, from, action)
            }
            Move::Send { .. } | Move::Recv { .. } => {
                unreachable!("the checker keeps messages out of the local moves")
            }
        };
        let pairs = zip(self.pieces(target).collect(), self.pieces(source).collect());
        for (target, source) in pairs {
            if target == source && matches!(action, Action::Cast) {
                continue; // in place: the element is where it belongs
            }
            let (mut reads, mut writes) = carve(&mut self.slabs, &[source], &[target]);
            let (Some(read), Some(write)) = (reads.pop(), writes.pop()) else {
                continue;
            };
            action
                .apply(write, read)
                .map_err(Error::kernel(math.rank, math.stamp.to_string()))?;
        }
        Ok(())
    }
}

/// Pair two lists of pieces, of equal length in all, cut where either is cut.
fn zip(targets: Vec<Piece>, sources: Vec<Piece>) -> Vec<(Piece, Piece)> {
    let mut pairs = Vec::with_capacity(targets.len().max(sources.len()));
    let (mut targets, mut sources) = (targets.into_iter(), sources.into_iter());
    let (mut target, mut source) = (targets.next(), sources.next());
    while let (Some(into), Some(from)) = (&mut target, &mut source) {
        let step = into.range.len().min(from.range.len());
        if step > 0 {
            pairs.push((take(into, step), take(from, step)));
        }
        if into.range.is_empty() {
            target = targets.next();
        }
        if from.range.is_empty() {
            source = sources.next();
        }
    }
    pairs
}

fn take(piece: &mut Piece, elems: usize) -> Piece {
    let start = piece.range.start;
    piece.range.start += elems;
    Piece {
        slab: piece.slab,
        range: start..start + elems,
    }
}
