//! A generative adversarial network on handwritten digits: two models and two optimizers, whose losses go through one or
//! both of them.

use std::{io::Write, path::Path, time::Instant};

use candle_core::{DType, Result as CandleResult, Tensor};
use fabric::{
    Error, Fabric, FabricModule, FabricOptimizer, ReduceOp, Result, data::DataLoader, optim::AdamW,
};
use fabric_candle::{CandleFabric, CandleModel, Loss};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::{
    data::{self, PIXELS},
    job::{Job, report, tell},
    network::{Activation, Mlp, scalar},
};

const NOISE: usize = 24;
const ROWS: usize = 4; // of the picture
const COLUMNS: usize = 10;
const SIDE: usize = 8; // pixels of a digit

/// Draw digits that nobody wrote: two models, two optimizers, and a picture from rank 0
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: Job,
    /// Epochs
    #[arg(long, default_value_t = 160, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Samples in a batch, on each process
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    /// The learning rate of both
    #[arg(long, default_value_t = 5e-4)]
    lr: f64,
}

pub fn main(args: &Args) -> Result<()> {
    let fabric = args.job.builder().build()?;
    fabric.launch(|fabric| run(fabric, args)).map(drop)
}

fn run(fabric: &Fabric, args: &Args) -> Result<()> {
    let started = Instant::now();
    Fabric::seed_everything(Some(args.job.seed))?;
    let (digits, test) = data::read(data::ARCHIVE)?;
    let digits: Vec<Vec<f32>> = digits
        .into_iter()
        .chain(test)
        .map(|digit| digit.pixels)
        .collect();
    let real = Pixels::of(&digits.concat());
    let loader = DataLoader::new(digits)
        .batch_size(args.batch as usize)
        .shuffle(true)
        .drop_last(true);
    let loader = fabric.setup_dataloaders(loader)?;
    if loader.is_empty() {
        return Err(Error::argument(
            format!("batches of {} fill no step of all processes", args.batch),
            "Choose a smaller --batch, or fewer --devices",
        ));
    }
    let (mut game, device) = (Game::new(fabric, args)?, fabric.tensor_device()?);
    let (mut losses, mut steps) = ((0.0, 0.0), 0);
    for epoch in 1..=args.epochs {
        for batch in &loader {
            let batch = batch?;
            let real = Tensor::from_vec(batch.concat(), (batch.len(), PIXELS), &device)?;
            let own = game.play(&real)?;
            losses = fabric.all_reduce_value(own, ReduceOp::Avg)?;
            steps += 1;
        }
        if epoch % 10 == 0 {
            let (by_judge, by_forger) = losses;
            tell(
                fabric,
                format!("epoch {epoch}: discriminator {by_judge:.3}, generator {by_forger:.3}"),
            );
        }
    }
    // All ranks draw, because under fsdp a model is run by all; rank 0 shows what it drew.
    let drawn = pixels(&game.forge(ROWS * COLUMNS)?)?;
    if fabric.is_global_zero() {
        let path = args.job.out("gan").join("samples.pgm");
        write_picture(&path, &drawn)?;
        eprint!("{}", in_blocks(&drawn));
        eprintln!("the picture is {}", path.display());
    }
    fabric.barrier()?; // when anybody goes on, the picture is there
    let sample = pixels(&game.forge(400)?)?;
    let fake = Pixels::of(&fabric.all_gather_object(&sample)?.concat());
    let results = json!({
        "epochs": args.epochs,
        "steps": steps,
        "discriminator_loss": losses.0,
        "generator_loss": losses.1,
        "mean_error": fake.distance(&real),
        "spread": fake.spread / real.spread,
    });
    report(fabric, started, results)
}

type Model = FabricModule<CandleModel<Mlp>>;
type Optimizer = FabricOptimizer<AdamW>;

/// A forger, who makes digits of noise, and a judge, who is to tell them from real ones.
struct Game {
    fabric: Fabric,
    forger: (Model, Optimizer),
    judge: (Model, Optimizer),
    rng: ChaCha8Rng, // of the noise, which is another on every rank
}

impl Game {
    fn new(fabric: &Fabric, args: &Args) -> Result<Self> {
        let forger = [NOISE, 128, 128, PIXELS];
        let forger =
            fabric.init_module(|vb| Mlp::new(&forger, Activation::Relu, &vb.pp("forger")))?;
        let judge = [PIXELS, 128, 64, 1];
        let judge =
            fabric.init_module(|vb| Mlp::new(&judge, Activation::LeakyRelu, &vb.pp("judge")))?;
        let adam = || AdamW::new(args.lr).betas(0.5, 0.999).weight_decay(0.0);
        let rank = fabric.global_rank() as u64;
        Ok(Self {
            fabric: fabric.clone(),
            forger: fabric.setup(forger, adam())?,
            judge: fabric.setup(judge, adam())?,
            rng: fabric::seed::rng(fabric::seed::derive(args.job.seed, &[rank])),
        })
    }

