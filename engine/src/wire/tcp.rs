//! Messages over stream sockets, one non-blocking connection a peer (TCP between machines or on loopback). The calling
//! thread moves the bytes: headers and payload leave in one vectored write, payload lands where it is wanted. What is still
//! to be moved is kept by index, in lists that stay, so that an exchange allocates nothing.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, Read, Write},
    net::TcpStream,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags};

use super::{
    Parcel, Sent, Traffic, Vigil, Wire,
    frame::{HEADER_BYTES, Header, OpCode, Stamp},
    waiting::Waiting,
};
use crate::{
    buffer::Slab,
    error::{Error, Result},
};

const SLICES: usize = 64; // pieces in one vectored write
const NAP: Duration = Duration::from_millis(50); // how often a wait looks at the signal

/// A full mesh of connections, already authenticated.
pub struct Tcp {
    rank: usize,
    peers: Vec<Option<TcpStream>>,
    lanes: Vec<Lane>, // by peer
    busy: Vec<usize>, // peers whose lanes are not done
    waiting: Waiting,
    vigil: Vigil,
    sent: Sent,
}

impl Tcp {
    /// `peers[r]` is the connection to rank `r`; there is none to this rank.
    ///
    /// # Errors
    /// When a socket refuses to become non-blocking.
    pub fn new(rank: usize, peers: Vec<Option<TcpStream>>, vigil: Vigil) -> Result<Self> {
        for stream in peers.iter().flatten() {
            stream
                .set_nonblocking(true)
                .map_err(|e| Error::io(rank, "make a connection non-blocking", e))?;
            stream
                .set_nodelay(true)
                .map_err(|e| Error::io(rank, "set TCP_NODELAY", e))?;
        }
        Ok(Self {
            rank,
            lanes: (0..peers.len()).map(Lane::new).collect(),
            busy: Vec::with_capacity(peers.len()),
            waiting: Waiting::new(peers.len()),
            peers,
            vigil,
            sent: Sent::default(),
        })
    }

    /// Put a round's messages on their lanes.
    fn load(&mut self, stamp: &Stamp, round: u32, traffic: &Traffic, memory: &[Slab]) {
        self.lanes.iter_mut().for_each(Lane::clear);
        for (index, parcel) in traffic.sends.iter().enumerate() {
            let bytes = parcel.bytes(memory);
            let header = Header {
                stamp: *stamp,
                round,
                bytes: bytes as u64,
            };
            self.sent.messages += 1;
            self.sent.payload_bytes += bytes as u64;
            let sending = Sending::new(index, header);
            self.lanes[parcel.peer].sends.push_back(sending);
        }
        for (index, parcel) in traffic.recvs.iter().enumerate() {
            let receiving = Receiving::new(index, parcel.bytes(memory));
            self.lanes[parcel.peer].recvs.push_back(receiving);
        }
        self.busy.clear();
        let busy = self.lanes.iter().filter(|lane| !lane.is_done());
        self.busy.extend(busy.map(|lane| lane.peer));
    }
}

impl Wire for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.peers.len()
    }

    fn exchange(
        &mut self,
        stamp: &Stamp,
        round: u32,
        traffic: &Traffic,
        memory: &mut [Slab],
        deadline: Option<Duration>,
    ) -> Result<()> {
        let started = self.vigil.clock.now();
        self.load(stamp, round, traffic, memory);
        let context = Context {
            vigil: &self.vigil,
            rank: self.rank,
            stamp,
            round,
        };
        loop {
            let mut moved = false;
            for peer in &self.busy {
                let stream = self.peers[*peer]
                    .as_mut()
                    .expect("no schedule sends to itself");
                moved |= self.lanes[*peer].advance(stream, traffic, memory, &context)?;
            }
            self.busy.retain(|peer| !self.lanes[*peer].is_done());
            if self.busy.is_empty() {
                return Ok(());
            }
            self.vigil.signal.check()?;
            let now = self.vigil.clock.now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                let after = now.saturating_sub(started);
                return Err(Error::Timeout {
                    rank: self.rank,
                    operation: stamp.to_string(),
                    waiting_for: self.busy.clone(),
                    after,
                });
            }
            if !moved {
                let nap = deadline.map_or(NAP, |deadline| NAP.min(deadline - now));
                let fds = self.busy.iter().filter_map(|peer| {
                    let stream = self.peers[*peer].as_ref()?;
                    Some(PollFd::new(stream, self.lanes[*peer].flags()))
                });
                self.waiting
                    .on(fds, nap)
                    .map_err(|e| Error::io(self.rank, "wait for peers", e))?;
            }
        }
    }

    fn sent(&self) -> Sent {
        self.sent
    }
}

struct Context<'a> {
    vigil: &'a Vigil,
    rank: usize,
    stamp: &'a Stamp,
    round: u32,
}

/// What one peer still has to get from us and give to us in this round.
struct Lane {
    peer: usize,
    sends: VecDeque<Sending>,
    recvs: VecDeque<Receiving>,
}

impl Lane {
    fn new(peer: usize) -> Self {
        Self {
            peer,
            sends: VecDeque::new(),
            recvs: VecDeque::new(),
        }
    }

    fn clear(&mut self) {
        self.sends.clear();
        self.recvs.clear();
    }

    fn is_done(&self) -> bool {
        self.sends.is_empty() && self.recvs.is_empty()
    }

