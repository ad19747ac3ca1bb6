//! The command line, and what is wrong with it: said once, before any rank is started.

use std::path::PathBuf;

use clap::Parser;
use fabric::{Error, Result};

use crate::{model::Config, text::Windows};

/// Train a byte-level GPT, on as many processes as you like
#[derive(Parser, Clone)]
#[command(after_help = "Examples:
  gpt --devices 2                                  learn this repository's sources on two processes
  gpt --devices 4 --strategy hsdp --group 2        two replicas, each in the shards of two processes
  gpt --data book.txt --max-steps 1000 --lr 1e-3   learn a book on one
  gpt --devices 2 --trace out/trace                then open out/trace/rank0.json in a trace viewer

--out gets last.safetensors and version_N/metrics.csv. The last line on standard output is a report in JSON.")]
pub struct Args {
    /// auto, cpu, or cuda (or gpu) in a build with --features cuda
    #[arg(long, default_value = "auto")]
    pub accelerator: String,
    /// Processes: a number, or "auto"
    #[arg(long, default_value = "auto")]
    pub devices: String,
    /// single, ddp, zero1, zero2, fsdp, hsdp or auto
    #[arg(long, default_value = "auto")]
    pub strategy: String,
    /// 32-true, 64-true, bf16-true, 16-true, bf16-mixed or 16-mixed; candle multiplies small types slowly on a CPU
    #[arg(long, default_value = "32-true")]
    pub precision: String,
    /// Processes that share the work of one replica, under hsdp
    #[arg(long)]
    pub group: Option<usize>,
    /// Optimizer steps
    #[arg(long, default_value_t = 300)]
    pub max_steps: u64,
    /// Windows a step, over all processes together
    #[arg(long, default_value_t = 16)]
    pub batch_size: usize,
    /// The seed of the model's first values and of the order of the data
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Where metrics and checkpoint go
    #[arg(long, default_value = "out/gpt")]
    pub out: PathBuf,
    /// A text file, or a folder of sources; if not given this repository, and where that is not its documentation
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// The largest learning rate
    #[arg(long, default_value_t = 2e-3)]
    pub lr: f64,
    /// Blocks
    #[arg(long, default_value_t = 5)]
    pub layers: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Size of a hidden state
    #[arg(long, default_value_t = 128)]
    pub width: usize,
    /// Bytes in a window
    #[arg(long, default_value_t = 128)]
    pub context: usize,
    /// Bytes of text to write at the end
    #[arg(long, default_value_t = 200)]
    pub sample: usize,
    /// Write what happened when, a Chrome trace for each rank, into this folder
    #[arg(long)]
    pub trace: Option<PathBuf>,
}

impl Args {
    /// The model's sizes.
    pub fn config(&self) -> Config {
        Config {
            layers: self.layers,
            heads: self.heads,
            width: self.width,
            context: self.context,
        }
    }

    /// Bytes read in so many steps, by all processes together.
    pub fn tokens(&self, steps: u64) -> f64 {
        steps as f64 * (self.batch_size * self.context) as f64
    }

    /// The folder of all runs, and this run's name in it.
    pub fn folder_and_name(&self) -> (PathBuf, String) {
        let folder = self.out.parent().map_or_else(PathBuf::new, PathBuf::from);
        let name = self.out.file_name().map(|name| name.to_string_lossy());
        (folder, name.map_or_else(|| "gpt".into(), Into::into))
    }

    /// Refuse sizes that make no model.
    pub fn check(&self) -> Result<()> {
        if self.context == 0 || self.max_steps == 0 {
            return Err(Error::argument(
                "0 bytes in a window, or 0 steps",
                "Choose a --context and --max-steps of at least 1",
            ));
        }
        if self.heads == 0 || self.width == 0 || !self.width.is_multiple_of(self.heads) {
            return Err(Error::argument(
                format!(
                    "a width of {} cannot be shared by {} heads",
                    self.width, self.heads
                ),
                "Choose a --width that is a multiple of --heads",
            ));
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return Err(Error::argument(
                format!("a learning rate of {}", self.lr),
                "Choose an --lr above 0, like 2e-3",
            ));
        }
        Ok(())
    }

    /// Refuse a batch that `world` processes cannot share, or that the text does not fill.
    pub fn check_batch(&self, world: usize, train: &Windows) -> Result<()> {
        if self.batch_size == 0 || !self.batch_size.is_multiple_of(world) {
            return Err(Error::argument(
                format!(
                    "a batch of {} windows cannot be shared by {world} process{}",
                    self.batch_size,
                    if world == 1 { "" } else { "es" }
                ),
                "Choose a --batch-size that is a multiple of the number of processes",
            ));
        }
        let windows = fabric::data::Dataset::len(train);
        if windows < self.batch_size {
            return Err(Error::argument(
                format!(
                    "the text has {windows} windows, too few for a batch of {}",
                    self.batch_size
                ),
                "Give more text with --data, or a smaller --batch-size or --context",
            ));
        }
        Ok(())
    }
}
