//! What `mpirun` sets: Open MPI's variables, and those of Hydra (MPICH, MVAPICH, Intel MPI). MPI itself is not used.

use std::fs;

use super::{
    Applies, ClusterEnvironment, Lookup, Place,
    address::{meeting, port_of},
    own::nodes,
    variables::{Number, Numbers, Variables},
};
use crate::{Error, Result};

/// The environment of a program that `mpirun` (or `mpiexec`) started.
///
/// Open MPI sets `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK` and `_LOCAL_SIZE`, and `PMIX_NAMESPACE` names the job.
/// MPICH and Intel MPI (Hydra) set `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID` and `MPI_LOCALNRANKS`, and nothing that names
/// the job: on one machine the process id of the daemon that started the ranks does.
///
/// On one machine ranks meet at loopback, at a port that is made of the job's name, or at `FABRIC_PORT`. On several,
/// `FABRIC_ADDR` (or `MASTER_ADDR`) must say where rank 0 is, and with Hydra `FABRIC_PORT` (or `MASTER_PORT`) at which port:
///
/// ```text
/// mpirun -n 8 --hostfile hosts -x FABRIC_ADDR=node1 -x FABRIC_SECRET=$(openssl rand -hex 32) ./train
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Mpi;

/// One family's names.
struct Family {
    name: &'static str,
    rank: &'static str,
    world: &'static str,
    local_rank: &'static str,
    local_world: &'static str,
    marks: &'static [&'static str],
}

