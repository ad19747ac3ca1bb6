//! The variables that torchrun sets: `RANK`, `MASTER_ADDR` and their kin.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use super::{
    Lookup, Place,
    variables::{Ranks, Variables},
};
use crate::Result;

pub(super) const RANKS: Ranks = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
];

pub(super) fn read(get: Lookup<'_>) -> Result<Place> {
    let required = [RANKS.as_slice(), &["MASTER_ADDR", "MASTER_PORT"]].concat();
    let variables = Variables::new(get, "torchrun", &required)?;
    let port = match get("FABRIC_PORT") {
        Some(_) => variables.port("FABRIC_PORT")?,
        None => next_port(&variables)?,
    };
    let host: String = variables.parse("MASTER_ADDR", "a host")?;
    let address = resolve(&host, port)
        .map_err(|why| variables.refuse("MASTER_ADDR", &host, format!("has no address: {why}")))?;
    variables.place(RANKS, address, "torchrun", false)
}

/// torchrun's own store listens at `MASTER_PORT`, so rank 0 listens at the port after it.
fn next_port(variables: &Variables<'_>) -> Result<u16> {
    let taken = variables.port("MASTER_PORT")?;
    let what = "leaves no port after it for us; FABRIC_PORT would name one";
    taken
        .checked_add(1)
        .ok_or_else(|| variables.refuse("MASTER_PORT", taken, what))
}

fn resolve(host: &str, port: u16) -> std::result::Result<SocketAddr, String> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    let found: Vec<_> = (host, port)
        .to_socket_addrs()
        .map_err(|error| error.to_string())?
        .collect();
    let first = found
        .iter()
        .find(|address| address.is_ipv4())
        .or(found.first());
    first
        .copied()
        .ok_or_else(|| "the name is known, but has no address".to_string())
}
