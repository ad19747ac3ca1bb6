//! The job as one rank has joined it: alone, as a process among others, or as a thread among others.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use fabric_engine::{
    clock::Clock,
    comm::{
        Communicator,
        host::{Host, Options as HostOptions, Security},
        solo::Solo,
    },
    kernels,
    rendezvous::{Control, Member, Options, Secret},
    shard::SharedComm,
};

use super::Fabric;
use crate::{
    accelerator::{self, Accelerator},
    environment::{self, Place},
    error::{Error, Result},
    launch,
    logger::Status,
    resolve::{Resolved, Wire, seconds},
};

/// Where this rank stands, and its communicator.
pub(super) struct World {
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) local_rank: usize,
    pub(super) node_rank: usize,
    /// Among all ranks of the job, where this is a group of some.
    pub(super) job_rank: usize,
    pub(super) comm: SharedComm,
    /// What connects the ranks, and why, where there are several.
    pub(super) wire: Option<(&'static str, String)>,
    control: Option<Control>,
}

impl World {
    /// A world of one.
    pub(super) fn solo(resolved: &Resolved) -> Result<Self> {
        let solo = Solo::on(open(resolved, 0)?, Clock::machine());
        solo.trace().start();
        Ok(Self {
            rank: 0,
            size: 1,
            local_rank: 0,
            node_rank: 0,
            job_rank: 0,
            comm: SharedComm::new(Box::new(solo)),
            wire: None,
            control: None,
        })
    }

    fn of(
        member: Member,
        resolved: &Resolved,
        local_rank: usize,
        node_rank: usize,
    ) -> Result<Self> {
        let member = Arc::new(member);
        let device = open(resolved, local_rank)?;
        let host = connect(&member, resolved)?;
        host.trace().start();
        let why = match host.reason() {
            "" => "asked for",
            why => why,
        };
        let wire = Some((host.wire(), why.to_string()));
        let comm = match device {
            None => Box::new(host),
            Some(device) => accelerator(resolved)?.connect(host, &device)?,
        };
        Ok(Self {
            rank: member.rank(),
            size: member.world(),
            local_rank,
            node_rank,
            job_rank: member.rank(),
            comm: SharedComm::new(comm),
            wire,
            control: Some(member.control().clone()),
        })
    }

    /// A group of the ranks of `self`, which stays whole.
    pub(super) fn group(&self, comm: SharedComm) -> Self {
        Self {
            rank: comm.rank(),
            size: comm.size(),
            comm,
            wire: None,
            control: None,
            ..*self
        }
    }

    /// Leave; an own error ends the job for everybody, in words.
    pub(super) fn leave(self, error: Option<&Error>) {
        if let (Some(control), Some(error)) = (&self.control, error)
            && !is_from_peer(error)
        {
            control.abort(self.rank, error.to_string());
        }
    }
}

pub(super) fn is_from_peer(error: &Error) -> bool {
    error
        .engine()
        .is_some_and(fabric_engine::Error::is_from_peer)
}

fn accelerator(resolved: &Resolved) -> Result<Arc<dyn Accelerator>> {
    let name = &resolved.accelerator;
    accelerator::named(name).ok_or_else(|| {
        Error::argument(
            format!("the accelerator '{name}' was removed after it was chosen"),
            "Register accelerators before Fabric is built, and keep them",
        )
    })
}

/// The device of this machine's rank number `local_rank`; `None` computes in the host's memory.
fn open(resolved: &Resolved, local_rank: usize) -> Result<Option<Arc<dyn kernels::Device>>> {
    match resolved.device(local_rank).index {
        Some(index) => accelerator(resolved)?.open(index),
        None => Ok(None),
    }
}

