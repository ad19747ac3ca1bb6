//! Training: the same numbers as plain candle on the joint batch, whatever the number of ranks; communication that starts
//! before backward ends; and the warning about gradients that candle cuts.

use candle_core::{DType, Result as CandleResult, Tensor};
use candle_nn::{
    AdamW as CandleAdamW, LayerNorm, Linear, Module, Optimizer as _, ParamsAdamW, SGD, VarBuilder,
};
use fabric::{
    Clip, Fabric, Result,
    engine::comm::{Label, trace::Event},
    optim::{AdamW, Optimizer, Sgd},
};
use fabric_candle::{CandleModel, CandleOptimizer, Loss};

use crate::{
    CPU, Mlp, Values, assert_close, build_with,
    model::{Config, Gpt, batch},
    pairs, plain, ranks, scalar, share, values,
};

const STEPS: u64 = 20;
const ROWS: usize = 8;

/// Train an [`Mlp`] by Fabric on `world` ranks, each with its share of the joint batch; every rank's parameters.
fn by_fabric<O: Optimizer>(
    world: usize,
    make: impl Fn(&CandleModel<Mlp>) -> CandleResult<O> + Sync,
) -> Vec<Values> {
    by_strategy("auto", world, make).unwrap()
}

fn by_strategy<O: Optimizer>(
    strategy: &str,
    world: usize,
    make: impl Fn(&CandleModel<Mlp>) -> CandleResult<O> + Sync,
) -> Result<Vec<Values>> {
    let fabric = Fabric::builder()
        .devices(world)
        .strategy(strategy)
        .build()?;
    fabric.launch_threads(|fabric| {
        let model = build_with(3, DType::F32, Mlp::new)?;
        let optimizer = make(&model)?;
        let (model, mut optimizer) = fabric.setup(model, optimizer)?;
        for step in 0..STEPS {
            let mine = share(&pairs(step, ROWS, DType::F32)?, fabric.global_rank(), world)?;
            fabric.backward(Loss(&model.loss(&mine)?))?;
            optimizer.step()?;
            optimizer.zero_grad();
        }
        Ok(values(model.module())?)
    })
}

/// Train a plain copy by candle alone on the joint batch.
fn by_candle<O: candle_nn::Optimizer>(config: O::Config) -> Values {
    let model = build_with(3, DType::F32, Mlp::new).unwrap();
    let (copy, vars) = plain(&model, DType::F32, Mlp::new).unwrap();
    let mut optimizer = O::new(vars.values().cloned().collect(), config).unwrap();
    for step in 0..STEPS {
        let loss = copy.loss(&pairs(step, ROWS, DType::F32).unwrap()).unwrap();
        optimizer.backward_step(&loss).unwrap();
    }
    let names = values(&model).unwrap().into_iter().map(|(name, _)| name);
    names
        .map(|name| {
            let trained = crate::flat(&vars[&name]).unwrap();
            (name, trained)
        })
        .collect()
}

fn adamw() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.02,
        ..ParamsAdamW::default()
    }
}

#[track_caller]
fn assert_same(ranks: &[Values], expected: &[(String, Vec<f64>)]) {
    for rank in ranks {
        assert_eq!(rank, &ranks[0], "all ranks end with the same bits");
    }
    for ((name, ours), (_, theirs)) in ranks[0].iter().zip(expected) {
        assert_close(name, ours, theirs, 1e-5);
    }
}

#[test]
fn fabrics_optimizers_train_as_candles_do() {
    assert_same(
        &by_fabric(1, |_| Ok(AdamW::new(0.02))),
        &by_candle::<CandleAdamW>(adamw()),
    );
    assert_same(&by_fabric(2, |_| Ok(Sgd::new(0.2))), &by_candle::<SGD>(0.2));
}

#[test]
fn candles_optimizers_on_two_ranks_train_as_on_the_joint_batch() {
    let sgd = |model: &CandleModel<Mlp>| CandleOptimizer::new(model, |vars| SGD::new(vars, 0.2));
    assert_same(&by_fabric(2, sgd), &by_candle::<SGD>(0.2));
    let adam = |model: &CandleModel<Mlp>| {
        CandleOptimizer::new(model, |vars| CandleAdamW::new(vars, adamw()))
    };
    assert_same(&by_fabric(2, adam), &by_candle::<CandleAdamW>(adamw()));
}

