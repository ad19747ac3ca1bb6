//! A small GPT over bytes, in plain candle-nn: pre-norm blocks, learned positions, the embedding shared with the head.
//! Every operation in it has a backward. Each block is a unit, so that a strategy can shard its parameters.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, Linear, Module, RmsNorm, VarBuilder, ops, rms_norm};
use fabric_candle::Unit;

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub layers: usize,
    pub heads: usize,
    pub width: usize,
    pub context: usize,
}

/// Different bytes.
pub const BYTES: usize = 256;

pub struct Gpt {
    tokens: Tensor,    // [BYTES, width]: the embedding, and the head
    positions: Tensor, // [context, width]
    blocks: Vec<Block>,
    norm: RmsNorm,
    mask: Tensor, // [context, context]: 0 where a byte may look, -inf where it may not
}

struct Block {
    unit: Unit,
    norm1: RmsNorm,
    query_key_value: Linear,
    project: Linear,
    norm2: RmsNorm,
    up: Linear,
    down: Linear,
    heads: usize,
}

impl Gpt {
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let normal = Init::Randn {
            mean: 0.0,
            stdev: 0.02,
        };
        let tokens = vb.get_with_hints((BYTES, config.width), "tokens", normal)?;
        let positions = vb.get_with_hints((config.context, config.width), "positions", normal)?;
        let block = |layer: usize| Block::new(config, vb.pp(format!("block.{layer}")));
        let blocks = (0..config.layers).map(block).collect::<Result<_>>()?;
        let norm = rms_norm(config.width, 1e-5, vb.pp("norm"))?;
        let may_look = |row: usize, column: usize| {
            if column <= row {
                0f32
            } else {
                f32::NEG_INFINITY
            }
        };
        let mask = (0..config.context)
            .flat_map(|row| (0..config.context).map(move |column| may_look(row, column)));
        let mask =
            Tensor::from_iter(mask, vb.device())?.reshape((config.context, config.context))?;
        Ok(Self {
            tokens,
            positions,
            blocks,
            norm,
            mask: mask.to_dtype(vb.dtype())?,
        })
    }

    /// input: u32[batch, time] -> [batch * time, BYTES], one row of logits a byte.
    pub fn logits(&self, input: &Tensor) -> Result<Tensor> {
        let (batch, time) = input.dims2()?;
        let width = self.tokens.dim(1)?;
        let mut x = self
            .tokens
            .index_select(&input.flatten_all()?, 0)?
            .reshape((batch, time, width))?
            .broadcast_add(&self.positions.narrow(0, 0, time)?)?;
        let mask = self.mask.narrow(0, 0, time)?.narrow(1, 0, time)?;
        for block in &self.blocks {
            x = block.forward(&x, &mask)?;
        }
        self.norm
            .forward_diff(&x)?
            .reshape((batch * time, width))?
            .matmul(&self.tokens.t()?)
    }

    /// The mean cross-entropy in nats of predicting `target` after `input`, both u32[batch, time].
    pub fn loss(&self, input: &Tensor, target: &Tensor) -> Result<Tensor> {
        candle_nn::loss::cross_entropy(&wide(&self.logits(input)?)?, &target.flatten_all()?)
    }
}

impl Block {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let width = config.width;
        // GPT-2's rule: what is added to the stream 2 x layers times starts smaller.
        let into_stream = 0.02 / (2.0 * config.layers as f64).sqrt();
        Ok(Self {
            unit: Unit::new(&vb)?,
            norm1: rms_norm(width, 1e-5, vb.pp("norm1"))?,
            query_key_value: linear(width, 3 * width, 0.02, vb.pp("query_key_value"))?,
            project: linear(width, width, into_stream, vb.pp("project"))?,
            norm2: rms_norm(width, 1e-5, vb.pp("norm2"))?,
            up: linear(width, 4 * width, 0.02, vb.pp("up"))?,
            down: linear(4 * width, width, into_stream, vb.pp("down"))?,
            heads: config.heads,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        self.unit.run(x, |x| self.compute(x, mask))
    }

    fn compute(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attend(&self.norm1.forward_diff(x)?, mask)?)?;
        // Squared ReLU (So et al. 2021, "Primer"): candle's backward of GELU takes twenty passes and two powers an element,
        // and a whole step of this model with it 1.5 times as long.
        let hidden = self
            .up
            .forward(&self.norm2.forward_diff(&x)?)?
            .relu()?
            .sqr()?;
        &x + self.down.forward(&hidden)?
    }

    fn attend(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, time, width) = x.dims3()?;
        let size = width / self.heads;
        let mixed = self.query_key_value.forward(x)?;
        let part = |index: usize| {
            let part = mixed.narrow(2, index * width, width)?;
            part.reshape((batch, time, self.heads, size))?
                .transpose(1, 2)?
                .contiguous()
        };
        let (query, key, value) = ((part(0)? / (size as f64).sqrt())?, part(1)?, part(2)?);
        let scores = query.matmul(&key.t()?)?.broadcast_add(mask)?;
        let shares = ops::softmax(&wide(&scores)?, 3)?.to_dtype(value.dtype())?;
        let mixed = shares.matmul(&value)?;
        self.project
            .forward(&mixed.transpose(1, 2)?.reshape((batch, time, width))?)
    }
}

/// In f32 at least: sums of exponentials want more digits than bf16 and f16 have.
fn wide(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::BF16 | DType::F16 => tensor.to_dtype(DType::F32),
        _ => Ok(tensor.clone()),
    }
}

fn linear(input: usize, output: usize, stdev: f64, vb: VarBuilder) -> Result<Linear> {
    let init = Init::Randn { mean: 0.0, stdev };
    let weight = vb.get_with_hints((output, input), "weight", init)?;
    Ok(Linear::new(weight, None))
}

/// Windows of `context + 1` bytes as (input, target), both u32[windows, context].
pub fn batch(windows: &[Vec<u8>], device: &Device) -> Result<(Tensor, Tensor)> {
    let context = windows.first().map_or(0, |window| window.len() - 1);
    let side = |from: usize| {
        let bytes = windows.iter().flat_map(move |window| {
            window[from..from + context]
                .iter()
                .map(|byte| u32::from(*byte))
        });
        Tensor::from_iter(bytes, device)?.reshape((windows.len(), context))
    };
    Ok((side(0)?, side(1)?))
}
