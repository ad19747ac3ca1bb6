//! Defects that Lightning Fabric has, as tests that its behaviour would fail. Those that concern one module alone stand
//! beside it: docs/FABRIC.md names a test for each.

use std::os::unix::fs::PermissionsExt;

use fabric::{
    Clip, Fabric, State, model::ParamId, optim::Sgd, precision::LossScaler, vec::VecModel,
};
use half::f16;

use crate::puppet::{all_say, failures};

const ROWS: [&str; 4] = ["ddp", "zero1", "zero2", "fsdp"];

fn builder(strategy: &str, precision: &str) -> fabric::Builder {
    let builder = Fabric::builder().devices(2).strategy(strategy);
    builder.precision(precision)
}

fn model(first: f32) -> VecModel<f16> {
    let model = VecModel::new([("w", vec![f16::from_f32(first); 4])]);
    model.in_units(["w"]).unwrap()
}

fn gradient(value: f32) -> Vec<Option<Vec<f16>>> {
    vec![Some(vec![f16::from_f32(value); 4])]
}

// Two identical models with an optimizer each: Lightning's second one moves by 1/65536 of the first.
#[test]
fn bug_02_two_optimizers_are_unscaled_once_each() {
    for strategy in ROWS {
        let fabric = builder(strategy, "16-mixed").build().unwrap();
        let run = fabric.launch_threads(|fabric| {
            let folder = tempfile::tempdir()?;
            let path = fabric.broadcast(folder.path().join("both"), 0)?;
            let (left, mut left_optimizer) = fabric.setup(model(1.0), Sgd::new(1.0))?;
            let (right, mut right_optimizer) = fabric.setup(model(1.0), Sgd::new(1.0))?;
            for (model, optimizer) in [(&left, &mut left_optimizer), (&right, &mut right_optimizer)]
            {
                fabric.backward(model.gradients(gradient(2f32.powi(-6))))?;
                fabric.clip_gradients(model, Clip::norm(1e3))?;
                optimizer.step()?;
                assert!(!optimizer.was_skipped());
                optimizer.zero_grad();
            }
            let state = State::new().model("left", &left).model("right", &right);
            fabric.save(&path, state)?;
            let read = Fabric::builder().devices(1).precision("16-mixed").build()?;
            let read = read.launch_threads(|single| {
                let left = single.setup_module(model(0.0))?;
                let right = single.setup_module(model(0.0))?;
                single.load(
                    &path,
                    State::new().model("left", &left).model("right", &right),
                )?;
                Ok([left.read("w"), right.read("w")])
            })?;
            fabric.barrier()?;
            Ok(read.concat())
        });
        let expected = vec![f16::from_f32(1.0 - 2f32.powi(-6)); 4];
        for read in run.unwrap() {
            assert_eq!(read, [expected.clone(), expected.clone()], "{strategy}");
        }
    }
}

// A gradient of 1.0 at the first scale of 65,536: what the scaler is there to absorb.
#[test]
fn bug_03_clipping_leaves_an_overflow_to_the_scaler() {
    for strategy in ROWS {
        let fabric = builder(strategy, "16-mixed").build().unwrap();
        let run = fabric.launch_threads(|fabric| {
            let (model, mut optimizer) = fabric.setup(model(1.0), Sgd::new(0.5))?;
            let mut skipped = 0;
            for _ in 0..4 {
                fabric.backward(model.gradients(gradient(1.0)))?;
                fabric.clip_gradients(&model, Clip::norm(100.0))?;
                optimizer.step()?;
                skipped += usize::from(optimizer.was_skipped());
                optimizer.zero_grad();
            }
            Ok((skipped, fabric.loss_scale()))
        });
        assert_eq!(run.unwrap(), [(1, 32768.0); 2], "{strategy}"); // 32768 is an f16
    }
}

// Lightning's FSDP goes on with NaN, and torch has changed the gradients by then.
#[test]
fn bug_04_a_norm_that_is_not_finite_is_an_error_under_every_strategy() {
    for strategy in ROWS {
        let fabric = builder(strategy, "32-true").build().unwrap();
        let said = fabric.launch_threads(|fabric| {
            let model = VecModel::new([("w", vec![1f32; 4])]).in_units(["w"])?;
            let (model, _optimizer) = fabric.setup(model, Sgd::new(1.0))?;
            let mine = if fabric.global_rank() == 1 {
                f32::NAN
            } else {
                1.0
            };
            fabric.backward(model.gradients(vec![Some(vec![mine, 2.0, 3.0, 4.0])]))?;
            let error = fabric.clip_gradients(&model, Clip::norm(1.0)).unwrap_err();
            // A second look finds them as they were: not scaled by the norm.
            let again = fabric.clip_gradients(&model, Clip::norm(1.0)).unwrap_err();
            Ok([error.to_string(), again.to_string()])
        });
        for said in said.unwrap().concat() {
            assert!(
                said.contains("the gradients' norm is NaN"),
                "{strategy}: {said}"
            );
        }
    }
}

