//! The example as its users run it: processes, a JSON report, files, and one sentence for each mistake.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use crate::program::{Ran, report, run};

/// Run the example with tiny sizes and then `args`.
fn gpt(folder: &Path, args: &[&str]) -> Ran {
    let text = folder.join("text.txt");
    std::fs::write(
        &text,
        "She sells sea shells by the sea shore. ".repeat(1500),
    )
    .unwrap();
    let given = |default: &&str| {
        let name = default.split('=').next().unwrap();
        args.iter().any(|arg| arg.split('=').next() == Some(name))
    };
    let defaults = [
        "--layers=1",
        "--width=16",
        "--heads=2",
        "--context=16",
        "--batch-size=4",
        "--max-steps=6",
        "--sample=20",
        &format!("--data={}", text.display()),
        &format!("--out={}", folder.join("out").display()),
    ];
    let defaults = defaults.iter().copied();
    let defaults = defaults.filter(|default| !given(default));
    run(
        "gpt",
        &defaults.chain(args.iter().copied()).collect::<Vec<_>>(),
    )
}

#[test]
fn two_processes_train_report_and_leave_metrics_and_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let ran = gpt(
        folder.path(),
        &["--devices=2", "--trace", trace.to_str().unwrap()],
    );
    let report = report(&ran);
    for key in [
        "steps",
        "train_loss",
        "val_loss",
        "tokens_per_s",
        "world_size",
        "strategy",
        "collectives_per_step",
        "bytes_per_step",
        "peak_rss_mb",
    ] {
        assert!(report.get(key).is_some(), "{key} in {report}");
    }
    assert_eq!(
        (&report["steps"], &report["world_size"]),
        (&6.into(), &2.into())
    );
    assert_eq!(report["strategy"], "ddp");
    assert!(report["bytes_per_step"].as_u64().unwrap() > 0);
    assert!(report["train_loss"].as_f64().unwrap() < 5.6); // ln 256 = 5.545
    let out = folder.path().join("out");
    let metrics = std::fs::read_to_string(out.join("version_0/metrics.csv")).unwrap();
    assert!(metrics.starts_with("step,"), "{metrics}");
    assert!(metrics.contains("val_loss"), "{metrics}");
    let file = candle_core::safetensors::load(out.join("last.safetensors"), &crate::CPU).unwrap();
    assert_eq!(file["model.tokens"].dims(), [256, 16]);
    for rank in 0..2 {
        let text = std::fs::read(trace.join(format!("rank{rank}.json"))).unwrap();
        assert!(serde_json::from_slice::<Value>(&text).unwrap()["traceEvents"].is_array());
    }
}

#[test]
fn two_runs_print_the_same_loss_to_the_last_digit() {
    let run = || {
        let folder = tempfile::tempdir().unwrap();
        let report = report(&gpt(folder.path(), &["--devices=2"]));
        (
            report["train_loss"].to_string(),
            report["val_loss"].to_string(),
        )
    };
    assert_eq!(run(), run());
}

#[test]
fn every_strategy_and_precision_trains_to_the_same_loss() {
    let folder = tempfile::tempdir().unwrap();
    let loss = |strategy: &str, precision: &str| {
        let out = folder.path().join(format!("{strategy}-{precision}"));
        let args = [
            "--devices=2",
            "--layers=2",
            "--max-steps=12",
            "--strategy",
            strategy,
            "--precision",
            precision,
            "--out",
            out.to_str().unwrap(),
        ];
        let report = report(&gpt(folder.path(), &args));
        report["train_loss"].as_f64().unwrap()
    };
    let exact = loss("ddp", "32-true");
    for strategy in ["zero1", "zero2", "fsdp", "hsdp"] {
        assert_eq!(loss(strategy, "32-true"), exact, "{strategy}");
    }
    let mixed = loss("ddp", "bf16-mixed");
    assert_eq!(loss("fsdp", "bf16-mixed"), mixed);
    assert!((mixed - exact).abs() < 0.01 * exact, "{mixed} and {exact}");
}

#[test]
fn one_process_and_two_agree() {
    let folder = tempfile::tempdir().unwrap();
    let loss = |devices: &str| {
        let out = folder.path().join(devices);
        let report = report(&gpt(
            folder.path(),
            &[devices, "--out", out.to_str().unwrap()],
        ));
        report["val_loss"].as_f64().unwrap()
    };
    let (one, two) = (loss("--devices=1"), loss("--devices=2"));
    assert!((one - two).abs() < 1e-3 * one, "{one} and {two}");
}

/// One clear sentence, quickly, and no panic's text.
#[test]
fn mistakes_are_answered_by_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let short = folder.path().join("short.txt");
    std::fs::write(&short, "too short").unwrap();
    let empty: PathBuf = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let (short, empty) = (short.to_str().unwrap(), empty.to_str().unwrap());
    let cases: &[(&[&str], &str)] = &[
        (&["--devices=0"], "0 devices"),
        (&["--devices=some"], "devices = 'some'"),
        (&["--strategy=dpp"], "strategy 'dpp' is not known"),
        (
            &["--devices=2", "--strategy=single"],
            "strategy 'single' with 2 devices",
        ),
        (&["--precision=31"], "precision '31' is not known"),
        (
            &["--data=/nowhere/at/all"],
            "cannot read the text in /nowhere/at/all",
        ),
        (&["--data", short], "too few"),
        (&["--data", empty], "too few"),
        (
            &["--devices=2", "--batch-size=3"],
            "a batch of 3 windows cannot be shared by 2 processes",
        ),
        (
            &["--batch-size=0"],
            "a batch of 0 windows cannot be shared by 1 process.",
        ),
        (&["--batch-size=100000"], "too few for a batch of 100000"),
        (
            &["--width=10", "--heads=4"],
            "a width of 10 cannot be shared by 4 heads",
        ),
        (&["--heads=0"], "a width of 16 cannot be shared by 0 heads"),
        (&["--width=0"], "--width"),
        (&["--max-steps=0"], "--max-steps"),
        (&["--context=0"], "--context"),
        (&["--lr=nan"], "--lr"),
    ];
    for (args, sentence) in cases {
        let ran = gpt(folder.path(), args);
        assert!(!ran.ok, "{args:?} succeeds");
        assert!(ran.stderr.contains(sentence), "{args:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{args:?}: {}", ran.stderr);
        assert_eq!(
            ran.stderr.matches("Error: ").count(),
            1,
            "{args:?}: {}",
            ran.stderr
        );
        assert!(
            ran.took < Duration::from_secs(10),
            "{args:?}: {:?}",
            ran.took
        );
    }
}
