//! Who am I: a process's rank, and where its job meets, as the launcher that started it wrote them in the environment.
//!
//! Each launcher is a [`ClusterEnvironment`]: a list of variables that stand or fall together. Half of them is an error,
//! never a guess, because a rank that believes in the wrong world trains on the wrong share of the data.
//!
//! ```text
//! fabric > torchrun > SLURM > LSF > MPI > Kubernetes     the launcher that ran last knows best
//! ```

mod address;
mod hosts;
mod kubernetes;
mod lsf;
mod mpi;
mod own;
mod place;
mod slurm;
mod torchrun;
mod variables;

pub(crate) use address::resolve;
pub use kubernetes::Kubernetes;
pub use lsf::Lsf;
pub use mpi::Mpi;
pub use own::{Own, supervisor};
pub use place::Place;
pub use slurm::Slurm;
pub use torchrun::Torchrun;

use crate::Result;

/// How variables are looked up: `std::env::var` in a program, a table in a test.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A launcher whose ranks this library can be.
///
/// ```
/// use fabric::{
///     Result,
///     environment::{self, Applies, ClusterEnvironment, Lookup, Place},
/// };
///
/// /// Two processes that a script starts: `WHO=left ./train & WHO=right ./train`.
/// struct Pair;
///
/// impl ClusterEnvironment for Pair {
///     fn name(&self) -> &'static str {
///         "pair"
///     }
///
///     fn applies(&self, get: Lookup<'_>) -> Applies {
///         match get("WHO") {
///             Some(who) => Applies::Yes(format!("the script (WHO={who})")),
///             None => Applies::No,
///         }
///     }
///
///     fn place(&self, get: Lookup<'_>) -> Result<Place> {
///         let rank = usize::from(get("WHO").as_deref() == Some("right"));
///         Ok(Place::new(self.name(), rank, 2, ([127, 0, 0, 1], 4000).into()))
///     }
/// }
///
/// let right = |name: &str| (name == "WHO").then(|| "right".to_string());
/// let found = environment::detect_with(&[&Pair], &right)?;
/// assert_eq!(found.reason, "ranks: 2, started by the script (WHO=right)");
/// assert_eq!(found.place.map(|place| place.rank), Some(1));
/// # Ok::<(), fabric::Error>(())
/// ```
pub trait ClusterEnvironment: Send + Sync {
    /// A short name in lower case.
    fn name(&self) -> &'static str;

