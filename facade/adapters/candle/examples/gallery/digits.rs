//! A convolutional network learns to read handwritten digits, by the trainer that `facade/examples/trainer/trainer.rs` is.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::{Device, Result as CandleResult, Tensor};
use candle_nn::{Linear, Module, VarBuilder};
use fabric::{
    Clip, Error, Fabric, FabricModule, ReduceOp, Result, State,
    callback::{Mode, ModelCheckpoint, ProgressBar},
    data::{DataLoader, Dataset},
    model::Backward,
    optim::AdamW,
};
use fabric_candle::{CandleFabric, CandleModel, Loss, Unit};
use serde_json::json;

use crate::{
    convolution::Convolution,
    data::{self, CLASSES, Digit},
    job::{Job, report, tell},
    network::{best, scalar},
    trainer::{Task, Trainer},
};

const SIDE: usize = 8; // pixels of an image

/// Read handwritten digits: a trainer, a schedule, checkpoints, and a metric that counts every sample once
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: Job,
    /// Epochs
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Samples in a batch, over all processes together
    #[arg(long, default_value_t = 48)]
    batch: usize,
    /// Parts of a batch that are computed one after the other
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    accumulate: u64,
    /// The largest learning rate
    #[arg(long, default_value_t = 4e-3)]
    lr: f64,
    /// Go on from the newest checkpoint in --out
    #[arg(long)]
    resume: bool,
}

pub fn main(args: &Args) -> Result<()> {
    let fabric = args
        .job
        .builder()
        .callback(ProgressBar::new())
        .callback(
            ModelCheckpoint::new(args.checkpoints())
                .monitor("val_accuracy", Mode::Max)
                .save_last(true),
        )
        .build()?;
    let parts = fabric.ranks() * args.accumulate as usize;
    if args.batch == 0 || !args.batch.is_multiple_of(parts) {
        return Err(Error::argument(
            format!("a batch of {} samples in {parts} parts", args.batch),
            "Choose a --batch that is a multiple of the processes, times --accumulate",
        ));
    }
    fabric.launch(|fabric| train(fabric, args)).map(drop)
}

impl Args {
    fn out(&self) -> PathBuf {
        self.job.out("digits")
    }

    fn checkpoints(&self) -> PathBuf {
        self.out().join("checkpoints")
    }
}

fn train(fabric: &Fabric, args: &Args) -> Result<()> {
    let started = Instant::now();
    Fabric::seed_everything(Some(args.job.seed))?;
    let archive = fabric.rank_zero_first(|| fetch(&args.out()))?;
    let (train, test) = data::read(&archive)?;
    let batch = args.batch / fabric.world_size() / args.accumulate as usize;
    let train = Turned(train);
    let steps = args.epochs * train.len().div_ceil(args.batch) as u64;
    let train = DataLoader::new(train).batch_size(batch).shuffle(true);
    let device = fabric.tensor_device()?;
    let on = device.clone();
    let train = train.collate(move |digits| Ok(collate(&digits, &on)?));
    let test = || DataLoader::new(test.clone()).batch_size(60);
    let reader = Reader {
        fabric: fabric.clone(),
        seed: args.job.seed,
        lr: args.lr,
        steps,
    };
    let mut trainer = Trainer {
        max_epochs: args.epochs,
        accumulate: args.accumulate as usize,
        clip: Some(Clip::norm(1.0)),
        ..Trainer::default()
    };
    if args.resume {
        trainer = trainer.resume_latest(args.checkpoints())?;
    }
    let optimizer = AdamW::new(args.lr).weight_decay(1e-2);
    let model = fabric.init_module(|vb| Network::new(&vb))?;
    let validation = test().collate(move |digits| Ok(collate(&digits, &device)?));
    let trained = trainer.fit(fabric, &reader, (model, optimizer), (train, validation))?;

    let path = args.out().join("model.safetensors");
    fabric.save(&path, State::new().model("model", &trained.model))?;
    let (reloaded, count) = reread(fabric, &reader, &path, test())?;

    let (progress, metrics) = (trained.state.progress, &trained.state.metrics);
    let number = |name| metrics.get(name).unwrap_or(f64::NAN);
    let train_loss = fabric.all_reduce_value(number("loss"), ReduceOp::Avg)?;
    tell(fabric, format!("{reloaded:.4} of {count} digits are read"));
    let results = json!({
        "epochs": progress.epoch,
        "steps": progress.steps,
        "train_loss": train_loss,
        "test_loss": number("val_loss"),
        "test_accuracy": number("val_accuracy"),
        "test_samples": count,
        "reloaded_accuracy": reloaded,
    });
    report(fabric, started, results)
}

