//! The library: where it is looked for, which versions will do, and what is said when there is none.

use std::{
    ffi::{CStr, OsString},
    mem::ManuallyDrop,
    path::Path,
    sync::{Arc, Mutex},
};

use super::raw::{self, Code, Functions, RawComm};
use crate::error::{Error, Result};

/// The environment variable with the path of the library to use.
pub const FABRIC_NCCL: &str = "FABRIC_NCCL";

const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
const OLDEST: Version = Version(21_400); // the first that can do without blocking
const INSTALL: &str = "Install NCCL 2.14 or newer (python's nvidia-nccl-cu13 or nvidia-nccl-cu12, or the system's libnccl2), \
                       put its folder on LD_LIBRARY_PATH, or set FABRIC_NCCL to the file";

/// NCCL's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(i32);

impl Version {
    /// As the library says it: 22803 for 2.28.3.
    pub const fn from_code(code: i32) -> Self {
        Self(code)
    }

    /// As the library says it.
    pub const fn code(self) -> i32 {
        self.0
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Up to 2.8 the first number counted thousands.
        let (major, rest) = match self.0 {
            code if code < 10_000 => (code / 1000, code % 1000),
            code => (code / 10_000, code % 10_000),
        };
        write!(f, "{major}.{}.{}", rest / 100, rest % 100)
    }
}

/// NCCL.
pub struct Library {
    pub(super) functions: Functions,
    version: Version,
    name: String,
    _handle: ManuallyDrop<libloading::Library>, // never unloaded: it has threads of its own
}

impl Library {
    /// The library that `$FABRIC_NCCL` names, or else the loader's `libnccl.so.2` or `libnccl.so`. Loaded once a process.
    ///
    /// # Errors
    /// When there is none, it is something else, or it is older than 2.14.
    pub fn load() -> Result<Arc<Self>> {
        static LOADED: Mutex<Option<Arc<Library>>> = Mutex::new(None);
        let mut loaded = LOADED.lock().unwrap_or_else(|held| held.into_inner());
        if let Some(library) = &*loaded {
            return Ok(library.clone());
        }
        let library = Arc::new(Self::find(std::env::var_os(FABRIC_NCCL))?);
        tracing::info!(name = library.name, version = %library.version, "NCCL");
        Ok(loaded.insert(library).clone())
    }

