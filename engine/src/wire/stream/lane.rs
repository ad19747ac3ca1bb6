//! One peer's connection, and what it still has to get from us and give to us in this round. Plain messages leave in one
//! vectored write and land where they are wanted; sealed ones go by way of [`Records`].

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut, Read, Write},
};

use rustix::event::{PollFd, PollFlags};

use super::{
    super::{
        Traffic, Vigil,
        frame::{Header, OpCode, Stamp},
    },
    Connection, Socket, TURN_BYTES,
    cursor::{Receiving, Sending},
    records::{Records, Trouble},
    seal::{Seal, Security},
};
use crate::{
    buffer::Slab,
    error::{Error, Result},
};

const SLICES: usize = 64; // pieces in one vectored write

/// What an exchange is part of.
pub(super) struct Context<'a> {
    pub(super) vigil: &'a Vigil,
    pub(super) rank: usize,
    pub(super) stamp: &'a Stamp,
    pub(super) round: u32,
}

/// A connection, and the messages of a round on it, in order.
pub(super) struct Lane {
    peer: usize,
    socket: Socket,
    records: Option<Records>,
    sends: VecDeque<Sending>,
    recvs: VecDeque<Receiving>,
}

impl Lane {
    pub(super) fn new(peer: usize, connection: Connection, security: Security) -> Self {
        let keys = connection.keys;
        let (seal, open) = (
            Seal::new(security, &keys.send),
            Seal::new(security, &keys.recv),
        );
        Self {
            peer,
            socket: connection.socket,
            records: seal.zip(open).map(|(seal, open)| Records::new(seal, open)),
            sends: VecDeque::new(),
            recvs: VecDeque::new(),
        }
    }

    /// Forget what a failed exchange left.
    pub(super) fn clear(&mut self) {
        self.sends.clear();
        self.recvs.clear();
    }

    /// A message to send: `parcel` is its index in the round.
    pub(super) fn send(&mut self, parcel: usize, header: Header) {
        self.sends.push_back(Sending::new(parcel, header));
    }

    /// A message to receive, and how many bytes it has.
    pub(super) fn recv(&mut self, parcel: usize, bytes: usize) {
        self.recvs.push_back(Receiving::new(parcel, bytes));
    }

    pub(super) fn is_done(&self) -> bool {
        self.recvs.is_empty() && self.is_sent()
    }

    fn is_sent(&self) -> bool {
        self.sends.is_empty() && self.records.as_ref().is_none_or(Records::is_sent)
    }