    /// Whether this launcher started this process.
    fn applies(&self, get: Lookup<'_>) -> Applies;

    /// This process's place; asked for where the environment applies.
    ///
    /// # Errors
    /// When a variable is missing or malformed, or two contradict each other.
    fn place(&self, get: Lookup<'_>) -> Result<Place>;
}

/// Whether a launcher started this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applies {
    /// It did; in words, as the end of "started by ...".
    Yes(String),
    /// It is here, and did not; a sentence that says why, for the user who expected it.
    Not(String),
    /// Nothing of it is here.
    No,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detection {
    /// This process's place, when a launcher has started it as a rank.
    pub place: Option<Place>,
    /// Why, in one sentence: "ranks: 4, started by SLURM (job 71, SLURM_PROCID=3)".
    pub reason: String,
    /// What a user may have expected to be taken for a launcher, and why it was not; a sentence each.
    pub remarks: Vec<String>,
}

/// Find out who started this process.
///
/// ```
/// let found = fabric::environment::detect(&|_| None)?;
/// assert_eq!((found.place, found.reason.as_str()), (None, "ranks: no launcher has started any"));
/// # Ok::<(), fabric::Error>(())
/// ```
///
/// # Errors
/// When a launcher's variables are there by halves, malformed, or contradict each other.
pub fn detect(get: Lookup<'_>) -> Result<Detection> {
    detect_with(&[], get)
}

/// As [`detect`], with environments of the program's own, which are asked first.
///
/// # Errors
/// As [`detect`].
pub fn detect_with(own: &[&dyn ClusterEnvironment], get: Lookup<'_>) -> Result<Detection> {
    const BUILT_IN: [&dyn ClusterEnvironment; 6] =
        [&Own, &Torchrun, &Slurm, &Lsf, &Mpi, &Kubernetes];

    let mut remarks = Vec::new();
    for environment in own.iter().chain(&BUILT_IN) {
        match environment.applies(get) {
            Applies::No => {}
            Applies::Not(remark) => remarks.push(remark),
            Applies::Yes(how) => {
                let place = environment.place(get)?;
                place.check()?;
                return Ok(Detection {
                    reason: format!("ranks: {}, started by {how}", place.world),
                    place: Some(place),
                    remarks,
                });
            }
        }
    }
    Ok(Detection {
        place: None,
        reason: "ranks: no launcher has started any".into(),
        remarks,
    })
}

/// A table of variables in the place of a process's, for the tests of the launchers.
#[cfg(test)]
mod table {
    use super::*;

    /// Call `f` with a lookup in `base` with `changes`; an empty value takes the variable away.
    pub(super) fn lookup<T>(
        base: &[(&str, &str)],
        changes: &[(&str, &str)],
        f: impl FnOnce(Lookup<'_>) -> T,
    ) -> T {
        f(&|name| {
            let found = |list: &[(&str, &str)]| {
                list.iter()
                    .find(|(known, _)| *known == name)
                    .map(|(_, value)| value.to_string())
            };
            found(changes)
                .or_else(|| found(base))
                .filter(|value| !value.is_empty())
        })
    }

    pub(super) fn place(
        environment: &dyn ClusterEnvironment,
        base: &[(&str, &str)],
        changes: &[(&str, &str)],
    ) -> Result<Place> {
        let place = lookup(base, changes, |get| environment.place(get))?;
        place.check()?;
        Ok(place)
    }

    pub(super) fn refusal(
        environment: &dyn ClusterEnvironment,
        base: &[(&str, &str)],
        changes: &[(&str, &str)],
    ) -> String {
        place(environment, base, changes).unwrap_err().to_string()
    }
}

#[cfg(test)]
mod tests {
    use fabric_engine::rendezvous::Secret;

    use super::{table::lookup, *};

    const OWN: &[(&str, &str)] = &[
        ("FABRIC_RANK", "3"),
        ("FABRIC_WORLD_SIZE", "4"),
        ("FABRIC_LOCAL_RANK", "1"),
        ("FABRIC_LOCAL_WORLD_SIZE", "2"),
        ("FABRIC_NODE_RANK", "1"),
        ("FABRIC_ADDR", "10.0.0.7"),
        ("FABRIC_PORT", "4000"),
        ("FABRIC_SECRET", "00ff"),
    ];
    const TORCHRUN: &[(&str, &str)] = &[
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("GROUP_RANK", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
    ];
    const SLURM: &[(&str, &str)] = &[
        ("SLURM_JOB_ID", "71"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "1"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_STEP_NUM_NODES", "1"),
        // srun --mpi=pmi2
        ("PMI_RANK", "1"),
        ("PMI_SIZE", "2"),
    ];

    fn find(base: &[(&str, &str)], changes: &[(&str, &str)]) -> Result<Detection> {
        lookup(base, changes, detect)
    }

    fn place(base: &[(&str, &str)], changes: &[(&str, &str)]) -> Place {
        find(base, changes).unwrap().place.unwrap()
    }

    fn refusal(base: &[(&str, &str)], changes: &[(&str, &str)]) -> String {
        find(base, changes).unwrap_err().to_string()
    }

    #[test]
    fn without_rank_variables_there_is_no_place() {
        assert_eq!(find(&[], &[]).unwrap().place, None);
        // What a supervisor is told of its part in a job makes no rank.
        let leftovers = [
            ("FABRIC_SECRET", "x"),
            ("FABRIC_NODE_RANK", "1"),
            ("FABRIC_PORT", "1"),
            ("MASTER_ADDR", "h"),
        ];
        assert_eq!(find(&leftovers, &[]).unwrap().place, None);
    }

    #[test]
    fn our_own_variables_give_every_field() {
        let changes = [("FABRIC_SUPERVISOR", "77"), ("FABRIC_NUM_NODES", "2")];
        let expected = Place {
            rank: 3,
            world: 4,
            local_rank: 1,
            local_world: 2,
            node_rank: 1,
            nodes: 2,
            address: "10.0.0.7:4000".parse().unwrap(),
            secret: Secret::from_bytes(b"00ff"),
            source: "fabric",
            told: "FABRIC_WORLD_SIZE=4, FABRIC_NUM_NODES=2".into(),
            supervised: true,
        };
        assert_eq!(place(OWN, &changes), expected);
        assert_eq!(place(OWN, &[]).nodes, 2);
        assert!(refusal(OWN, &[("FABRIC_SECRET", "")]).contains("openssl rand"));
    }

    // ENV-01
    #[test]
    fn torchruns_store_keeps_its_port_and_we_take_the_next() {
        let found = find(TORCHRUN, &[("TORCHELASTIC_RUN_ID", "none")]).unwrap();
        assert_eq!(
            found.reason,
            "ranks: 4, started by torchrun (run none, RANK=3)"
        );
        let found = found.place.unwrap();
        assert_eq!(found.address, "127.0.0.1:29501".parse().unwrap());
        assert_eq!(
            (found.node_rank, found.nodes, found.source, found.supervised),
            (1, 2, "torchrun", false)
        );
        let found = place(TORCHRUN, &[("FABRIC_PORT", "5000"), ("FABRIC_SECRET", "s")]);
        assert_eq!(found.address.port(), 5000);
        assert_eq!(found.secret, Secret::from_bytes(b"s"));
    }

    #[test]
    fn torchruns_host_name_is_resolved_where_it_matters() {
        assert!(
            place(TORCHRUN, &[("MASTER_ADDR", "localhost")])
                .address
                .ip()
                .is_loopback()
        );
        let nowhere = [("MASTER_ADDR", "no such host.invalid")];
        let text = refusal(TORCHRUN, &nowhere);
        assert!(text.contains("MASTER_ADDR"), "{text}");
        // All on one machine: loopback, which needs neither a name nor a secret.
        let one = [nowhere[0], ("LOCAL_WORLD_SIZE", "4"), ("LOCAL_RANK", "3")];
        let one = place(TORCHRUN, &[&one[..], &[("GROUP_RANK", "0")]].concat());
        assert!(one.address.ip().is_loopback());
    }

    // Line 5: torchelastic > SLURM, and our own before both
    #[test]
    fn the_launcher_that_ran_last_wins() {
        let source = |base: &[(&str, &str)], changes: &[(&str, &str)]| place(base, changes).source;
        let all = [OWN, TORCHRUN, SLURM].concat();
        assert_eq!(source(&all, &[]), "fabric");
        assert_eq!(source(&[TORCHRUN, SLURM].concat(), &[]), "torchrun");
        assert_eq!(source(SLURM, &[]), "slurm");
        // An mpirun within the step is the last launcher.
        let mpi = [("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")];
        let found = find(SLURM, &[&mpi[..], &[("FABRIC_PORT", "4000")]].concat()).unwrap();
        assert_eq!(found.place.unwrap().source, "mpi");
        assert!(
            found.remarks[0].contains("SLURM's job 71"),
            "{:?}",
            found.remarks
        );
    }

    // Issue 18504: what was detected, and why, is said
    #[test]
    fn what_was_found_is_said_in_one_sentence() {
        assert_eq!(
            find(SLURM, &[]).unwrap().reason,
            "ranks: 2, started by SLURM (job 71, SLURM_PROCID=1)"
        );
        assert_eq!(
            find(OWN, &[("FABRIC_SUPERVISOR", "77")]).unwrap().reason,
            "ranks: 4, started by fabric's supervisor (process 77, FABRIC_RANK=3)"
        );
        let alone = find(SLURM, &[("SLURM_STEP_ID", "")]).unwrap();
        assert_eq!(
            (alone.place, alone.reason.as_str()),
            (None, "ranks: no launcher has started any")
        );
        assert!(
            alone.remarks[0].contains("srun did not start this process"),
            "{:?}",
            alone.remarks
        );
    }

    #[test]
    fn half_a_set_of_variables_names_all_that_miss() {
        let text = refusal(&[("FABRIC_RANK", "0")], &[]);
        for name in [
            "FABRIC_WORLD_SIZE",
            "FABRIC_LOCAL_RANK",
            "FABRIC_ADDR",
            "FABRIC_PORT",
        ] {
            assert!(text.contains(name), "{text}");
        }
        let text = refusal(TORCHRUN, &[("MASTER_PORT", ""), ("WORLD_SIZE", "")]);
        let missing = "MASTER_ADDR are set, but WORLD_SIZE, MASTER_PORT are not";
        assert!(text.contains(missing), "{text}");
    }

    #[test]
    fn a_malformed_variable_is_shown_with_its_value() {
        for (name, value) in [
            ("FABRIC_RANK", "three"),
            ("FABRIC_WORLD_SIZE", "-1"),
            ("FABRIC_WORLD_SIZE", "0"),
            ("FABRIC_PORT", "0"),
            ("FABRIC_PORT", "70000"),
            ("FABRIC_ADDR", "node-7"),
            ("FABRIC_SUPERVISOR", "self"),
            ("FABRIC_NUM_NODES", "1"),
        ] {
            let text = refusal(OWN, &[(name, value)]);
            assert!(text.contains(name) && text.contains(value), "{text}");
        }
        assert!(refusal(TORCHRUN, &[("MASTER_PORT", "65535")]).contains("FABRIC_PORT"));
    }

    #[test]
    fn ranks_outside_their_world_are_refused() {
        for (name, value) in [
            ("FABRIC_RANK", "4"),
            ("FABRIC_LOCAL_RANK", "2"),
            ("FABRIC_LOCAL_WORLD_SIZE", "5"),
            ("FABRIC_NODE_RANK", "4"),
        ] {
            let text = refusal(OWN, &[(name, value)]);
            assert!(text.contains(&format!("{name} is {value}")), "{text}");
        }
        let text = refusal(OWN, &[("FABRIC_RANK", "0")]);
        assert!(text.contains("FABRIC_LOCAL_RANK is 1"), "{text}");
    }
}
