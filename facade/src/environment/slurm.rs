//! SLURM's variables, as `srun` sets them for every task of a step.

use std::{
    io::{self, IsTerminal},
    path::Path,
};

use super::{
    Applies, ClusterEnvironment, Lookup, Place,
    address::{meeting, port_of},
    hosts::{hosts, tasks},
    variables::{Number, Numbers, Variables},
};
use crate::{Error, Result};

/// The environment of SLURM: the tasks of a step of `srun` are ranks.
///
/// A batch script or an allocation's shell is no rank, although SLURM sets `SLURM_PROCID=0` there: a program that is
/// started in it without `srun` starts its ranks itself, and is told about `srun`. Nor is what a shell on a terminal runs
/// (`srun --pty bash`, `salloc`), nor the only task of a step, in which a program may start as many ranks as it likes. The
/// job's name says nothing: `salloc` calls every job "interactive", also those in which srun starts tasks.
///
/// ```text
/// #!/bin/bash
/// #SBATCH --nodes 2 --ntasks-per-node 4
/// export FABRIC_SECRET=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
/// srun ./train
/// ```
///
/// Ranks meet at the first host of the step (loopback, where there is only one), at a port that is made of the job's id;
/// `FABRIC_ADDR` or `MASTER_ADDR`, and `FABRIC_PORT` or `MASTER_PORT`, say otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Slurm;

/// The step of an allocation's own shell.
const INTERACTIVE_STEP: &str = "4294967290";
/// Set by srun --pty, for its shell and all that is run in it.
const TERMINAL: [&str; 3] = ["SLURM_PTY_PORT", "SLURM_PTY_WIN_COL", "SLURM_PTY_WIN_ROW"];

/// Whether this process talks with a terminal: tasks of an srun that was started in srun's shell do not.
fn on_terminal() -> bool {
    io::stdin().is_terminal() || io::stdout().is_terminal() || io::stderr().is_terminal()
}

impl ClusterEnvironment for Slurm {
    fn name(&self) -> &'static str {
        "slurm"
    }

    fn applies(&self, get: Lookup<'_>) -> Applies {
        applies(get, &on_terminal)
    }

    fn place(&self, get: Lookup<'_>) -> Result<Place> {
        let variables = Variables::new(get, "srun", &["SLURM_PROCID", "SLURM_LOCALID"])?;
        let missing = |names: &str| {
            Error::argument(
                format!("SLURM_PROCID is set, but none of {names} is"),
                "Start this program with srun, or unset SLURM_PROCID and SLURM_STEP_ID",
            )
        };
        let world = variables
            .first_number(&["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"])?
            .ok_or_else(|| missing("SLURM_STEP_NUM_TASKS, SLURM_NTASKS"))?;
        let nodes = variables
            .first_number(&[
                "SLURM_STEP_NUM_NODES",
                "SLURM_NNODES",
                "SLURM_JOB_NUM_NODES",
            ])?
            .ok_or_else(|| missing("SLURM_STEP_NUM_NODES, SLURM_NNODES"))?;
        let node_rank = match nodes.value {
            1 => Number::new("SLURM_NODEID", 0),
            _ => variables.number("SLURM_NODEID")?,
        };
        let numbers = Numbers {
            rank: variables.number("SLURM_PROCID")?,
            world,
            local_rank: variables.number("SLURM_LOCALID")?,
            local_world: local_world(&variables, world, nodes, node_rank)?,
            node_rank,
            nodes,
        };
        let port = match variables.first_port(&["FABRIC_PORT", "MASTER_PORT"])? {
            Some(port) => port,
            None => port_of(&step_number(&variables)),
        };
        let one_machine = nodes.value == 1;
        let hosts = match one_machine {
            true => Vec::new(),
            false => candidates(&variables)?,
        };
        let address = meeting(&variables, one_machine, &hosts, port)?;
        variables.place(numbers, address, "slurm")
    }
}

