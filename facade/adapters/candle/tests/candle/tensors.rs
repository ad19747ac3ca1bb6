//! Fabric's verbs on tensors: types by the precision, collectives, and gradients through a gather.

use candle_core::{DType, Tensor, Var};
use candle_nn::Module;
use fabric::{Fabric, ReduceOp, optim::Sgd};
use fabric_candle::{CandleFabric, CandleModel, Loss};

use crate::{CPU, Mlp, assert_close, build_with, flat, pairs, ranks, share, values};

fn with_precision(name: &str) -> Fabric {
    let builder = Fabric::builder().devices(1).precision(name);
    builder.build().unwrap()
}

// WRAP-02: floats in the compute type, whole numbers as they are, outputs in the type that the precision returns.
#[test]
fn line_20_inputs_and_outputs_are_cast_by_the_precision() {
    for (name, compute, output) in [
        ("32-true", DType::F32, DType::F32),
        ("64-true", DType::F64, DType::F64),
        ("bf16-true", DType::BF16, DType::BF16),
        ("16-true", DType::F16, DType::F16),
        ("bf16-mixed", DType::BF16, DType::F32),
        ("16-mixed", DType::F16, DType::F32),
    ] {
        let run = with_precision(name).launch_threads(|fabric| {
            assert_eq!(fabric.compute_dtype(), compute);
            for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
                let input = Tensor::zeros(3, dtype, &CPU)?;
                assert_eq!(fabric.cast_input(&input)?.dtype(), compute);
                assert_eq!(fabric.cast_output(&input)?.dtype(), output);
            }
            for dtype in [DType::U8, DType::U32, DType::I64] {
                let input = Tensor::zeros(3, dtype, &CPU)?;
                assert_eq!(fabric.cast_input(&input)?.dtype(), dtype);
                assert_eq!(fabric.cast_output(&input)?.dtype(), dtype);
            }
            Ok(())
        });
        run.unwrap();
    }
}

// API-29, API-31, API-32: models and tensors are made in the precision's type, and a forward runs in it.
#[test]
fn line_24_models_are_built_in_the_type_that_the_precision_computes_in() {
    for (name, compute, output) in [
        ("32-true", DType::F32, DType::F32),
        ("64-true", DType::F64, DType::F64),
        ("bf16-mixed", DType::BF16, DType::F32),
    ] {
        let run = with_precision(name).launch_threads(|fabric| {
            assert_eq!(fabric.init_tensor((2, 3))?.dtype(), compute);
            let here: CandleModel<_> = fabric.init_module(Mlp::new)?;
            here.with_vars(|vars| {
                assert!(vars.iter().all(|(_, var)| var.dtype() == compute));
                Ok(())
            })?;
            let empty: CandleModel<_> = fabric.init_module_empty(Mlp::new)?;
            assert!(
                empty.with_vars(|_| Ok(())).is_err(),
                "no memory before setup"
            );
            let (model, mut optimizer) = fabric.setup(empty, Sgd::new(0.1))?;
            let (input, target) = pairs(1, 4, DType::F32)?;
            let out = fabric.autocast(&input, |input| {
                assert_eq!(input.dtype(), compute);
                model.0[0].forward(input)
            })?;
            assert_eq!(out.dtype(), output);
            let loss = model.loss(&(fabric.cast_input(&input)?, fabric.cast_input(&target)?))?;
            fabric.backward(Loss(&fabric.cast_output(&loss)?))?;
            optimizer.step()
        });
        run.unwrap();
    }
}

#[test]
fn line_31_tensors_of_every_type_and_shape_are_gathered_folded_and_broadcast() {
    let run = ranks(3).unwrap().launch_threads(|fabric| {
        let rank = fabric.global_rank();
        for dtype in [
            DType::F64,
            DType::F32,
            DType::F16,
            DType::BF16,
            DType::U8,
            DType::U32,
            DType::I64,
        ] {
            let values: Vec<u32> = (0..6).map(|value| value + 10 * rank as u32).collect();
            let mine = Tensor::from_vec(values, (3, 2), &CPU)?.to_dtype(dtype)?;
            let turned = mine.t()?; // not contiguous
            let all = fabric.all_gather_tensor(&turned, false)?;
            assert_eq!((all.dims(), all.dtype()), (&[3, 2, 3][..], dtype));
            let expected: Vec<f64> = [0.0, 2.0, 4.0, 1.0, 3.0, 5.0].into();
            assert_eq!(
                flat(&all.get(2)?)?,
                expected.iter().map(|x| x + 20.0).collect::<Vec<_>>()
            );
            let sum = fabric.all_reduce_tensor(&turned, ReduceOp::Sum)?;
            assert_eq!(
                flat(&sum)?,
                expected.iter().map(|x| 3.0 * x + 30.0).collect::<Vec<_>>()
            );
            let seconds = fabric.broadcast_tensor(&turned, 1)?;
            assert_eq!(
                flat(&seconds)?,
                expected.iter().map(|x| x + 10.0).collect::<Vec<_>>()
            );
            let rows = mine.narrow(0, 0, rank)?;
            let uneven = fabric.all_gather_uneven_tensor(&rows)?;
            assert_eq!(uneven.dims(), [3, 2]);
            assert_eq!(flat(&uneven)?, [10.0, 11.0, 20.0, 21.0, 22.0, 23.0]);
            assert_eq!(
                flat(&mine)?[0],
                10.0 * rank as f64,
                "what was given is as it was"
            );
        }
        Ok(())
    });
    run.unwrap();
}

