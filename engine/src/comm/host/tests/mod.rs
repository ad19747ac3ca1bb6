//! Ranks as threads of one process, each with its own place in the job, its own arena and its own sockets: what they
//! share, they share through the kernel, as processes do.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsFd,
    sync::{Arc, Mutex},
    time::Duration,
};

use fabric_kernels::Dtype;

mod agree;
mod calls;
mod turns;
mod wires;

use super::*;
use crate::wire::ledger::Ledger;
use crate::{
    comm::{Collectives, Label, Op, ReduceOp},
    rendezvous::{Options as Join, Secret},
};
use crate::{rendezvous::Member, wire::shm::Mapping};

const ARENA: usize = 64 << 20;

fn options() -> Options {
    Options {
        deadline: Duration::from_secs(60),
        arena_bytes: ARENA,
        ..Options::default()
    }
}

/// Run `rank` on every rank of a world, and give back what they returned, by rank.
fn world<T: Send>(size: usize, rank: impl Fn(&Arc<Member>) -> T + Sync) -> Vec<T> {
    world_of(size, &Secret::from_bytes(b"the ranks of a test"), rank)
}

fn world_of<T: Send>(
    size: usize,
    secret: &Secret,
    rank: impl Fn(&Arc<Member>) -> T + Sync,
) -> Vec<T> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let listener = Mutex::new(Some(listener));
    std::thread::scope(|scope| {
        let threads = (0..size)
            .map(|number| {
                let (rank, listener, secret) = (&rank, &listener, secret.clone());
                scope.spawn(move || {
                    let join = Join::new(number, size, address, secret);
                    let member = if number == 0 {
                        Member::host(join, listener.lock().unwrap().take().unwrap())
                    } else {
                        Member::join(join)
                    };
                    rank(&Arc::new(member.unwrap()))
                })
            })
            .collect::<Vec<_>>();
        let joined = threads.into_iter().map(|thread| thread.join().unwrap());
        joined.collect()
    })
}

fn shm(member: &Arc<Member>, options: Options) -> Host {
    let host = Host::shm(member, options).unwrap();
    host.expect("ranks of one process share memory")
}

#[test]
fn ranks_that_diverge_both_say_what_they_are_in() {
    for over_shm in [true, false] {
        let errors = world(2, |member| {
            let mut host = if over_shm {
                shm(member, options())
            } else {
                Host::tcp(member, options()).unwrap()
            };
            host.barrier().unwrap();
            let slab = host.alloc(Dtype::F32, 8 + host.rank()).unwrap();
            let call = Call::new(Op::AllReduce(ReduceOp::Sum)).label(Label::Bucket(3));
            host.submit(call, Data::InPlace(slab))
                .and_then(Work::wait)
                .unwrap_err()
                .to_string()
        });
        // The rank that looks later may hear from the hub first; what it hears is the other's story.
        for error in errors {
            assert!(error.contains("have diverged"), "{error}");
            let mine = "#1 all_reduce(gradient bucket 3, sum, 8 x f32)";
            let theirs = "#1 all_reduce(gradient bucket 3, sum, 9 x f32)";
            assert!(error.contains(mine) && error.contains(theirs), "{error}");
        }
    }
}

