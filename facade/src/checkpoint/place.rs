//! The place of a checkpoint: what is written stands beside it under a name of its own, and takes its name when it is whole
//! and on the disk. What had the name before is there until then, and gone afterwards.
//!
//! A file takes the place of a file in one step, by the system's rename. Where one of the two is a folder, Linux exchanges
//! the two names in one step. On file systems that cannot (some network ones) the old one is renamed away first, to the
//! temporary name with `.old` behind it: whoever is killed in the moment between finds it there.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};
use tempfile::{NamedTempFile, TempDir};

use super::stored::Stored;
use crate::error::{Error, Result};

const MOST_NAME_BYTES: usize = 200; // of 255, so that there is room for more

/// A file that is to become a checkpoint.
pub(super) struct NewFile {
    target: Target,
    file: NamedTempFile,
}

/// A folder that is to become a checkpoint.
pub(super) struct NewFolder {
    target: Target,
    folder: TempDir,
}

struct Target {
    path: PathBuf,
    folder: PathBuf, // that it is in
}

impl NewFile {
    /// An empty file beside `path`.
    pub(super) fn beside(path: &Path) -> Result<Self> {
        let target = Target::of(path)?;
        if path.is_dir() {
            target.must_be_a_checkpoint()?;
        }
        let file = tempfile::Builder::new()
            .prefix(&prefix(path))
            .permissions(fs::Permissions::from_mode(0o666)) // less the umask
            .tempfile_in(&target.folder)
            .map_err(|error| refusal(path, &error))?;
        Ok(Self { target, file })
    }

    /// The file, to be written.
    pub(super) fn open(&self) -> Result<fs::File> {
        let file = self.file.as_file().try_clone();
        file.map_err(|error| refusal(&self.target.path, &error))
    }

    /// Take the place, which must still be free.
    pub(super) fn commit_new(self) -> Result<()> {
        let Self { target, file } = self;
        file.persist_noclobber(&target.path)
            .map_err(|error| refusal(&target.path, &error.error))?;
        sync(&target.folder).map_err(|error| refusal(&target.path, &error))
    }

    /// Take the place. Returns what is left of the one before, when it cannot be removed.
    pub(super) fn commit(self) -> Result<Option<PathBuf>> {
        let Self { target, file } = self;
        let refused = |error: io::Error| refusal(&target.path, &error);
        if !target.path.is_dir() {
            file.persist(&target.path)
                .map_err(|error| refused(error.error))?;
            sync(&target.folder).map_err(refused)?;
            return Ok(None);
        }
        let temporary = file.into_temp_path();
        let old = put(&temporary, &target.path).map_err(refused)?;
        // Under its name now stands the folder, or nothing.
        let _ = temporary.keep();
        target.settle(old)
    }
}

impl NewFolder {
    /// An empty folder beside `path`.
    pub(super) fn beside(path: &Path) -> Result<Self> {
        let target = Target::of(path)?;
        if path.exists() {
            target.must_be_a_checkpoint()?;
        }
        let folder = tempfile::Builder::new()
            .prefix(&prefix(path))
            .permissions(fs::Permissions::from_mode(0o777)) // less the umask
            .tempdir_in(&target.folder)
            .map_err(|error| refusal(path, &error))?;
        Ok(Self { target, folder })
    }

    /// Where it is, for ranks that stand in other folders too.
    pub(super) fn path(&self) -> Result<PathBuf> {
        let path = fs::canonicalize(self.folder.path());
        path.map_err(|error| refusal(&self.target.path, &error))
    }

    /// Take the place. Returns what is left of the one before, when it cannot be removed.
    pub(super) fn commit(self) -> Result<Option<PathBuf>> {
        let Self { target, folder } = self;
        let refused = |error: io::Error| refusal(&target.path, &error);
        sync(folder.path()).map_err(refused)?;
        let old = put(folder.path(), &target.path).map_err(refused)?;
        let _ = folder.keep(); // under its name now stands the old one, or nothing
        target.settle(old)
    }
}

