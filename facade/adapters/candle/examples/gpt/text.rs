//! Text to train on: a file, the files of a folder, or this repository's own sources and documentation, cut in windows. The
//! documentation is in the program too, for where the repository is not.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use fabric::{Error, Result, data::Dataset};

const ENDINGS: [&str; 4] = ["rs", "md", "toml", "txt"];

/// What is learnt where the repository is not.
const CARRIED: [&str; 4] = [
    include_str!("../../../../../docs/FABRIC.md"),
    include_str!("../../../../../docs/ARCHITECTURE.md"),
    include_str!("../../../../../docs/PERFORMANCE.md"),
    include_str!("../../../../../README.md"),
];

/// Windows of `context + 1` bytes, one behind the other, overlapping by the last byte.
#[derive(Clone)]
pub struct Windows {
    bytes: Arc<[u8]>,
    context: usize,
}

impl Dataset for Windows {
    type Item = Vec<u8>;

    fn len(&self) -> usize {
        self.bytes.len().saturating_sub(1) / self.context
    }

    fn get(&self, index: usize) -> Result<Vec<u8>> {
        let start = index * self.context;
        Ok(self.bytes[start..=start + self.context].to_vec())
    }
}

/// This repository, where the program was built and still is.
pub fn repository() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../..");
    root.is_dir().then_some(root)
}

/// The text at `path`, or what the program carries, as windows to train on and windows to validate on: every tenth piece of
/// 4 KiB is for validation.
pub fn load(path: Option<&Path>, context: usize) -> Result<(Windows, Windows)> {
    let (text, name) = match path {
        Some(path) => (read(path)?, path.display().to_string()),
        None => (CARRIED.concat().into_bytes(), "the documentation".into()),
    };
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (index, piece) in text.chunks(4096).enumerate() {
        if index % 10 == 9 {
            validation.extend(piece)
        } else {
            train.extend(piece)
        }
    }
    let windows = |bytes: Vec<u8>| Windows {
        bytes: bytes.into(),
        context,
    };
    let (train, validation) = (windows(train), windows(validation));
    if train.is_empty() || validation.is_empty() {
        return Err(Error::argument(
            format!(
                "{name} has {} bytes of text, too few for windows of {context}",
                text.len()
            ),
            "Give more text with --data, or a smaller --context",
        ));
    }
    Ok((train, validation))
}

/// A file, or all files of a folder, one behind the other.
fn read(path: &Path) -> Result<Vec<u8>> {
    let mut files = Vec::new();
    collect(path, path.is_file(), &mut files).map_err(unreadable(path))?;
    files.sort();
    let mut text = Vec::new();
    for file in &files {
        text.extend(fs::read(file).map_err(unreadable(file))?);
        text.push(b'\n');
    }
    Ok(text)
}

fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |error| {
        Error::argument(
            format!("cannot read the text in {}: {error}", path.display()),
            "Give a file or a folder: --data PATH",
        )
    }
}

fn collect(path: &Path, whole: bool, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if whole {
        files.push(path.to_path_buf());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let hidden = name.to_string_lossy().starts_with('.');
        if entry.file_type()?.is_dir() {
            if !hidden && name != "target" && name != "out" {
                collect(&path, false, files)?;
            }
        } else if !hidden
            && path
                .extension()
                .is_some_and(|ending| ENDINGS.iter().any(|known| ending == *known))
        {
            files.push(path);
        }
    }
    Ok(())
}

/// The entropy in nats of a byte drawn by its frequency: what a model reaches that knows no context.
pub fn unigram_entropy(windows: &Windows) -> f64 {
    let mut counts = [0u64; 256];
    windows
        .bytes
        .iter()
        .for_each(|byte| counts[usize::from(*byte)] += 1);
    let total = windows.bytes.len() as f64;
    let terms = counts.iter().filter(|count| **count > 0).map(|count| {
        let frequency = *count as f64 / total;
        -frequency * frequency.ln()
    });
    terms.sum()
}
