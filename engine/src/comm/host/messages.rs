//! The executor that runs schedules by messages: each round exchanges over the wire, then folds and copies in place.
//! Scripts and scratch memory are kept from call to call, so that a training step in its stride allocates nothing.

use std::{sync::Arc, time::Duration};

use fabric_kernels::Dtype;

use super::{
    super::{Call, Data, ReduceOp, Spent},
    math::{Action, Math},
    recent::Recent,
    script::{Hold, Script, Verb},
};
use crate::{
    buffer::{Piece, SLAB_ALIGN, Slab, carve},
    clock::Clock,
    error::{Error, Result},
    schedule::{
        self, Form, Kind, Problem, Slot,
        choose::{Tuning, WireKind},
    },
    wire::{Parcel, Traffic, Wire, frame::Stamp},
};

/// A wire, and what is remembered between calls.
pub(super) struct Messages {
    wire: Box<dyn Wire>,
    clock: Clock,
    kind: WireKind,
    tuning: Tuning,
    scripts: Recent<Key, Script>,
    memory: Vec<Slab>,  // of the call that runs: its own, then scratch
    room: Option<Slab>, // bytes that scratch is cut from
    letters: Traffic,   // of the message that is sent or received
}

/// What decides a script.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    kind: Kind,
    lifted: bool,
    dtype: Dtype,
    numel: usize,
    hold: Hold,
    lengths: Option<Arc<[usize]>>, // of uneven slices, or of several slabs
}

impl Messages {
    pub(super) fn new(wire: Box<dyn Wire>, kind: WireKind, tuning: Tuning, clock: Clock) -> Self {
        Self {
            wire,
            clock,
            kind,
            tuning,
            scripts: Recent::new(),
            memory: Vec::new(),
            room: None,
            letters: Traffic::default(),
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
        data: &mut Data,
        patience: Duration,
    ) -> Result<Spent> {
        let deadline = self.clock.now().saturating_add(patience);
        let given = std::mem::replace(data, Data::None);
        let (back, spent) = self.do_on(stamp, call, given, deadline)?;
        *data = back;
        Ok(spent)
    }

    fn do_on(
        &mut self,
        stamp: &Stamp,
        call: &Call,
        data: Data,
        deadline: Duration,
    ) -> Result<(Data, Spent)> {
        let Some(kind) = call.op.kind() else {
            return self.exchange(stamp, call, data, deadline);
        };
        let hold = Hold::of(&data);
        let lengths = match &data {
            Data::Many(slabs) => Some(slabs.iter().map(Slab::numel).collect()),
            _ => call.counts.clone(),
        };
        let script = self.script(Key {
            kind,
            lifted: call.op.is_lifted(),
            dtype: stamp.dtype,
            numel: stamp.numel as usize,
            hold,
            lengths,
        });
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

    /// A message, or one each way at once.
    fn exchange(
        &mut self,
        stamp: &Stamp,
        call: &Call,
        data: Data,
        deadline: Duration,
    ) -> Result<(Data, Spent)> {
        let (to, from) = call.op.ends();
        let hold = Hold::of(&data);
        let (mut letters, before) = (std::mem::take(&mut self.letters), self.wire.sent());
        self.lay(&[], data, stamp.dtype, stamp.dtype);
        let incoming = usize::from(hold == Hold::Apart);
        for (parcels, peer, slab) in [
            (&mut letters.sends, to, 0),
            (&mut letters.recvs, from, incoming),
        ] {
            parcels.clear();
            parcels.extend(peer.map(|peer| Parcel {
                peer,
                pieces: vec![Piece {
                    slab,
                    range: 0..self.memory[slab].numel(),
                }],
            }));
        }
        let memory = &mut self.memory;
        self.wire
            .exchange(stamp, 0, &letters, memory, Some(deadline))?;
        self.letters = letters;
        let after = self.wire.sent();
        let cost = Spent {
            collectives: 1,
            messages: after.messages - before.messages,
            bytes: after.payload_bytes - before.payload_bytes,
        };
        Ok((self.clear(hold), cost))
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

    /// What `run` will cost, from the schedule alone. A message's elements are `numel`.
    pub(super) fn price(&mut self, call: &Call, dtype: Dtype, numel: usize) -> Spent {
        let mut spent = Spent {
            collectives: 1,
            ..Spent::default()
        };
        let Some(kind) = call.op.kind() else {
            if call.op.ends().0.is_some() {
                spent.messages = 1;
                spent.bytes = (numel * dtype.size()) as u64;
            }
            return spent;
        };
        let key = Key {
            kind,
            lifted: call.op.is_lifted(),
            dtype,
            numel,
            hold: if kind == Kind::AllToAll {
                Hold::Apart
            } else {
                Hold::InPlace
            },
            lengths: call.counts.clone(),
        };
        let price = self.script(key).price;
        let partial = call.op.reduce();
        let partial = partial.map_or(dtype, |reduce| reduce.partial(dtype));
        spent.messages = price.messages as u64;
        spent.bytes = price.bytes(dtype.size(), partial.size()) as u64;
        spent
    }

    fn script(&mut self, key: Key) -> Arc<Script> {
        let (world, rank) = (self.wire.size(), self.wire.rank());
        let (tuning, wire, window) = (&self.tuning, self.kind, self.wire.window_bytes());
        self.scripts.get(key, |key| {
            let bytes = key.numel * key.dtype.size();
            let algorithm = tuning.choose(&key.kind, world, bytes, wire);
            let (lengths, is_many) = (key.lengths.as_deref(), matches!(key.hold, Hold::Many(_)));
            let problem = match lengths {
                Some(counts) if !is_many => Problem::with_counts(key.kind, world, counts),
                _ => Problem::even(key.kind, world, key.numel),
            };
            let problem = problem.with_lifted(key.lifted);
            let window = window.map_or(usize::MAX, |bytes| bytes / key.dtype.size());
            let schedule = schedule::windows(algorithm, &problem, rank, window)
                .or_else(|| schedule::windows(schedule::Algorithm::Direct, &problem, rank, window))
                .expect("direct does every collective");
            Script::new(&problem, rank, schedule, key.hold, lengths.unwrap_or(&[]))
        })
    }

    /// Lay out a call's memory, so that a script's pieces find their slab: its own slabs, then one for each slot.
    fn lay(&mut self, slots: &[Slot], data: Data, dtype: Dtype, partial: Dtype) {
        self.memory.clear(); // what a failed call left
        match data {
            Data::None => {}
            Data::InPlace(slab) => self.memory.push(slab),
            Data::Out { from, into } => self.memory.extend([from, into]),
            Data::Many(slabs) => self.memory.extend(slabs),
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
        let memory = &mut self.memory;
        let mut next = || memory.pop().expect("a call's own slabs are laid first");
        match hold {
            Hold::Nothing => Data::None,
            Hold::InPlace => Data::InPlace(next()),
            Hold::Apart => {
                let into = next();
                Data::Out { from: next(), into }
            }
            Hold::Many(_) => Data::Many(self.memory.drain(..).collect()),
        }
    }
}
