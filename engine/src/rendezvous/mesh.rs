//! Data connections between all pairs of a group: every rank listens, tells the others where, and the higher rank of a
//! pair knocks at the lower one's gate with the same handshake as at the rendezvous.

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    Member,
    door::{Address, Door, Name, listen, machine},
    gate::{Gate, knock},
    handshake::{Hello, Purpose, Verdict, random},
};
use crate::{
    error::{Error, Result},
    wire::stream::{Connection, Socket},
};

const PROBE: Duration = Duration::from_secs(10); // for a Unix socket, which is there or not

/// A group's connections.
#[derive(Default)]
pub(crate) struct Peers {
    /// By place in the group; this rank's is empty.
    pub(crate) connections: Vec<Option<Connection>>,
    /// Whether all ranks listen where no other machine reaches them.
    pub(crate) is_local: bool,
}

/// How meeting over Unix sockets went.
pub(crate) struct Met {
    /// In this rank's group: its connections, or why there are none, for all ranks alike.
    pub(crate) outcome: Result<Peers, String>,
    /// Whether all groups of the world have theirs.
    pub(crate) everywhere: bool,
}

/// What a rank tells the others before they meet over Unix sockets.
#[derive(Serialize, Deserialize)]
struct Card {
    machine: String,
    offer: Result<Name, String>,
}

impl Member {
    /// One authenticated TCP connection to every other rank of `group` (world ranks, in group order, this one among
    /// them). Every rank of the world must call this with the same `topic`, those outside any group with an empty one.
    ///
    /// # Errors
    /// When a rank cannot be reached in time, or somebody has failed.
    pub(crate) fn connect(&self, topic: &str, group: &[usize]) -> Result<Peers> {
        let rank = self.rank();
        let failed = |e| Error::io(rank, "listen for the data connections of peers", e);
        let listener = TcpListener::bind((self.own_address()?, 0)).map_err(failed)?;
        let own = listener.local_addr().map_err(failed)?;
        let rows = self.swap(&format!("fabric/mesh/{topic}"), own.to_string().as_bytes())?;
        let addresses = group.iter().map(|&peer| parse(rank, peer, &rows[peer]));
        let addresses = addresses.collect::<Result<Vec<_>>>()?;
        let is_local = addresses.iter().all(|address| address.ip().is_loopback());
        let paths = addresses.into_iter().map(Path::to).collect();
        Ok(Peers {
            connections: self.meet(Door::Tcp(listener), topic, group, paths)?,
            is_local,
        })
    }

    /// The same over Unix sockets, for a group on one machine. That it cannot be done is an outcome, not an error.
    ///
    /// # Errors
    /// As [`Member::connect`].
    pub(crate) fn connect_unix(&self, topic: &str, group: &[usize]) -> Result<Met> {
        let (rank, name) = (self.rank(), random()?);
        let door = match group {
            [] => Err("it needs none".to_string()),
            _ => listen(&name).map_err(|e| format!("no Unix socket: {e}")),
        };
        let card = Card {
            machine: machine(),
            offer: door.as_ref().map(|_| name).map_err(Clone::clone),
        };
        let bytes = postcard::to_allocvec(&card).expect("a card has only plain fields");
        let rows = self.swap(&format!("fabric/unix/{topic}/cards"), &bytes)?;
        let cards = group.iter().map(|&peer| {
            let card = postcard::from_bytes::<Card>(&rows[peer]);
            card.map_err(|_| unreadable(rank, peer, "no card that this program can read"))
        });
        let cards = cards.collect::<Result<Vec<_>>>()?;
        let paths = probe(rank, group, &card, &cards);
        let report = paths.as_ref().err().map_or("", String::as_str);
        let rows = self.swap(&format!("fabric/unix/{topic}/probed"), report.as_bytes())?;
        let reason = group.iter().find(|peer| !rows[**peer].is_empty());
        let everywhere = rows.iter().all(Vec::is_empty);
        let outcome = match (reason, paths, door) {
            (Some(peer), ..) => Err(format!(
                "rank {peer}: {}",
                String::from_utf8_lossy(&rows[*peer])
            )),
            (None, Ok(paths), Ok(door)) => Ok(Peers {
                connections: self.meet(Door::Unix(door), topic, group, paths)?,
                is_local: true,
            }),
            (None, ..) => Ok(Peers::default()), // an empty group
        };
        Ok(Met {
            outcome,
            everywhere,
        })
    }

