//! A simulated network in one process: seeded, with virtual time. Ranks are threads, but only one runs at a time: it
//! holds the baton until it waits for a message. When all wait, time moves to the next arrival. The same seed gives the
//! same order of events, the same times and the same failures.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use super::{
    Sent, Traffic, Vigil, Wire,
    frame::{Header, Stamp},
    ledger::Ledger,
};
use crate::{
    buffer::Slab,
    clock::Clock,
    error::{Error, Result},
    signal::Signal,
};

/// The network to simulate, and what goes wrong on it.
#[derive(Clone, Debug)]
pub struct Net {
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// Time of a message without payload.
    pub latency: Duration,
    /// Bytes a second.
    pub bandwidth: f64,
    /// Up to this much is added to each message's time.
    pub jitter: Duration,
    /// Ranks that die, and when.
    pub kills: Vec<(usize, Duration)>,
}

impl Net {
    /// 10 us, 1 GB/s, jitter of 50 us, nobody dies.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            latency: Duration::from_micros(10),
            bandwidth: 1e9,
            jitter: Duration::from_micros(50),
            kills: Vec::new(),
        }
    }
}

/// One rank's end of a simulated network.
pub struct Sim {
    rank: usize,
    world: Arc<World>,
    vigil: Vigil,
    sent: Sent,
    entered: bool,
}

struct World {
    net: Net,
    clock: Clock,
    state: Mutex<State>,
    baton: Condvar,
}

struct State {
    chance: u64,
    running: Option<usize>,
    ranks: Vec<Rank>,
    mail: Vec<VecDeque<Packet>>, // by from * size + to
}

#[derive(Clone, Debug)]
enum Rank {
    /// Wants the baton.
    Ready,
    /// Waits for so many messages from each, or until a deadline.
    Waiting {
        wants: Vec<usize>,
        deadline: Option<Duration>,
    },
    /// Will not come back.
    Gone,
}

struct Packet {
    arrives: Duration,
    header: Header,
    bytes: Vec<u8>,
}

/// Why a rank got the baton back.
enum Wake {
    Arrived,
    /// The deadline has passed, or nothing will ever arrive.
    Late,
    Lost(usize),
}

impl Sim {
    /// The ends of a network of `size` ranks, to be used on one thread each. Each starts when all have entered.
    pub fn network(size: usize, net: Net) -> Vec<Self> {
        let clock = Clock::manual();
        let state = State {
            chance: net.seed ^ 0x9e37_79b9_7f4a_7c15,
            running: Some(0),
            ranks: vec![Rank::Ready; size],
            mail: (0..size * size).map(|_| VecDeque::new()).collect(),
        };
        let world = World {
            net,
            clock: clock.clone(),
            state: Mutex::new(state),
            baton: Condvar::new(),
        };
        let world = Arc::new(world);
        let end = |rank| Self {
            rank,
            world: world.clone(),
            vigil: Vigil {
                clock: clock.clone(),
                signal: Signal::new(),
                ledger: Ledger::new(rank, size),
            },
            sent: Sent::default(),
            entered: false,
        };
        (0..size).map(end).collect()
    }

    /// What a communicator over this wire watches.
    pub fn vigil(&self) -> Vigil {
        self.vigil.clone()
    }

    /// Take the baton for the first time.
    fn enter(&mut self) {
        if !self.entered {
            self.entered = true;
            drop(self.world.wait_for_baton(self.rank));
        }
    }

    fn is_killed(&self) -> bool {
        let now = self.world.clock.now();
        self.world
            .net
            .kills
            .iter()
            .any(|(rank, at)| *rank == self.rank && *at <= now)
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        self.enter();
        let mut state = self.world.lock();
        state.ranks[self.rank] = Rank::Gone;
        self.world.pass(&mut state);
    }
}

impl Wire for Sim {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.world.lock().ranks.len()
    }

    fn exchange(
        &mut self,
        stamp: &Stamp,
        round: u32,
        traffic: &Traffic,
        memory: &mut [Slab],
        deadline: Option<Duration>,
    ) -> Result<()> {
        self.enter();
        self.vigil.signal.check()?;
        let killed = || Error::Aborted {
            rank: self.rank,
            reason: "the simulation killed this rank".into(),
        };
        if self.is_killed() {
            return Err(killed());
        }
        let world = self.world.clone();
        let mut state = world.lock();
        let size = state.ranks.len();
        for send in &traffic.sends {
            let mut bytes = Vec::with_capacity(send.bytes(memory));
            for piece in &send.pieces {
                bytes.extend_from_slice(memory[piece.slab].bytes_of(&piece.range));
            }
            self.sent.messages += 1;
            self.sent.payload_bytes += bytes.len() as u64;
            let header = Header {
                stamp: *stamp,
                round,
                bytes: bytes.len() as u64,
            };
            let arrives = world.arrival(&mut state, bytes.len());
            let lane = &mut state.mail[self.rank * size + send.peer];
            let arrives = lane
                .back()
                .map_or(arrives, |last| arrives.max(last.arrives)); // order is kept
            lane.push_back(Packet {
                arrives,
                header,
                bytes,
            });
        }
        let mut wants = vec![0; size];
        traffic.recvs.iter().for_each(|recv| wants[recv.peer] += 1);
        state.ranks[self.rank] = Rank::Waiting {
            wants: wants.clone(),
            deadline,
        };
        let since = world.clock.now();
        world.pass(&mut state);
        drop(state);
        let mut state = world.wait_for_baton(self.rank);
        if self.is_killed() {
            return Err(killed());
        }
        match state.wake(self.rank, &wants, world.clock.now()) {
            Wake::Arrived => {}
            Wake::Lost(peer) => return Err(self.vigil.ledger.lost(peer, "its process ended")),
            Wake::Late => {
                let missing =
                    |peer: &usize| state.mail[peer * size + self.rank].len() < wants[*peer];
                return Err(Error::Timeout {
                    rank: self.rank,
                    operation: stamp.to_string(),
                    waiting_for: (0..size).filter(missing).collect(),
                    after: world.clock.now().saturating_sub(since),
                });
            }
        }
        for recv in &traffic.recvs {
            let packet = state.mail[recv.peer * size + self.rank].pop_front();
            let packet = packet.expect("a rank that wakes because messages arrived finds them");
            self.vigil
                .ledger
                .saw(recv.peer, packet.header.stamp.sequence);
            let expected = recv.bytes(memory);
            if (packet.header.stamp, packet.header.round, packet.bytes.len())
                != (*stamp, round, expected)
            {
                let (ours, theirs) = (stamp.to_string(), packet.header.stamp.to_string());
                return Err(Error::Diverged {
                    rank: self.rank,
                    peer: recv.peer,
                    ours,
                    theirs,
                });
            }
            let mut bytes = packet.bytes.as_slice();
            for piece in &recv.pieces {
                let part = memory[piece.slab].bytes_of_mut(&piece.range);
                let (head, tail) = bytes.split_at(part.len());
                part.copy_from_slice(head);
                bytes = tail;
            }
        }
        Ok(())
    }

    fn sent(&self) -> Sent {
        self.sent
    }
}

