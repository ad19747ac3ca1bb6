//! The control plane's centre, a thread in rank 0's process: lets ranks in, swaps what they offer, notices who is gone,
//! asks the survivors what they saw, and tells everybody one story.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags};

use super::{
    gate::{Gate, Guest},
    handshake::{Purpose, Verdict},
    line::{Line, Message},
};
use crate::{
    clock::Clock,
    error::{Error, Result, ranks},
    wire::{Waiting, ledger::Sighting},
};

const NAP: Duration = Duration::from_millis(100);
const INQUEST: Duration = Duration::from_millis(300); // how long all have to say what they saw, or why they ended
const FLUSH: Duration = Duration::from_secs(1); // how long the last words may take

/// The running thread; dropping it stops the hub after its last words are out.
pub(super) struct Hub {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Hub {
    pub(super) fn start(
        gate: Gate,
        world: usize,
        epoch: u64,
        silence: Duration,
        clock: Clock,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let seats = (0..world).map(|_| Seat::Empty).collect();
        let mut room = Room {
            gate,
            epoch,
            seats,
            offers: HashMap::new(),
            inquest: None,
            over: false,
            silence,
            clock,
            waiting: Waiting::new(world + 1),
        };
        let thread = std::thread::Builder::new()
            .name("fabric-hub".into())
            .spawn(move || room.run(&seen))
            .map_err(|e| Error::io(0, "start the hub's thread", e))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Seat {
    Empty,
    Here { line: Line, heard: Duration },
    Left,
    Gone,
}

struct Room {
    gate: Gate,
    epoch: u64,
    seats: Vec<Seat>,
    offers: HashMap<String, BTreeMap<usize, Vec<u8>>>,
    inquest: Option<Inquest>,
    over: bool, // a verdict or an abort was announced
    silence: Duration,
    clock: Clock,
    waiting: Waiting,
}

struct Inquest {
    peer: usize,
    how: String,
    since: Duration,
    answers: BTreeMap<usize, Sighting>,
}

impl Room {
    fn run(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            self.turn();
        }
        if self.inquest.is_some() {
            self.conclude();
        }
        if matches!(self.seats[0], Seat::Here { .. }) {
            self.tell_all(&Message::Bye { rank: 0 });
        }
        let deadline = self.clock.now() + FLUSH;
        while self.clock.now() < deadline && self.lines().any(|(_, line)| line.is_full()) {
            for seat in &mut self.seats {
                if let Seat::Here { line, .. } = seat
                    && line.flush().is_err()
                {
                    *seat = Seat::Gone;
                }
            }
            self.clock.sleep(Duration::from_millis(1));
        }
    }

    fn turn(&mut self) {
        self.wait();
        for guest in self.gate.look() {
            self.seat(guest);
        }
        for rank in 0..self.seats.len() {
            self.listen(rank);
        }
        let done = self.inquest.as_ref().is_some_and(|inquest| {
            let living = self
                .lines()
                .filter(|(rank, _)| *rank != inquest.peer)
                .count();
            // Whoever is still there may be about to say itself why it ended.
            let is_there = matches!(self.seats[inquest.peer], Seat::Here { .. });
            (inquest.answers.len() >= living && !is_there)
                || self.clock.now().saturating_sub(inquest.since) > INQUEST
        });
        if done {
            self.conclude();
        }
    }

    fn wait(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        let lines = self.lines().map(|(_, line)| {
            let flags = if line.is_full() {
                PollFlags::IN | PollFlags::OUT
            } else {
                PollFlags::IN
            };
            PollFd::new(line.stream(), flags)
        });
        // A failed poll only means that the next turn looks at everything a little early.
        let _ = waiting.on(self.gate.poll_fds().chain(lines), NAP);
        self.waiting = waiting;
    }

    fn lines(&self) -> impl Iterator<Item = (usize, &Line)> {
        self.seats
            .iter()
            .enumerate()
            .filter_map(|(rank, seat)| match seat {
                Seat::Here { line, .. } => Some((rank, line)),
                _ => None,
            })
    }

    fn seat(&mut self, guest: Guest) {
        if guest.hello.purpose == Purpose::Control && guest.hello.topic != self.epoch {
            return; // early for the next job: it knocks again when the door is closed without a word
        }
        let rank = guest.hello.rank as usize;
        let world = self.seats.len();
        let verdict = if guest.hello.purpose != Purpose::Control {
            Verdict::NotExpected
        } else if guest.hello.world as usize != world {
            Verdict::OtherWorld(world as u32)
        } else if rank >= world {
            Verdict::NotExpected
        } else if !matches!(self.seats[rank], Seat::Empty) {
            Verdict::RankTaken
        } else {
            Verdict::Welcome
        };
        let line = guest
            .answer(verdict)
            .and_then(|connection| Line::new(connection.socket));
        match (verdict, line) {
            (Verdict::Welcome, Ok(line)) => {
                self.seats[rank] = Seat::Here {
                    line,
                    heard: self.clock.now(),
                }
            }
            (Verdict::Welcome, Err(error)) => {
                tracing::warn!(rank, %error, "a rank vanished while it joined")
            }
            (verdict, _) => tracing::warn!(
                rank,
                ?verdict,
                "a process that knows the secret was turned away"
            ),
        }
    }

    fn listen(&mut self, rank: usize) {
        let now = self.clock.now();
        let Seat::Here { line, heard } = &mut self.seats[rank] else {
            return;
        };
        let mut ended = line.receive();
        if ended.is_none() {
            ended = line.flush().err();
        }
        let mut last_heard = *heard;
        // What is said may change any seat.
        while let Seat::Here { line, heard } = &mut self.seats[rank] {
            match line.next_message() {
                Ok(Some(message)) => {
                    (*heard, last_heard) = (now, now);
                    self.act(rank, message);
                }
                Ok(None) => break,
                Err(error) => {
                    ended = Some(error);
                    break;
                }
            }
        }
        if matches!(self.seats[rank], Seat::Left) {
            return;
        }
        let quiet = now.saturating_sub(last_heard);
        if let Some(error) = ended {
            self.seats[rank] = Seat::Gone;
            let how = match error.kind() {
                std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => {
                    "its process ended".into()
                }
                _ => format!("its control connection broke: {error}"),
            };
            self.open_inquest(rank, how);
        } else if quiet > self.silence {
            self.open_inquest(
                rank,
                format!("it has been silent for {} s", quiet.as_secs()),
            );
        }
    }

    fn act(&mut self, rank: usize, message: Message) {
        match message {
            Message::Offer { topic, bytes } => self.collect(rank, topic, bytes),
            Message::Lost { peer, how } => self.open_inquest(peer as usize, how),
            Message::Seen { peer, sighting } => match &mut self.inquest {
                Some(inquest) if inquest.peer == peer as usize => {
                    inquest.answers.insert(rank, sighting);
                }
                _ => {}
            },
            Message::Abort { reason, .. } if !self.over => {
                self.over = true;
                self.inquest = None;
                self.tell_all(&Message::Abort {
                    rank: rank as u32,
                    reason,
                });
            }
            Message::Bye { .. } => {
                self.tell_all(&Message::Bye { rank: rank as u32 });
                self.seats[rank] = Seat::Left;
            }
            Message::Beat => {
                // Being heard counted it; the answer tells the rank that the hub lives.
                if let Seat::Here { line, .. } = &mut self.seats[rank] {
                    let _ = line.send(&Message::Beat); // a broken line is noticed when it is next listened to
                }
            }
            // The rest is what only a hub says.
            _ => {}
        }
    }

    fn collect(&mut self, rank: usize, topic: String, bytes: Vec<u8>) {
        let offers = self.offers.entry(topic.clone()).or_default();
        offers.insert(rank, bytes);
        if offers.len() == self.seats.len() {
            let rows = self
                .offers
                .remove(&topic)
                .into_iter()
                .flatten()
                .map(|(_, bytes)| bytes)
                .collect();
            self.tell_all(&Message::Table { topic, rows });
        }
    }

    fn open_inquest(&mut self, peer: usize, how: String) {
        if self.over || self.inquest.is_some() || peer >= self.seats.len() {
            return;
        }
        self.inquest = Some(Inquest {
            peer,
            how: how.clone(),
            since: self.clock.now(),
            answers: BTreeMap::new(),
        });
        self.tell_all(&Message::Lost {
            peer: peer as u32,
            how,
        });
    }

    fn conclude(&mut self) {
        let Some(inquest) = self.inquest.take() else {
            return;
        };
        self.over = true;
        let joined = inquest
            .answers
            .values()
            .filter_map(|sighting| sighting.joined.clone());
        let last_joined = joined
            .max_by_key(|(sequence, _)| *sequence)
            .map(|(_, text)| text);
        let waiting = inquest
            .answers
            .values()
            .filter_map(|sighting| sighting.waiting.clone());
        let waiting = waiting
            .min_by_key(|(sequence, _)| *sequence)
            .map(|(sequence, text)| {
                let who = inquest.answers.iter().filter(|(_, sighting)| {
                    sighting
                        .waiting
                        .as_ref()
                        .is_some_and(|(waiting, _)| *waiting == sequence)
                });
                format!(
                    "{text} on {}",
                    ranks(&who.map(|(rank, _)| *rank).collect::<Vec<_>>())
                )
            });
        let peer = inquest.peer as u32;
        self.tell_all(&Message::Dead {
            peer,
            how: inquest.how,
            last_joined,
            waiting,
        });
    }

    fn tell_all(&mut self, message: &Message) {
        for seat in &mut self.seats {
            if let Seat::Here { line, .. } = seat {
                // A line that breaks here is noticed when it is next listened to.
                let _ = line.send(message);
            }
        }
    }
}
