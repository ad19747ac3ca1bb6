//! Where a rank listens: a TCP port, or a Unix socket with a random abstract name, which no file system sees and which is
//! told to the job's ranks alone. Behind a Unix socket's name only processes of the same user are let in.

use std::{
    fmt, io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        linux::net::SocketAddrExt,
        unix::net::{self, UnixListener, UnixStream},
    },
    time::Duration,
};

use rustix::{net::sockopt::socket_peercred, process::geteuid};

use crate::wire::stream::Socket;

/// The random part of a Unix socket's name.
pub(super) type Name = [u8; 32];

/// What a rank listens at.
pub(super) enum Door {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Where to find a door.
#[derive(Clone, Copy)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(Name),
}

impl Door {
    pub(super) fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => listener.set_nonblocking(true),
            Self::Unix(listener) => listener.set_nonblocking(true),
        }
    }

    /// The next who knocks; `None` in its place when it is another user's.
    pub(super) fn accept(&self) -> io::Result<Option<Socket>> {
        match self {
            Self::Tcp(listener) => Ok(Some(Socket::Tcp(listener.accept()?.0))),
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                Ok(same_user(&stream).is_ok().then_some(Socket::Unix(stream)))
            }
        }
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Address {
    /// Connect, within `patience`; a Unix socket is there or not.
    pub(super) fn connect(&self, patience: Duration) -> io::Result<Socket> {
        match self {
            Self::Tcp(address) => TcpStream::connect_timeout(address, patience).map(Socket::Tcp),
            Self::Unix(name) => {
                let stream = UnixStream::connect_addr(&unix(name)?)?;
                same_user(&stream)?;
                Ok(Socket::Unix(stream))
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(_) => f.write_str("a Unix socket of this job"), // whoever knows its name may knock
        }
    }
}

/// Listen behind `name`, without ever waiting for somebody.
pub(super) fn listen(name: &Name) -> io::Result<UnixListener> {
    let listener = UnixListener::bind_addr(&unix(name)?)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The abstract address of that name.
pub(super) fn unix(name: &Name) -> io::Result<net::SocketAddr> {
    let hex = name.iter().map(|byte| format!("{byte:02x}"));
    net::SocketAddr::from_abstract_name(format!("fabric-{}", hex.collect::<String>()))
}

/// Refuse a process of another user at the other end.
pub(super) fn same_user(stream: &UnixStream) -> io::Result<()> {
    let peer = socket_peercred(stream.as_fd())?;
    if peer.uid == geteuid() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "it belongs to user {}",
        peer.uid.as_raw()
    )))
}

/// What two processes must have in common to meet without a network: the boot, the user, the network (abstract names live
/// in it) and the process numbers. Ranks for which any is unknown have nothing in common with anybody.
pub(super) fn machine() -> String {
    let read = || -> io::Result<String> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let network = std::fs::read_link("/proc/self/ns/net")?;
        let processes = std::fs::read_link("/proc/self/ns/pid")?;
        let user = geteuid().as_raw();
        Ok(format!(
            "{} {user} {} {}",
            boot.trim(),
            network.display(),
            processes.display()
        ))
    };
    read().unwrap_or_else(|error| format!("unknown, process {}: {error}", std::process::id()))
}
