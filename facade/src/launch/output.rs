//! What ranks print: handed through as it is, or line by line with the rank in front, and into files.

use std::{
    fs::{File, OpenOptions},
    io::{self, IsTerminal, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Child,
    thread::JoinHandle,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::ioctl_fionbio,
};

use crate::{Error, Result};

/// Longer lines are cut, so that a rank that never ends one does not fill the memory.
const LONGEST_LINE: usize = 1 << 20;
/// At the end, what stands in a pipe is still read: no pipe holds more.
const FULL_PIPE: usize = 1 << 20;

/// Where the ranks' output goes. The default is the supervisor's own: a terminal stays a terminal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Put `[rank 1] ` before every line; in colour on a terminal, unless NO_COLOR is set.
    pub prefix: bool,
    /// Write `rank-1.out` and `rank-1.err` into this folder too.
    pub folder: Option<PathBuf>,
}

impl Output {
    /// Whether ranks write to the supervisor's output themselves.
    pub(super) fn is_direct(&self) -> bool {
        !self.prefix && self.folder.is_none()
    }

    /// Make the folder, and empty files for `ranks` in it.
    pub(super) fn prepare(&self, ranks: impl Iterator<Item = usize>) -> Result<()> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let failed = |why: io::Error| {
            Error::argument(
                format!(
                    "no files for the ranks' output in '{}': {why}",
                    folder.display()
                ),
                "Name a folder in which this user may write",
            )
        };
        std::fs::create_dir_all(folder).map_err(failed)?;
        for rank in ranks {
            for kind in [Kind::Out, Kind::Err] {
                File::create(log_path(folder, rank, kind)).map_err(failed)?;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Out,
    Err,
}

fn log_path(folder: &Path, rank: usize, kind: Kind) -> PathBuf {
    let ending = match kind {
        Kind::Out => "out",
        Kind::Err => "err",
    };
    folder.join(format!("rank-{rank}.{ending}"))
}

/// A thread that reads what ranks print.
pub(super) struct Printer {
    streams: Vec<Stream>,
    thread: Option<JoinHandle<()>>,
    /// Closed, it tells the thread to read what is there, and end.
    running: Option<UnixStream>,
}

/// One rank's output or error output.
struct Stream {
    /// Until it has ended.
    source: Option<File>,
    kind: Kind,
    log: Option<File>,
    prefix: Vec<u8>,
    /// The begin of a line.
    partial: Vec<u8>,
}

impl Printer {
    pub(super) fn new() -> Self {
        Self {
            streams: Vec::new(),
            thread: None,
            running: None,
        }
    }

    /// Take over the pipes of `child`, which is `rank`.
    pub(super) fn take(&mut self, rank: usize, child: &mut Child, output: &Output) -> Result<()> {
        let out = child.stdout.take().map(OwnedFd::from);
        let err = child.stderr.take().map(OwnedFd::from);
        for (pipe, kind) in [(out, Kind::Out), (err, Kind::Err)] {
            let Some(pipe) = pipe else { continue };
            ioctl_fionbio(&pipe, true)?;
            let log = match &output.folder {
                None => None,
                Some(folder) => {
                    let path = log_path(folder, rank, kind);
                    Some(OpenOptions::new().append(true).create(true).open(path)?)
                }
            };
            let is_terminal = match kind {
                Kind::Out => io::stdout().is_terminal(),
                Kind::Err => io::stderr().is_terminal(),
            };
            let no_color = std::env::var_os("NO_COLOR").is_some_and(|text| !text.is_empty());
            self.streams.push(Stream {
                source: Some(pipe.into()),
                kind,
                log,
                prefix: match output.prefix {
                    true => prefix(rank, is_terminal && !no_color).into_bytes(),
                    false => Vec::new(),
                },
                partial: Vec::new(),
            });
        }
        Ok(())
    }

    /// Begin to read.
    pub(super) fn start(&mut self) -> Result<()> {
        if self.streams.is_empty() {
            return Ok(());
        }
        let (running, watched) = UnixStream::pair()?;
        let mut streams = std::mem::take(&mut self.streams);
        let thread = std::thread::Builder::new().name("fabric-output".into());
        self.thread = Some(thread.spawn(move || copy(&mut streams, &watched))?);
        self.running = Some(running);
        Ok(())
    }

    /// Print what is left; the ranks have ended. What a process that they left behind would print is not waited for.
    pub(super) fn finish(mut self) {
        drop(self.running.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // it does not panic
        }
    }
}

/// `[rank 1] `, in one of six colours.
fn prefix(rank: usize, colored: bool) -> String {
    match colored {
        true => format!("\x1b[{}m[rank {rank}]\x1b[0m ", 31 + (rank + 1) % 6),
        false => format!("[rank {rank}] "),
    }
}

/// Read and print until all streams have ended, or `running` has.
fn copy(streams: &mut [Stream], running: &UnixStream) {
    loop {
        let open = streams.iter().enumerate();
        let (open, sources): (Vec<usize>, Vec<_>) = open
            .filter_map(|(index, stream)| Some((index, stream.source.as_ref()?.as_fd())))
            .unzip();
        if open.is_empty() {
            return;
        }
        let mut fds: Vec<_> = sources
            .into_iter()
            .chain([running.as_fd()])
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let _ = poll(&mut fds, None); // a failed poll only means a look too early
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let ends = ready.last() == Some(&true);
        for (index, is_ready) in open.into_iter().zip(ready) {
            if ends {
                streams[index].read(FULL_PIPE);
                streams[index].end();
            } else if is_ready {
                streams[index].read(1);
            }
        }
        if ends {
            return;
        }
    }
}

impl Stream {
    /// Read what is there, at least `bytes` if there are so many, and print its whole lines.
    fn read(&mut self, bytes: usize) {
        let mut chunk = [0; 1 << 16];
        let mut count = 0;
        while count < bytes
            && let Some(source) = &mut self.source
        {
            match source.read(&mut chunk) {
                Ok(0) => self.end(),
                Ok(length) => {
                    count += length;
                    self.partial.extend_from_slice(&chunk[..length]);
                    self.print_lines();
                }
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.end(),
            }
        }
    }

    fn print_lines(&mut self) {
        let whole = match self.partial.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => end + 1,
            None if self.partial.len() >= LONGEST_LINE => {
                self.partial.push(b'\n');
                self.partial.len()
            }
            None => return,
        };
        let lines: Vec<u8> = self.partial.drain(..whole).collect();
        self.print(&lines);
    }

    /// Print a line that was not ended.
    fn end(&mut self) {
        self.source = None;
        if !self.partial.is_empty() {
            let mut line = std::mem::take(&mut self.partial);
            line.push(b'\n');
            self.print(&line);
        }
    }

    /// Print whole lines in one piece, so that no other rank's stands within them.
    fn print(&mut self, lines: &[u8]) {
        if let Some(log) = &mut self.log
            && let Err(why) = log.write_all(lines)
        {
            eprintln!("fabric: a rank's output can no longer be written to its file: {why}");
            self.log = None;
        }
        let mut text = Vec::with_capacity(lines.len() + self.prefix.len());
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            text.extend_from_slice(&self.prefix);
            text.extend_from_slice(line);
        }
        let printed = match self.kind {
            Kind::Out => io::stdout().write_all(&text),
            Kind::Err => io::stderr().write_all(&text),
        };
        // Whoever reads has left (`| head`): let the rank see it, as if it had written there itself. A file is still read.
        if printed.is_err() && self.log.is_none() {
            self.source = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_colours_on_a_terminal_only() {
        assert_eq!(prefix(12, false), "[rank 12] ");
        assert_eq!(prefix(0, true), "\x1b[32m[rank 0]\x1b[0m ");
        assert_ne!(prefix(0, true)[..5], prefix(1, true)[..5]);
    }

    #[test]
    fn a_folder_that_cannot_be_is_refused() {
        let output = Output {
            folder: Some("/dev/null/logs".into()),
            ..Output::default()
        };
        let text = output.prepare(0..2).unwrap_err().to_string();
        assert!(text.contains("/dev/null/logs"), "{text}");
    }
}
