//! A job as its supervisors are asked to start it: how many ranks, on which of how many machines, of which program.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use fabric_engine::rendezvous::Secret;

use super::{
    child::{ERROR_FILE, LISTENER},
    output::Output,
};
use crate::{
    Error, Result,
    environment::{Lookup, resolve},
};

/// Where rank 0 listens in a job on several machines, unless told otherwise.
pub const DEFAULT_PORT: u16 = 29_400;

/// What a supervisor is asked to start. Each of several machines has a supervisor, which starts that machine's ranks:
///
/// ```text
/// node_rank 0: ranks 0 .. local             listens at address:port
/// node_rank 1: ranks local .. 2 * local     comes there
/// ```
///
/// ```
/// use fabric::launch::Job;
///
/// let here = Job::new(4);
/// assert_eq!((here.local, here.nodes), (4, 1));
///
/// let set = |name: &str| match name {
///     "FABRIC_NODE_RANK" => Some("1".to_string()),
///     "FABRIC_ADDR" => Some("10.0.0.7".to_string()),
///     "FABRIC_SECRET" => Some("5ec2e7".to_string()),
///     _ => None,
/// };
/// let there = Job::from_variables(4, 2, &set)?;
/// assert_eq!((there.node_rank, there.address.as_deref()), (1, Some("10.0.0.7")));
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Job {
    /// Ranks on this machine; every machine has as many.
    pub local: usize,
    /// Machines.
    pub nodes: usize,
    /// This machine's number.
    pub node_rank: usize,
    /// Machine 0's address or name; needed where there are several machines.
    pub address: Option<String>,
    /// The port at which rank 0 listens; [`DEFAULT_PORT`] on several machines, any free one on one.
    pub port: Option<u16>,
    /// What proves that a rank belongs to the job; made by the supervisor where there is one machine.
    pub secret: Option<String>,
    /// What to run.
    pub program: Program,
    /// Further variables for the ranks.
    pub variables: Vec<(String, OsString)>,
    /// Where their output goes.
    pub output: Output,
    /// How often all ranks are started again after a failure.
    pub restarts: usize,
}

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The file.
    pub path: PathBuf,
    /// What it is told that it is called, when that is not the file.
    pub name: Option<OsString>,
    /// Its arguments.
    pub args: Vec<OsString>,
}

impl Program {
    /// This program, with the same arguments.
    pub fn this() -> Self {
        let mut args = std::env::args_os();
        let name = args.next();
        Self {
            // The kernel's own link to it, where it cannot say: then the file is gone, and can be started all the same.
            path: std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into()),
            name,
            args: args.collect(),
        }
    }
}

impl From<usize> for Job {
    fn from(local: usize) -> Self {
        Self::new(local)
    }
}

impl Job {
    /// `local` ranks of this program, all on this machine.
    pub fn new(local: usize) -> Self {
        Self {
            local,
            nodes: 1,
            node_rank: 0,
            address: None,
            port: None,
            secret: None,
            program: Program::this(),
            variables: Vec::new(),
            output: Output::default(),
            restarts: 0,
        }
    }

    /// `local` ranks of this program on each of `nodes` machines, where FABRIC_NODE_RANK, FABRIC_ADDR, FABRIC_PORT and
    /// FABRIC_SECRET tell this supervisor of its part. On one machine nothing needs to be set, and nothing is read.
    ///
    /// # Errors
    /// When a variable is malformed, or says that there are other machines where there is one.
    pub fn from_variables(local: usize, nodes: usize, get: Lookup<'_>) -> Result<Self> {
        fn parse<T: std::str::FromStr>(
            get: Lookup<'_>,
            name: &str,
            wanted: &str,
        ) -> Result<Option<T>> {
            let Some(text) = get(name).filter(|text| !text.is_empty()) else {
                return Ok(None);
            };
            text.parse().map(Some).map_err(|_| {
                Error::argument(
                    format!("{name} is {text}, which is not {wanted}"),
                    format!("Correct or unset {name}"),
                )
            })
        }
        let node_rank = parse(get, "FABRIC_NODE_RANK", "a machine's number from 0 up")?;
        let node_rank = node_rank.unwrap_or(0);
        let mut job = Self {
            nodes,
            node_rank,
            ..Self::new(local)
        };
        if nodes > 1 {
            job.address = parse(get, "FABRIC_ADDR", "an address")?;
            job.port = parse(get, "FABRIC_PORT", "a port")?;
            job.secret = parse(get, "FABRIC_SECRET", "a text")?;
        }
        job.check()?;
        Ok(job)
    }