    /// What to wait for.
    fn flags(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, !self.recvs.is_empty());
        flags.set(PollFlags::OUT, !self.sends.is_empty());
        flags
    }

    /// Move what can be moved without waiting; says whether anything did.
    fn advance(
        &mut self,
        stream: &mut TcpStream,
        traffic: &Traffic,
        memory: &mut [Slab],
        context: &Context<'_>,
    ) -> Result<bool> {
        let mut moved = false;
        while let Some(send) = self.sends.front_mut() {
            match send.write(stream, &traffic.sends[send.parcel], memory) {
                Ok(true) => {
                    self.sends.pop_front();
                    moved = true;
                }
                Ok(false) => moved = true,
                Err(error) if would_block(&error) => break,
                Err(error) => return Err(self.gone(context, &error)),
            }
        }
        while let Some(recv) = self.recvs.front_mut() {
            match recv.read(stream, &traffic.recvs[recv.parcel], memory) {
                Ok(Progress::Done) => {
                    self.recvs.pop_front();
                    moved = true;
                }
                Ok(Progress::Header(bytes)) => {
                    moved = true;
                    recv.accept(&bytes, self.peer, context)?;
                }
                Ok(Progress::Some) => moved = true,
                Err(error) if would_block(&error) => break,
                Err(error) => return Err(self.gone(context, &error)),
            }
        }
        Ok(moved)
    }

    fn gone(&self, context: &Context<'_>, error: &io::Error) -> Error {
        let how = match error.kind() {
            io::ErrorKind::UnexpectedEof => "its connection closed".to_string(),
            _ => format!("its connection broke: {error}"),
        };
        context.vigil.ledger.lost(self.peer, how)
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// A message on its way out.
struct Sending {
    parcel: usize, // its index in the round
    header: [u8; HEADER_BYTES],
    done: usize,  // bytes written, header included
    total: usize, // bytes to write, header included
}

impl Sending {
    fn new(parcel: usize, header: Header) -> Self {
        Self {
            parcel,
            header: header.encode(),
            done: 0,
            total: HEADER_BYTES + header.bytes as usize,
        }
    }

    /// One vectored write; true when the message is out.
    fn write(
        &mut self,
        stream: &mut TcpStream,
        parcel: &Parcel,
        memory: &[Slab],
    ) -> io::Result<bool> {
        let pieces = parcel.pieces.iter();
        let parts = pieces.map(|piece| memory[piece.slab].bytes_of(&piece.range));
        let mut slices = [IoSlice::new(&[]); SLICES];
        let (mut count, mut skip) = (0, self.done);
        for part in std::iter::once(&self.header[..]).chain(parts) {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }
            slices[count] = IoSlice::new(&part[skip..]);
            count += 1;
            skip = 0;
            if count == SLICES {
                break;
            }
        }
        self.done += stream.write_vectored(&slices[..count])?;
        Ok(self.done == self.total)
    }
}

/// A message on its way in.
struct Receiving {
    parcel: usize, // its index in the round
    header: [u8; HEADER_BYTES],
    expected: usize, // bytes of payload
    done: usize,     // bytes read, header included
    piece: usize,    // the piece being filled
    filled: usize,   // bytes of it
}

enum Progress {
    Some,
    Header([u8; HEADER_BYTES]),
    Done,
}

impl Receiving {
    fn new(parcel: usize, expected: usize) -> Self {
        Self {
            parcel,
            header: [0; HEADER_BYTES],
            expected,
            done: 0,
            piece: 0,
            filled: 0,
        }
    }

    fn read(
        &mut self,
        stream: &mut TcpStream,
        parcel: &Parcel,
        memory: &mut [Slab],
    ) -> io::Result<Progress> {
        if self.done < HEADER_BYTES {
            self.done += some(stream.read(&mut self.header[self.done..])?)?;
            return Ok(if self.done == HEADER_BYTES {
                Progress::Header(self.header)
            } else {
                Progress::Some
            });
        }
        while let Some(piece) = parcel.pieces.get(self.piece) {
            let bytes = memory[piece.slab].bytes_of_mut(&piece.range);
            if self.filled == bytes.len() {
                self.piece += 1;
                self.filled = 0;
                continue;
            }
            let read = some(stream.read(&mut bytes[self.filled..])?)?;
            self.filled += read;
            self.done += read;
            return Ok(if self.done == HEADER_BYTES + self.expected {
                Progress::Done
            } else {
                Progress::Some
            });
        }
        Ok(Progress::Done)
    }

    /// Is this the message that the schedule expects here?
    fn accept(&self, bytes: &[u8; HEADER_BYTES], peer: usize, context: &Context<'_>) -> Result<()> {
        let Some(header) = Header::decode(bytes) else {
            return Err(context
                .vigil
                .ledger
                .lost(peer, "it sent bytes that are no frame of this protocol"));
        };
        if header.stamp.op != OpCode::SendRecv {
            context.vigil.ledger.saw(peer, header.stamp.sequence); // messages have no number
        }
        let fits = header.stamp == *context.stamp && header.round == context.round;
        if fits && header.bytes == self.expected as u64 {
            return Ok(());
        }
        let more = |round: u32, bytes: u64| format!(" (round {round}, {bytes} bytes)");
        let (mut ours, mut theirs) = (context.stamp.to_string(), header.stamp.to_string());
        if header.stamp == *context.stamp {
            ours += &more(context.round, self.expected as u64);
            theirs += &more(header.round, header.bytes);
        }
        Err(Error::Diverged {
            rank: context.rank,
            peer,
            ours,
            theirs,
        })
    }
}

/// A read of no bytes is the end of the peer.
fn some(read: usize) -> io::Result<usize> {
    if read == 0 {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(read)
    }
}
