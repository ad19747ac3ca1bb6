//! Initial values that a seed decides: candle's own random numbers on the CPU cannot be seeded.

use candle_core::{CpuStorage, Result, Shape, bail};
use candle_nn::{Init, init::NormalOrUniform};
use half::{bf16, f16};
use rand::Rng;
use rand_distr::{Distribution, Normal, Uniform};

/// How a parameter's first values are drawn, now or later: decided when it is made, also by which seed.
#[derive(Clone, Copy)]
pub(crate) struct First {
    init: Init,
    seed: u64,
}

impl First {
    pub(crate) fn new(init: Init) -> Self {
        let seed = fabric::seed::current().unwrap_or(0);
        Self { init, seed }
    }

    /// Write the first values of the parameter called `name`, a pure function of (seed, name, shape, init). Each is drawn
    /// as f64 and rounded once to the memory's type.
    pub(crate) fn fill(self, memory: &mut CpuStorage, name: &str, shape: &Shape) -> Result<()> {
        let stream = name.bytes().map(u64::from).collect::<Vec<_>>();
        let mut rng = fabric::seed::rng(fabric::seed::derive(self.seed, &stream));
        let law = Law::of(self.init, shape)?;
        let mut draw = || law.sample(&mut rng);
        match memory {
            CpuStorage::F64(values) => values.fill_with(draw),
            CpuStorage::F32(values) => values.fill_with(|| draw() as f32),
            CpuStorage::F16(values) => values.fill_with(|| f16::from_f64(draw())),
            CpuStorage::BF16(values) => values.fill_with(|| bf16::from_f64(draw())),
            _ => bail!("'{name}' has no memory for its first values"),
        }
        Ok(())
    }
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
            .map_err(crate::away::wrapped)
    }

    fn uniform(low: f64, high: f64) -> Result<Self> {
        if low == high {
            return Ok(Self::Constant(low));
        }
        Uniform::new(low, high)
            .map(Self::Uniform)
            .map_err(crate::away::wrapped)
    }

    fn sample(&self, rng: &mut impl Rng) -> f64 {
        match self {
            Self::Constant(value) => *value,
            Self::Normal(normal) => normal.sample(rng),
            Self::Uniform(uniform) => uniform.sample(rng),
        }
    }
}
