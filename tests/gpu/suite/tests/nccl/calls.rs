//! Calls and groups of calls: messages, order in streams, and calls that are refused.

use std::sync::Barrier;

use fabric_engine::{
    Error,
    comm::{
        ReduceOp,
        nccl::{Comm, Library, Operands, group},
    },
    kernels::Dtype,
};
use gpu_suite::{fakes, stage::with_fakes};

use crate::ranks::{Rank, address, bytes_of, floats, until, world, world_with};

const NUMEL: usize = 50_000; // more than any buffer on the way holds at once

fn sum(rank: &Rank, data: Operands) -> Result<(), Error> {
    // SAFETY: tests give buffers that live until they have waited for the stream.
    unsafe { rank.comm.all_reduce(data, ReduceOp::Sum, rank.handle()) }
}

fn send(rank: &Rank, data: Operands, to: usize) -> Result<(), Error> {
    // SAFETY: as above.
    unsafe { rank.comm.send(data, to, rank.handle()) }
}

fn recv(rank: &Rank, data: Operands, from: usize) -> Result<(), Error> {
    // SAFETY: as above.
    unsafe { rank.comm.recv(data, from, rank.handle()) }
}

fn code(error: &Error) -> Option<i32> {
    match error {
        Error::Nccl { code, .. } => *code,
        _ => None,
    }
}

#[test]
fn a_ring_of_long_messages_does_not_stand_still_in_a_group() {
    with_fakes(&[("FAKE_CUDA_DEVICES", "3")], || {
        world(3, |rank| {
            let from = rank.put(&bytes_of(&vec![rank.rank as f32; NUMEL]));
            let into = rank.put(&vec![0; 4 * NUMEL]);
            let data = rank.operands(&from, &into, NUMEL, Dtype::F32);
            group(rank.comm.library(), || {
                send(&rank, data, (rank.rank + 1) % 3)?;
                recv(&rank, data, (rank.rank + 2) % 3)
            })
            .unwrap();
            assert_eq!(
                floats(&rank.get(&into)),
                vec![((rank.rank + 2) % 3) as f32; NUMEL]
            );
        });
    });
}

/// Goal: everything in one group: a collective, several messages to one peer, and one to oneself. Method: the bytes of
/// each message say which it is.
#[test]
fn messages_of_a_group_keep_their_order_beside_collectives() {
    with_fakes(&[], || {
        world(2, |rank| {
            let other = 1 - rank.rank;
            let own: Vec<_> = (0..3u8)
                .map(|n| rank.put(&[10 * rank.rank as u8 + n; 8]))
                .collect();
            let into: Vec<_> = (0..3).map(|_| rank.put(&[99; 8])).collect();
            let total = rank.put(&[1; 8]);
            group(rank.comm.library(), || {
                for n in 0..2 {
                    send(&rank, rank.operands(&own[n], &own[n], 8, Dtype::U8), other)?;
                    recv(
                        &rank,
                        rank.operands(&into[n], &into[n], 8, Dtype::U8),
                        other,
                    )?;
                }
                recv(
                    &rank,
                    rank.operands(&into[2], &into[2], 8, Dtype::U8),
                    rank.rank,
                )?;
                sum(&rank, rank.operands(&total, &total, 8, Dtype::U8))?;
                send(
                    &rank,
                    rank.operands(&own[2], &own[2], 8, Dtype::U8),
                    rank.rank,
                )
            })
            .unwrap();
            let seen: Vec<_> = into.iter().map(|slice| rank.get(slice)[0]).collect();
            assert_eq!(
                seen,
                [
                    10 * other as u8,
                    10 * other as u8 + 1,
                    10 * rank.rank as u8 + 2
                ]
            );
            assert_eq!(rank.get(&total), [2; 8]);
        });
    });
}

#[test]
fn nothing_starts_before_the_outermost_group_ends() {
    with_fakes(&[], || {
        world(2, |rank| {
            let slice = rank.put(&bytes_of(&[1.0; 4]));
            let data = rank.operands(&slice, &slice, 4, Dtype::F32);
            group(rank.comm.library(), || {
                group(rank.comm.library(), || sum(&rank, data))?;
                assert_eq!(floats(&rank.get(&slice)), [1.0; 4]);
                Ok(())
            })
            .unwrap();
            assert_eq!(floats(&rank.get(&slice)), [2.0; 4]);
        });
    });
}

#[test]
fn an_error_or_a_panic_in_a_group_ends_the_group() {
    with_fakes(&[], || {
        world(2, |rank| {
            let slice = rank.put(&bytes_of(&[1.0; 4]));
            let data = rank.operands(&slice, &slice, 4, Dtype::F32);
            let error = group(rank.comm.library(), || -> Result<(), Error> {
                sum(&rank, data)?;
                Err(Error::argument("the body's own error", "None"))
            });
            assert!(error.unwrap_err().to_string().contains("the body's own"));
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                group(rank.comm.library(), || -> Result<(), Error> {
                    sum(&rank, data)?;
                    panic!("on purpose")
                })
            }));
            assert!(panicked.is_err());
            assert_eq!(floats(&rank.get(&slice)), [4.0; 4]); // what was called before is started
            sum(&rank, data).unwrap();
            assert_eq!(floats(&rank.get(&slice)), [8.0; 4]);
        });
    });
}