    /// How many ranks there are on all machines.
    pub fn world(&self) -> usize {
        self.local.saturating_mul(self.nodes)
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.local == 0 || self.nodes == 0 {
            return Err(Error::argument(
                format!("{} ranks on each of {} machines", self.local, self.nodes),
                "Ask for at least one",
            ));
        }
        if self.local.checked_mul(self.nodes).is_none() {
            return Err(Error::argument(
                format!("{} ranks on each of {} machines", self.local, self.nodes),
                "Ask for fewer",
            ));
        }
        if self.node_rank >= self.nodes {
            return Err(Error::argument(
                format!(
                    "this is machine {} (FABRIC_NODE_RANK, --node-rank) of {} (FABRIC_NUM_NODES, --num-nodes)",
                    self.node_rank, self.nodes
                ),
                "Machines are numbered from 0; say on all of them how many there are",
            ));
        }
        if self.nodes > 1 && self.address.is_none() {
            return Err(Error::argument(
                format!("{} machines, and nothing says where they meet", self.nodes),
                "Name machine 0's address on all of them: FABRIC_ADDR, or --main-address",
            ));
        }
        Ok(())
    }

    /// Find where the ranks meet. On machine 0 the listener is bound now, before anybody is told of it.
    pub(super) fn meet(&self) -> Result<Meeting> {
        let (alone, host) = (self.nodes == 1, self.address.as_deref());
        let port = self.port.unwrap_or(if alone { 0 } else { DEFAULT_PORT });
        let address = match host {
            None => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            Some(host) => resolve(host, port, alone).map_err(|why| {
                Error::argument(
                    format!("the main address '{host}' has no address: {why}"),
                    "Give machine 0's IP address: FABRIC_ADDR, or --main-address",
                )
            })?,
        };
        let secret = match (&self.secret, alone) {
            (Some(secret), _) => Some(secret.clone()),
            (None, true) => Some(Secret::random_text()?),
            (None, false) if address.ip().is_loopback() => None,
            (None, false) => {
                return Err(Error::argument(
                    format!(
                        "the ranks meet at {address}, which others can reach, and FABRIC_SECRET is not set"
                    ),
                    "Give all machines the same: export FABRIC_SECRET=... (openssl rand -hex 32 makes one)",
                ));
            }
        };
        if self.node_rank > 0 {
            return Ok(Meeting {
                address,
                listener: None,
                secret,
            });
        }
        let listener = TcpListener::bind(address).map_err(|why| {
            Error::argument(
                format!("machine 0 cannot listen at {address}: {why}"),
                "Give an address of machine 0's own, and a port that is free: FABRIC_ADDR and FABRIC_PORT, or --main-address and --main-port",
            )
        })?;
        Ok(Meeting {
            address: listener.local_addr()?,
            listener: Some(listener),
            secret,
        })
    }

    /// The command that starts this machine's rank number `local_rank`.
    pub(super) fn command(&self, local_rank: usize, told: &Told, error_file: &Path) -> Command {
        let mut command = Command::new(&self.program.path);
        if let Some(name) = &self.program.name {
            command.arg0(name);
        }
        let is_set = |name: &str| std::env::var_os(name).is_some();
        command
            .args(&self.program.args)
            .env_remove("FABRIC_SECRET")
            .env_remove(LISTENER)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .envs(self.own_variables(local_rank, told, error_file, &is_set));
        command
    }