#[test]
fn a_sharded_update_ends_with_the_bits_of_a_replicated_one() {
    for world in [2, 3, 4] {
        let make = |_: &CandleModel<Mlp>| Ok(AdamW::new(0.02));
        let (sharded, whole) = (
            by_strategy("zero1", world, make),
            by_strategy("ddp", world, make),
        );
        assert_eq!(sharded.unwrap(), whole.unwrap(), "{world} ranks");
    }
}

#[test]
fn candles_optimizers_refuse_to_update_shards() {
    let make = |model: &CandleModel<Mlp>| CandleOptimizer::new(model, |vars| SGD::new(vars, 0.1));
    let error = by_strategy("zero1", 2, make).unwrap_err().to_string();
    assert!(
        error.contains("Use fabric::optim's optimizers where ranks update shards"),
        "{error}"
    );
}

#[test]
fn candles_optimizer_steps_bf16_and_f64_models() {
    for dtype in [DType::BF16, DType::F64] {
        let losses = ranks(2).unwrap().launch_threads(|fabric| {
            let model = build_with(3, dtype, Mlp::new)?;
            let optimizer = CandleOptimizer::new(&model, |vars| SGD::new(vars, 0.2))?;
            let (model, mut optimizer) = fabric.setup(model, optimizer)?;
            assert_eq!(optimizer.learning_rate(), 0.2);
            optimizer.set_learning_rate(0.1);
            let data = pairs(1, ROWS, dtype)?;
            let mut losses = Vec::new();
            for _ in 0..10 {
                let loss = model.loss(&share(&data, fabric.global_rank(), 2)?)?;
                losses.push(fabric.all_reduce_value(scalar(&loss)?, fabric::ReduceOp::Avg)?);
                fabric.backward(Loss(&loss))?;
                optimizer.step()?;
                optimizer.zero_grad();
            }
            Ok(losses)
        });
        let losses = &losses.unwrap()[0];
        assert!(losses[9] < 0.95 * losses[0], "{dtype:?}: {losses:?}");
    }
}

const GPT: Config = Config {
    layers: 2,
    heads: 2,
    width: 16,
    context: 16,
};

/// A joint batch of four windows over a text that repeats.
fn windows(step: usize) -> Vec<Vec<u8>> {
    let text = b"row, row, row your boat, gently down the stream; ".repeat(3);
    let window = |index: usize| {
        let start = (step * 4 + index) * 7 % 49;
        text[start..start + GPT.context + 1].to_vec()
    };
    (0..4).map(window).collect()
}

/// A few steps of the example's GPT; the mean losses, and the parameters.
fn gpt(fabric: &Fabric) -> Result<(Vec<f64>, Values)> {
    let model = build_with(3, DType::F32, |vb| Gpt::new(&GPT, vb))?;
    let (model, mut optimizer) = fabric.setup(model, AdamW::new(0.01))?;
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let mut losses = Vec::new();
    for step in 0..12 {
        let joint = windows(step);
        let (input, target) = batch(&joint[rank * 4 / world..(rank + 1) * 4 / world], &CPU)?;
        let loss = model.loss(&input, &target)?;
        losses.push(fabric.all_reduce_value(scalar(&loss)?, fabric::ReduceOp::Avg)?);
        let before = fabric.spent()?;
        fabric.backward(Loss(&loss))?;
        assert_eq!(fabric.spent()? - before, model.prediction(), "step {step}");
        fabric.clip_gradients(&model, Clip::norm(1.0))?;
        optimizer.step()?;
        optimizer.zero_grad();
    }
    Ok((losses, values(model.module())?))
}

#[test]
fn the_loss_does_not_depend_on_the_number_of_ranks_and_costs_what_was_predicted() {
    let last = |world| {
        let ranks = ranks(world).unwrap().launch_threads(gpt).unwrap();
        let losses = &ranks[0].0;
        assert!(losses[11] < losses[0] - 0.5, "it learns: {losses:?}");
        losses[11]
    };
    let alone = last(1);
    for world in [2, 4] {
        let together = last(world);
        assert!(
            (together - alone).abs() < 1e-3 * alone,
            "{world} ranks: {together}, 1: {alone}"
        );
    }
}