    /// What to wait for.
    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, !self.recvs.is_empty());
        flags.set(PollFlags::OUT, !self.is_sent());
        PollFd::new(&self.socket, flags)
    }

    /// Move what can be moved without waiting, some of it each way; says whether anything did.
    pub(super) fn advance(
        &mut self,
        traffic: &Traffic,
        memory: &mut [Slab],
        context: &Context<'_>,
    ) -> Result<bool> {
        let mut moved = false;
        if !self.is_sent() {
            let written = self.write(traffic, memory);
            moved |= self.judge(written.map_err(Trouble::Socket), context)?;
        }
        if !self.recvs.is_empty() {
            let read = self.read(traffic, memory);
            // What a record or a header says of the peer is more than that the connection ended after it.
            self.accept(context)?;
            moved |= self.judge(read, context)?;
            while self.recvs.front().is_some_and(|recv| recv.left() == 0) {
                self.recvs.pop_front();
            }
        }
        Ok(moved)
    }

    fn write(&mut self, traffic: &Traffic, memory: &[Slab]) -> io::Result<()> {
        if let Some(records) = &mut self.records {
            return records.write(&mut self.socket, &mut self.sends, traffic, memory);
        }
        let send = self.sends.front_mut().expect("something is to be sent");
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut count = 0;
        let parts = send.parts(&traffic.sends[send.parcel], memory, TURN_BYTES);
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
            count += 1;
        }
        let written = self.socket.write_vectored(&slices[..count])?;
        send.pass(written);
        if send.left() == 0 {
            self.sends.pop_front();
        }
        Ok(())
    }

    fn read(&mut self, traffic: &Traffic, memory: &mut [Slab]) -> Result<(), Trouble> {
        let Some(records) = &mut self.records else {
            return Ok(self.read_plain(traffic, memory)?);
        };
        let mut has_moved = false;
        loop {
            let took = records.take(&mut self.recvs, traffic, memory)?;
            if !took && has_moved {
                return Ok(());
            }
            if !took {
                records.read(&mut self.socket)?;
            }
            has_moved = true;
            // A header is looked at before what follows it is let in, and a message that is complete makes way.
            let first = self.recvs.front();
            if first.is_some_and(|recv| recv.has_new_header() || recv.left() == 0) {
                return Ok(());
            }
        }
    }

    fn read_plain(&mut self, traffic: &Traffic, memory: &mut [Slab]) -> io::Result<()> {
        let recv = self.recvs.front_mut().expect("something is to be received");
        let (header, piece) = recv.places(&traffic.recvs[recv.parcel], memory);
        let most = piece.len().min(TURN_BYTES);
        let piece = &mut piece[..most];
        let read = if header.is_empty() {
            self.socket.read(piece)?
        } else {
            let mut slices = [IoSliceMut::new(header), IoSliceMut::new(piece)];
            self.socket.read_vectored(&mut slices)?
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into()); // the end of the peer
        }
        recv.pass(read);
        Ok(())
    }

    /// Whether something moved, or what went wrong.
    fn judge(&self, result: Result<(), Trouble>, context: &Context<'_>) -> Result<bool> {
        let lost = |how: String| Err(context.vigil.ledger.lost(self.peer, how));
        match result {
            Ok(()) => Ok(true),
            Err(Trouble::Socket(error)) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                io::ErrorKind::UnexpectedEof => lost("its connection closed".to_string()),
                _ => lost(format!("its connection broke: {error}")),
            },
            Err(Trouble::Surplus) => lost("it sent more than its message has".to_string()),
            Err(Trouble::Length(bytes)) => {
                self.tampered(context, format!("it announces {bytes} bytes"))
            }
            Err(Trouble::Record(refused)) => {
                let number = refused.number;
                self.tampered(context, format!("number {number} on its connection"))
            }
        }
    }

    fn tampered(&self, context: &Context<'_>, record: String) -> Result<bool> {
        Err(Error::Tampered {
            rank: context.rank,
            peer: self.peer,
            operation: context.stamp.to_string(),
            record,
        })
    }

    /// Is the message whose header has come the one that the schedule expects here?
    fn accept(&mut self, context: &Context<'_>) -> Result<()> {
        let Some(recv) = self.recvs.front_mut() else {
            return Ok(());
        };
        let expected = recv.expected();
        let Some(bytes) = recv.take_header() else {
            return Ok(());
        };
        let ledger = &context.vigil.ledger;
        let Some(header) = Header::decode(bytes) else {
            return Err(ledger.lost(
                self.peer,
                "it sent bytes that are no frame of this protocol",
            ));
        };
        if header.stamp.op != OpCode::SendRecv {
            ledger.saw(self.peer, header.stamp.sequence); // messages have no number
        }
        let fits = header.stamp == *context.stamp && header.round == context.round;
        if fits && header.bytes == expected as u64 {
            return Ok(());
        }
        let more = |round: u32, bytes: u64| format!(" (round {round}, {bytes} bytes)");
        let (mut ours, mut theirs) = (context.stamp.to_string(), header.stamp.to_string());
        if header.stamp == *context.stamp {
            ours += &more(context.round, expected as u64);
            theirs += &more(header.round, header.bytes);
        }
        Err(Error::Diverged {
            rank: context.rank,
            peer: self.peer,
            ours,
            theirs,
        })
    }
}