    /// The variables that make a process this machine's rank number `local_rank`.
    fn own_variables(
        &self,
        local_rank: usize,
        told: &Told,
        error_file: &Path,
        is_set: &dyn Fn(&str) -> bool,
    ) -> Vec<(&'static str, OsString)> {
        let rank = self.node_rank * self.local + local_rank;
        let number = |value: usize| OsString::from(value.to_string());
        let mut variables: Vec<(&'static str, OsString)> = vec![
            ("FABRIC_RANK", number(rank)),
            ("FABRIC_WORLD_SIZE", number(self.world())),
            ("FABRIC_LOCAL_RANK", number(local_rank)),
            ("FABRIC_LOCAL_WORLD_SIZE", number(self.local)),
            ("FABRIC_NODE_RANK", number(self.node_rank)),
            ("FABRIC_NUM_NODES", number(self.nodes)),
            ("FABRIC_ADDR", told.address.ip().to_string().into()),
            ("FABRIC_PORT", told.address.port().to_string().into()),
            ("FABRIC_SUPERVISOR", told.supervisor.to_string().into()),
            ("FABRIC_RESTART", number(told.restart)),
            (ERROR_FILE, error_file.into()),
        ];
        if let Some(secret) = &told.secret {
            variables.push(("FABRIC_SECRET", secret.into()));
        }
        if rank == 0 {
            variables.push((LISTENER, "stdin".into()));
        }
        let threads = threads_of(told.cores, self.local);
        for name in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS"] {
            if !is_set(name) {
                variables.push((name, number(threads)));
            }
        }
        variables
    }
}

/// Threads for each of `processes` on this machine, so that all of them together have one a core that this process may use;
/// at least 1. What a supervisor sets for its ranks (`RAYON_NUM_THREADS`, `OMP_NUM_THREADS`) where the user did not.
///
/// ```
/// let cores = std::thread::available_parallelism()?.get();
/// assert_eq!(fabric::launch::suggested_max_num_threads(1)?, cores);
/// assert_eq!(fabric::launch::suggested_max_num_threads(10 * cores)?, 1);
/// # Ok::<(), fabric::Error>(())
/// ```
///
/// # Errors
/// When there are 0 processes.
pub fn suggested_max_num_threads(processes: usize) -> Result<usize> {
    if processes == 0 {
        return Err(Error::argument(
            "threads for 0 processes",
            "Give the number of processes on this machine, at least 1",
        ));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from); // by affinity and quota
    Ok(threads_of(cores, processes))
}

fn threads_of(cores: usize, processes: usize) -> usize {
    (cores / processes).max(1)
}

/// Where the ranks of a job meet.
pub(super) struct Meeting {
    pub(super) address: SocketAddr,
    /// Rank 0's, on machine 0.
    pub(super) listener: Option<TcpListener>,
    pub(super) secret: Option<String>,
}

/// What all ranks of this machine are told alike.
pub(super) struct Told {
    pub(super) address: SocketAddr,
    pub(super) secret: Option<String>,
    pub(super) supervisor: u32,
    /// How often the job was started before.
    pub(super) restart: usize,
    /// Cores that this process may use.
    pub(super) cores: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Place;

    fn told(cores: usize) -> Told {
        Told {
            address: "127.0.0.1:4321".parse().unwrap(),
            secret: Some("00ff".into()),
            supervisor: 77,
            restart: 2,
            cores,
        }
    }

