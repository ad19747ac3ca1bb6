//! Messages over stream sockets, one non-blocking connection a peer: TCP between machines or on loopback, Unix sockets
//! between processes of one machine, sealed where others may reach them. The calling thread moves the bytes. What is
//! still to be moved is kept by index, in lists that stay, so that an exchange allocates nothing.

mod cursor;
mod lane;
mod records;
mod seal;
mod socket;
#[cfg(test)]
mod tests;

use std::time::Duration;

use super::{
    Sent, Traffic, Vigil, Wire,
    frame::{Header, Stamp},
    waiting::Waiting,
};
use crate::{
    buffer::Slab,
    error::{Error, Result},
};
use lane::{Context, Lane};
pub use seal::{Keys, Security};
pub use socket::Socket;

const NAP: Duration = Duration::from_millis(50); // how often a wait looks at the signal
const TURN_BYTES: usize = 256 << 10; // moved one way before the other way has its turn
const YIELDS: u32 = 4; // before a wait sleeps

// [Note: on one machine] Between ranks of one machine both ends of a connection share caches: what is in flight should stay
// there, and a round trip costs microseconds. So the sockets hold more at once, and long vectors are reduced in windows.
// (Two ranks, 64 MiB all_reduce, best of five: 26 ms with windows, 17 ms with larger buffers too, 35 ms with neither. Four ranks:
// 87 ms with windows of 1 MiB, 135 ms with 2 MiB.)
// Across machines the kernel grows buffers as the path needs, and more round trips would cost more than the caches save.
const BUFFER_BYTES: usize = 1 << 20;
const WINDOW_BYTES: usize = 256 << 10; // a rank

/// A connection to a peer that has proved who it is.
pub struct Connection {
    /// Where the bytes go.
    pub socket: Socket,
    /// What seals them.
    pub keys: Keys,
}

/// A full mesh of connections, already authenticated.
pub struct Streams {
    rank: usize,
    lanes: Vec<Option<Lane>>, // by peer
    busy: Vec<usize>,         // peers whose lanes are not done
    is_local: bool,
    waiting: Waiting,
    vigil: Vigil,
    sent: Sent,
}

impl Streams {
    /// `peers[r]` is the connection to rank `r`; there is none to this rank. `is_local`: all ranks are on one machine, which
    /// all ranks must know alike.
    ///
    /// # Errors
    /// When a socket refuses to become non-blocking.
    pub fn new(
        rank: usize,
        peers: Vec<Option<Connection>>,
        security: Security,
        is_local: bool,
        vigil: Vigil,
    ) -> Result<Self> {
        for Connection { socket, .. } in peers.iter().flatten() {
            let prepared = socket
                .set_nonblocking(true)
                .and_then(|()| socket.set_nodelay())
                .and_then(|()| match is_local {
                    true => socket.set_buffers(BUFFER_BYTES),
                    false => Ok(()),
                });
            prepared.map_err(|e| Error::io(rank, "prepare a connection", e))?;
        }
        let lane = |(peer, connection): (usize, Option<Connection>)| {
            connection.map(|connection| Lane::new(peer, connection, security))
        };
        let lanes = peers.into_iter().enumerate().map(lane).collect::<Vec<_>>();
        Ok(Self {
            rank,
            is_local,
            busy: Vec::with_capacity(lanes.len()),
            waiting: Waiting::new(lanes.len()),
            lanes,
            vigil,
            sent: Sent::default(),
        })
    }

    /// Put a round's messages on their lanes.
    fn load(&mut self, stamp: &Stamp, round: u32, traffic: &Traffic, memory: &[Slab]) {
        self.lanes.iter_mut().flatten().for_each(Lane::clear);
        for (index, parcel) in traffic.sends.iter().enumerate() {
            let bytes = parcel.bytes(memory);
            let header = Header {
                stamp: *stamp,
                round,
                bytes: bytes as u64,
            };
            self.sent.messages += 1;
            self.sent.payload_bytes += bytes as u64;
            lane(&mut self.lanes, parcel.peer).send(index, header);
        }
        for (index, parcel) in traffic.recvs.iter().enumerate() {
            lane(&mut self.lanes, parcel.peer).recv(index, parcel.bytes(memory));
        }
        self.busy.clear();
        let lanes = self.lanes.iter().enumerate();
        let busy = lanes.filter(|(_, lane)| lane.as_ref().is_some_and(|lane| !lane.is_done()));
        self.busy.extend(busy.map(|(peer, _)| peer));
    }
}

fn lane(lanes: &mut [Option<Lane>], peer: usize) -> &mut Lane {
    lanes[peer].as_mut().expect("no schedule sends to itself")
}

impl Wire for Streams {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.lanes.len()
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
        let mut yields = 0;
        loop {
            let mut moved = false;
            for peer in &self.busy {
                moved |= lane(&mut self.lanes, *peer).advance(traffic, memory, &context)?;
            }
            let lanes = &mut self.lanes;
            self.busy.retain(|peer| !lane(lanes, *peer).is_done());
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
            if moved {
                yields = 0;
            } else if yields < YIELDS {
                // The peer may be about to write, or wait for this core: a small message takes 5 us so, and 18 us asleep.
                yields += 1;
                std::thread::yield_now();
            } else {
                let nap = deadline.map_or(NAP, |deadline| NAP.min(deadline - now));
                let busy = self.busy.iter();
                let fds = busy.filter_map(|peer| self.lanes[*peer].as_ref().map(Lane::poll_fd));
                self.waiting
                    .on(fds, nap)
                    .map_err(|e| Error::io(self.rank, "wait for peers", e))?;
            }
        }
    }

    fn sent(&self) -> Sent {
        self.sent
    }

    fn window_bytes(&self) -> Option<usize> {
        self.is_local.then_some(WINDOW_BYTES * self.lanes.len()) // [Note: on one machine]
    }
}
