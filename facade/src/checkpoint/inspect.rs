//! What a checkpoint holds, for people and their scripts: tensors, who has written which piece of them, values, and what is
//! broken. Nothing but headers is read.

use std::{collections::BTreeMap, fmt, path::Path};

use fabric_engine::shard::plan::{bytes_text, several};
use serde::Serialize;
use serde_json::Value;

use super::stored::Stored;
use crate::error::Result;

/// What a checkpoint holds. Its `Display` form is a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Listing {
    /// Where it is.
    pub path: String,
    /// "sharded" or "full"; "safetensors" for a file that `fabric.save` did not write.
    pub form: &'static str,
    /// How many ranks wrote a sharded one.
    pub world: Option<usize>,
    /// Under which strategy a sharded one was written.
    pub strategy: Option<String>,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// The tensors, by name.
    pub tensors: Vec<ListedTensor>,
    /// The values, and how many steps each optimizer has taken, by name.
    pub values: BTreeMap<String, Value>,
    /// What cannot be loaded, and why; empty for a whole checkpoint.
    pub damage: Vec<String>,
}

/// A tensor of a [`Listing`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ListedTensor {
    /// Its name.
    pub name: String,
    /// Its elements' type, as safetensors calls it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its size.
    pub bytes: u64,
    /// Which elements stand in which file; empty in a checkpoint of one file.
    pub pieces: Vec<ListedPiece>,
}

/// Elements of a tensor that stand together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ListedPiece {
    /// The file, in the checkpoint's folder.
    pub file: String,
    /// The rank that wrote it, by the file's name.
    pub rank: Option<usize>,
    /// The first element, and the one after the last.
    pub elements: [usize; 2],
}

/// Look into the checkpoint at `path`, of either form, or into any safetensors file. A torn one is listed too, with what is
/// wrong with it.
///
/// ```
/// use fabric::{Fabric, State, optim::Sgd, vec::VecModel};
///
/// let room = tempfile::tempdir()?;
/// let path = room.path().join("last.safetensors");
/// Fabric::builder().build()?.launch(|fabric| {
///     let (model, _) = fabric.setup(VecModel::new([("w", vec![0f32; 6])]), Sgd::new(0.1))?;
///     let mut epoch = 3;
///     fabric.save(&path, State::new().model("model", &model).value("epoch", &mut epoch))
/// })?;
/// let listing = fabric::checkpoint::inspect(&path)?;
/// assert_eq!((listing.form, listing.tensors[0].name.as_str(), listing.bytes), ("full", "model.w", 24));
/// assert_eq!(listing.values["epoch"], 3);
/// # Ok::<(), fabric::Error>(())
/// ```
///
/// # Errors
/// When there is nothing, or something else.
pub fn inspect(path: impl AsRef<Path>) -> Result<Listing> {
    let path = path.as_ref();
    let (stored, is_ours) = match Stored::open(path) {
        Ok(stored) => (stored, true),
        Err(error) if path.is_file() => (Stored::open_raw(path).map_err(|_| error)?, false),
        Err(error) => return Err(error),
    };
    let (mut tensors, mut damage) = (Vec::new(), Vec::new());
    for (name, _) in stored.below("") {
        let tensor = stored.tensor(name)?;
        let numel = stored.numel(name)?;
        let looked = match is_ours {
            true => stored.look(name, 0..numel),
            false => Ok(()), // its header was compared with the file, and it may hold types that are not ours
        };
        damage.extend(looked.err().map(|error| error.to_string()));
        let pieces = tensor.pieces.iter().filter(|_| stored.is_folder());
        tensors.push(ListedTensor {
            name: name.into(),
            dtype: format!("{:?}", tensor.dtype),
            shape: tensor.shape.clone(),
            bytes: (numel * tensor.dtype.bitsize() / 8) as u64,
            pieces: pieces
                .map(|piece| ListedPiece {
                    file: piece.file.clone(),
                    rank: rank_of(&piece.file),
                    elements: [piece.range().start, piece.range().end],
                })
                .collect(),
        });
    }
    let saved_by = stored.saved_by.clone();
    Ok(Listing {
        path: path.display().to_string(),
        form: match (is_ours, stored.is_folder()) {
            (true, true) => "sharded",
            (true, false) => "full",
            (false, _) => "safetensors",
        },
        world: saved_by.as_ref().map(|(world, _)| *world),
        strategy: saved_by.map(|(_, strategy)| strategy),
        bytes: tensors.iter().map(|tensor| tensor.bytes).sum(),
        tensors,
        values: stored.values.clone().into_iter().collect(),
        damage,
    })
}

/// "rank-00002.safetensors" is rank 2's.
fn rank_of(file: &str) -> Option<usize> {
    let number = file.strip_prefix("rank-")?;
    number.strip_suffix(".safetensors")?.parse().ok()
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.form {
            "sharded" => "a sharded checkpoint",
            "full" => "a checkpoint of one file",
            _ => "a safetensors file of another program",
        };
        write!(f, "{}: {kind}", self.path)?;
        if let (Some(world), Some(strategy)) = (self.world, &self.strategy) {
            write!(f, ", saved under {strategy} by {}", several(world, "rank"))?;
        }
        writeln!(
            f,
            "; {}, {}",
            several(self.tensors.len(), "tensor"),
            bytes_text(self.bytes as f64)
        )?;
        let rows = self.tensors.iter().map(row).collect::<Vec<_>>();
        let mut widths = [0; 4];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        let [name, dtype, shape, bytes] = widths;
        for [n, d, s, b, pieces] in &rows {
            let line = format!("  {n:name$}  {d:dtype$}  {s:shape$}  {b:>bytes$}  {pieces}");
            writeln!(f, "{}", line.trim_end())?;
        }
        if !self.values.is_empty() {
            writeln!(f, "values, and the steps that optimizers have taken")?;
        }
        for (name, value) in &self.values {
            writeln!(f, "  {name} = {value}")?;
        }
        for what in &self.damage {
            writeln!(f, "DAMAGED: {what}")?;
        }
        Ok(())
    }
}

/// Name, type, shape, size, and who wrote what.
fn row(tensor: &ListedTensor) -> [String; 5] {
    let pieces = tensor.pieces.iter().map(|piece| {
        let [start, end] = piece.elements;
        match piece.rank {
            Some(rank) => format!("rank {rank}: {start}..{end}"),
            None => format!("{}: {start}..{end}", piece.file),
        }
    });
    [
        tensor.name.clone(),
        tensor.dtype.clone(),
        format!("{:?}", tensor.shape),
        bytes_text(tensor.bytes as f64),
        pieces.collect::<Vec<_>>().join(", "),
    ]
}
