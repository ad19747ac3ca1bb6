//! A parameter without memory is an error in whatever candle does with it: never a panic, never a value. Method: every
//! operation that a model may use, on the parameter, on its views, and on two of them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{D, DType, Result as CandleResult, Tensor};
use candle_nn::{Init, Module, VarBuilder, ops};
use fabric::model::{Model, ParamId};
use fabric_candle::{CandleModel, build, build_deferred};

use crate::CPU;

/// Two square weights and a vector, whose memory is away.
struct Away([Tensor; 3]);

impl Away {
    fn new(vb: VarBuilder) -> CandleResult<Self> {
        let get = |shape: &[usize], name| vb.get_with_hints(shape, name, Init::Const(1.0));
        Ok(Self([
            get(&[4, 4], "left")?,
            get(&[4, 4], "right")?,
            get(&[4], "bias")?,
        ]))
    }
}

fn released() -> CandleModel<Away> {
    let model = build(&CPU, DType::F32, Away::new).unwrap();
    (0..3).for_each(|index| model.release(ParamId(index)).unwrap());
    model
}

/// What an operation must not return.
type Outcome = CandleResult<Vec<Tensor>>;

fn one(result: CandleResult<Tensor>) -> Outcome {
    result.map(|tensor| vec![tensor])
}

#[track_caller]
fn refused(what: &str, operation: impl FnOnce() -> Outcome) {
    match catch_unwind(AssertUnwindSafe(operation)) {
        Ok(Err(error)) => {
            let text = error.to_string();
            let of_type = text.contains("F4") || text.contains("unsupported dtype");
            assert!(of_type, "{what}: {text}");
        }
        Ok(Ok(tensors)) => panic!("{what} has a result of shape {:?}", tensors[0].shape()),
        Err(_) => panic!("{what} panics"),
    }
}

