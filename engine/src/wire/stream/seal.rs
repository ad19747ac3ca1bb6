//! Records: what travels over a connection that others may reach, so that nobody reads it or changes it unseen.
//!
//! ```text
//! | length, 4 bytes | payload, at most RECORD_BYTES, sealed or in clear | tag, 16 bytes |
//! ```
//! AES-256-GCM, with a key for each connection and direction, and a counter as the nonce: a record that was changed,
//! repeated, moved, cut short or left out does not open. Where records are only authenticated, everything is additional
//! data of an empty message. A key's 2^64 records are not used up by any job, and an end that were to would stop. With
//! 64 KiB a record, 2^48 blocks (4 PiB) under one key leave a forger or a reader a chance below 2^-32.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

/// What is done for what travels between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Security {
    /// Nothing: for networks that nobody else reaches.
    Plain,
    /// Nobody changes it unseen; it can be read.
    Authenticated,
    /// Nobody reads it, and nobody changes it unseen.
    Encrypted,
}

impl Security {
    /// All of them, in the order of their codes.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Authenticated, Self::Encrypted];

    /// "plain", ...
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Authenticated => "authenticated",
            Self::Encrypted => "encrypted",
        }
    }

    /// The security of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }
}

/// The keys of one end of a connection; the other end's are the same, exchanged.
#[derive(Clone)]
pub struct Keys {
    /// For what this end sends.
    pub(crate) send: [u8; 32],
    /// For what this end receives.
    pub(crate) recv: [u8; 32],
}

impl Keys {
    /// As the other end uses them.
    pub(crate) fn reversed(self) -> Self {
        Self {
            send: self.recv,
            recv: self.send,
        }
    }
}

/// Payload in one record, at most: with more, records leave the cache before they are sent.
pub(super) const RECORD_BYTES: usize = 64 << 10;
/// What a record is longer than its payload.
pub(super) const FRAME_BYTES: usize = HEAD_BYTES + TAG_BYTES;
const HEAD_BYTES: usize = 4;
const TAG_BYTES: usize = 16;

/// One direction of a connection: its key, and the number of its next record.
pub(super) struct Seal {
    key: LessSafeKey,
    next: Option<u64>,
    is_hidden: bool,
}

/// A record that does not open; nothing of it may be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// The number of the record that was expected.
    pub(super) number: u64,
}

impl Seal {
    /// `None` where nothing is sealed.
    pub(super) fn new(security: Security, key: &[u8; 32]) -> Option<Self> {
        let purpose = match security {
            Security::Plain => return None,
            Security::Authenticated => "fabric 2026 records, authenticated",
            Security::Encrypted => "fabric 2026 records, encrypted",
        };
        let key = UnboundKey::new(&AES_256_GCM, &blake3::derive_key(purpose, key));
        Some(Self {
            key: LessSafeKey::new(key.expect("the algorithm's keys have 32 bytes")),
            next: Some(0),
            is_hidden: security == Security::Encrypted,
        })
    }

    /// Append one record to `out`, whose payload is what `write` appends.
    pub(super) fn seal(&mut self, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
        let start = out.len();
        out.extend([0; HEAD_BYTES]);
        write(out);
        let length = out.len() - start - HEAD_BYTES;
        assert!(length <= RECORD_BYTES, "a record of {length} bytes");
        out[start..start + HEAD_BYTES].copy_from_slice(&(length as u32).to_le_bytes());
        let nonce = self.nonce().expect("no job sends 2^64 records").1;
        let (head, payload) = out[start..].split_at_mut(HEAD_BYTES);
        let sealed = if self.is_hidden {
            self.key
                .seal_in_place_separate_tag(nonce, Aad::from(&*head), payload)
        } else {
            let clear = Aad::from(&out[start..]);
            self.key.seal_in_place_separate_tag(nonce, clear, &mut [])
        };
        let tag = sealed.expect("a record is shorter than the cipher's longest message");
        out.extend(tag.as_ref());
    }