// API-36 with sync_grads: the gradient of a rank's tensor is the sum over ranks of what each has found for it.
#[test]
fn line_32_gradients_flow_through_a_gather() {
    let run = ranks(3).unwrap().launch_threads(|fabric| {
        let rank = fabric.global_rank();
        let own = Var::new(&[rank as f32 + 1.0, 2.0], &CPU)?;
        let all = fabric.all_gather_tensor(&(&*own * 2.0)?, true)?;
        // Every rank weighs what it sees by its own number: d/d own = 2 * sum over ranks of (rank + 1) * all's gradient.
        let loss = (all.sqr()?.sum_all()? * (rank as f64 + 1.0))?;
        let grads = loss.backward()?;
        let grad = flat(grads.get(&own).expect("a gradient"))?;
        let factor = 2.0 * 2.0 * 2.0 * (1.0 + 2.0 + 3.0);
        let expected = [factor * (rank as f64 + 1.0), factor * 2.0];
        assert_close("gradient", &grad, &expected, 1e-6);
        Ok(())
    });
    run.unwrap();
}

// Inside fabric.backward the gather's own reduction and the buckets' stay in step on all ranks.
#[test]
fn line_32_a_contrastive_model_trains_through_a_gather_as_on_one_device() {
    let train = |world: usize| {
        let run = ranks(world).unwrap().launch_threads(|fabric| {
            let model = build_with(3, DType::F64, Mlp::new)?;
            let (model, mut optimizer) = fabric.setup(model, Sgd::new(0.05))?;
            let joint = pairs(5, 4, DType::F64)?;
            for _ in 0..3 {
                let (input, _) = share(&joint, fabric.global_rank(), fabric.world_size())?;
                let own = model.0[0].forward(&input)?.tanh()?;
                let own = model.0[2].forward(&model.0[1].forward(&own)?)?;
                let all = fabric.all_gather_tensor(&own, true)?;
                let all = all.flatten(0, 1)?; // [4, 3], whoever computed it
                let loss = all.matmul(&all.t()?.contiguous()?)?.tanh()?.mean_all()?;
                fabric.backward(Loss(&loss))?;
                optimizer.step()?;
                optimizer.zero_grad();
            }
            Ok(values(model.module())?)
        });
        run.unwrap().remove(0)
    };
    let (one, two) = (train(1), train(2));
    for ((name, one), (_, two)) in one.iter().zip(&two) {
        assert_close(name, two, one, 1e-9);
    }
}

// WRAP-06 to 08: there is nothing to mark. Whichever method runs the parameters, their gradients are averaged.
#[test]
fn line_21_any_method_of_a_model_is_a_forward() {
    let run = ranks(2).unwrap().launch_threads(|fabric| {
        let model = build_with(3, DType::F64, Mlp::new)?;
        let (model, _optimizer) = fabric.setup(model, Sgd::new(0.05))?;
        let rank = fabric.global_rank() as f64;
        // Not `loss`, Mlp's forward: a part of it, by hand.
        let ones = Tensor::ones((1, 5), DType::F64, &CPU)?;
        let loss = (model.0[0].forward(&ones)?.sum_all()? * (1.0 + 2.0 * rank))?;
        fabric.backward(Loss(&loss))?;
        let names = fabric::model::Model::params(model.module());
        let bias = names
            .iter()
            .position(|param| param.name == "first.bias")
            .unwrap();
        let grad = model.grad(fabric::model::ParamId(bias)).unwrap();
        assert_eq!(grad, [2.0; 8], "the mean of 1 and 3");
        Ok(())
    });
    run.unwrap();
}
