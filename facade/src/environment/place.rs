//! A process's place in its job: which rank it is, among how many, and where they meet.

use std::net::SocketAddr;

use fabric_engine::rendezvous::Secret;

use super::{
    Lookup,
    variables::{Number, Numbers},
};
use crate::{Error, Result};

/// A process's place in its job.
///
/// ```text
/// node 0: rank 0 (local 0), rank 1 (local 1)      world 4, local_world 2, nodes 2
/// node 1: rank 2 (local 0), rank 3 (local 1)      all meet at `address`, where rank 0 listens
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// This process's number in the job.
    pub rank: usize,
    /// Processes in the job.
    pub world: usize,
    /// This process's number on its machine.
    pub local_rank: usize,
    /// Processes of the job on this machine.
    pub local_world: usize,
    /// The machine's number in the job.
    pub node_rank: usize,
    /// Machines in the job.
    pub nodes: usize,
    /// Where rank 0 listens.
    pub address: SocketAddr,
    /// What proves that a process belongs to the job.
    pub secret: Secret,
    /// Who said so: "fabric", "torchrun", "slurm", ... (see [`super::ClusterEnvironment::name`]).
    pub source: &'static str,
    /// The variables that say how large the job is, for errors: "WORLD_SIZE=4, GROUP_WORLD_SIZE=2".
    pub told: String,
    /// Whether our supervisor started this process and watches it.
    pub supervised: bool,
}

impl Place {
    /// Rank `rank` of `world`, all on this machine, without a secret.
    ///
    /// ```
    /// use fabric::environment::Place;
    ///
    /// let place = Place::new("ours", 1, 4, ([127, 0, 0, 1], 4000).into());
    /// assert_eq!((place.local_rank, place.local_world, place.nodes), (1, 4, 1));
    /// ```
    pub fn new(source: &'static str, rank: usize, world: usize, address: SocketAddr) -> Self {
        Self {
            rank,
            world,
            local_rank: rank,
            local_world: world,
            node_rank: 0,
            nodes: 1,
            address,
            secret: Secret::none(),
            source,
            told: format!("ranks={world}, machines=1"),
            supervised: false,
        }
    }

    /// Read the place from the variables that `get` finds; `None` when no launcher left any. The short form of
    /// [`super::detect`].
    ///
    /// ```
    /// use fabric::environment::Place;
    ///
    /// let torchrun = |name: &str| {
    ///     let value = match name {
    ///         "RANK" | "LOCAL_RANK" => "1",
    ///         "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => "2",
    ///         "GROUP_RANK" => "0",
    ///         "MASTER_ADDR" => "127.0.0.1",
    ///         "MASTER_PORT" => "29500",
    ///         _ => return None,
    ///     };
    ///     Some(value.to_string())
    /// };
    /// let place = Place::detect(&torchrun)?.expect("torchrun's variables are there");
    /// assert_eq!((place.rank, place.world, place.source), (1, 2, "torchrun"));
    /// assert_eq!(place.address.port(), 29501); // torchrun's own store listens at 29500
    /// assert!(Place::detect(&|_| None)?.is_none());
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// When a variable is missing or malformed, or two contradict each other.
    pub fn detect(get: Lookup<'_>) -> Result<Option<Self>> {
        Ok(super::detect(get)?.place)
    }

