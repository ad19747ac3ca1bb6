//! A control connection: whole messages over a non-blocking socket, with a bound on what a peer may make us hold.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use crate::wire::{ledger::Sighting, stream::Socket};

const MESSAGE_BYTES: usize = 16 << 20; // the largest message that is believed

/// What ranks and hub say to each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message {
    /// To the hub: this rank's contribution to `topic`.
    Offer { topic: String, bytes: Vec<u8> },
    /// From the hub: everybody's contribution to `topic`, by rank.
    Table { topic: String, rows: Vec<Vec<u8>> },
    /// To the hub: still here. From the hub: so am I.
    Beat,
    /// To the hub: the connection to `peer` broke. From the hub: what do you know of `peer`?
    Lost { peer: u32, how: String },
    /// To the hub: this rank's answer.
    Seen { peer: u32, sighting: Sighting },
    /// From the hub: the verdict.
    Dead {
        peer: u32,
        how: String,
        last_joined: Option<String>,
        waiting: Option<String>,
    },
    /// Either way: `rank` has failed, everybody stops.
    Abort { rank: u32, reason: String },
    /// To the hub: this rank is done. From the hub: `rank` is done.
    Bye { rank: u32 },
}

/// A framed connection: four bytes of length, then a message.
pub(super) struct Line {
    stream: Socket,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Line {
    pub(super) fn new(stream: Socket) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            incoming: Vec::new(),
            outgoing: Vec::new(),
        })
    }

    pub(super) fn stream(&self) -> &Socket {
        &self.stream
    }

    /// Whether bytes wait to be written.
    pub(super) fn is_full(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Queue a message, and write what can be written.
    pub(super) fn send(&mut self, message: &Message) -> io::Result<()> {
        let head = self.outgoing.len();
        let mut outgoing = std::mem::take(&mut self.outgoing); // what can grow is written to by value
        outgoing.extend([0; 4]);
        self.outgoing = postcard::to_extend(message, outgoing).map_err(io::Error::other)?;
        let length = (self.outgoing.len() - head - 4) as u32;
        self.outgoing[head..head + 4].copy_from_slice(&length.to_le_bytes());
        self.flush()
    }

    /// Write what can be written without waiting.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.outgoing.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Take in everything that has arrived, for [`Line::next_message`]; says whether the connection has ended.
    pub(super) fn receive(&mut self) -> Option<io::Error> {
        let mut chunk = [0; 16 << 10];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Some(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.incoming.extend(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Some(error),
            }
        }
    }

    /// The next message that has arrived whole.
    pub(super) fn next_message(&mut self) -> io::Result<Option<Message>> {
        let Some(head) = self.incoming.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*head) as usize;
        if length > MESSAGE_BYTES {
            return Err(io::Error::other(format!(
                "it announced a control message of {length} bytes"
            )));
        }
        if self.incoming.len() < 4 + length {
            return Ok(None);
        }
        let message =
            postcard::from_bytes(&self.incoming[4..4 + length]).map_err(io::Error::other)?;
        self.incoming.drain(..4 + length);
        Ok(Some(message))
    }
}
