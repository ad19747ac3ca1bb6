//! Where the weights are: with the model, lent to variables by `with_vars`, written to files, and made from a seed.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use fabric::{
    Fabric, FabricModule, FabricOptimizer, State,
    engine::buffer::Buffer,
    model::{Model, ParamId},
    optim::{AdamW, Sgd},
};
use fabric_candle::{CandleModel, CandleOptimizer, Loss, build};

use crate::{CPU, Mlp, build_with, flat, pairs, ranks, values};

fn mlp() -> CandleModel<Mlp> {
    build_with(3, DType::F32, Mlp::new).unwrap()
}

/// The address and length of an f32 tensor's memory, if it has some.
fn memory(tensor: &Tensor) -> Option<(*const f32, usize)> {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Some((values.as_ptr(), values.len())),
        _ => None,
    }
}

#[test]
fn memory_is_moved_to_the_variables_and_back() {
    let model = mlp();
    let weight = model.0[1].weight();
    let before = memory(weight);
    assert_eq!(before.unwrap().1, 64);
    let mut shell = None;
    model
        .with_vars(|vars| {
            let (_, var) = vars
                .iter()
                .find(|(name, _)| name == "second.weight")
                .unwrap();
            assert_eq!(memory(var), before, "the same memory");
            assert_eq!(memory(weight), None);
            shell = Some(var.clone());
            Ok(())
        })
        .unwrap();
    assert_eq!(memory(&shell.unwrap()), None, "an empty shell outside");
    assert_eq!(memory(weight), before, "the same memory");
}

#[test]
fn what_is_set_inside_is_what_the_model_has_afterwards() {
    let model = mlp();
    model
        .with_vars(|vars| {
            vars.iter()
                .try_for_each(|(_, var)| var.set(&var.ones_like()?))
        })
        .unwrap();
    assert_eq!(flat(model.0[0].bias().unwrap()).unwrap(), [1.0; 8]);
}

#[test]
fn values_survive_a_closure_that_fails_or_panics() {
    let model = mlp();
    let before = values(&model).unwrap();
    let failed = model.with_vars(|_| -> candle_core::Result<()> { bail!("no disk") });
    assert!(failed.unwrap_err().to_string().contains("no disk"));
    assert_eq!(values(&model).unwrap(), before);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        model.with_vars(|_| -> candle_core::Result<()> { panic!("no luck") })
    }));
    assert!(panicked.is_err());
    assert_eq!(values(&model).unwrap(), before);
    assert_eq!(flat(model.0[0].weight()).unwrap().len(), 40);
}

#[test]
fn lending_what_is_lent_already_is_refused_and_loses_nothing() {
    let model = mlp();
    let before = values(&model).unwrap();
    let nested = model.with_vars(|_| {
        let text = model.with_vars(|_| Ok(())).unwrap_err().to_string();
        assert!(text.contains("with_vars"), "{text}");
        let text = model
            .with(ParamId(0), &mut |_| Ok(()))
            .unwrap_err()
            .to_string();
        assert!(text.contains("with_vars"), "{text}");
        Ok(())
    });
    nested.unwrap();
    assert_eq!(values(&model).unwrap(), before);
}

