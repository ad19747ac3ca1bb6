//! What the hooks report is what candle's own backward computes. Method: one step on a hooked model and on a plain copy.

use candle_core::{DType, Result as CandleResult, Tensor, Var};
use candle_nn::{Init, VarBuilder};
use fabric::{
    FabricModule, Result,
    engine::comm::trace::Event,
    model::{Model, ParamId},
    optim::Sgd,
};
use fabric_candle::{CandleModel, Loss};

use crate::{
    CPU, Mlp, assert_close, build_with,
    convolution::Convolution,
    flat,
    model::{Config, Gpt, batch},
    pairs, plain, ranks, share,
};

const TINY: Config = Config {
    layers: 2,
    heads: 2,
    width: 16,
    context: 8,
};

/// One backward through the hooks on one rank: every parameter's gradient must be that of plain candle, reported once.
fn same_gradients<M: Send + Sync + 'static>(
    dtype: DType,
    make: impl Fn(VarBuilder<'static>) -> CandleResult<M> + Sync,
    loss: impl Fn(&M) -> CandleResult<Tensor> + Sync,
    tolerance: f64,
) {
    ranks(1)
        .unwrap()
        .launch_threads(|fabric| {
            let model = build_with(3, dtype, &make)?;
            let (copy, vars) = plain(&model, dtype, &make)?;
            let expected = loss(&copy)?.backward()?;
            let (model, _optimizer) = fabric.setup(model, Sgd::new(0.1))?;
            fabric.backward(Loss(&loss(&model)?))?;
            for (index, param) in model.params().iter().enumerate() {
                let ours = model.grad(ParamId(index)).expect("a gradient");
                let ours = ours.into_iter().map(f64::from).collect::<Vec<_>>();
                let theirs = expected.get(&vars[&param.name]).expect("a gradient");
                assert_close(&param.name, &ours, &flat(theirs)?, tolerance);
                let times = ready(fabric)?
                    .iter()
                    .filter(|ready| **ready == index)
                    .count();
                assert_eq!(times, 1, "'{}' is reported once", param.name);
            }
            assert_eq!(fabric.warnings(), [""; 0]);
            Ok(())
        })
        .unwrap();
}

/// The parameters whose gradients became ready, in order.
fn ready(fabric: &fabric::Fabric) -> Result<Vec<usize>> {
    let records = fabric.trace()?.records();
    let ready = records.iter().filter_map(|record| match record.event {
        Event::Ready { param } => Some(param),
        _ => None,
    });
    Ok(ready.collect())
}

fn grad<M: Send + Sync + 'static>(model: &FabricModule<CandleModel<M>>, name: &str) -> Vec<f64> {
    let index = model.params().iter().position(|param| param.name == name);
    let grad = model.grad(ParamId(index.expect("a parameter of this name")));
    grad.expect("a gradient")
        .into_iter()
        .map(f64::from)
        .collect()
}

#[test]
fn linear_layers_get_candles_own_gradients_in_every_float_type() {
    let loss = |dtype| move |model: &Mlp| model.loss(&pairs(1, 6, dtype)?);
    same_gradients(DType::F32, Mlp::new, loss(DType::F32), 0.0);
    same_gradients(DType::F64, Mlp::new, loss(DType::F64), 1e-7); // read back as f32
    same_gradients(DType::BF16, Mlp::new, loss(DType::BF16), 0.0);
    same_gradients(DType::F16, Mlp::new, loss(DType::F16), 0.0);
}

#[test]
fn the_gpt_of_the_example_gets_candles_own_gradients() {
    let windows = [b"to be or ".to_vec(), b"not to be".to_vec()];
    let loss = move |model: &Gpt| {
        let (input, target) = batch(&windows, &CPU)?;
        model.loss(&input, &target)
    };
    same_gradients(DType::F32, |vb| Gpt::new(&TINY, vb), &loss, 0.0);
    same_gradients(DType::F64, |vb| Gpt::new(&TINY, vb), &loss, 1e-7);
}