/// The communicator between hosts, over the wire that was asked for or the best one.
fn connect(member: &Arc<Member>, resolved: &Resolved) -> Result<Host> {
    let mut options = HostOptions {
        tuning: fabric_engine::comm::host::tuning()?,
        ..HostOptions::default()
    };
    if let Some(time) = resolved.timeout {
        options.deadline = time;
    }
    options.security = security()?;
    let wire = resolved.wire;
    let refused = |why: String| {
        let what = match wire {
            Wire::Shm => "cannot share memory",
            _ => "do not reach one another's Unix sockets",
        };
        Error::argument(
            format!("wire = {wire} was asked for, but these ranks {what}: {why}"),
            "Use wire = auto (FABRIC_WIRE), or start all ranks on one machine, as one user, in one container",
        )
    };
    match wire {
        Wire::Auto => Ok(Host::best(member, options)?),
        Wire::Tcp => Ok(Host::tcp(member, options)?),
        Wire::Shm => Host::shm(member, options)?.map_err(refused),
        Wire::Unix => Host::unix(member, options)?.map_err(refused),
    }
}

/// What FABRIC_SECURITY asks for.
fn security() -> Result<Option<Security>> {
    let Ok(text) = std::env::var("FABRIC_SECURITY") else {
        return Ok(None);
    };
    let known = Security::from_name(&text);
    known.map(Some).ok_or_else(|| {
        Error::argument(
            format!("FABRIC_SECURITY = '{text}' is not known"),
            "Choose one of plain, authenticated, encrypted, or leave it to the addresses",
        )
    })
}

/// Join as the rank that the environment names, run `body`, and leave.
pub(super) fn as_rank<T>(
    fabric: &Fabric,
    place: &Place,
    body: impl FnOnce(&Fabric) -> Result<T>,
) -> Result<T> {
    if let Some(pid) = environment::supervisor(&|name| std::env::var(name).ok())? {
        launch::die_with_supervisor(pid)?;
    }
    let result = join(fabric, place).and_then(|world| {
        launch::on_terminate(world.comm.aborter())?;
        crate::rank_zero::this_process_is(world.rank);
        *fabric.lock_world() = Some(world);
        let inner = Arc::downgrade(&fabric.inner);
        launch::before_exit(move |by_signal| {
            if let Some(inner) = inner.upgrade() {
                let status = match by_signal {
                    true => Status::Interrupted,
                    false => Status::Failed,
                };
                Fabric { inner }.finalize_with(status, false);
            }
        });
        fabric.unless_it_panics(body)
    });
    if let Err(error) = &result {
        launch::report_failure(&error.to_string(), is_from_peer(error));
    }
    fabric.leave(result.as_ref().err());
    result
}

fn join(fabric: &Fabric, place: &Place) -> Result<World> {
    static LAUNCHES: AtomicU64 = AtomicU64::new(0);
    let mut options = Options {
        epoch: LAUNCHES.fetch_add(1, Ordering::Relaxed),
        ..Options::new(place.rank, place.world, place.address, place.secret.clone())
    };
    let get = |name: &str| std::env::var(name).ok();
    if let Some(time) = seconds(&get, "FABRIC_SILENCE_S", "a rank may give no sign of life")? {
        options.silence = time;
    }
    let member = match launch::inherited_listener().filter(|_| place.rank == 0) {
        Some(listener) => Member::host(options, listener)?,
        None => Member::join(options)?,
    };
    World::of(
        member,
        &fabric.inner.resolved,
        place.local_rank,
        place.node_rank,
    )
}

/// Where the ranks of [`Fabric::launch_threads`] meet.
pub(super) struct Meeting {
    address: SocketAddr,
    listener: Mutex<Option<TcpListener>>,
    secret: Secret,
}

impl Meeting {
    pub(super) fn new() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        Ok(Self {
            address: listener.local_addr()?,
            listener: Mutex::new(Some(listener)),
            secret: Secret::from_bytes(Secret::random_text()?.as_bytes()),
        })
    }

    pub(super) fn join(&self, rank: usize, count: usize, resolved: &Resolved) -> Result<World> {
        if count == 1 {
            return World::solo(resolved);
        }
        let options = Options::new(rank, count, self.address, self.secret.clone());
        let listener = if rank == 0 {
            super::lock(&self.listener).take()
        } else {
            None
        };
        let member = match listener {
            Some(listener) => Member::host(options, listener)?,
            None => Member::join(options)?,
        };
        World::of(member, resolved, rank, 0)
    }
}