/// What was saved is what was trained: another model, with other first values, reads as well after loading. The share of
/// the samples that it gets right, and how many they are.
fn reread(
    fabric: &Fabric,
    reader: &Reader,
    path: &Path,
    samples: DataLoader<Vec<Digit>>,
) -> Result<(f64, usize)> {
    Fabric::seed_everything(Some(reader.seed.wrapping_add(1)))?;
    let model = fabric.setup_module(fabric.init_module(|vb| Network::new(&vb))?)?;
    fabric.load(path, State::new().model("model", &model))?;
    let device = fabric.tensor_device()?;
    let samples = samples.collate(move |digits| Ok(collate(&digits, &device)?));
    let loader = fabric.setup_dataloaders(samples)?;
    let mut right = Vec::new();
    for batch in &loader {
        let scores = reader.validation_step(&model, &batch?)?;
        right.extend(fabric.gather_for_metrics(&loader, scores)?);
    }
    let sum: f64 = right.iter().map(|score| score[1]).sum();
    Ok((sum / right.len() as f64, right.len()))
}

/// The digits' file, in `folder`. Rank 0 is here first and makes it, as it would download it; the others find it. All look
/// at its checksum, because a file may be half a file.
fn fetch(folder: &Path) -> Result<Vec<u8>> {
    let path = folder.join("digits.csv.gz");
    let is_whole = |archive: &[u8]| crc32c::crc32c(archive) == crc32c::crc32c(data::ARCHIVE);
    if let Ok(archive) = std::fs::read(&path)
        && is_whole(&archive)
    {
        return Ok(archive);
    }
    put(folder, &path)
        .map_err(|error| Error::new(format!("cannot write {}: {error}", path.display())))?;
    let archive = std::fs::read(&path)?;
    match is_whole(&archive) {
        true => Ok(archive),
        false => Err(Error::argument(
            format!("{} is damaged", path.display()),
            "Look at the disk that it is on",
        )),
    }
}

fn put(folder: &Path, path: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut part = tempfile::NamedTempFile::new_in(folder)?; // nobody sees half a file
    part.write_all(data::ARCHIVE)?;
    part.persist(path)?;
    Ok(())
}

/// Every digit as it is, and turned a little: digits are written upright by some and leaning by others.
struct Turned(Vec<Digit>);

const DEGREES: [f32; 5] = [0.0, -14.0, -7.0, 7.0, 14.0];

impl Dataset for Turned {
    type Item = Digit;

    fn len(&self) -> usize {
        self.0.len() * DEGREES.len()
    }

    fn get(&self, index: usize) -> Result<Digit> {
        let digit = self.0.get(index / DEGREES.len())?;
        Ok(Digit {
            pixels: turned(&digit.pixels, DEGREES[index % DEGREES.len()]),
            class: digit.class,
        })
    }
}

/// An image, turned round its middle: each pixel is a mixture of the four that were nearest to its place.
fn turned(pixels: &[f32], degrees: f32) -> Vec<f32> {
    let middle = (SIDE as f32 - 1.0) / 2.0;
    let (sine, cosine) = degrees.to_radians().sin_cos();
    let at =
        |x: f32, y: f32| match (0.0..SIDE as f32).contains(&x) && (0.0..SIDE as f32).contains(&y) {
            true => pixels[y as usize * SIDE + x as usize],
            false => 0.0,
        };
    let pixel = |place: usize| {
        let (x, y) = (
            (place % SIDE) as f32 - middle,
            (place / SIDE) as f32 - middle,
        );
        let (x, y) = (
            cosine * x + sine * y + middle,
            cosine * y - sine * x + middle,
        );
        let (left, top) = (x.floor(), y.floor());
        let (right, low) = (x - left, y - top); // how far from them
        let upper = at(left, top) * (1.0 - right) + at(left + 1.0, top) * right;
        let lower = at(left, top + 1.0) * (1.0 - right) + at(left + 1.0, top + 1.0) * right;
        upper * (1.0 - low) + lower * low
    };
    (0..SIDE * SIDE).map(pixel).collect()
}

