//! The door of a rank: accepts connections, lets in those that prove to belong to the job, and drops strangers without
//! ever waiting for one of them.

use std::{
    io::{self, Read, Write},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    door::{Address, Door},
    handshake::{
        CHALLENGE_BYTES, Exchange, HELLO_BYTES, Hello, PROOF_BYTES, Secret, VERDICT_BYTES, Verdict,
    },
};
use crate::{
    clock::Clock,
    error::{Error, Result},
    signal::Signal,
    wire::stream::{Connection, Socket},
};

const STRANGERS: usize = 64; // connections that may be in the handshake at once
const PATIENCE: Duration = Duration::from_secs(5); // how long a handshake may take
const RETRY: Duration = Duration::from_millis(20);
const ATTEMPT: Duration = Duration::from_secs(10); // how long one attempt to knock may take

/// A listening socket and the connections that have not proved themselves yet.
pub(super) struct Gate {
    rank: usize,
    door: Door,
    secret: Secret,
    clock: Clock,
    strangers: Vec<Stranger>,
    turned_away: u64,
}

/// A connection that has proved to belong to the job, and waits for the verdict.
pub(super) struct Guest {
    pub(super) hello: Hello,
    stream: Socket,
    exchange: Exchange,
}

impl Guest {
    /// Tell the guest, and hand over its connection (blocking again) when it is welcome.
    pub(super) fn answer(mut self, verdict: Verdict) -> io::Result<Connection> {
        self.stream.set_nonblocking(false)?;
        self.stream.set_nodelay()?;
        self.stream.write_all(&self.exchange.verdict(verdict))?;
        Ok(Connection {
            socket: self.stream,
            keys: self.exchange.keys().reversed(),
        })
    }
}

struct Stranger {
    stream: Socket,
    since: Duration,
    state: State,
}

enum State {
    Hello {
        bytes: [u8; HELLO_BYTES],
        read: usize,
    },
    Proof {
        hello: Hello,
        exchange: Exchange,
        bytes: [u8; PROOF_BYTES],
        read: usize,
    },
}

impl Gate {
    pub(super) fn new(rank: usize, door: Door, secret: Secret, clock: Clock) -> Result<Self> {
        door.set_nonblocking()
            .map_err(|e| Error::io(rank, "make the listener non-blocking", e))?;
        Ok(Self {
            rank,
            door,
            secret,
            clock,
            strangers: Vec::new(),
            turned_away: 0,
        })
    }

    /// Connections dropped so far because they did not prove to belong to the job.
    pub(super) fn turned_away(&self) -> u64 {
        self.turned_away
    }

    /// What to poll, besides what the caller polls.
    pub(super) fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        std::iter::once(PollFd::new(&self.door, PollFlags::IN)).chain(
            self.strangers
                .iter()
                .map(|stranger| PollFd::new(&stranger.stream, PollFlags::IN)),
        )
    }

    /// Wait up to `nap` for somebody, and return those who have proved themselves.
    pub(super) fn wait(&mut self, nap: Duration) -> Result<Vec<Guest>> {
        let timeout = Timespec {
            tv_sec: nap.as_secs() as i64,
            tv_nsec: i64::from(nap.subsec_nanos()),
        };
        let mut fds = self.poll_fds().collect::<Vec<_>>();
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(self.look()),
            Err(error) => Err(Error::io(self.rank, "wait for connections", error)),
        }
    }

    /// Move every handshake on as far as it goes without waiting.
    pub(super) fn look(&mut self) -> Vec<Guest> {
        self.accept();
        let mut guests = Vec::new();
        let now = self.clock.now();
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.advance(&self.secret) {
                Ok(Step::Proved) => guests.extend(stranger.into_guest()),
                Ok(Step::Wait) if now.saturating_sub(stranger.since) < PATIENCE => {
                    self.strangers.push(stranger)
                }
                Ok(Step::Wait) | Err(_) => self.turned_away += 1,
            }
        }
        guests
    }

    fn accept(&mut self) {
        while let Ok(stream) = self.door.accept() {
            let Some(stream) = stream.filter(|stream| stream.set_nonblocking(true).is_ok()) else {
                self.turned_away += 1;
                continue;
            };
            if self.strangers.len() == STRANGERS {
                self.strangers.remove(0); // the oldest had its chance
                self.turned_away += 1;
            }
            let state = State::Hello {
                bytes: [0; HELLO_BYTES],
                read: 0,
            };
            self.strangers.push(Stranger {
                stream,
                since: self.clock.now(),
                state,
            });
        }
    }
}