#[test]
fn every_operation_on_what_is_away_is_an_error() {
    let model = released();
    let Away([weight, other, bias]) = &*model;
    let x = Tensor::ones((4, 4), DType::F32, &CPU).unwrap();
    let ids = Tensor::new(&[0u32, 2], &CPU).unwrap();
    let all = Tensor::zeros((4, 4), DType::U32, &CPU).unwrap();
    type Unary = fn(&Tensor) -> CandleResult<Tensor>;
    let unary: &[(&str, Unary)] = &[
        ("neg", Tensor::neg),
        ("exp", Tensor::exp),
        ("log", Tensor::log),
        ("sin", Tensor::sin),
        ("cos", Tensor::cos),
        ("tanh", Tensor::tanh),
        ("abs", Tensor::abs),
        ("recip", Tensor::recip),
        ("sqr", Tensor::sqr),
        ("sqrt", Tensor::sqrt),
        ("rsqrt", |w| w.sqrt()?.recip()),
        ("gelu", Tensor::gelu),
        ("gelu_erf", Tensor::gelu_erf),
        ("erf", Tensor::erf),
        ("silu", Tensor::silu),
        ("relu", Tensor::relu),
        ("floor", Tensor::floor),
        ("sign", Tensor::sign),
        ("affine", |w| w.affine(2.0, 1.0)),
        ("powf", |w| w.powf(2.0)),
        ("elu", |w| w.elu(1.0)),
        ("clamp", |w| w.clamp(0f32, 1f32)),
        ("to f64", |w| w.to_dtype(DType::F64)),
        ("to bf16", |w| w.to_dtype(DType::BF16)),
        ("to u8", |w| w.to_dtype(DType::U8)),
        ("sum_all", Tensor::sum_all),
        ("sum", |w| w.sum(0)),
        ("sum_keepdim", |w| w.sum_keepdim(D::Minus1)),
        ("mean", |w| w.mean(0)),
        ("max", |w| w.max(0)),
        ("argmin", |w| w.argmin(D::Minus1)),
        ("var", |w| w.var(0)),
        ("log_sum_exp", |w| w.log_sum_exp(0)),
        ("cumsum", |w| w.cumsum(0)),
        ("softmax", |w| ops::softmax(w, D::Minus1)),
        ("log_softmax", |w| ops::log_softmax(w, D::Minus1)),
        ("softmax_last_dim", ops::softmax_last_dim),
        ("sigmoid", ops::sigmoid),
        ("leaky_relu", |w| ops::leaky_relu(w, 0.1)),
        ("dropout", |w| ops::dropout(w, 0.5)),
        ("arg_sort", |w| w.contiguous()?.arg_sort_last_dim(true)),
        ("narrow of rows, copied", |w| {
            w.narrow(0, 1, 2)?.force_contiguous()
        }),
        ("narrow of columns, copied", |w| {
            w.narrow(1, 1, 2)?.contiguous()
        }),
        ("flattened transposed", |w| w.t()?.flatten_all()?.relu()),
        ("repeat", |w| w.repeat((2, 2))),
        ("flip", |w| w.flip(&[0])),
        ("pad", |w| w.pad_with_zeros(0, 1, 1)),
        ("copy, added", |w| w.copy()? + 1.0),
        ("zeros are not read", |w| w.zeros_like()?.add(w)),
        ("stack", |w| Tensor::stack(&[w, w], 0)),
        ("cat of rows", |w| Tensor::cat(&[w, w], 0)),
        ("cat of columns", |w| Tensor::cat(&[w, w], 1)),
    ];
    for (name, operation) in unary {
        refused(name, || one(operation(weight)));
        refused(&format!("{name} of a view"), || {
            one(operation(&weight.t()?))
        });
        refused(&format!("{name} of a wide view"), || {
            one(operation(&bias.broadcast_as((4, 4))?))
        });
    }
    type Binary = fn(&Tensor, &Tensor) -> CandleResult<Tensor>;
    let binary: &[(&str, Binary)] = &[
        ("matmul", Tensor::matmul),
        ("broadcast_matmul", |a, b| {
            a.broadcast_left(3)?.broadcast_matmul(b)
        }),
        ("add", Tensor::add),
        ("sub", Tensor::sub),
        ("mul", Tensor::mul),
        ("div", Tensor::div),
        ("maximum", |a, b| a.maximum(b)),
        ("eq", |a, b| a.eq(b)),
        ("lt", |a, b| a.lt(b)),
        ("broadcast_add", |a, b| {
            a.broadcast_left(2)?.broadcast_add(b)
        }),
        ("cat", |a, b| Tensor::cat(&[a, b], 0)),
        ("cat of columns", |a, b| Tensor::cat(&[a, b], 1)),
        ("conv1d", |a, b| {
            a.unsqueeze(0)?.conv1d(&b.unsqueeze(2)?, 0, 1, 1, 1)
        }),
        ("conv1d, strided", |a, b| {
            a.unsqueeze(0)?.conv1d(&b.t()?.unsqueeze(0)?, 0, 1, 1, 1)
        }),
        ("conv_transpose1d", |a, b| {
            a.unsqueeze(0)?
                .conv_transpose1d(&b.unsqueeze(2)?, 0, 0, 1, 1, 1)
        }),
        ("conv2d", |a, b| {
            a.reshape((1, 1, 4, 4))?
                .conv2d(&b.reshape((1, 1, 4, 4))?, 0, 1, 1, 1)
        }),
        ("mse", candle_nn::loss::mse),
    ];
    for (name, operation) in binary {
        refused(&format!("{name}, right"), || one(operation(&x, weight)));
        refused(&format!("{name}, left"), || one(operation(weight, &x)));
        refused(&format!("{name}, both"), || one(operation(weight, other)));
        refused(&format!("{name}, transposed"), || {
            one(operation(&x, &weight.t()?))
        });
        refused(&format!("{name}, both transposed"), || {
            one(operation(&weight.t()?, &other.t()?))
        });
    }
    let others: &[(&str, &dyn Fn() -> Outcome)] = &[
        ("index_select", &|| one(weight.index_select(&ids, 0))),
        ("embedding", &|| one(weight.embedding(&ids))),
        ("gather", &|| one(weight.gather(&all, 0))),
        ("index_add into", &|| {
            one(weight.index_add(&ids, &x.narrow(0, 0, 2)?, 0))
        }),
        ("index_add from", &|| {
            one(x.index_add(&ids, &weight.narrow(0, 0, 2)?, 0))
        }),
        ("scatter_add", &|| one(x.scatter_add(&all, weight, 0))),
        ("where_cond", &|| one(all.where_cond(weight, &x))),
        ("slice_set", &|| {
            x.copy()?.slice_set(weight, 0, 0).map(|()| vec![])
        }),
        ("slice_set into", &|| {
            weight.slice_set(&x, 0, 0).map(|()| vec![])
        }),
        ("zero_set", &|| weight.zero_set().map(|()| vec![])),
        ("to_vec2", &|| weight.to_vec2::<f32>().map(|_| vec![])),
        ("to_scalar", &|| {
            bias.narrow(0, 0, 1)?
                .squeeze(0)?
                .to_scalar::<f32>()
                .map(|_| vec![])
        }),
        ("linear", &|| {
            one(candle_nn::Linear::new(weight.clone(), None).forward(&x))
        }),
        ("linear in three dimensions", &|| {
            one(candle_nn::Linear::new(weight.clone(), None).forward(&x.unsqueeze(0)?))
        }),
        ("linear, strided", &|| {
            one(candle_nn::Linear::new(weight.clone(), None).forward(&x.t()?.unsqueeze(0)?))
        }),
        ("a bias", &|| {
            one(candle_nn::Linear::new(x.clone(), Some(bias.clone())).forward(&x))
        }),
        ("RmsNorm", &|| {
            one(candle_nn::RmsNorm::new(bias.clone(), 1e-5).forward(&x))
        }),
        ("RmsNorm::forward_diff", &|| {
            one(candle_nn::RmsNorm::new(bias.clone(), 1e-5).forward_diff(&x))
        }),
        ("LayerNorm", &|| {
            let norm = candle_nn::LayerNorm::new(bias.clone(), bias.clone(), 1e-5);
            one(norm.forward(&x))
        }),
        ("LayerNorm without bias", &|| {
            one(candle_nn::LayerNorm::new_no_bias(bias.clone(), 1e-5).forward(&x))
        }),
        ("PReLU", &|| {
            one(candle_nn::PReLU::new(bias.clone(), false).forward(&x))
        }),
        ("Embedding", &|| {
            one(candle_nn::Embedding::new(weight.clone(), 4).forward(&ids))
        }),
    ];
    for (name, operation) in others {
        refused(name, operation);
    }
}

