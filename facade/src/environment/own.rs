//! The variables that our own supervisor sets: `FABRIC_RANK` and its kin.

use std::net::{IpAddr, SocketAddr};

use super::{
    Lookup, Place,
    variables::{Ranks, Variables},
};
use crate::Result;

pub(super) const RANKS: Ranks = [
    "FABRIC_RANK",
    "FABRIC_WORLD_SIZE",
    "FABRIC_LOCAL_RANK",
    "FABRIC_LOCAL_WORLD_SIZE",
    "FABRIC_NODE_RANK",
];
const LAUNCHER: &str = "fabric's supervisor";

pub(super) fn read(get: Lookup<'_>) -> Result<Place> {
    let required = [RANKS.as_slice(), &["FABRIC_ADDR", "FABRIC_PORT"]].concat();
    let variables = Variables::new(get, LAUNCHER, &required)?;
    let ip: IpAddr = variables.parse("FABRIC_ADDR", "an IP address")?;
    let address = SocketAddr::new(ip, variables.port("FABRIC_PORT")?);
    variables.place(RANKS, address, "fabric", supervisor(get)?.is_some())
}

/// The process id of the supervisor that watches this process, when there is one.
///
/// # Errors
/// When `FABRIC_SUPERVISOR` is not a process id.
pub fn supervisor(get: Lookup<'_>) -> Result<Option<u32>> {
    Variables::new(get, LAUNCHER, &[])?.maybe("FABRIC_SUPERVISOR", "a process id")
}
