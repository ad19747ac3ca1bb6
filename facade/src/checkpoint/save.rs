//! Writing a checkpoint, by all ranks together: they tell one another what they hold, write (each its own file, or rank 0
//! the one file, to which the others bring what only they hold), and when all have succeeded rank 0 gives it its name.

use std::{
    collections::HashMap,
    fs,
    ops::Range,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use fabric_engine::{
    buffer::Slab,
    comm::{Call, Data, Label, Op, Work},
    kernels::Dtype,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    CHUNK_BYTES, Entry, State, StateDictType, VALUES,
    catalog::{Catalog, Contents, Tensor, Told},
    file::{Item, Writer},
    manifest::{self, Manifest},
    place::{NewFile, NewFolder, refusal},
};
use crate::{
    error::{Error, Result},
    fabric::Fabric,
};

/// What a rank tells the others before anything is written.
#[derive(Serialize, Deserialize)]
struct Report {
    told: std::result::Result<Told, String>,
    folder: Vec<u8>, // rank 0's: where all write
}

/// What rank 0 writes to.
enum Target {
    File(NewFile),
    Folder(NewFolder, PathBuf),
}

/// What rank 0 writes: values, by name.
type Values = Map<String, Value>;

impl Fabric {
    pub(super) fn write(&self, path: &Path, state: &State<'_>) -> Result<()> {
        let prepared = self.prepare(path, state);
        let report = Report {
            told: match &prepared {
                Ok((contents, _)) => Ok(contents.told()),
                Err(error) => Err(error.to_string()),
            },
            folder: match &prepared {
                Ok((_, Some((Target::Folder(_, folder), _)))) => {
                    folder.as_os_str().as_bytes().to_vec()
                }
                _ => Vec::new(),
            },
        };
        let reports = self.all_gather_object(&report);
        let (contents, target) = prepared?; // the first cause
        let mut reports = reports?;
        let folder = PathBuf::from(std::ffi::OsString::from_vec(std::mem::take(
            &mut reports[0].folder,
        )));
        let mut told = Vec::new();
        for (rank, report) in reports.into_iter().enumerate() {
            told.push(
                report
                    .told
                    .map_err(|what| failed(rank, "save", path, &what))?,
            );
        }
        let mut catalog = contents.catalog(&told)?; // every rank finds the same
        let written = match self.state_dict_type() {
            StateDictType::Full => self.write_file(path, &contents, &mut catalog, target.as_ref()),
            StateDictType::Sharded => {
                catalog.balance(self.world_size());
                write_part(&folder, self.global_rank(), &contents, &catalog)
            }
        };
        self.agree_on("save", path, catalog.hash(), written)?;
        let committed = match target {
            Some((target, values)) => self.commit(path, target, values, &catalog),
            None => Ok(()),
        };
        let failure = committed.as_ref().err().map(Error::to_string);
        let heard = self.broadcast(failure, 0);
        let all_heard = match &heard {
            Ok(Some(_)) => self.all_have_heard(),
            _ => Ok(()),
        };
        committed?; // the first cause
        match heard? {
            Some(what) => all_heard.and(Err(failed(0, "save", path, &what))),
            None => Ok(()),
        }
    }

    /// What can fail before the others are asked for anything.
    fn prepare<'a>(
        &self,
        path: &Path,
        state: &'a State<'_>,
    ) -> Result<(Contents<'a>, Option<(Target, Values)>)> {
        state.check_names()?;
        let contents = Contents::of(state)?;
        if !self.is_global_zero() {
            return Ok((contents, None));
        }
        let mut values = Values::new();
        for (name, entry) in &state.entries {
            if let Entry::Value(value) = entry {
                values.insert(name.clone(), value.to_json(name)?);
            }
        }
        let target = match self.state_dict_type() {
            StateDictType::Full => Target::File(NewFile::beside(path)?),
            StateDictType::Sharded => {
                let folder = NewFolder::beside(path)?;
                let at = folder.path()?;
                Target::Folder(folder, at)
            }
        };
        Ok((contents, Some((target, values))))
    }

    /// One file. Rank 0 writes it; what others hold comes to it a part at a time, so that no rank ever needs memory for
    /// more of it. Where something fails the rest still travels, and counts for nothing: ranks stay in step.
    fn write_file(
        &self,
        path: &Path,
        contents: &Contents<'_>,
        catalog: &mut Catalog,
        target: Option<&(Target, Values)>,
    ) -> Result<()> {
        let mut tensors: Vec<(Item, &Tensor)> = catalog.tensors.iter().map(whole).collect();
        tensors.sort_by(|(item, _), (other, _)| item.order(other));
        let mut outcome = Ok(());
        let mut writer = match target {
            Some((Target::File(file), values)) => {
                let mut values = values.clone();
                let steps = catalog.steps.iter();
                values.extend(steps.map(|(name, steps)| (name.clone(), (*steps).into())));
                let metadata = HashMap::from([(VALUES.into(), Value::Object(values).to_string())]);
                let items = tensors.iter().map(|(item, _)| item);
                let writer = file.open().and_then(|file| {
                    Writer::new(file, items, Some(metadata)).map_err(|error| refusal(path, &error))
                });
                keep(&mut outcome, writer)
            }
            _ => None,
        };
        for (_, tensor) in &tensors {
            for (rank, range) in &tensor.pieces {
                for part in chunks(range, tensor.dtype) {
                    let slab =
                        self.bring(contents, tensor, rank.unwrap_or(0), part, &mut outcome)?;
                    if let (Some(writer), Some(slab), true) = (&mut writer, slab, outcome.is_ok()) {
                        let put = writer.put(slab.as_bytes());
                        keep(&mut outcome, put.map_err(|error| refusal(path, &error)));
                    }
                }
            }
        }
        outcome?;
        let Some(writer) = writer else { return Ok(()) };
        writer.finish().map_err(|error| refusal(path, &error))
    }

    /// Elements of a tensor that `rank` holds, on rank 0. An error here is one of the ranks' connection.
    fn bring(
        &self,
        contents: &Contents<'_>,
        tensor: &Tensor,
        rank: usize,
        range: Range<usize>,
        outcome: &mut Result<()>,
    ) -> Result<Option<Slab>> {
        let (own, numel) = (self.global_rank(), range.len());
        if own != 0 && own != rank {
            return Ok(None);
        }
        let comm = self.comm()?;
        let mut slab = match rank {
            0 => Slab::zeroed(tensor.dtype, numel),
            _ => comm.lock().alloc_host(tensor.dtype, numel)?,
        };
        if rank == own {
            let read = contents.read(tensor, range, slab.part_mut(0..numel));
            keep(outcome, read);
        }
        if rank == 0 {
            return Ok(Some(slab));
        }
        let op = match own {
            0 => Op::Recv { from: rank },
            _ => Op::Send { to: 0 },
        };
        let call = Call::new(op);
        let call = call.label(Label::Facade(4)).blocking();
        let work = comm.lock().submit(call, Data::InPlace(slab))?;
        Ok(Some(Work::wait(work)?.into_output()))
    }

    /// All ranks have written: give it its name.
    fn commit(&self, path: &Path, target: Target, values: Values, catalog: &Catalog) -> Result<()> {
        let left = match target {
            Target::File(file) => file.commit()?,
            Target::Folder(folder, at) => {
                let mut manifest = Manifest::new(self.world_size(), self.strategy());
                manifest.values.extend(values);
                manifest.optimizers.extend(catalog.steps.iter().cloned());
                let tensors = catalog.tensors.iter();
                manifest.tensors.extend(tensors.map(listed));
                write_manifest(&at, &manifest).map_err(|error| refusal(path, &error))?;
                folder.commit()?
            }
        };
        if let Some(left) = left {
            self.warn(format!(
                "{} is saved; what was there before is now {} and cannot be removed",
                path.display(),
                left.display()
            ));
        }
        Ok(())
    }
}