#[test]
fn a_parameter_after_build_and_a_tied_name_of_another_kind_are_refused_by_name() {
    let mut late = None;
    let _model = build(&CPU, DType::F32, |vb| {
        late = Some(vb.pp("late"));
        Mlp::new(vb)
    })
    .unwrap();
    let text = late.unwrap().get(4, "weight").unwrap_err().to_string();
    assert!(
        text.contains("'late.weight'") && text.contains("after the model was built"),
        "{text}"
    );

    let tied = |shape: (usize, usize), dtype: DType| {
        let make = |vb: VarBuilder<'static>| {
            vb.get((2, 3), "both")?;
            vb.get_with_hints_dtype(shape, "both", Init::Const(0.0), dtype)
        };
        build(&CPU, DType::F32, make).err().unwrap().to_string()
    };
    let text = tied((3, 2), DType::F32);
    assert!(
        text.contains("'both'") && text.contains("[3, 2]") && text.contains("[2, 3]"),
        "{text}"
    );
    let text = tied((2, 3), DType::F64);
    assert!(
        text.contains("'both'") && text.contains("F64") && text.contains("F32"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_trained_is_refused_when_the_model_is_built() {
    let make =
        |vb: VarBuilder<'static>| vb.get_with_hints_dtype(4, "index", Init::Const(0.0), DType::U32);
    let text = build(&CPU, DType::F32, make).err().unwrap().to_string();
    assert!(text.contains("U32") && text.contains("use f32"), "{text}");
    let text = build(&Device::Cpu, DType::F32, |vb| vb.get_unchecked("ghost"))
        .err()
        .unwrap()
        .to_string();
    assert!(text.contains("'ghost'"), "{text}");
}

#[test]
fn first_values_depend_on_the_seed_and_the_name_only() {
    let some = |seed, names: &'static [&'static str]| {
        let model = build_with(seed, DType::F32, |vb| {
            let init = Init::Randn {
                mean: 0.0,
                stdev: 1.0,
            };
            names
                .iter()
                .map(|name| vb.get_with_hints(5, name, init))
                .collect::<Result<Vec<_>, _>>()
        });
        values(&model.unwrap()).unwrap()
    };
    let (ab, ba) = (some(1, &["a", "b"]), some(1, &["b", "extra", "a"]));
    assert_eq!((&ab[0], &ab[1]), (&ba[2], &ba[0]));
    assert_ne!(ab[0].1, ab[1].1);
    assert_ne!(some(2, &["a", "b"])[0], ab[0]);
}

#[test]
fn ranks_with_different_seeds_agree_after_setup() {
    let seen = ranks(2).unwrap().launch_threads(|fabric| {
        let seed = 10 + fabric.global_rank() as u64;
        let model = build_with(seed, DType::F32, Mlp::new)?;
        let before = values(&model)?;
        let (model, _optimizer) = fabric.setup(model, Sgd::new(0.1))?;
        Ok((before, values(model.module())?))
    });
    let seen = seen.unwrap();
    assert_ne!(seen[0].0, seen[1].0);
    assert_eq!(seen[0].1, seen[1].1);
    assert_eq!(seen[0].0, seen[0].1, "rank 0's");
}

fn train(
    fabric: &Fabric,
    model: &FabricModule<CandleModel<Mlp>>,
    optimizer: &mut FabricOptimizer<AdamW>,
    steps: u64,
) -> fabric::Result<()> {
    for step in 0..steps {
        fabric.backward(Loss(&model.loss(&pairs(step, 8, DType::F32)?)?))?;
        optimizer.step()?;
        optimizer.zero_grad();
    }
    Ok(())
}

#[test]
fn line_19_a_checkpoint_gives_back_the_same_bits_and_opens_with_candle() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last.safetensors");
    let run = |load: bool| {
        let ranks = ranks(2).unwrap().launch_threads(|fabric| {
            let model = build_with(if load { 77 } else { 3 }, DType::F32, Mlp::new)?;
            let (model, mut optimizer) = fabric.setup(model, AdamW::new(0.01))?;
            let mut step = 0u64;
            if !load {
                train(fabric, &model, &mut optimizer, 3)?;
                step = 3;
            }
            let state = State::new()
                .model("model", &model)
                .optimizer("optimizer", &mut optimizer)
                .value("step", &mut step);
            if load {
                fabric.load(&path, state)?;
            } else {
                fabric.save(&path, state)?;
            }
            assert_eq!(step, 3);
            let saved = values(model.module())?;
            train(fabric, &model, &mut optimizer, 2)?;
            Ok((saved, values(model.module())?))
        });
        ranks.unwrap()
    };
    let (saved, loaded) = (run(false), run(true));
    assert_eq!(
        saved, loaded,
        "the parameters, and what two more steps make of them"
    );
    let file = candle_core::safetensors::load(&path, &CPU).unwrap();
    for (name, values) in &saved[0].0 {
        assert_eq!(
            &flat(&file[&format!("model.{name}")]).unwrap(),
            values,
            "{name}"
        );
    }
    assert_eq!(file["model.first.weight"].dims(), [8, 5]);
    assert_eq!(file["model.third.bias"].dims(), [3]);
    assert_eq!(file["model.third.bias"].dtype(), DType::F32);
}

#[test]
fn an_optimizer_of_candles_says_that_it_cannot_be_saved() {
    let folder = tempfile::tempdir().unwrap();
    let result = ranks(1).unwrap().launch_threads(|fabric| {
        let model = mlp();
        let optimizer = CandleOptimizer::new(&model, |vars| {
            <candle_nn::SGD as candle_nn::Optimizer>::new(vars, 0.1)
        })?;
        let (_model, mut optimizer) = fabric.setup(model, optimizer)?;
        fabric.save(
            folder.path().join("x"),
            State::new().optimizer("optimizer", &mut optimizer),
        )
    });
    let text = result.unwrap_err().to_string();
    assert!(text.contains("Use fabric::optim::AdamW or Sgd"), "{text}");
    assert!(!folder.path().join("x").exists());
}

#[test]
fn an_optimizer_of_another_model_is_refused() {
    let result = ranks(1).unwrap().launch_threads(|fabric| {
        let (other, model) = (mlp(), mlp());
        let optimizer = CandleOptimizer::new(&other, |vars| {
            <candle_nn::SGD as candle_nn::Optimizer>::new(vars, 0.1)
        })?;
        let (model, mut optimizer) = fabric.setup(model, optimizer)?;
        fabric.backward(Loss(&model.loss(&pairs(1, 4, DType::F32)?)?))?;
        optimizer.step()
    });
    let text = result.unwrap_err().to_string();
    assert!(text.contains("another model"), "{text}");
}

#[test]
fn a_parameter_opens_where_it_lies() {
    let model = mlp();
    let before = memory(model.0[0].weight());
    let write = |buffer: &mut dyn Buffer| {
        buffer.write(0..2, fabric::engine::kernels::Span::of(&[7f32, 8.0]))
    };
    model.with(ParamId(0), &mut { write }).unwrap();
    assert_eq!(memory(model.0[0].weight()), before);
    assert_eq!(flat(model.0[0].weight()).unwrap()[..2], [7.0, 8.0]);
}
