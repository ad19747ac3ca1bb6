//! The tuning table of this machine: a file that `coll --tune` writes, and that whoever opens a communicator may load.

use std::path::PathBuf;

use crate::{
    error::{Error, Result},
    schedule::choose::Tuning,
};

/// Names another file than the usual one.
pub const FABRIC_TUNING: &str = "FABRIC_TUNING";

/// Where this machine's table is kept: the file that `FABRIC_TUNING` names, or `fabric/tuning` in the user's folder of
/// configurations; `None` for a user who has no such folder.
pub fn tuning_path() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from);
    folder(FABRIC_TUNING).or_else(|| {
        let configurations = folder("XDG_CONFIG_HOME");
        let configurations = configurations.or_else(|| Some(folder("HOME")?.join(".config")));
        Some(configurations?.join("fabric").join("tuning"))
    })
}

/// This machine's table, or the shipped one where nobody has measured. Of all ranks' tables rank 0's is used.
///
/// # Errors
/// When the file cannot be read, or is no table; when `FABRIC_TUNING` names a file that is not there.
pub fn tuning() -> Result<Tuning> {
    let Some(path) = tuning_path() else {
        return Ok(Tuning::default());
    };
    let hint = "Run `coll --tune` to write it anew, or remove it for the shipped table";
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error)
            if error.kind() == std::io::ErrorKind::NotFound
                && std::env::var_os(FABRIC_TUNING).is_none() =>
        {
            return Ok(Tuning::default());
        }
        Err(error) => {
            let what = format!(
                "the tuning table {} cannot be read: {error}",
                path.display()
            );
            return Err(Error::argument(what, hint));
        }
    };
    Tuning::parse(&text).map_err(|error| {
        let what = format!("{} is no tuning table: {error}", path.display());
        Error::argument(what, hint)
    })
}
