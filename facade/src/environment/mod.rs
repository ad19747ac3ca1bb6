//! Who am I: a process's rank, and where its job meets, as the launcher that started it wrote them in the environment.
//!
//! Two launchers are understood: our own supervisor (`FABRIC_*`) and torchrun (`RANK`, `WORLD_SIZE`, ...). Each is a
//! list of variables that stand or fall together: half of them is an error, never a guess, because a rank that believes
//! in the wrong world trains on the wrong share of the data.

mod own;
mod torchrun;
mod variables;

use std::net::SocketAddr;

use fabric_engine::rendezvous::Secret;

pub use own::supervisor;

use crate::Result;
use variables::Variables;

/// How variables are looked up: `std::env::var` in a program, a table in a test.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A process's place in its job.
///
/// ```text
/// node 0: rank 0 (local 0), rank 1 (local 1)      world 4, local_world 2
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
    /// Where rank 0 listens.
    pub address: SocketAddr,
    /// What proves that a process belongs to the job.
    pub secret: Secret,
    /// Who said so: `"fabric"` or `"torchrun"`.
    pub source: &'static str,
    /// Whether our supervisor started this process and watches it.
    pub supervised: bool,
}

impl Place {
    /// Read the place from the variables that `get` finds; `None` when no launcher left any. Our own variables win over
    /// torchrun's, because the launcher that ran last knows best.
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
        if Variables::any(get, own::RANKS) {
            own::read(get).map(Some)
        } else if Variables::any(get, torchrun::RANKS) {
            torchrun::read(get).map(Some)
        } else {
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &[(&str, &str)] = &[
        ("FABRIC_RANK", "3"),
        ("FABRIC_WORLD_SIZE", "4"),
        ("FABRIC_LOCAL_RANK", "1"),
        ("FABRIC_LOCAL_WORLD_SIZE", "2"),
        ("FABRIC_NODE_RANK", "1"),
        ("FABRIC_ADDR", "10.0.0.7"),
        ("FABRIC_PORT", "4000"),
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

    /// Detect in `base` with `changes`; an empty value takes the variable away.
    fn detect(base: &[(&str, &str)], changes: &[(&str, &str)]) -> Result<Option<Place>> {
        Place::detect(&|name| {
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

    fn refusal(base: &[(&str, &str)], changes: &[(&str, &str)]) -> String {
        detect(base, changes).unwrap_err().to_string()
    }

    #[test]
    fn without_rank_variables_there_is_no_place() {
        assert_eq!(detect(&[], &[]).unwrap(), None);
        let leftovers = [
            ("FABRIC_SECRET", "x"),
            ("FABRIC_PORT", "1"),
            ("MASTER_ADDR", "h"),
        ];
        assert_eq!(detect(&leftovers, &[]).unwrap(), None);
    }

    #[test]
    fn our_own_variables_give_every_field() {
        let place = detect(
            OWN,
            &[("FABRIC_SECRET", "00ff"), ("FABRIC_SUPERVISOR", "77")],
        )
        .unwrap()
        .unwrap();
        let expected = Place {
            rank: 3,
            world: 4,
            local_rank: 1,
            local_world: 2,
            node_rank: 1,
            address: "10.0.0.7:4000".parse().unwrap(),
            secret: Secret::from_bytes(b"00ff"),
            source: "fabric",
            supervised: true,
        };
        assert_eq!(place, expected);
        assert!(!detect(OWN, &[]).unwrap().unwrap().secret.is_given());
    }

    #[test]
    fn torchruns_store_keeps_its_port_and_we_take_the_next() {
        let place = detect(TORCHRUN, &[]).unwrap().unwrap();
        assert_eq!(place.address, "127.0.0.1:29501".parse().unwrap());
        assert_eq!(
            (place.node_rank, place.source, place.supervised),
            (1, "torchrun", false)
        );
        let place = detect(TORCHRUN, &[("FABRIC_PORT", "5000"), ("FABRIC_SECRET", "s")])
            .unwrap()
            .unwrap();
        assert_eq!(place.address.port(), 5000);
        assert_eq!(place.secret, Secret::from_bytes(b"s"));
    }

    #[test]
    fn torchruns_host_name_is_resolved_to_ipv4_first() {
        let place = detect(TORCHRUN, &[("MASTER_ADDR", "localhost")])
            .unwrap()
            .unwrap();
        assert!(place.address.ip().is_loopback());
        let text = refusal(TORCHRUN, &[("MASTER_ADDR", "no such host.invalid")]);
        assert!(text.contains("MASTER_ADDR"), "{text}");
    }

    #[test]
    fn the_last_launcher_wins() {
        let both = [OWN, TORCHRUN].concat();
        assert_eq!(detect(&both, &[]).unwrap().unwrap().source, "fabric");
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
