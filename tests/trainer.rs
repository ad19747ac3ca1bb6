//! The trainer template: one loop file, unchanged, under every strategy, on several processes and on threads; and gone on from
//! the middle of an epoch. Method: the example as its users start it; what it prints at its end.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::process::finish;

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