/// This rank's file of a sharded checkpoint.
fn write_part(
    folder: &Path,
    rank: usize,
    contents: &Contents<'_>,
    catalog: &Catalog,
) -> Result<()> {
    if !folder.is_dir() {
        return Err(Error::argument(
            format!(
                "rank {rank} does not find the folder {} that rank 0 has made for the checkpoint",
                folder.display()
            ),
            "Save to a file system that all ranks share, or with state_dict_type(\"full\")",
        ));
    }
    let path = folder.join(file_name(rank));
    let failed = |error: std::io::Error| refusal(&path, &error);
    let mut items = Vec::new();
    for tensor in &catalog.tensors {
        for (_, range) in tensor.pieces.iter().filter(|(by, _)| *by == Some(rank)) {
            let (mut item, _) = whole(tensor);
            item.key = tensor.key(range);
            if item.key != tensor.name {
                item.shape = vec![range.len()];
            }
            items.push((item, tensor, range));
        }
    }
    items.sort_by(|(item, ..), (other, ..)| item.order(other));
    let file = fs::File::create_new(&path).map_err(failed)?;
    let listed = items.iter().map(|(item, ..)| item);
    let mut writer = Writer::new(file, listed, None).map_err(failed)?;
    for (_, tensor, range) in &items {
        for part in chunks(range, tensor.dtype) {
            let mut slab = Slab::zeroed(tensor.dtype, part.len());
            let into = slab.part_mut(0..part.len());
            contents.read(tensor, part, into)?;
            writer.put(slab.as_bytes()).map_err(failed)?;
        }
    }
    writer.finish().map_err(failed)
}

