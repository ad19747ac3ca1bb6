//! Trains a byte-level GPT on several processes: `cargo run --release -p fabric-candle --example gpt -- --devices 2`.
//!
//! By default it learns this repository's own sources; carried to where those are not, their documentation, which is in the
//! program. Its last line on standard output is one JSON object.
//!
//! On glibc it is 1.3 times as fast, with the same peak, when freed memory is kept instead of faulted in again at each
//! step: set `MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=1073741824` before the start.

#[path = "gpt/args.rs"]
mod args;
#[path = "gpt/model.rs"]
mod model;
#[path = "gpt/text.rs"]
mod text;

use std::{io::IsTerminal, time::Instant};

use args::Args;
use candle_core::{DType, Device, IndexOp, Tensor};
use clap::Parser;
use fabric::{
    Clip, Fabric, FabricModule, FabricOptimizer, ReduceOp, Result, State,
    data::{DataLoader, Dataset},
    engine::{comm::Spent, kernels::Dtype},
    logger::CsvLogger,
    model::Model,
    optim::AdamW,
};
use fabric_candle::{CandleFabric, CandleModel, Loss, build_deferred};
use indicatif::{ProgressBar, ProgressStyle};
use model::{Gpt, batch};
use rand::Rng;
use text::Windows;

type Module = FabricModule<CandleModel<Gpt>>;

fn main() -> Result<()> {
    let args = Args::parse();
    let (folder, name) = args.folder_and_name();
    let mut builder = Fabric::builder()
        .accelerator(&args.accelerator)
        .devices(&args.devices)
        .strategy(&args.strategy)
        .precision(&args.precision)
        .state_dict_type("full")
        .logger(CsvLogger::new(folder, &name));
    if let Some(ranks) = args.group {
        builder = builder.group(ranks);
    }
    let fabric = builder.build()?;
    args.check()?;
    let data = args.data.clone().or_else(text::repository);
    let (train, validation) = text::load(data.as_deref(), args.context)?;
    args.check_batch(fabric.ranks(), &train)?;
    fabric
        .launch(|fabric| run(fabric, &args, &train, &validation))
        .map(drop)
}

/// What every rank does.
fn run(fabric: &Fabric, args: &Args, train: &Windows, validation: &Windows) -> Result<()> {
    Fabric::seed_everything(Some(args.seed))?;
    let dtype = match fabric.precision().dtype() {
        Dtype::F64 => DType::F64,
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        _ => DType::F32,
    };
    // Without memory: a strategy that shards parameters never needs all of them in one process.
    let device = fabric.tensor_device()?;
    let model = build_deferred(&device, dtype, |vb| Gpt::new(&args.config(), vb))?;
    let (model, mut optimizer) = fabric.setup(model, AdamW::new(args.lr).weight_decay(0.1))?;
    let (world, entropy) = (fabric.world_size(), text::unigram_entropy(train));
    let parameters: usize = model.params().iter().map(|param| param.numel()).sum();
    let plan = model.explain(&optimizer, fabric.measure_link()?);
    if fabric.is_global_zero() {
        let strategy = fabric.strategy();
        let accelerator = fabric.device().accelerator;
        eprintln!("{parameters} parameters, {world} x {accelerator}, strategy {strategy}");
        eprintln!("{}", plan.trim_end());
        eprintln!("without context a byte has {entropy:.3} nats: a loss below that is learning");
    }

    let trained = fit(fabric, args, train, &model, &mut optimizer)?;
    let val_loss = validate(fabric, &model, validation)?;
    fabric.log("val_loss", val_loss, args.max_steps)?;
    save(fabric, args, &model, &mut optimizer)?;
    let text = sample(&model, args, &device)?; // by all ranks, which gather sharded parameters together
    if fabric.is_global_zero() {
        eprintln!(
            "validation loss {val_loss:.4}; checkpoint and metrics are in {}",
            args.out.display()
        );
        println!("{text}");
        let report = serde_json::json!({
            "steps": args.max_steps, "train_loss": trained.loss, "val_loss": val_loss,
            "tokens_per_s": trained.tokens_per_s.round(), "world_size": world, "strategy": fabric.strategy(),
            "device": fabric.device().to_string(),
            "collectives_per_step": trained.spent.collectives, "bytes_per_step": trained.spent.bytes,
            "peak_rss_mb": peak_rss_mb(), "unigram_entropy": entropy, "parameters": parameters,
        });
        println!("{report}");
    }
    Ok(())
}

/// What training leaves behind, besides the model.
#[derive(Default)]
struct Trained {
    loss: f64, // the last, over all ranks
    tokens_per_s: f64,
    spent: Spent, // by one step
}

