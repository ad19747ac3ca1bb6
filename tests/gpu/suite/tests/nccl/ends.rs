//! How communicators end: in order, by an abort, by a dead peer, or before they have begun.

use std::time::Duration;

use cudarc::driver::{CudaContext, sys};
use fabric_engine::{
    Error,
    comm::{
        ReduceOp,
        nccl::{Comm, Config, Id, Library},
    },
    kernels::Dtype,
    signal::Signal,
};
use gpu_suite::{
    fakes,
    stage::{another, finish, with_fakes},
};

use crate::ranks::{LATE, Rank, config, rank, until, world};

fn sum(rank: &Rank, slice: &cudarc::driver::CudaSlice<u8>) -> Result<(), Error> {
    let data = rank.operands(slice, slice, 4, Dtype::F32);
    // SAFETY: the buffers live until the streams have come past them.
    unsafe { rank.comm.all_reduce(data, ReduceOp::Sum, rank.handle()) }
}

fn is_idle(rank: &Rank) -> bool {
    rank.stream.context().bind_to_thread().unwrap();
    // SAFETY: the stream is alive.
    let code = unsafe { sys::cuStreamQuery(rank.stream.cu_stream()) };
    code == sys::CUresult::CUDA_SUCCESS
}

fn ends() -> Vec<String> {
    let word = |line: String| line.split(' ').next().unwrap_or_default().to_string();
    let lines = fakes::nccl_log().into_iter().map(word);
    lines
        .filter(|line| {
            ["Finalize", "Destroy", "Abort"]
                .iter()
                .any(|end| line.ends_with(end))
        })
        .collect()
}

#[test]
fn an_end_in_order_is_finalize_then_destroy_and_waits_for_what_flies() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "2000")], || {
        world(2, |rank| {
            let slice = rank.put(&crate::ranks::bytes_of(&[1.0; 4]));
            for _ in 0..4 {
                sum(&rank, &slice).unwrap();
            }
            let Rank { comm, stream, .. } = rank;
            match comm.rank() {
                0 => comm.finish().unwrap(),
                _ => drop(comm),
            }
            let bytes = stream.clone_dtoh(&slice).unwrap();
            assert_eq!(crate::ranks::floats(&bytes), [16.0; 4]);
        });
        let mut ends = ends();
        ends.sort();
        assert_eq!(
            ends,
            [
                "ncclCommDestroy",
                "ncclCommDestroy",
                "ncclCommFinalize",
                "ncclCommFinalize"
            ]
        );
    });
}

#[test]
fn another_thread_aborts_a_collective_that_hangs() {
    with_fakes(&[("FAKE_NCCL_HANG", "1:2")], || {
        let met = std::sync::Barrier::new(2);
        world(2, |rank| {
            let slice = rank.put(&[0; 16]);
            sum(&rank, &slice).unwrap();
            rank.stream.synchronize().unwrap();
            sum(&rank, &slice).unwrap(); // rank 1's never starts, and rank 0's waits for it
            met.wait();
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| rank.stream.synchronize());
                assert!(!is_idle(&rank));
                rank.comm.abort("the watch has seen enough").unwrap();
                waiter.join().unwrap().unwrap();
            });
            for error in [
                sum(&rank, &slice).unwrap_err(),
                rank.comm.async_error().unwrap_err(),
            ] {
                assert!(
                    error.to_string().contains("the watch has seen enough"),
                    "{error}"
                );
            }
            rank.comm.abort("twice is no mistake").unwrap();
        });
        assert_eq!(ends(), ["ncclCommAbort"; 2]);
    });
}

#[test]
fn a_rank_that_never_comes_is_an_error_and_no_hang() {
    with_fakes(&[], || {
        let library = Library::load().unwrap();
        let id = Id::create(&library).unwrap();
        let _context = CudaContext::new(0).unwrap();
        let error =
            Comm::init(&library, &id, 2, 0, config(Duration::from_millis(100))).unwrap_err();
        let Error::Timeout {
            rank: 0,
            waiting_for,
            ..
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!(waiting_for, &[1]);
        assert_eq!(ends(), ["ncclCommAbort"]);
    });
}

#[test]
fn the_groups_first_error_ends_the_wait_for_the_others() {
    with_fakes(&[], || {
        let library = Library::load().unwrap();
        let id = Id::create(&library).unwrap();
        let signal = Signal::new();
        let reason = Error::argument("another rank's mistake", "Correct it there");
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let _context = CudaContext::new(0).unwrap();
                let config = Config {
                    signal: signal.clone(),
                    deadline: Some(LATE),
                    ..Config::default()
                };
                Comm::init(&library, &id, 2, 0, config).unwrap_err()
            });
            until(|| fakes::nccl_log().iter().any(|line| line.contains("Init")));
            signal.raise(reason);
            let error = waiter.join().unwrap();
            assert!(
                error.to_string().contains("another rank's mistake"),
                "{error}"
            );
        });
    });
}

