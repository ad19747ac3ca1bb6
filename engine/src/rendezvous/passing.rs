//! Passing a descriptor to every rank of a group on this machine, or finding out, all ranks alike, that it cannot be
//! done. It travels over a Unix socket with a random abstract name, which no file system sees and which is told to the
//! job's ranks alone, to processes of the same user that know the job's secret.
//!
//! ```text
//! client                                                       server
//!   | hello: magic, from, to, nonce, mac(client, name, hello) -> |   another user, or a wrong mac: dropped
//!   | <- mac(server, name, hello), and the descriptor            |   another user, or a wrong mac: refused
//! ```
//! The server's random name is its nonce. Every rank serves in a thread of its own until all ranks have said how it
//! went, so that nobody waits for somebody who has given up.

use std::{
    collections::BTreeSet,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
    thread::{CpuSet, sched_getaffinity},
};
use serde::{Deserialize, Serialize};

use super::{
    Member,
    door::{listen, machine, same_user, unix},
    handshake::random,
};
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"fabricfd";
const HELLO_BYTES: usize = 8 + 4 + 4 + 32;
const MAC: usize = 32;
const PATIENCE: Duration = Duration::from_secs(10); // for a server's answer
const STRANGER: Duration = Duration::from_secs(2); // for a client's hello
const NAP: Duration = Duration::from_millis(2); // how late a server may notice that all is done

/// How passing went.
pub(crate) struct Passed {
    /// In this rank's group: all have everybody's descriptor, or somebody has not, and why.
    pub(crate) outcome: Result<(), String>,
    /// Whether all groups of the world have theirs.
    pub(crate) everywhere: bool,
    /// Whether more ranks of the world are on this machine than cores that any of them may run on.
    pub(crate) is_crowded: bool,
}

/// What a rank tells the others first.
#[derive(Serialize, Deserialize)]
struct Card {
    machine: String,
    cores: Vec<u16>,                 // that this rank may run on
    offer: Result<[u8; 32], String>, // the name to ask at, or why there is nothing to pass
}

impl Member {
    /// Give `own` to every rank of `group` (world ranks, in group order, this one among them), and `keep` what each of
    /// them gives, by its place in the group. Every rank of the world must call this with the same `topic`.
    ///
    /// # Errors
    /// When somebody has failed, or not everybody has come in time. That it cannot be done is an outcome, not an error.
    pub(crate) fn pass(
        &self,
        topic: &str,
        group: &[usize],
        own: Result<BorrowedFd<'_>, String>,
        keep: &mut dyn FnMut(usize, OwnedFd) -> Result<(), String>,
    ) -> Result<Passed> {
        let rank = self.rank();
        let name = random()?;
        let door = own.and_then(|fd| {
            let listener = listen(&name).map_err(|e| format!("no Unix socket: {e}"))?;
            Ok((listener, fd))
        });
        let card = Card {
            machine: machine(),
            cores: cores(),
            offer: door.as_ref().map(|_| name).map_err(Clone::clone),
        };
        let bytes = postcard::to_allocvec(&card).expect("a card has only plain fields");
        let cards = self
            .swap(&format!("fabric/shm/{topic}/cards"), &bytes)?
            .iter()
            .enumerate()
            .map(|(peer, row)| {
                postcard::from_bytes::<Card>(row).map_err(|_| {
                    Error::rendezvous(
                        rank,
                        format!("rank {peer} sent no card that this program can read"),
                        "All ranks must run the same version of this program",
                    )
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let neighbours = || {
            let others = cards.iter();
            others.filter(|other| other.machine == card.machine)
        };
        let cores: BTreeSet<u16> = neighbours()
            .flat_map(|other| &other.cores)
            .copied()
            .collect();
        let is_crowded = neighbours().count() > cores.len().min(quota(&card));
        let key = self
            .options
            .secret
            .key_for("fabric 2026 descriptor passing");
        let party = Party {
            rank,
            group,
            key,
            name,
        };
        let done = AtomicBool::new(false);
        let rows = std::thread::scope(|scope| {
            if let Ok((listener, fd)) = &door {
                scope.spawn(|| party.serve(listener, *fd, &done));
            }
            let fetched = party.fetch(&cards, keep);
            let report = fetched.err().unwrap_or_default();
            let rows = self.swap(&format!("fabric/shm/{topic}/passed"), report.as_bytes());
            done.store(true, Ordering::Release);
            rows
        })?;
        let reason = group.iter().find(|peer| !rows[**peer].is_empty());
        let outcome = match reason {
            Some(peer) => Err(format!(
                "rank {peer}: {}",
                String::from_utf8_lossy(&rows[*peer])
            )),
            None => Ok(()),
        };
        Ok(Passed {
            outcome,
            everywhere: rows.iter().all(Vec::is_empty),
            is_crowded,
        })
    }
}

/// One rank's part.
struct Party<'a> {
    rank: usize,
    group: &'a [usize],
    key: [u8; 32],
    name: [u8; 32],
}

impl Party<'_> {
    /// Hand the descriptor to all who may have it, until `done`.
    fn serve(&self, listener: &UnixListener, fd: BorrowedFd<'_>, done: &AtomicBool) {
        let nap = Timespec {
            tv_sec: 0,
            tv_nsec: NAP.subsec_nanos().into(),
        };
        while !done.load(Ordering::Acquire) {
            let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&nap)); // fails only into a look too early
            while let Ok((stream, _)) = listener.accept() {
                if let Err(error) = self.answer(stream, fd) {
                    tracing::warn!(rank = self.rank, %error, "a stranger asked for shared memory");
                }
            }
        }
    }

