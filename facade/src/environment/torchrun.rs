//! torchrun's variables: `RANK`, `LOCAL_RANK`, `MASTER_ADDR` and their kin.

use super::{
    Applies, ClusterEnvironment, Lookup, Place,
    address::meeting,
    own::nodes,
    variables::{Numbers, Variables},
};
use crate::Result;

/// The environment of torchrun (torch.distributed.run, torchelastic).
///
/// It sets `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `GROUP_RANK`, `GROUP_WORLD_SIZE`, `MASTER_ADDR`,
/// `MASTER_PORT` and `TORCHELASTIC_RUN_ID`. Its own store listens at `MASTER_PORT`, so our rank 0 listens at the port
/// after it, or at `FABRIC_PORT`.
#[derive(Clone, Copy, Debug)]
pub struct Torchrun;

/// What only torchrun sets; `RANK` and `WORLD_SIZE` others set too.
const MARKS: [&str; 4] = [
    "TORCHELASTIC_RUN_ID",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
];
const REQUIRED: [&str; 7] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
];

impl ClusterEnvironment for Torchrun {
    fn name(&self) -> &'static str {
        "torchrun"
    }

    fn applies(&self, get: Lookup<'_>) -> Applies {
        if !Variables::any(get, &MARKS) {
            return Applies::No;
        }
        let rank = get("RANK").unwrap_or_default();
        Applies::Yes(match get("TORCHELASTIC_RUN_ID") {
            Some(run) => format!("torchrun (run {run}, RANK={rank})"),
            None => format!("torchrun (RANK={rank})"),
        })
    }

    fn place(&self, get: Lookup<'_>) -> Result<Place> {
        let variables = Variables::new(get, "torchrun", &REQUIRED)?;
        let (world, local_world) = (
            variables.number("WORLD_SIZE")?,
            variables.number("LOCAL_WORLD_SIZE")?,
        );
        let node_rank = variables.number("GROUP_RANK")?;
        let numbers = Numbers {
            rank: variables.number("RANK")?,
            world,
            local_rank: variables.number("LOCAL_RANK")?,
            local_world,
            node_rank,
            nodes: variables
                .first_number(&["GROUP_WORLD_SIZE"])?
                .unwrap_or_else(|| nodes(world, local_world, node_rank)),
        };
        let port = match variables.first_port(&["FABRIC_PORT"])? {
            Some(port) => port,
            None => next_port(&variables)?,
        };
        let one_machine = world.value == local_world.value;
        let hosts = [("MASTER_ADDR", variables.text("MASTER_ADDR"))];
        let address = meeting(&variables, one_machine, &hosts, port)?;
        variables.place(numbers, address, "torchrun")
    }
}

fn next_port(variables: &Variables<'_>) -> Result<u16> {
    let taken = variables.port("MASTER_PORT")?;
    let what = "leaves no port after it for us; FABRIC_PORT would name one";
    taken
        .checked_add(1)
        .ok_or_else(|| variables.refuse("MASTER_PORT", taken, what))
}
