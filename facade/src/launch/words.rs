//! A rank's last words: where it leaves them, and where its supervisor reads them.
//!
//! They lie in memory of the supervisor that has a name in `/proc` and none in any folder, so that nothing is left behind,
//! however the supervisor ends.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
};

use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const MOST_BYTES: usize = 1 << 20;

/// What a rank says about its own failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LastWords {
    /// The error.
    pub(super) text: String,
    /// Whether it is only the echo of another rank's failure.
    pub(super) from_peer: bool,
}

impl LastWords {
    /// Write them below what stands there, a line in one piece.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        OpenOptions::new()
            .append(true)
            .open(path)?
            .write_all(&line)?;
        Ok(())
    }
}

/// Memory for one rank's last words.
pub(super) struct Slate {
    file: File,
    path: PathBuf,
}

impl Slate {
    pub(super) fn new() -> Result<Self> {
        let file = memfd_create("fabric-last-words", MemfdFlags::CLOEXEC).map_err(|why| {
            Error::argument(
                format!("no memory for the ranks' last words: {why}"),
                "Raise the limit of open files (ulimit -n), or start fewer ranks",
            )
        })?;
        let file = File::from(file);
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        Ok(Self {
            path: path.into(),
            file,
        })
    }

    /// Where a rank of the same user writes.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The last whole line that was written.
    pub(super) fn read(&self) -> Option<LastWords> {
        let length = usize::try_from(self.file.metadata().ok()?.len()).ok()?;
        let mut bytes = vec![0; length.min(MOST_BYTES)];
        self.file.read_exact_at(&mut bytes, 0).ok()?;
        let mut lines = bytes.rsplit(|byte| *byte == b'\n');
        lines.find_map(|line| serde_json::from_slice(line).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str, from_peer: bool) -> LastWords {
        LastWords {
            text: text.into(),
            from_peer,
        }
    }

    #[test]
    fn the_last_of_the_last_words_is_read_and_a_torn_line_is_not() {
        let slate = Slate::new().unwrap();
        assert_eq!(slate.read(), None);
        for words in [words("rank 1 is gone", true), words("a\n\"b\"", false)] {
            words.write(slate.path()).unwrap();
            assert_eq!(slate.read(), Some(words));
        }
        let mut file = OpenOptions::new().append(true).open(slate.path()).unwrap();
        file.write_all(b"{\"text\":\"kil").unwrap();
        assert_eq!(slate.read(), Some(words("a\n\"b\"", false)));
    }

    #[test]
    fn nothing_is_left_when_the_slate_is_gone() {
        let slate = Slate::new().unwrap();
        let path = slate.path().to_owned();
        drop(slate);
        assert!(!path.exists() || words("x", false).write(&path).is_ok()); // the number may be another file's by now
        assert!(words("x", false).write(Path::new("/proc/0/fd/0")).is_err());
    }
}