#[test]
fn bug_05_synchronisation_is_as_before_after_the_block() {
    let fabric = builder("ddp", "32-true").build().unwrap();
    let run = fabric.launch_threads(|fabric| {
        let (model, mut optimizer) =
            fabric.setup(VecModel::new([("w", vec![0f32])]), Sgd::new(1.0))?;
        let rank = fabric.global_rank() as f32;
        let backward = || fabric.backward(model.gradients(vec![Some(vec![rank])]));
        for enabled in [false, true] {
            fabric.no_backward_sync(&model, enabled, || Ok(()))?;
            let failed = fabric.no_backward_sync(&model, enabled, || -> fabric::Result<()> {
                fabric::bail!("the body fails")
            });
            assert!(failed.is_err());
            backward()?;
            assert_eq!(model.grad(ParamId(0)), Some(vec![0.5]), "averaged again");
            optimizer.zero_grad();
        }
        // A block within a block.
        fabric.no_backward_sync(&model, true, || {
            fabric.no_backward_sync(&model, false, || Ok(()))?;
            backward()
        })?;
        assert_eq!(model.grad(ParamId(0)), Some(vec![rank]), "not averaged");
        optimizer.step()
    });
    run.unwrap();
}

// Lightning's save returns, and there is no file.
#[test]
fn bug_06_a_folder_that_may_not_be_written_is_an_error_on_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    // Also for a user who may write anywhere: a file is no folder, whatever its mode.
    let place = folder.path().join("a file");
    std::fs::write(&place, "").unwrap();
    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o400)).unwrap();
    let said = failures(2, |fabric| {
        let (model, _) = fabric.setup(VecModel::new([("w", vec![0f32])]), Sgd::new(1.0))?;
        fabric.save(place.join("checkpoint"), State::new().model("m", &model))
    });
    all_say(&said, &["a file"]);
    let read_only = folder.path().join("read only");
    std::fs::create_dir(&read_only).unwrap();
    std::fs::set_permissions(&read_only, std::fs::Permissions::from_mode(0o500)).unwrap();
    let path = read_only.join("checkpoint");
    let run = builder("fsdp", "32-true")
        .build()
        .unwrap()
        .launch_threads(|fabric| {
            let (model, _) = fabric.setup(VecModel::new([("w", vec![0f32])]), Sgd::new(1.0))?;
            let saved = fabric.save(&path, State::new().model("m", &model)).is_ok();
            Ok((saved, path.exists()))
        });
    for (saved, exists) in run.unwrap() {
        assert_eq!(saved, exists, "what is said is what is there");
    }
}

// FSDPPrecision(scaler=..) always raises.
#[test]
fn bug_10_a_scaler_of_ones_own_is_taken_under_every_strategy() {
    for strategy in ROWS {
        let scaler = LossScaler::new().initial_scale(8.0).unwrap();
        let fabric = builder(strategy, "16-mixed").loss_scaler(scaler);
        let run = fabric.build().unwrap().launch_threads(|fabric| {
            let (model, mut optimizer) = fabric.setup(model(1.0), Sgd::new(1.0))?;
            fabric.backward(model.gradients(gradient(0.5)))?;
            optimizer.step()?;
            Ok((fabric.loss_scale(), optimizer.was_skipped()))
        });
        assert_eq!(run.unwrap(), [(8.0, false); 2], "{strategy}");
    }
}

// The scaler's state has save and load methods that nothing of Lightning's calls.
#[test]
fn bug_21_the_loss_scale_goes_on_from_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scale");
    let run = |load: bool| {
        let fabric = builder("ddp", "16-mixed").build().unwrap();
        let run = fabric.launch_threads(|fabric| {
            let (model, mut optimizer) = fabric.setup(model(1.0), Sgd::new(0.1))?;
            let mut scale = fabric.loss_scaler_state();
            if load {
                fabric.load(&path, State::new().value("scale", &mut scale))?;
                fabric.load_loss_scaler_state(scale)?;
                return Ok(fabric.loss_scale());
            }
            fabric.backward(model.gradients(gradient(30.0)))?;
            optimizer.step()?;
            let mut scale = fabric.loss_scaler_state();
            fabric.save(&path, State::new().value("scale", &mut scale))?;
            Ok(fabric.loss_scale())
        });
        run.unwrap()
    };
    let saved = run(false);
    assert_eq!(saved, [32768.0; 2]);
    assert_eq!(run(true), saved);
}