#[test]
fn without_a_device_there_is_no_communicator() {
    with_fakes(&[("FAKE_CUDA_DEVICES", "0")], || {
        let library = Library::load().unwrap();
        let id = Id::create(&library).unwrap();
        let error = Comm::init(&library, &id, 1, 0, config(LATE)).unwrap_err();
        assert!(
            matches!(error, Error::Nccl { code: Some(1), .. }),
            "{error}"
        );
        assert!(
            Comm::init(&library, &id, 1, 1, config(LATE))
                .unwrap_err()
                .to_string()
                .contains("rank 1 in a world of 1")
        );
    });
}

/// Goal: a peer whose process is killed while this rank waits for it. Method: a second process is rank 1; it takes part
/// once, and is killed.
#[test]
fn a_killed_peer_is_a_remote_error_and_the_stream_goes_on_after_the_abort() {
    with_fakes(&[], || {
        let library = Library::load().unwrap();
        if let Ok(text) = std::env::var("PEER_ID") {
            let bytes: Vec<u8> = text.split(',').map(|byte| byte.parse().unwrap()).collect();
            let peer = rank(&library, &Id::from_bytes(bytes.try_into().unwrap()), 2, 1);
            let slice = peer.put(&[0; 16]);
            sum(&peer, &slice).unwrap();
            peer.stream.synchronize().unwrap();
            loop {
                std::thread::park(); // until it is killed
            }
        }
        let id = Id::create(&library).unwrap();
        let text: Vec<_> = id.bytes().iter().map(u8::to_string).collect();
        let test = "ends::a_killed_peer_is_a_remote_error_and_the_stream_goes_on_after_the_abort";
        let mut peer = another(test, &[("PEER_ID", &text.join(","))]);
        let own = rank(&library, &id, 2, 0);
        let slice = own.put(&[0; 16]);
        sum(&own, &slice).unwrap();
        own.stream.synchronize().unwrap();
        sum(&own, &slice).unwrap(); // the peer is not in this one
        peer.kill().unwrap();
        let mut found = None;
        until(|| {
            found = own.comm.async_error().err();
            found.is_some()
        });
        let error = found.unwrap();
        assert!(
            matches!(error, Error::Nccl { code: Some(6), .. }) && error.is_from_peer(),
            "{error}"
        );
        assert!(!is_idle(&own)); // as a kernel that waits for a peer
        assert!(sum(&own, &slice).is_err());
        own.comm.abort("a peer is gone").unwrap();
        own.stream.synchronize().unwrap();
        let (is_right, _) = finish(peer, LATE);
        assert!(!is_right);
    });
}

#[test]
fn a_rank_that_panics_aborts_so_that_the_others_are_told() {
    with_fakes(&[], || {
        let met = std::sync::Barrier::new(2);
        world(2, |rank| {
            let slice = rank.put(&[0; 16]);
            match rank.rank {
                0 => {
                    sum(&rank, &slice).unwrap();
                    met.wait();
                    until(|| rank.comm.async_error().is_err());
                    rank.comm.abort("the other panicked").unwrap();
                    rank.stream.synchronize().unwrap();
                }
                _ => {
                    met.wait();
                    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                        let _own = rank;
                        panic!("on purpose");
                    }));
                    assert!(ended.is_err());
                }
            }
        });
        assert_eq!(ends(), ["ncclCommAbort"; 2]);
    });
}

#[test]
fn an_abort_within_a_group_is_refused_and_one_beside_it_waits_for_its_end() {
    with_fakes(&[], || {
        world(1, |rank| {
            let slice = rank.put(&[0; 16]);
            let (sender, opened) = std::sync::mpsc::channel();
            std::thread::scope(|scope| {
                let aborter = scope.spawn({
                    let comm = &rank.comm;
                    move || {
                        opened.recv().unwrap();
                        comm.abort("from beside").unwrap();
                        comm.async_error().unwrap_err()
                    }
                });
                fabric_engine::comm::nccl::group(rank.comm.library(), || {
                    sum(&rank, &slice)?;
                    sender.send(()).unwrap();
                    let error = rank.comm.abort("from within").unwrap_err();
                    assert!(error.to_string().contains("within a group"), "{error}");
                    sum(&rank, &slice) // the handle is still there
                })
                .ok(); // it may be aborted while it is brought to the device
                assert!(aborter.join().unwrap().to_string().contains("from beside"));
            });
        });
    });
}