#[test]
fn two_shared_ranks_that_meet_in_different_operations_both_diverge() {
    let errors = world(2, |member| {
        let host = shm(member, options());
        let call = match host.rank() {
            0 => Call::new(Op::Barrier),
            _ => Call::new(Op::Broadcast { root: 0 }),
        };
        let mut data = match host.rank() {
            0 => Data::None,
            _ => Data::InPlace(host.alloc(Dtype::U8, 3).unwrap()),
        };
        // Meet the executor itself, without the signal that the other side's error raises.
        let shape = check_shapes(host.rank(), 2, &call, &data).unwrap();
        let deadline = host.shared.options.clock.now() + Duration::from_secs(10);
        let mut executor = host.shared.executor.lock().unwrap();
        let begun = Begun {
            stamp: stamp(0, &call, shape),
            kind: 1,
        };
        let result = executor.run(&begun, &call, &mut data, deadline, &host.shared.ledger);
        result.unwrap_err()
    });
    for (rank, error) in errors.iter().enumerate() {
        let Error::Diverged { peer, ours, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(*peer, 1 - rank);
        assert!(ours.contains(["barrier", "broadcast"][rank]), "{ours}");
    }
}

/// Goal: ranks that name different roots are told, also where nobody waits for another in that call. Method: every rank
/// takes itself for the root of a broadcast, or the other for the root of a reduce; whoever meets next must see it.
#[test]
fn ranks_that_waited_for_nobody_diverge_when_they_meet() {
    for over_shm in [true, false] {
        for reduces in [true, false] {
            let errors = world(2, |member| {
                let mut host = if over_shm {
                    shm(member, options())
                } else {
                    Host::tcp(member, options()).unwrap()
                };
                host.barrier().unwrap();
                let mut values = vec![1.0f32; 3];
                let rank = host.rank();
                let done = if reduces {
                    host.reduce(&mut values, ReduceOp::Sum, 1 - rank)
                } else {
                    host.broadcast(&mut values, rank)
                };
                let done = done.and_then(|()| host.barrier());
                done.unwrap_err().to_string()
            });
            for error in errors {
                assert!(error.contains("have diverged"), "{error}");
                let words = ["from rank 0", "from rank 1"];
                let words = if reduces {
                    ["to rank 0", "to rank 1"]
                } else {
                    words
                };
                let named = words.iter().filter(|root| error.contains(**root));
                assert!(named.count() > usize::from(over_shm), "{error}");
            }
        }
    }
}

#[test]
fn a_deadline_may_be_as_late_as_time_goes() {
    world(2, |member| {
        let endless = Options {
            deadline: Duration::MAX,
            ..options()
        };
        let hosts = [
            Host::tcp(member, endless.clone()).unwrap(),
            shm(member, endless),
        ];
        for mut host in hosts {
            host.barrier().unwrap();
        }
    });
}

#[test]
fn a_rank_that_never_comes_is_named_by_the_timeout() {
    for over_shm in [true, false] {
        let errors = world(3, |member| {
            let mut host = if over_shm {
                shm(member, options())
            } else {
                Host::tcp(member, options()).unwrap()
            };
            let mut call = Call::new(Op::Barrier);
            call.deadline = Some(Duration::from_millis(300));
            let result = if host.rank() == 2 {
                host.shared
                    .signal
                    .wait(Duration::from_secs(30))
                    .map_or(Ok(()), Err)
            } else {
                let work = host.submit(call, Data::None).unwrap();
                work.wait().map(drop)
            };
            result.unwrap_err().to_string()
        });
        assert!(
            errors
                .iter()
                .any(|error| error.contains("waiting for rank 2.")),
            "{errors:?}"
        );
        for error in &errors {
            assert!(
                error.contains("#0 barrier was not complete after 0."),
                "{error}"
            );
        }
    }
}

#[test]
fn an_abort_wakes_those_who_sleep() {
    for over_shm in [true, false] {
        let errors = world(3, |member| {
            let mut host = if over_shm {
                shm(member, options())
            } else {
                Host::tcp(member, options()).unwrap()
            };
            if host.rank() == 1 {
                std::thread::sleep(Duration::from_millis(100)); // until the others sleep: there is nothing to ask
                host.aborter().abort("somebody pressed a key");
            }
            let slab = host.alloc(Dtype::F32, 1000).unwrap();
            let call = Call::new(Op::AllReduce(ReduceOp::Sum));
            let result = host
                .submit(call.clone(), Data::InPlace(slab))
                .and_then(Work::wait);
            let again = host.submit(call, Data::InPlace(Slab::zeroed(Dtype::F32, 1)));
            assert_eq!(
                again.err().unwrap().to_string(),
                result.as_ref().unwrap_err().to_string(),
                "a communicator that failed stays so"
            );
            result.unwrap_err().to_string()
        });
        for error in errors {
            assert!(error.contains("somebody pressed a key"), "{error}");
        }
    }
}

#[test]
fn a_failed_call_keeps_its_memory_until_the_communicator_ends() {
    world(2, |member| {
        let mut host = shm(member, options());
        if host.rank() == 0 {
            let slab = host.alloc(Dtype::F32, 1000).unwrap();
            let address = slab.address();
            let mut call = Call::new(Op::AllReduce(ReduceOp::Sum)).blocking();
            call.deadline = Some(Duration::from_millis(50));
            let work = host.submit(call, Data::InPlace(slab)).unwrap();
            assert!(matches!(work.wait(), Err(Error::Timeout { .. })));
            let other = host.alloc(Dtype::F32, 1000).unwrap();
            assert_ne!(other.address(), address);
        } else {
            host.shared.signal.wait(Duration::from_secs(30)).unwrap();
        }
    });
}

#[test]
fn eight_ranks_on_few_cores_finish_two_hundred_reductions() {
    world(8, |member| {
        let mut host = shm(member, options());
        let mut slab = host.alloc(Dtype::F32, 256).unwrap();
        for _ in 0..200 {
            slab.as_mut_slice::<f32>().fill(1.0);
            let call = Call::new(Op::AllReduce(ReduceOp::Sum)).blocking();
            let work = host.submit(call, Data::InPlace(slab)).unwrap();
            slab = work.wait().unwrap().into_output();
            assert_eq!(slab.as_slice::<f32>(), [8.0; 256]);
        }
    });
}

#[test]
fn works_in_flight_keep_their_order() {
    world(2, |member| {
        let mut host = shm(member, options());
        let works = (0..50)
            .map(|index| {
                let mut slab = host.alloc(Dtype::I32, 100 + index).unwrap();
                slab.as_mut_slice::<i32>().fill(index as i32);
                let call = Call::new(Op::AllReduce(ReduceOp::Sum));
                host.submit(call, Data::InPlace(slab)).unwrap()
            })
            .collect::<Vec<_>>();
        for (index, work) in works.into_iter().enumerate() {
            let slab = work.wait().unwrap().into_output();
            assert!(
                slab.as_slice::<i32>()
                    .iter()
                    .all(|value| *value == 2 * index as i32)
            );
        }
    });
}

#[test]
fn subgroups_share_memory_of_their_own() {
    world(4, |member| {
        let mut host = Host::best(member, options()).unwrap();
        assert_eq!(host.wire(), "shm");
        let rank = host.rank();
        // Backwards within the group, so that numbers differ from the world's.
        let mut half = host.split((rank % 2) as u32, 10 - rank as u32).unwrap();
        assert_eq!((half.size(), half.rank()), (2, 1 - rank / 2));
        let mut value = vec![rank as i64; 2];
        half.all_reduce(&mut value, ReduceOp::Sum).unwrap();
        assert_eq!(value, [2 * (rank % 2) as i64 + 2; 2]);
        assert!(half.spent().bytes > 0);
        let mut one = half.split(half.rank() as u32, 0).unwrap();
        assert_eq!(one.size(), 1);
        one.barrier().unwrap();
        host.barrier().unwrap();
    });
}

#[test]
fn a_descriptor_that_is_no_arena_is_refused_by_all_alike() {
    let outcomes = world(3, |member| {
        let fd = std::fs::File::open("/proc/self/exe").unwrap();
        let mut keep = |_, fd| match member.rank() {
            1 => Mapping::of_peer(&fd).map(drop),
            _ => Ok(()),
        };
        let passed = member.pass("test", &[0, 1, 2], Ok(fd.as_fd()), &mut keep);
        passed.unwrap().outcome.unwrap_err()
    });
    for why in outcomes {
        assert!(why.starts_with("rank 1: rank 0: its arena"), "{why}");
    }
}

#[test]
fn an_arena_that_is_full_costs_copies_only() {
    world(2, |member| {
        let small = Options {
            arena_bytes: 0,
            ..options()
        };
        let mut host = shm(member, small);
        let mut values = vec![1.0f32; 1 << 20];
        host.all_reduce(&mut values, ReduceOp::Sum).unwrap();
        assert!(values.iter().all(|value| *value == 2.0));
        assert!(std::fs::read_dir("/dev/shm").unwrap().all(|entry| {
            !entry
                .unwrap()
                .file_name()
                .to_string_lossy()
                .contains("fabric")
        }));
    });
}

/// A wire with a mistake in it.
struct Faulty;

impl Wire for Faulty {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        2
    }

    fn exchange(
        &mut self,
        _: &Stamp,
        _: u32,
        _: &crate::wire::Traffic,
        _: &mut [Slab],
        _: Option<Duration>,
    ) -> Result<()> {
        panic!("a mistake")
    }

    fn sent(&self) -> crate::wire::Sent {
        crate::wire::Sent::default()
    }
}

#[test]
fn a_panic_on_the_communicators_thread_is_everybodys_error() {
    let vigil = Vigil {
        clock: Clock::machine(),
        signal: crate::signal::Signal::new(),
        ledger: Ledger::new(0, 2),
    };
    let signal = vigil.signal.clone();
    let mut host = Host::over_wire(Box::new(Faulty), WireKind::Tcp, vigil, options()).unwrap();
    let work = host.submit(Call::new(Op::Barrier), Data::None).unwrap();
    assert!(work.wait().unwrap_err().to_string().contains("panicked"));
    assert!(signal.is_raised());
    let again = host.submit(Call::new(Op::Barrier), Data::None);
    assert!(again.unwrap_err().to_string().contains("panicked"));
}
