//! Cross-validation: k models and k optimizers in a list, each trained on all samples but its own part, and judged by that.

use std::{sync::Arc, time::Instant};

use candle_core::{Device, Result as CandleResult, Tensor};
use fabric::{
    Fabric, FabricModule, FabricOptimizer, Result,
    data::{DataLoader, Subset},
    optim::AdamW,
};
use fabric_candle::{CandleFabric, CandleModel, Loss};
use rand::seq::SliceRandom;
use serde_json::json;

use crate::{
    data::{self, CLASSES, Digit, PIXELS},
    job::{Job, report, tell},
    network::{Activation, Mlp, best},
};

/// Cross-validate a network on handwritten digits: a list of models, optimizers and loaders
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: Job,
    /// Parts of the samples, and models
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(2..=100))]
    folds: u64,
    /// Epochs of each model
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Samples in a batch, on each process
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
}

/// pixels: f32[batch, 64], classes: u32[batch].
type Batch = (Tensor, Tensor);
type Loader = DataLoader<Subset<Arc<Vec<Digit>>>, Batch>;

struct Fold {
    model: FabricModule<CandleModel<Mlp>>,
    optimizer: FabricOptimizer<AdamW>,
    train: Loader,
    left_out: Loader,
}

pub fn main(args: &Args) -> Result<()> {
    let fabric = args.job.builder().build()?;
    fabric.launch(|fabric| run(fabric, args)).map(drop)
}

fn run(fabric: &Fabric, args: &Args) -> Result<()> {
    let started = Instant::now();
    Fabric::seed_everything(Some(args.job.seed))?;
    let (mut digits, test) = data::read(data::ARCHIVE)?;
    digits.extend(test);
    digits.shuffle(&mut fabric::seed::rng(args.job.seed));
    let digits = Arc::new(digits);
    let folds = Subset::folds(digits.len(), args.folds as usize);
    let mut folds: Vec<Fold> = (0..)
        .zip(folds)
        .map(|(number, (train, left_out))| {
            // Every model begins elsewhere, so that the deviation is also that of the first values.
            Fabric::seed_everything(Some(fabric::seed::derive(args.job.seed, &[number])))?;
            let sizes = [PIXELS, 64, CLASSES];
            let model = fabric.init_module(|vb| Mlp::new(&sizes, Activation::Relu, &vb))?;
            let (model, optimizer) = fabric.setup(model, AdamW::new(2e-3))?;
            let loader = |samples| -> Result<_> {
                let loader = DataLoader::new(Subset::new(digits.clone(), samples)?);
                let loader = loader.batch_size(args.batch as usize);
                let device = fabric.tensor_device()?;
                Ok(loader.collate(move |digits| Ok(collate(&digits, &device)?)))
            };
            let loaders = (loader(train)?.shuffle(true).seed(number), loader(left_out)?);
            let (train, left_out) = fabric.setup_dataloaders(loaders)?;
            Ok(Fold {
                model,
                optimizer,
                train,
                left_out,
            })
        })
        .collect::<Result<_>>()?;
    for epoch in 0..args.epochs {
        for fold in &mut folds {
            fold.train_epoch(fabric)?;
        }
        let (accuracies, _) = judge(fabric, &folds)?;
        let (mean, deviation) = mean_and_deviation(&accuracies);
        tell(
            fabric,
            format!("epoch {}: {mean:.4} +- {deviation:.4}", epoch + 1),
        );
    }
    let (accuracies, samples) = judge(fabric, &folds)?;
    let (mean, deviation) = mean_and_deviation(&accuracies);
    let results = json!({
        "folds": args.folds,
        "epochs": args.epochs,
        "samples": samples,
        "accuracies": accuracies,
        "mean_accuracy": mean,
        "deviation": deviation,
    });
    report(fabric, started, results)
}

impl Fold {
    fn train_epoch(&mut self, fabric: &Fabric) -> Result<()> {
        for batch in &self.train {
            let (pixels, classes) = batch?;
            let logits = fabric.autocast(&pixels, |x| self.model.forward(x))?;
            let loss = candle_nn::loss::cross_entropy(&logits, &classes)?;
            // The loss touches this fold's model alone: the others take no part, and nothing of theirs travels.
            fabric.backward(Loss(&loss))?;
            self.optimizer.step()?;
            self.optimizer.zero_grad();
        }
        Ok(())
    }

    /// Of each sample left out, whether the model gets it right: once, whatever the number of ranks.
    fn judge(&self, fabric: &Fabric) -> Result<Vec<bool>> {
        let mut right = Vec::new();
        for batch in &self.left_out {
            let (pixels, classes) = batch?;
            let best = best(&fabric.autocast(&pixels, |x| self.model.forward(x))?)?;
            let own = best.into_iter().zip(classes.to_vec1::<u32>()?);
            let own: Vec<bool> = own.map(|(best, class)| best == class).collect();
            right.extend(fabric.gather_for_metrics(&self.left_out, own)?);
        }
        Ok(right)
    }
}

/// The share of the samples left out that each model gets right, and how many they are together.
fn judge(fabric: &Fabric, folds: &[Fold]) -> Result<(Vec<f64>, usize)> {
    let (mut accuracies, mut samples) = (Vec::new(), 0);
    for fold in folds {
        let right = fold.judge(fabric)?;
        let count = right.iter().filter(|right| **right).count();
        accuracies.push(count as f64 / right.len() as f64);
        samples += right.len();
    }
    Ok((accuracies, samples))
}

fn collate(digits: &[Digit], device: &Device) -> CandleResult<Batch> {
    let pixels = digits.iter().flat_map(|digit| digit.pixels.iter().copied());
    let classes = digits.iter().map(|digit| digit.class as u32);
    Ok((
        Tensor::from_iter(pixels, device)?.reshape((digits.len(), PIXELS))?,
        Tensor::from_iter(classes, device)?,
    ))
}

/// The deviation of one value, estimated from these (division by their number - 1).
fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (values.len() - 1) as f64).sqrt())
}
