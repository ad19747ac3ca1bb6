//! Messages between two ranks that share memory: the sender says where its bytes lie, the receiver copies them and says so.
//! Bytes in memory that peers cannot reach go through the sender's stage, a window at a time.

use fabric_kernels::{self as kernels, Dtype, Span, SpanMut};

use super::{
    Group, SENT, STAGE_BYTES,
    flags::{Note, WORDS},
    group::{SEED, print},
};
use crate::{
    buffer::Slab,
    error::Result,
    wire::frame::{Header, Stamp},
};

/// One end of a message: with whom, and the memory.
pub(crate) struct Letter<S> {
    /// The other rank.
    pub(crate) peer: usize,
    /// The bytes.
    pub(crate) slab: S,
}

/// A message on its way.
struct Way {
    peer: usize,
    step: u32,
    done: usize,   // bytes that the receiver has
    flying: usize, // bytes that it has been told of
    total: usize,
    over: bool,
}

impl Way {
    fn new(peer: usize, step: u32, total: usize) -> Self {
        Self {
            peer,
            step,
            done: 0,
            flying: 0,
            total,
            over: false,
        }
    }
}

impl Group {
    /// Send and receive, both at once; either may be nothing.
    ///
    /// # Errors
    /// When the peer sends another number of bytes or another type, has failed, or does not come in time.
    pub(crate) fn exchange(
        &mut self,
        stamp: &Stamp,
        send: Option<Letter<&Slab>>,
        recv: Option<Letter<&mut Slab>>,
    ) -> Result<()> {
        let mut recv = recv.map(|letter| {
            let step = self.received[letter.peer];
            (Way::new(letter.peer, step, letter.slab.bytes()), letter)
        });
        let mut send = send.map(|letter| {
            let step = self.sent[letter.peer];
            (Way::new(letter.peer, step, letter.slab.bytes()), letter)
        });
        if let Some((way, letter)) = &mut send {
            self.offer(stamp, way, letter.slab)?;
        }
        loop {
            let mut moved = false;
            if let Some((way, letter)) = &mut send {
                moved |= self.next(stamp, way, letter.slab)?;
            }
            if let Some((way, letter)) = &mut recv {
                moved |= self.take(stamp, way, letter.slab)?;
            }
            // What is still to come is waited for first: whoever sends it may wait for nothing else.
            let coming = recv.as_ref().map(|(way, _)| way).filter(|way| !way.over);
            let going = send.as_ref().map(|(way, _)| way).filter(|way| !way.over);
            let Some(way) = coming.or(going) else {
                self.turns.learn();
                return Ok(());
            };
            if moved || self.turns.pass(&self.vigil.clock) {
                continue;
            }
            self.pending.clear();
            let ways = coming.into_iter().chain(going);
            self.pending.extend(ways.map(|way| way.peer));
            self.pending.dedup();
            let nap = self.check(&header(stamp, way.total))?;
            let nap = if coming.is_some() && going.is_some() {
                nap.min(std::time::Duration::from_millis(1)) // either may come first
            } else {
                nap
            };
            let channel = self.memory(way.peer).channel(self.rank());
            match coming {
                Some(_) => channel.sent.park(way.step.wrapping_add(1), nap),
                None => channel.received.park(way.step, nap),
            }
        }
    }

    /// Tell the receiver of the next bytes.
    fn offer(&mut self, stamp: &Stamp, way: &mut Way, slab: &Slab) -> Result<()> {
        let left = way.total - way.done;
        let (at, bytes) = match self.own().place(slab.address(), slab.bytes()) {
            Some(at) => (at, left),
            None => {
                let bytes = left.min(STAGE_BYTES);
                let stage = self.own().mapping().span_mut(SENT, Dtype::U8, bytes);
                copy(
                    Span::of(&slab.as_bytes()[way.done..way.done + bytes]),
                    stage,
                );
                (SENT, bytes)
            }
        };
        let details = header(stamp, way.total).to_words();
        let mut words = [0; WORDS];
        words[..2].copy_from_slice(&[at, bytes as u64]);
        let note = Note {
            print: print(SEED, &details),
            words,
        };
        way.step = way.step.wrapping_add(1);
        self.sent[way.peer] = way.step;
        way.flying = bytes;
        let channel = self.own().mapping().channel(way.peer);
        channel.sent.publish(way.step, &note, &details);
        channel.sent.ring(way.step);
        Ok(())
    }

    /// Has the receiver taken what it was told of?
    fn next(&mut self, stamp: &Stamp, way: &mut Way, slab: &Slab) -> Result<bool> {
        let channel = self.memory(way.peer).channel(self.rank());
        if way.over || channel.received.arrived(way.step).is_none() {
            return Ok(false);
        }
        way.done += way.flying;
        way.over = way.done == way.total;
        if !way.over {
            self.offer(stamp, way, slab)?;
        }
        Ok(true)
    }

    /// Take what the sender tells of.
    fn take(&mut self, stamp: &Stamp, way: &mut Way, slab: &mut Slab) -> Result<bool> {
        let step = way.step.wrapping_add(1);
        let theirs = self.memory(way.peer).channel(self.rank());
        let Some(note) = theirs.sent.arrived(step).filter(|_| !way.over) else {
            return Ok(false);
        };
        let header = header(stamp, way.total);
        if note.print != print(SEED, &header.to_words()) {
            return Err(self.diverged(way.peer, &header, &theirs.sent.details(step)));
        }
        let bytes = usize::try_from(note.words[1]).unwrap_or(usize::MAX);
        if bytes > way.total - way.done {
            let how = format!("it announced {bytes} bytes of a message that has fewer left");
            return Err(self.vigil.ledger.lost(way.peer, how));
        }
        self.admit(way.peer, note.words[0], Dtype::U8, bytes)?;
        let source = self.memory(way.peer).span(note.words[0], Dtype::U8, bytes);
        let target = &mut slab.as_bytes_mut()[way.done..way.done + bytes];
        copy(source, SpanMut::of(target));
        way.step = step;
        self.received[way.peer] = step;
        let channel = self.own().mapping().channel(way.peer);
        channel.received.publish(step, &Note::default(), &[0; 6]);
        channel.received.ring(step);
        way.done += bytes;
        way.over = way.done == way.total;
        Ok(true)
    }
}

fn header(stamp: &Stamp, bytes: usize) -> Header {
    Header {
        stamp: *stamp,
        round: 0,
        bytes: bytes as u64,
    }
}

fn copy(from: Span<'_>, into: SpanMut<'_>) {
    kernels::cast(from, into).expect("as many bytes on both sides");
}
