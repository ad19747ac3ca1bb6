//! What the tests and their programs share: a small real problem, trained over plain vectors, and a count of allocations.

mod record;

pub use record::Record;

use fabric::{Result, vec::VecModel};

/// Two layers of linear regression towards a fixed target: enough to have several buckets and a falling loss.
pub struct Problem {
    features: usize,
}

impl Problem {
    /// A problem with this many features.
    pub fn new(features: usize) -> Self {
        Self { features }
    }

    /// A model for it, all zeros.
    pub fn model(&self) -> VecModel {
        VecModel::new([
            ("weight", vec![0f32; self.features]),
            ("bias", vec![0f32; 1]),
        ])
    }

    /// Sample `index`: its features and its target, pure functions of the index.
    pub fn sample(&self, index: usize) -> (Vec<f32>, f32) {
        let feature =
            |column: usize| (((index * 7919 + column * 104_729) % 1000) as f32 - 500.0) / 500.0;
        let features = (0..self.features).map(feature).collect::<Vec<_>>();
        let target = features
            .iter()
            .enumerate()
            .map(|(column, x)| x * (column as f32 + 1.0) / 10.0)
            .sum::<f32>();
        (features, target + 0.5)
    }

    /// The mean squared error over `batch`, and its gradients in the model's order.
    ///
    /// # Errors
    /// Never; it has the shape of a training step.
    pub fn loss(&self, model: &VecModel, batch: &[usize]) -> Result<(f32, Vec<Option<Vec<f32>>>)> {
        let (weight, bias) = (model.read("weight"), model.read("bias"));
        let (mut loss, mut by_weight, mut by_bias) =
            (0.0, vec![0f32; self.features], vec![0f32; 1]);
        for index in batch {
            let (features, target) = self.sample(*index);
            let error = features
                .iter()
                .zip(&weight)
                .map(|(x, w)| x * w)
                .sum::<f32>()
                + bias[0]
                - target;
            loss += error * error / batch.len() as f32;
            let slope = 2.0 * error / batch.len() as f32;
            by_weight
                .iter_mut()
                .zip(&features)
                .for_each(|(grad, x)| *grad += slope * x);
            by_bias[0] += slope;
        }
        Ok((loss, vec![Some(by_weight), Some(by_bias)]))
    }
}
