//! How host communicators come to be: over TCP, over Unix sockets, in shared memory, or by whichever of these reaches
//! everybody; for the whole job, or for a subgroup of it.

use std::{os::fd::AsFd, sync::Arc};

use super::{Executor, Host, Options, shared::SharedMemory};
use crate::{
    error::{Error, Result},
    rendezvous::{Member, Peers},
    schedule::choose::{Tuning, WireKind},
    wire::{
        Vigil,
        ledger::Ledger,
        shm::{Arena, Group, MOST_RANKS, Mapping},
        stream::{Security, Streams},
    },
};

const SHARED: &str = "all ranks share memory";

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
    Unix,
    Best,
}

impl Host {
    /// Connect all ranks of the job over TCP.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' options differ.
    pub fn tcp(member: &Arc<Member>, mut options: Options) -> Result<Self> {
        agree(member, &mut options)?;
        Self::tcp_group(member, everybody(member), "world".into(), options)
    }

    /// Connect all ranks of the job over Unix sockets; the reason, on all ranks alike, when that cannot be done because they
    /// are on different machines, in different containers or different users', or the system refuses.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' options differ.
    pub fn unix(
        member: &Arc<Member>,
        mut options: Options,
    ) -> Result<std::result::Result<Self, String>> {
        agree(member, &mut options)?;
        let name = "world".to_string();
        let met = member.connect_unix(&name, &everybody(member))?;
        let peers = match met.outcome {
            Ok(peers) => peers,
            Err(why) => return Ok(Err(why)),
        };
        let (kind, reach) = (WireKind::Unix, Reach::Unix);
        Self::streams(member, everybody(member), name, options, peers, kind, reach).map(Ok)
    }

    /// Connect all ranks of the job through memory that all of them map; the reason, on all ranks alike, when that cannot
    /// be done because they are on different machines, or in different containers, or the system refuses.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' options differ.
    pub fn shm(
        member: &Arc<Member>,
        mut options: Options,
    ) -> Result<std::result::Result<Self, String>> {
        agree(member, &mut options)?;
        let (made, _) = Self::shm_group(member, everybody(member), "world".into(), options)?;
        Ok(made)
    }

    /// Connect all ranks of the job by the fastest wire that reaches all of them: shared memory, or else Unix sockets,
    /// or else TCP.
    ///
    /// # Errors
    /// When a rank cannot be reached, or the ranks' options differ.
    pub fn best(member: &Arc<Member>, mut options: Options) -> Result<Self> {
        agree(member, &mut options)?;
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
        // Whoever has a wire takes part in the search for the others', because the whole world swaps addresses.
        let without = |found: bool| if found { Vec::new() } else { group.clone() };
        if everywhere {
            tracing::info!(rank, group = name, wire = "shm", "all ranks share memory");
            let mut host =
                made.map_err(|why| Error::rendezvous(rank, why, "This is a mistake in Fabric"))?;
            host.reason = SHARED.into();
            return Ok(host);
        }
        let wants = without(made.is_ok());
        let met = member.connect_unix(&name, &wants)?;
        let wants = without(made.is_ok() || met.outcome.is_ok());
        let peers = if met.everywhere {
            Peers::default()
        } else {
            member.connect(&name, &wants)?
        };
        let (made, shm) = match made {
            Ok(mut host) => {
                tracing::info!(rank, group = name, wire = "shm", "all ranks share memory");
                host.reason = SHARED.into();
                return Ok(host);
            }
            Err(why) => (met.outcome, why),
        };
        let (peers, kind, reason) = match made {
            Ok(peers) => {
                tracing::info!(rank, group = name, wire = "unix", shm, "no shared memory");
                let reason =
                    format!("one machine holds all ranks, but there is no shared memory ({shm})");
                (peers, WireKind::Unix, reason)
            }
            Err(unix) => {
                tracing::info!(
                    rank,
                    group = name,
                    wire = "tcp",
                    shm,
                    unix,
                    "one machine does not hold all ranks"
                );
                let reason = format!("no shared memory ({shm}) and no Unix sockets ({unix})");
                (peers, WireKind::Tcp, reason)
            }
        };
        let mut host = Self::streams(member, group, name, options, peers, kind, Reach::Best)?;
        host.reason = reason;
        Ok(host)
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
        let shared = Group::new(rank, arena.clone(), peers, vigil.clone(), passed.is_crowded);
        let executor =
            Executor::Shared(Box::new(SharedMemory::new(shared, options.tuning.clone())));
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
        let (kind, reach) = (WireKind::Tcp, Reach::Tcp);
        Self::streams(member, group, name, options, peers, kind, reach)
    }

