//! Data connections between all pairs of a group: every rank listens, tells the others where, and the higher rank of a
//! pair knocks at the lower one's gate with the same handshake as at the rendezvous.

use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use super::{
    Member,
    gate::{Gate, knock},
    handshake::{Hello, Purpose, Verdict},
};
use crate::error::{Error, Result};

impl Member {
    /// One authenticated connection to every other rank of `group` (world ranks, in group order, this one among them);
    /// the slot of this rank is empty. Every rank of the world must call this with the same `topic`, those outside any
    /// group with an empty one.
    ///
    /// # Errors
    /// When a rank cannot be reached in time, or somebody has failed.
    pub fn connect(&self, topic: &str, group: &[usize]) -> Result<Vec<Option<TcpStream>>> {
        let rank = self.rank();
        let options = &self.options;
        let listener = TcpListener::bind((self.own_address()?, 0))
            .map_err(|e| Error::io(rank, "listen for the data connections of peers", e))?;
        let mut gate = Gate::new(
            rank,
            listener,
            options.secret.clone(),
            options.clock.clone(),
        )?;
        let addresses = self.swap(
            &format!("fabric/mesh/{topic}"),
            gate.address()?.to_string().as_bytes(),
        )?;
        let number = topic_number(topic);
        let deadline = options.clock.now() + options.patience;
        let mut peers = (0..group.len()).map(|_| None).collect::<Vec<_>>();
        let mut missing = group.iter().filter(|peer| **peer > rank).count();
        if !group.contains(&rank) {
            return Ok(Vec::new());
        }
        // Knocking needs the other side to answer while it may itself be knocking further down, so that a rank first
        // knocks at all lower gates (their listeners queue the connection) and answers in between.
        let hello = Hello::new(Purpose::Data, rank, self.world(), number)?;
        std::thread::scope(|scope| -> Result<()> {
            let below = group.iter().enumerate().filter(|(_, peer)| **peer < rank);
            let knocking = below
                .map(|(index, &peer)| {
                    let address = parse(rank, peer, &addresses[peer])?;
                    let (hello, secret, clock, signal) = (
                        &hello,
                        &options.secret,
                        &options.clock,
                        &self.control.signal,
                    );
                    Ok((
                        index,
                        scope.spawn(move || knock(address, hello, secret, clock, deadline, signal)),
                    ))
                })
                .collect::<Result<Vec<_>>>()?;
            while missing > 0 {
                for guest in gate.wait(Duration::from_millis(20))? {
                    let from = guest.hello.rank as usize;
                    let index = group.iter().position(|peer| *peer == from);
                    let fits = guest.hello.purpose == Purpose::Data
                        && guest.hello.topic == number
                        && from > rank;
                    match index.filter(|index| fits && peers[*index].is_none()) {
                        Some(index) => {
                            let stream = guest.answer(Verdict::Welcome);
                            peers[index] =
                                Some(stream.map_err(|e| {
                                    Error::io(rank, format!("answer rank {from}"), e)
                                })?);
                            missing -= 1;
                        }
                        None => drop(guest.answer(Verdict::NotExpected)),
                    }
                }
                self.control.signal.check()?;
                if missing > 0 && options.clock.now() > deadline {
                    return Err(Error::rendezvous(
                        rank,
                        format!("{missing} ranks did not open their data connection in time"),
                        "Check that the ranks can reach each other on any port, not only rank 0",
                    ));
                }
            }
            for (index, thread) in knocking {
                peers[index] = Some(thread.join().expect("a knock does not panic")?);
            }
            Ok(())
        })?;
        if gate.turned_away() > 0 {
            tracing::warn!(
                rank,
                count = gate.turned_away(),
                "strangers were turned away from the data port"
            );
        }
        Ok(peers)
    }

    /// The address of the interface by which this rank reaches rank 0: the one that peers can use.
    fn own_address(&self) -> Result<IpAddr> {
        let socket = std::net::UdpSocket::bind(match self.options.address {
            SocketAddr::V4(_) => "0.0.0.0:0",
            SocketAddr::V6(_) => "[::]:0",
        });
        socket
            .and_then(|socket| {
                socket.connect(self.options.address)?; // sends nothing: it only asks for the route
                socket.local_addr()
            })
            .map(|address| address.ip())
            .map_err(|e| Error::io(self.rank(), "find the interface that reaches rank 0", e))
    }
}

fn parse(rank: usize, peer: usize, text: &[u8]) -> Result<SocketAddr> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| {
            Error::rendezvous(
                rank,
                format!("rank {peer} sent an address that is none"),
                "All ranks must run the same version of this program",
            )
        })
}

fn topic_number(topic: &str) -> u64 {
    let hash = blake3::hash(topic.as_bytes());
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
}