enum Step {
    Wait,
    Proved,
}

impl Stranger {
    fn advance(&mut self, secret: &Secret) -> Result<Step, ()> {
        loop {
            match &mut self.state {
                State::Hello { bytes, read } => {
                    if !fill(&mut self.stream, bytes, read)? {
                        return Ok(Step::Wait);
                    }
                    let hello = Hello::decode(bytes).ok_or(())?;
                    let exchange = Exchange::new(secret, &hello).map_err(drop)?;
                    // A fresh socket's buffer holds these few bytes; one that does not is not worth waiting for.
                    self.stream.write_all(&exchange.challenge()).map_err(drop)?;
                    self.state = State::Proof {
                        hello,
                        exchange,
                        bytes: [0; PROOF_BYTES],
                        read: 0,
                    };
                }
                State::Proof {
                    exchange,
                    bytes,
                    read,
                    ..
                } => {
                    if !fill(&mut self.stream, bytes, read)? {
                        return Ok(Step::Wait);
                    }
                    return if exchange.is_proof(bytes) {
                        Ok(Step::Proved)
                    } else {
                        Err(())
                    };
                }
            }
        }
    }

    fn into_guest(self) -> Option<Guest> {
        match self.state {
            State::Proof {
                hello, exchange, ..
            } => Some(Guest {
                hello,
                stream: self.stream,
                exchange,
            }),
            State::Hello { .. } => None,
        }
    }
}

/// Read until the buffer is full; false when more has to come.
fn fill(stream: &mut Socket, bytes: &mut [u8], read: &mut usize) -> Result<bool, ()> {
    while *read < bytes.len() {
        match stream.read(&mut bytes[*read..]) {
            Ok(0) => return Err(()),
            Ok(more) => *read += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(()),
        }
    }
    Ok(true)
}

/// Knock at a gate: connect, prove who we are, and check who answers. A connection that is refused or breaks is tried
/// again until `deadline`, because the other side may not listen yet, or may be busy with strangers. `first` is a
/// connection that is there already.
pub(super) fn knock(
    address: Address,
    mut first: Option<Socket>,
    hello: &Hello,
    secret: &Secret,
    clock: &Clock,
    deadline: Duration,
    signal: &Signal,
) -> Result<Connection> {
    loop {
        let left = deadline
            .saturating_sub(clock.now())
            .clamp(Duration::from_millis(1), ATTEMPT);
        match attempt(address, first.take(), hello, secret, left) {
            Ok(connection) => return Ok(connection),
            Err(Refusal::Final(error)) => return Err(error),
            Err(Refusal::Broken(_)) if signal.is_raised() => {
                return signal.check().and(Err(gave_up(hello)));
            }
            Err(Refusal::Broken(_)) if clock.now() < deadline => clock.sleep(RETRY),
            Err(Refusal::Broken(error)) => {
                return Err(Error::rendezvous(
                    hello.rank as usize,
                    format!("cannot reach {address}: {error}"),
                    "Check that rank 0 runs, that all ranks have the same address and port, and that no firewall is \
                     between",
                ));
            }
        }
    }
}

fn gave_up(hello: &Hello) -> Error {
    Error::rendezvous(
        hello.rank as usize,
        "the job ended while ranks were still joining",
        "See the first error",
    )
}

