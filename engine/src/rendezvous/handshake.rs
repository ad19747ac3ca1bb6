//! How two processes recognise each other: a mutual challenge and response, keyed with the job's secret, into which the
//! rank, the size of the world and the purpose of the connection are bound.
//!
//! ```text
//! client                                             server
//!   | hello: magic purpose rank world topic nonce_c ->  |
//!   | <- nonce_s, mac(server, hello, nonce_s)           |   the client leaves when this is wrong
//!   | mac(client, hello, nonce_s) ->                    |   the server leaves when this is wrong
//!   | <- verdict, mac(verdict, hello, nonce_s)          |
//! ```
//! The MAC is blake3 in keyed mode; the key is derived from the secret. All messages have a fixed size, so nothing that
//! a stranger sends is ever a length.

use crate::{
    error::{Error, Result},
    wire::stream::Keys,
};

const MAGIC: &[u8; 8] = b"fabric01";
const NONCE: usize = 32;
const MAC: usize = 32;

pub(super) const HELLO_BYTES: usize = 8 + 4 + 4 + 4 + 8 + NONCE;
pub(super) const CHALLENGE_BYTES: usize = NONCE + MAC;
pub(super) const PROOF_BYTES: usize = MAC;
pub(super) const VERDICT_BYTES: usize = 4 + MAC;

/// What proves that a process belongs to the job. Its `Debug` form never shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    key: [u8; 32],
    given: bool,
}

impl Secret {
    /// No secret: only allowed on a loopback address.
    pub fn none() -> Self {
        Self {
            given: false,
            ..Self::from_bytes(b"")
        }
    }

    /// A secret from outside: an environment variable, a file.
    pub fn from_bytes(secret: &[u8]) -> Self {
        Self {
            key: blake3::derive_key("fabric rendezvous 2026 job secret", secret),
            given: true,
        }
    }

    /// 32 random bytes in hexadecimal: a secret for a new job, ready for an environment variable.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random_text() -> Result<String> {
        let bytes = random()?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// A key for one purpose, which tells nothing about the keys for others.
    pub(super) fn key_for(&self, purpose: &'static str) -> [u8; 32] {
        blake3::derive_key(purpose, &self.key)
    }

    /// Whether there is a secret at all.
    pub fn is_given(&self) -> bool {
        self.given
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.given {
            "Secret(hidden)"
        } else {
            "Secret(none)"
        })
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Control,
    Data,
}

/// Who knocks, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) purpose: Purpose,
    pub(super) rank: u32,
    pub(super) world: u32,
    pub(super) topic: u64,
    nonce: [u8; NONCE],
}

impl Hello {
    pub(super) fn new(purpose: Purpose, rank: usize, world: usize, topic: u64) -> Result<Self> {
        Ok(Self {
            purpose,
            rank: rank as u32,
            world: world as u32,
            topic,
            nonce: random()?,
        })
    }

    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        out[0..8].copy_from_slice(MAGIC);
        out[8] = match self.purpose {
            Purpose::Control => 1,
            Purpose::Data => 2,
        };
        out[12..16].copy_from_slice(&self.rank.to_le_bytes());
        out[16..20].copy_from_slice(&self.world.to_le_bytes());
        out[20..28].copy_from_slice(&self.topic.to_le_bytes());
        out[28..].copy_from_slice(&self.nonce);
        out
    }

    pub(super) fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let purpose = match (&bytes[0..8] == MAGIC, bytes[8]) {
            (true, 1) => Purpose::Control,
            (true, 2) => Purpose::Data,
            _ => return None,
        };
        let u32_at =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        Some(Self {
            purpose,
            rank: u32_at(12),
            world: u32_at(16),
            topic: u64::from_le_bytes(bytes[20..28].try_into().expect("eight bytes")),
            nonce: bytes[28..].try_into().expect("a nonce"),
        })
    }
}

/// The server's decision on a client that knows the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Welcome,
    OtherWorld(u32), // the server's size of the world
    RankTaken,
    NotExpected,
}

impl Verdict {
    fn encode(self) -> [u8; 4] {
        let (code, detail) = match self {
            Self::Welcome => (0u32, 0),
            Self::OtherWorld(world) => (1, world),
            Self::RankTaken => (2, 0),
            Self::NotExpected => (3, 0),
        };
        (code | detail << 2).to_le_bytes()
    }

    fn decode(bytes: [u8; 4]) -> Self {
        let word = u32::from_le_bytes(bytes);
        match word & 3 {
            0 => Self::Welcome,
            1 => Self::OtherWorld(word >> 2),
            2 => Self::RankTaken,
            _ => Self::NotExpected,
        }
    }
}

/// The server's side after a hello: its nonce, and the proofs bound to both nonces.
#[derive(Clone)]
pub(super) struct Exchange {
    key: [u8; 32],
    hello: [u8; HELLO_BYTES],
    nonce: [u8; NONCE],
}

impl Exchange {
    pub(super) fn new(secret: &Secret, hello: &Hello) -> Result<Self> {
        Ok(Self {
            key: secret.key,
            hello: hello.encode(),
            nonce: random()?,
        })
    }

    pub(super) fn challenge(&self) -> [u8; CHALLENGE_BYTES] {
        let mut out = [0; CHALLENGE_BYTES];
        out[..NONCE].copy_from_slice(&self.nonce);
        out[NONCE..].copy_from_slice(self.mac(b"server", &[]).as_bytes());
        out
    }