    fn value(variables: &[(&str, OsString)], name: &str) -> Option<String> {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| value.to_str().unwrap().to_owned())
    }

    fn several(node_rank: usize) -> Job {
        Job {
            nodes: 2,
            node_rank,
            address: Some("127.0.0.1".into()),
            ..Job::new(3)
        }
    }

    // LAU-01, line 9
    #[test]
    fn line_9_a_rank_finds_its_place_in_what_the_supervisor_sets() {
        for (job, node_rank) in [(Job::new(3), 0), (several(0), 0), (several(1), 1)] {
            for local_rank in 0..3 {
                let path = Path::new("words");
                let variables = job.own_variables(local_rank, &told(8), path, &|_| false);
                let get = |name: &str| value(&variables, name);
                let place = Place::detect(&get).unwrap().unwrap();
                assert_eq!(place.rank, node_rank * 3 + local_rank);
                assert_eq!((place.local_rank, place.node_rank), (local_rank, node_rank));
                assert_eq!((place.world, place.local_world), (3 * job.nodes, 3));
                assert_eq!(place.nodes, job.nodes);
                assert_eq!(place.address, "127.0.0.1:4321".parse().unwrap());
                assert!(place.supervised && place.secret.is_given());
                assert_eq!(get(LISTENER).is_some(), place.rank == 0);
                assert_eq!(get(ERROR_FILE).unwrap(), "words");
                assert_eq!(get("FABRIC_RESTART").unwrap(), "2");
            }
        }
    }

    // LAU-05, BUG-15
    #[test]
    fn cores_are_divided_unless_the_user_did() {
        let threads = |ranks, cores, set: &'static str| {
            let path = Path::new("w");
            let job = Job::new(ranks);
            let variables = job.own_variables(0, &told(cores), path, &|name| name == set);
            ["RAYON_NUM_THREADS", "OMP_NUM_THREADS"].map(|name| value(&variables, name))
        };
        let four = Some("4".to_string());
        assert_eq!(threads(2, 9, ""), [four.clone(), four.clone()]);
        assert_eq!(threads(4, 2, ""), [Some("1".into()), Some("1".into())]);
        assert_eq!(threads(2, 8, "OMP_NUM_THREADS"), [four, None]);
    }

    // UTIL-33
    #[test]
    fn processes_share_the_cores_and_none_goes_without_a_thread() {
        assert_eq!(
            [1, 2, 3, 9].map(|processes| threads_of(8, processes)),
            [8, 4, 2, 1]
        );
        assert!(suggested_max_num_threads(0).is_err());
        assert!(suggested_max_num_threads(1).unwrap() >= 1);
    }

    #[test]
    fn line_6_the_listener_is_there_before_its_address_is_told() {
        let meeting = Job::new(2).meet().unwrap();
        let bound = meeting.listener.unwrap().local_addr().unwrap();
        assert_eq!(meeting.address, bound);
        assert!(bound.ip().is_loopback() && bound.port() > 0 && meeting.secret.is_some());
        // Machine 1 only comes there; the port is taken by machine 0.
        let there = Job {
            port: Some(bound.port()),
            ..several(1)
        };
        let there = there.meet().unwrap();
        assert!(there.listener.is_none() && there.secret.is_none());
        assert_eq!(there.address, bound);
    }

    #[test]
    fn jobs_that_cannot_be_are_refused_in_words() {
        let refused = |job: Job| job.check().unwrap_err().to_string();
        assert!(refused(Job::new(0)).contains("at least one"));
        assert!(refused(several(2)).contains("numbered from 0"));
        let alone = Job {
            address: None,
            ..several(0)
        };
        assert!(refused(alone).contains("--main-address"));
        let refused = |job: Job| job.meet().err().unwrap().to_string();
        let open = Job {
            address: Some("10.255.255.1".into()),
            ..several(1)
        };
        assert!(refused(open.clone()).contains("FABRIC_SECRET is not set"));
        let foreign = Job {
            secret: Some("s".into()),
            node_rank: 0,
            ..open
        };
        assert!(refused(foreign).contains("machine 0 cannot listen at 10.255.255.1:29400"));
        let unknown = Job {
            address: Some("no such host.invalid".into()),
            ..several(0)
        };
        assert!(refused(unknown).contains("no such host.invalid"));
    }

    #[test]
    fn variables_tell_a_supervisor_of_its_part() {
        let set = |changes: &'static [(&str, &str)]| {
            move |name: &str| {
                let found = changes.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| value.to_string())
            }
        };
        let all = set(&[
            ("FABRIC_NODE_RANK", "1"),
            ("FABRIC_ADDR", "node0"),
            ("FABRIC_PORT", "4000"),
            ("FABRIC_SECRET", "s"),
        ]);
        let job = Job::from_variables(2, 2, &all).unwrap();
        assert_eq!((job.node_rank, job.port), (1, Some(4000)));
        assert_eq!(job.address.as_deref(), Some("node0"));
        assert_eq!(job.secret.as_deref(), Some("s"));
        // One machine, and this is number 1: each would train for itself.
        let text = Job::from_variables(2, 1, &all).unwrap_err().to_string();
        assert!(text.contains("FABRIC_NODE_RANK"), "{text}");
        let wrong = set(&[("FABRIC_NODE_RANK", "one")]);
        let text = Job::from_variables(2, 2, &wrong).unwrap_err().to_string();
        assert!(text.contains("FABRIC_NODE_RANK is one"), "{text}");
        let first = set(&[("FABRIC_NODE_RANK", "0")]);
        assert_eq!(Job::from_variables(2, 1, &first).unwrap().nodes, 1);
    }
}
