//! The trainer template: one loop file, unchanged, under every strategy, on several processes and on threads; and gone on from
//! the middle of an epoch. Method: the example as its users start it; what it prints at its end.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use fabric::{
    Fabric, FabricModule, Result,
    callback::{EarlyStopping, Ema, Hook, LoopState, ModelCheckpoint, at},
    data::DataLoader,
    model::Backward,
    optim::Sgd,
    vec::VecModel,
};
use serde_json::Value;
use template::{Task, Trainer};

use crate::process::finish;

#[allow(dead_code)] // the program uses the rest
#[path = "../facade/examples/trainer/trainer.rs"]
mod template;

const TRAINER: &str = env!("CARGO_BIN_EXE_trainer");

fn run(args: &[&str], out: &Path) -> Value {
    let mut command = Command::new(TRAINER);
    command.args(args).arg("--out").arg(out);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let (output, text) = finish(command.spawn().unwrap());
    assert!(output.status.success(), "{args:?}: {text}");
    let printed = String::from_utf8(output.stdout).unwrap();
    let last = printed.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {printed}"))
}

/// Two epochs on so many ranks, with 48 samples a step in all.
fn epochs(ranks: usize, strategy: &str, more: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let [devices, batch] = [ranks, 48 / ranks].map(|number| number.to_string());
    let args = ["--epochs", "2", "--devices", &devices, "--batch", &batch];
    run(
        &[&args[..], &["--strategy", strategy], more].concat(),
        folder.path(),
    )
}

#[track_caller]
fn assert_near(one: &Value, other: &Value) {
    for name in ["train_loss", "val_loss", "val_accuracy"] {
        let (one, other) = (one[name].as_f64().unwrap(), other[name].as_f64().unwrap());
        assert!(
            (one - other).abs() < 1e-5 * other.abs().max(1.0),
            "{name}: {one} is not {other}"
        );
    }
    assert_eq!(
        (&one["steps"], &one["epochs"]),
        (&other["steps"], &other["epochs"])
    );
}

#[test]
fn one_loop_under_every_strategy_on_processes_and_threads_has_equal_losses() {
    let single = epochs(1, "single", &[]);
    assert_eq!(single["steps"], 60);
    assert!(single["val_accuracy"].as_f64().unwrap() > 0.9, "{single}");
    for ranks in [1, 2, 3] {
        let ddp = epochs(ranks, "ddp", &[]);
        assert_near(&ddp, &single);
        assert_eq!(epochs(ranks, "ddp", &["--threads"]), ddp);
        for strategy in ["zero1", "zero2", "fsdp"] {
            assert_eq!(epochs(ranks, strategy, &[]), ddp, "{strategy} on {ranks}");
        }
        assert_eq!(epochs(ranks, "fsdp", &["--threads"]), ddp);
    }
    let sharded = epochs(2, "fsdp", &["--accumulate", "2"]);
    assert_near(&sharded, &epochs(2, "ddp", &["--accumulate", "2"]));
}

// GAP-08, GAP-13: to the same loss; to the last bit on as many ranks, to rounding under another strategy on another number.
#[test]
fn a_run_goes_on_from_the_middle_of_an_epoch_to_the_same_loss() {
    for strategy in ["ddp", "fsdp"] {
        let folder = tempfile::tempdir().unwrap();
        let args = |ranks: &str, strategy: &str, batch: &str, more: &[&str]| {
            let args = ["--devices", ranks, "--strategy", strategy, "--batch", batch];
            let args = [&args[..], &["--epochs", "3", "--save-every", "10"], more].concat();
            args.into_iter().map(String::from).collect::<Vec<_>>()
        };
        let run = |args: Vec<String>, out: &str| {
            let args: Vec<_> = args.iter().map(String::as_str).collect();
            run(&args, &folder.path().join(out))
        };
        let whole = run(args("2", strategy, "24", &[]), "whole");
        assert_eq!(whole["steps"], 90);
        // Stopped in step 44 of the second epoch, 4 behind a checkpoint.
        let part = run(args("2", strategy, "24", &["--max-steps", "44"]), "part");
        assert_eq!(part["steps"], 44);
        let copy = |from: &str, to: &str| {
            let paths = [from, to].map(|name| folder.path().join(name));
            let copied = Command::new("cp").arg("-r").args(paths).status();
            assert!(copied.unwrap().success());
        };
        copy("part", "other");
        assert_eq!(run(args("2", strategy, "24", &["--resume"]), "part"), whole);
        let other = run(args("3", "zero1", "16", &["--resume"]), "other");
        assert_near(&other, &whole);
    }
}

/// One parameter, from which each step takes the mean of its samples.
struct Mean;

impl Task<VecModel> for Mean {
    type Batch = Vec<f32>;