enum Refusal {
    Broken(io::Error),
    Final(Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

fn attempt(
    address: Address,
    first: Option<Socket>,
    hello: &Hello,
    secret: &Secret,
    patience: Duration,
) -> Result<Connection, Refusal> {
    let refuse =
        |what: String, hint| Refusal::Final(Error::rendezvous(hello.rank as usize, what, hint));
    let mut stream = first.map_or_else(|| address.connect(patience), Ok)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(&hello.encode())?;
    let mut challenge = [0; CHALLENGE_BYTES];
    stream.read_exact(&mut challenge)?;
    let Some(exchange) = Exchange::from_challenge(secret, hello, &challenge) else {
        return Err(refuse(
            format!("the process that listens at {address} does not know this job's secret"),
            "Give all ranks the same FABRIC_SECRET; if another job uses this port, choose another one (FABRIC_PORT)",
        ));
    };
    stream.write_all(&exchange.proof())?;
    let mut verdict = [0; VERDICT_BYTES];
    stream.read_exact(&mut verdict)?;
    stream.set_read_timeout(None)?;
    stream.set_nodelay()?;
    match exchange.read_verdict(&verdict) {
        Some(Verdict::Welcome) => Ok(Connection {
            socket: stream,
            keys: exchange.keys(),
        }),
        Some(Verdict::OtherWorld(world)) => Err(refuse(
            format!(
                "this rank was started in a world of {}, rank 0 in a world of {world}",
                hello.world
            ),
            "Start all ranks with the same number of devices and nodes",
        )),
        Some(Verdict::RankTaken) => Err(refuse(
            format!("another process has joined as rank {} already", hello.rank),
            "Give every process its own rank (RANK)",
        )),
        Some(Verdict::NotExpected) => Err(refuse(
            format!("{address} does not expect this connection"),
            "Check that all ranks run the same program and join the same groups in the same order",
        )),
        None => Err(refuse(
            format!("{address} sent a verdict that was changed on the way"),
            "Somebody interferes with the connection: use a network you trust",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            door::listen,
            handshake::{Purpose, random},
        },
        *,
    };

    /// Goal: strangers behind a Unix door are dropped, and the one that is expected comes in with its keys. Method: one
    /// writes garbage, one half a hello, one leaves, one knows another secret; the guest knocks among them.
    #[test]
    fn strangers_at_a_unix_door_are_dropped_and_the_guest_comes_in() {
        let (name, clock) = (random().unwrap(), Clock::machine());
        let (address, secret) = (Address::Unix(name), Secret::from_bytes(b"ours"));
        let door = Door::Unix(listen(&name).unwrap());
        let mut gate = Gate::new(0, door, secret.clone(), clock.clone()).unwrap();
        let stranger = || address.connect(Duration::from_secs(1)).unwrap();
        let (mut loud, mut half) = (stranger(), stranger());
        drop(stranger());
        loud.write_all(&[0x47; 4096]).unwrap();
        half.write_all(b"fabric01").unwrap();
        let deadline = clock.now() + Duration::from_secs(20);
        let knock = |secret: Secret| {
            let hello = Hello::new(Purpose::Data, 1, 2, 3).unwrap();
            let signal = Signal::new();
            knock(address, None, &hello, &secret, &clock, deadline, &signal)
        };
        std::thread::scope(|scope| {
            let wrong = scope.spawn(|| knock(Secret::from_bytes(b"theirs")));
            let right = scope.spawn(|| knock(secret.clone()));
            let guest = loop {
                if let Some(guest) = gate.wait(Duration::from_millis(20)).unwrap().pop() {
                    break guest;
                }
            };
            assert_eq!(guest.hello.rank, 1);
            let server = guest.answer(Verdict::Welcome).unwrap();
            let client = right.join().unwrap().unwrap();
            assert_eq!(client.keys.send, server.keys.recv);
            assert_eq!(client.keys.recv, server.keys.send);
            while !wrong.is_finished() {
                gate.wait(Duration::from_millis(20)).unwrap();
            }
            let refused = wrong.join().unwrap().err().unwrap().to_string();
            assert!(
                refused.contains("does not know this job's secret"),
                "{refused}"
            );
        });
        assert!(gate.turned_away() >= 2);
        assert!(!matches!(loud.read(&mut [0; 64]), Ok(bytes) if bytes > 0));
    }
}