    fn answer(&self, mut stream: UnixStream, fd: BorrowedFd<'_>) -> io::Result<()> {
        same_user(&stream)?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(STRANGER))?;
        let (mut hello, mut mac) = ([0; HELLO_BYTES], [0; MAC]);
        stream.read_exact(&mut hello)?;
        stream.read_exact(&mut mac)?;
        let from = u32::from_le_bytes(hello[8..12].try_into().expect("four bytes"));
        let to = u32::from_le_bytes(hello[12..16].try_into().expect("four bytes"));
        // blake3::Hash compares in constant time.
        let proved = self.mac(b"client", &self.name, &hello) == blake3::Hash::from_bytes(mac);
        let known = self.group.contains(&(from as usize)) && to as usize == self.rank;
        if !proved || !known || !hello.starts_with(MAGIC) {
            return Err(io::Error::other("it does not know the job's secret"));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        assert!(
            control.push(SendAncillaryMessage::ScmRights(&fds)),
            "space for one descriptor"
        );
        let proof = self.mac(b"server", &self.name, &hello);
        sendmsg(
            &stream,
            &[IoSlice::new(proof.as_bytes())],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Ask all others of the group for theirs.
    fn fetch(
        &self,
        cards: &[Card],
        keep: &mut dyn FnMut(usize, OwnedFd) -> Result<(), String>,
    ) -> Result<(), String> {
        let own = &cards[self.rank];
        if let Err(why) = &own.offer {
            return Err(why.clone());
        }
        for (index, &peer) in self.group.iter().enumerate() {
            let card = &cards[peer];
            if card.machine != own.machine {
                return Err(format!(
                    "rank {peer} is on another machine, or in a container"
                ));
            }
            let Ok(name) = &card.offer else {
                return Err(format!("rank {peer} has no shared memory"));
            };
            if peer != self.rank {
                let fd = self
                    .ask(peer, name)
                    .map_err(|e| format!("rank {peer} passed no descriptor: {e}"))?;
                keep(index, fd).map_err(|why| format!("rank {peer}: {why}"))?;
            }
        }
        Ok(())
    }

    fn ask(&self, peer: usize, name: &[u8; 32]) -> io::Result<OwnedFd> {
        let mut stream = UnixStream::connect_addr(&unix(name)?)?;
        same_user(&stream)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut hello = [0; HELLO_BYTES];
        hello[..8].copy_from_slice(MAGIC);
        hello[8..12].copy_from_slice(&(self.rank as u32).to_le_bytes());
        hello[12..16].copy_from_slice(&(peer as u32).to_le_bytes());
        hello[16..].copy_from_slice(&random().map_err(io::Error::other)?);
        stream.write_all(&hello)?;
        stream.write_all(self.mac(b"client", name, &hello).as_bytes())?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut proof = [0; MAC];
        let came = recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut proof)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let fd = fds.next();
        let proved = came.bytes == MAC
            && self.mac(b"server", name, &hello) == blake3::Hash::from_bytes(proof);
        fd.filter(|_| proved)
            .ok_or_else(|| io::Error::other("it does not know the job's secret"))
    }

    fn mac(&self, role: &[u8; 6], name: &[u8; 32], hello: &[u8; HELLO_BYTES]) -> blake3::Hash {
        blake3::Hasher::new_keyed(&self.key)
            .update(role)
            .update(name)
            .update(hello)
            .finalize()
    }
}

/// The cores that this process may run on: fewer than the machine's where a launcher has bound it.
fn cores() -> Vec<u16> {
    match sched_getaffinity(None) {
        Ok(set) => {
            let all = 0..CpuSet::MAX_CPU as u16;
            all.filter(|core| set.is_set((*core).into())).collect()
        }
        Err(_) => (0..parallelism() as u16).collect(),
    }
}

/// How many cores at once a container's quota leaves to a rank, where it leaves fewer than the rank may run on.
fn quota(card: &Card) -> usize {
    Some(parallelism())
        .filter(|count| *count < card.cores.len())
        .unwrap_or(usize::MAX)
}

fn parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const GROUP: [usize; 2] = [0, 1];

