//! The wires beside one another: Unix sockets and sealed records give the bits of plain TCP, ranks agree on what they use,
//! and nobody encrypts without a secret. Method: ranks as threads, each with its own place in the job.

use std::os::fd::AsFd;

use super::{
    super::connect::security,
    agree::{Form, calls, once},
    *,
};
use crate::rendezvous::Peers;

fn sealed(security: Security) -> Options {
    Options {
        security: Some(security),
        ..options()
    }
}

fn unix(member: &Arc<Member>, options: Options) -> Host {
    let host = Host::unix(member, options).unwrap();
    host.expect("ranks of one process are on one machine")
}

/// Goal: neither the socket nor what seals it leaves a trace in the bits or in what is counted. Method: four communicators
/// side by side, every collective, over lengths within one record, of several, of several windows, and of nothing.
#[test]
fn every_socket_and_every_security_gives_the_bits_of_plain_tcp() {
    for (size, lengths) in [(2, vec![0, 1, 1000, 600_001]), (3, vec![5, 40_000])] {
        world(size, |member| {
            let mut plain = Host::tcp(member, options()).unwrap();
            let mut others = [
                unix(member, options()),
                Host::tcp(member, sealed(Security::Encrypted)).unwrap(),
                Host::tcp(member, sealed(Security::Authenticated)).unwrap(),
                unix(member, sealed(Security::Encrypted)),
            ];
            for op in calls(Dtype::F32, size) {
                for &numel in &lengths {
                    let call = Call::new(op);
                    let slab = |_: &Host, numel| Slab::zeroed(Dtype::F32, numel);
                    let run = |host: &mut Host| {
                        let before = host.spent();
                        let bytes = once(host, &call, numel, Form::Apart, &slab).unwrap();
                        (bytes, host.spent() - before)
                    };
                    let expected = run(&mut plain);
                    for other in &mut others {
                        assert!(run(other) == expected, "{call:?} of {numel}");
                    }
                }
            }
        });
    }
}

#[test]
fn subgroups_of_unix_sockets_stay_with_them() {
    world(4, |member| {
        let mut host = unix(member, options());
        assert_eq!(host.wire(), "unix");
        let rank = host.rank();
        let mut half = host.subgroup((rank % 2) as u32, 0).unwrap();
        assert_eq!((half.wire(), half.size()), ("unix", 2));
        let mut value = vec![rank as i64; 2];
        half.all_reduce(&mut value, ReduceOp::Sum).unwrap();
        assert_eq!(value, [2 * (rank % 2) as i64 + 2; 2]);
    });
}

/// Goal: where memory cannot be shared the best wire is a Unix socket, and a split in which some groups need one and some
/// do not ends well. Method: a group with an empty wish meets beside one that wants connections.
#[test]
fn groups_that_need_no_socket_meet_beside_those_that_do() {
    world(3, |member| {
        let group: &[usize] = [&[0, 2][..], &[], &[0, 2]][member.rank()];
        let met = member.connect_unix("test", group).unwrap();
        assert!(met.everywhere);
        let found = met.outcome.unwrap().connections.len();
        assert_eq!(found, group.len());
    });
}

#[test]
fn ranks_that_ask_for_different_security_are_told_what_each_asks_for() {
    let errors = world(2, |member| {
        let mine = match member.rank() {
            0 => options(),
            _ => sealed(Security::Authenticated),
        };
        Host::tcp(member, mine).err().unwrap().to_string()
    });
    assert!(
        errors[0].contains(
            "rank 1 asks for security 'authenticated', rank 0 for none (the addresses decide)"
        ),
        "{}",
        errors[0]
    );
    assert!(errors[1].contains("rank 0 asks for security none"));
    assert!(errors[1].contains("FABRIC_SECURITY"));
}

#[test]
fn the_addresses_decide_where_nobody_asks() {
    world(2, |member| {
        let decided = |is_local, options: &Options| {
            let peers = Peers {
                is_local,
                ..Peers::default()
            };
            security(member, options, &peers).unwrap()
        };
        assert_eq!(decided(true, &options()), Security::Plain);
        assert_eq!(decided(false, &options()), Security::Encrypted);
        for asked in Security::ALL {
            assert_eq!(decided(true, &sealed(asked)), asked);
            assert_eq!(decided(false, &sealed(asked)), asked);
        }
    });
}

#[test]
fn nothing_is_sealed_without_a_secret() {
    let errors = world_of(2, &Secret::none(), |member| {
        let open = Peers::default();
        let errors = [
            Host::tcp(member, sealed(Security::Encrypted))
                .err()
                .unwrap(),
            Host::tcp(member, sealed(Security::Authenticated))
                .err()
                .unwrap(),
            security(member, &options(), &open).unwrap_err(),
        ];
        assert!(security(member, &sealed(Security::Plain), &open).is_ok());
        errors.map(|error| error.to_string())
    });
    for error in errors.concat() {
        assert!(error.contains("has no secret"), "{error}");
        assert!(error.contains("Set FABRIC_SECRET"), "{error}");
    }
}

#[test]
fn without_shared_memory_all_ranks_know_why() {
    let files = world(2, |member| {
        let group = [0, 1];
        let fd = std::fs::File::open("/proc/self/exe").unwrap();
        let own = match member.rank() {
            0 => Ok(fd.as_fd()),
            _ => Err("the system refuses".to_string()),
        };
        let passed = member
            .pass("test", &group, own, &mut |_, _| Ok(()))
            .unwrap();
        assert!(!passed.everywhere);
        passed.outcome.unwrap_err()
    });
    for why in files {
        assert!(why.contains("rank 1 has no shared memory"), "{why}");
    }
}
