//! Learning to learn: a network whose first values are such that ten points of a sine, and a few steps, are enough to know
//! all of it (Finn et al. 2017, "Model-agnostic meta-learning").
//!
//! First-order: MAML differentiates through its inner steps, which takes second derivatives, and candle has none. The
//! gradient at the adapted values is taken for that at the first ones (FOMAML, section 5.2 there), which learns nearly as
//! well.

use std::time::Instant;

use candle_core::{DType, Device, Result as CandleResult, Tensor, Var};
use candle_nn::{Init, VarBuilder};
use fabric::{Clip, Fabric, ReduceOp, Result, optim::AdamW};
use fabric_candle::{CandleFabric, Loss};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::{
    job::{Job, report, tell},
    network::scalar,
};

const HIDDEN: usize = 40;
const SIZES: [(usize, usize); 3] = [(1, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)];

/// Learn new sines from ten points each: first-order MAML, with gradients of the program's own making
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: Job,
    /// Steps of the outer loop
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Tasks in a step, on each process
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    tasks: u64,
    /// Points that a task is learnt from
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    shots: u64,
    /// Steps of the inner loop
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    inner_steps: u64,
    /// The inner loop's learning rate
    #[arg(long, default_value_t = 0.01)]
    inner_lr: f64,
    /// The outer loop's largest learning rate
    #[arg(long, default_value_t = 4e-3)]
    lr: f64,
}

pub fn main(args: &Args) -> Result<()> {
    let fabric = args.job.builder().build()?;
    fabric.launch(|fabric| run(fabric, args)).map(drop)
}

fn run(fabric: &Fabric, args: &Args) -> Result<()> {
    let started = Instant::now();
    Fabric::seed_everything(Some(args.job.seed))?;
    let model = fabric.init_module(Learner::new)?;
    let (model, mut optimizer) = fabric.setup(model, AdamW::new(args.lr).weight_decay(0.0))?;
    // Every rank has tasks of its own.
    let stream = |number| {
        let rank = fabric.global_rank() as u64;
        fabric::seed::rng(fabric::seed::derive(args.job.seed, &[rank, number]))
    };
    let (mut rng, every) = (stream(0), (args.steps / 10).max(1));
    let device = fabric.tensor_device()?;
    for step in 0..args.steps {
        optimizer.set_learning_rate(args.lr * (1.0 - step as f64 / args.steps as f64));
        let sines = Sines::draw(args.tasks as usize, &mut rng);
        let (support, query) = (
            sines.points(args.shots, &mut rng, &device)?,
            sines.points(args.shots, &mut rng, &device)?,
        );
        let adapted = model.adapt(&support, args)?;
        let (loss, gradients) = judge(&adapted, &query)?;
        // A loss whose gradient, by the network's first values, is what was found at the adapted ones: it goes the way of
        // every gradient from here, averaged over the ranks under whatever strategy.
        let surrogate = model.along(&gradients)?;
        fabric.backward(Loss(&surrogate))?;
        fabric.clip_gradients(&model, Clip::norm(10.0))?; // a task may go wrong in the inner loop
        optimizer.step()?;
        optimizer.zero_grad();
        if (step + 1) % every == 0 {
            let loss = fabric.all_reduce_value(loss, ReduceOp::Avg)?;
            tell(
                fabric,
                format!("step {}: {loss:.3} after adaptation", step + 1),
            );
        }
    }
    // Sines that were never seen.
    let (mut rng, tasks) = (stream(1), 128);
    let sines = Sines::draw(tasks, &mut rng);
    let (support, query) = (
        sines.points(args.shots, &mut rng, &device)?,
        sines.points(100, &mut rng, &device)?,
    );
    let first = model.copies(tasks)?;
    let before = error(&first, &query)?;
    let after = error(&model.adapt(&support, args)?, &query)?;
    let (before, after) =
        fabric.all_reduce_value((scalar(&before)?, scalar(&after)?), ReduceOp::Avg)?;
    let results = json!({
        "steps": args.steps,
        "shots": args.shots,
        "loss_before": before / tasks as f64,
        "loss_after": after / tasks as f64,
        "ratio": after / before,
    });
    report(fabric, started, results)
}

/// The first values of a network of three layers: [inputs, outputs] and [1, outputs] of each.
struct Learner(Vec<Tensor>);

