//! Mixed precision: a model computes in a small type, and what is updated is kept in f32, whole or in slices. Method: the
//! same training under every row must give the same bits; overflows are made by hand, on one rank.

use fabric::{
    Clip, Fabric, Result,
    engine::shard::plan::Options,
    model::ParamId,
    optim::{AdamW, Sgd},
    precision::LossScaler,
    vec::VecModel,
};
use half::{bf16, f16};

use crate::blocks::{Real, backward, chain, model, read, uses_extra};

const ROWS: [&str; 5] = ["ddp", "zero1", "zero2", "fsdp", "hsdp"];

fn builder(strategy: &str, world: usize, precision: &str) -> fabric::Builder {
    let options = Options {
        bucket_bytes: 120,
        first_bucket_bytes: 60,
        ..Options::default()
    };
    let builder = Fabric::builder().devices(world).strategy(strategy);
    let builder = builder.precision(precision).buckets(options);
    match strategy {
        "hsdp" => builder.group(2),
        _ => builder,
    }
}

/// The parameters' bits, as the model computes with them, after 20 steps.
fn train<T: Real>(builder: fabric::Builder) -> Vec<u32> {
    let fabric = builder.build().unwrap();
    let ranks = fabric.launch_threads(|fabric| {
        let rank = fabric.global_rank();
        let (model, mut optimizer) = fabric.setup(model::<T>(), AdamW::new(0.02))?;
        let chain = chain(&model, uses_extra(rank));
        for step in 0..20 {
            backward(fabric, &model, &chain, rank, step, 0)?;
            fabric.clip_gradients(&model, Clip::norm(0.5))?;
            optimizer.step()?;
            assert!(!optimizer.was_skipped());
            optimizer.zero_grad();
        }
        let warnings = fabric.warnings();
        assert!(
            warnings.iter().all(|text| !text.contains("precision")),
            "{warnings:?}"
        );
        read(&model)
    });
    let ranks = ranks.unwrap();
    assert!(ranks.iter().all(|rank| *rank == ranks[0]), "ranks agree");
    ranks.into_iter().next().unwrap()
}

#[test]
fn every_row_keeps_the_same_main_values_in_f32() {
    for world in [2, 4] {
        let bits = ROWS.map(|row| train::<bf16>(builder(row, world, "bf16-mixed")));
        for (row, other) in ROWS.iter().zip(&bits) {
            assert_eq!(*other, bits[0], "{row} on {world} ranks");
        }
        assert_ne!(
            bits[0],
            train::<bf16>(builder("ddp", world, "bf16-true")),
            "f32 remembers more"
        );
    }
}

#[test]
fn a_true_small_type_trains_alike_under_every_row() {
    let bits = ROWS.map(|row| train::<bf16>(builder(row, 2, "bf16-true")));
    assert!(bits.iter().all(|other| *other == bits[0]));
}

#[test]
fn the_loss_scale_leaves_no_trace_in_the_bits() {
    let run = |row: &str, scale: f64| {
        let scaler = LossScaler::new().initial_scale(scale).unwrap();
        train::<f16>(builder(row, 2, "16-mixed").loss_scaler(scaler))
    };
    let plain = run("ddp", 16.0);
    for row in ROWS {
        assert_eq!(run(row, 64.0), plain, "{row}");
    }
}