/// The training loop.
fn fit(
    fabric: &Fabric,
    args: &Args,
    train: &Windows,
    model: &Module,
    optimizer: &mut FabricOptimizer<AdamW>,
) -> Result<Trained> {
    let device = fabric.tensor_device()?;
    let loader = DataLoader::new(train.clone())
        .batch_size(args.batch_size / fabric.world_size())
        .shuffle(true)
        .seed(args.seed)
        .drop_last(true)
        .workers(1)
        .collate(move |windows| Ok(batch(&windows, &device)?));
    let loader = fabric.setup_dataloaders(loader)?;
    let bar = progress(fabric, args.max_steps);
    let (started, mut step, mut trained) = (Instant::now(), 0, Trained::default());
    while step < args.max_steps {
        for pair in loader.iter().take((args.max_steps - step) as usize) {
            let (input, target) = pair?;
            optimizer.set_learning_rate(args.lr * schedule(step, args.max_steps));
            let before = fabric.spent()?;
            let loss = model.loss(&input, &target)?;
            fabric.backward(Loss(&loss))?;
            let own = scalar(&loss)?;
            drop(loss); // and with it all activations
            fabric.clip_gradients(model, Clip::norm(1.0))?;
            optimizer.step()?;
            trained.spent = fabric.spent()? - before;
            optimizer.zero_grad();
            step += 1;
            bar.inc(1);
            if step % 10 == 0 || step == args.max_steps {
                trained.loss = fabric.all_reduce_value(own, ReduceOp::Avg)?;
                trained.tokens_per_s = args.tokens(step) / started.elapsed().as_secs_f64();
                let metrics = [
                    ("train_loss", trained.loss),
                    ("tokens_per_s", trained.tokens_per_s),
                    ("lr", optimizer.learning_rate()),
                ];
                fabric.log_dict(&metrics, step)?;
                tell(fabric, &bar, step, &trained);
            }
        }
    }
    bar.finish();
    Ok(trained)
}

/// The learning rate's share of its maximum: 20 steps of warm-up, then a cosine down to a tenth.
fn schedule(step: u64, steps: u64) -> f64 {
    let warm = ((step + 1) as f64 / 20.0).min(1.0);
    let done = step as f64 / steps as f64;
    warm * (0.55 + 0.45 * (std::f64::consts::PI * done).cos())
}

fn progress(fabric: &Fabric, steps: u64) -> ProgressBar {
    if !fabric.is_global_zero() || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} [{elapsed}<{eta}] {msg}");
    ProgressBar::new(steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// How it goes: in the progress bar, or on a line of its own where there is no terminal.
fn tell(fabric: &Fabric, bar: &ProgressBar, step: u64, trained: &Trained) {
    let text = format!(
        "loss {:.4}, {:.0} tokens/s",
        trained.loss, trained.tokens_per_s
    );
    if bar.is_hidden() && fabric.is_global_zero() {
        eprintln!("step {step}: {text}");
    }
    bar.set_message(text);
}

/// The mean loss over up to 64 windows for validation, each rank taking its share.
fn validate(fabric: &Fabric, model: &Module, windows: &Windows) -> Result<f64> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let (count, device) = (windows.len().min(64), fabric.tensor_device()?);
    let mut sums = vec![0f64; 2];
    for first in (0..count).step_by(world) {
        // A rank without a window runs the model all the same: sharded parameters are gathered by all.
        let index = first + rank;
        let (input, target) = batch(&[windows.get(index.min(count - 1))?], &device)?;
        let loss = scalar(&model.loss(&input, &target)?)?;
        if index < count {
            sums[0] += loss;
            sums[1] += 1.0;
        }
    }
    fabric.all_reduce(&mut sums, ReduceOp::Sum)?;
    debug_assert!(sums[1] > 0.0, "text::load refuses text without validation");
    Ok(sums[0] / sums[1])
}

/// The checkpoint, and with --trace the record of what happened.
fn save(
    fabric: &Fabric,
    args: &Args,
    model: &Module,
    optimizer: &mut FabricOptimizer<AdamW>,
) -> Result<()> {
    let mut step = args.max_steps;
    let state = State::new()
        .model("model", model)
        .optimizer("optimizer", optimizer)
        .value("step", &mut step);
    fabric.save(args.out.join("last.safetensors"), state)?;
    if let Some(folder) = &args.trace {
        std::fs::create_dir_all(folder)?;
        let rank = fabric.global_rank();
        let path = folder.join(format!("rank{rank}.json"));
        std::fs::write(path, fabric.trace()?.to_chrome(rank))?;
    }
    Ok(())
}

/// Text that the model writes, drawn at temperature 0.8.
fn sample(model: &Gpt, args: &Args, device: &Device) -> Result<String> {
    let mut rng = fabric::seed::rng(args.seed);
    let mut bytes = b"//! ".to_vec();
    for _ in 0..args.sample {
        let window = &bytes[bytes.len().saturating_sub(args.context)..];
        let input = window.iter().map(|byte| u32::from(*byte));
        let input = Tensor::from_iter(input, device)?.unsqueeze(0)?;
        let logits = (model.logits(&input)?.i(window.len() - 1)? / 0.8)?;
        let odds = candle_nn::ops::softmax(&logits.to_dtype(DType::F32)?, 0)?.to_vec1::<f32>()?;
        let mut left = rng.random::<f32>();
        let drawn = odds.iter().position(|odd| {
            left -= odd;
            left <= 0.0
        });
        bytes.push(drawn.unwrap_or(usize::from(b' ')) as u8);
    }
    // A young model also draws bytes that would disturb a terminal.
    let plain = |letter: char| letter == '\n' || !letter.is_control();
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.replace(|letter| !plain(letter), "\u{fffd}"))
}

fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(loss.to_dtype(DType::F64)?.to_scalar()?)
}

/// The most memory this process ever had, in MiB; 0 where the system does not say.
fn peak_rss_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
