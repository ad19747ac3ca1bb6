//! The executor that runs schedules by messages: each round exchanges over the wire, then folds and copies in place.
//! Scripts and scratch memory are kept from call to call, so that a training step in its stride allocates nothing.

use std::{sync::Arc, time::Duration};

use fabric_kernels::Dtype;

use super::{
    super::{Call, Data, Op, ReduceOp, Spent},
    math::{Action, Math},
    recent::Recent,
    script::{Hold, Script, Verb},
};
use crate::{
    buffer::{SLAB_ALIGN, Slab, carve},
    error::{Error, Result},
    schedule::{
        self, Form, Kind, Problem, Slot,
        choose::{Tuning, WireKind},
    },
    wire::{Wire, frame::Stamp},
};

/// A wire, and what is remembered between calls.
pub(super) struct Messages {
    wire: Box<dyn Wire>,
    kind: WireKind,
    tuning: Tuning,
    scripts: Recent<Key, Script>,
    memory: Vec<Slab>,  // of the call that runs: its own, then scratch
    room: Option<Slab>, // bytes that scratch is cut from
}

/// What decides a script.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    kind: Kind,
    lifted: bool,
    dtype: Dtype,
    numel: usize,
    hold: Hold,
}

impl Messages {
    pub(super) fn new(wire: Box<dyn Wire>, kind: WireKind, tuning: Tuning) -> Self {
        Self {
            wire,
            kind,
            tuning,
            scripts: Recent::new(),
            memory: Vec::new(),
            room: None,
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
        let hold = Hold::of(&data);
        let script = self.script(call.op, stamp.dtype, stamp.numel as usize, hold);
        let before = self.wire.sent();
        let reduce = call.op.reduce().unwrap_or(ReduceOp::Sum);
        self.lay(
            &script.scratch,
            data,
            stamp.dtype,
            reduce.partial(stamp.dtype),
        );
        let math = Math {
            rank: self.wire.rank(),
            size: self.wire.size(),
            reduce,
            stamp,
        };
        self.play(&script, &math, deadline)?;
        let data = self.clear(hold);
        let after = self.wire.sent();
        let cost = Spent {
            collectives: 1,
            messages: after.messages - before.messages,
            bytes: after.payload_bytes - before.payload_bytes,
        };
        Ok((data, cost))
    }

    fn play(&mut self, script: &Script, math: &Math<'_>, deadline: Duration) -> Result<()> {
        for (round, act) in script.acts.iter().enumerate() {
            if !(act.traffic.sends.is_empty() && act.traffic.recvs.is_empty()) {
                self.wire.exchange(
                    math.stamp,
                    round as u32,
                    &act.traffic,
                    &mut self.memory,
                    Some(deadline),
                )?;
            }
            for step in &act.steps {
                let action = match step.verb {
                    Verb::Fold => Action::Fold(math.reduce.fold()),
                    Verb::Lift => math.lift(),
                    Verb::Finish => math.finish(),
                    Verb::Copy => Action::Cast,
                };
                let (read, write) = carve(&mut self.memory, &step.source, &step.target);
                action
                    .apply(write, read)
                    .map_err(Error::kernel(math.rank, math.stamp))?;
            }
        }
        Ok(())
    }

    /// What `run` will cost, from the schedule alone.
    pub(super) fn price(&mut self, op: Op, dtype: Dtype, numel: usize) -> Spent {
        let price = self.script(op, dtype, numel, Hold::InPlace).price;
        let partial = op.reduce().map_or(dtype, |reduce| reduce.partial(dtype));
        let bytes = price.bytes(dtype.size(), partial.size());
        Spent {
            collectives: 1,
            messages: price.messages as u64,
            bytes: bytes as u64,
        }
    }

    fn script(&mut self, op: Op, dtype: Dtype, numel: usize, hold: Hold) -> Arc<Script> {
        let key = Key {
            kind: op.kind(),
            lifted: op.is_lifted(),
            dtype,
            numel,
            hold,
        };
        let (world, rank) = (self.wire.size(), self.wire.rank());
        self.scripts.get(key, || {
            let bytes = numel * dtype.size();
            let algorithm = self.tuning.choose(&key.kind, world, bytes, self.kind);
            let problem = Problem::even(key.kind, world, numel).with_lifted(key.lifted);
            let schedule = schedule::messages(algorithm, &problem, rank)
                .or_else(|| schedule::messages(schedule::Algorithm::Direct, &problem, rank))
                .expect("direct does every collective");
            Script::new(&problem, rank, schedule, hold)
        })
    }

    /// Lay out a call's memory, so that a script's pieces find their slab: its own slabs, then one for each slot.
    fn lay(&mut self, slots: &[Slot], data: Data, dtype: Dtype, partial: Dtype) {
        self.memory.clear(); // what a failed call left
        match data {
            Data::None => {}
            Data::InPlace(slab) => self.memory.push(slab),
            Data::Out { from, into } => self.memory.extend([from, into]),
        }
        let dtype = |slot: &Slot| match slot.form {
            Form::Partial => partial,
            Form::Payload => dtype,
        };
        // Aligned as slabs are; a slot may be longer than its elements.
        let bytes = |slot: &Slot| (slot.elems * dtype(slot).size()).next_multiple_of(SLAB_ALIGN);
        let total = slots.iter().map(bytes).sum();
        let room = self.room.take().filter(|room| room.bytes() >= total);
        let mut room = room.unwrap_or_else(|| Slab::zeroed(Dtype::U8, total));
        for slot in slots {
            let (used, rest) = room.split_at(bytes(slot));
            self.memory.push(used.recast(dtype(slot)));
            room = rest;
        }
        self.room = Some(room);
    }

    /// Undo [`Messages::lay`].
    fn clear(&mut self, hold: Hold) -> Data {
        for used in self.memory.drain(hold.slabs()..).rev() {
            let joined = self
                .room
                .take()
                .map(|rest| Slab::join(used.recast(Dtype::U8), rest));
            self.room = joined.and_then(Result::ok); // they are neighbours; were they not, there would be new room
        }
        let mut next = || {
            self.memory
                .pop()
                .expect("a call's own slabs are laid first")
        };
        match hold {
            Hold::Nothing => Data::None,
            Hold::InPlace => Data::InPlace(next()),
            Hold::Apart => {
                let into = next();
                Data::Out { from: next(), into }
            }
        }
    }
}