    /// The payload's length of the record that begins `bytes`, when it is all there.
    pub(super) fn complete(bytes: &[u8]) -> Result<Option<usize>, u32> {
        let Some(head) = bytes.first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*head);
        if length as usize > RECORD_BYTES {
            return Err(length);
        }
        let whole = bytes.len() >= length as usize + FRAME_BYTES;
        Ok(whole.then_some(length as usize))
    }

    /// Open the whole `record` where it lies.
    pub(super) fn open_in_place<'a>(&mut self, record: &'a mut [u8]) -> Result<&'a [u8], Refused> {
        let end = record.len() - TAG_BYTES;
        if !self.is_hidden {
            self.open(record, &mut [])?;
            return Ok(&record[HEAD_BYTES..end]);
        }
        let (number, nonce) = self.nonce().ok_or(Refused { number: u64::MAX })?;
        let (head, sealed) = record.split_at_mut(HEAD_BYTES);
        let opened = self.key.open_in_place(nonce, Aad::from(&*head), sealed);
        opened
            .map(|payload| &*payload)
            .map_err(|_| Refused { number })
    }

    /// Open the whole `record` into `payload`; one that is only authenticated, into as much as is wanted of it.
    pub(super) fn open(&mut self, record: &[u8], payload: &mut [u8]) -> Result<(), Refused> {
        let (number, nonce) = self.nonce().ok_or(Refused { number: u64::MAX })?;
        let (sealed, tag) = record.split_at(record.len() - TAG_BYTES);
        let opened = if self.is_hidden {
            let (head, sealed) = sealed.split_at(HEAD_BYTES);
            self.key
                .open_separate_gather(nonce, Aad::from(head), sealed, tag, payload)
        } else {
            let clear = Aad::from(sealed);
            let opened = self
                .key
                .open_separate_gather(nonce, clear, &[], tag, &mut []);
            opened.map(|()| payload.copy_from_slice(&sealed[HEAD_BYTES..][..payload.len()]))
        };
        opened.map_err(|_| Refused { number })
    }

    /// The next record's number, and its nonce; none comes twice.
    fn nonce(&mut self) -> Option<(u64, Nonce)> {
        let number = self.next?;
        self.next = number.checked_add(1);
        let mut nonce = [0; NONCE_LEN];
        nonce[NONCE_LEN - 8..].copy_from_slice(&number.to_be_bytes());
        Some((number, Nonce::assume_unique_for_key(nonce)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(security: Security) -> (Seal, Seal) {
        let end = || Seal::new(security, &[7; 32]).unwrap();
        (end(), end())
    }

    fn sealed(seal: &mut Seal, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        seal.seal(&mut out, |out| out.extend(payload));
        out
    }

    const SEALED: [Security; 2] = [Security::Authenticated, Security::Encrypted];

    #[test]
    fn what_was_sealed_opens_and_only_encryption_hides_it() {
        for security in SEALED {
            let (mut from, mut to) = ends(security);
            for length in [0, 1, 48, 1000, RECORD_BYTES] {
                let payload = (0..length).map(|i| i as u8).collect::<Vec<_>>();
                let record = sealed(&mut from, &payload);
                assert_eq!(record.len(), length + FRAME_BYTES);
                assert_eq!(Seal::complete(&record), Ok(Some(length)));
                assert_eq!(Seal::complete(&record[..record.len() - 1]), Ok(None));
                let shows = record[HEAD_BYTES..].starts_with(&payload);
                assert_eq!(
                    shows,
                    security == Security::Authenticated || length == 0 || length == 1 && shows
                );
                let mut opened = vec![0xaa; length];
                to.open(&record, &mut opened).unwrap();
                assert_eq!(opened, payload);
                let mut record = sealed(&mut from, &payload);
                assert_eq!(to.open_in_place(&mut record), Ok(&payload[..]));
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        for security in SEALED {
            let (mut from, _) = ends(security);
            let record = sealed(&mut from, b"gradients");
            for bit in 0..record.len() * 8 {
                let mut changed = record.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                let refused = ends(security).1.open(&changed, &mut [0; 9]);
                assert_eq!(refused, Err(Refused { number: 0 }), "{security:?}, {bit}");
            }
        }
    }

    #[test]
    fn records_that_come_twice_in_another_order_or_not_at_all_are_seen() {
        for security in SEALED {
            let (mut from, mut to) = ends(security);
            let records = [0u8; 3].map(|byte| sealed(&mut from, &[byte]));
            to.open(&records[0], &mut [0]).unwrap();
            assert_eq!(
                to.open(&records[0], &mut [0]),
                Err(Refused { number: 1 }),
                "twice"
            );
            let (_, mut to) = ends(security);
            assert!(to.open(&records[1], &mut [0]).is_err(), "swapped");
            let (_, mut to) = ends(security);
            to.open(&records[0], &mut [0]).unwrap();
            assert!(to.open(&records[2], &mut [0]).is_err(), "left out");
        }
    }

    #[test]
    fn a_record_opens_in_its_own_direction_connection_and_mode_alone() {
        let keys = Keys {
            send: [1; 32],
            recv: [2; 32],
        };
        let record = sealed(
            &mut Seal::new(Security::Encrypted, &keys.send).unwrap(),
            &[0],
        );
        let other = Keys {
            send: [3; 32],
            ..keys.clone()
        };
        for (security, key, opens) in [
            (Security::Encrypted, keys.send, true),
            (Security::Encrypted, keys.recv, false),
            (Security::Encrypted, other.send, false),
            (Security::Authenticated, keys.send, false),
        ] {
            let mut to = Seal::new(security, &key).unwrap();
            assert_eq!(to.open(&record, &mut [0]).is_ok(), opens);
        }
    }

    #[test]
    fn no_nonce_comes_twice() {
        let (mut seal, _) = ends(Security::Encrypted);
        let mut seen = std::collections::HashSet::new();
        for number in [0, 1, 2, 255, 256, 1 << 32, u64::MAX - 1, u64::MAX] {
            seal.next = Some(number);
            let (taken, nonce) = seal.nonce().unwrap();
            assert_eq!(taken, number);
            assert!(seen.insert(*nonce.as_ref()));
            assert_eq!(seal.next, number.checked_add(1));
        }
        assert!(seal.nonce().is_none(), "the counter does not begin again");
    }

    #[test]
    fn a_length_beyond_a_record_is_no_length() {
        let head = (RECORD_BYTES as u32 + 1).to_le_bytes();
        assert_eq!(Seal::complete(&head), Err(RECORD_BYTES as u32 + 1));
    }
}