    /// Compare what the program asks for, devices on each machine and machines, with what was started. What it does not ask
    /// for fits.
    ///
    /// ```
    /// use fabric::environment::Place;
    ///
    /// let place = Place::new("ours", 0, 4, ([127, 0, 0, 1], 4000).into());
    /// place.validate(Some(4), Some(1))?;
    /// place.validate(None, None)?;
    /// assert!(place.validate(Some(2), None).is_err());
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// When they contradict each other: a rank that believes in another world would train on another share of the data.
    pub fn validate(&self, devices: Option<usize>, nodes: Option<usize>) -> Result<()> {
        let asked = match (devices, nodes) {
            (None, None) => return Ok(()),
            (Some(devices), Some(nodes)) => format!(
                "{devices} devices on each of {nodes} machines were asked for, which makes {} ranks",
                devices.saturating_mul(nodes)
            ),
            (Some(devices), None) => {
                format!("{devices} devices on each machine were asked for")
            }
            (None, Some(nodes)) => format!("{nodes} machines were asked for"),
        };
        let machines = nodes.unwrap_or(self.nodes);
        // Not by this machine's ranks: all ranks must come to the same verdict.
        let fits = match devices {
            Some(devices) => devices.checked_mul(machines) == Some(self.world),
            None => machines == self.nodes,
        };
        if fits {
            return Ok(());
        }
        Err(Error::argument(
            format!(
                "{asked}, but {} started {} ranks on {} machines ({})",
                self.source, self.world, self.nodes, self.told
            ),
            format!(
                "Ask for what {} starts (or for \"auto\" devices), or have it start what is asked for",
                self.source
            ),
        ))
    }

    /// What must hold of every place, whoever read it.
    pub(super) fn check(&self) -> Result<()> {
        let numbers = Numbers {
            rank: Number::new("rank", self.rank),
            world: Number::new("world", self.world),
            local_rank: Number::new("local_rank", self.local_rank),
            local_world: Number::new("local_world", self.local_world),
            node_rank: Number::new("node_rank", self.node_rank),
            nodes: Number::new("nodes", self.nodes),
        };
        numbers.check(|name, value, what| {
            Error::argument(
                format!("{}'s {name} is {value}, which {what}", self.source),
                "Correct the environment that says so",
            )
        })?;
        if self.address.ip().is_loopback() || self.secret.is_given() {
            return Ok(());
        }
        Err(Error::argument(
            format!(
                "the ranks meet at {}, which others can reach, and FABRIC_SECRET is not set",
                self.address
            ),
            "Give all ranks the same: export FABRIC_SECRET=$(openssl rand -hex 32), before they are started",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place {
            nodes: 2,
            local_world: 2,
            local_rank: 1,
            node_rank: 1,
            told: "WORLD_SIZE=4, GROUP_WORLD_SIZE=2".into(),
            ..Place::new("torchrun", 3, 4, ([127, 0, 0, 1], 1).into())
        }
    }

    // BUG-01, ENV-01, line 5
    #[test]
    fn what_is_asked_for_must_be_what_was_started() {
        for (devices, nodes) in [
            (None, None),
            (Some(2), None),
            (None, Some(2)),
            (Some(2), Some(2)),
            (Some(4), Some(1)), // the same four ranks
        ] {
            place().validate(devices, nodes).unwrap();
        }
        for (devices, nodes) in [
            (Some(1), None),
            (Some(4), None),
            (None, Some(1)),
            (Some(2), Some(1)),
            (Some(4), Some(2)),
            (Some(usize::MAX), Some(2)),
        ] {
            let text = place().validate(devices, nodes).unwrap_err().to_string();
            for words in ["torchrun started 4 ranks on 2 machines", "WORLD_SIZE=4"] {
                assert!(text.contains(words), "{text}");
            }
        }
        let text = place().validate(Some(3), Some(2)).unwrap_err().to_string();
        assert!(text.contains("makes 6 ranks"), "{text}");
    }

    #[test]
    fn a_place_that_cannot_be_is_refused() {
        for wrong in [
            Place { rank: 4, ..place() },
            Place {
                world: 0,
                ..place()
            },
            Place {
                node_rank: 2,
                ..place()
            },
            Place {
                nodes: 5,
                ..place()
            },
            Place {
                local_world: 5,
                ..place()
            },
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
        place().check().unwrap();
    }

    #[test]
    fn off_loopback_a_secret_is_needed_and_how_to_make_one_is_said() {
        let mut place = place();
        place.address = ([10, 0, 0, 7], 4000).into();
        let text = place.check().unwrap_err().to_string();
        assert!(
            text.contains("10.0.0.7:4000") && text.contains("openssl rand"),
            "{text}"
        );
        place.secret = Secret::from_bytes(b"s");
        place.check().unwrap();
    }
}
