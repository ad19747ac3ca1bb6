//! How ranks find and recognise each other, and how they learn that one is gone.
//!
//! Rank 0 listens; every rank (rank 0 too) knocks, proves that it knows the job's secret, and keeps that connection as
//! its control line. Over it ranks swap small facts ([`Member::swap`]: addresses, hashes), and the hub tells everybody
//! who died, what the dead rank last joined, and what waits for it.

mod door;
mod gate;
mod handshake;
mod hub;
mod line;
mod mesh;
mod passing;

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

pub use handshake::Secret;
pub(crate) use mesh::Peers;

use crate::{
    clock::Clock,
    error::{Error, PeerLost, Result},
    signal::Signal,
    wire::ledger::Ledger,
};
use door::{Address, Door};
use gate::{Gate, knock};
use handshake::{Hello, Purpose};
use hub::Hub;
use line::{Line, Message};

/// How to join a job.
#[derive(Clone, Debug)]
pub struct Options {
    /// This process's rank.
    pub rank: usize,
    /// How many ranks there are.
    pub world: usize,
    /// Where rank 0 listens.
    pub address: SocketAddr,
    /// What proves that a process belongs to the job.
    pub secret: Secret,
    /// How long ranks may take to arrive.
    pub patience: Duration,
    /// After how long without a sign a rank counts as gone.
    pub silence: Duration,
    /// The clock for both.
    pub clock: Clock,
    /// Which job of this program it is, when it joins several, one after the other: a rank that is quick to come to the
    /// next is not mistaken for one of the last.
    pub epoch: u64,
}

impl Options {
    /// The usual patience: 120 s to arrive, 60 s of silence.
    pub fn new(rank: usize, world: usize, address: SocketAddr, secret: Secret) -> Self {
        let (patience, silence) = (Duration::from_secs(120), Duration::from_secs(60));
        Self {
            rank,
            world,
            address,
            secret,
            patience,
            silence,
            clock: Clock::machine(),
            epoch: 0,
        }
    }
}

/// This process's place in the job. Dropping it leaves the job in an orderly way (or, while panicking, ends the job).
pub struct Member {
    options: Options,
    control: Control,
    client: Option<JoinHandle<()>>,
    hub: Option<Hub>,
}

/// A handle to the control line, for every thread of this rank.
#[derive(Clone)]
pub struct Control {
    outbox: Sender<Message>,
    wake: Arc<OwnedFd>,
    tables: Arc<Mutex<HashMap<String, Table>>>,
    signal: Signal,
    ledger: Ledger,
}

/// The two ends of one topic's answer.
type Table = (Sender<Vec<Vec<u8>>>, Receiver<Vec<Vec<u8>>>);

impl Member {
    /// Join the job: rank 0 listens at `options.address`, all others connect to it.
    ///
    /// # Errors
    /// When the address is not loopback and there is no secret, when it is taken or cannot be reached in time, when the
    /// other side does not know the secret, has another size of the world, or has this rank already.
    pub fn join(options: Options) -> Result<Self> {
        if !options.address.ip().is_loopback() && !options.secret.is_given() {
            return Err(Error::rendezvous(
                options.rank,
                format!(
                    "the job would listen at {}, which others can reach, without a secret",
                    options.address
                ),
                "Set FABRIC_SECRET to the same random text on all ranks, or use a loopback address",
            ));
        }
        if options.rank >= options.world {
            return Err(Error::argument(
                format!("rank {} in a world of {}", options.rank, options.world),
                "Ranks are numbered from 0 to world size - 1",
            ));
        }
        let mut options = options;
        let listener = if options.rank == 0 {
            Some(listen(&options)?)
        } else {
            None
        };
        Self::enter(&mut options, listener)
    }

    /// Join as rank 0 with a listener that is already bound: how ranks that are threads, or children that inherit
    /// it, avoid a race for the port.
    ///
    /// # Errors
    /// As [`Member::join`].
    pub fn host(mut options: Options, listener: TcpListener) -> Result<Self> {
        options.address = listener
            .local_addr()
            .map_err(|e| Error::io(0, "read the listener's address", e))?;
        Self::enter(&mut options, Some(listener))
    }

