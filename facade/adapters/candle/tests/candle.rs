//! Candle models under Fabric, held to what candle does by itself. Method: ranks are threads, models are tiny, and the
//! oracle is a plain candle model with a copy of the same weights.

#[path = "candle/absence.rs"]
mod absence;
#[path = "../examples/gallery/ppo/cartpole.rs"]
mod cartpole;
#[path = "../examples/gallery/convolution.rs"]
mod convolution;
#[path = "candle/devices.rs"]
mod devices;
#[path = "candle/example.rs"]
mod example;
#[path = "candle/gallery.rs"]
mod gallery;
#[path = "candle/gradients.rs"]
mod gradients;
#[path = "../examples/gpt/model.rs"]
mod model;
#[path = "candle/program.rs"]
mod program;
#[path = "candle/puppet.rs"]
mod puppet;
#[path = "candle/tensors.rs"]
mod tensors;
#[path = "../examples/gpt/text.rs"]
mod text;
#[path = "candle/training.rs"]
mod training;
#[path = "candle/units.rs"]
mod units;
#[path = "candle/variables.rs"]
mod variables;

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use candle_core::{DType, Device, Result as CandleResult, Tensor, Var};
use candle_nn::{Linear, Module, VarBuilder, VarMap};
use fabric::{Fabric, Result, engine::shard::plan};
use fabric_candle::{CandleModel, build};
use rand::Rng;

/// Parameters by name, in registration order; f64 holds all bits of the smaller types.
type Values = Vec<(String, Vec<f64>)>;

const CPU: Device = Device::Cpu;

/// Three linear layers with tanh between: 6 parameters.
struct Mlp([Linear; 3]);

impl Mlp {
    fn new(vb: VarBuilder) -> CandleResult<Self> {
        let layer = |input, output, name| candle_nn::linear(input, output, vb.pp(name));
        Ok(Self([
            layer(5, 8, "first")?,
            layer(8, 8, "second")?,
            layer(8, 3, "third")?,
        ]))
    }

    /// The mean squared error, input: [batch, 5], target: [batch, 3].
    fn loss(&self, (input, target): &(Tensor, Tensor)) -> CandleResult<Tensor> {
        let [first, second, third] = &self.0;
        let hidden = first.forward(input)?.tanh()?;
        let hidden = second.forward(&hidden)?.tanh()?;
        candle_nn::loss::mse(&third.forward(&hidden)?, target)
    }
}

/// A joint batch of `rows` random pairs for [`Mlp`], the same for the same seed.
fn pairs(seed: u64, rows: usize, dtype: DType) -> CandleResult<(Tensor, Tensor)> {
    let mut rng = fabric::seed::rng(seed);
    let mut side = |columns: usize| {
        let values = (0..rows * columns).map(|_| rng.random::<f64>() * 2.0 - 1.0);
        Tensor::from_iter(values, &CPU)?
            .reshape((rows, columns))?
            .to_dtype(dtype)
    };
    Ok((side(5)?, side(3)?))
}

/// Rank `rank`'s share of a joint batch.
fn share(joint: &(Tensor, Tensor), rank: usize, world: usize) -> CandleResult<(Tensor, Tensor)> {
    let rows = joint.0.dim(0)? / world;
    Ok((
        joint.0.narrow(0, rank * rows, rows)?,
        joint.1.narrow(0, rank * rows, rows)?,
    ))
}

/// A model whose first values follow from `seed`. The seed belongs to the process, so that builders take turns.
fn build_with<M>(
    seed: u64,
    dtype: DType,
    f: impl FnOnce(VarBuilder<'static>) -> CandleResult<M>,
) -> Result<CandleModel<M>> {
    seeded(seed, || Ok(build(&CPU, dtype, f)?))
}

/// Run `f` with a seed.
fn seeded<T>(seed: u64, f: impl FnOnce() -> Result<T>) -> Result<T> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    Fabric::seed_everything(Some(seed))?;
    f()
}

/// The oracle: the same model from a `VarMap` of candle's, with a copy of `model`'s values.
fn plain<M, N>(
    model: &CandleModel<M>,
    dtype: DType,
    f: impl FnOnce(VarBuilder<'static>) -> CandleResult<N>,
) -> CandleResult<(N, HashMap<String, Var>)> {
    let map = VarMap::new();
    let module = f(VarBuilder::from_varmap(&map, dtype, &CPU))?;
    let copies = map.data().lock().unwrap().clone();
    model.with_vars(|vars| {
        assert_eq!(vars.len(), copies.len());
        vars.iter()
            .try_for_each(|(name, var)| copies[name].set(var))
    })?;
    Ok((module, copies))
}

fn values<M>(model: &CandleModel<M>) -> CandleResult<Values> {
    model.with_vars(|vars| {
        vars.iter()
            .map(|(name, var)| Ok((name.clone(), flat(var)?)))
            .collect()
    })
}

fn flat(tensor: &Tensor) -> CandleResult<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

fn scalar(loss: &Tensor) -> CandleResult<f64> {
    loss.to_dtype(DType::F64)?.to_scalar()
}

/// |a - b| <= tolerance * max(1, |b|), everywhere.
#[track_caller]
fn assert_close(what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (index, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * b.abs().max(1.0),
            "{what}[{index}]: {a} is not {b}"
        );
    }
}

/// A fabric of so many ranks, with buckets small enough that a tiny model has several.
fn ranks(count: usize) -> Result<Fabric> {
    let buckets = plan::Options {
        bucket_bytes: 512,
        first_bucket_bytes: 128,
        ..plan::Options::default()
    };
    Fabric::builder().devices(count).buckets(buckets).build()
}