#[test]
fn a_refused_call_makes_its_group_fail_and_starts_nothing() {
    with_fakes(&[], || {
        world(2, |rank| {
            let slice = rank.put(&bytes_of(&[1.0; 4]));
            let data = rank.operands(&slice, &slice, 4, Dtype::F32);
            let short = rank.operands(&slice, &slice, 5, Dtype::F32);
            let error = group(rank.comm.library(), || {
                sum(&rank, data)?;
                sum(&rank, short)
            })
            .unwrap_err();
            assert_eq!(code(&error), Some(4), "{error}");
            assert!(
                error.to_string().contains("16 bytes, and 20 are needed"),
                "{error}"
            );
            assert_eq!(floats(&rank.get(&slice)), [1.0; 4]);
            sum(&rank, data).unwrap();
            assert_eq!(floats(&rank.get(&slice)), [2.0; 4]);
        });
    });
}

#[test]
fn operations_are_done_in_the_order_of_their_stream_and_of_the_calls() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "1000")], || {
        world(2, |rank| {
            let second = rank.stream.fork().unwrap();
            let slice = rank.put(&bytes_of(&[1.0; 4]));
            for _ in 0..5 {
                let data = rank.operands(&slice, &slice, 4, Dtype::F32);
                sum(&rank, data).unwrap();
                // On another stream, without a wait by the caller: NCCL keeps a communicator's order.
                let other =
                    fabric_engine::comm::nccl::StreamHandle::from_raw(second.cu_stream().cast());
                // SAFETY: the buffer lives until both streams are waited for.
                unsafe { rank.comm.all_reduce(data, ReduceOp::Max, other) }.unwrap();
            }
            second.synchronize().unwrap();
            assert_eq!(floats(&rank.get(&slice)), [32.0; 4]);
        });
        let log = fakes::nccl_log();
        let of_rank = |rank: &str| -> Vec<String> {
            let lines = log
                .iter()
                .filter(|line| line.starts_with("ncclAllReduce") && line.contains(rank));
            lines
                .map(|line| line.split("stream=").nth(1).unwrap().to_string())
                .collect()
        };
        let streams = of_rank("rank=0");
        assert_eq!(streams.len(), 10);
        assert!(
            streams.iter().step_by(2).all(|line| *line == streams[0]) && streams[0] != streams[1]
        );
    });
}

#[test]
fn each_rank_multiplies_by_its_own_factor() {
    with_fakes(&[], || {
        world(2, |rank| {
            let factor = [0.5, -3.0][rank.rank];
            let slice = rank.put(&bytes_of(&[2.0; 4]));
            let data = rank.operands(&slice, &slice, 4, Dtype::F32);
            // SAFETY: the buffer lives until the stream is waited for.
            unsafe {
                rank.comm
                    .all_reduce(data, ReduceOp::PreMulSum(factor), rank.handle())
            }
            .unwrap();
            assert_eq!(floats(&rank.get(&slice)), [-5.0; 4]);
            let slice = rank.put(&[5; 4]);
            let data = rank.operands(&slice, &slice, 4, Dtype::I8);
            let factor = [-1.0, 2.0][rank.rank];
            // SAFETY: as above.
            unsafe {
                rank.comm
                    .all_reduce(data, ReduceOp::PreMulSum(factor), rank.handle())
            }
            .unwrap();
            assert_eq!(rank.get(&slice), [5; 4]);
        });
    });
}

#[test]
fn before_ncclalltoall_there_were_sends_and_receives() {
    with_fakes(&[("FAKE_CUDA_DEVICES", "3")], || {
        let path = fakes::nccl_without(&["ncclAlltoAll"]);
        let library = Library::open(&path).unwrap();
        world_with(&library, 3, |rank| {
            let from = rank.put(
                &[0, 1, 2]
                    .map(|to| 10 * rank.rank as u8 + to)
                    .map(|byte| [byte; 4])
                    .concat(),
            );
            let into = rank.put(&[99; 12]);
            let data = rank.operands(&from, &into, 2, Dtype::I16);
            // SAFETY: three blocks of two i16 at both addresses.
            unsafe { rank.comm.all_to_all(data, rank.handle()) }.unwrap();
            let right = [0, 10, 20]
                .map(|from| from + rank.rank as u8)
                .map(|byte| [byte; 4])
                .concat();
            assert_eq!(rank.get(&into), right);
        });
    });
}