/// pixels: f32[batch, 8 * 8, 1], classes: u32[batch].
struct Batch {
    pixels: Tensor,
    classes: Tensor,
}

fn collate(digits: &[Digit], device: &Device) -> CandleResult<Batch> {
    let pixels = digits.iter().flat_map(|digit| digit.pixels.iter().copied());
    let classes = digits.iter().map(|digit| digit.class as u32);
    Ok(Batch {
        pixels: Tensor::from_iter(pixels, device)?.reshape((digits.len(), (), 1))?,
        classes: Tensor::from_iter(classes, device)?,
    })
}

/// Reading, as a task for the trainer.
struct Reader {
    fabric: Fabric,
    seed: u64,
    lr: f64,
    steps: u64,
}

type Model = CandleModel<Network>;

impl Task<Model> for Reader {
    type Batch = Batch;

    fn training_step<'a>(
        &'a self,
        model: &'a FabricModule<Model>,
        batch: &'a Batch,
    ) -> Result<(f64, impl Backward + 'a)> {
        let logits = self.fabric.autocast(&batch.pixels, |x| model.forward(x))?;
        let loss = candle_nn::loss::cross_entropy(&logits, &batch.classes)?;
        Ok((scalar(&loss)?, Loss(loss)))
    }

    fn validation_step(&self, model: &FabricModule<Model>, batch: &Batch) -> Result<Vec<Vec<f64>>> {
        let logits = self.fabric.autocast(&batch.pixels, |x| model.forward(x))?;
        let odds = candle_nn::ops::log_softmax(&logits, 1)?;
        let odds = odds.gather(&batch.classes.unsqueeze(1)?, 1)?.squeeze(1)?;
        let losses = odds
            .neg()?
            .to_dtype(candle_core::DType::F64)?
            .to_vec1::<f64>()?;
        let right = best(&logits)?
            .into_iter()
            .zip(batch.classes.to_vec1::<u32>()?);
        let scores = losses.into_iter().zip(right);
        let score = |(loss, (best, class))| vec![loss, f64::from(u8::from(best == class))];
        Ok(scores.map(score).collect())
    }

    fn scores(&self) -> Vec<&'static str> {
        vec!["val_loss", "val_accuracy"]
    }

    fn samples(&self, batch: &Batch) -> u64 {
        batch.classes.elem_count() as u64
    }

    /// A short warm-up, then a cosine down to a hundredth.
    fn learning_rate(&self, step: u64) -> Option<f64> {
        let warm = ((step + 1) as f64 / 10.0).min(1.0);
        let done = (step as f64 / self.steps as f64).min(1.0);
        Some(self.lr * warm * (0.505 + 0.495 * (std::f64::consts::PI * done).cos()))
    }
}

/// Two convolutions and a linear layer, each a unit: 8x8x1, 8x8x32, 4x4x64, 10 classes.
struct Network {
    convolutions: [Convolution; 2],
    unit: Unit,
    head: Linear,
}

impl Network {
    fn new(vb: &VarBuilder) -> CandleResult<Self> {
        let convolutions = [
            Convolution::new((8, 1), (1, 32), &vb.pp("conv.0"))?,
            Convolution::new((8, 2), (32, 64), &vb.pp("conv.1"))?,
        ];
        let vb = vb.pp("head");
        Ok(Self {
            convolutions,
            unit: Unit::new(&vb)?,
            head: candle_nn::linear(4 * 4 * 64, CLASSES, vb)?,
        })
    }

    /// pixels: [batch, 8 * 8, 1] -> logits: [batch, 10].
    fn forward(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        let [first, second] = &self.convolutions;
        let x = second.forward(&first.forward(pixels)?)?;
        self.unit.run(&x.flatten_from(1)?, |x| self.head.forward(x))
    }
}