    fn training_step<'a>(
        &'a self,
        model: &'a FabricModule<VecModel>,
        batch: &'a Vec<f32>,
    ) -> Result<(f64, impl Backward + 'a)> {
        let mean = batch.iter().sum::<f32>() / batch.len() as f32;
        Ok((mean.into(), model.gradients(vec![Some(vec![mean])])))
    }

    fn validation_step(
        &self,
        _: &FabricModule<VecModel>,
        batch: &Vec<f32>,
    ) -> Result<Vec<Vec<f64>>> {
        Ok(batch.iter().map(|_| vec![1.0]).collect())
    }

    fn scores(&self) -> Vec<&'static str> {
        vec!["val_loss"]
    }

    fn samples(&self, batch: &Vec<f32>) -> u64 {
        batch.len() as u64
    }
}

/// Train on the samples 1 to 8, one a batch. What is at the end: the loop's state, the parameter, its average if there is one.
fn mean(
    trainer: &Trainer,
    callbacks: impl FnOnce(&Fabric),
) -> (LoopState, Vec<f32>, Option<Vec<f32>>) {
    let fabric = Fabric::builder().devices(1).build().unwrap();
    callbacks(&fabric);
    let outcome = fabric.launch(|fabric| {
        let model = VecModel::new([("w", vec![0f32])]);
        let samples = || (1..=8).map(|sample| sample as f32).collect::<Vec<_>>();
        let loaders = (DataLoader::new(samples()), DataLoader::new(samples()));
        let trained = trainer.fit(fabric, &Mean, (model, Sgd::new(1.0)), loaders)?;
        let view = trained.model.view();
        let average = fabric.with_callback(|ema: &mut Ema| Ok(ema.read(&view)?.remove(0).1))?;
        Ok((trained.state.clone(), trained.model.read("w"), average))
    });
    outcome.unwrap().unwrap()
}

// GAP-08: what callbacks have counted at the moment of saving is saved, in whatever order they were added.
#[test]
fn patience_is_as_long_in_a_run_that_goes_on_as_in_one_that_was_not_interrupted() {
    for saves_first in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let callbacks = |fabric: &Fabric| {
            let keep = ModelCheckpoint::new(folder.path()).after_validation();
            let stop = EarlyStopping::new("val_loss").patience(4);
            let mut both: Vec<Box<dyn FnOnce()>> = vec![
                Box::new(move || fabric.add_callback(keep)),
                Box::new(move || fabric.add_callback(stop)),
            ];
            if !saves_first {
                both.reverse();
            }
            both.into_iter().for_each(|add| add());
        };
        let trainer = |max_epochs| Trainer {
            max_epochs,
            ..Trainer::default()
        };
        for epochs in 1..=3 {
            let part = trainer(epochs).resume_latest(folder.path()).unwrap();
            assert_eq!(mean(&part, callbacks).0.progress.epoch, epochs);
        }
        let rest = trainer(20).resume_latest(folder.path()).unwrap();
        let (state, ..) = mean(&rest, callbacks);
        assert!(state.stopped().is_some());
        assert_eq!(state.progress.epoch, 5, "one good look and four others");
    }
}

// GAP-08: the batches of a step that was begun have left the loader.
#[test]
fn a_stop_in_the_middle_of_a_step_costs_no_sample() {
    let folder = tempfile::tempdir().unwrap();
    let trainer = Trainer {
        max_epochs: 1,
        accumulate: 2,
        ..Trainer::default()
    };
    let (_, whole, _) = mean(&trainer, |_| {});
    assert_eq!(whole, [-(1.5 + 3.5 + 5.5 + 7.5)]);
    let keep = || ModelCheckpoint::new(folder.path());
    let (state, ..) = mean(&trainer, |fabric| {
        fabric.add_callback(keep());
        fabric.add_callback(at(Hook::AfterBackward, |_, moment| {
            if moment.progress.batches == 2 {
                moment.stop("enough");
            }
            Ok(())
        }));
    });
    assert_eq!(state.progress.batch, 4, "the step was finished");
    let rest = trainer.resume_latest(folder.path()).unwrap();
    let (state, all, _) = mean(&rest, |fabric| fabric.add_callback(keep()));
    assert_eq!((all, state.progress.batches), (whole, 8));
}

// GAP-08: a moving average goes on, too.
#[test]
fn a_moving_average_goes_on_from_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let trainer = |max_epochs| Trainer {
        max_epochs,
        ..Trainer::default()
    };
    let callbacks = |fabric: &Fabric| {
        fabric.add_callback(ModelCheckpoint::new(folder.path()));
        fabric.add_callback(Ema::new(0.5).unwrap());
    };
    let (_, own, average) = mean(&trainer(2), |fabric| {
        fabric.add_callback(Ema::new(0.5).unwrap());
    });
    mean(&trainer(1), callbacks);
    let rest = trainer(2).resume_latest(folder.path()).unwrap();
    let (_, resumed, resumed_average) = mean(&rest, callbacks);
    assert_eq!((resumed, resumed_average), (own, average));
}

#[test]
fn no_batches_of_validation_are_no_validation() {
    let trainer = Trainer {
        max_epochs: 1,
        limit_val_batches: 0,
        ..Trainer::default()
    };
    let (state, ..) = mean(&trainer, |_| {});
    assert_eq!(state.metrics.get("val_loss"), None, "and not NaN");
}