    /// The client's check of the server: `None` when the server does not know the secret.
    pub(super) fn from_challenge(
        secret: &Secret,
        hello: &Hello,
        bytes: &[u8; CHALLENGE_BYTES],
    ) -> Option<Self> {
        let nonce = bytes[..NONCE].try_into().expect("a nonce");
        let exchange = Self {
            key: secret.key,
            hello: hello.encode(),
            nonce,
        };
        // blake3::Hash compares in constant time.
        (exchange.mac(b"server", &[]) == hash(&bytes[NONCE..])).then_some(exchange)
    }

    pub(super) fn proof(&self) -> [u8; PROOF_BYTES] {
        *self.mac(b"client", &[]).as_bytes()
    }

    pub(super) fn is_proof(&self, bytes: &[u8; PROOF_BYTES]) -> bool {
        self.mac(b"client", &[]) == hash(bytes)
    }

    pub(super) fn verdict(&self, verdict: Verdict) -> [u8; VERDICT_BYTES] {
        let mut out = [0; VERDICT_BYTES];
        out[..4].copy_from_slice(&verdict.encode());
        out[4..].copy_from_slice(self.mac(b"verdict", &verdict.encode()).as_bytes());
        out
    }

    pub(super) fn read_verdict(&self, bytes: &[u8; VERDICT_BYTES]) -> Option<Verdict> {
        let word: [u8; 4] = bytes[..4].try_into().expect("four bytes");
        (self.mac(b"verdict", &word) == hash(&bytes[4..])).then(|| Verdict::decode(word))
    }

    /// The connection's own keys, one for each direction, as the client uses them: fresh for every connection, because both
    /// sides' nonces are in them.
    pub(super) fn keys(&self) -> Keys {
        let key = |purpose: &str| {
            let mut hasher = blake3::Hasher::new_derive_key(purpose);
            hasher.update(&self.key).update(&self.hello);
            *hasher.update(&self.nonce).finalize().as_bytes()
        };
        Keys {
            send: key("fabric 2026 records from client to server"),
            recv: key("fabric 2026 records from server to client"),
        }
    }

    fn mac(&self, role: &[u8], more: &[u8]) -> blake3::Hash {
        blake3::Hasher::new_keyed(&self.key)
            .update(&[role.len() as u8])
            .update(role)
            .update(&self.hello)
            .update(&self.nonce)
            .update(more)
            .finalize()
    }
}

fn hash(bytes: &[u8]) -> blake3::Hash {
    blake3::Hash::from_bytes(bytes.try_into().expect("the length of a MAC"))
}

pub(super) fn random() -> Result<[u8; NONCE]> {
    let mut bytes = [0; NONCE];
    getrandom::fill(&mut bytes).map_err(|error| {
        Error::argument(
            format!("the system gives no random bytes: {error}"),
            "Check /dev/urandom in this container",
        )
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(ours: &Secret, theirs: &Secret) -> (Exchange, Option<Exchange>) {
        let hello = Hello::new(Purpose::Control, 1, 2, 7).unwrap();
        let server = Exchange::new(ours, &Hello::decode(&hello.encode()).unwrap()).unwrap();
        let client = Exchange::from_challenge(theirs, &hello, &server.challenge());
        (server, client)
    }

    #[test]
    fn one_secret_lets_both_in() {
        let secret = Secret::from_bytes(b"salt and pepper");
        let (server, client) = pair(&secret, &secret);
        let client = client.unwrap();
        assert!(server.is_proof(&client.proof()));
        for verdict in [
            Verdict::Welcome,
            Verdict::OtherWorld(17),
            Verdict::RankTaken,
            Verdict::NotExpected,
        ] {
            assert_eq!(client.read_verdict(&server.verdict(verdict)), Some(verdict));
        }
    }

    #[test]
    fn both_sides_have_the_connections_keys_and_no_other_has_them() {
        let secret = Secret::from_bytes(b"salt and pepper");
        let (server, client) = pair(&secret, &secret);
        let (server, client) = (server.keys().reversed(), client.unwrap().keys());
        assert!(server.send == client.recv && server.recv == client.send);
        let (other, _) = pair(&secret, &secret);
        let other = other.keys().reversed();
        let keys = [server.send, server.recv, other.send, other.recv, secret.key];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key));
        }
    }

    #[test]
    fn another_secret_is_seen_by_the_client_first() {
        let (_, client) = pair(&Secret::from_bytes(b"one"), &Secret::from_bytes(b"two"));
        assert!(client.is_none());
        let (_, client) = pair(&Secret::from_bytes(b""), &Secret::from_bytes(b"two"));
        assert!(client.is_none());
    }

    #[test]
    fn the_servers_own_proof_is_no_clients_proof() {
        let secret = Secret::from_bytes(b"x");
        let (server, _) = pair(&secret, &secret);
        let reflected: [u8; PROOF_BYTES] = server.challenge()[NONCE..].try_into().unwrap();
        assert!(!server.is_proof(&reflected));
    }

    #[test]
    fn garbage_is_no_hello() {
        assert_eq!(Hello::decode(&[0x47; HELLO_BYTES]), None);
    }

    #[test]
    fn a_secret_hides_itself() {
        assert_eq!(
            format!("{:?}", Secret::from_bytes(b"hunter2")),
            "Secret(hidden)"
        );
    }
}
