//! LSF's variables, as `jsrun` sets them.

use super::{
    Applies, ClusterEnvironment, Lookup, Place,
    address::{meeting, port_of},
    mpi::node_rank,
    own::nodes,
    variables::{Number, Numbers, Variables},
};
use crate::Result;

/// The environment of LSF's job step manager, `jsrun`.
///
/// It sets `JSM_NAMESPACE_RANK`, `JSM_NAMESPACE_SIZE`, `JSM_NAMESPACE_LOCAL_RANK` and `JSM_NAMESPACE_LOCAL_SIZE`; LSF sets
/// `LSB_JOBID`, from which the port is made, and `LSB_DJOB_RANKFILE`, a file of hosts: the first is where the job's script
/// runs, the second has rank 0. On one machine that file is not needed.
#[derive(Clone, Copy, Debug)]
pub struct Lsf;

const MARKS: [&str; 3] = [
    "JSM_NAMESPACE_RANK",
    "JSM_NAMESPACE_SIZE",
    "JSM_NAMESPACE_LOCAL_RANK",
];

impl ClusterEnvironment for Lsf {
    fn name(&self) -> &'static str {
        "lsf"
    }

    fn applies(&self, get: Lookup<'_>) -> Applies {
        let job = get("LSB_JOBID").unwrap_or_else(|| "unknown".into());
        match (Variables::any(get, &MARKS), get("LSB_JOBID")) {
            (true, _) => Applies::Yes(format!(
                "LSF's jsrun (job {job}, JSM_NAMESPACE_RANK={})",
                get("JSM_NAMESPACE_RANK").unwrap_or_default()
            )),
            (false, Some(_)) => Applies::Not(format!(
                "LSF's job {job} is here, but jsrun did not start this process"
            )),
            (false, None) => Applies::No,
        }
    }

    fn place(&self, get: Lookup<'_>) -> Result<Place> {
        let required = [MARKS.as_slice(), &["LSB_JOBID"]].concat();
        let variables = Variables::new(get, "jsrun", &required)?;
        let (rank, local_rank) = (
            variables.number("JSM_NAMESPACE_RANK")?,
            variables.number("JSM_NAMESPACE_LOCAL_RANK")?,
        );
        let world = variables.number("JSM_NAMESPACE_SIZE")?;
        let sizes = ["JSM_NAMESPACE_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"];
        let local_world = match variables.first_number(&sizes)? {
            Some(size) => size,
            None => Variables::new(get, "jsrun", &["JSM_NAMESPACE_LOCAL_SIZE"])?
                .number("JSM_NAMESPACE_LOCAL_SIZE")?,
        };
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
        let port = match variables.first_port(&["FABRIC_PORT"])? {
            Some(port) => port,
            None => port_of(&variables.parse::<String>("LSB_JOBID", "an id")?),
        };
        let mut hosts = Vec::new();
        if !one_machine && variables.text("FABRIC_ADDR").is_none() {
            hosts.push(("LSB_DJOB_RANKFILE", Some(first_host(get)?)));
        }
        let address = meeting(&variables, one_machine, &hosts, port)?;
        variables.place(numbers, address, "lsf")
    }
}

/// The first host that computes: the second of the rank file.
fn first_host(get: Lookup<'_>) -> Result<String> {
    let name = "LSB_DJOB_RANKFILE";
    let variables = Variables::new(get, "jsrun", &[name])?;
    let path: String = variables.parse(name, "a path")?;
    let text = std::fs::read_to_string(&path)
        .map_err(|why| variables.refuse(name, &path, format!("cannot be read: {why}")))?;
    let mut hosts = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = hosts.next();
    hosts
        .next()
        .or(first)
        .map(str::to_string)
        .ok_or_else(|| variables.refuse(name, &path, "names no host"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::table::{lookup, place, refusal};

    const STEP: &[(&str, &str)] = &[
        ("LSB_JOBID", "1234"),
        ("JSM_NAMESPACE_RANK", "3"),
        ("JSM_NAMESPACE_SIZE", "4"),
        ("JSM_NAMESPACE_LOCAL_RANK", "1"),
        ("JSM_NAMESPACE_LOCAL_SIZE", "2"),
        ("FABRIC_SECRET", "s"),
    ];

    // ENV-03, line 5
    #[test]
    fn ranks_meet_at_the_first_host_that_computes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "batch\n10.10.10.1\n10.10.10.1\n10.10.10.2\n").unwrap();
        let path = file.path().to_str().unwrap();
        let place = place(&Lsf, STEP, &[("LSB_DJOB_RANKFILE", path)]).unwrap();
        assert_eq!((place.rank, place.world, place.local_rank), (3, 4, 1));
        assert_eq!((place.local_world, place.node_rank, place.nodes), (2, 1, 2));
        assert_eq!(place.address, "10.10.10.1:16234".parse().unwrap());
        let text = refusal(&Lsf, STEP, &[("LSB_DJOB_RANKFILE", "/no/such/file")]);
        assert!(text.contains("cannot be read"), "{text}");
        assert!(refusal(&Lsf, STEP, &[]).contains("LSB_DJOB_RANKFILE is not set"));
    }

    #[test]
    fn on_one_machine_no_file_is_needed() {
        let changes = [("JSM_NAMESPACE_LOCAL_SIZE", "4"), ("FABRIC_SECRET", "")];
        let place = place(&Lsf, STEP, &changes).unwrap();
        assert_eq!(place.address, "127.0.0.1:16234".parse().unwrap());
    }

    // ENV-03: a missing variable is named, with jsrun
    #[test]
    fn half_a_set_names_what_misses() {
        for name in [
            "JSM_NAMESPACE_RANK",
            "JSM_NAMESPACE_LOCAL_SIZE",
            "LSB_JOBID",
        ] {
            let text = refusal(&Lsf, STEP, &[(name, "")]);
            assert!(
                text.contains(&format!("{name} is not")) && text.contains("jsrun"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_job_without_jsrun_is_no_rank() {
        let applies = |base: &[(&str, &str)]| lookup(base, &[], |get| Lsf.applies(get));
        assert!(matches!(applies(STEP), Applies::Yes(_)));
        assert!(matches!(applies(&STEP[..1]), Applies::Not(_)));
        assert_eq!(applies(&[]), Applies::No);
    }
}
