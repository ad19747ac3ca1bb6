//! Who may join, and what a rank learns when ranks disagree or one is gone. Method: real sockets on loopback.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

use fabric_engine::{
    Error,
    buffer::Slab,
    comm::{
        Call, Collectives, Communicator, Data, Label, Op, ReduceOp,
        host::{Host, Options as HostOptions},
    },
    kernels::Dtype,
    rendezvous::{Member, Options, Secret},
};

use crate::ranks::{join, refusal, tcp};

fn secret() -> Secret {
    Secret::from_bytes(b"ours")
}

fn options(rank: usize, world: usize, address: SocketAddr) -> Options {
    Options {
        patience: Duration::from_secs(20),
        ..Options::new(rank, world, address, secret())
    }
}

#[test]
fn strangers_at_the_rendezvous_do_not_disturb_the_job() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    // Before anybody of the job is there: garbage, nothing, half a hello, and a hundred scanners.
    let mut strangers = (0..100)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect::<Vec<_>>();
    strangers[1]
        .write_all(b"GET / HTTP/1.1\r\nHost: job\r\n\r\n")
        .unwrap();
    strangers[2].write_all(&[0xff; 4096]).unwrap();
    strangers[3].write_all(b"fabric01").unwrap();
    let sums = std::thread::scope(|scope| {
        let zero = scope.spawn(|| Member::host(options(0, 2, address), listener).unwrap());
        // The wrong secret: that process learns why, the job goes on.
        let wrong = Options {
            secret: Secret::from_bytes(b"theirs"),
            ..options(1, 2, address)
        };
        assert!(refusal(Member::join(wrong)).contains("does not know this job's secret"));
        let one = scope.spawn(move || Member::join(options(1, 2, address)).unwrap());
        let members = [zero.join().unwrap(), one.join().unwrap()].map(Arc::new);
        // And again while it runs.
        let mut late = TcpStream::connect(address).unwrap();
        late.write_all(&[7; 1000]).unwrap();
        let threads = members.map(|member| {
            scope.spawn(move || {
                let mut comm = Host::tcp(&member, HostOptions::default()).unwrap();
                let mut mine = vec![comm.rank() as f32 + 1.0];
                comm.all_reduce(&mut mine, ReduceOp::Sum).unwrap();
                mine[0]
            })
        });
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(sums, [3.0, 3.0]);
    // Garbage was answered by closing the door, not by a reply.
    let mut reply = Vec::new();
    strangers[99]
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let _ = strangers[99].read_to_end(&mut reply);
    assert!(reply.is_empty());
}

#[test]
fn a_rank_that_is_taken_or_a_world_of_another_size_is_refused_by_name() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| Member::host(options(0, 2, address), listener));
        assert!(
            refusal(Member::join(options(1, 3, address)))
                .contains("a world of 3, rank 0 in a world of 2")
        );
        let one = scope.spawn(move || Member::join(options(1, 2, address)));
        let (zero, one) = (zero.join().unwrap().unwrap(), one.join().unwrap().unwrap());
        assert!(
            refusal(Member::join(options(1, 2, address))).contains("has joined as rank 1 already")
        );
        drop((one, zero));
    });
}

#[test]
fn a_public_address_needs_a_secret() {
    let address = "192.0.2.1:1".parse().unwrap();
    let open = Options {
        secret: Secret::none(),
        ..options(0, 2, address)
    };
    assert!(refusal(Member::join(open)).contains("Set FABRIC_SECRET"));
}

#[test]
fn ranks_that_disagree_learn_what_each_is_doing() {
    let texts = tcp(2, HostOptions::default(), |mut comm| {
        let numel = 10 + comm.rank();
        let call = Call::new(Op::AllReduce(ReduceOp::Sum)).label(Label::Bucket(3));
        let work = comm.submit(call, Data::InPlace(Slab::zeroed(Dtype::F32, numel)));
        refusal(work.and_then(|work| work.wait()))
    });
    let both = texts.join("\n");
    assert!(both.contains("have diverged"), "{both}");
    assert!(
        both.contains("gradient bucket 3, sum, 10 x f32") && both.contains("sum, 11 x f32"),
        "{both}"
    );
}

#[test]
fn a_rank_that_never_comes_is_named_by_the_time_out() {
    let options = HostOptions {
        deadline: Duration::from_millis(300),
        ..HostOptions::default()
    };
    let texts = tcp(2, options, |mut comm| {
        if comm.rank() == 1 {
            let _ = comm.aborter().signal().wait(Duration::from_secs(10));
            return String::new();
        }
        refusal(comm.barrier())
    });
    assert!(texts[0].contains("waiting for rank 1"), "{}", texts[0]);
}

#[test]
fn abort_wakes_a_rank_that_waits_and_its_reason_reaches_everybody() {
    let texts = tcp(3, HostOptions::default(), |mut comm| {
        let _ = comm.barrier(); // all are connected; for some it may end with the abort already
        if comm.rank() == 2 {
            comm.aborter().abort("the disk is full");
        }
        let first = refusal(comm.barrier());
        assert_eq!(first, refusal(comm.barrier()), "the first error stays");
        first
    });
    for text in texts {
        assert!(text.contains("the disk is full"), "{text}");
    }
}

#[test]
fn a_rank_that_is_gone_is_described_by_its_last_operation_and_what_waits() {
    let texts = join(3, |member| {
        let mut comm = Host::tcp(&member, HostOptions::default()).unwrap();
        comm.barrier().unwrap();
        let mut mine = vec![1f32; 8];
        comm.all_reduce(&mut mine, ReduceOp::Sum).unwrap();
        if comm.rank() == 1 {
            // A process that dies says no goodbye: its error ends the job for the others.
            std::thread::scope(|scope| {
                let dying = scope.spawn(move || {
                    let _held = (comm, member);
                    panic!("a rank dies (this panic is part of the test)");
                });
                assert!(dying.join().is_err());
            });
            return String::new();
        }
        refusal(comm.all_reduce(&mut mine, ReduceOp::Sum))
    });
    for text in [&texts[0], &texts[2]] {
        assert!(text.contains("rank 1"), "{text}");
    }
}

#[test]
fn an_error_is_an_error_of_the_engine() {
    let error = Member::join(Options::new(3, 2, "127.0.0.1:1".parse().unwrap(), secret()))
        .err()
        .unwrap();
    assert!(matches!(error, Error::Argument { .. }));
}
