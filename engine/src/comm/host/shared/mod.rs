//! The executor that runs schedules in shared memory: ranks meet, load their peers' elements where they lie, fold them
//! in registers, and store the result into everybody's output.

mod cache;
mod hand;
mod outline;
mod pass;
mod post;
mod windows;

use std::{sync::Arc, time::Duration};

use fabric_kernels::{Combiner, Dtype};

use super::{
    super::{Call, Data, Op, ReduceOp, Spent},
    Begun,
    math::Math,
    recent::Recent,
};
use crate::{
    error::Result,
    schedule::choose::Tuning,
    wire::{
        frame::{Header, Stamp},
        shm::{Group, Letter, PRIVATE},
    },
};
use outline::{Key, Outline};
use pass::Pass;
use post::Posting;

/// A group that shares memory, and what is kept between calls.
pub(super) struct SharedMemory {
    group: Group,
    tuning: Tuning,
    cache_bytes: usize, // what all ranks together can keep near
    outlines: Recent<Key, Outline>,
    last: [Option<Last>; Op::KINDS], // by operation
    factors: Vec<f64>,               // by rank, of the call that runs
    places: Vec<Place>,              // by rank, of the call that runs
    turn: u32,                       // of the stages: all ranks count alike
    kept: Vec<Data>, // the memory of a call that failed: peers may still store there
}

/// The last call of an operation, and what is done for those like it.
struct Last {
    kind: u64,
    outline: Arc<Outline>,
    combiner: Combiner, // of all ranks' elements
}

/// Where a rank's input and output start in its arena, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    input: u64,
    output: u64,
}

impl Place {
    /// Peers cannot reach all of it.
    fn is_private(&self) -> bool {
        self.input == PRIVATE || self.output == PRIVATE
    }
}

impl SharedMemory {
    pub(super) fn new(group: Group, tuning: Tuning) -> Self {
        Self {
            group,
            tuning,
            cache_bytes: cache::bytes(),
            outlines: Recent::new(),
            last: Default::default(),
            factors: Vec::new(),
            places: Vec::new(),
            turn: 0,
            kept: Vec::new(),
        }
    }

    pub(super) fn rank(&self) -> usize {
        self.group.rank()
    }

    pub(super) fn size(&self) -> usize {
        self.group.size()
    }

    /// Do `call`, in at most `patience`; also says what it cost: of small calls as their outline has it, of others as counted on the way.
    pub(super) fn run(
        &mut self,
        begun: &Begun,
        call: &Call,
        data: &mut Data,
        patience: Duration,
    ) -> Result<Spent> {
        self.group.begin(patience);
        let done = self.attempt(begun, call, data);
        if done.is_err() {
            self.kept.push(std::mem::replace(data, Data::None));
            self.group.fail();
        }
        done
    }

    /// What `run` costs when all buffers are in arenas, from the schedule alone. Through the stages as many elements
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

    #[inline(always)]
    fn attempt(&mut self, begun: &Begun, call: &Call, data: &mut Data) -> Result<Spent> {
        let stamp = &begun.stamp;
        let (rank, size) = (self.rank(), self.size());
        let math = Math {
            rank,
            size,
            reduce: call.op.reduce().unwrap_or(ReduceOp::Sum),
            stamp,
        };
        // The last call's outline is found without a search, because calls like to repeat.
        let last = match &mut self.last[call.op.index()] {
            Some(last) if last.kind == begun.kind => last,
            last => {
                let Some(key) = Key::new(call, stamp.dtype, stamp.numel as usize) else {
                    self.group.enter(stamp);
                    return message(&mut self.group, stamp, call.op, data);
                };
                let tuning = &self.tuning;
                let make = |key: &Key| Outline::new(key, tuning, size, rank);
                let finish = math.finishing(size);
                last.insert(Last {
                    combiner: Combiner::new(math.reduce.fold(), stamp.dtype, size, finish),
                    kind: begun.kind,
                    outline: self.outlines.get(key, make),
                })
            }
        };
        let outline = &*last.outline;
        let header = Header {
            stamp: *stamp,
            round: 0,
            bytes: 0,
        };
        if let Some(posts) = &outline.posts {
            let mut posting = Posting {
                group: &mut self.group,
                factors: &mut self.factors,
                header: &header,
                math,
                outline,
                posts,
                combiner: &last.combiner,
            };
            return posting.go(data);
        }
        self.group.enter(stamp);
        let mut pass = Pass {
            header,
            group: &mut self.group,
            factors: &mut self.factors,
            places: &mut self.places,
            math,
            turn: &mut self.turn,
            cache_bytes: self.cache_bytes,
            spent: Spent {
                collectives: 1,
                ..Spent::default()
            },
        };
        pass.go(outline, data)?;
        Ok(pass.spent)
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
