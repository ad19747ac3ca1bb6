//! A network over plain vectors that computes its own gradients, and learns to read handwritten digits.

use std::ops::Range;

use fabric::{
    FabricModule, Result,
    engine::Result as EngineResult,
    model::Backward,
    vec::{Block, Chain, Init, Link, VecModel},
};
use rand::Rng;

use crate::{
    data::{CLASSES, Digit, PIXELS},
    trainer::Task,
};

const HIDDEN: [usize; 2] = [96, 48];

/// Three layers, each a unit: 64 pixels, 96, 48, 10 classes.
pub struct Digits {
    chain: Chain<f32>,
}

impl Digits {
    /// The model, without memory until `fabric.setup` asks for its first values; and the network over it.
    pub fn new(seed: u64) -> Result<(VecModel, Self)> {
        let sizes = [PIXELS, HIDDEN[0], HIDDEN[1], CLASSES];
        let layers = || (0..sizes.len() - 1).map(|layer| (layer, sizes[layer], sizes[layer + 1]));
        let params = layers().flat_map(move |(layer, inputs, outputs)| {
            let seed = fabric::seed::derive(seed, &[layer as u64]);
            let bound = (6.0 / inputs as f32).sqrt(); // He et al. 2015
            let weights: Init<f32> = Box::new(move || uniform(seed, inputs * outputs, bound));
            let zeros: Init<f32> = Box::new(move || vec![0.0; outputs]);
            [
                (format!("layer.{layer}.weight"), inputs * outputs, weights),
                (format!("layer.{layer}.bias"), outputs, zeros),
            ]
        });
        let units = layers().map(|(layer, ..)| format!("layer.{layer}"));
        let model = VecModel::deferred(params).in_units(units)?;
        let link = |(layer, inputs, outputs): (usize, usize, usize)| {
            let affine = Affine {
                inputs,
                outputs,
                relu: outputs != CLASSES,
            };
            Link::new(&model, &format!("layer.{layer}"), affine)
        };
        let chain = Chain::new(layers().map(link).collect::<EngineResult<_>>()?);
        Ok((model, Self { chain }))
    }
}

impl Task<VecModel> for Digits {
    type Batch = Vec<Digit>;

    fn training_step<'a>(
        &'a self,
        model: &'a FabricModule<VecModel>,
        batch: &'a Vec<Digit>,
    ) -> Result<(f64, impl Backward + 'a)> {
        let pixels = batch
            .iter()
            .flat_map(|digit| digit.pixels.clone())
            .collect();
        let pass = self.chain.forward(model, pixels)?;
        let (mut loss, mut by_logits) = (0.0, Vec::with_capacity(batch.len() * CLASSES));
        for (digit, logits) in batch.iter().zip(pass.output().chunks_exact(CLASSES)) {
            let mut odds = softmax(logits);
            loss -= f64::from(odds[digit.class].max(f32::MIN_POSITIVE)).ln();
            odds[digit.class] -= 1.0;
            by_logits.extend(odds.iter().map(|odds| odds / batch.len() as f32));
        }
        Ok((loss / batch.len() as f64, pass.loss(by_logits)))
    }

    fn validation_step(
        &self,
        model: &FabricModule<VecModel>,
        batch: &Vec<Digit>,
    ) -> Result<Vec<Vec<f64>>> {
        let pixels = batch
            .iter()
            .flat_map(|digit| digit.pixels.clone())
            .collect();
        let pass = self.chain.forward(model, pixels)?;
        let scores = batch.iter().zip(pass.output().chunks_exact(CLASSES));
        let score = |(digit, logits): (&Digit, &[f32])| {
            let odds = softmax(logits);
            let is_best = odds.iter().all(|other| *other <= odds[digit.class]);
            let loss = -f64::from(odds[digit.class].max(f32::MIN_POSITIVE)).ln();
            vec![loss, f64::from(u8::from(is_best))]
        };
        Ok(scores.map(score).collect())
    }

    fn scores(&self) -> Vec<&'static str> {
        vec!["val_loss", "val_accuracy"]
    }

    fn samples(&self, batch: &Vec<Digit>) -> u64 {
        batch.len() as u64
    }

    /// Down to nothing over 600 steps, on a cosine.
    fn learning_rate(&self, step: u64) -> Option<f64> {
        let done = (step as f64 / 600.0).min(1.0);
        Some(4e-3 * (0.02 + 0.98 * (1.0 + (std::f64::consts::PI * done).cos()) / 2.0))
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|logit| (logit - most).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

fn uniform(seed: u64, count: usize, bound: f32) -> Vec<f32> {
    let mut rng = fabric::seed::rng(seed);
    (0..count)
        .map(|_| rng.random_range(-bound..bound))
        .collect()
}

/// y = W x + b, or what of it is above zero, for every row of a batch. W: `f32[outputs, inputs]`, row-major.
struct Affine {
    inputs: usize,
    outputs: usize,
    relu: bool,
}

impl Affine {
    fn row(&self, output: usize) -> Range<usize> {
        output * self.inputs..(output + 1) * self.inputs
    }
}

impl Block<f32> for Affine {
    fn forward(&self, params: &[&[f32]], input: &[f32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(input.len() / self.inputs * self.outputs);
        for x in input.chunks_exact(self.inputs) {
            for (weights, bias) in params[0].chunks_exact(self.inputs).zip(params[1]) {
                let sum = weights.iter().zip(x).map(|(w, x)| w * x).sum::<f32>() + bias;
                out.push(if self.relu { sum.max(0.0) } else { sum });
            }
        }
        out
    }

    fn backward(
        &self,
        params: &[&[f32]],
        input: &[f32],
        output_grad: &[f32],
        grads: &mut [Vec<f32>],
    ) -> Vec<f32> {
        let output = self.forward(params, input);
        let mut by_input = vec![0.0; input.len()];
        let rows = input
            .chunks_exact(self.inputs)
            .zip(by_input.chunks_exact_mut(self.inputs));
        let outs = output
            .chunks_exact(self.outputs)
            .zip(output_grad.chunks_exact(self.outputs));
        for ((x, by_x), (y, by_y)) in rows.zip(outs) {
            for j in (0..self.outputs).filter(|j| !self.relu || y[*j] > 0.0) {
                grads[1][j] += by_y[j];
                let weights = &params[0][self.row(j)];
                let by_weights = &mut grads[0][self.row(j)];
                for i in 0..self.inputs {
                    by_weights[i] += by_y[j] * x[i];
                    by_x[i] += by_y[j] * weights[i];
                }
            }
        }
        by_input
    }
}