fn applies(get: Lookup<'_>, on_terminal: &dyn Fn() -> bool) -> Applies {
    let Some(job) = get("SLURM_JOB_ID").or_else(|| get("SLURM_JOBID")) else {
        return Applies::No;
    };
    let tasks = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"];
    let tasks = tasks
        .iter()
        .find_map(|name| get(name)?.parse::<usize>().ok());
    let step = get("SLURM_STEP_ID").or_else(|| get("SLURM_STEPID"));
    let shell = step.as_deref() == Some(INTERACTIVE_STEP)
        || (Variables::any(get, &TERMINAL) && on_terminal());
    let count = tasks.unwrap_or(1);
    match step {
        _ if shell => Applies::Not(format!(
            "SLURM's job {job} is here, but this process runs in its interactive shell, so it is no task"
        )),
        None => Applies::Not(without_step(&job, count, get)),
        Some(_) if mpirun_inside(get) => Applies::Not(format!(
            "mpirun was started in SLURM's job {job}, so ranks are mpirun's"
        )),
        Some(_) if tasks == Some(1) => Applies::Not(format!(
            "SLURM's job {job} has one task in this step, in which ranks may be started"
        )),
        Some(_) => Applies::Yes(format!(
            "SLURM (job {job}, SLURM_PROCID={})",
            get("SLURM_PROCID").unwrap_or_default()
        )),
    }
}

/// What is said to a program that SLURM's job runs outside a step.
fn without_step(job: &str, tasks: usize, get: Lookup<'_>) -> String {
    let mut text =
        format!("SLURM's job {job} is here, but srun did not start this process, so it is no task");
    let on_path = |name: &str| {
        let path = get("PATH").unwrap_or_default();
        path.split(':')
            .any(|folder| !folder.is_empty() && Path::new(folder).join(name).is_file())
    };
    if tasks > 1 && on_path("srun") {
        text += &format!("; \"srun PROGRAM\" would start its {tasks} tasks");
    }
    text
}

/// Whether an mpirun was started by this step, or in it: its ranks have SLURM's variables too, those of its daemons.
fn mpirun_inside(get: Lookup<'_>) -> bool {
    Variables::any(get, &["OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"])
}

/// Tasks on this node.
fn local_world(
    variables: &Variables<'_>,
    world: Number,
    nodes: Number,
    node_rank: Number,
) -> Result<Number> {
    if nodes.value == 1 {
        return Ok(world);
    }
    for name in [
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_TASKS_PER_NODE",
        "SLURM_NTASKS_PER_NODE",
    ] {
        let Some(text) = variables.text(name) else {
            continue;
        };
        let counts = tasks(&text).map_err(|why| variables.refuse(name, &text, why))?;
        let own = match counts.as_slice() {
            [each] => Some(each),
            counts => counts.get(node_rank.value),
        };
        return own.map(|count| Number::new(name, *count)).ok_or_else(|| {
            let what = format!("says nothing of node {}", node_rank.value);
            variables.refuse(name, &text, what)
        });
    }
    let (tasks, nodes) = (world.value, nodes.value);
    if tasks.is_multiple_of(nodes) {
        return Ok(Number::new("tasks on this node", tasks / nodes));
    }
    Err(Error::argument(
        format!(
            "{} = {tasks} does not say how tasks lie on {nodes} nodes, and SLURM_STEP_TASKS_PER_NODE is not set",
            world.name
        ),
        "Start this program with srun, as many tasks on every node: --ntasks-per-node",
    ))
}

/// What distinguishes this step from others on its nodes: the job's number, and the step's.
fn step_number(variables: &Variables<'_>) -> String {
    let number = |names: [&str; 2]| {
        let text = names.iter().find_map(|name| variables.text(name));
        text.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0)
    };
    let job = number(["SLURM_JOB_ID", "SLURM_JOBID"]);
    let step = number(["SLURM_STEP_ID", "SLURM_STEPID"]);
    job.wrapping_add(step.wrapping_mul(97)).to_string()
}