    /// A step of the judge, then one of the forger; their losses. real: f32[batch, 64].
    fn play(&mut self, real: &Tensor) -> Result<(f64, f64)> {
        let count = real.dim(0)?;
        // What the judge learns does not concern the forger: detached, its digits are data like the real ones, and its
        // model, which the loss does not touch, takes no part in the backward. One forward for both kinds of digits: a
        // unit's parameters are gathered once.
        let fake = self.forge(count)?.detach();
        let both = Tensor::cat(&[&real.to_dtype(fake.dtype())?, &fake], 0)?;
        let verdicts = self.judge(&both)?;
        let (of_real, of_fake) = (
            verdicts.narrow(0, 0, count)?,
            verdicts.narrow(0, count, count)?,
        );
        // Digits that are real count as 0.9 real (Salimans et al. 2016), so that the judge is never quite sure.
        let by_judge = ((softplus(&of_real.neg()?)?.affine(0.9, 0.0)?
            + softplus(&of_real)?.affine(0.1, 0.0)?)?
            + softplus(&of_fake)?)?
        .mean_all()?;
        self.fabric.backward(Loss(&by_judge))?;
        let (_, optimizer) = &mut self.judge;
        optimizer.step()?;
        optimizer.zero_grad();

        // The forger's loss goes through the judge, who gets gradients that nobody wants: they stay on this rank instead of
        // being averaged, and are forgotten.
        let fake = self.forge(count)?;
        let by_forger = softplus(&self.judge(&fake)?.neg()?)?.mean_all()?;
        let (judge, its_optimizer) = &mut self.judge;
        self.fabric
            .no_backward_sync(judge, true, || self.fabric.backward(Loss(&by_forger)))?;
        its_optimizer.zero_grad();
        let (_, optimizer) = &mut self.forger;
        optimizer.step()?;
        optimizer.zero_grad();
        Ok((scalar(&by_judge)?, scalar(&by_forger)?))
    }

    /// Digits of noise: f32[count, 64], from 0 to 1.
    fn forge(&mut self, count: usize) -> Result<Tensor> {
        let normal = rand_distr::StandardNormal;
        let noise = (0..count * NOISE).map(|_| self.rng.sample::<f32, _>(normal));
        let noise =
            Tensor::from_iter(noise, &self.fabric.tensor_device()?)?.reshape((count, NOISE))?;
        let sigmoid = |x: &Tensor| (x.affine(0.5, 0.0)?.tanh()? + 1.0)?.affine(0.5, 0.0);
        self.fabric
            .autocast(&noise, |noise| sigmoid(&self.forger.0.forward(noise)?))
    }

    /// How real `digits` look, as logits: f32[count, 64] -> f32[count, 1].
    fn judge(&self, digits: &Tensor) -> Result<Tensor> {
        self.fabric
            .autocast(digits, |digits| self.judge.0.forward(digits))
    }
}

/// ln(1 + e^x), which does not overflow: the cross-entropy of a logit x for "no".
fn softplus(x: &Tensor) -> CandleResult<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

fn pixels(digits: &Tensor) -> CandleResult<Vec<f32>> {
    digits.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
}

/// What can be said of digits without looking at them: the mean of each pixel, and how far digits are from it.
struct Pixels {
    mean: Vec<f64>,
    spread: f64,
}

impl Pixels {
    fn of(digits: &[f32]) -> Self {
        let count = (digits.len() / PIXELS) as f64;
        let mut mean = vec![0.0; PIXELS];
        for digit in digits.chunks_exact(PIXELS) {
            mean.iter_mut()
                .zip(digit)
                .for_each(|(mean, pixel)| *mean += f64::from(*pixel) / count);
        }
        let far = |digit: &[f32]| -> f64 {
            let squares = mean
                .iter()
                .zip(digit)
                .map(|(mean, pixel)| (f64::from(*pixel) - mean).powi(2));
            squares.sum()
        };
        let variance = digits.chunks_exact(PIXELS).map(far).sum::<f64>() / count;
        Self {
            mean,
            spread: variance.sqrt(),
        }
    }

    /// The mean difference of the pixels' means.
    fn distance(&self, other: &Self) -> f64 {
        let pairs = self.mean.iter().zip(&other.mean);
        pairs.map(|(a, b)| (a - b).abs()).sum::<f64>() / PIXELS as f64
    }
}

/// Pixel (x, y) of the picture in which `ROWS` x `COLUMNS` digits lie.
fn pixel(digits: &[f32], x: usize, y: usize) -> f32 {
    let digit = y / SIDE * COLUMNS + x / SIDE;
    digits[digit * PIXELS + y % SIDE * SIDE + x % SIDE].clamp(0.0, 1.0)
}

/// As a grey picture that most viewers open (PGM).
fn write_picture(path: &Path, digits: &[f32]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = std::fs::File::create(path)?;
    let (width, height) = (COLUMNS * SIDE, ROWS * SIDE);
    let places = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let bytes: Vec<u8> = places
        .map(|(x, y)| (pixel(digits, x, y) * 255.0).round() as u8)
        .collect();
    write!(file, "P5\n{width} {height}\n255\n")?;
    Ok(file.write_all(&bytes)?)
}

/// As text: two rows of pixels a line.
fn in_blocks(digits: &[f32]) -> String {
    let mut text = String::new();
    for y in (0..ROWS * SIDE).step_by(2) {
        for x in 0..COLUMNS * SIDE {
            let is_dark = |y| pixel(digits, x, y) > 0.4;
            text.push(match (is_dark(y), is_dark(y + 1)) {
                (true, true) => '█',
                (true, false) => '▀',
                (false, true) => '▄',
                (false, false) => ' ',
            });
        }
        text.push('\n');
    }
    text
}