#[test]
fn gradients_become_ready_from_the_last_parameter_to_the_first() {
    ranks(1)
        .unwrap()
        .launch_threads(|fabric| {
            let model = build_with(3, DType::F32, Mlp::new)?;
            let (model, _optimizer) = fabric.setup(model, Sgd::new(0.1))?;
            fabric.backward(Loss(&model.loss(&pairs(1, 6, DType::F32)?)?))?;
            let order = ready(fabric)?;
            assert_eq!(order.len(), 6);
            // A layer's weight and bias may change places, layers may not.
            assert_eq!(
                order.iter().map(|param| param / 2).collect::<Vec<_>>(),
                [2, 2, 1, 1, 0, 0]
            );
            Ok(())
        })
        .unwrap();
}

/// Parameters where candle's graph is unusual: on the left of a product, used many times, narrowed, transposed,
/// broadcast, and one that is the loss itself but for a sum.
struct Odd {
    left: Tensor,  // [4, 3]
    many: Tensor,  // [3]
    wide: Tensor,  // [6, 4]
    alone: Tensor, // []
}

impl Odd {
    fn new(vb: VarBuilder) -> CandleResult<Self> {
        let normal = |shape: &[usize], name: &str| {
            let init = Init::Randn {
                mean: 0.0,
                stdev: 1.0,
            };
            vb.get_with_hints(shape, name, init)
        };
        Ok(Self {
            left: normal(&[4, 3], "left")?,
            many: normal(&[3], "many")?,
            wide: normal(&[6, 4], "wide")?,
            alone: normal(&[], "alone")?,
        })
    }

    fn loss(&self) -> CandleResult<Tensor> {
        let input = Tensor::arange(0f32, 15.0, &CPU)?.reshape((3, 5))?;
        let input = (input / 10.0)?.to_dtype(self.left.dtype())?;
        let mut x = input.broadcast_mul(&self.many.reshape((3, 1))?)?;
        for _ in 0..3 {
            x = x.broadcast_add(&self.many.reshape((3, 1))?)?.tanh()?;
        }
        let y = self.left.matmul(&x)?; // [4, 5]
        let z = self.wide.narrow(0, 1, 3)?.matmul(&y)?; // [3, 5]
        let w = self.wide.t()?.narrow(1, 2, 3)?.matmul(&z)?; // [4, 5]
        let w = w.mul(&self.wide.t()?.narrow(1, 0, 5)?)?;
        w.sum_all()? + self.alone.sqr()?
    }
}

#[test]
fn left_operands_narrowed_transposed_and_reused_parameters_are_reported_whole_and_once() {
    same_gradients(DType::F32, Odd::new, Odd::loss, 1e-6);
    same_gradients(DType::F64, Odd::new, Odd::loss, 1e-6);
}

#[test]
fn a_parameter_that_is_the_loss_itself_has_the_gradient_one() {
    let alone = |vb: VarBuilder<'static>| vb.get_with_hints((), "alone", Init::Const(2.0));
    same_gradients(DType::F32, alone, |alone| Ok(alone.clone()), 0.0);
}

/// An embedding and a head of shape [7, 4], under one name or under two.
struct Tied([Tensor; 2]);

