//! A layer that computes its own gradients: what examples, tests and benches train over plain vectors.

use super::Block;

/// y = x + leaky(W x + b), one sample at a time; its parameters are W: `f32[width, width]`, row-major, and b: `f32[width]`.
///
/// ```
/// use fabric::vec::{Block, Dense};
/// let layer = Dense::new(2);
/// let (weight, bias) = ([1.0, 0.0, 0.0, -1.0], [0.0, 0.0]);
/// assert_eq!(layer.forward(&[&weight, &bias], &[3.0, 4.0]), [6.0, 3.0]);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Dense {
    width: usize,
}

const SLOPE: f32 = 0.25; // below zero

impl Dense {
    /// A layer of `width` features.
    pub fn new(width: usize) -> Self {
        Self { width }
    }

    /// How many elements its parameters have: the weight, and the bias.
    pub fn sizes(&self) -> [usize; 2] {
        [self.width * self.width, self.width]
    }

    fn hidden(&self, params: &[&[f32]], input: &[f32]) -> Vec<f32> {
        let rows = params[0].chunks_exact(self.width).zip(params[1]);
        rows.map(|(row, bias)| dot(row, input) + bias).collect()
    }
}

/// The dot product, in eight lanes that are added at the end.
fn dot(left: &[f32], right: &[f32]) -> f32 {
    const LANES: usize = 8;
    let (a, b) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    let rest = rest.map(|(a, b)| a * b).sum::<f32>();
    let mut lanes = [0f32; LANES];
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

impl Block<f32> for Dense {
    fn forward(&self, params: &[&[f32]], input: &[f32]) -> Vec<f32> {
        let hidden = self.hidden(params, input);
        let leaky = |x: f32| if x > 0.0 { x } else { SLOPE * x };
        input
            .iter()
            .zip(hidden)
            .map(|(x, h)| x + leaky(h))
            .collect()
    }

    fn backward(
        &self,
        params: &[&[f32]],
        input: &[f32],
        output_grad: &[f32],
        grads: &mut [Vec<f32>],
    ) -> Vec<f32> {
        let hidden = self.hidden(params, input);
        let mut by_input = output_grad.to_vec();
        for (j, h) in hidden.into_iter().enumerate() {
            let by_hidden = output_grad[j] * if h > 0.0 { 1.0 } else { SLOPE };
            grads[1][j] += by_hidden;
            let row = j * self.width..(j + 1) * self.width;
            let into = grads[0][row.clone()].iter_mut().zip(input);
            into.for_each(|(grad, x)| *grad += by_hidden * x);
            let weights = by_input.iter_mut().zip(&params[0][row]);
            weights.for_each(|(by_input, weight)| *by_input += by_hidden * weight);
        }
        by_input
    }
}
