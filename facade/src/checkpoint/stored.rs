//! A checkpoint on a disk, one file or a folder of them: what is in it, and any elements of any tensor, read where they
//! stand, so that a rank reads what it needs and nothing more.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fs,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use fabric_engine::{
    buffer::Slab,
    kernels::{Dtype, Span},
};
use serde_json::Value;

use super::{
    CHUNK_BYTES, VALUES,
    dtype::own_dtype,
    file::Header,
    joined,
    manifest::{self, Manifest, Piece, Tensor},
};
use crate::error::{Error, Result};

/// A checkpoint that can be read.
pub(super) struct Stored {
    path: PathBuf,
    is_folder: bool,
    /// Values, and the steps of optimizers, by name.
    pub(super) values: HashMap<String, Value>,
    /// How many ranks wrote it, under which strategy; a folder knows.
    pub(super) saved_by: Option<(usize, String)>,
    tensors: BTreeMap<String, Tensor>,
    headers: RefCell<HashMap<String, Header>>, // of the files that were looked into
}

/// Elements of a tensor that stand one behind the other in a file.
struct Extent {
    file: String,
    offset: u64, // bytes
    range: Range<usize>,
}

impl Stored {
    /// Look into the checkpoint at `path`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let unreadable = |error: std::io::Error| {
            Error::argument(
                format!("cannot read the checkpoint {}: {error}", path.display()),
                "Give the path that was given to fabric.save",
            )
        };
        match fs::metadata(path).map_err(unreadable)?.is_dir() {
            true => Self::folder(path),
            false => Self::file(path, &fs::File::open(path).map_err(unreadable)?, true),
        }
    }

    /// Look into a safetensors file that holds tensors and need not hold anything else.
    pub(super) fn open_raw(path: &Path) -> Result<Self> {
        let file = fs::File::open(path).map_err(|error| {
            Error::argument(
                format!("cannot read {}: {error}", path.display()),
                "Give the path of a safetensors file; fabric.load reads checkpoints, folders too",
            )
        })?;
        Self::file(path, &file, false)
    }

    fn folder(path: &Path) -> Result<Self> {
        let at = path.join(manifest::NAME);
        let text = fs::read(&at).map_err(|error| {
            Error::argument(
                format!(
                    "{} is no checkpoint of this library: cannot read {}: {error}",
                    path.display(),
                    at.display()
                ),
                "Give the path that was given to fabric.save: a folder is a checkpoint from the moment it has this name",
            )
        })?;
        let manifest = Manifest::parse(&at, &text)?;
        let steps = manifest.optimizers.into_iter();
        let steps = steps.map(|(name, steps)| (name, steps.into()));
        Ok(Self {
            path: path.into(),
            is_folder: true,
            saved_by: Some((manifest.world, manifest.strategy)),
            values: manifest.values.into_iter().chain(steps).collect(),
            tensors: manifest.tensors,
            headers: RefCell::default(),
        })
    }

    /// `has_values`: it must, because fabric.save wrote it.
    fn file(path: &Path, file: &fs::File, has_values: bool) -> Result<Self> {
        let broken = |what: String| {
            let (kind, hint) = match has_values {
                true => (
                    "no checkpoint of this library",
                    "Give the path that was given to fabric.save",
                ),
                false => ("no safetensors file", "Give the path of one, whole"),
            };
            Error::argument(format!("{} is {kind}: {what}", path.display()), hint)
        };
        let header = Header::read(file).map_err(broken)?;
        let values = header.note(VALUES);
        let values = match values {
            None if has_values => Err(broken(
                "its metadata has no values; a bare file of tensors is load_raw's".into(),
            )),
            values => Ok(values.unwrap_or("{}")),
        }?;
        let values = serde_json::from_str(values).map_err(|error| broken(error.to_string()))?;
        let tensor = |(key, info): (String, &safetensors::tensor::TensorInfo)| {
            let numel = info.shape.iter().product();
            let tensor = Tensor {
                dtype: info.dtype,
                shape: info.shape.clone(),
                pieces: vec![Piece::new(String::new(), key.clone(), 0..numel)],
            };
            (key, tensor)
        };
        let tensors = header.tensors().map(tensor).collect();
        Ok(Self {
            path: path.into(),
            is_folder: false,
            saved_by: None,
            values,
            tensors,
            headers: RefCell::new(HashMap::from([(String::new(), header)])),
        })
    }

    /// Whether it is a folder of files.
    pub(super) fn is_folder(&self) -> bool {
        self.is_folder
    }

    /// A tensor's description.
    pub(super) fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| absent(name))
    }

    /// The tensors under `name.`: their names, whole and without it; all of them where there is no name.
    pub(super) fn below<'a>(&'a self, name: &str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let prefix = joined(name, "");
        let from = self.tensors.range(prefix.clone()..);
        from.map_while(move |(key, _)| Some((key.as_str(), key.strip_prefix(&prefix)?)))
    }

    /// How many elements the tensor `name` has.
    pub(super) fn numel(&self, name: &str) -> Result<usize> {
        let numel = self.tensor(name)?.numel();
        numel.ok_or_else(|| self.fault(name, "it has more elements than memory"))
    }

    /// The type of the elements of `name`.
    pub(super) fn dtype(&self, name: &str) -> Result<Dtype> {
        let dtype = self.tensor(name)?.dtype;
        own_dtype(dtype).ok_or_else(|| {
            Error::argument(
                format!("the checkpoint holds '{name}' as {dtype:?}"),
                "Convert it first",
            )
        })
    }

    /// Whether elements `range` of `name` are there, as far as the files' headers tell.
    pub(super) fn look(&self, name: &str, range: Range<usize>) -> Result<()> {
        self.locate(name, range).map(drop)
    }

    /// Hand over elements `range` of `name`, in order, some at a time.
    pub(super) fn read(
        &self,
        name: &str,
        range: Range<usize>,
        f: &mut dyn FnMut(Range<usize>, Span<'_>) -> Result<()>,
    ) -> Result<()> {
        self.read_slabs(name, range, &mut |part, slab| {
            let numel = part.len();
            f(part, slab.part(0..numel))
        })
    }

    /// As [`Stored::read`]: the elements are the first of the slab, which is used again.
    pub(super) fn read_slabs(
        &self,
        name: &str,
        range: Range<usize>,
        f: &mut dyn FnMut(Range<usize>, &Slab) -> Result<()>,
    ) -> Result<()> {
        let dtype = self.dtype(name)?;
        let most = (CHUNK_BYTES / dtype.size()).min(range.len());
        let mut slab = Slab::zeroed(dtype, most);
        for extent in self.locate(name, range)? {
            let file = self.open_part(name, &extent.file)?;
            for start in extent.range.clone().step_by(most.max(1)) {
                let numel = most.min(extent.range.end - start);
                let offset = extent.offset + ((start - extent.range.start) * dtype.size()) as u64;
                let bytes = &mut slab.as_bytes_mut()[..numel * dtype.size()];
                file.read_exact_at(bytes, offset).map_err(|error| {
                    let file = self.place(&extent.file);
                    self.fault(name, &format!("{} cannot be read: {error}", file.display()))
                })?;
                f(start..start + numel, &slab)?;
            }
        }
        Ok(())
    }

    /// Elements `range` of `name` in memory.
    pub(super) fn slab(&self, name: &str, range: Range<usize>) -> Result<Slab> {
        // Memory for as many elements as the files hold, whatever a manifest promises.
        self.look(name, range.clone())?;
        let mut slab = Slab::zeroed(self.dtype(name)?, range.len());
        let start = range.start;
        self.read(name, range, &mut |part, span| {
            let into = slab.part_mut(part.start - start..part.end - start);
            Ok(fabric_engine::kernels::cast(span, into)?)
        })?;
        Ok(slab)
    }

    /// Where elements `range` of `name` stand, in order.
    fn locate(&self, name: &str, range: Range<usize>) -> Result<Vec<Extent>> {
        let tensor = self.tensor(name)?;
        let size = self.dtype(name)?.size();
        let mut extents = Vec::new();
        for piece in &tensor.pieces {
            let whole = piece.range();
            let part = whole.start.max(range.start)..whole.end.min(range.end);
            if part.start >= part.end {
                continue;
            }
            let start = self.start_of(name, tensor, piece)?;
            extents.push(Extent {
                file: piece.file.clone(),
                offset: start + ((part.start - whole.start) * size) as u64,
                range: part,
            });
        }
        extents.sort_by_key(|extent| extent.range.start);
        Ok(extents)
    }

    /// Where in its file a piece begins; its file's header must agree with the manifest.
    fn start_of(&self, name: &str, tensor: &Tensor, piece: &Piece) -> Result<u64> {
        let mut headers = self.headers.borrow_mut();
        if !headers.contains_key(&piece.file) {
            let file = self.open_part(name, &piece.file)?;
            let header = Header::read(&file).map_err(|what| {
                let file = self.place(&piece.file);
                self.fault(name, &format!("{} is damaged: {what}", file.display()))
            })?;
            headers.insert(piece.file.clone(), header);
        }
        let file = self.place(&piece.file);
        let (info, start) = headers[&piece.file].find(&piece.key).ok_or_else(|| {
            let what = format!("{} has no '{}'", file.display(), piece.key);
            self.fault(name, &what)
        })?;
        let numel = info.shape.iter().product::<usize>();
        if (info.dtype, numel) != (tensor.dtype, piece.range().len()) {
            let what = format!(
                "{} has '{}' as {numel} x {:?}, and it should be {} x {:?}",
                file.display(),
                piece.key,
                info.dtype,
                piece.range().len(),
                tensor.dtype
            );
            return Err(self.fault(name, &what));
        }
        Ok(start)
    }

    fn open_part(&self, name: &str, file: &str) -> Result<fs::File> {
        let path = self.place(file);
        fs::File::open(&path).map_err(|error| {
            self.fault(
                name,
                &format!("{} cannot be opened: {error}", path.display()),
            )
        })
    }

    fn place(&self, file: &str) -> PathBuf {
        match self.is_folder {
            true => self.path.join(file),
            false => self.path.clone(),
        }
    }

    fn fault(&self, name: &str, what: &str) -> Error {
        Error::argument(
            format!(
                "'{name}' cannot be loaded from {}: {what}",
                self.path.display()
            ),
            "Copy the checkpoint again, or load another one",
        )
    }
}

pub(super) fn absent(name: &str) -> Error {
    Error::argument(
        format!("the checkpoint holds no '{name}'"),
        "Ask for what was saved, under the name under which it was saved",
    )
}
