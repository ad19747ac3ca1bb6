//! Files of loggers: lines that are handed to the system in one piece, and wholes that are replaced in one step.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::Path,
};

use tempfile::NamedTempFile;

use crate::{Error, Result};

/// Open `path` to write behind what is there, and make its folder.
pub(super) fn append(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed("make the folder", folder))?;
    }
    let file = OpenOptions::new().append(true).create(true).open(path);
    file.map_err(failed("open", path))
}

/// The same, for lines: one that a killed process has not ended is ended.
pub(super) fn append_lines(path: &Path) -> Result<File> {
    let mut file = append(path)?;
    let torn = fs::read(path).map(|bytes| bytes.last().is_some_and(|last| *last != b'\n'));
    if torn.map_err(failed("read", path))? {
        file.write_all(b"\n").map_err(failed("write to", path))?;
    }
    Ok(file)
}

/// Write `bytes` as the whole of `path`, in one step that a crash cannot split, and make its folder.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let write = || {
        fs::create_dir_all(folder)?;
        let mut file = NamedTempFile::new_in(folder)?;
        let permissions = match fs::metadata(path) {
            Ok(metadata) => metadata.permissions(),
            Err(_) => readable(folder)?,
        };
        file.as_file().set_permissions(permissions)?; // temporary files are private
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|refused| refused.error)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(failed("write", path))
}

/// The rights of a new file in `folder`: whoever may read the folder may read it.
fn readable(folder: &Path) -> io::Result<fs::Permissions> {
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(folder)?.permissions().mode();
    Ok(fs::Permissions::from_mode(mode & 0o666))
}

pub(super) fn failed<'a>(doing: &'a str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |why| {
        Error::argument(
            format!("a logger cannot {doing} {}: {why}", path.display()),
            "Give it a folder that this user may write to, with room left",
        )
    }
}
