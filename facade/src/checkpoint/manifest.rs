//! The manifest of a sharded checkpoint: which tensors there are, and in which file each of their elements stands. It knows
//! neither strategies nor ranks' memory, so that any job can load what any other has saved.

use std::{collections::BTreeMap, ops::Range, path::Path};

use safetensors::Dtype as TensorDtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// The manifest's name in its folder.
pub(super) const NAME: &str = "manifest.json";

const FORMAT: &str = "fabric sharded checkpoint";
const VERSION: u64 = 1;

/// A sharded checkpoint's table of contents.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    format: String,
    version: u64,
    /// How many ranks wrote it: for people; loading does not ask.
    pub(super) world: usize,
    /// Under which strategy: for people, too.
    pub(super) strategy: String,
    pub(super) values: BTreeMap<String, Value>,
    /// The steps that each optimizer has taken.
    pub(super) optimizers: BTreeMap<String, u64>,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

/// A tensor in a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Tensor {
    pub(super) dtype: TensorDtype,
    pub(super) shape: Vec<usize>,
    pub(super) pieces: Vec<Piece>,
}

/// Elements of a tensor that stand together: `range` of the tensor, row-major, is all of `key` in `file`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Piece {
    pub(super) file: String,
    pub(super) key: String,
    range: [usize; 2],
}

impl Piece {
    pub(super) fn new(file: String, key: String, range: Range<usize>) -> Self {
        let range = [range.start, range.end];
        Self { file, key, range }
    }

    pub(super) fn range(&self) -> Range<usize> {
        self.range[0]..self.range[1]
    }
}

impl Tensor {
    /// How many elements, if memory could hold so many.
    pub(super) fn numel(&self) -> Option<usize> {
        let mut sizes = self.shape.iter();
        sizes.try_fold(1usize, |numel, size| numel.checked_mul(*size))
    }
}

impl Manifest {
    pub(super) fn new(world: usize, strategy: &str) -> Self {
        Self {
            format: FORMAT.into(),
            version: VERSION,
            world,
            strategy: strategy.into(),
            values: BTreeMap::new(),
            optimizers: BTreeMap::new(),
            tensors: BTreeMap::new(),
        }
    }

    /// Read one that stands at `path`, and prove that the pieces of every tensor are the tensor.
    pub(super) fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let broken = |what: String| {
            Error::argument(
                format!("{} is no manifest of this library: {what}", path.display()),
                "Give the path that was given to fabric.save, and keep its files as they are",
            )
        };
        let json: Value =
            serde_json::from_slice(text).map_err(|error| broken(error.to_string()))?;
        if json["format"] != FORMAT {
            return Err(broken(format!(
                "its format is {}, not \"{FORMAT}\"",
                json["format"]
            )));
        }
        if json["version"] != VERSION {
            return Err(Error::argument(
                format!(
                    "{} has version {} of the format, and this library reads version {VERSION}",
                    path.display(),
                    json["version"]
                ),
                "Load it with the version of the library that wrote it, or a later one",
            ));
        }
        let manifest = Self::deserialize(json).map_err(|error| broken(error.to_string()))?;
        for (name, tensor) in &manifest.tensors {
            tensor.check().map_err(|what| {
                Error::argument(
                    format!("'{name}' is not whole in {}: {what}", path.display()),
                    "Load another checkpoint; this one was changed after it was saved",
                )
            })?;
        }
        Ok(manifest)
    }
}

impl Tensor {
    fn check(&self) -> Result<(), String> {
        let numel = self.numel().ok_or("it has more elements than memory")?;
        cover(numel, self.pieces.iter().map(Piece::range))?;
        // Whoever writes a manifest must not make a job read files elsewhere.
        let inside = |name: &str| Path::new(name).file_name().is_some_and(|last| last == name);
        match self.pieces.iter().find(|piece| !inside(&piece.file)) {
            Some(piece) => Err(format!("'{}' is no name of a file", piece.file)),
            None => Ok(()),
        }
    }
}

/// Whether `ranges` are `0..numel`, each element in one of them; otherwise, in words, which is not.
pub(super) fn cover(
    numel: usize,
    ranges: impl Iterator<Item = Range<usize>>,
) -> Result<(), String> {
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_by_key(|range| (range.start, range.end));
    let mut next = 0;
    for Range { start, end } in ranges {
        if start > end || end > numel {
            return Err(format!("no elements are {start}..{end} of {numel}"));
        }
        if start == end {
            continue;
        }
        if start > next {
            return Err(format!("elements {next}..{start} are in no piece"));
        }
        if start < next {
            return Err(format!(
                "elements {start}..{} are in two pieces",
                next.min(end)
            ));
        }
        next = end;
    }
    match next == numel {
        true => Ok(()),
        false => Err(format!("elements {next}..{numel} are in no piece")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_tensor_or_it_is_said_which_elements_are_not() {
        let said = |ranges: &[Range<usize>]| cover(10, ranges.iter().cloned()).err();
        assert_eq!(said(&[4..10, 0..4, 4..4]), None);
        let missing = |what: &str| Some(format!("elements {what} are in no piece"));
        assert_eq!(said(&[]), missing("0..10"));
        assert_eq!(said(&[0..4, 6..10]), missing("4..6"));
        assert_eq!(said(&[0..4, 4..9]), missing("9..10"));
        let twice = |what: &str| Some(format!("elements {what} are in two pieces"));
        assert_eq!(said(&[0..6, 4..10]), twice("4..6"));
        assert_eq!(said(&[0..10, 2..3]), twice("2..3"));
        assert_eq!(said(&[0..10, 0..10]), twice("0..10"));
        assert!(said(&[0..4, 4..11]).is_some());
        #[expect(clippy::reversed_empty_ranges)]
        let reversed = said(&[0..10, 5..4]);
        assert!(reversed.is_some());
        assert_eq!(cover(0, std::iter::empty()), Ok(()));
    }

    #[test]
    fn a_manifest_that_names_files_elsewhere_is_refused() {
        for file in ["../secret", "/etc/passwd", "a/b", "", ".", ".."] {
            let tensor = Tensor {
                dtype: TensorDtype::U8,
                shape: vec![1],
                pieces: vec![Piece::new(file.into(), "k".into(), 0..1)],
            };
            assert!(tensor.check().is_err(), "{file}");
        }
    }
}
