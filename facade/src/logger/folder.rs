//! The folder of a run: `root/name/version_N`, with the first N above those of all earlier runs, or a version of the
//! program's own.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use super::file::failed;
use crate::{Error, Result};

/// Where a run's files are. Nothing is made before the first is written, so that ranks which never log leave nothing
/// behind. Clones are the same run: several loggers can write into one folder.
///
/// ```
/// use fabric::logger::{CsvLogger, Logger, RunFolder, TensorBoardLogger};
///
/// let root = tempfile::tempdir()?;
/// let run = RunFolder::new(root.path(), "digits");
/// let (mut table, mut events) = (CsvLogger::within(&run), TensorBoardLogger::within(&run));
/// table.log_metrics(&[("loss".into(), 0.5)], 0)?;
/// events.log_metrics(&[("loss".into(), 0.5)], 0)?;
/// assert_eq!(run.path()?, root.path().join("digits/version_0"));
/// assert_eq!(run.path()?.read_dir()?.count(), 2);
/// # Ok::<(), fabric::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RunFolder {
    root: PathBuf,
    name: String,
    version: Option<Version>,
    made: Arc<Mutex<Option<PathBuf>>>,
}

/// A run's version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Version {
    /// Its folder is `version_N`.
    Number(u64),
    /// Its folder is called so.
    Text(String),
}

impl From<u64> for Version {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<&str> for Version {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl Version {
    fn folder(&self) -> String {
        match self {
            Self::Number(number) => format!("version_{number}"),
            Self::Text(text) => text.clone(),
        }
    }
}

impl RunFolder {
    /// The next version of the experiment `name` in `root`, in which `~`, `$NAME` and `${NAME}` are replaced by the home
    /// folder and by variables of the environment, where those exist. An empty name leaves its folder out.
    pub fn new(root: impl AsRef<Path>, name: &str) -> Self {
        Self {
            root: expanded(root.as_ref(), &|name| std::env::var(name).ok()),
            name: name.into(),
            version: None,
            made: Arc::default(),
        }
    }

    /// This version, new or not: the run of that version goes on.
    pub fn version(mut self, version: impl Into<Version>) -> Self {
        self.version = Some(version.into());
        self.made = Arc::default();
        self
    }

    /// The experiment's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder of all experiments.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder, made when this is the first use.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn path(&self) -> Result<PathBuf> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &*made {
            return Ok(path.clone());
        }
        let folder = self.root.join(&self.name);
        let path = match &self.version {
            None => next_version(&folder)?,
            Some(version) => {
                let path = folder.join(version.folder());
                fs::create_dir_all(&path).map_err(failed("make the folder", &path))?;
                path
            }
        };
        Ok(made.insert(path).clone())
    }

    /// The version: its number, or its text.
    ///
    /// # Errors
    /// As [`RunFolder::path`].
    pub fn version_text(&self) -> Result<String> {
        let path = self.path()?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok(name.strip_prefix("version_").unwrap_or(&name).to_string())
    }
}

/// Make the next `version_N` in `folder`. Runs that start at the same moment get different ones, because only one of
/// them can make a folder.
fn next_version(folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).map_err(failed("make the folder", folder))?;
    let mut next = 0u64;
    for entry in fs::read_dir(folder).map_err(failed("list", folder))? {
        let name = entry.map_err(failed("list", folder))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("version_"));
        if let Some(number) = number.and_then(|text| text.parse::<u64>().ok()) {
            next = next.max(number.checked_add(1).ok_or_else(|| {
                Error::argument(
                    format!("{} has the last version there is", folder.display()),
                    "Give this run a version of its own",
                )
            })?);
        }
    }
    loop {
        let version = folder.join(format!("version_{next}"));
        match fs::create_dir(&version) {
            Ok(()) => return Ok(version),
            Err(why) if why.kind() == ErrorKind::AlreadyExists => next = next.saturating_add(1),
            Err(why) => return Err(failed("make the folder", &version)(why)),
        }
    }
}

/// The path with `~` and variables replaced; those that do not exist stay as they are, as in a Python program.
fn expanded(path: &Path, get: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    let Some(text) = path.to_str() else {
        return path.into(); // no text, so no variable of ours
    };
    let home = match text.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            get("HOME").map(|home| home + rest)
        }
        _ => None,
    };
    let text = home.as_deref().unwrap_or(text);
    let (mut made, mut rest) = (String::new(), text);
    while let Some(at) = rest.find('$') {
        made += &rest[..at];
        rest = &rest[at..];
        let (name, len) = variable(rest);
        match get(name).filter(|_| !name.is_empty()) {
            Some(value) => made += &value,
            None => made += &rest[..len],
        }
        rest = &rest[len..];
    }
    (made + rest).into()
}

/// The variable with which `text` begins, after its `$`, and the bytes that it takes.
fn variable(text: &str) -> (&str, usize) {
    let after = &text[1..];
    if let Some((name, _)) = after
        .strip_prefix('{')
        .and_then(|inner| inner.split_once('}'))
    {
        return (name, name.len() + 3);
    }
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let len = after.find(|letter| !is_name(letter)).unwrap_or(after.len());
    (&after[..len], len + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    // LOG-03, line 54
    #[test]
    fn homes_and_variables_are_expanded() {
        let get = |name: &str| match name {
            "HOME" => Some("/home/ada".to_string()),
            "RUNS" => Some("runs".to_string()),
            _ => None,
        };
        for (text, expected) in [
            ("~/logs", "/home/ada/logs"),
            ("~", "/home/ada"),
            ("~ada/logs", "~ada/logs"),
            ("/data/$RUNS/x", "/data/runs/x"),
            ("/data/${RUNS}2/$RUNS", "/data/runs2/runs"),
            ("/data/$MISSING/${ALSO}", "/data/$MISSING/${ALSO}"),
            ("a$", "a$"),
            ("a${b", "a${b"),
            ("/plain/path", "/plain/path"),
        ] {
            assert_eq!(
                expanded(Path::new(text), &get),
                Path::new(expected),
                "{text}"
            );
        }
    }

    // LOG-02, LOG-03, line 53
    #[test]
    fn each_run_gets_the_next_version_or_its_own() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("run/version_4")).unwrap();
        fs::create_dir_all(root.path().join("run/version_x")).unwrap();
        for expected in ["5", "6"] {
            let run = RunFolder::new(root.path(), "run");
            let folder = root.path().join(format!("run/version_{expected}"));
            assert!(!folder.exists());
            assert_eq!(run.clone().version_text().unwrap(), expected);
            assert_eq!(run.path().unwrap(), folder);
        }
        let own = RunFolder::new(root.path(), "run").version("best");
        assert_eq!(own.path().unwrap(), root.path().join("run/best"));
        assert_eq!(own.version_text().unwrap(), "best");
        let number = RunFolder::new(root.path(), "").version(4);
        assert_eq!(number.path().unwrap(), root.path().join("version_4"));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let run = RunFolder::new(root.path().join("file"), "run");
        let error = run.path().unwrap_err().to_string();
        assert!(error.contains("file/run"), "{error}");
        fs::create_dir_all(root.path().join(format!("version_{}", u64::MAX))).unwrap();
        assert!(RunFolder::new(root.path(), "").path().is_err());
    }
}
