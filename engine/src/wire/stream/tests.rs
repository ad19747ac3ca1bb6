//! Somebody between two ranks who changes what they send is found out, and a stranger to the keys gets nowhere. Method: one
//! message through a pair of sockets whose middle holds the records in its hand.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use fabric_kernels::Dtype;

use super::*;
use crate::{
    buffer::Piece,
    clock::Clock,
    signal::Signal,
    wire::{
        Parcel,
        frame::{HEADER_BYTES, Label, OpCode, ReduceCode},
        ledger::Ledger,
    },
};

const NUMEL: usize = 50_000; // a header, three records and a bit
const RECORDS: usize = 5;

fn stamp() -> Stamp {
    Stamp {
        sequence: 4,
        op: OpCode::Broadcast,
        reduce: ReduceCode::None,
        dtype: Dtype::F32,
        root: 1,
        numel: NUMEL as u64,
        label: Label::User,
        cut: 0,
    }
}

/// Rank `rank` of two, and what is at the other end of its only connection.
fn end(rank: usize, security: Security) -> (Streams, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    let (down, up) = ([1; 32], [2; 32]);
    let keys = Keys {
        send: [down, up][rank],
        recv: [up, down][rank],
    };
    let mut peers = vec![None, None];
    peers[1 - rank] = Some(Connection {
        socket: Socket::Unix(near),
        keys,
    });
    let vigil = Vigil {
        clock: Clock::machine(),
        signal: Signal::new(),
        ledger: Ledger::new(rank, 2),
    };
    (
        Streams::new(rank, peers, security, false, vigil).unwrap(),
        far,
    )
}

fn exchange(wire: &mut Streams, traffic: &Traffic, memory: &mut [Slab]) -> Result<()> {
    let deadline = wire.vigil.clock.now() + Duration::from_secs(20);
    wire.exchange(&stamp(), 0, traffic, memory, Some(deadline))
}

fn whole(peer: usize) -> Vec<Parcel> {
    let pieces = vec![Piece {
        slab: 0,
        range: 0..NUMEL,
    }];
    vec![Parcel { peer, pieces }]
}

fn values() -> Slab {
    let mut slab = Slab::zeroed(Dtype::F32, NUMEL);
    let values = slab.as_mut_slice::<f32>().iter_mut().enumerate();
    values.for_each(|(index, value)| *value = index as f32);
    slab
}

/// Rank 1 sends to rank 0; `meddle` has the records in its hand.
fn meddled(security: Security, meddle: impl FnOnce(&mut Vec<Vec<u8>>)) -> Result<Slab> {
    let (mut sender, mut from) = end(1, security);
    let (mut receiver, mut to) = end(0, security);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let sends = whole(0);
            let traffic = Traffic {
                sends,
                recvs: Vec::new(),
            };
            exchange(&mut sender, &traffic, &mut [values()]).unwrap();
        });
        let receiving = scope.spawn(move || {
            let recvs = whole(1);
            let traffic = Traffic {
                sends: Vec::new(),
                recvs,
            };
            let mut memory = [Slab::zeroed(Dtype::F32, NUMEL)];
            exchange(&mut receiver, &traffic, &mut memory).map(|()| {
                let [slab] = memory;
                slab
            })
        });
        let mut records = (0..RECORDS).map(|_| record(&mut from)).collect::<Vec<_>>();
        meddle(&mut records);
        for record in records {
            let _ = to.write_all(&record); // it may have hung up
        }
        drop(to);
        receiving.join().unwrap()
    })
}

fn record(from: &mut UnixStream) -> Vec<u8> {
    let mut record = vec![0; 4];
    from.read_exact(&mut record).unwrap();
    let length = u32::from_le_bytes(record[..].try_into().unwrap()) as usize;
    record.resize(4 + length + 16, 0);
    from.read_exact(&mut record[4..]).unwrap();
    record
}

const SEALED: [Security; 2] = [Security::Authenticated, Security::Encrypted];

#[test]
fn what_nobody_touches_arrives() {
    for security in SEALED {
        let slab = meddled(security, |records| {
            assert_eq!(records[0].len(), 4 + HEADER_BYTES + 16);
        });
        assert_eq!(slab.unwrap().as_slice::<f32>(), values().as_slice::<f32>());
    }
}

#[test]
fn a_flipped_bit_a_repeated_a_swapped_and_a_missing_record_are_found_out() {
    type Meddle = fn(&mut Vec<Vec<u8>>);
    let attacks: [(&str, Meddle); 6] = [
        ("a bit of the payload", |records| records[2][100] ^= 1),
        ("a bit of the header", |records| records[0][20] ^= 0x80),
        ("a bit of a length", |records| records[3][0] ^= 4),
        ("repeated", |records| records.insert(2, records[1].clone())),
        ("swapped", |records| records.swap(1, 2)),
        ("missing", |records| drop(records.remove(2))),
    ];
    for security in SEALED {
        for (what, attack) in attacks {
            let error = meddled(security, attack).err();
            let error = error.unwrap_or_else(|| panic!("{security:?}: {what} was not seen"));
            assert!(matches!(
                error,
                Error::Tampered {
                    rank: 0,
                    peer: 1,
                    ..
                }
            ));
            let text = error.to_string();
            assert!(
                text.contains("#4 broadcast") && text.contains("from rank 1 fails authentication"),
                "{what}: {text}"
            );
        }
    }
}

#[test]
fn a_connection_cut_short_is_the_end_of_the_peer() {
    for security in SEALED {
        for kept in [0, 1, 4] {
            let error = meddled(security, |records| {
                records.truncate(kept + 1);
                records[kept].truncate(10);
            });
            let text = error.err().unwrap().to_string();
            assert!(text.contains("its connection closed"), "{text}");
        }
    }
}

#[test]
fn a_length_that_no_record_has_is_found_out_before_anything_is_kept_for_it() {
    let error = meddled(Security::Encrypted, |records| records[0][3] = 0xff);
    let text = error.err().unwrap().to_string();
    assert!(text.contains("it announces 42"), "{text}");
}