    /// Knock at the doors of all lower ranks of `group`, and open to the higher ones.
    fn meet(
        &self,
        door: Door,
        topic: &str,
        group: &[usize],
        paths: Vec<Path>,
    ) -> Result<Vec<Option<Connection>>> {
        let (rank, options) = (self.rank(), &self.options);
        if !group.contains(&rank) {
            return Ok(Vec::new());
        }
        let mut gate = Gate::new(rank, door, options.secret.clone(), options.clock.clone())?;
        let deadline = options.clock.now() + options.patience;
        let mut peers = (0..group.len()).map(|_| None).collect::<Vec<_>>();
        // Knocking needs the other side to answer while it may itself be knocking further down: each knock has a thread.
        std::thread::scope(|scope| -> Result<()> {
            let mut knocking = Vec::new();
            for (index, (&peer, path)) in group.iter().zip(paths).enumerate() {
                if peer >= rank {
                    continue;
                }
                // Who answers must be the rank that was meant: it is in the topic, and the topic is in the proofs.
                let number = topic_number(topic, peer);
                let hello = Hello::new(Purpose::Data, rank, self.world(), number)?;
                let (secret, clock) = (&options.secret, &options.clock);
                let signal = &self.control.signal;
                let Path { address, first } = path;
                let knock = move || knock(address, first, &hello, secret, clock, deadline, signal);
                knocking.push((index, scope.spawn(knock)));
            }
            self.open(&mut gate, topic, group, &mut peers, deadline)?;
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

    /// Let in the higher ranks of `group`, each once.
    fn open(
        &self,
        gate: &mut Gate,
        topic: &str,
        group: &[usize],
        peers: &mut [Option<Connection>],
        deadline: Duration,
    ) -> Result<()> {
        let (rank, number) = (self.rank(), topic_number(topic, self.rank()));
        let mut missing = group.iter().filter(|peer| **peer > rank).count();
        while missing > 0 {
            for guest in gate.wait(Duration::from_millis(20))? {
                let from = guest.hello.rank as usize;
                let index = group.iter().position(|peer| *peer == from);
                let fits = guest.hello.purpose == Purpose::Data
                    && guest.hello.topic == number
                    && from > rank;
                match index.filter(|index| fits && peers[*index].is_none()) {
                    Some(index) => {
                        let connection = guest.answer(Verdict::Welcome);
                        let failed = |e| Error::io(rank, format!("answer rank {from}"), e);
                        peers[index] = Some(connection.map_err(failed)?);
                        missing -= 1;
                    }
                    None => drop(guest.answer(Verdict::NotExpected)),
                }
            }
            self.control.signal.check()?;
            if missing > 0 && self.options.clock.now() > deadline {
                return Err(Error::rendezvous(
                    rank,
                    format!("{missing} ranks did not open their data connection in time"),
                    "Check that the ranks can reach each other on any port, not only rank 0",
                ));
            }
        }
        Ok(())
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

/// The way to a peer's door, with a connection that stands in front of it already.
struct Path {
    address: Address,
    first: Option<Socket>,
}

impl Path {
    fn to(address: SocketAddr) -> Self {
        Self {
            address: Address::Tcp(address),
            first: None,
        }
    }
}

/// Stand in front of the Unix doors of all lower ranks of `group`, or say why one cannot be reached.
fn probe(rank: usize, group: &[usize], own: &Card, cards: &[Card]) -> Result<Vec<Path>, String> {
    let mut paths = Vec::with_capacity(group.len());
    for (&peer, card) in group.iter().zip(cards) {
        if card.machine != own.machine {
            return Err(format!(
                "rank {peer} is on another machine, or in a container"
            ));
        }
        let offer = card.offer.as_ref();
        let name = offer.map_err(|why| format!("rank {peer}: {why}"))?;
        let address = Address::Unix(*name);
        let first = (peer < rank).then(|| address.connect(PROBE));
        paths.push(Path {
            address,
            first: first
                .transpose()
                .map_err(|e| format!("rank {peer} cannot be reached: {e}"))?,
        });
    }
    Ok(paths)
}

fn parse(rank: usize, peer: usize, text: &[u8]) -> Result<SocketAddr> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| unreadable(rank, peer, "an address that is none"))
}

fn unreadable(rank: usize, peer: usize, what: &str) -> Error {
    Error::rendezvous(
        rank,
        format!("rank {peer} sent {what}"),
        "All ranks must run the same version of this program",
    )
}

/// What a data connection to rank `to` is for, in eight bytes.
fn topic_number(topic: &str, to: usize) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(to as u64).to_le_bytes());
    let hash = hasher.update(topic.as_bytes()).finalize();
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
}