const OPEN_MPI: Family = Family {
    name: "Open MPI's mpirun",
    rank: "OMPI_COMM_WORLD_RANK",
    world: "OMPI_COMM_WORLD_SIZE",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
    marks: &["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"],
};
/// PMI_RANK alone is no mark: srun sets it too.
const HYDRA: Family = Family {
    name: "Hydra's mpirun",
    rank: "PMI_RANK",
    world: "PMI_SIZE",
    local_rank: "MPI_LOCALRANKID",
    local_world: "MPI_LOCALNRANKS",
    marks: &["MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
};

fn family(get: Lookup<'_>) -> Option<&'static Family> {
    [&OPEN_MPI, &HYDRA]
        .into_iter()
        .find(|family| Variables::any(get, family.marks))
}

impl ClusterEnvironment for Mpi {
    fn name(&self) -> &'static str {
        "mpi"
    }

    fn applies(&self, get: Lookup<'_>) -> Applies {
        match family(get) {
            None => Applies::No,
            Some(family) => {
                let rank = get(family.rank).unwrap_or_default();
                Applies::Yes(format!("{} ({}={rank})", family.name, family.rank))
            }
        }
    }

    fn place(&self, get: Lookup<'_>) -> Result<Place> {
        read(get, &daemon)
    }
}

/// `daemon`: the process id of what started this rank.
fn read(get: Lookup<'_>, daemon: &dyn Fn() -> Option<u32>) -> Result<Place> {
    let family = family(get).unwrap_or(&OPEN_MPI);
    let required = [
        family.rank,
        family.world,
        family.local_rank,
        family.local_world,
    ];
    let variables = Variables::new(get, "mpirun", &required)?;
    let [rank, world, local_rank, local_world] = required.map(|name| variables.number(name));
    let (rank, world, local_rank, local_world) = (rank?, world?, local_rank?, local_world?);
    let one_machine = world.value == local_world.value;
    let nodes = nodes(world, local_world, Number::new("", 0));
    let numbers = Numbers {
        rank,
        world,
        local_rank,
        local_world,
        node_rank: node_rank(rank, local_rank, local_world, nodes),
        nodes,
    };
    let port = match variables.first_port(&["FABRIC_PORT", "MASTER_PORT"])? {
        Some(port) => port,
        None => port_of(&job(&variables, one_machine, daemon)?),
    };
    let hosts = [("MASTER_ADDR", variables.text("MASTER_ADDR"))];
    let address = meeting(&variables, one_machine, &hosts, port)?;
    variables.place(numbers, address, "mpi")
}

/// What names this job, and no other one on these machines.
fn job(
    variables: &Variables<'_>,
    one_machine: bool,
    daemon: &dyn Fn() -> Option<u32>,
) -> Result<String> {
    let names = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"];
    let named = names.iter().find_map(|name| variables.text(name));
    let started = || daemon().filter(|_| one_machine).map(|pid| pid.to_string());
    named.or_else(started).ok_or_else(|| {
        Error::argument(
            "this mpirun gives its ranks nothing from which all could derive the same port",
            "Set FABRIC_PORT to a free port, the same on all ranks",
        )
    })
}

/// The number of a rank's machine, where ranks were dealt out in blocks or in turns. It is only shown.
pub(super) fn node_rank(
    rank: Number,
    local_rank: Number,
    local_world: Number,
    nodes: Number,
) -> Number {
    let before = rank.value.saturating_sub(local_rank.value);
    let (each, nodes) = (local_world.value.max(1), nodes.value.max(1));
    let node = match before.is_multiple_of(each) {
        true => before / each,
        false => rank.value % nodes,
    };
    Number::new("the number of this machine", node.min(nodes - 1))
}

/// The nearest ancestor of this process that is one of Hydra's daemons (there may be a shell in between).
fn daemon() -> Option<u32> {
    let mut pid = std::os::unix::process::parent_id();
    while pid > 1 {
        // "459 (hydra_pmi_proxy) S 458 ...": the name may hold anything, also ") ".
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
        if name.starts_with("hydra") {
            return Some(pid);
        }
        pid = rest.split(' ').nth(1)?.parse().ok()?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::table::{lookup, place, refusal};

    // As Open MPI 4.1 sets them.
    const OPEN: &[(&str, &str)] = &[
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("OMPI_COMM_WORLD_NODE_RANK", "1"), // not the node's: the rank on the node, over all jobs
        ("PMIX_NAMESPACE", "167575553"),
    ];
    // As MPICH 4.0 sets them.
    const MPICH: &[(&str, &str)] = &[
        ("PMI_RANK", "1"),
        ("PMI_SIZE", "2"),
        ("MPI_LOCALRANKID", "1"),
        ("MPI_LOCALNRANKS", "2"),
        ("PMI_FD", "8"),
    ];

    // ENV-04, line 5
    #[test]
    fn open_mpis_ranks_meet_at_loopback() {
        let place = place(&Mpi, OPEN, &[]).unwrap();
        assert_eq!((place.rank, place.world), (1, 2));
        assert_eq!((place.local_rank, place.local_world), (1, 2));
        assert_eq!((place.node_rank, place.nodes), (0, 1));
        let port = 15_000 + 167_575_553 % 15_000;
        assert_eq!(place.address, ([127, 0, 0, 1], port as u16).into());
        let applies = lookup(OPEN, &[], |get| Mpi.applies(get));
        assert_eq!(
            applies,
            Applies::Yes("Open MPI's mpirun (OMPI_COMM_WORLD_RANK=1)".into())
        );
    }

    #[test]
    fn mpichs_ranks_derive_their_port_from_their_daemon() {
        let read = |daemon: Option<u32>, changes: &[(&str, &str)]| {
            lookup(MPICH, changes, |get| read(get, &|| daemon))
        };
        let place = read(Some(459), &[]).unwrap();
        assert_eq!(place.address, "127.0.0.1:15459".parse().unwrap());
        let text = read(None, &[]).unwrap_err().to_string();
        assert!(text.contains("FABRIC_PORT"), "{text}");
        let chosen = read(None, &[("FABRIC_PORT", "4000")]).unwrap();
        assert_eq!(chosen.address.port(), 4000);
        // A daemon's number means nothing to the daemons on other machines.
        let several = [
            ("MPI_LOCALNRANKS", "1"),
            ("MPI_LOCALRANKID", "0"),
            ("FABRIC_ADDR", "10.0.0.1"),
        ];
        let text = read(Some(459), &several).unwrap_err().to_string();
        assert!(text.contains("FABRIC_PORT"), "{text}");
    }

    #[test]
    fn several_machines_need_an_address() {
        let several = [
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("FABRIC_SECRET", "s"),
        ];
        let text = refusal(&Mpi, OPEN, &several);
        assert!(
            text.contains("nothing says where they meet") && text.contains("FABRIC_ADDR"),
            "{text}"
        );
        for name in ["FABRIC_ADDR", "MASTER_ADDR"] {
            let place = place(&Mpi, OPEN, &[&several[..], &[(name, "10.0.0.1")]].concat()).unwrap();
            assert_eq!(place.address.ip().to_string(), "10.0.0.1");
            assert_eq!((place.node_rank, place.nodes), (1, 2));
        }
    }

    #[test]
    fn half_a_set_names_what_misses_and_srun_is_no_mpirun() {
        for (base, name) in [
            (OPEN, "OMPI_COMM_WORLD_SIZE"),
            (OPEN, "OMPI_COMM_WORLD_LOCAL_RANK"),
            (MPICH, "PMI_RANK"),
            (MPICH, "MPI_LOCALNRANKS"),
        ] {
            let text = refusal(&Mpi, base, &[(name, "")]);
            assert!(text.contains(&format!("{name} is not")), "{text}");
        }
        let srun = &MPICH[..2];
        assert_eq!(lookup(srun, &[], |get| Mpi.applies(get)), Applies::No);
    }

    #[test]
    fn machines_are_numbered_for_ranks_in_blocks_and_in_turns() {
        let number = |rank, local_rank| {
            let n = |value| Number::new("", value);
            node_rank(n(rank), n(local_rank), n(2), n(2)).value
        };
        let blocks = [(0, 0), (1, 1), (2, 0), (3, 1)].map(|(rank, local)| number(rank, local));
        assert_eq!(blocks, [0, 0, 1, 1]);
        let turns = [(0, 0), (1, 0), (2, 1), (3, 1)].map(|(rank, local)| number(rank, local));
        assert_eq!(turns, [0, 1, 0, 1]);
    }
}