fn write_manifest(folder: &Path, manifest: &Manifest) -> std::io::Result<()> {
    let file = fs::File::create_new(folder.join(manifest::NAME))?;
    let mut out = std::io::BufWriter::new(file);
    serde_json::to_writer_pretty(&mut out, manifest)?;
    out.into_inner()
        .map_err(std::io::IntoInnerError::into_error)?
        .sync_all()
}

/// A tensor as the manifest lists it.
fn listed(tensor: &Tensor) -> (String, manifest::Tensor) {
    let piece = |(rank, range): &(Option<usize>, Range<usize>)| {
        let rank = rank.expect("the catalog is balanced: every piece has its writer");
        manifest::Piece::new(file_name(rank), tensor.key(range), range.clone())
    };
    let listed = manifest::Tensor {
        dtype: super::dtype::tensor_dtype(tensor.dtype),
        shape: tensor.shape.clone(),
        pieces: tensor.pieces.iter().map(piece).collect(),
    };
    (tensor.name.clone(), listed)
}

fn file_name(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

fn whole(tensor: &Tensor) -> (Item, &Tensor) {
    let item = Item {
        key: tensor.name.clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
    };
    (item, tensor)
}

/// `range`, at most [`CHUNK_BYTES`] at a time.
fn chunks(range: &Range<usize>, dtype: Dtype) -> impl Iterator<Item = Range<usize>> + use<> {
    let (end, most) = (range.end, CHUNK_BYTES / dtype.size());
    let starts = range.clone().step_by(most);
    starts.map(move |start| start..end.min(start + most))
}

/// Keep the first error.
fn keep<T>(outcome: &mut Result<()>, result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            if outcome.is_ok() {
                *outcome = Err(error);
            }
            None
        }
    }
}

/// What another rank's failure is called here.
pub(super) fn failed(rank: usize, doing: &str, path: &Path, what: &str) -> Error {
    Error::new(format!(
        "rank {rank} could not {doing} {}: {what}",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(folder: &Path) -> String {
        let state = State::new();
        let contents = Contents::of(&state).unwrap();
        let catalog = contents.catalog(&[contents.told()]).unwrap();
        let written = write_part(folder, 1, &contents, &catalog);
        written.unwrap_err().to_string()
    }

    #[test]
    fn a_rank_that_does_not_see_rank_zeros_folder_says_so() {
        let text = said(Path::new("/nowhere/.last.tmp-x"));
        assert!(
            text.contains("rank 1 does not find the folder /nowhere/.last.tmp-x"),
            "{text}"
        );
        assert!(
            text.contains("a file system that all ranks share"),
            "{text}"
        );
    }

    #[test]
    fn a_file_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("rank-00001.safetensors")).unwrap();
        let text = said(folder.path());
        assert!(
            text.contains("rank-00001.safetensors: File exists"),
            "{text}"
        );
    }

    #[test]
    fn a_large_tensor_travels_in_parts() {
        let most = CHUNK_BYTES / 4;
        let parts: Vec<_> = chunks(&(5..5 + 2 * most + 1), Dtype::F32).collect();
        assert_eq!(
            parts,
            [
                5..5 + most,
                5 + most..5 + 2 * most,
                5 + 2 * most..6 + 2 * most
            ]
        );
        assert_eq!(chunks(&(3..3), Dtype::F32).count(), 0);
    }
}
