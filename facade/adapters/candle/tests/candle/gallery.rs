//! The gallery as its users run it: each example, on processes, long enough that it must have learnt something.

use std::path::Path;

use serde_json::Value;

use crate::program::{report, run};

/// The report of a run of `words`, which leaves its files in `folder`.
fn learn(folder: &Path, words: &str) -> Value {
    let out = format!("--out={}", folder.join("out").display());
    let args: Vec<&str> = words.split(' ').chain([&*out]).collect();
    report(&run("gallery", &args))
}

fn learn_anew(words: &str) -> Value {
    learn(tempfile::tempdir().unwrap().path(), words)
}

fn number(report: &Value, key: &str) -> f64 {
    let number = report[key].as_f64();
    number.unwrap_or_else(|| panic!("{key} in {report}"))
}

// EX-01, GAP-04: every one of the 357 digits is counted once, and what is loaded is what was saved.
#[test]
fn digits_are_read_to_the_same_bits_under_every_strategy() {
    let folder = tempfile::tempdir().unwrap();
    let whole = learn(folder.path(), "digits --epochs=2 --strategy=ddp");
    assert!(number(&whole, "test_accuracy") > 0.94, "{whole}");
    assert_eq!(number(&whole, "test_samples"), 357.0);
    assert_eq!(whole["reloaded_accuracy"], whole["test_accuracy"]);
    let out = folder.path().join("out");
    for left in ["digits.csv.gz", "model.safetensors", "checkpoints/last"] {
        assert!(out.join(left).exists(), "{left}");
    }
    for strategy in ["zero1", "fsdp"] {
        let other = learn_anew(&format!("digits --epochs=2 --strategy={strategy}"));
        for key in ["train_loss", "test_loss", "test_accuracy", "steps"] {
            assert_eq!(other[key], whole[key], "{key} under {strategy}");
        }
    }
}

// GAP-03, BUG-16, BUG-17: the trainer steps on, every batch is in a step, and a step is a mean.
#[test]
fn accumulated_digits_take_as_many_steps_to_the_same_loss() {
    let whole = learn_anew("digits --epochs=1");
    let parts = learn_anew("digits --epochs=1 --accumulate=3");
    assert_eq!(parts["steps"], whole["steps"]);
    let (whole, parts) = (number(&whole, "test_loss"), number(&parts, "test_loss"));
    assert!((whole - parts).abs() < 0.02 * whole, "{whole} and {parts}");
}

// BUG-12: half a download is not read by anybody, and one that fails on rank 0 is tried by nobody else.
#[test]
fn a_damaged_download_is_made_again_and_one_that_fails_fails_for_all() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("digits.csv.gz"), "half a file").unwrap();
    let first = learn(folder.path(), "digits --epochs=1");
    assert!(number(&first, "test_accuracy") > 0.9, "{first}");
    // It goes on where it was, with the file that is there now.
    let second = learn(folder.path(), "digits --epochs=2 --resume");
    assert_eq!(number(&second, "steps"), 2.0 * number(&first, "steps"));

    let out = format!("--out={}", out.join("digits.csv.gz").display()); // no folder
    let ran = run("gallery", &["digits", &out]);
    assert!(!ran.ok);
    for sentence in ["cannot write", "rank 0 failed first"] {
        assert!(ran.stderr.contains(sentence), "{}", ran.stderr);
    }
}

// EX-02
#[test]
fn a_gan_draws_what_has_the_look_of_digits() {
    let folder = tempfile::tempdir().unwrap();
    let whole = learn(folder.path(), "gan --epochs=40 --strategy=ddp");
    let young = learn_anew("gan --epochs=1");
    assert!(number(&young, "mean_error") > 0.2, "{young}"); // grey, and far from the mean of all digits
    assert!(number(&whole, "mean_error") < 0.1, "{whole}");
    assert!((0.7..1.3).contains(&number(&whole, "spread")), "{whole}"); // and not all alike
    for loss in ["discriminator_loss", "generator_loss"] {
        assert!((0.3..3.0).contains(&number(&whole, loss)), "{whole}");
    }
    let picture = std::fs::read(folder.path().join("out/samples.pgm")).unwrap();
    let header = b"P5\n80 32\n255\n";
    assert!(picture.starts_with(header));
    assert_eq!(picture.len(), header.len() + 80 * 32);
    let drawn = &picture[header.len()..];
    assert!(drawn.contains(&0) && drawn.iter().any(|grey| *grey > 200));
    let sharded = learn_anew("gan --epochs=40 --strategy=fsdp");
    assert_eq!(sharded["mean_error"], whole["mean_error"]); // two models, in shards
}