impl Learner {
    fn new(vb: VarBuilder<'_>) -> CandleResult<Self> {
        let mut params = Vec::new();
        for (number, (inputs, outputs)) in SIZES.into_iter().enumerate() {
            let vb = vb.pp(format!("layer.{number}"));
            let stdev = 1.0 / (inputs as f64).sqrt();
            let normal = Init::Randn { mean: 0.0, stdev };
            params.push(vb.get_with_hints((inputs, outputs), "weight", normal)?);
            params.push(vb.get_with_hints(
                (1, outputs),
                "bias",
                Init::Uniform {
                    lo: -stdev,
                    up: stdev,
                },
            )?);
        }
        Ok(Self(params))
    }

    /// A copy for each task, to be changed: f32[tasks, inputs, outputs] and f32[tasks, 1, outputs].
    fn copies(&self, tasks: usize) -> CandleResult<Vec<Var>> {
        let copy = |param: &Tensor| {
            let (inputs, outputs) = param.dims2()?;
            let param = param.detach().to_dtype(DType::F32)?.unsqueeze(0)?;
            Var::from_tensor(&param.broadcast_as((tasks, inputs, outputs))?.contiguous()?)
        };
        self.0.iter().map(copy).collect()
    }

    /// The copies after a few steps down the error at `support`, all tasks side by side. Fabric takes no part in this:
    /// the copies are plain variables of candle's.
    fn adapt(&self, support: &Points, args: &Args) -> CandleResult<Vec<Var>> {
        let copies = self.copies(support.0.dim(0)?)?;
        for _ in 0..args.inner_steps {
            let grads = error(&copies, support)?.backward()?;
            for copy in &copies {
                if let Some(grad) = grads.get(copy) {
                    let step = grad.affine(args.inner_lr, 0.0)?;
                    copy.set(&(copy.as_tensor() - step)?.detach())?;
                }
            }
        }
        Ok(copies)
    }

    /// The sum of the products of parameters and `gradients`: its gradient by the parameters is `gradients`.
    fn along(&self, gradients: &[Tensor]) -> CandleResult<Tensor> {
        let product = |(param, grad): (&Tensor, &Tensor)| {
            (param.to_dtype(DType::F32)? * grad.detach())?.sum_all()
        };
        let products = self.0.iter().zip(gradients).map(product);
        Tensor::stack(&products.collect::<CandleResult<Vec<_>>>()?, 0)?.sum_all()
    }
}

/// The error at `query` after adaptation, a mean over tasks, and its gradients by the adapted values, as if all tasks shared
/// them.
fn judge(adapted: &[Var], query: &Points) -> CandleResult<(f64, Vec<Tensor>)> {
    let tasks = query.0.dim(0)?;
    let loss = error(adapted, query)?.affine(1.0 / tasks as f64, 0.0)?;
    let grads = loss.backward()?;
    let of = |var: &Var| match grads.get(var) {
        Some(grad) => grad.sum(0),
        None => candle_core::bail!("an adapted value has no gradient"),
    };
    let gradients = adapted.iter().map(of).collect::<CandleResult<_>>()?;
    Ok((scalar(&loss)?, gradients))
}

/// The mean squared error of each task, added up, so that no task's gradient depends on another.
fn error(params: &[Var], points: &Points) -> CandleResult<Tensor> {
    let last = params.len() / 2 - 1;
    let mut x = points.0.clone();
    for (number, layer) in params.chunks_exact(2).enumerate() {
        x = x.matmul(&layer[0])?.broadcast_add(&layer[1])?;
        if number < last {
            x = x.relu()?;
        }
    }
    (x - &points.1)?.sqr()?.mean((1, 2))?.sum_all()
}

/// x and y of some points of each task: f32[tasks, points, 1] both.
struct Points(Tensor, Tensor);

/// A sine each task: amplitude and phase.
struct Sines(Vec<(f32, f32)>);

impl Sines {
    fn draw(tasks: usize, rng: &mut ChaCha8Rng) -> Self {
        let sine = |_| {
            let amplitude = rng.random_range(0.1..5.0);
            (amplitude, rng.random_range(0.0..std::f32::consts::PI))
        };
        Self((0..tasks).map(sine).collect())
    }

    fn points(&self, each: u64, rng: &mut ChaCha8Rng, device: &Device) -> CandleResult<Points> {
        let (mut xs, mut ys) = (Vec::new(), Vec::new());
        for (amplitude, phase) in &self.0 {
            for _ in 0..each {
                let x = rng.random_range(-5f32..5.0);
                xs.push(x);
                ys.push(amplitude * (x - phase).sin());
            }
        }
        let tensor = |values| Tensor::from_vec(values, (self.0.len(), each as usize, 1), device);
        Ok(Points(tensor(xs)?, tensor(ys)?))
    }
}
