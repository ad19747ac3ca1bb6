//! Messages over stream sockets, one non-blocking connection a peer (TCP between machines or on loopback). The calling
//! thread moves the bytes: headers and payload leave in one vectored write, payload lands where it is wanted.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, Read, Write},
    net::TcpStream,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    Incoming, Outgoing, Sent, Vigil, Wire,
    frame::{HEADER_BYTES, Header, Stamp},
};
use crate::{
    buffer::{span_bytes, span_bytes_mut},
    error::{Error, Result},
};

const SLICES: usize = 64; // pieces in one vectored write
const NAP: Duration = Duration::from_millis(50); // how often a wait looks at the signal

/// A full mesh of connections, already authenticated.
pub struct Tcp {
    rank: usize,
    peers: Vec<Option<TcpStream>>,
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
            peers,
            vigil,
            sent: Sent::default(),
        })
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
        sends: &[Outgoing<'_>],
        recvs: Vec<Incoming<'_>>,
        deadline: Option<Duration>,
    ) -> Result<()> {
        let started = self.vigil.clock.now();
        let mut lanes: Vec<Lane<'_>> = (0..self.peers.len()).map(Lane::new).collect();
        for send in sends {
            let bytes = send.parts.iter().map(|part| part.bytes()).sum::<usize>();
            let header = Header {
                stamp: *stamp,
                round,
                bytes: bytes as u64,
            };
            self.sent.messages += 1;
            self.sent.payload_bytes += bytes as u64;
            lanes[send.to]
                .sends
                .push_back(Sending::new(header, &send.parts));
        }
        for recv in recvs {
            lanes[recv.from].recvs.push_back(Receiving::new(recv));
        }
        lanes.retain(|lane| !lane.is_done());
        let context = Context {
            vigil: &self.vigil,
            rank: self.rank,
            stamp,
            round,
        };
        loop {
            let mut moved = false;
            for lane in &mut lanes {
                let stream = self.peers[lane.peer]
                    .as_mut()
                    .expect("no schedule sends to itself");
                moved |= lane.advance(stream, &context)?;
            }
            lanes.retain(|lane| !lane.is_done());
            if lanes.is_empty() {
                return Ok(());
            }
            self.vigil.signal.check()?;
            let now = self.vigil.clock.now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                let waiting_for = lanes.iter().map(|lane| lane.peer).collect();
                let after = now.saturating_sub(started);
                return Err(Error::Timeout {
                    rank: self.rank,
                    operation: stamp.to_string(),
                    waiting_for,
                    after,
                });
            }
            if !moved {
                let nap = deadline.map_or(NAP, |deadline| NAP.min(deadline - now));
                wait(&lanes, &self.peers, nap)
                    .map_err(|e| Error::io(self.rank, "wait for peers", e))?;
            }
        }
    }

    fn sent(&self) -> Sent {
        self.sent
    }
}

/// Sleep until a connection can move bytes again.
fn wait(lanes: &[Lane<'_>], peers: &[Option<TcpStream>], nap: Duration) -> io::Result<()> {
    let mut fds = lanes
        .iter()
        .filter_map(|lane| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, !lane.recvs.is_empty());
            flags.set(PollFlags::OUT, !lane.sends.is_empty());
            peers[lane.peer]
                .as_ref()
                .map(|stream| PollFd::new(stream, flags))
        })
        .collect::<Vec<_>>();
    let nap = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(nap.subsec_nanos()),
    };
    match poll(&mut fds, Some(&nap)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

struct Context<'a> {
    vigil: &'a Vigil,
    rank: usize,
    stamp: &'a Stamp,
    round: u32,
}

/// What one peer still has to get from us and give to us in this round.
struct Lane<'a> {
    peer: usize,
    sends: VecDeque<Sending<'a>>,
    recvs: VecDeque<Receiving<'a>>,
}

impl<'a> Lane<'a> {
    fn new(peer: usize) -> Self {
        Self {
            peer,
            sends: VecDeque::new(),
            recvs: VecDeque::new(),
        }
    }

    fn is_done(&self) -> bool {
        self.sends.is_empty() && self.recvs.is_empty()
    }

    /// Move what can be moved without waiting; says whether anything did.
    fn advance(&mut self, stream: &mut TcpStream, context: &Context<'_>) -> Result<bool> {
        let mut moved = false;
        while let Some(send) = self.sends.front_mut() {
            match send.write(stream) {
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
            match recv.read(stream) {
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
struct Sending<'a> {
    header: [u8; HEADER_BYTES],
    parts: Vec<&'a [u8]>,
    done: usize,  // bytes written, header included
    total: usize, // bytes to write, header included
}

impl<'a> Sending<'a> {
    fn new(header: Header, parts: &[fabric_kernels::Span<'a>]) -> Self {
        let total = HEADER_BYTES + header.bytes as usize;
        Self {
            header: header.encode(),
            parts: parts.iter().map(|part| span_bytes(*part)).collect(),
            done: 0,
            total,
        }
    }

    /// One vectored write; true when the message is out.
    fn write(&mut self, stream: &mut TcpStream) -> io::Result<bool> {
        let mut slices = Vec::with_capacity(SLICES.min(self.parts.len() + 1));
        let mut skip = self.done;
        for part in std::iter::once(&self.header[..]).chain(self.parts.iter().copied()) {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }
            slices.push(IoSlice::new(&part[skip..]));
            skip = 0;
            if slices.len() == SLICES {
                break;
            }
        }
        self.done += stream.write_vectored(&slices)?;
        Ok(self.done == self.total)
    }
}

/// A message on its way in.
struct Receiving<'a> {
    header: [u8; HEADER_BYTES],
    parts: Vec<&'a mut [u8]>,
    expected: usize, // bytes of payload
    done: usize,     // bytes read, header included
    part: usize,     // the part being filled
    filled: usize,   // bytes of it
}

enum Progress {
    Some,
    Header([u8; HEADER_BYTES]),
    Done,
}

impl<'a> Receiving<'a> {
    fn new(incoming: Incoming<'a>) -> Self {
        let parts = incoming
            .parts
            .into_iter()
            .map(span_bytes_mut)
            .collect::<Vec<_>>();
        let expected = parts.iter().map(|part| part.len()).sum();
        Self {
            header: [0; HEADER_BYTES],
            parts,
            expected,
            done: 0,
            part: 0,
            filled: 0,
        }
    }

    fn read(&mut self, stream: &mut TcpStream) -> io::Result<Progress> {
        if self.done < HEADER_BYTES {
            self.done += some(stream.read(&mut self.header[self.done..])?)?;
            return Ok(if self.done == HEADER_BYTES {
                Progress::Header(self.header)
            } else {
                Progress::Some
            });
        }
        while self.part < self.parts.len() && self.filled == self.parts[self.part].len() {
            self.part += 1;
            self.filled = 0;
        }
        let Some(part) = self.parts.get_mut(self.part) else {
            return Ok(Progress::Done);
        };
        let read = some(stream.read(&mut part[self.filled..])?)?;
        self.filled += read;
        self.done += read;
        Ok(if self.done == HEADER_BYTES + self.expected {
            Progress::Done
        } else {
            Progress::Some
        })
    }

    /// Is this the message that the schedule expects here?
    fn accept(&self, bytes: &[u8; HEADER_BYTES], peer: usize, context: &Context<'_>) -> Result<()> {
        let Some(header) = Header::decode(bytes) else {
            return Err(context
                .vigil
                .ledger
                .lost(peer, "it sent bytes that are no frame of this protocol"));
        };
        context.vigil.ledger.saw(peer, header.stamp.sequence);
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
