//! Trains a byte-level GPT on several processes: `cargo run --release -p fabric-candle --example gpt -- --devices 2`.
//!
//! By default it learns this repository's own sources. Its last line on standard output is one JSON object.

#[path = "gpt/model.rs"]
mod model;
#[path = "gpt/text.rs"]
mod text;

use std::{io::IsTerminal, path::PathBuf, time::Instant};

use candle_core::{DType, Device, IndexOp, Tensor};
use clap::Parser;
use fabric::{
    Clip, Error, Fabric, ReduceOp, Result, State, data::DataLoader, logger::CsvLogger, optim::AdamW,
};
use fabric_candle::{CandleModel, Loss, build};
use fabric_engine::kernels::Dtype;
use indicatif::{ProgressBar, ProgressStyle};
use model::{Config, Gpt, batch};
use rand::Rng;

/// Train a byte-level GPT, on as many processes as you like.
#[derive(Parser, Clone)]
struct Args {
    /// Processes: a number, or "auto"
    #[arg(long, default_value = "auto")]
    devices: String,
    /// single, ddp or auto
    #[arg(long, default_value = "auto")]
    strategy: String,
    /// 32-true or 64-true
    #[arg(long, default_value = "32-true")]
    precision: String,
    /// Optimizer steps
    #[arg(long, default_value_t = 300)]
    max_steps: u64,
    /// Windows a step, over all processes together
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// The seed of the model's first values and of the order of the data
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where metrics and checkpoint go
    #[arg(long, default_value = "out/gpt")]
    out: PathBuf,
    /// A text file, or a folder of sources; this repository if not given
    #[arg(long)]
    data: Option<PathBuf>,
    /// The largest learning rate
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Blocks
    #[arg(long, default_value_t = 5)]
    layers: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Size of a hidden state
    #[arg(long, default_value_t = 128)]
    width: usize,
    /// Bytes in a window
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Bytes of text to write at the end
    #[arg(long, default_value_t = 200)]
    sample: usize,
    /// Write what happened when, a Chrome trace for each rank, into this folder
    #[arg(long)]
    trace: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let folder = args.out.parent().map_or_else(PathBuf::new, PathBuf::from);
    let name = args
        .out
        .file_name()
        .map_or_else(|| "gpt".into(), |name| name.to_string_lossy().into_owned());
    let fabric = Fabric::builder()
        .devices_text(&args.devices)
        .strategy(&args.strategy)
        .precision(&args.precision)
        .logger(CsvLogger::new(folder, &name))
        .build()?;
    if args.heads == 0 || !args.width.is_multiple_of(args.heads) {
        return Err(Error::argument(
            format!(
                "a width of {} cannot be shared by {} heads",
                args.width, args.heads
            ),
            "Choose a --width that is a multiple of --heads",
        ));
    }
    let (train, validation) = text::load(args.data.as_deref(), args.context)?;
    fabric
        .launch(|fabric| run(fabric, &args, &train, &validation))
        .map(drop)
}

