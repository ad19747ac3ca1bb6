//! The way of sealed messages: cut into records, sealed in an outbox, and on the other side taken from an inbox, opened
//! straight into the memory that waits for them. Both boxes are kept, so that an exchange allocates nothing.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
};

use super::{
    super::{Traffic, frame::HEADER_BYTES},
    Socket, TURN_BYTES,
    cursor::{Receiving, Sending},
    seal::{FRAME_BYTES, RECORD_BYTES, Refused, Seal},
};
use crate::buffer::Slab;

/// A message up to so long is one record, sealed once; a longer one's header has its own, so that its payload can be opened
/// where it belongs.
const SHORT_BYTES: usize = 8 << 10;
/// Some whole records and a header.
const BOX_BYTES: usize =
    (TURN_BYTES / RECORD_BYTES) * (RECORD_BYTES + FRAME_BYTES) + HEADER_BYTES + FRAME_BYTES;

/// Both directions of a connection.
pub(super) struct Records {
    seal: Seal,
    outbox: Vec<u8>,
    sent: usize, // of the outbox
    open: Seal,
    inbox: Box<[u8]>,
    taken: usize, // of the inbox
    come: usize,  // to the inbox
}

/// Why nothing more can be taken in.
pub(super) enum Trouble {
    Socket(io::Error),
    Record(Refused),
    /// A record announces more than there can be.
    Length(u32),
    /// A record holds more than its message.
    Surplus,
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

impl From<Refused> for Trouble {
    fn from(refused: Refused) -> Self {
        Self::Record(refused)
    }
}

impl Records {
    pub(super) fn new(seal: Seal, open: Seal) -> Self {
        Self {
            seal,
            outbox: Vec::with_capacity(BOX_BYTES),
            sent: 0,
            open,
            inbox: vec![0; BOX_BYTES].into_boxed_slice(),
            taken: 0,
            come: 0,
        }
    }

    /// Whether everything that was sealed has left.
    pub(super) fn is_sent(&self) -> bool {
        self.sent == self.outbox.len()
    }

    /// Send what is sealed; when that has left, seal the next of `sends` first.
    pub(super) fn write(
        &mut self,
        socket: &mut Socket,
        sends: &mut VecDeque<Sending>,
        traffic: &Traffic,
        memory: &[Slab],
    ) -> io::Result<()> {
        if self.is_sent() {
            self.outbox.clear();
            self.sent = 0;
        }
        while let Some(send) = sends.front_mut().filter(|_| self.sent == 0) {
            let most = match send.left() {
                long if long > SHORT_BYTES && send.is_new() => HEADER_BYTES,
                left => left.min(RECORD_BYTES),
            };
            if self.outbox.len() + most + FRAME_BYTES > BOX_BYTES {
                break;
            }
            let parts = send.parts(&traffic.sends[send.parcel], memory, most);
            self.seal.seal(&mut self.outbox, |out| {
                parts.for_each(|part| out.extend_from_slice(part));
            });
            send.pass(most);
            if send.left() == 0 {
                sends.pop_front();
            }
        }
        self.sent += socket.write(&self.outbox[self.sent..])?;
        Ok(())
    }

    /// Take in what has come for the first of `recvs`; false when there is no whole record for it.
    pub(super) fn take(
        &mut self,
        recvs: &mut VecDeque<Receiving>,
        traffic: &Traffic,
        memory: &mut [Slab],
    ) -> Result<bool, Trouble> {
        let Some(recv) = recvs.front_mut() else {
            return Ok(false);
        };
        let bytes = &mut self.inbox[self.taken..self.come];
        let Some(length) = Seal::complete(bytes).map_err(Trouble::Length)? else {
            return Ok(false);
        };
        let record = &mut bytes[..length + FRAME_BYTES];
        self.taken += record.len();
        let parcel = &traffic.recvs[recv.parcel];
        let left = recv.left();
        let (header, piece) = recv.places(parcel, memory);
        if header.is_empty() && length <= piece.len() {
            self.open.open(record, &mut piece[..length])?;
            recv.pass(length);
            return Ok(true);
        }
        let payload = self.open.open_in_place(record)?;
        if length > left {
            recv.put(parcel, memory, &payload[..left]); // its header, if it is one, tells more
            return Err(Trouble::Surplus);
        }
        recv.put(parcel, memory, payload);
        Ok(true)
    }

    /// Read once, after what has come and was not taken.
    pub(super) fn read(&mut self, socket: &mut Socket) -> io::Result<()> {
        self.inbox.copy_within(self.taken..self.come, 0);
        self.come -= self.taken;
        self.taken = 0;
        match socket.read(&mut self.inbox[self.come..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            more => {
                self.come += more;
                Ok(())
            }
        }
    }
}