impl Tied {
    fn new(names: [&'static str; 2]) -> impl Fn(VarBuilder<'static>) -> CandleResult<Self> + Sync {
        move |vb| {
            let get =
                |name| vb.get_with_hints((7, 4), name, candle_nn::init::DEFAULT_KAIMING_NORMAL);
            Ok(Self([get(names[0])?, get(names[1])?]))
        }
    }

    fn loss(&self) -> CandleResult<Tensor> {
        let input = Tensor::new(&[3u32, 1, 3, 6], &CPU)?;
        let hidden = self.0[0].index_select(&input, 0)?.tanh()?;
        candle_nn::loss::cross_entropy(&hidden.matmul(&self.0[1].t()?)?, &input)
    }
}

#[test]
fn a_tied_weight_is_one_parameter_with_the_sum_of_both_gradients() {
    same_gradients(DType::F32, Tied::new(["both", "both"]), Tied::loss, 0.0);
    let model = build_with(3, DType::F32, Tied::new(["both", "both"])).unwrap();
    assert_eq!(model.params().len(), 1);
    // By hand: two weights of the same values, whose gradients are added.
    let value = model.with_vars(|vars| vars[0].1.copy()).unwrap();
    let parts = [0, 1].map(|_| Var::from_tensor(&value).unwrap());
    let untied = Tied([parts[0].as_tensor().clone(), parts[1].as_tensor().clone()]);
    let grads = untied.loss().unwrap().backward().unwrap();
    let sum = (grads.get(&parts[0]).unwrap() + grads.get(&parts[1]).unwrap()).unwrap();
    let ours = ranks(1).unwrap().launch_threads(|fabric| {
        let model = build_with(3, DType::F32, Tied::new(["both", "both"]))?;
        let (model, _optimizer) = fabric.setup(model, Sgd::new(0.1))?;
        fabric.backward(Loss(&model.loss()?))?;
        Ok(grad(&model, "both"))
    });
    assert_close("both", &ours.unwrap()[0], &flat(&sum).unwrap(), 1e-6);
}

#[test]
fn micro_batches_without_sync_add_up_to_the_joint_batch() {
    const MICRO: usize = 2;
    let joint = pairs(5, 8, DType::F64).unwrap();
    let losses = ranks(2).unwrap().launch_threads(|fabric| {
        let model = build_with(3, DType::F64, Mlp::new)?;
        let (copy, vars) = plain(&model, DType::F64, Mlp::new)?;
        let (model, _optimizer) = fabric.setup(model, Sgd::new(0.1))?;
        let mine = share(&joint, fabric.global_rank(), 2)?;
        for micro in 0..MICRO {
            let last = micro + 1 == MICRO;
            let before = fabric.spent()?;
            fabric.no_backward_sync(&model, !last, || {
                let loss = model.loss(&share(&mine, micro, MICRO)?)?;
                fabric.backward_scaled(Loss(&loss), 1.0 / MICRO as f32)
            })?;
            let spent = fabric.spent()? - before;
            assert_eq!(spent.collectives == 0, !last, "{spent:?}");
        }
        let expected = copy.loss(&joint)?.backward()?;
        for param in model.params() {
            let theirs = flat(expected.get(&vars[&param.name]).unwrap())?;
            assert_close(&param.name, &grad(&model, &param.name), &theirs, 1e-6);
        }
        Ok(())
    });
    losses.unwrap();
}

#[test]
fn a_model_that_was_not_set_up_behaves_as_in_candle() {
    let model = build_with(3, DType::F32, Mlp::new).unwrap();
    let (copy, vars) = plain(&model, DType::F32, Mlp::new).unwrap();
    let data = pairs(1, 6, DType::F32).unwrap();
    let ours = model.loss(&data).unwrap().backward().unwrap();
    let theirs = copy.loss(&data).unwrap().backward().unwrap();
    model
        .with_vars(|params| {
            for (name, var) in params {
                let (ours, theirs) = (ours.get(var).unwrap(), theirs.get(&vars[name]).unwrap());
                assert_eq!(flat(ours)?, flat(theirs)?, "{name}");
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn line_22_candles_own_backward_on_a_model_that_was_set_up_says_what_to_call() {
    let result = ranks(1).unwrap().launch_threads(|fabric| {
        let model = build_with(3, DType::F32, Mlp::new)?;
        let (model, _optimizer) = fabric.setup(model, Sgd::new(0.1))?;
        model.loss(&pairs(1, 6, DType::F32)?)?.backward()?;
        Ok(())
    });
    let text = result.unwrap_err().to_string();
    assert!(text.contains("Call fabric.backward(loss)"), "{text}");
    assert!(text.contains("'third.bias'"), "{text}");
}

/// EX-01: the gallery's convolution, whose neighbours are gathered into rows, against candle's `conv2d`.
#[test]
fn the_convolution_of_the_gallery_is_candles_and_so_are_its_gradients() {
    for (side, stride) in [(8, 1), (8, 2), (5, 2), (1, 1)] {
        let (from, to) = (3, 4);
        let ours = build_with(3, DType::F64, |vb| {
            Convolution::new((side, stride), (from, to), &vb.pp("conv"))
        })
        .unwrap();
        let places = side * side;
        let x = Tensor::randn(0f64, 1.0, (2, places, from), &CPU).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let y = ours.forward(&x).unwrap();
        let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let (by_x, y) = (grads.get(&x).unwrap(), flat(&y).unwrap());
        let expected = ours.with_vars(|vars| {
            let [(_, weight), (_, bias)] = vars else {
                panic!("{} parameters", vars.len());
            };
            let kernel = weight.reshape((to, 3, 3, from))?.permute((0, 3, 1, 2))?;
            let image = x.reshape((2, side, side, from))?.permute((0, 3, 1, 2))?;
            let y = image
                .contiguous()?
                .conv2d(&kernel.contiguous()?, 1, stride, 1, 1)?;
            let y = y.broadcast_add(&bias.reshape((1, to, 1, 1))?)?.relu()?;
            let grads = y.sqr()?.sum_all()?.backward()?;
            let by_x = grads.get(&x).map(flat).expect("a gradient");
            Ok((flat(&y.permute((0, 2, 3, 1))?)?, by_x?))
        });
        let expected = expected.unwrap();
        assert_close("output", &y, &expected.0, 1e-12);
        assert_close("gradient", &flat(by_x).unwrap(), &expected.1, 1e-12);
    }
}

#[test]
fn a_loss_that_is_given_away_has_the_gradients_of_one_that_is_lent() {
    let result = ranks(1).unwrap().launch_threads(|fabric| {
        let model = build_with(3, DType::F32, Mlp::new)?;
        let (model, mut optimizer) = fabric.setup(model, Sgd::new(0.1))?;
        let loss = || model.loss(&pairs(1, 4, DType::F32)?);
        let lent = loss()?;
        fabric.backward_scaled(Loss(&lent), 0.5)?;
        let by_lent = model.grad(ParamId(0));
        optimizer.zero_grad();
        fabric.backward_scaled(Loss(loss()?), 0.5)?;
        assert_eq!(model.grad(ParamId(0)), by_lent);
        Ok(by_lent.expect("a gradient").iter().any(|own| *own != 0.0))
    });
    assert_eq!(result.unwrap(), [true]);
}

/// What the crate's documentation warns of: when this fails, candle has been mended, and the warning can go.
#[test]
fn candles_max_pooling_has_a_quarter_of_its_gradient() {
    let x = Var::new(&[[[[1f32, 2.0], [3.0, 4.0]]]], &CPU).unwrap();
    let loss = x.max_pool2d(2).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    assert_eq!(flat(grads.get(&x).unwrap()).unwrap(), [0.0, 0.0, 0.0, 0.25]);
}

#[test]
fn a_failing_backward_of_candles_is_returned_with_its_words() {
    let result = ranks(1).unwrap().launch_threads(|fabric| {
        let model = build_with(3, DType::F32, Mlp::new)?;
        let (model, _optimizer) = fabric.setup(model, Sgd::new(0.1))?;
        let loss = model.0[0].weight().ceil()?.sum_all()?; // has no gradient, and candle cuts it
        fabric.backward(Loss(&loss))?;
        assert_eq!(fabric.warnings().len(), 1);
        let kernel = model.0[0].weight().reshape((8, 5, 1))?;
        let loss =
            Tensor::ones((1, 8, 4), DType::F32, &CPU)?.conv_transpose1d(&kernel, 0, 0, 1, 1, 1)?;
        fabric.backward(Loss(&loss.sum_all()?))
    });
    let text = result.unwrap_err().to_string();
    assert!(text.contains("candle's backward"), "{text}");
    assert!(text.contains("conv-transpose1d"), "{text}");
}