#[test]
fn what_is_away_can_be_shown_and_its_shape_can_be_asked() {
    let model = released();
    let weight = &model.0[0];
    assert_eq!((weight.dims(), weight.dtype()), (&[4, 4][..], DType::F32));
    assert_eq!(weight.zeros_like().unwrap().dims(), [4, 4]);
    for text in [format!("{weight:?}"), format!("{:?}", weight.t().unwrap())] {
        assert!(text.contains("4, 4"), "{text}");
    }
}

#[test]
fn a_loss_through_what_is_away_says_so_in_backward_too() {
    let model = released();
    let Away([weight, other, _]) = &*model;
    let x = Tensor::ones((4, 4), DType::F32, &CPU).unwrap();
    model.acquire(ParamId(0)).unwrap();
    model.acquire(ParamId(1)).unwrap();
    let loss = x.matmul(weight).unwrap().matmul(other).unwrap();
    model.release(ParamId(1)).unwrap();
    let text = loss.backward().unwrap_err().to_string();
    assert!(text.contains("F4"), "{text}");
    model.acquire(ParamId(1)).unwrap();
    loss.backward().unwrap(); // a view sees its memory come back
}

#[test]
fn the_variables_of_a_model_are_no_holes_either() {
    let model = build(&CPU, DType::F32, Away::new).unwrap();
    let mut kept = None;
    model
        .with_vars(|vars| {
            kept = Some(vars[0].1.clone());
            refused("the model inside with_vars", || {
                one(model.0[0].matmul(&model.0[1]))
            });
            Ok(())
        })
        .unwrap();
    let kept = kept.unwrap();
    refused("a variable outside", || one(kept.matmul(&kept)));
    let model = build_deferred(&CPU, DType::F32, Away::new).unwrap();
    refused("before set-up", || one(model.0[0].matmul(&model.0[1])));
}