fn run(
    fabric: &Fabric,
    args: &Args,
    train: &text::Windows,
    validation: &text::Windows,
) -> Result<()> {
    let world = fabric.world_size();
    if args.batch_size == 0 || !args.batch_size.is_multiple_of(world) {
        return Err(Error::argument(
            format!(
                "a batch of {} windows cannot be shared by {world} processes",
                args.batch_size
            ),
            "Choose a --batch-size that is a multiple of the number of processes",
        ));
    }
    Fabric::seed_everything(Some(args.seed))?;
    let device = Device::Cpu;
    let dtype = if fabric.precision().dtype() == Dtype::F64 {
        DType::F64
    } else {
        DType::F32
    };
    let config = Config {
        layers: args.layers,
        heads: args.heads,
        width: args.width,
        context: args.context,
    };
    let model = build(&device, dtype, |vb| Gpt::new(&config, vb))?;
    let (model, mut optimizer) = fabric.setup(model, AdamW::new(args.lr).weight_decay(0.1))?;
    let loader = DataLoader::new(train.clone())
        .batch_size(args.batch_size / world)
        .shuffle(true)
        .seed(args.seed)
        .drop_last(true)
        .workers(1)
        .collate({
            let device = device.clone();
            move |windows| Ok(batch(&windows, &device)?)
        });
    let loader = fabric.setup_dataloaders(loader)?;
    let parameters = fabric::model::Model::params(model.module())
        .iter()
        .map(|param| param.numel())
        .sum::<usize>();
    let entropy = text::unigram_entropy(train);
    if fabric.is_global_zero() {
        eprintln!(
            "{parameters} parameters, {world} process{}, strategy {}; a byte has {entropy:.3} nats without context",
            if world == 1 { "" } else { "es" },
            fabric.strategy()
        );
    }

    let bar = progress(fabric, args.max_steps);
    let started = Instant::now();
    let (mut step, mut train_loss, mut spent) = (0, f64::NAN, fabric.spent()? - fabric.spent()?);
    while step < args.max_steps {
        if loader.is_empty() {
            return Err(Error::argument(
                "an epoch has no batch",
                "Give more text, or a smaller --batch-size",
            ));
        }
        for pair in loader.iter().take((args.max_steps - step) as usize) {
            let (input, target) = pair?;
            optimizer.set_learning_rate(args.lr * schedule(step, args.max_steps));
            let loss = model.loss(&input, &target)?;
            let before = fabric.spent()?;
            fabric.backward(Loss(&loss))?;
            spent = fabric.spent()? - before;
            fabric.clip_gradients(&model, Clip::norm(1.0))?;
            optimizer.step()?;
            optimizer.zero_grad();
            step += 1;
            if step % 10 == 0 || step == args.max_steps {
                let own = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
                train_loss = fabric.all_reduce_value(own, ReduceOp::Avg)?;
                let speed = tokens(args, step) / started.elapsed().as_secs_f64();
                let metrics = [
                    ("train_loss", train_loss),
                    ("tokens_per_s", speed),
                    ("lr", optimizer.learning_rate()),
                ];
                fabric.log_dict(&metrics, step)?;
                bar.set_message(format!("loss {train_loss:.4}, {speed:.0} tokens/s"));
                if bar.is_hidden() && fabric.is_global_zero() {
                    eprintln!("step {step}: loss {train_loss:.4}, {speed:.0} tokens/s");
                }
            }
            bar.inc(1);
        }
    }
    bar.finish();
    let tokens_per_s = tokens(args, step) / started.elapsed().as_secs_f64();

    let val_loss = validate(fabric, &model, validation, args)?;
    fabric.log("val_loss", val_loss, step)?;
    let mut steps = step;
    let state = State::new()
        .model("model", &model)
        .optimizer("optimizer", &mut optimizer)
        .value("step", &mut steps);
    fabric.save(args.out.join("last.safetensors"), state)?;
    if let Some(folder) = &args.trace {
        std::fs::create_dir_all(folder)?;
        let rank = fabric.global_rank();
        std::fs::write(
            folder.join(format!("rank{rank}.json")),
            fabric.trace()?.to_chrome(rank),
        )?;
    }
    if fabric.is_global_zero() {
        println!("{}", sample(&model, args)?);
        let report = serde_json::json!({
            "steps": step, "train_loss": train_loss, "val_loss": val_loss, "tokens_per_s": tokens_per_s.round(),
            "world_size": world, "strategy": fabric.strategy(), "collectives_per_step": spent.collectives,
            "bytes_per_step": spent.bytes, "peak_rss_mb": peak_rss_mb(), "unigram_entropy": entropy,
            "parameters": parameters,
        });
        println!("{report}");
    }
    Ok(())
}

/// The learning rate's share of its maximum: 20 steps of warm-up, then a cosine down to a tenth.
fn schedule(step: u64, steps: u64) -> f64 {
    let warm = ((step + 1) as f64 / 20.0).min(1.0);
    let done = step as f64 / steps.max(1) as f64;
    warm * (0.55 + 0.45 * (std::f64::consts::PI * done).cos())
}

fn tokens(args: &Args, steps: u64) -> f64 {
    steps as f64 * (args.batch_size * args.context) as f64
}

fn progress(fabric: &Fabric, steps: u64) -> ProgressBar {
    if !fabric.is_global_zero() || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} [{elapsed}<{eta}] {msg}");
    ProgressBar::new(steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// The mean loss over up to 64 windows for validation, each rank taking its share.
fn validate(
    fabric: &Fabric,
    model: &CandleModel<Gpt>,
    windows: &text::Windows,
    args: &Args,
) -> Result<f64> {
    use fabric::data::Dataset;
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let mut sums = vec![0f64; 2];
    for index in (rank..windows.len().min(64)).step_by(world) {
        let (input, target) = batch(&[windows.get(index)?], &Device::Cpu)?;
        sums[0] += f64::from(
            model
                .loss(&input, &target)?
                .to_dtype(DType::F32)?
                .to_scalar::<f32>()?,
        );
        sums[1] += 1.0;
    }
    fabric.all_reduce(&mut sums, ReduceOp::Sum)?;
    debug_assert!(
        sums[1] > 0.0,
        "text::load refuses text without validation, of {} windows",
        args.context
    );
    Ok(sums[0] / sums[1])
}

/// Text that the model writes, drawn at temperature 0.8.
fn sample(model: &CandleModel<Gpt>, args: &Args) -> Result<String> {
    let mut rng = fabric::seed::rng(args.seed);
    let mut bytes = b"//! ".to_vec();
    for _ in 0..args.sample {
        let window = &bytes[bytes.len().saturating_sub(args.context)..];
        let input = window
            .iter()
            .map(|byte| u32::from(*byte))
            .collect::<Vec<_>>();
        let input = Tensor::from_vec(input, (1, window.len()), &Device::Cpu)?;
        let logits = (model.logits(&input)?.i(window.len() - 1)? / 0.8)?;
        let odds = candle_nn::ops::softmax(&logits, 0)?
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?;
        let mut left = rng.random::<f32>();
        let drawn = odds.iter().position(|odd| {
            left -= odd;
            left <= 0.0
        });
        bytes.push(drawn.unwrap_or(usize::from(b' ')) as u8);
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The most memory this process ever had, in MiB; 0 where the system does not say.
fn peak_rss_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
