//! Where the ranks of a job meet: loopback where they are on one machine, else an address that others can reach.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};

use super::variables::Variables;
use crate::{Error, Result};

/// Below the ports that Linux gives to outgoing connections.
const FIRST_PORT: u64 = 15_000;
const PORTS: u64 = 15_000;

/// A port that all ranks of a job derive alike from what names the job.
pub(super) fn port_of(job: &str) -> u16 {
    let number = job.parse::<u64>().unwrap_or_else(|_| {
        // FNV-1a: all ranks must agree, whatever built them.
        job.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    });
    (FIRST_PORT + number % PORTS) as u16 // below 30000
}

/// The meeting point of a job. `hosts`: where the launcher says that rank 0 is, each with the variable that says so, the
/// best first. FABRIC_ADDR is better than all of them.
pub(super) fn meeting(
    variables: &Variables<'_>,
    one_machine: bool,
    hosts: &[(&str, Option<String>)],
    port: u16,
) -> Result<SocketAddr> {
    if let Some(host) = variables.text("FABRIC_ADDR") {
        return named("FABRIC_ADDR", &host, port, one_machine);
    }
    if one_machine {
        return Ok((Ipv4Addr::LOCALHOST, port).into());
    }
    let mut refused = None;
    for (name, host) in hosts {
        let Some(host) = host else { continue };
        match named(name, host, port, one_machine) {
            Ok(address) => return Ok(address),
            Err(error) => refused.get_or_insert(error),
        };
    }
    let names = hosts.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    Err(refused.unwrap_or_else(|| {
        Error::argument(
            format!(
                "the ranks are on several machines, and nothing says where they meet: none of FABRIC_ADDR, {} is set",
                names.join(", ")
            ),
            "Set FABRIC_ADDR to the address of rank 0's machine, on all ranks",
        )
    }))
}

fn named(name: &str, host: &str, port: u16, one_machine: bool) -> Result<SocketAddr> {
    resolve(host, port, one_machine).map_err(|why| {
        Error::argument(
            format!("{name} says that the ranks meet at {host}, which has no address here: {why}"),
            "Set FABRIC_ADDR to the IP address of rank 0's machine, on all ranks",
        )
    })
}

/// The address of `host`, IPv4 first. For several machines, a name that stands for this machine itself has none: Debian
/// knows a machine's own name as 127.0.1.1, where no other can reach it.
pub(crate) fn resolve(
    host: &str,
    port: u16,
    one_machine: bool,
) -> std::result::Result<SocketAddr, String> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    let found = (host, port)
        .to_socket_addrs()
        .map_err(|error| error.to_string())?;
    let mut found: Vec<_> = found.collect();
    if !one_machine && host != "localhost" && !found.is_empty() {
        found.retain(|address| !address.ip().is_loopback());
        if found.is_empty() {
            return Err("this machine knows it as itself alone, by a loopback address".into());
        }
    }
    let first = found
        .iter()
        .find(|address| address.is_ipv4())
        .or(found.first());
    first
        .copied()
        .ok_or_else(|| "the name is known, but has no address".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jobs_number_shows_in_its_port_and_names_have_one_too() {
        assert_eq!(port_of("71"), 15_071);
        assert_eq!(port_of("15071"), 15_071);
        let names = ["prterun-node-1234@1", "prterun-node-1235@1"].map(port_of);
        assert_ne!(names[0], names[1]);
        assert!(names.iter().all(|port| (15_000..30_000).contains(port)));
    }

    #[test]
    fn names_are_resolved_and_addresses_are_taken_as_they_are() {
        assert_eq!(
            resolve("10.1.2.3", 7, false).unwrap(),
            "10.1.2.3:7".parse().unwrap()
        );
        assert_eq!(
            resolve("fd00::2", 7, false).unwrap(),
            "[fd00::2]:7".parse().unwrap()
        );
        assert!(resolve("localhost", 7, true).unwrap().ip().is_loopback());
        assert!(resolve("no such host.invalid", 7, true).is_err());
    }
}