#[test]
fn ranks_that_disagree_are_told_and_their_streams_go_on_after_the_abort() {
    with_fakes(&[], || {
        let met = Barrier::new(2);
        let said = world(2, |rank| {
            let slice = rank.put(&[1; 64]);
            let data = rank.operands(&slice, &slice, 4 + rank.rank, Dtype::F32);
            sum(&rank, data).unwrap();
            met.wait();
            let error = failure(&rank.comm);
            assert!(matches!(code(&error), Some(5 | 6)), "{error}");
            rank.comm.abort("they disagree").unwrap();
            rank.stream.synchronize().unwrap();
            error.to_string()
        });
        assert!(
            said.iter().any(|said| said.contains("diverged")),
            "{said:?}"
        );
    });
}

#[test]
fn a_message_of_another_length_than_is_awaited_is_told() {
    with_fakes(&[], || {
        let told = Barrier::new(2);
        let said = world(2, |rank| {
            let slice = rank.put(&[1; 64]);
            let data = rank.operands(&slice, &slice, 4 + rank.rank, Dtype::F32);
            let said = match rank.rank {
                0 => send(&rank, data, 1).map(|()| String::new()).unwrap(),
                _ => recv(&rank, data, 0)
                    .map(|()| failure(&rank.comm).to_string())
                    .unwrap(),
            };
            told.wait();
            rank.comm.abort("they disagree").unwrap();
            rank.stream.synchronize().unwrap();
            said
        });
        for part in [
            "ncclRecv of 5 x f32",
            "ncclSend of 4 x f32",
            "ncclInvalidUsage",
        ] {
            assert!(said[1].contains(part), "{}", said[1]);
        }
    });
}

/// What a communicator says has befallen it.
fn failure(comm: &Comm) -> Error {
    let mut found = None;
    until(|| {
        found = comm.async_error().err();
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn what_nccl_has_not_is_refused_before_any_call() {
    with_fakes(&[], || {
        world(1, |rank| {
            let slice = rank.put(&[1; 64]);
            for (dtype, op) in [
                (Dtype::I16, ReduceOp::Sum),
                (Dtype::I32, ReduceOp::BitXor),
                (Dtype::Bool, ReduceOp::Sum),
                (Dtype::I32, ReduceOp::PreMulSum(0.5)),
            ] {
                let data = rank.operands(&slice, &slice, 4, dtype);
                // SAFETY: nothing is called.
                let error = unsafe { rank.comm.all_reduce(data, op, rank.handle()) };
                assert!(
                    matches!(error, Err(Error::Argument { .. })),
                    "{op:?} of {dtype}"
                );
            }
            let data = rank.operands(&slice, &slice, 4, Dtype::F32);
            assert!(
                send(&rank, data, 1)
                    .unwrap_err()
                    .to_string()
                    .contains("rank 1 of 1")
            );
            assert!(
                !fakes::nccl_log()
                    .iter()
                    .any(|line| line.contains("ncclAllReduce"))
            );
        });
    });
}

#[test]
fn f8_is_carried_by_old_libraries_and_reduced_by_newer_ones() {
    with_fakes(&[("FAKE_NCCL_VERSION", "22304")], || {
        world(2, |rank| {
            let slice = rank.put(&[0x38 + rank.rank as u8; 4]);
            let data = rank.operands(&slice, &slice, 4, Dtype::F8E4M3);
            assert!(sum(&rank, data).unwrap_err().to_string().contains("2.24"));
            // SAFETY: the buffer lives until the stream is waited for.
            unsafe { rank.comm.broadcast(data, 1, rank.handle()) }.unwrap();
            assert_eq!(rank.get(&slice), [0x39; 4]);
        });
    });
}

#[test]
fn an_error_of_a_call_says_who_what_and_why() {
    with_fakes(
        &[("FAKE_NCCL_FAIL", "ncclAllReduce:1:4,ncclAllReduce:2:1")],
        || {
            world(1, |rank| {
                let slice = rank.put(&[1; 16]);
                let data = rank.operands(&slice, &slice, 4, Dtype::F32);
                let error = sum(&rank, data).unwrap_err();
                assert_eq!(code(&error), Some(4));
                for part in [
                    "rank 0: ncclAllReduce",
                    "ncclInvalidArgument",
                    "told it to fail",
                    "same sizes",
                ] {
                    assert!(error.to_string().contains(part), "{error}");
                }
                assert!(rank.comm.async_error().is_ok()); // a mistake in a call breaks nothing
                let error = sum(&rank, data).unwrap_err();
                assert!(
                    error.to_string().contains("ncclUnhandledCudaError"),
                    "{error}"
                );
                let far = Operands {
                    from: address(&slice) + 1_000_000,
                    ..data
                };
                assert!(sum(&rank, far).is_err());
            });
            let ends: Vec<_> = fakes::nccl_log()
                .into_iter()
                .filter(|line| line.contains("Comm"))
                .collect();
            assert!(
                ends.last().unwrap().starts_with("ncclCommAbort"),
                "{ends:?}"
            ); // what has failed is not finalized
        },
    );
}
