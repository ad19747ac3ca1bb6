//! The examples that Lightning Fabric comes with, over candle: `cargo run --release -p fabric-candle --example gallery -- ppo
//! --devices 2`. Each is a file of its own and shows something else; each ends with one JSON object on standard output.
//! The language model is an example of its own, `gpt`.

mod convolution;
#[path = "../../../../examples/trainer/data.rs"]
mod data;
mod digits;
mod gan;
mod job;
mod kfold;
mod maml;
mod network;
mod ppo;
#[path = "../../../../examples/trainer/trainer.rs"]
mod trainer;

use clap::{Parser, Subcommand};
use fabric::Result;

/// Small programs that each show something of Fabric, on as many processes as you like
#[derive(Parser)]
#[command(after_help = "Examples:
  gallery digits --devices 2 --strategy fsdp   a convolutional network, its parameters in shards
  gallery gan                                  two models and two optimizers, and a picture of what they draw
  gallery kfold --folds 10                     ten models, each on other samples
  gallery maml                                 a network that learns a new task from ten points
  gallery ppo                                  two processes play, and balance a pole
  gallery ppo --decoupled --devices 3          one plays, two learn from it

What a run leaves behind is in --out, out/<name> if not given.")]
struct Args {
    #[command(subcommand)]
    example: Example,
}

#[derive(Subcommand)]
enum Example {
    Digits(digits::Args),
    Gan(gan::Args),
    Kfold(kfold::Args),
    Maml(maml::Args),
    Ppo(ppo::Args),
}

fn main() -> Result<()> {
    match Args::parse().example {
        Example::Digits(args) => digits::main(&args),
        Example::Gan(args) => gan::main(&args),
        Example::Kfold(args) => kfold::main(&args),
        Example::Maml(args) => maml::main(&args),
        Example::Ppo(args) => ppo::main(&args),
    }
}
