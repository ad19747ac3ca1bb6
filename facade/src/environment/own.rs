//! Our own supervisor's variables: `FABRIC_RANK` and its kin.

use std::net::{IpAddr, SocketAddr};

use super::{
    Applies, ClusterEnvironment, Lookup, Place,
    variables::{Number, Numbers, Variables},
};
use crate::Result;

/// The environment that `fabric.launch` and `fabric run` make for their ranks.
///
/// `FABRIC_RANK`, `FABRIC_WORLD_SIZE`, `FABRIC_LOCAL_RANK`, `FABRIC_LOCAL_WORLD_SIZE`, `FABRIC_NODE_RANK`, `FABRIC_ADDR`
/// (an IP address) and `FABRIC_PORT` go together; `FABRIC_NUM_NODES` and `FABRIC_SECRET` may be added. FABRIC_NODE_RANK,
/// FABRIC_ADDR, FABRIC_PORT and FABRIC_SECRET alone make no rank: they tell a supervisor of its part in a job on several
/// machines.
#[derive(Clone, Copy, Debug)]
pub struct Own;

const RANKS: [&str; 4] = [
    "FABRIC_RANK",
    "FABRIC_WORLD_SIZE",
    "FABRIC_LOCAL_RANK",
    "FABRIC_LOCAL_WORLD_SIZE",
];
const LAUNCHER: &str = "fabric's supervisor";

impl ClusterEnvironment for Own {
    fn name(&self) -> &'static str {
        "fabric"
    }

    fn applies(&self, get: Lookup<'_>) -> Applies {
        if !Variables::any(get, &RANKS) {
            return Applies::No;
        }
        let rank = get("FABRIC_RANK").unwrap_or_default();
        Applies::Yes(match get("FABRIC_SUPERVISOR") {
            Some(pid) => format!("fabric's supervisor (process {pid}, FABRIC_RANK={rank})"),
            None => format!("hand (FABRIC_RANK={rank})"),
        })
    }

    fn place(&self, get: Lookup<'_>) -> Result<Place> {
        let rest = ["FABRIC_NODE_RANK", "FABRIC_ADDR", "FABRIC_PORT"];
        let required = [RANKS.as_slice(), &rest].concat();
        let variables = Variables::new(get, LAUNCHER, &required)?;
        let ip: IpAddr = variables.parse("FABRIC_ADDR", "an IP address")?;
        let address = SocketAddr::new(ip, variables.port("FABRIC_PORT")?);
        let [rank, world, local_rank, local_world] = RANKS.map(|name| variables.number(name));
        let (world, local_world) = (world?, local_world?);
        let node_rank = variables.number("FABRIC_NODE_RANK")?;
        let numbers = Numbers {
            rank: rank?,
            world,
            local_rank: local_rank?,
            local_world,
            node_rank,
            nodes: variables
                .first_number(&["FABRIC_NUM_NODES"])?
                .unwrap_or_else(|| nodes(world, local_world, node_rank)),
        };
        let place = variables.place(numbers, address, "fabric")?;
        Ok(Place {
            supervised: supervisor(get)?.is_some(),
            ..place
        })
    }
}

/// How many machines there are, as far as a rank can tell, where no variable says it.
pub(super) fn nodes(world: Number, local_world: Number, node_rank: Number) -> Number {
    let nodes = world.value.div_ceil(local_world.value.max(1));
    Number::new("machines", nodes.max(node_rank.value + 1).min(world.value))
}

/// The process id of the supervisor that watches this process, when there is one.
///
/// # Errors
/// When `FABRIC_SUPERVISOR` is not a process id.
pub fn supervisor(get: Lookup<'_>) -> Result<Option<u32>> {
    Variables::new(get, LAUNCHER, &[])?.maybe("FABRIC_SUPERVISOR", "a process id")
}
