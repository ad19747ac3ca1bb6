//! The ranks that share memory: everybody's arena, and the step in which they meet.

use std::{ops::Range, sync::Arc, time::Duration};

use fabric_kernels::Dtype;

use super::{
    Arena, Mapping,
    flags::{DETAILS, LINES, Note, WORDS},
    wait::Turns,
};
use crate::{
    error::{Error, Result},
    wire::{
        Vigil,
        frame::{HEADER_BYTES, Header, OpCode, Stamp},
    },
};

pub(super) const SEED: u64 = 0x9e37_79b9_7f4a_7c15; // of fingerprints
const NAP: Duration = Duration::from_millis(20); // how often a sleeper looks at the signal and the deadline
const GRACE: Duration = Duration::from_secs(1); // how long a failed peer's own words may take

const _: () = assert!(HEADER_BYTES == DETAILS * 8);

/// In place of an offset: these elements are in memory that peers cannot reach.
pub(crate) const PRIVATE: u64 = u64::MAX;

/// For whom a rank waits at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// For everybody.
    All,
    /// For one rank, which may be this one.
    One(usize),
    /// For nobody.
    Nobody,
}

/// A rank's view of the group.
pub(crate) struct Group {
    rank: usize,
    own: Arc<Arena>,
    peers: Vec<Option<Mapping>>, // none for this rank
    pub(super) vigil: Vigil,
    pub(super) turns: Turns,
    step: u32,
    posts: u32,                        // how many there were: all ranks count alike
    past: u64,                         // the fingerprint of all steps so far
    met: u32,                          // the last step at which this rank saw everybody
    words: Vec<[u64; WORDS]>, // of the last step with words, by rank: of those that were needed
    has_words: bool,          // the step to which this rank has come
    pub(super) pending: Vec<usize>, // peers that are waited for
    patience: Duration,       // of the operation
    due: Option<(Duration, Duration)>, // since when it waits, and until when: read when it first takes long
    pub(super) sent: Vec<u32>,         // steps of the channels, by peer
    pub(super) received: Vec<u32>,
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
        let size = peers.len();
        Self {
            rank,
            own,
            peers,
            vigil,
            turns: Turns::new(crowded),
            step: 0,
            posts: 0,
            past: SEED,
            met: 0,
            words: vec![[0; WORDS]; size],
            has_words: false,
            pending: Vec::with_capacity(size),
            patience: Duration::MAX,
            due: None,
            sent: vec![0; size],
            received: vec![0; size],
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
    #[inline]
    pub(crate) fn memory(&self, rank: usize) -> &Mapping {
        self.peers[rank].as_ref().unwrap_or(self.own.mapping())
    }

    /// The words of the last step that had any, by rank: of those that were needed.
    pub(crate) fn words(&self) -> &[[u64; WORDS]] {
        &self.words
    }

    /// A new operation begins, which may take so long.
    #[inline]
    pub(crate) fn begin(&mut self, patience: Duration) {
        self.patience = patience;
        self.due = None;
    }

    /// This rank is in an operation: what others are told when it, or a peer, is gone.
    #[inline]
    pub(crate) fn enter(&self, stamp: &Stamp) {
        self.vigil.ledger.enter(stamp);
    }

    /// Wait until the next step's line, and a post, are free to be written: `flags`, [Note: lines].
    ///
    /// # Errors
    /// As [`Group::meet`].
    #[inline]
    pub(crate) fn room(&mut self, header: &Header) -> Result<()> {
        if self.met == self.step {
            return Ok(()); // everybody has come to the step before
        }
        let free = self.step.wrapping_sub(LINES as u32 - 2);
        match (0..self.size()).all(|peer| self.memory(peer).control().reached(free)) {
            true => Ok(()),
            false => self.make_room(header, free),
        }
    }

    /// The number of the post that goes with the next step.
    #[inline]
    pub(crate) fn next_post(&mut self) -> u32 {
        self.posts = self.posts.wrapping_add(1);
        self.posts
    }

    fn make_room(&mut self, header: &Header, free: u32) -> Result<()> {
        self.enter(&header.stamp);
        self.expect(Needs::All);
        loop {
            let mut pending = std::mem::take(&mut self.pending);
            pending.retain(|peer| !self.memory(*peer).control().reached(free));
            self.pending = pending;
            let Some(&first) = self.pending.first() else {
                self.turns.learn();
                return Ok(());
            };
            if !self.turns.pass(&self.vigil.clock) {
                let nap = self.check(header)?;
                self.memory(first).control().park(free, nap);
            }
        }
    }

    /// Come to the next step with `words`, and wait for all: their words, and what they stored before, are seen then.
    ///
    /// # Errors
    /// When a peer is in another operation, has failed, or does not come in time; when the signal is raised.
    pub(crate) fn meet(&mut self, header: &Header, words: [u64; WORDS]) -> Result<()> {
        self.room(header)?;
        let print = self.come(header, Some(&words));
        self.wait(header, print, Needs::All)
    }

    /// Come to the next step, which has room, with `words`, or with none, as all ranks then do; gives the fingerprint that others
    /// must have: of this step and all before it, because there are steps at which not everybody is waited for.
    pub(crate) fn come(&mut self, header: &Header, words: Option<&[u64; WORDS]>) -> u64 {
        self.step = self.step.wrapping_add(1);
        let details = header.to_words();
        let print = print(self.past, &details);
        let control = self.own.mapping().control();
        self.has_words = words.is_some();
        match words {
            Some(&words) => {
                control.publish(self.step, &Note { print, words }, &details);
                self.words[self.rank] = words;
            }
            None => control.publish_bare(self.step, print, &details),
        }
        self.past = print;
        print
    }

    /// Wait for those that are needed to come to the step to which this rank has come.
    ///
    /// # Errors
    /// As [`Group::meet`].
    pub(crate) fn wait(&mut self, header: &Header, print: u64, needs: Needs) -> Result<()> {
        let mut has_rung = false;
        for peer in self.needed(needs) {
            while peer != self.rank && !self.look(peer, header, print)? {
                if !has_rung && self.turns.is_long() {
                    self.own.mapping().control().ring(self.step);
                    has_rung = true;
                }
                if !self.turns.pass(&self.vigil.clock) {
                    self.sleep(peer, header, print, needs)?;
                }
            }
        }
        self.turns.learn();
        if !has_rung {
            self.own.mapping().control().ring(self.step);
        }
        let is_all = match needs {
            Needs::All => true,
            Needs::One(one) => self.size() == 2 && one != self.rank,
            Needs::Nobody => false,
        };
        if is_all {
            self.met = self.step;
        }
        Ok(())
    }

    /// Sleep until `peer` comes, unless something is wrong with any of those that are needed.
    #[cold]
    fn sleep(&mut self, peer: usize, header: &Header, print: u64, needs: Needs) -> Result<()> {
        self.expect(needs);
        let mut pending = std::mem::take(&mut self.pending);
        let mut still = Ok(());
        pending.retain(|&peer| match self.look(peer, header, print) {
            Ok(has_come) => !has_come,
            Err(error) => {
                still = Err(error);
                true
            }
        });
        self.pending = pending;
        still?;
        let nap = self.check(header)?;
        self.memory(peer).control().park(self.step, nap);
        Ok(())
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
        let own = self.own.mapping();
        own.control().fail();
        for peer in (0..self.size()).filter(|peer| *peer != self.rank) {
            own.channel(peer).sent.fail();
            own.channel(peer).received.fail();
        }
    }

    fn needed(&self, needs: Needs) -> Range<usize> {
        match needs {
            Needs::All => 0..self.size(),
            Needs::One(one) => one..one + 1,
            Needs::Nobody => 0..0,
        }
    }

    fn expect(&mut self, needs: Needs) {
        let (rank, needed) = (self.rank, self.needed(needs));
        self.pending.clear();
        self.pending.extend(needed.filter(|peer| *peer != rank));
    }

    /// Take a peer's words, if it has come.
    #[inline]
    fn look(&mut self, peer: usize, header: &Header, ours: u64) -> Result<bool> {
        let Some(note) = self.memory(peer).control().arrived(self.step) else {
            return Ok(false);
        };
        if note.print != ours {
            return Err(self.parted(peer, header));
        }
        self.vigil.ledger.saw(peer, header.stamp.sequence);
        if self.has_words {
            self.words[peer] = note.words;
        }
        Ok(true)
    }

    /// Where a peer whose fingerprint is another went another way: at the first step that both still show.
    #[cold]
    fn parted(&self, peer: usize, header: &Header) -> Error {
        let (own, other) = (self.own.mapping().control(), self.memory(peer).control());
        for back in (0..LINES as u32).rev() {
            let step = self.step.wrapping_sub(back);
            if own.arrived(step).is_none() || other.arrived(step).is_none() {
                continue;
            }
            let (ours, theirs) = (own.details(step), other.details(step));
            if ours != theirs {
                let ours = Header::from_words(&ours).unwrap_or(*header);
                return self.diverged(peer, &ours, &theirs);
            }
        }
        Error::Diverged {
            rank: self.rank,
            peer,
            ours: header.stamp.to_string(),
            theirs: format!("{}, after another operation than ours", header.stamp),
        }
    }

    /// What is wrong with a peer whose header is another.
    pub(super) fn diverged(&self, peer: usize, ours: &Header, theirs: &[u64; DETAILS]) -> Error {
        let theirs = Header::from_words(theirs).filter(|theirs| theirs != ours);
        let Some(theirs) = theirs else {
            let how = "it left a note in shared memory that is none of this protocol";
            return self.vigil.ledger.lost(peer, how);
        };
        if theirs.stamp.op != OpCode::SendRecv {
            self.vigil.ledger.saw(peer, theirs.stamp.sequence); // messages have no number
        }
        let same = ours.stamp == theirs.stamp;
        let text = |header: &Header| {
            if same {
                format!(
                    "{} (step {}, {} bytes)",
                    header.stamp, header.round, header.bytes
                )
            } else {
                header.stamp.to_string()
            }
        };
        Error::Diverged {
            rank: self.rank,
            peer,
            ours: text(ours),
            theirs: text(&theirs),
        }
    }

    /// May we go on waiting for those that are pending? Says how long.
    pub(super) fn check(&mut self, header: &Header) -> Result<Duration> {
        self.vigil.signal.check()?;
        let mut pending = self.pending.iter();
        let failed = pending.find(|peer| self.memory(**peer).control().has_failed());
        if let Some(peer) = failed {
            // The control plane brings its reason, which is better than ours.
            let reason = self.vigil.signal.wait(GRACE);
            return Err(reason.unwrap_or_else(|| Error::Aborted {
                rank: self.rank,
                reason: format!(
                    "rank {peer} has failed before {}; its own output says why",
                    header.stamp
                ),
            }));
        }
        let now = self.vigil.clock.now();
        let due = (now, now.saturating_add(self.patience));
        let (since, until) = *self.due.get_or_insert(due);
        if now < until {
            return Ok(NAP.min(until - now));
        }
        let mut waiting_for = self.pending.clone();
        waiting_for.sort_unstable();
        Err(Error::Timeout {
            rank: self.rank,
            operation: header.stamp.to_string(),
            waiting_for,
            after: now.saturating_sub(since),
        })
    }
}

/// A fingerprint of a header, and of what the fingerprint `before` stands for: words are multiplied in pairs to twice their
/// length and folded, as in wyhash (Wang Yi 2019), the pairs at the same time. It tells accidents apart; a peer that wants to
/// lie can.
pub(super) fn print(before: u64, details: &[u64; DETAILS]) -> u64 {
    let mix = |left: u64, right: u64| {
        let wide = u128::from(left) * u128::from(right);
        (wide >> 64) as u64 ^ wide as u64
    };
    let [a, b, c, d, e, f] = *details;
    let first = mix(a ^ 0xa076_1d64_78bd_642f, b ^ 0xe703_7ed1_a0b4_28db);
    let second = mix(c ^ 0x8ebc_6af0_9c88_c6e3, d ^ 0x5899_65cc_7537_4cc3);
    let third = mix(e ^ 0x1d8e_4e27_c47d_124f, f ^ 0xeb44_acca_b455_d165);
    mix(before ^ first, second ^ third ^ SEED)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::wire::frame::{Label, ReduceCode, Stamp};

    #[test]
    fn fingerprints_differ_wherever_headers_do() {
        let stamp = Stamp {
            sequence: 3,
            op: OpCode::ReduceScatter,
            reduce: ReduceCode::PreMulSum,
            dtype: Dtype::BF16,
            root: 0,
            numel: 12,
            label: Label::Bucket(4),
            cut: 0,
        };
        let header = Header {
            stamp,
            round: 1,
            bytes: 0,
        };
        let mut others = vec![header; 8];
        others[0].stamp.sequence = 4;
        others[1].stamp.op = OpCode::AllReduce;
        others[2].stamp.reduce = ReduceCode::Sum;
        others[3].stamp.dtype = Dtype::F16;
        others[4].stamp.root = 1;
        others[5].stamp.numel = 13;
        others[6].stamp.cut = 1;
        others[7].round = 2;
        let print = |header: &Header| print(SEED, &header.to_words());
        assert_eq!(print(&header), print(&header.clone()));
        for (index, other) in others.iter().enumerate() {
            assert_ne!(print(other), print(&header), "{index}");
        }
    }
}