    fn enter(options: &mut Options, listener: Option<TcpListener>) -> Result<Self> {
        let (rank, world, clock) = (options.rank, options.world, options.clock.clone());
        let hub = match listener {
            Some(listener) => {
                let address = listener
                    .local_addr()
                    .map_err(|e| Error::io(rank, "read the listener's address", e))?;
                options.address = reachable(address);
                let (door, secret) = (Door::Tcp(listener), options.secret.clone());
                let gate = Gate::new(rank, door, secret, clock.clone())?;
                Some(Hub::start(
                    gate,
                    world,
                    options.epoch,
                    options.silence,
                    clock.clone(),
                )?)
            }
            None => None,
        };
        let hello = Hello::new(Purpose::Control, rank, world, options.epoch)?;
        let (signal, deadline) = (Signal::new(), clock.now() + options.patience);
        let connection = knock(
            Address::Tcp(options.address),
            None,
            &hello,
            &options.secret,
            &clock,
            deadline,
            &signal,
        )?;
        let line = Line::new(connection.socket)
            .map_err(|e| Error::io(rank, "open the control line", e))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(|e| Error::io(rank, "make an eventfd", e))?);
        let (outbox, inbox) = unbounded();
        let control = Control {
            outbox,
            wake,
            tables: Arc::default(),
            signal,
            ledger: Ledger::new(rank, world),
        };
        let mut client = Client {
            rank,
            line,
            inbox,
            control: control.clone(),
            silence: options.silence,
            hub_left: false,
        };
        let thread = std::thread::Builder::new()
            .name(format!("fabric-control-{rank}"))
            .spawn(move || client.run(&clock))
            .map_err(|e| Error::io(rank, "start the control thread", e))?;
        let member = Self {
            options: options.clone(),
            control,
            client: Some(thread),
            hub,
        };
        member.swap("fabric/here", &[])?; // everybody has arrived
        Ok(member)
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.options.rank
    }

    /// How many ranks there are.
    pub fn world(&self) -> usize {
        self.options.world
    }

    /// Whether the job has a secret, from which keys can be made.
    pub fn has_secret(&self) -> bool {
        self.options.secret.is_given()
    }

    /// The handle for other threads.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Offer `bytes` under `topic` and get what every rank offered, by rank. All ranks must swap the same topics; a
    /// topic may be used again once it has been answered.
    ///
    /// # Errors
    /// When somebody has failed, or not everybody has offered in time.
    pub fn swap(&self, topic: &str, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let table = self.control.table(topic);
        self.control.post(Message::Offer {
            topic: topic.into(),
            bytes: bytes.into(),
        });
        let clock = &self.options.clock;
        let deadline = clock.now() + self.options.patience;
        loop {
            match table.recv_timeout(Duration::from_millis(20)) {
                Ok(rows) => {
                    self.control.forget(topic);
                    return Ok(rows);
                }
                Err(RecvTimeoutError::Timeout) if clock.now() < deadline => {
                    self.control.signal.check()?
                }
                Err(_) => {
                    return Err(Error::rendezvous(
                        self.rank(),
                        format!(
                            "not all {} ranks arrived at '{topic}' in time",
                            self.world()
                        ),
                        "Look for ranks that were not started or have failed; all ranks must run the same program",
                    ));
                }
            }
        }
    }

    fn leave(&mut self) {
        self.control.post(Message::Bye {
            rank: self.options.rank as u32,
        });
        if let Some(client) = self.client.take() {
            let _ = client.join();
        }
        self.hub = None;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.control.abort(self.options.rank, "it panicked");
        }
        self.leave();
    }
}

impl Control {
    /// Raised when the job has failed.
    pub fn signal(&self) -> &Signal {
        &self.signal
    }

    /// What this rank knows of everybody's progress.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// End the job on all ranks: `reason` is what they will say.
    pub fn abort(&self, rank: usize, reason: impl Into<String>) {
        let reason = reason.into();
        self.signal.raise(Error::Aborted {
            rank,
            reason: reason.clone(),
        });
        self.post(Message::Abort {
            rank: rank as u32,
            reason,
        });
    }

    /// Tell the hub that the connection to `peer` broke.
    pub fn report_lost(&self, peer: usize, how: impl Into<String>) {
        self.post(Message::Lost {
            peer: peer as u32,
            how: how.into(),
        });
    }

    fn post(&self, message: Message) {
        let _ = self.outbox.send(message); // fails only when the client thread has ended, which then raised the signal
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    fn table(&self, topic: &str) -> Receiver<Vec<Vec<u8>>> {
        self.tables()
            .entry(topic.into())
            .or_insert_with(|| bounded(1))
            .1
            .clone()
    }

    fn forget(&self, topic: &str) {
        self.tables().remove(topic);
    }

    fn tables(&self) -> std::sync::MutexGuard<'_, HashMap<String, Table>> {
        self.tables.lock().unwrap_or_else(|held| held.into_inner())
    }
}

