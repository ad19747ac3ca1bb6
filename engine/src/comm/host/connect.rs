//! How host communicators come to be: over TCP, in shared memory, or by whichever of the two reaches everybody; for the
//! whole job, or for a subgroup of it.

use std::{os::fd::AsFd, sync::Arc};

use super::{Executor, Host, Options, shared::SharedMemory};
use crate::{
    error::{Error, Result},
    rendezvous::Member,
    schedule::choose::WireKind,
    wire::{
        Vigil,
        ledger::Ledger,
        shm::{Arena, Group, MOST_RANKS, Mapping},
        tcp::Tcp,
    },
};

/// What a communicator needs to make subgroups.
pub(super) struct Family {
    member: Arc<Member>,
    group: Vec<usize>, // world ranks
    name: String,
    children: u32,
    reach: Reach,
}

/// Which wires a group may take.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Tcp,
    Best,
}

impl Host {
    /// Connect all ranks of the job over TCP.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' tuning tables differ.
    pub fn tcp(member: &Arc<Member>, options: Options) -> Result<Self> {
        agree(member, &options)?;
        Self::tcp_group(member, everybody(member), "world".into(), options)
    }

    /// Connect all ranks of the job through memory that all of them map; `None`, on all ranks alike, when that cannot
    /// be done because they are on different machines, or in different containers, or the system refuses.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' tuning tables differ.
    pub fn shm(member: &Arc<Member>, options: Options) -> Result<Option<Self>> {
        agree(member, &options)?;
        let (made, _) = Self::shm_group(member, everybody(member), "world".into(), options)?;
        Ok(made.ok())
    }

    /// Connect all ranks of the job by the fastest wire that reaches all of them: shared memory, or else TCP.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' tuning tables differ.
    pub fn best(member: &Arc<Member>, options: Options) -> Result<Self> {
        agree(member, &options)?;
        Self::best_group(member, everybody(member), "world".into(), options)
    }

    fn best_group(
        member: &Arc<Member>,
        group: Vec<usize>,
        name: String,
        options: Options,
    ) -> Result<Self> {
        let rank = member.rank();
        let (made, everywhere) =
            Self::shm_group(member, group.clone(), name.clone(), options.clone())?;
        match made {
            Ok(host) => {
                tracing::info!(rank, group = name, wire = "shm", "all ranks share memory");
                if !everywhere {
                    member.connect(&name, &[])?; // another group of this split needs the whole world to swap addresses
                }
                Ok(host)
            }
            Err(why) => {
                tracing::info!(rank, group = name, wire = "tcp", why, "no shared memory");
                Self::tcp_group(member, group, name, options).map(|mut host| {
                    if let Some(family) = &mut host.family {
                        family.reach = Reach::Best;
                    }
                    host
                })
            }
        }
    }

    /// The communicator, or why there is none, which all ranks of the group agree on; and whether all groups of the
    /// world have theirs.
    fn shm_group(
        member: &Arc<Member>,
        group: Vec<usize>,
        name: String,
        options: Options,
    ) -> Result<(Result<Self, String>, bool)> {
        let rank = place(member, &group);
        let made = if group.len() > MOST_RANKS {
            Err(format!("{} ranks are more than {MOST_RANKS}", group.len()))
        } else {
            Arena::new(options.arena_bytes).map_err(|e| format!("no shared memory: {e}"))
        };
        let own = made
            .as_ref()
            .map(|(_, fd)| fd.as_fd())
            .map_err(Clone::clone);
        let mut peers = (0..group.len()).map(|_| None).collect::<Vec<_>>();
        let passed = member.pass(&name, &group, own, &mut |index, fd| {
            peers[index] = Some(Mapping::of_peer(&fd)?);
            Ok(())
        })?;
        let arena = match (passed.outcome, made) {
            (Ok(()), Ok((arena, _))) => arena,
            (Err(why), _) | (Ok(()), Err(why)) => return Ok((Err(why), passed.everywhere)),
        };
        let vigil = watch(member, &group, &options);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let crowded = passed.neighbours > cores;
        let shared = Group::new(rank, arena.clone(), peers, vigil.clone(), crowded);
        let executor = Executor::Shared(SharedMemory::new(shared, options.tuning.clone()));
        let control = Some(member.control().clone());
        let kind = WireKind::Shm;
        let mut host = Self::start(executor, kind, Some(arena), vigil, options, control)?;
        host.family = Some(Family::new(member, group, name, Reach::Best));
        Ok((Ok(host), passed.everywhere))
    }