    fn unix_group(
        member: &Arc<Member>,
        group: Vec<usize>,
        name: String,
        options: Options,
    ) -> Result<Self> {
        let met = member.connect_unix(&name, &group)?;
        let again = "The whole group did meet over Unix sockets: look for limits on open files";
        let peers = met
            .outcome
            .map_err(|why| Error::rendezvous(member.rank(), why, again))?;
        let (kind, reach) = (WireKind::Unix, Reach::Unix);
        Self::streams(member, group, name, options, peers, kind, reach)
    }

    fn streams(
        member: &Arc<Member>,
        group: Vec<usize>,
        name: String,
        options: Options,
        peers: Peers,
        kind: WireKind,
        reach: Reach,
    ) -> Result<Self> {
        let rank = place(member, &group);
        let vigil = watch(member, &group, &options);
        let security = security(member, &options, &peers)?;
        tracing::debug!(
            rank,
            group = name,
            wire = kind.name(),
            security = security.name()
        );
        let Peers {
            connections,
            is_local,
        } = peers;
        let wire = Streams::new(rank, connections, security, is_local, vigil.clone())?;
        let control = Some(member.control().clone());
        let mut host = Self::over(Box::new(wire), kind, vigil, options, control)?;
        host.family = Some(Family::new(member, group, name, reach));
        Ok(host)
    }

    /// The communicator of all ranks that give the same `color`, ordered by `key`, then by rank.
    pub(in crate::comm) fn subgroup(&mut self, color: u32, key: u32) -> Result<Self> {
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
            Reach::Unix => Self::unix_group,
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

/// All ranks choose algorithms from rank 0's table, and must do the same for what travels.
fn agree(member: &Member, options: &mut Options) -> Result<()> {
    let mine = Terms {
        tuning: options.tuning.to_text(),
        security: options.security.map(Security::name).unwrap_or_default(),
    };
    let bytes = postcard::to_allocvec(&mine).expect("terms have only plain fields");
    let rows = member.swap("fabric/terms", &bytes)?;
    for (peer, row) in rows.iter().enumerate() {
        let disagree = |what: String, hint: &str| Err(Error::rendezvous(member.rank(), what, hint));
        let Ok(theirs) = postcard::from_bytes::<Terms>(row) else {
            return disagree(
                format!("rank {peer} sent no terms that this program can read"),
                "All ranks must run the same version of this program",
            );
        };
        if peer == 0 {
            // Tables are measured on machines, and may differ: all use one.
            options.tuning = Tuning::parse(&theirs.tuning).map_err(|error| {
                let hint = "All ranks must run the same version of this program";
                Error::rendezvous(member.rank(), format!("rank 0's table: {error}"), hint)
            })?;
        }
        if theirs.security != mine.security {
            let name = |terms: &Terms| match terms.security {
                "" => "none (the addresses decide)".to_string(),
                name => format!("'{name}'"),
            };
            return disagree(
                format!(
                    "rank {peer} asks for security {}, rank {} for {}",
                    name(&theirs),
                    member.rank(),
                    name(&mine)
                ),
                "Give all ranks the same FABRIC_SECURITY, or none",
            );
        }
    }
    Ok(())
}

/// What all ranks must have in common.
#[derive(serde::Serialize, serde::Deserialize)]
struct Terms<'a> {
    tuning: String,
    security: &'a str,
}

/// What is done for what travels over these connections: what was asked for, or else what their addresses need, which is
/// the same for all ranks of the group.
pub(super) fn security(member: &Member, options: &Options, peers: &Peers) -> Result<Security> {
    let security = options.security.unwrap_or(match peers.is_local {
        true => Security::Plain,
        false => Security::Encrypted,
    });
    if security == Security::Plain || member.has_secret() {
        return Ok(security);
    }
    Err(Error::rendezvous(
        member.rank(),
        format!(
            "what travels between ranks would be {}, but the job has no secret to make keys from",
            security.name()
        ),
        "Set FABRIC_SECRET to the same random text on all ranks (on a network that nobody else reaches, \
         FABRIC_SECURITY=plain does without)",
    ))
}
