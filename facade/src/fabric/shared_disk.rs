//! Whether all ranks see the same folder: what decides who may prepare data for whom, and who can write checkpoints together.

use std::{
    ffi::OsString,
    fs::Permissions,
    io::Write,
    os::unix::{ffi::OsStringExt, fs::PermissionsExt},
    path::Path,
};

use super::Fabric;
use crate::error::{Error, Result};

const MARK_BYTES: usize = 16;

impl Fabric {
    /// Whether `path`, a folder or a file, is on a file system that all ranks share. Rank 0 leaves a file of a random name and
    /// content beside it; the others look for it once it is there; it is removed again. Nobody waits on a clock. `false` where
    /// ranks name different paths. All ranks call this together.
    ///
    /// ```
    /// use fabric::Fabric;
    ///
    /// let fabric = Fabric::builder().devices(2).build()?;
    /// let folder = tempfile::tempdir()?;
    /// let shared = fabric.launch_threads(|fabric| fabric.is_shared_filesystem(folder.path()))?;
    /// assert_eq!(shared, [true, true]);
    /// # Ok::<(), fabric::Error>(())
    /// ```
    ///
    /// # Errors
    /// On all ranks: before launch, when the path is on one of them missing, when rank 0 may not write there, or when a rank is
    /// gone.
    pub fn is_shared_filesystem(&self, path: impl AsRef<Path>) -> Result<bool> {
        let path = std::path::absolute(path)?;
        let place = path.canonicalize();
        let text = |path: &Path| path.as_os_str().as_encoded_bytes().to_vec();
        let found = place.as_ref().map(|place| text(place));
        let mine = (text(&path), found.map_err(ToString::to_string));
        let all = self.all_gather_object(&mine)?;
        let same_name = all.iter().all(|(name, _)| *name == all[0].0);
        // One place may have several names, by symbolic links.
        let same_place = all
            .iter()
            .all(|(_, place)| place.is_ok() && *place == all[0].1);
        if !same_name && !same_place {
            return Ok(false);
        }
        for (rank, (_, place)) in all.iter().enumerate() {
            if let Err(why) = place {
                return Err(Error::argument(
                    format!("rank {rank} does not find {}: {why}", path.display()),
                    "Name a folder, or a file, that is there on all ranks",
                ));
            }
        }
        if all.len() == 1 || !same_place {
            return Ok(same_place); // alone, a rank shares with itself, also where it may not write
        }
        let place = place?;
        let folder = match place.parent() {
            Some(parent) if !place.is_dir() => parent,
            _ => &place,
        };
        let mark = match self.is_global_zero() {
            true => Some(Mark::leave(folder)),
            false => None,
        };
        let told = match &mark {
            Some(Ok(mark)) => Ok((text(mark.file.path()), mark.bytes)),
            Some(Err(error)) => Err(error.to_string()),
            None => Err(String::new()), // rank 0's counts
        };
        // What rank 0 has written is there before anybody hears of it.
        let (name, bytes) = self.broadcast(told, 0)?.map_err(|why| {
            Error::argument(
                format!(
                    "rank 0 cannot leave a file in {} for the others to find: {why}",
                    folder.display()
                ),
                "Name a folder in which rank 0 may write",
            )
        })?;
        let found = std::fs::read(OsString::from_vec(name)).is_ok_and(|found| found == bytes);
        // Nobody comes back from this before all have looked; then the file goes.
        self.reduce_boolean_decision(found, true)
    }
}

/// A file that is removed when it is dropped.
struct Mark {
    file: tempfile::NamedTempFile,
    bytes: [u8; MARK_BYTES],
}

impl Mark {
    fn leave(folder: &Path) -> Result<Self> {
        let mut bytes = [0; MARK_BYTES];
        getrandom::fill(&mut bytes)?;
        let mut file = tempfile::Builder::new()
            .prefix(".fabric-mark-")
            .rand_bytes(MARK_BYTES)
            .permissions(Permissions::from_mode(0o644)) // ranks may be other users'
            .tempfile_in(folder)?;
        file.write_all(&bytes)?;
        file.as_file().sync_all()?;
        Ok(Self { file, bytes })
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn on(world: usize, path: impl Fn(usize) -> PathBuf + Sync) -> Result<Vec<bool>> {
        let fabric = Fabric::builder().devices(world).build()?;
        fabric.launch_threads(|fabric| fabric.is_shared_filesystem(path(fabric.global_rank())))
    }

    // UTIL-31, line 35
    #[test]
    fn line_35_ranks_that_name_one_folder_share_it_and_nothing_is_left_in_it() {
        let room = tempfile::tempdir().unwrap();
        let file = room.path().join("data.bin");
        std::fs::write(&file, b"data").unwrap();
        let link = room.path().join("link");
        std::os::unix::fs::symlink(room.path(), &link).unwrap();
        for world in [1, 3] {
            assert!(
                on(world, |_| room.path().into())
                    .unwrap()
                    .iter()
                    .all(|shared| *shared)
            );
            assert!(
                on(world, |_| file.clone())
                    .unwrap()
                    .iter()
                    .all(|shared| *shared)
            );
        }
        // One of them comes to it by another name.
        let by_link = |rank| {
            if rank == 1 {
                link.clone()
            } else {
                room.path().into()
            }
        };
        assert_eq!(on(2, by_link).unwrap(), [true, true]);
        assert_eq!(std::fs::read_dir(room.path()).unwrap().count(), 2);
    }

    // UTIL-31, line 35
    #[test]
    fn ranks_that_name_different_folders_share_none() {
        let rooms = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        assert_eq!(
            on(2, |rank| rooms[rank].path().into()).unwrap(),
            [false, false]
        );
        // Not even when one of them is missing.
        let one = |rank: usize| rooms[0].path().join(["", "missing"][rank]);
        assert_eq!(on(2, one).unwrap(), [false, false]);
    }

    // UTIL-31, line 35
    #[test]
    fn a_path_that_is_missing_is_an_error_in_any_world() {
        let room = tempfile::tempdir().unwrap();
        for world in [1, 2] {
            let text = on(world, |_| room.path().join("missing"))
                .unwrap_err()
                .to_string();
            assert!(text.contains("rank 0 does not find"), "{text}");
        }
    }

    #[test]
    fn a_folder_in_which_rank_0_may_not_write_is_refused_on_all_ranks() {
        // No user may, not even the system's own.
        let Err(error) = on(2, |_| "/proc/self".into()) else {
            panic!("a file was made in /proc")
        };
        assert!(
            error
                .to_string()
                .contains("rank 0 cannot leave a file in /proc"),
            "{error}"
        );
    }
}