// EX-03, GAP-04: folds of 359 and 360 samples on two ranks, and no sample is judged twice.
#[test]
fn five_folds_judge_every_sample_once() {
    let report = learn_anew("kfold --epochs=8");
    assert_eq!(number(&report, "samples"), 1797.0);
    let accuracies = report["accuracies"].as_array().unwrap();
    assert_eq!(accuracies.len(), 5);
    assert!(
        accuracies.iter().all(|own| own.as_f64().unwrap() > 0.9),
        "{report}"
    );
    assert!(
        (1e-4..0.05).contains(&number(&report, "deviation")),
        "{report}"
    );
}

// EX-05
#[test]
fn ten_points_are_enough_for_who_has_learnt_to_learn() {
    let learnt = learn_anew("maml --steps=2000");
    assert!(number(&learnt, "loss_before") > 1.0, "{learnt}");
    assert!(number(&learnt, "ratio") < 0.25, "{learnt}");
    let unlearnt = learn_anew("maml --steps=1");
    assert!(number(&unlearnt, "ratio") > 0.4, "{unlearnt}"); // the inner loop alone does not do it
}

// EX-06
#[test]
fn who_plays_and_learns_keeps_the_pole_up_for_longer() {
    let folder = tempfile::tempdir().unwrap();
    let report = learn(folder.path(), "ppo --rounds=60");
    assert!(
        number(&report, "best_return") > 4.0 * number(&report, "first_return"),
        "{report}"
    );
    let logs = folder.path().join("out/version_0");
    let metrics = std::fs::read_to_string(logs.join("metrics.csv")).unwrap();
    assert!(
        metrics.lines().next().unwrap().contains("return"),
        "{metrics}"
    );
    assert_eq!(metrics.lines().count(), 61);
    let mut files = std::fs::read_dir(&logs).unwrap();
    assert!(files.any(|file| {
        file.unwrap()
            .file_name()
            .to_string_lossy()
            .contains("tfevents")
    }));
}

// EX-07
#[test]
fn one_plays_and_one_or_two_learn_from_it() {
    for devices in [2, 3] {
        let report = learn_anew(&format!("ppo --decoupled --devices={devices} --rounds=60"));
        assert_eq!(report["decoupled"], true);
        assert!(
            number(&report, "best_return") > 4.0 * number(&report, "first_return"),
            "{report}"
        );
    }
}

#[test]
fn mistakes_are_answered_with_what_to_try() {
    let cases: &[(&str, &str)] = &[
        ("go", "unrecognized subcommand"),
        (
            "digits --devices=2 --batch=3",
            "a batch of 3 samples in 2 parts",
        ),
        (
            "digits --batch=48 --accumulate=5",
            "a batch of 48 samples in 10 parts",
        ),
        ("digits --epochs=0", "0 is not in 1.."),
        ("kfold --folds=1", "1 is not in 2..=100"),
        ("gan --strategy=dpp", "strategy 'dpp' is not known"),
        ("gan --batch=1000", "Choose a smaller --batch"),
        ("maml --precision=31", "precision '31' is not known"),
        (
            "ppo --decoupled --devices=1",
            "Ask for --devices 2, or more",
        ),
        (
            "ppo --decoupled --strategy=fsdp",
            "Choose ddp, zero1 or zero2",
        ),
        ("ppo --moves=1", "1 is not in 2.."),
    ];
    for (words, sentence) in cases {
        let ran = run("gallery", &words.split(' ').collect::<Vec<_>>());
        assert!(!ran.ok, "{words} succeeds");
        assert!(ran.stderr.contains(sentence), "{words}: {}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{words}: {}", ran.stderr);
    }
    let ran = run::<&str>("gallery", &[]);
    assert!(
        !ran.ok && ran.stderr.contains("Usage: gallery"),
        "{}",
        ran.stderr
    );
    for name in ["digits", "gan", "kfold", "maml", "ppo"] {
        let ran = run("gallery", &[name, "--help"]);
        assert!(
            ran.ok && ran.stdout.contains("--strategy"),
            "{}",
            ran.stdout
        );
    }
}
