//! One connection between two ranks, over TCP or over a Unix socket: what a lane and a handshake need of it, chosen by
//! a `match` and not by a pointer.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    net::TcpStream,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

/// A connected stream.
#[derive(Debug)]
pub enum Socket {
    /// Between machines, or on loopback.
    Tcp(TcpStream),
    /// Between processes of one machine.
    Unix(UnixStream),
}

impl Socket {
    /// Whether reads and writes return at once.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn set_nonblocking(&self, at_once: bool) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(at_once),
            Self::Unix(stream) => stream.set_nonblocking(at_once),
        }
    }

    /// Send what is written at once, however little it is.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn set_nodelay(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nodelay(true),
            Self::Unix(_) => Ok(()), // it never waits
        }
    }

    /// How much may be in flight, each way.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn set_buffers(&self, bytes: usize) -> io::Result<()> {
        let socket = socket2::SockRef::from(self);
        socket.set_send_buffer_size(bytes)?;
        socket.set_recv_buffer_size(bytes)
    }

    /// How long a blocking read may take.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn set_read_timeout(&self, patience: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(patience),
            Self::Unix(stream) => stream.set_read_timeout(patience),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(bytes),
            Self::Unix(stream) => stream.read(bytes),
        }
    }

    fn read_vectored(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read_vectored(parts),
            Self::Unix(stream) => stream.read_vectored(parts),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write_vectored(parts),
            Self::Unix(stream) => stream.write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // a socket keeps nothing back
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}