    fn party(rank: usize, secret: u8, name: [u8; 32]) -> Party<'static> {
        Party {
            rank,
            group: &GROUP,
            key: [secret; 32],
            name,
        }
    }

    /// One rank serves, and another asks it, as the rank that it says to be.
    fn asks(client: Party<'_>, secret: u8) -> io::Result<OwnedFd> {
        let name = random().unwrap();
        let server = party(0, secret, name);
        let listener = listen(&name).unwrap();
        let fd = std::fs::File::open("/proc/self/exe").unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| server.serve(&listener, fd.as_fd(), &done));
            let answer = client.ask(0, &name);
            done.store(true, Ordering::Release);
            answer
        })
    }

    #[test]
    fn a_descriptor_reaches_who_knows_the_secret() {
        let fd = asks(party(1, 7, [0; 32]), 7).unwrap();
        let stat = rustix::fs::fstat(fd).unwrap();
        let own = rustix::fs::stat("/proc/self/exe").unwrap();
        assert_eq!((stat.st_dev, stat.st_ino), (own.st_dev, own.st_ino));
    }

    #[test]
    fn another_secret_or_rank_gets_nothing() {
        assert!(asks(party(1, 8, [0; 32]), 7).is_err());
        assert!(asks(party(2, 7, [0; 32]), 7).is_err());
    }

    #[test]
    fn garbage_is_dropped_and_the_next_is_served() {
        let name = random().unwrap();
        let server = party(0, 7, name);
        let listener = listen(&name).unwrap();
        let fd = std::fs::File::open("/proc/self/exe").unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| server.serve(&listener, fd.as_fd(), &done));
            let mut stranger = UnixStream::connect_addr(&unix(&name).unwrap()).unwrap();
            stranger.write_all(&[0x47; HELLO_BYTES + MAC]).unwrap();
            let end = stranger.read(&mut [0; MAC]);
            assert!(!matches!(end, Ok(bytes) if bytes > 0));
            let answer = party(1, 7, [0; 32]).ask(0, &name);
            done.store(true, Ordering::Release);
            answer.unwrap();
        });
    }

    #[test]
    fn a_server_that_does_not_know_the_secret_is_refused() {
        let name = random().unwrap();
        let listener = UnixListener::bind_addr(&unix(&name).unwrap()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.read_exact(&mut [0; HELLO_BYTES + MAC]).unwrap();
                stream.write_all(&[9; MAC]).unwrap();
            });
            assert!(party(1, 7, [0; 32]).ask(0, &name).is_err());
        });
    }
}