/// Where rank 0 may be, the best first.
fn candidates<'a>(variables: &Variables<'_>) -> Result<Vec<(&'a str, Option<String>)>> {
    let mut found = vec![("MASTER_ADDR", variables.text("MASTER_ADDR"))];
    let shuffled = variables
        .text("SLURM_DISTRIBUTION")
        .is_some_and(|text| text.starts_with("arbitrary"));
    if shuffled {
        return Ok(found); // the list's first host need not have task 0
    }
    for name in [
        "SLURM_STEP_NODELIST",
        "SLURM_NODELIST",
        "SLURM_JOB_NODELIST",
    ] {
        if let Some(text) = variables.text(name) {
            let hosts = hosts(&text).map_err(|why| variables.refuse(name, &text, why))?;
            found.push((name, hosts.into_iter().next()));
            break;
        }
    }
    // A batch script runs where its first task does; this is that machine's address.
    let launched = variables.text("SLURM_LAUNCH_NODE_IPADDR");
    found.push((
        "SLURM_LAUNCH_NODE_IPADDR",
        launched.filter(|address| !address.starts_with("127.")),
    ));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::table::{lookup, place, refusal};

    const STEP: &[(&str, &str)] = &[
        ("SLURM_JOB_ID", "71"),
        ("SLURM_JOB_NAME", "train"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "3"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "1"),
        ("SLURM_NTASKS", "8"), // the allocation's; the step has fewer
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_STEP_NUM_NODES", "2"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
        ("SLURM_STEP_NODELIST", "10.0.0.[7-8]"),
        ("FABRIC_SECRET", "s"),
    ];

    fn applies(changes: &[(&str, &str)]) -> Applies {
        on_terminal(changes, false)
    }

    fn on_terminal(changes: &[(&str, &str)], terminal: bool) -> Applies {
        lookup(STEP, changes, |get| super::applies(get, &|| terminal))
    }

    // ENV-02, line 5
    #[test]
    fn line_5_a_task_of_a_step_finds_its_place() {
        let place = place(&Slurm, STEP, &[]).unwrap();
        assert_eq!((place.rank, place.world), (3, 4));
        assert_eq!((place.local_rank, place.local_world), (1, 2));
        assert_eq!((place.node_rank, place.nodes), (1, 2));
        assert_eq!(place.address, "10.0.0.7:15071".parse().unwrap());
        assert_eq!(place.told, "SLURM_STEP_NUM_TASKS=4, SLURM_STEP_NUM_NODES=2");
        assert_eq!(
            applies(&[]),
            Applies::Yes("SLURM (job 71, SLURM_PROCID=3)".into())
        );
    }

    #[test]
    fn on_one_machine_ranks_meet_at_loopback_without_a_secret() {
        let one = [
            ("SLURM_STEP_NUM_NODES", "1"),
            ("SLURM_STEP_TASKS_PER_NODE", "4"),
            ("SLURM_STEP_NODELIST", "node7"),
            ("SLURM_NODEID", ""),
            ("SLURM_STEP_ID", "2"),
            ("FABRIC_SECRET", ""),
        ];
        let place = place(&Slurm, STEP, &one).unwrap();
        assert_eq!(place.address, "127.0.0.1:15265".parse().unwrap());
        assert_eq!((place.local_world, place.nodes), (4, 1));
    }

    #[test]
    fn the_address_and_the_port_can_be_chosen() {
        for (names, expected) in [
            (["MASTER_ADDR", "MASTER_PORT"], "10.9.9.9:4000"),
            (["FABRIC_ADDR", "FABRIC_PORT"], "10.9.9.9:4000"),
        ] {
            let changes = [(names[0], "10.9.9.9"), (names[1], "4000")];
            let place = place(&Slurm, STEP, &changes).unwrap();
            assert_eq!(place.address, expected.parse().unwrap());
        }
        let text = refusal(&Slurm, STEP, &[("SLURM_DISTRIBUTION", "arbitrary")]);
        assert!(text.contains("Set FABRIC_ADDR"), "{text}");
    }

    // Issue 20391: tasks without --ntasks-per-node, and uneven ones, are legitimate.
    #[test]
    fn allocations_are_not_refused_for_how_they_were_asked_for() {
        let uneven = [
            ("SLURM_STEP_NUM_TASKS", "3"),
            ("SLURM_STEP_TASKS_PER_NODE", "2,1"),
            ("SLURM_PROCID", "2"),
            ("SLURM_LOCALID", "0"),
        ];
        let uneven = place(&Slurm, STEP, &uneven).unwrap();
        assert_eq!((uneven.local_world, uneven.world), (1, 3));
        let without = [("SLURM_STEP_TASKS_PER_NODE", "")];
        assert_eq!(place(&Slurm, STEP, &without).unwrap().local_world, 2);
        let text = refusal(
            &Slurm,
            STEP,
            &[
                ("SLURM_STEP_TASKS_PER_NODE", ""),
                ("SLURM_STEP_NUM_TASKS", "5"),
            ],
        );
        assert!(text.contains("--ntasks-per-node"), "{text}");
    }

    // ENV-02, line 7: interactive jobs are not SLURM ranks; neither is what srun did not start.
    #[test]
    fn only_tasks_of_a_step_are_ranks() {
        let not = |changes: &[(&str, &str)]| match applies(changes) {
            Applies::Not(reason) => reason,
            other => panic!("{changes:?}: {other:?}"),
        };
        let pty = [("SLURM_PTY_PORT", "40001")];
        let Applies::Not(reason) = on_terminal(&pty, true) else {
            panic!("a shell's program is no task");
        };
        assert!(reason.contains("interactive shell"), "{reason}");
        assert!(not(&[("SLURM_STEP_ID", INTERACTIVE_STEP)]).contains("interactive"));
        assert!(not(&[("SLURM_STEP_NUM_TASKS", "1")]).contains("one task"));
        assert!(not(&[("OMPI_COMM_WORLD_SIZE", "4")]).contains("mpirun's"));
        let batch = [("SLURM_STEP_ID", ""), ("SLURM_STEP_NUM_TASKS", "")];
        assert!(!not(&batch).contains("would start"), "srun is not on PATH");
        assert_eq!(applies(&[("SLURM_JOB_ID", "")]), Applies::No);
        // What srun starts in such a shell, or in an allocation of salloc's, are tasks.
        for tasks in [
            pty[0],
            ("SLURM_JOB_NAME", "bash"),
            ("SLURM_JOB_NAME", "interactive"),
        ] {
            assert!(matches!(applies(&[tasks]), Applies::Yes(_)), "{tasks:?}");
        }
    }

    // ENV-02, line 7: srun exists, and was not used.
    #[test]
    fn who_forgot_srun_is_told_of_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("srun"), "").unwrap();
        let path = format!("/nowhere:{}", folder.path().display());
        let batch = [
            ("SLURM_STEP_ID", ""),
            ("SLURM_STEP_NUM_TASKS", ""),
            ("PATH", path.as_str()),
        ];
        let Applies::Not(reason) = applies(&batch) else {
            panic!("a batch script is no rank");
        };
        assert!(
            reason.ends_with("\"srun PROGRAM\" would start its 8 tasks"),
            "{reason}"
        );
    }

    #[test]
    fn half_a_set_and_contradictions_are_refused() {
        let miss = |name: &'static str, words: &str| {
            let text = refusal(&Slurm, STEP, &[(name, "")]);
            assert!(text.contains(words), "{text}");
        };
        miss("SLURM_LOCALID", "SLURM_LOCALID is not");
        miss("SLURM_PROCID", "SLURM_PROCID is not");
        for (name, value, words) in [
            ("SLURM_PROCID", "4", "is not below SLURM_STEP_NUM_TASKS (4)"),
            ("SLURM_PROCID", "x", "a number"),
            ("SLURM_STEP_TASKS_PER_NODE", "2,", "count like 2"),
            ("SLURM_STEP_TASKS_PER_NODE", "2,2,x", "count like 2"),
            ("SLURM_STEP_NODELIST", "n[1-", "without its ']'"),
            (
                "SLURM_STEP_NODELIST",
                "no such host.invalid",
                "has no address",
            ),
            ("SLURM_NODEID", "2", "says nothing of node 2"),
        ] {
            let text = refusal(&Slurm, STEP, &[(name, value)]);
            assert!(text.contains(words), "{name}={value}: {text}");
        }
    }
}