/// The thread on a rank's end of the control line.
struct Client {
    rank: usize,
    line: Line,
    inbox: Receiver<Message>,
    control: Control,
    silence: Duration,
    hub_left: bool,
}

impl Client {
    fn run(&mut self, clock: &Clock) {
        let beat = self.silence / 10;
        let (mut next_beat, mut heard) = (clock.now() + beat, clock.now());
        loop {
            self.wait(next_beat.saturating_sub(clock.now()));
            if clock.now() >= next_beat {
                next_beat = clock.now() + beat;
                let _ = self.line.send(&Message::Beat);
            }
            let mut leaving = false;
            while let Ok(message) = self.inbox.try_recv() {
                leaving |= matches!(message, Message::Bye { .. });
                let _ = self.line.send(&message);
            }
            if leaving {
                self.part(clock.now() + Duration::from_secs(1), clock);
                return;
            }
            let mut ended = self.line.receive();
            loop {
                match self.line.next_message() {
                    Ok(Some(message)) => {
                        heard = clock.now();
                        self.act(message);
                    }
                    Ok(None) => break,
                    Err(error) => {
                        ended = Some(error);
                        break;
                    }
                }
            }
            let quiet = clock.now().saturating_sub(heard);
            if quiet > self.silence && !self.hub_left {
                let how = format!("it has been silent for {} s", quiet.as_secs());
                self.control.signal.raise(self.control.ledger.lost(0, how));
                return;
            }
            if ended.is_some() || self.line.flush().is_err() {
                if !self.hub_left {
                    let error = self.control.ledger.lost(0, "its control connection closed");
                    self.control.signal.raise(error);
                }
                return;
            }
        }
    }

    fn wait(&self, patience: Duration) {
        let _ = rustix::io::read(&*self.control.wake, &mut [0; 8]);
        if !self.inbox.is_empty() {
            return;
        }
        let out = if self.line.is_full() {
            PollFlags::OUT
        } else {
            PollFlags::empty()
        };
        let mut fds = [
            PollFd::from_borrowed_fd(self.control.wake.as_fd(), PollFlags::IN),
            PollFd::new(self.line.stream(), PollFlags::IN | out),
        ];
        let patience = Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: patience.subsec_nanos().into(),
        };
        let _ = poll(&mut fds, Some(&patience)); // a failed poll only means a look too early
    }

    fn act(&mut self, message: Message) {
        match message {
            Message::Table { topic, rows } => {
                self.control.table(&topic);
                if let Some((sender, _)) = self.control.tables().get(&topic) {
                    let _ = sender.try_send(rows);
                }
            }
            Message::Lost { peer, .. } => {
                let sighting = self.control.ledger.sighting(peer as usize);
                let _ = self.line.send(&Message::Seen { peer, sighting });
            }
            Message::Dead {
                peer,
                how,
                last_joined,
                waiting,
            } => {
                let lost = PeerLost {
                    rank: self.rank,
                    peer: peer as usize,
                    how,
                    last_joined,
                    waiting,
                };
                self.control.signal.raise(Error::PeerLost(Arc::new(lost)));
            }
            Message::Abort { rank, reason } => {
                let reason = format!("rank {rank} ended the job: {reason}");
                self.control.signal.raise(Error::Aborted {
                    rank: self.rank,
                    reason,
                });
            }
            Message::Bye { rank: 0 } => self.hub_left = true,
            _ => {}
        }
    }

    /// Write the last words, until `deadline`.
    fn part(&mut self, deadline: Duration, clock: &Clock) {
        while self.line.is_full() && clock.now() < deadline && self.line.flush().is_ok() {
            clock.sleep(Duration::from_millis(1));
        }
        let _ = rustix::net::shutdown(self.line.stream(), rustix::net::Shutdown::Write);
    }
}

fn listen(options: &Options) -> Result<TcpListener> {
    TcpListener::bind(options.address).map_err(|error| {
        Error::rendezvous(
            0,
            format!("cannot listen at {}: {error}", options.address),
            "Choose another port (FABRIC_PORT), or stop the job that uses this one",
        )
    })
}

/// Where a process of this machine reaches a listener that is bound to all addresses.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        match address {
            SocketAddr::V4(_) => address.set_ip(std::net::Ipv4Addr::LOCALHOST.into()),
            SocketAddr::V6(_) => address.set_ip(std::net::Ipv6Addr::LOCALHOST.into()),
        }
    }
    address
}