#[test]
fn two_runs_on_two_ranks_end_with_the_same_bits() {
    let run = || ranks(2).unwrap().launch_threads(gpt).unwrap();
    let (first, second) = (run(), run());
    assert_eq!(first, second);
    assert_eq!(first[0], first[1]);
}

#[test]
fn the_first_reduction_leaves_before_the_last_gradient_is_ready() {
    let run = ranks(2).unwrap().launch_threads(|fabric| {
        let model = build_with(3, DType::F32, |vb| Gpt::new(&GPT, vb))?;
        let (model, _optimizer) = fabric.setup(model, AdamW::new(0.01))?;
        assert!(model.plan().buckets().len() > 5);
        let (input, target) = batch(&windows(0), &CPU)?;
        let loss = model.loss(&input, &target)?;
        fabric.trace()?.clear();
        fabric.backward(Loss(&loss))?;
        let events = fabric
            .trace()?
            .records()
            .into_iter()
            .map(|record| record.event);
        let events = events.collect::<Vec<_>>();
        let bucket = |event: &Event| {
            matches!(
                event,
                Event::Submitted {
                    label: Label::Bucket(_),
                    ..
                }
            )
        };
        let ready = |event: &Event| matches!(event, Event::Ready { .. });
        let last_ready = events.iter().rposition(ready).unwrap();
        let early = events[..last_ready]
            .iter()
            .filter(|event| bucket(event))
            .count();
        // Only the buckets that wait for the tied embedding, which is ready last, and for the positions leave late.
        assert!(
            early >= model.plan().buckets().len() - 2,
            "{early} of {events:?}"
        );
        assert_eq!(
            events.iter().filter(|event| ready(event)).count(),
            model.plan().params().len()
        );
        Ok(())
    });
    run.unwrap();
}

/// A norm of candle's whose forward is fused, without a backward, between two layers.
struct Cut(Linear, LayerNorm, Linear);

impl Cut {
    fn new(vb: VarBuilder) -> CandleResult<Self> {
        let body = candle_nn::linear(5, 8, vb.pp("body"))?;
        let norm = candle_nn::layer_norm(8, 1e-5, vb.pp("norm"))?;
        Ok(Self(body, norm, candle_nn::linear(8, 3, vb.pp("head"))?))
    }

    fn loss(&self, (input, target): &(Tensor, Tensor)) -> CandleResult<Tensor> {
        let hidden = self.1.forward(&self.0.forward(input)?)?;
        candle_nn::loss::mse(&self.2.forward(&hidden)?, target)
    }
}

#[test]
fn a_cut_gradient_is_warned_of_by_name_and_training_goes_on() {
    for world in [1, 2] {
        let run = ranks(world).unwrap().launch_threads(|fabric| {
            let model = build_with(3, DType::F32, Cut::new)?;
            let before = values(&model)?;
            let (model, mut optimizer) = fabric.setup(model, AdamW::new(0.05))?;
            let data = pairs(1, ROWS, DType::F32)?;
            let first = scalar(&model.loss(&data)?)?;
            for _ in 0..10 {
                fabric.backward(Loss(&model.loss(&data)?))?;
                optimizer.step()?;
                optimizer.zero_grad();
            }
            assert!(
                scalar(&model.loss(&data)?)? < 0.9 * first,
                "the head learns"
            );
            let moved = values(model.module())?
                .into_iter()
                .zip(before)
                .filter(|(now, old)| now != old);
            let moved = moved.map(|((name, _), _)| name).collect::<Vec<_>>();
            assert_eq!(moved, ["head.weight", "head.bias"]);
            Ok(fabric.warnings())
        });
        for warnings in run.unwrap() {
            let [warning] = &warnings[..] else {
                panic!("one warning, said once: {warnings:?}")
            };
            for word in [
                "'body.weight'",
                "'body.bias'",
                "'norm.weight'",
                "'norm.bias'",
                "LayerNorm",
                "ops::softmax_last_dim",
            ] {
                assert!(warning.contains(word), "{word} in {warning}");
            }
            assert!(!warning.contains("'head"), "{warning}");
        }
    }
}