#[test]
fn an_overflow_on_one_rank_skips_the_step_on_all() {
    for row in ROWS {
        let fabric = builder(row, 2, "16-mixed").build().unwrap();
        fabric
            .launch_threads(|fabric| {
                let model = VecModel::new([("a", vec![f16::ONE; 5]), ("b", vec![f16::ONE; 3])]);
                let (model, mut optimizer) = fabric.setup(model, Sgd::new(1.0))?;
                let one = |value: f32, len| Some(vec![f16::from_f32(value); len]);
                let large = match fabric.global_rank() {
                    1 => 2.0, // times 65536 is no f16
                    _ => 0.0,
                };
                assert_eq!(fabric.loss_scale(), 65536.0);
                fabric.backward(model.gradients(vec![one(0.0, 5), one(large, 3)]))?;
                let norm = fabric.clip_gradients(&model, Clip::norm(1.0))?;
                assert!(
                    norm.is_some_and(|norm| !norm.is_finite()),
                    "{row}: {norm:?}"
                );
                optimizer.step()?;
                assert!(optimizer.was_skipped(), "{row}");
                optimizer.zero_grad();
                assert_eq!(model.read("b"), [f16::ONE; 3], "{row}");
                assert_eq!(fabric.loss_scale(), 32768.0);
                // The next one fits, and arrives as it is.
                let small = 2f32.powi(-10);
                fabric.backward(model.gradients(vec![one(0.0, 5), one(small, 3)]))?;
                optimizer.step()?;
                assert!(!optimizer.was_skipped(), "{row}");
                let expected = f16::from_f32(1.0 - small);
                assert_eq!(model.read("b"), [expected; 3], "{row}");
                let state = fabric.loss_scaler_state();
                assert_eq!(state.map(|state| state.finite_steps), Some(1));
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn a_second_backward_without_zero_grad_adds_in_one_scale() {
    for row in ROWS {
        let fabric = builder(row, 2, "16-mixed").build().unwrap();
        fabric
            .launch_threads(|fabric| {
                let model = VecModel::new([("a", vec![f16::ONE; 4])]);
                let (model, mut optimizer) = fabric.setup(model, Sgd::new(1.0))?;
                let grad = || vec![Some(vec![f16::from_f32(2f32.powi(-8)); 4])];
                fabric.backward(model.gradients(grad()))?;
                fabric.backward(model.gradients(grad()))?;
                if row == "ddp" {
                    assert_eq!(model.grad(ParamId(0)), Some(vec![2f32.powi(-7); 4]));
                }
                optimizer.step()?;
                assert_eq!(
                    model.read("a"),
                    [f16::from_f32(1.0 - 2f32.powi(-7)); 4],
                    "{row}"
                );
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn a_model_of_another_type_than_promised_is_remarked_on() {
    let warned = |precision: &str| {
        let fabric = builder("single", 1, precision).build().unwrap();
        let outcome = fabric.launch(|fabric| -> Result<_> {
            fabric.setup_module(VecModel::new([("w", vec![0f32; 2])]))?;
            Ok(fabric.warnings())
        });
        outcome.unwrap().unwrap()
    };
    assert!(warned("32-true").is_empty());
    let warnings = warned("bf16-mixed");
    assert!(warnings[0].contains("'w' is f32"), "{warnings:?}");
}

#[test]
fn gradients_may_travel_as_bf16_and_are_added_in_f32_all_the_same() {
    let grad = |rank: usize| {
        let value = |index: usize| bf16::from_f32((index * 37 + rank * 101 % 97) as f32 / 64.0);
        (0..50).map(value).collect::<Vec<_>>()
    };
    for world in [2, 3] {
        // The tree in f32, one multiplication, one rounding.
        let wide = |rank: usize| grad(rank).into_iter().map(bf16::to_f32).collect::<Vec<_>>();
        let mut sum = wide(0);
        for rank in 1..world {
            sum.iter_mut().zip(wide(rank)).for_each(|(a, b)| *a += b);
        }
        let mean = sum
            .into_iter()
            .map(|sum| bf16::from_f32(sum * (1.0 / world as f32)));
        let expected = mean
            .map(|mean| bf16::from_f32(1.0 - mean.to_f32()))
            .collect::<Vec<_>>();
        for row in ["ddp", "zero1", "zero2", "fsdp"] {
            let options = Options {
                reduce_dtype: Some(fabric::engine::kernels::Dtype::BF16),
                ..Options::default()
            };
            let builder = Fabric::builder()
                .devices(world)
                .strategy(row)
                .buckets(options);
            let ranks = builder.build().unwrap().launch_threads(|fabric| {
                let model = VecModel::new([("w", vec![bf16::ONE; 50])]);
                let (model, mut optimizer) = fabric.setup(model, Sgd::new(1.0))?;
                let before = fabric.spent()?.bytes;
                fabric.backward(model.gradients(vec![Some(grad(fabric.global_rank()))]))?;
                let sent = fabric.spent()?.bytes - before;
                assert_eq!(sent, model.forecast().last_backward.bytes, "{row}");
                optimizer.step()?;
                Ok(model.read("w"))
            });
            assert!(
                ranks.unwrap().iter().all(|rank| *rank == expected),
                "{row}, {world} ranks"
            );
        }
    }
}
