//! Build your own trainer: `trainer.rs` is one, and here it learns to read digits, on any number of processes, under any
//! strategy. `cargo run --release -p fabric-facade --example trainer -- --devices 2 --strategy fsdp`; interrupt it, and
//! `--resume` goes on where it was, on `--devices 3 --strategy zero1` if you like.

mod data;
mod digits;
mod trainer;

use std::path::PathBuf;

use clap::Parser;
use digits::Digits;
use fabric::{
    Clip, Fabric, ReduceOp, Result,
    callback::{EarlyStopping, LearningRateMonitor, Mode, ModelCheckpoint, ProgressBar},
    data::DataLoader,
    logger::{CsvLogger, RunFolder, TensorBoardLogger},
    optim::AdamW,
};
use trainer::Trainer;

#[derive(Parser)]
struct Args {
    /// Processes: a number, or "auto": what a launcher has started, or one
    #[arg(long, default_value = "auto")]
    devices: String,
    /// auto, single, ddp, zero1, zero2, fsdp or hsdp
    #[arg(long, default_value = "auto")]
    strategy: String,
    /// Ranks as threads of this process instead
    #[arg(long)]
    threads: bool,
    /// Epochs, at most
    #[arg(long, default_value_t = 20)]
    epochs: u64,
    /// Steps, at most
    #[arg(long)]
    max_steps: Option<u64>,
    /// Batches in a step
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Samples in a batch, on each rank
    #[arg(long, default_value_t = 24)]
    batch: usize,
    /// Steps from one checkpoint to the next, beside those at the end of each epoch
    #[arg(long, default_value_t = 50)]
    save_every: u64,
    /// Go on from the newest checkpoint
    #[arg(long)]
    resume: bool,
    /// Where checkpoints and logs go
    #[arg(long, default_value = "out/trainer")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let checkpoints = args.out.join("checkpoints");
    let run = RunFolder::new(&args.out, "logs");
    let fabric = Fabric::builder()
        .devices(&args.devices)
        .strategy(&args.strategy)
        .logger(CsvLogger::within(&run))
        .logger(TensorBoardLogger::within(&run))
        .callback(ProgressBar::new())
        .callback(LearningRateMonitor::new().every(10))
        .callback(
            ModelCheckpoint::new(&checkpoints)
                .monitor("val_accuracy", Mode::Max)
                .save_top_k(2)
                .save_last(true),
        )
        .callback(
            ModelCheckpoint::new(&checkpoints)
                .filename("step-{step}")
                .every_n_steps(args.save_every),
        )
        .callback(EarlyStopping::new("val_loss").patience(6))
        .build()?;
    let body = |fabric: &Fabric| train(fabric, &args);
    if args.threads {
        fabric.launch_threads(body)?;
    } else {
        fabric.launch(body)?;
    }
    Ok(())
}

fn train(fabric: &Fabric, args: &Args) -> Result<()> {
    let seed = Fabric::seed_everything(Some(11))?;
    fabric.print(fabric.explain());
    let (train, test) = data::read(data::ARCHIVE)?;
    let train = DataLoader::new(train).batch_size(args.batch).shuffle(true);
    let test = DataLoader::new(test).batch_size(60);
    let (model, network) = Digits::new(seed)?;
    let mut trainer = Trainer {
        max_epochs: args.epochs,
        max_steps: args.max_steps,
        accumulate: args.accumulate,
        clip: Some(Clip::norm(1.0)),
        ..Trainer::default()
    };
    if args.resume {
        trainer = trainer.resume_latest(args.out.join("checkpoints"))?;
    }
    let optimizer = AdamW::new(4e-3).weight_decay(1e-2);
    let trained = trainer.fit(fabric, &network, (model, optimizer), (train, test))?;
    if let Some(why) = trained.state.stopped() {
        fabric.print(format!("stopped: {why}"));
    }
    let progress = trained.state.progress;
    let number = |name| trained.state.metrics.get(name).unwrap_or(f64::NAN);
    let train_loss = fabric.all_reduce_value(number("loss"), ReduceOp::Avg)?;
    fabric.print(serde_json::json!({
        "epochs": progress.epoch,
        "steps": progress.steps,
        "train_loss": train_loss,
        "val_loss": number("val_loss"),
        "val_accuracy": number("val_accuracy"),
    }));
    Ok(())
}
