//! Initial values that a seed decides: candle's own random numbers on the CPU cannot be seeded.

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::{Init, init::NormalOrUniform};
use rand::Rng;
use rand_distr::{Distribution, Normal, Uniform};

/// The first value of the parameter called `name`, a pure function of (seed, name, shape, init). The values are drawn
/// as f64 and rounded once to `dtype`.
pub(crate) fn value(
    init: Init,
    name: &str,
    shape: &Shape,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let seed = fabric::seed::current().unwrap_or(0);
    let stream = name.bytes().map(u64::from).collect::<Vec<_>>();
    let mut rng = fabric::seed::rng(fabric::seed::derive(seed, &stream));
    let law = Law::of(init, shape)?;
    let values = (0..shape.elem_count())
        .map(|_| law.sample(&mut rng))
        .collect::<Vec<f64>>();
    Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
}

/// The distribution of a parameter's first values.
enum Law {
    Constant(f64),
    Normal(Normal<f64>),
    Uniform(Uniform<f64>),
}

impl Law {
    fn of(init: Init, shape: &Shape) -> Result<Self> {
        match init {
            Init::Const(value) => Ok(Self::Constant(value)),
            Init::Randn { mean, stdev } => Self::normal(mean, stdev),
            Init::Uniform { lo, up } => Self::uniform(lo, up),
            Init::Kaiming {
                dist,
                fan,
                non_linearity,
            } => {
                let deviation = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
                let bound = 3f64.sqrt() * deviation;
                match dist {
                    NormalOrUniform::Normal => Self::normal(0.0, deviation),
                    NormalOrUniform::Uniform => Self::uniform(-bound, bound),
                }
            }
        }
    }

    fn normal(mean: f64, deviation: f64) -> Result<Self> {
        Normal::new(mean, deviation)
            .map(Self::Normal)
            .map_err(Error::wrap)
    }

    fn uniform(low: f64, high: f64) -> Result<Self> {
        if low == high {
            return Ok(Self::Constant(low));
        }
        Uniform::new(low, high)
            .map(Self::Uniform)
            .map_err(Error::wrap)
    }

    fn sample(&self, rng: &mut impl Rng) -> f64 {
        match self {
            Self::Constant(value) => *value,
            Self::Normal(normal) => normal.sample(rng),
            Self::Uniform(uniform) => uniform.sample(rng),
        }
    }
}