impl Target {
    fn of(path: &Path) -> Result<Self> {
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).to_path_buf();
        if path.file_name().is_none() {
            return Err(refusal(path, &"this is no name of a file"));
        }
        fs::create_dir_all(&folder).map_err(|error| refusal(path, &error))?;
        let path = path.to_path_buf();
        Ok(Self { path, folder })
    }

    /// A checkpoint may be replaced, and an empty folder; other people's folders and files may not.
    fn must_be_a_checkpoint(&self) -> Result<()> {
        let is_empty = fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_none());
        if is_empty || Stored::open(&self.path).is_ok() {
            return Ok(());
        }
        Err(Error::argument(
            format!(
                "cannot write the checkpoint {}: something that is no whole checkpoint of this library has this name",
                self.path.display()
            ),
            "Choose another path, or remove what is there",
        ))
    }

    /// The new one has the name: let the disk know, then remove the old one.
    fn settle(&self, old: Option<PathBuf>) -> Result<Option<PathBuf>> {
        sync(&self.folder).map_err(|error| refusal(&self.path, &error))?;
        let Some(old) = old else { return Ok(None) };
        let removed = match old.symlink_metadata() {
            Ok(entry) if entry.is_dir() => fs::remove_dir_all(&old),
            Ok(_) => fs::remove_file(&old),
            Err(error) => Err(error),
        };
        Ok(removed.is_err().then_some(old))
    }
}

/// Why a checkpoint cannot be written.
pub(super) fn refusal(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::argument(
        format!("cannot write the checkpoint {}: {error}", path.display()),
        "Check the folder's rights and the space on its disk",
    )
}

fn prefix(path: &Path) -> OsString {
    let name = path.file_name().unwrap_or_default();
    let mut prefix = OsString::from(".");
    prefix.push(match name.len() > MOST_NAME_BYTES {
        true => "checkpoint".as_ref(),
        false => name,
    });
    prefix.push(".tmp-");
    prefix
}

/// Make names in a folder last.
fn sync(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

/// Give `new` the name `path`. Returns where what had it before stands now.
fn put(new: &Path, path: &Path) -> io::Result<Option<PathBuf>> {
    if let Err(error) = path.symlink_metadata() {
        return match error.kind() {
            io::ErrorKind::NotFound => fs::rename(new, path).map(|()| None),
            _ => Err(error),
        };
    }
    match renameat_with(CWD, new, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(Some(new.to_path_buf())),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => in_two_steps(new, path).map(Some),
        Err(error) => Err(error.into()),
    }
}

/// The same where names cannot be exchanged.
fn in_two_steps(new: &Path, path: &Path) -> io::Result<PathBuf> {
    let mut away = new.as_os_str().to_owned();
    away.push(".old");
    let away = PathBuf::from(away);
    fs::rename(path, &away)?;
    if let Err(error) = fs::rename(new, path) {
        fs::rename(&away, path)?; // as it was
        return Err(error);
    }
    Ok(away)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_change_places_in_one_step_or_in_two() {
        for put in [
            |new: &Path, path: &Path| put(new, path).map(Option::unwrap),
            in_two_steps,
        ] {
            let room = tempfile::tempdir().unwrap();
            let (new, path) = (room.path().join("new"), room.path().join("path"));
            fs::create_dir_all(new.join("inside")).unwrap();
            fs::write(&path, b"old").unwrap();
            let old = put(&new, &path).unwrap();
            assert!(path.join("inside").exists());
            assert_eq!(fs::read(old).unwrap(), b"old");
        }
    }

    #[test]
    fn when_the_new_one_is_lost_the_old_one_stays() {
        let room = tempfile::tempdir().unwrap();
        let (new, path) = (room.path().join("lost"), room.path().join("path"));
        fs::write(&path, b"old").unwrap();
        assert!(in_two_steps(&new, &path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(room.path()).unwrap().count(), 1);
    }
}
