//! The executor that runs schedules in shared memory: ranks meet, load their peers' elements where they lie, fold them
//! in registers, and store the result into everybody's output.

mod cache;
mod outline;
mod pass;
mod windows;

use std::{sync::Arc, time::Duration};

use fabric_kernels::Dtype;

use super::{
    super::{Call, Data, Op, ReduceOp, Spent},
    math::Math,
    recent::Recent,
};
use crate::{
    buffer::Slab,
    error::Result,
    schedule::choose::Tuning,
    wire::{
        frame::{Header, Stamp},
        shm::{Group, Letter},
    },
};
use outline::{Key, Outline};
use pass::Pass;

/// A group that shares memory, and what is kept between calls.
pub(super) struct SharedMemory {
    group: Group,
    tuning: Tuning,
    cache_bytes: usize, // what all ranks together can keep near
    outlines: Recent<Key, Outline>,
    last: Option<(Key, Arc<Outline>)>,
    inline: Slab,       // small inputs, by rank, of the call that runs
    factors: Vec<f64>,  // by rank, of the call that runs
    places: Vec<Place>, // by rank, of the call that runs
    kept: Vec<Data>,    // the memory of a call that failed: peers may still store there
}

/// Where a rank's input and output start in its arena, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    input: u64,
    output: u64,
}

impl SharedMemory {
    pub(super) fn new(group: Group, tuning: Tuning) -> Self {
        Self {
            inline: Slab::zeroed(Dtype::U8, group.size() * pass::INLINE_BYTES),
            group,
            tuning,
            cache_bytes: cache::bytes(),
            outlines: Recent::new(),
            last: None,
            factors: Vec::new(),
            places: Vec::new(),
            kept: Vec::new(),
        }
    }

    pub(super) fn rank(&self) -> usize {
        self.group.rank()
    }

    pub(super) fn size(&self) -> usize {
        self.group.size()
    }

    /// Do `call`, in at most `patience`; also says what it cost, as it was counted on the way.
    pub(super) fn run(
        &mut self,
        stamp: &Stamp,
        call: &Call,
        data: &mut Data,
        patience: Duration,
    ) -> Result<Spent> {
        self.group.begin(patience);
        let done = self.attempt(stamp, call, data);
        if done.is_err() {
            self.kept.push(std::mem::replace(data, Data::None));
            self.group.fail();
        }
        done
    }

    /// What `run` costs when all buffers are in arenas, from the schedule alone. Through the stages the same elements
    /// cross, but slices are cut in every window, which can shift a few elements from rank to rank, and every window
    /// counts as a message.
    pub(super) fn price(&mut self, call: &Call, dtype: Dtype, numel: usize) -> Spent {
        match Key::new(call, dtype, numel) {
            Some(key) => Outline::new(&key, &self.tuning, self.size(), self.rank()).price(dtype),
            None => Spent {
                collectives: 1,
                messages: u64::from(call.op.ends().0.is_some()),
                bytes: call
                    .op
                    .ends()
                    .0
                    .map_or(0, |_| (numel * dtype.size()) as u64),
            },
        }
    }

    fn attempt(&mut self, stamp: &Stamp, call: &Call, data: &mut Data) -> Result<Spent> {
        let (rank, size) = (self.rank(), self.size());
        let Some(key) = Key::new(call, stamp.dtype, stamp.numel as usize) else {
            return message(&mut self.group, stamp, call.op, data);
        };
        // The last call's is found without a look, because calls like to repeat.
        let outline = match self.last.take() {
            Some((last, outline)) if last == key => outline,
            _ => {
                let tuning = &self.tuning;
                let make = |key: &Key| Outline::new(key, tuning, size, rank);
                self.outlines.get(key.clone(), make)
            }
        };
        let mut pass = Pass {
            header: Header {
                stamp: *stamp,
                round: 0,
                bytes: 0,
            },
            group: &mut self.group,
            outlines: &mut self.outlines,
            tuning: &self.tuning,
            inline: &mut self.inline,
            factors: &mut self.factors,
            places: &mut self.places,
            math: Math {
                rank,
                size,
                reduce: call.op.reduce().unwrap_or(ReduceOp::Sum),
                stamp,
            },
            cache_bytes: self.cache_bytes,
            spent: Spent {
                collectives: 1,
                ..Spent::default()
            },
        };
        let done = pass.go(&outline, data);
        let spent = pass.spent;
        self.last = Some((key, outline));
        done.map(|()| spent)
    }
}

/// A message, or one each way at once.
fn message(group: &mut Group, stamp: &Stamp, op: Op, data: &mut Data) -> Result<Spent> {
    let (to, from) = op.ends();
    let sent_bytes = match (&*data, to) {
        (Data::InPlace(slab) | Data::Out { from: slab, .. }, Some(_)) => slab.bytes(),
        _ => 0,
    };
    match data {
        Data::InPlace(slab) => match (to, from) {
            (Some(peer), _) => group.exchange(stamp, Some(Letter { peer, slab }), None)?,
            (_, from) => {
                let recv = from.map(|peer| Letter { peer, slab });
                group.exchange(stamp, None, recv)?;
            }
        },
        Data::Out {
            from: source,
            into: target,
        } => {
            let send = to.map(|peer| Letter {
                peer,
                slab: &*source,
            });
            let recv = from.map(|peer| Letter { peer, slab: target });
            group.exchange(stamp, send, recv)?;
        }
        Data::None | Data::Many(_) => unreachable!("the shapes were checked"),
    }
    Ok(Spent {
        collectives: 1,
        messages: u64::from(to.is_some()),
        bytes: sent_bytes as u64,
    })
}
