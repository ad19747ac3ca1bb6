//! The ranks that share memory: everybody's arena, and the step in which all meet.
//!
//! [Note: how to wait] A rank spins for some microseconds, yields its core a few times, and then sleeps. With more ranks
//! than cores it never spins. With enough cores it may still share one with the rank it waits for, because others use
//! the machine; then spinning only delays that rank, and what helps is the yield. So a wait that ends with a yield halves
//! the next one's spins, and a wait that ends while spinning doubles them. (Two ranks, 1 KiB all_reduce, both on one core
//! of a loaded machine: 17 us with 200 spins always, 60 us with 1000; 1.5 us on two idle cores.)

use std::{sync::Arc, time::Duration};

use fabric_kernels::Dtype;

use super::{Arena, Mapping, flags::WORDS};
use crate::{
    error::{Error, Result},
    wire::{
        Vigil,
        frame::{HEADER_BYTES, Header},
    },
};

const NAP: Duration = Duration::from_millis(20); // how often a sleeper looks at the signal and the deadline
const GRACE: Duration = Duration::from_secs(1); // how long a failed peer's own words may take
const SPINS: u32 = 200; // at most: some 8 us
const FEW_SPINS: u32 = 8;
const YIELDS: u32 = 4;

/// In place of an offset: these elements are in memory that peers cannot reach.
pub(crate) const PRIVATE: u64 = u64::MAX;

/// What a rank tells the others when it comes to a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Note {
    /// The operation, as all ranks must agree on it, and which of its steps this is.
    pub(crate) header: Header,
    /// Where this rank's input starts in its arena, in bytes, or [`PRIVATE`].
    pub(crate) input: u64,
    /// The same of its output.
    pub(crate) output: u64,
    /// What this rank's elements are multiplied with.
    pub(crate) factor: f64,
}

impl Note {
    fn encode(&self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        let header = self.header.encode();
        for (word, bytes) in words.iter_mut().zip(header.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        words[6] = self.input;
        words[7] = self.output;
        words[8] = self.factor.to_bits();
        words
    }

    fn decode(words: &[u64; WORDS]) -> Option<Self> {
        let mut header = [0; HEADER_BYTES];
        for (bytes, word) in header.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        Some(Self {
            header: Header::decode(&header)?,
            input: words[6],
            output: words[7],
            factor: f64::from_bits(words[8]),
        })
    }
}

/// A rank's view of the group.
pub(crate) struct Group {
    rank: usize,
    own: Arc<Arena>,
    peers: Vec<Option<Mapping>>, // none for this rank
    vigil: Vigil,
    most_spins: u32,
    spins: u32, // of the next wait
    step: u32,
    notes: Vec<Note>,    // of the last step, by rank
    pending: Vec<usize>, // peers that have not come to this step yet
}

impl Group {
    /// `peers[r]` is rank r's arena; there is none for this rank. `crowded`: there are more ranks than cores, so that a
    /// rank that spins keeps another from coming.
    pub(crate) fn new(
        rank: usize,
        own: Arc<Arena>,
        peers: Vec<Option<Mapping>>,
        vigil: Vigil,
        crowded: bool,
    ) -> Self {
        let most_spins = if crowded { 0 } else { SPINS };
        Self {
            rank,
            own,
            pending: Vec::with_capacity(peers.len()),
            peers,
            vigil,
            most_spins,
            spins: most_spins,
            step: 0,
            notes: Vec::new(),
        }
    }

    /// This rank.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks.
    pub(crate) fn size(&self) -> usize {
        self.peers.len()
    }

    /// This rank's own arena.
    pub(crate) fn own(&self) -> &Arc<Arena> {
        &self.own
    }

    /// The arena of any rank.
    pub(crate) fn memory(&self, rank: usize) -> &Mapping {
        self.peers[rank].as_ref().unwrap_or(self.own.mapping())
    }

    /// Everybody's note of the last step.
    pub(crate) fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// All ranks meet: each sees what the others stored before, and their notes.
    ///
    /// # Errors
    /// When a peer is in another operation, has failed, or does not come in time; when the signal is raised.
    pub(crate) fn sync(&mut self, note: &Note, deadline: Duration) -> Result<()> {
        self.step = self.step.wrapping_add(1);
        self.own
            .mapping()
            .control()
            .publish(self.step, &note.encode());
        self.notes.clear();
        self.notes.resize(self.size(), *note);
        self.pending.clear();
        let rank = self.rank;
        self.pending
            .extend((0..self.peers.len()).filter(|peer| *peer != rank));
        let started = self.vigil.clock.now();
        let mut turns = 0;
        loop {
            self.look(note)?;
            let Some(&first) = self.pending.first() else {
                self.learn(turns);
                return Ok(());
            };
            turns += 1;
            if turns <= self.spins {
                std::hint::spin_loop();
            } else if turns <= self.spins + YIELDS {
                std::thread::yield_now();
            } else {
                let left = self.check(note, started, deadline)?;
                self.memory(first).control().park(self.step, NAP.min(left));
            }
        }
    }

