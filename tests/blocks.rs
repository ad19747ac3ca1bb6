//! A model of blocks with a real forward and backward, and what many ranks must make of it: the stage for the tests of
//! sharded parameters. The oracle computes every rank's gradients by itself and folds them in the canonical tree.

use fabric::{
    Fabric, FabricModule, Result,
    model::{Edge, Model, ParamId, UnitId},
    vec::{Block, Chain, Link, VecModel},
};

/// Features between blocks.
pub(crate) const WIDTH: usize = 6;
pub(crate) const BLOCKS: usize = 4;

/// A float that the arithmetic widens and rounds.
pub(crate) trait Real: fabric::engine::kernels::Element {
    fn wide(self) -> f32;
    fn round(value: f32) -> Self;
}

impl Real for f32 {
    fn wide(self) -> f32 {
        self
    }
    fn round(value: f32) -> Self {
        value
    }
}

impl Real for half::bf16 {
    fn wide(self) -> f32 {
        self.to_f32()
    }
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Real for half::f16 {
    fn wide(self) -> f32 {
        self.to_f32()
    }
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

fn wide<T: Real>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.wide()).collect()
}

fn rounded<T: Real>(values: Vec<f32>) -> Vec<T> {
    values.into_iter().map(T::round).collect()
}

/// y = x + leaky(W x + b), then every feature times a scale that all blocks share (a tied parameter).
pub(crate) struct Dense {
    pub(crate) tied: bool,
}

impl Dense {
    fn hidden(params: &[Vec<f32>], input: &[f32]) -> Vec<f32> {
        let (weight, bias) = (&params[0], &params[1]);
        let row = |j: usize| {
            let products = input
                .iter()
                .enumerate()
                .map(|(i, x)| weight[j * WIDTH + i] * x);
            products.sum::<f32>() + bias[j]
        };
        (0..WIDTH).map(row).collect()
    }
}

fn leaky(x: f32) -> f32 {
    if x > 0.0 { x } else { 0.25 * x }
}

fn slope(x: f32) -> f32 {
    if x > 0.0 { 1.0 } else { 0.25 }
}

impl<T: Real> Block<T> for Dense {
    fn forward(&self, params: &[&[T]], input: &[T]) -> Vec<T> {
        let params = params.iter().map(|param| wide(param)).collect::<Vec<_>>();
        let input = &wide(input)[..];
        let hidden = Self::hidden(&params, input);
        let scale = |j: usize| if self.tied { params[2][j] } else { 1.0 };
        rounded(
            (0..WIDTH)
                .map(|j| (input[j] + leaky(hidden[j])) * scale(j))
                .collect(),
        )
    }

    fn backward(
        &self,
        params: &[&[T]],
        input: &[T],
        output_grad: &[T],
        into: &mut [Vec<T>],
    ) -> Vec<T> {
        let params = params.iter().map(|param| wide(param)).collect::<Vec<_>>();
        let input = &wide(input)[..];
        let mut grads = into.iter().map(|grad| wide(grad)).collect::<Vec<_>>();
        let hidden = Self::hidden(&params, input);
        let mut flow = wide(output_grad);
        if self.tied {
            for j in 0..WIDTH {
                grads[2][j] += flow[j] * (input[j] + leaky(hidden[j]));
                flow[j] *= params[2][j];
            }
        }
        let mut by_input = flow.clone();
        for j in 0..WIDTH {
            let by_hidden = flow[j] * slope(hidden[j]);
            grads[1][j] += by_hidden;
            for i in 0..WIDTH {
                grads[0][j * WIDTH + i] += by_hidden * input[i];
                by_input[i] += by_hidden * params[0][j * WIDTH + i];
            }
        }
        for (into, grad) in into.iter_mut().zip(grads) {
            *into = rounded(grad);
        }
        rounded(by_input)
    }
}

/// A scale for each feature that only some ranks use.
pub(crate) struct Extra;

impl<T: Real> Block<T> for Extra {
    fn forward(&self, params: &[&[T]], input: &[T]) -> Vec<T> {
        let products = input.iter().zip(params[0]);
        products
            .map(|(x, s)| T::round(x.wide() * s.wide()))
            .collect()
    }