    fn tcp_group(
        member: &Arc<Member>,
        group: Vec<usize>,
        name: String,
        options: Options,
    ) -> Result<Self> {
        let peers = member.connect(&name, &group)?;
        let rank = place(member, &group);
        let vigil = watch(member, &group, &options);
        let wire = Tcp::new(rank, peers, vigil.clone())?;
        let mut host = Self::over(
            Box::new(wire),
            WireKind::Tcp,
            vigil,
            options,
            Some(member.control().clone()),
        )?;
        host.family = Some(Family::new(member, group, name, Reach::Tcp));
        Ok(host)
    }

    /// The communicator of all ranks that give the same `color`, ordered by `key`, then by rank.
    pub(super) fn subgroup(&mut self, color: u32, key: u32) -> Result<Self> {
        let rank = self.shared.rank;
        let Some(family) = &mut self.family else {
            return Err(Error::argument(
                "this communicator cannot be split",
                "Split one that joined a rendezvous",
            ));
        };
        let name = format!("{}/{}", family.name, family.children);
        family.children += 1;
        let mine = [color.to_le_bytes(), key.to_le_bytes()].concat();
        let rows = family.member.swap(&format!("fabric/split/{name}"), &mine)?;
        let number = |row: &[u8], at: usize| {
            u32::from_le_bytes(row[at..at + 4].try_into().expect("four bytes"))
        };
        let mut group = Vec::new();
        for &peer in &family.group {
            if rows[peer].len() != 8 {
                return Err(Error::rendezvous(
                    rank,
                    format!("rank {peer} did not split here"),
                    "Split on all ranks",
                ));
            }
            if number(&rows[peer], 0) == color {
                group.push((number(&rows[peer], 4), peer));
            }
        }
        group.sort_unstable();
        let group = group.into_iter().map(|(_, peer)| peer).collect();
        let make = match family.reach {
            Reach::Tcp => Self::tcp_group,
            Reach::Best => Self::best_group,
        };
        let options = self.shared.options.clone();
        make(&family.member, group, name, options)
    }
}

impl Family {
    fn new(member: &Arc<Member>, group: Vec<usize>, name: String, reach: Reach) -> Self {
        Self {
            member: member.clone(),
            group,
            name,
            children: 0,
            reach,
        }
    }
}

fn everybody(member: &Member) -> Vec<usize> {
    (0..member.world()).collect()
}

/// This rank's number in a group that it belongs to.
fn place(member: &Member, group: &[usize]) -> usize {
    let own = group.iter().position(|rank| *rank == member.rank());
    own.expect("a rank is in its own group")
}

/// What bounds a group's waits.
fn watch(member: &Member, group: &[usize], options: &Options) -> Vigil {
    let control = member.control();
    let whole = group.len() == member.world();
    Vigil {
        clock: options.clock.clone(),
        signal: control.signal().clone(),
        ledger: if whole {
            control.ledger().clone()
        } else {
            Ledger::new(place(member, group), group.len())
        },
    }
}

/// All ranks must choose algorithms from one table.
fn agree(member: &Member, options: &Options) -> Result<()> {
    let tables = member.swap("fabric/tuning", &options.tuning.hash().to_le_bytes())?;
    let own = &tables[member.rank()];
    match tables.iter().position(|hash| hash != own) {
        None => Ok(()),
        Some(peer) => Err(Error::rendezvous(
            member.rank(),
            format!("rank {peer} has another tuning table"),
            "Give all ranks the same FABRIC_TUNING, or none",
        )),
    }
}
