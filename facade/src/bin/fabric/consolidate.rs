//! `fabric consolidate` makes one file of a sharded checkpoint; `fabric inspect` says what a checkpoint holds.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use fabric::{Error, Result, checkpoint, engine::shard::plan::several};
use indicatif::{ProgressBar, ProgressStyle};

/// Shorter work needs no bar.
const LONG_BYTES: u64 = 256 << 20;

/// Merge a sharded checkpoint into one safetensors file
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fabric consolidate out/last                                  # writes out/last.consolidated.safetensors
  fabric consolidate out/last --output-file model.safetensors

The file is what fabric.save writes with state_dict_type(\"full\"): fabric.load reads it under any strategy, and any
program opens it as safetensors. It is written a few megabytes at a time, whatever the size.")]
pub(crate) struct ConsolidateArgs {
    /// The folder that was given to fabric.save
    checkpoint_folder: PathBuf,
    /// The file; CHECKPOINT_FOLDER.consolidated.safetensors where this is left out
    #[arg(long, alias = "output_file", value_name = "FILE")]
    output_file: Option<PathBuf>,
}

pub(crate) fn consolidate(args: &ConsolidateArgs) -> Result<String> {
    let folder = &args.checkpoint_folder;
    let file = match &args.output_file {
        Some(file) => file.clone(),
        None => beside(folder)?,
    };
    let mut bar = None;
    checkpoint::consolidate_with(folder, &file, &mut |done, total| {
        if total < LONG_BYTES {
            return;
        }
        let bar = bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(
                "{bar:40} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
            );
            let bar = ProgressBar::new(total); // shown on a terminal only
            style.map_or(bar.clone(), |style| bar.with_style(style))
        });
        bar.set_position(done);
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(format!("{}\n", file.display()))
}

/// `out/last/` is consolidated to `out/last.consolidated.safetensors`.
fn beside(folder: &Path) -> Result<PathBuf> {
    let name = folder.file_name().ok_or_else(|| {
        Error::argument(
            format!("{} has no name to call a file by", folder.display()),
            "Name the file: --output-file FILE",
        )
    })?;
    let mut name = OsString::from(name);
    name.push(".consolidated.safetensors");
    Ok(folder.with_file_name(name))
}

/// Say what a checkpoint holds: tensors, who wrote which piece of them, values, and what is broken
#[derive(clap::Args)]
#[command(after_help = "Examples:
  fabric inspect out/last                    # a sharded checkpoint: a folder
  fabric inspect model.safetensors           # a full one, or a safetensors file of any program
  fabric inspect --json out/last | jq '.tensors[] | {name, shape}'

The exit status is 1 where something cannot be loaded.")]
pub(crate) struct InspectArgs {
    /// What was given to fabric.save
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is to be printed, and then what is wrong.
pub(crate) fn inspect(args: &InspectArgs) -> Result<(String, Result<()>)> {
    let listing = checkpoint::inspect(&args.path)?;
    let verdict = match listing.damage.len() {
        0 => Ok(()),
        torn => Err(Error::argument(
            format!(
                "{} of {} in {} cannot be loaded",
                torn,
                several(listing.tensors.len(), "tensor"),
                listing.path
            ),
            "Copy the checkpoint again, or load another one",
        )),
    };
    let text = match args.json {
        true => serde_json::to_string_pretty(&listing)? + "\n",
        false => listing.to_string(),
    };
    Ok((text, verdict))
}
