//! From a sharded checkpoint to the one file: what several ranks have written side by side becomes what [`crate::Fabric::load`]
//! reads as well, and what programs that know nothing of Fabric open as safetensors.

use std::{collections::HashMap, fs, path::Path};

use serde_json::{Map, Value};

use super::{
    VALUES,
    file::{Item, Writer},
    place::{NewFile, refusal},
    stored::Stored,
};
use crate::error::{Error, Result};

/// Merge the sharded checkpoint `folder` into the one file `file`, a few megabytes at a time, however large it is. Needs no
/// ranks, no model and no launch. Everything is looked at before anything is written; the file is written beside its place,
/// synced, and renamed.
///
/// ```no_run
/// fabric::checkpoint::consolidate("out/last", "out/last.safetensors")?;
/// # Ok::<(), fabric::Error>(())
/// ```
///
/// # Errors
/// When the folder is missing, no folder, no checkpoint or not whole; when there is something at `file` already; and when a
/// disk fails.
pub fn consolidate(folder: impl AsRef<Path>, file: impl AsRef<Path>) -> Result<()> {
    consolidate_with(folder, file, &mut |_, _| {})
}

/// As [`consolidate`], telling `progress` after each part how many bytes of tensors are written, and of how many.
///
/// # Errors
/// As [`consolidate`].
pub fn consolidate_with(
    folder: impl AsRef<Path>,
    file: impl AsRef<Path>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let (folder, path) = (folder.as_ref(), file.as_ref());
    must_be_a_folder(folder)?;
    let stored = Stored::open(folder)?;
    if path.symlink_metadata().is_ok() {
        return Err(taken(path));
    }
    let mut items = items(&stored)?;
    items.sort_by(Item::order);
    let total = items.iter().map(bytes_of).sum();

    let failed = |error: std::io::Error| refusal(path, &error);
    let place = NewFile::beside(path)?;
    let values: Map<String, Value> = stored.values.clone().into_iter().collect();
    let metadata = HashMap::from([(VALUES.into(), Value::Object(values).to_string())]);
    let mut writer = Writer::new(place.open()?, items.iter(), Some(metadata)).map_err(failed)?;
    let mut done = 0;
    progress(done, total);
    for item in &items {
        let numel = item.shape.iter().product();
        stored.read_slabs(&item.key, 0..numel, &mut |part, slab| {
            let bytes = part.len() * item.dtype.size();
            writer.put(&slab.as_bytes()[..bytes]).map_err(failed)?;
            done += bytes as u64;
            progress(done, total);
            Ok(())
        })?;
    }
    writer.finish().map_err(failed)?;
    match place.commit_new() {
        Err(error) if path.symlink_metadata().is_ok() => {
            tracing::debug!(%error, "somebody else was faster");
            Err(taken(path))
        }
        result => result,
    }
}

fn must_be_a_folder(folder: &Path) -> Result<()> {
    let shown = folder.display();
    match fs::metadata(folder) {
        Ok(entry) if entry.is_dir() => Ok(()),
        Ok(_) => Err(Error::argument(
            format!("{shown} is a file, and not the folder of a sharded checkpoint"),
            "Use it as it is if it is a checkpoint: fabric inspect says what it holds",
        )),
        Err(error) => Err(Error::argument(
            format!("there is no checkpoint {shown}: {error}"),
            "Give the folder that was given to fabric.save",
        )),
    }
}

fn taken(path: &Path) -> Error {
    Error::argument(
        format!("{} exists already", path.display()),
        "Choose another file, or remove this one",
    )
}

/// What the file is to hold; all of it must be there, as far as the headers of the folder's files tell.
fn items(stored: &Stored) -> Result<Vec<Item>> {
    let item = |name: &str| {
        stored.look(name, 0..stored.numel(name)?)?;
        Ok(Item {
            key: name.into(),
            dtype: stored.dtype(name)?,
            shape: stored.tensor(name)?.shape.clone(),
        })
    };
    stored.below("").map(|(name, _)| item(name)).collect()
}

fn bytes_of(item: &Item) -> u64 {
    let numel: usize = item.shape.iter().product();
    (numel * item.dtype.size()) as u64
}
