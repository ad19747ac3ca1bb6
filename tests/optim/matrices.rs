//! An optimizer that looks at whole matrices, as Muon does, on ranks that each update some of them whole.

use fabric::{
    Fabric, Result,
    engine::shard::plan::{Options, ShardBy},
    model::{Gradients, Model, ParamId},
    optim::{Optimizer, OptimizerState},
};
use fabric_engine::{Error, Result as EngineResult};

use crate::puppet::{Puppet, Script};

/// Every row of a matrix moves by one length, against its gradient.
struct Rows {
    lr: f64,
}

impl Optimizer for Rows {
    fn step(&mut self, model: &dyn Model, grads: &Gradients<'_>) -> EngineResult<()> {
        for (index, meta) in model.params().iter().enumerate() {
            let Some(grad) = grads.get(ParamId(index)) else {
                continue;
            };
            let [rows, columns] = meta.shape[..] else {
                return Err(Error::argument(
                    format!("'{}' is no matrix: {:?}", meta.name, meta.shape),
                    "Shard by tensor",
                ));
            };
            let mut grad_values = vec![0f32; rows * columns];
            let into = fabric_engine::kernels::SpanMut::of(&mut grad_values);
            fabric_engine::kernels::cast(grad, into)
                .map_err(|error| Error::library("read a gradient", error))?;
            model.with(ParamId(index), &mut |buffer| {
                let mut values = vec![0f32; rows * columns];
                let all = 0..values.len();
                buffer.read(
                    all.clone(),
                    fabric_engine::kernels::SpanMut::of(&mut values),
                )?;
                let rows = values.chunks_mut(columns).zip(grad_values.chunks(columns));
                for (row, grad) in rows {
                    let norm = grad.iter().map(|x| x * x).sum::<f32>().sqrt();
                    let step = self.lr as f32 / norm.max(1e-6);
                    row.iter_mut().zip(grad).for_each(|(x, g)| *x -= step * g);
                }
                buffer.write(all, fabric_engine::kernels::Span::of(&values))
            })?;
        }
        Ok(())
    }
    fn learning_rate(&self) -> f64 {
        self.lr
    }
    fn set_learning_rate(&mut self, lr: f64) {
        self.lr = lr;
    }
    fn state(&self, _: &dyn Model) -> EngineResult<OptimizerState> {
        Ok(OptimizerState::default())
    }
    fn load_state(&mut self, _: &dyn Model, _: OptimizerState) -> EngineResult<()> {
        Ok(())
    }
}

const SHAPES: [[usize; 2]; 4] = [[3, 4], [5, 2], [1, 7], [4, 4]];

fn train(strategy: &str, shard_by: ShardBy) -> Result<Vec<Vec<Vec<u8>>>> {
    let options = Options {
        bucket_bytes: 60,
        shard_by,
        ..Options::default()
    };
    let builder = Fabric::builder().devices(3).strategy(strategy);
    builder.buckets(options).build()?.launch_threads(|fabric| {
        let mut model = Puppet::new();
        for (index, shape) in SHAPES.iter().enumerate() {
            let values = vec![1f32 + index as f32; shape[0] * shape[1]];
            model = model.param(&format!("m{index}"), &values).shape(shape);
        }
        let (model, mut optimizer) = fabric.setup(model, Rows { lr: 0.1 })?;
        for step in 0..4 {
            fabric.backward(Script(|| {
                for (index, shape) in SHAPES.iter().enumerate().rev() {
                    let value = |at: usize| {
                        ((at * 7 + step * 5 + fabric.global_rank() * 3 + index) % 11) as f32 - 5.0
                    };
                    model.ready(index, (0..shape[0] * shape[1]).map(value).collect())?;
                }
                Ok(())
            }))?;
            optimizer.step()?;
            optimizer.zero_grad();
        }
        Ok(model.bytes())
    })
}

#[test]
fn whole_matrices_are_updated_by_one_rank_each_to_the_bits_of_all() {
    let expected = train("ddp", ShardBy::Element).unwrap();
    for strategy in ["zero1", "zero2", "fsdp"] {
        assert_eq!(
            train(strategy, ShardBy::Tensor).unwrap(),
            expected,
            "{strategy}"
        );
    }
    let error = train("zero1", ShardBy::Element).unwrap_err().to_string();
    assert!(error.contains("is no matrix"), "{error}");
}
