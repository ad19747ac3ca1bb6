//! What connects the ranks, by name.

use crate::error::{Error, Result};

/// A wire: what is asked for, and not yet what is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// The first of the others that reaches all ranks.
    #[default]
    Auto,
    /// Shared memory.
    Shm,
    /// Unix sockets.
    Unix,
    /// TCP.
    Tcp,
}

impl Wire {
    /// Those that can be asked for by name, the fastest first.
    pub const ALL: [Self; 3] = [Self::Shm, Self::Unix, Self::Tcp];

    /// Read a name, in any case; `what` was set to it.
    ///
    /// # Errors
    /// When there is no such wire.
    pub fn parse(what: &str, text: &str) -> Result<Self> {
        let name = text.trim();
        let mut all = Self::ALL.into_iter().chain([Self::Auto]);
        let found = all.find(|wire| wire.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            Error::argument(
                format!("{what} = '{name}' is not known"),
                "Choose one of auto, shm, unix, tcp",
            )
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Shm => "shm",
            Self::Unix => "unix",
            Self::Tcp => "tcp",
        }
    }
}

impl std::fmt::Display for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