    /// The library in this file, whatever else is loaded.
    ///
    /// # Errors
    /// As [`Library::load`].
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>> {
        Self::first(&[path.as_ref().into()], INSTALL.to_string()).map(Arc::new)
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The name or path by which it was found.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the variable names, or else what the loader finds.
    fn find(asked: Option<OsString>) -> Result<Self> {
        match asked.filter(|path| !path.is_empty()) {
            Some(path) => {
                let hint = format!("{FABRIC_NCCL} names it: correct or unset it. {INSTALL}");
                Self::first(&[path], hint)
            }
            None => Self::first(&NAMES.map(OsString::from), INSTALL.to_string()),
        }
    }

    /// The first of these that the loader finds.
    fn first(names: &[OsString], hint: String) -> Result<Self> {
        let mut said = Vec::new();
        for name in names {
            // SAFETY: NCCL's initialisers only read the environment; a file that is no NCCL is what the user asked for.
            match unsafe { libloading::Library::new(name) } {
                Ok(handle) => return Self::of(handle, name.to_string_lossy().into_owned(), hint),
                Err(error) => said.push(format!("{}: {}", name.display(), chain(&error))),
            }
        }
        Err(missing(
            format!("the loader found none: {}", said.join("; ")),
            hint,
        ))
    }

    fn of(handle: libloading::Library, name: String, hint: String) -> Result<Self> {
        let functions = Functions::resolve(&handle).map_err(|symbol| {
            let what = format!("{name} has no {symbol}, so it is no NCCL from {OLDEST} on");
            missing(what, hint.clone())
        })?;
        let mut code = 0;
        // SAFETY: a place for the version.
        let result = unsafe { (functions.version)(&mut code) };
        let version = Version(code);
        if result != raw::SUCCESS || version < OLDEST {
            let what = format!("{name} is NCCL {version}; the oldest that will do is {OLDEST}");
            return Err(missing(what, hint));
        }
        Ok(Self {
            functions,
            version,
            name,
            _handle: ManuallyDrop::new(handle),
        })
    }

    /// `code` of `operation` as an error, with the library's own words on it; nothing where it is none.
    pub(super) fn check(
        &self,
        rank: Option<usize>,
        operation: &str,
        code: Code,
        comm: RawComm,
    ) -> Result<()> {
        match code {
            raw::SUCCESS | raw::IN_PROGRESS => Ok(()),
            _ => Err(self.error(rank, operation, code, comm)),
        }
    }

    /// The same for what is an error.
    pub(super) fn error(
        &self,
        rank: Option<usize>,
        operation: &str,
        code: Code,
        comm: RawComm,
    ) -> Error {
        let name = raw::name(code);
        let what = match self.last_words(comm) {
            words if words.is_empty() => name.to_string(),
            words => format!("{name}: {words}"),
        };
        let hint = match code {
            raw::INVALID_ARGUMENT | raw::INVALID_USAGE => {
                "All ranks must make the same calls with the same sizes and types, each on its own device"
            }
            raw::REMOTE_ERROR => {
                "Look at the other ranks' output: one of them stopped, or the network did"
            }
            _ => "Run again with NCCL_DEBUG=WARN: NCCL then says what it met",
        };
        Error::Nccl {
            rank,
            operation: operation.into(),
            code: Some(code),
            what,
            hint: hint.into(),
        }
    }

    fn last_words(&self, comm: RawComm) -> String {
        // SAFETY: the function takes a communicator that is alive, or none.
        let words = unsafe { (self.functions.last_error)(comm) };
        if words.is_null() {
            return String::new();
        }
        // SAFETY: a text that ends, which the library keeps until the thread's next call.
        let words = unsafe { CStr::from_ptr(words) };
        words
            .to_string_lossy()
            .trim()
            .trim_end_matches('.')
            .to_string()
    }

    /// The error of a function that this version lacks.
    pub(super) fn lacks(&self, rank: Option<usize>, function: &str, since: &str) -> Error {
        Error::Nccl {
            rank,
            operation: function.into(),
            code: None,
            what: format!("NCCL {} has no such function", self.version),
            hint: format!("Install NCCL {since} or newer"),
        }
    }
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NCCL {} ({})", self.version, self.name)
    }
}

/// An error and what is below it: the loader's own words are there.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(below) => chain(below),
        None => error.to_string(),
    }
}

fn missing(what: String, hint: String) -> Error {
    Error::Nccl {
        rank: None,
        operation: "load NCCL".into(),
        code: None,
        what,
        hint,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &str) -> String {
        Library::find(Some(path.into())).unwrap_err().to_string()
    }

    #[test]
    fn a_library_that_is_not_there_is_an_error_that_says_who_asked_for_it() {
        let said = refusal("/nowhere/libnccl.so.2");
        for part in [
            "load NCCL",
            "/nowhere/libnccl.so.2",
            "cannot open",
            "FABRIC_NCCL names it",
        ] {
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn a_file_that_is_no_library_is_an_error() {
        let path = std::env::temp_dir().join(format!("no-library-{}", std::process::id()));
        std::fs::write(&path, "not a library").unwrap();
        let said = refusal(path.to_str().unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(
            said.contains("no-library") && said.contains("FABRIC_NCCL"),
            "{said}"
        );
    }

    #[test]
    fn a_library_without_the_functions_is_an_error() {
        let said = refusal("libm.so.6");
        assert!(
            said.contains("libm.so.6 has no ncclGetVersion") && said.contains("2.14.0"),
            "{said}"
        );
    }

    #[test]
    fn versions_are_said_as_their_makers_do() {
        for (code, name) in [
            (2708, "2.7.8"),
            (21_405, "2.14.5"),
            (22_803, "2.28.3"),
            (23_203, "2.32.3"),
        ] {
            assert_eq!(Version::from_code(code).to_string(), name);
        }
        assert!(Version(2804) < OLDEST && OLDEST < Version(23_203));
    }
}
