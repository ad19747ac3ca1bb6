//! Which wires this machine lets a process have. Whether they connect ranks, `fabric doctor` finds out.

use std::{
    io,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
};

use fabric_engine::comm::host::Options;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::Section;

pub(super) fn wires() -> Section {
    let mut section = Section::new("wires");
    let text = |result: io::Result<&str>| match result {
        Ok(what) => what.to_string(),
        Err(why) => format!("no: {why}"),
    };
    section.say("shm", text(memory_file()));
    section.say(
        "unix",
        text(UnixStream::pair().map(|_| "sockets can be made")),
    );
    section.say("tcp", text(loopback()));
    section
}

/// A sealed file in memory, as ranks share: of an arena's size, without a page of it.
fn memory_file() -> io::Result<&'static str> {
    let file = memfd_create(
        "fabric-env",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    let bytes = Options::default().arena_bytes as u64;
    // Beyond the limit a signal would end this process.
    ftruncate(&file, bytes.min(limit.unwrap_or(bytes)))?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok("memfd can be made, and sealed")
}

fn loopback() -> io::Result<&'static str> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    TcpStream::connect(listener.local_addr()?)?;
    Ok("loopback connects")
}
