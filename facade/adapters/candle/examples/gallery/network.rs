//! Networks that several examples use: layers one behind the other, each a unit, so that every strategy works.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Linear, Module, VarBuilder};
use fabric_candle::Unit;

/// What is between layers.
#[derive(Clone, Copy)]
pub enum Activation {
    Relu,
    /// Slope 0.2 below zero, as is usual in discriminators.
    LeakyRelu,
    Tanh,
}

impl Activation {
    fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Relu => x.relu(),
            Self::LeakyRelu => x.maximum(&x.affine(0.2, 0.0)?),
            Self::Tanh => x.tanh(),
        }
    }
}

/// Linear layers, an activation between them.
pub struct Mlp {
    layers: Vec<(Unit, Linear)>,
    activation: Activation,
}

impl Mlp {
    /// `sizes`: of the input, of what is between layers, of the output.
    pub fn new(sizes: &[usize], activation: Activation, vb: &VarBuilder) -> Result<Self> {
        let layer = |(number, size): (usize, &[usize])| {
            let vb = vb.pp(format!("layer.{number}"));
            let unit = Unit::new(&vb)?;
            Ok((unit, candle_nn::linear(size[0], size[1], vb)?))
        };
        Ok(Self {
            layers: sizes
                .windows(2)
                .enumerate()
                .map(layer)
                .collect::<Result<_>>()?,
            activation,
        })
    }

    /// x: [batch, first size] -> [batch, last size], in the type of the layers.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let last = self.layers.len() - 1;
        let mut x = x.to_dtype(self.layers[last].1.weight().dtype())?;
        for (number, (unit, linear)) in self.layers.iter().enumerate() {
            x = unit.run(&x, |x| match number == last {
                true => linear.forward(x),
                false => self.activation.apply(&linear.forward(x)?),
            })?;
        }
        Ok(x)
    }
}

/// The one number of a tensor.
pub fn scalar(tensor: &Tensor) -> Result<f64> {
    tensor.to_dtype(DType::F64)?.to_scalar()
}

/// Which classes `logits`, [batch, classes], speak for.
pub fn best(logits: &Tensor) -> Result<Vec<u32>> {
    logits.argmax(1)?.to_vec1()
}