impl World {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|held| held.into_inner())
    }

    fn wait_for_baton(&self, rank: usize) -> MutexGuard<'_, State> {
        self.baton
            .wait_while(self.lock(), |state| state.running != Some(rank))
            .unwrap_or_else(|held| held.into_inner())
    }

    fn arrival(&self, state: &mut State, bytes: usize) -> Duration {
        let jitter = self
            .net
            .jitter
            .mul_f64(state.chance() as f64 / u64::MAX as f64);
        self.clock.now()
            + self.net.latency
            + jitter
            + Duration::from_secs_f64(bytes as f64 / self.net.bandwidth)
    }

    /// Give the baton to somebody who can go on; when all wait, let time pass first.
    fn pass(&self, state: &mut State) {
        loop {
            let now = self.clock.now();
            let mut able = Vec::new();
            let mut next: Option<Duration> = None;
            for (rank, what) in state.ranks.iter().enumerate() {
                match what {
                    Rank::Ready => able.push(rank),
                    Rank::Gone => {}
                    Rank::Waiting { wants, deadline } => {
                        match state.when(rank, wants, *deadline, now) {
                            Some(time) if time <= now => able.push(rank),
                            Some(time) => next = Some(next.map_or(time, |next| next.min(time))),
                            None => {}
                        }
                    }
                }
            }
            let alive = state
                .ranks
                .iter()
                .filter(|rank| !matches!(rank, Rank::Gone))
                .count();
            state.running = if !able.is_empty() {
                let pick = state.chance() as usize % able.len();
                Some(able[pick])
            } else if let Some(time) = next {
                self.clock.advance_to(time);
                continue;
            } else if alive > 0 {
                // Nothing will ever arrive: wake somebody, who finds that out.
                state
                    .ranks
                    .iter()
                    .position(|rank| !matches!(rank, Rank::Gone))
            } else {
                None
            };
            if let Some(rank) = state.running {
                state.ranks[rank] = match &state.ranks[rank] {
                    Rank::Gone => Rank::Gone,
                    _ => Rank::Ready,
                };
            }
            self.baton.notify_all();
            return;
        }
    }
}

impl State {
    /// A step of splitmix64.
    fn chance(&mut self) -> u64 {
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// When the last of the messages that `rank` wants arrives; `None` while one was not sent.
    fn arrived(&self, rank: usize, wants: &[usize]) -> Option<Duration> {
        let size = self.ranks.len();
        let last = |(from, count): (usize, &usize)| match count.checked_sub(1) {
            None => Some(Duration::ZERO),
            Some(last) => self.mail[from * size + rank]
                .get(last)
                .map(|packet| packet.arrives),
        };
        wants
            .iter()
            .enumerate()
            .map(last)
            .try_fold(Duration::ZERO, |latest, time| Some(latest.max(time?)))
    }

    /// A peer that is gone and has not sent what `rank` wants of it.
    fn lost(&self, rank: usize, wants: &[usize]) -> Option<usize> {
        let size = self.ranks.len();
        let short = |from: &usize| self.mail[from * size + rank].len() < wants[*from];
        (0..size).find(|from| matches!(self.ranks[*from], Rank::Gone) && short(from))
    }

    /// When a waiting rank can go on.
    fn when(
        &self,
        rank: usize,
        wants: &[usize],
        deadline: Option<Duration>,
        now: Duration,
    ) -> Option<Duration> {
        if self.lost(rank, wants).is_some() {
            return Some(now);
        }
        match (self.arrived(rank, wants), deadline) {
            (Some(arrived), Some(deadline)) => Some(arrived.min(deadline)),
            (arrived, deadline) => arrived.or(deadline),
        }
    }

    fn wake(&self, rank: usize, wants: &[usize], now: Duration) -> Wake {
        if self.arrived(rank, wants).is_some_and(|time| time <= now) {
            return Wake::Arrived;
        }
        if let Some(peer) = self.lost(rank, wants) {
            return Wake::Lost(peer);
        }
        Wake::Late
    }
}
