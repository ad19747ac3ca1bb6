//! Who was last seen where: the operations this rank is in, and the latest that each peer was seen to join. Written on
//! every message, read when somebody is gone.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use super::frame::{OpCode, Stamp};
use crate::error::{Error, PeerLost};

const REMEMBERED: usize = 64; // operations whose description is kept

/// What one rank knows of a group's progress. Clones share it.
#[derive(Clone, Debug)]
pub struct Ledger(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    rank: usize,
    seen: Vec<AtomicU64>, // by peer: the latest sequence seen, plus one
    recent: Mutex<Recent>,
}

#[derive(Debug)]
struct Recent {
    stamps: VecDeque<Stamp>,
    current: Option<Stamp>,
}

/// What a survivor says about a rank that is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Sighting {
    /// The last operation that the rank was seen to join: its number and its description.
    pub joined: Option<(u64, String)>,
    /// The operation in which the survivor is now.
    pub waiting: Option<(u64, String)>,
}

impl Ledger {
    /// Nothing seen yet, in a group of `world` in which this is `rank`.
    pub fn new(rank: usize, world: usize) -> Self {
        let seen = (0..world).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Inner {
            rank,
            seen,
            recent: Mutex::new(Recent {
                stamps: VecDeque::with_capacity(REMEMBERED),
                current: None,
            }),
        }))
    }

    /// This rank enters an operation.
    pub fn enter(&self, stamp: Stamp) {
        let mut recent = self.recent();
        recent.current = Some(stamp);
        if stamp.op == OpCode::SendRecv {
            return; // it has no number
        }
        if recent.stamps.len() == REMEMBERED {
            recent.stamps.pop_front();
        }
        recent.stamps.push_back(stamp);
    }

    /// This rank's operation is complete.
    pub fn leave(&self) {
        self.recent().current = None;
    }

    /// `peer` was seen in operation `sequence`.
    pub fn saw(&self, peer: usize, sequence: u64) {
        self.0.seen[peer].fetch_max(sequence + 1, Ordering::Relaxed);
    }

    /// What this rank knows of `peer`.
    pub fn sighting(&self, peer: usize) -> Sighting {
        let seen = self
            .0
            .seen
            .get(peer)
            .map_or(0, |seen| seen.load(Ordering::Relaxed));
        let recent = self.recent();
        let describe = |sequence: u64| {
            let stamp = recent
                .stamps
                .iter()
                .find(|stamp| stamp.sequence == sequence);
            stamp.map_or_else(|| format!("#{sequence}"), Stamp::to_string)
        };
        Sighting {
            joined: seen
                .checked_sub(1)
                .map(|sequence| (sequence, describe(sequence))),
            waiting: recent
                .current
                .map(|stamp| (stamp.sequence, stamp.to_string())),
        }
    }

    /// The error that this rank alone can write about a peer that is gone.
    pub fn lost(&self, peer: usize, how: impl Into<String>) -> Error {
        let Sighting { joined, waiting } = self.sighting(peer);
        Error::PeerLost(Arc::new(PeerLost {
            rank: self.0.rank,
            peer,
            how: how.into(),
            last_joined: joined.map(|(_, text)| text),
            waiting: waiting.map(|(_, text)| format!("{text} on rank {}", self.0.rank)),
        }))
    }

    fn recent(&self) -> std::sync::MutexGuard<'_, Recent> {
        self.0
            .recent
            .lock()
            .unwrap_or_else(|held| held.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{Label, ReduceCode};
    use fabric_kernels::Dtype;

    #[test]
    fn a_lost_peer_is_described_by_what_it_joined_and_what_waits() {
        let ledger = Ledger::new(0, 3);
        let stamp = |sequence| Stamp {
            sequence,
            op: OpCode::AllReduce,
            reduce: ReduceCode::Sum,
            dtype: Dtype::F32,
            root: 0,
            numel: 8,
            label: Label::Bucket(sequence as u32),
            cut: 0,
        };
        ledger.enter(stamp(4));
        ledger.saw(2, 4);
        ledger.leave();
        ledger.enter(stamp(5));
        let text = ledger.lost(2, "its connection closed").to_string();
        assert!(
            text.contains("rank 2 is gone (its connection closed)"),
            "{text}"
        );
        assert!(
            text.contains("last operation it joined: #4 all_reduce(gradient bucket 4"),
            "{text}"
        );
        assert!(
            text.contains("Waiting for it: #5 all_reduce(gradient bucket 5"),
            "{text}"
        );
        assert_eq!(ledger.sighting(1).joined, None);
    }
}
