//! Who was last seen where: the operations this rank is in, and the latest that each peer was seen to join. Written on
//! every message, read when somebody is gone.
//!
//! [Note: one writer] The thread that runs a communicator's operations writes, any thread reads, and nobody waits: an entry
//! has a version that is odd while it is written, and a reader tries again (the sequence lock of the Linux kernel, in the
//! form of Boehm, "Can seqlocks get along with programming language memory models?", 2012).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering, fence},
};

use super::frame::{HEADER_BYTES, Header, OpCode, Stamp};
use crate::error::{Error, PeerLost};

const REMEMBERED: usize = 64; // operations whose description is kept
const WORDS: usize = HEADER_BYTES / 8;

/// What one rank knows of a group's progress. Clones share it.
#[derive(Clone, Debug)]
pub struct Ledger(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    rank: usize,
    seen: Vec<AtomicU64>, // by peer: the latest sequence seen, plus one
    recent: [Entry; REMEMBERED],
    message: Entry,     // the latest, which has no number
    current: AtomicU64, // NOTHING, MESSAGE, or the sequence of the operation that this rank is in, plus two
}

const NOTHING: u64 = 0;
const MESSAGE: u64 = 1;

/// A stamp, or none: [Note: one writer].
#[derive(Debug, Default)]
struct Entry {
    version: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Entry {
    fn write(&self, words: &[u64; WORDS]) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (slot, word) in self.words.iter().zip(words) {
            slot.store(*word, Ordering::Relaxed);
        }
        self.version.store(version + 2, Ordering::Release);
    }

    fn read(&self) -> Option<Stamp> {
        loop {
            let before = self.version.load(Ordering::Acquire);
            let words: [u64; WORDS] =
                std::array::from_fn(|at| self.words[at].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            let after = self.version.load(Ordering::Relaxed);
            if before == after && before.is_multiple_of(2) {
                return Header::from_words(&words).map(|header| header.stamp);
            }
            std::hint::spin_loop();
        }
    }
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
            recent: std::array::from_fn(|_| Entry::default()),
            message: Entry::default(),
            current: AtomicU64::new(NOTHING),
        }))
    }

    /// This rank enters an operation.
    pub fn enter(&self, stamp: &Stamp) {
        let header = Header {
            stamp: *stamp,
            round: 0,
            bytes: 0,
        };
        let (entry, current) = match stamp.op {
            OpCode::SendRecv => (&self.0.message, MESSAGE),
            _ => (self.entry(stamp.sequence), stamp.sequence + 2),
        };
        entry.write(&header.to_words());
        self.0.current.store(current, Ordering::Release);
    }

    /// This rank's operation is complete.
    pub fn leave(&self) {
        self.0.current.store(NOTHING, Ordering::Release);
    }

    fn entry(&self, sequence: u64) -> &Entry {
        &self.0.recent[sequence as usize % REMEMBERED]
    }

    /// `peer` was seen in operation `sequence`.
    pub fn saw(&self, peer: usize, sequence: u64) {
        let seen = &self.0.seen[peer];
        if seen.load(Ordering::Relaxed) <= sequence {
            seen.store(sequence + 1, Ordering::Relaxed);
        }
    }

    /// What this rank knows of `peer`.
    pub fn sighting(&self, peer: usize) -> Sighting {
        let seen = self
            .0
            .seen
            .get(peer)
            .map_or(0, |seen| seen.load(Ordering::Relaxed));
        let describe = |sequence: u64| {
            let stamp = self.entry(sequence).read();
            let stamp = stamp.filter(|stamp| stamp.sequence == sequence);
            stamp.map_or_else(|| format!("#{sequence}"), |stamp| stamp.to_string())
        };
        let current = match self.0.current.load(Ordering::Acquire) {
            NOTHING => None,
            MESSAGE => self.0.message.read(),
            current => self.entry(current - 2).read(),
        };
        Sighting {
            joined: seen
                .checked_sub(1)
                .map(|sequence| (sequence, describe(sequence))),
            waiting: current.map(|stamp| (stamp.sequence, stamp.to_string())),
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
        ledger.enter(&stamp(4));
        ledger.saw(2, 4);
        ledger.leave();
        ledger.enter(&stamp(5));
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
        ledger.leave();
        assert_eq!(ledger.sighting(2).waiting, None);
        for sequence in 6..100 {
            ledger.enter(&stamp(sequence));
        }
        let forgotten = ledger.sighting(2).joined.unwrap();
        assert_eq!(forgotten, (4, "#4".into()));
    }

    /// Goal: a reader never sees two operations in one. Method: one thread writes stamps whose parts agree, another reads.
    #[test]
    fn a_reader_sees_whole_operations() {
        let ledger = Ledger::new(0, 2);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..200_000u64 {
                    ledger.enter(&Stamp {
                        sequence: number * REMEMBERED as u64, // all in one place
                        op: OpCode::AllReduce,
                        reduce: ReduceCode::Sum,
                        dtype: Dtype::F32,
                        root: number as u32,
                        numel: number,
                        label: Label::Bucket(number as u32),
                        cut: 0,
                    });
                }
                stop.store(true, Ordering::Relaxed);
            });
            while !stop.load(Ordering::Relaxed) {
                if let Some(stamp) = ledger.entry(0).read() {
                    let number = stamp.sequence / REMEMBERED as u64;
                    assert_eq!((number, u64::from(stamp.root)), (stamp.numel, stamp.numel));
                    assert_eq!(stamp.label, Label::Bucket(stamp.numel as u32));
                }
            }
        });
    }
}