    fn backward(
        &self,
        params: &[&[T]],
        input: &[T],
        output_grad: &[T],
        grads: &mut [Vec<T>],
    ) -> Vec<T> {
        for j in 0..WIDTH {
            let product = output_grad[j].wide() * input[j].wide();
            grads[0][j] = T::round(grads[0][j].wide() + product);
        }
        let products = output_grad.iter().zip(params[0]);
        products
            .map(|(g, s)| T::round(g.wide() * s.wide()))
            .collect()
    }
}

/// First values that are no round numbers.
pub(crate) fn value(param: usize, index: usize) -> f32 {
    ((index * 37 + param * 101 + 11) * 2_654_435_761 % 997) as f32 / 997.0 - 0.5
}

/// Blocks in units; at the root a scale that the blocks share, one that only some ranks use, and one that nobody does.
pub(crate) fn model<T: Real>() -> VecModel<T> {
    let mut params: Vec<(String, usize)> = vec![("idle".into(), 5), ("some".into(), WIDTH)];
    for block in 0..BLOCKS {
        params.push((format!("block.{block}.weight"), WIDTH * WIDTH));
        params.push((format!("block.{block}.bias"), WIDTH));
        if block == 0 {
            params.push(("block.0.scale".into(), WIDTH));
        }
    }
    let params = params.into_iter().enumerate();
    let model = VecModel::deferred(params.map(|(index, (name, numel))| {
        let init = move || (0..numel).map(|at| T::round(value(index, at))).collect();
        (name, numel, Box::new(init) as _)
    }));
    let units = (0..BLOCKS).map(|block| format!("block.{block}"));
    model
        .in_units(units)
        .unwrap()
        .tie("block.0.scale", Some("block.2"))
}

/// Whether `rank` uses the parameter that only some use.
pub(crate) fn uses_extra(rank: usize) -> bool {
    rank % 2 == 1
}

/// The chain of `rank`.
pub(crate) fn chain<T: Real>(model: &VecModel<T>, extra: bool) -> Chain<T> {
    let mut links = Vec::new();
    for block in 0..BLOCKS {
        let tied = block == 0 || block == 2;
        let link = Link::new(model, &format!("block.{block}"), Dense { tied }).unwrap();
        links.push(match tied {
            true => link.with(model, &["block.0.scale"]).unwrap(),
            false => link,
        });
    }
    if extra {
        links.push(Link::outside(vec![model.id("some")], Extra));
    }
    Chain::new(links)
}

/// The input and the target of `rank` in micro-batch `batch` of `step`.
pub(crate) fn sample(rank: usize, step: usize, batch: usize) -> (Vec<f32>, Vec<f32>) {
    let seed = rank * 7 + step * 13 + batch * 31;
    let side = |salt: usize| (0..WIDTH).map(|at| value(seed + salt, at)).collect();
    (side(1), side(2))
}

/// One micro-batch's backward through Fabric.
pub(crate) fn backward<T: Real>(
    fabric: &Fabric,
    model: &FabricModule<VecModel<T>>,
    chain: &Chain<T>,
    rank: usize,
    step: usize,
    batch: usize,
) -> Result<()> {
    let (input, target) = sample(rank, step, batch);
    let pass = chain.forward(model, rounded(input))?;
    let error = pass.output().iter().zip(&target);
    let error = error.map(|(y, t)| T::round(y.wide() - t)).collect();
    fabric.backward(pass.loss(error))
}

/// All parameters, those of units too, which are gathered for it.
pub(crate) fn read<T: Real>(model: &FabricModule<VecModel<T>>) -> Result<Vec<u32>> {
    let mut bits = vec![Vec::new(); model.params().len()];
    let mut take = |param: ParamId| {
        let values = model.lent(&[param], |values| values[0].to_vec())?;
        bits[param.0] = values
            .into_iter()
            .map(|value| value.wide().to_bits())
            .collect();
        Ok::<_, fabric::Error>(())
    };
    for (index, meta) in model.params().iter().enumerate() {
        if meta.home().is_none() {
            take(ParamId(index))?;
        }
    }
    for unit in 0..model.units().len() {
        model.unit(UnitId(unit), Edge::ForwardEnter)?;
        for (index, meta) in model.params().iter().enumerate() {
            if meta.home() == Some(UnitId(unit)) {
                take(ParamId(index))?;
            }
        }
        model.unit(UnitId(unit), Edge::ForwardLeave)?;
    }
    Ok(bits.concat())
}