    /// Whether rank `peer` may have announced this place; an error that names it when it lies.
    ///
    /// # Errors
    /// When the place is not in its arena.
    pub(crate) fn admit(&self, peer: usize, at: u64, dtype: Dtype, numel: usize) -> Result<()> {
        if self.memory(peer).holds(at, dtype, numel) {
            return Ok(());
        }
        let how = format!("it announced {numel} x {dtype} at byte {at}, outside its shared memory");
        Err(self.vigil.ledger.lost(peer, how))
    }

    /// This rank comes no more; wakes all that wait for it.
    pub(crate) fn fail(&self) {
        self.own.mapping().control().fail();
    }

    /// [Note: how to wait]
    fn learn(&mut self, turns: u32) {
        let few = FEW_SPINS.min(self.most_spins);
        if turns > self.spins && turns <= self.spins + YIELDS {
            self.spins = (self.spins / 2).max(few);
        } else if turns > 0 && turns <= self.spins {
            self.spins = (self.spins * 2).min(self.most_spins);
        }
    }

    /// Take the notes of those that have come since the last look.
    fn look(&mut self, ours: &Note) -> Result<()> {
        let mut index = 0;
        while let Some(&peer) = self.pending.get(index) {
            let Some(words) = self.memory(peer).control().arrived(self.step) else {
                index += 1;
                continue;
            };
            let Some(theirs) = Note::decode(&words) else {
                let how = "it left a note in shared memory that is none of this protocol";
                return Err(self.vigil.ledger.lost(peer, how));
            };
            self.vigil.ledger.saw(peer, theirs.header.stamp.sequence);
            if theirs.header != ours.header {
                return Err(self.diverged(peer, &ours.header, &theirs.header));
            }
            self.notes[peer] = theirs;
            self.pending.swap_remove(index);
        }
        Ok(())
    }

    fn diverged(&self, peer: usize, ours: &Header, theirs: &Header) -> Error {
        let same = ours.stamp == theirs.stamp;
        let text = |header: &Header| {
            if same {
                format!("{} (step {})", header.stamp, header.round)
            } else {
                header.stamp.to_string()
            }
        };
        Error::Diverged {
            rank: self.rank,
            peer,
            ours: text(ours),
            theirs: text(theirs),
        }
    }

    /// May we go on waiting? Says how long.
    fn check(&self, note: &Note, started: Duration, deadline: Duration) -> Result<Duration> {
        self.vigil.signal.check()?;
        let failed = self
            .pending
            .iter()
            .find(|peer| self.memory(**peer).control().has_failed());
        if let Some(peer) = failed {
            // The control plane brings its reason, which is better than ours.
            return Err(self
                .vigil
                .signal
                .wait(GRACE)
                .unwrap_or_else(|| Error::Aborted {
                    rank: self.rank,
                    reason: format!(
                        "rank {peer} has failed before {}; its own output says why",
                        note.header.stamp
                    ),
                }));
        }
        let now = self.vigil.clock.now();
        if now < deadline {
            return Ok(deadline - now);
        }
        let mut waiting_for = self.pending.clone();
        waiting_for.sort_unstable();
        Err(Error::Timeout {
            rank: self.rank,
            operation: note.header.stamp.to_string(),
            waiting_for,
            after: now.saturating_sub(started),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{Label, OpCode, ReduceCode, Stamp};

    #[test]
    fn a_note_survives_the_line() {
        let stamp = Stamp {
            sequence: 3,
            op: OpCode::ReduceScatter,
            reduce: ReduceCode::PreMulSum,
            dtype: Dtype::BF16,
            root: 0,
            numel: 12,
            label: Label::Bucket(4),
        };
        let header = Header {
            stamp,
            round: 1,
            bytes: 0,
        };
        let note = Note {
            header,
            input: 4096,
            output: PRIVATE,
            factor: -0.5,
        };
        assert_eq!(Note::decode(&note.encode()), Some(note));
        assert_eq!(Note::decode(&[0; WORDS]), None);
    }
}
