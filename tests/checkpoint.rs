//! Checkpoints: what is saved comes back to the bit, whole or not at all, on all ranks or on none. Method: ranks as
//! threads, a folder of their own, and bytes compared before and after.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use fabric::{
    Fabric, Result, State,
    optim::{AdamW, Optimizer, Sgd},
};
use fabric_tests::Problem;
use half::bf16;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tempfile::TempDir;

use crate::puppet::{Puppet, all_say, ddp, failures};

/// A folder, and the place of a checkpoint in it.
fn place() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last.safetensors");
    (folder, path)
}

/// The names of everything in `folder`.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| {
        let name = entry.unwrap().file_name();
        name.to_string_lossy().into_owned()
    };
    entries.map(name).collect()
}

/// Train from step `from` to step `to` of the small problem, starting from `load`, saving to `save`; parameters as bits.
fn train<O: Optimizer>(
    fabric: &Fabric,
    optimizer: O,
    steps: std::ops::Range<u64>,
    load: Option<&Path>,
    save: Option<&Path>,
) -> Result<Vec<u32>> {
    let problem = Problem::new(20);
    let (model, mut optimizer) = fabric.setup(problem.model(), optimizer)?;
    let mut step = steps.start;
    if let Some(path) = load {
        step = u64::MAX;
        let state = State::new()
            .model("model", &model)
            .optimizer("optimizer", &mut optimizer);
        fabric.load(path, state.value("step", &mut step))?;
        assert_eq!(step, steps.start);
    }
    while step < steps.end {
        let first = (step as usize * 2 + fabric.global_rank()) * 8;
        let (_, gradients) = problem.loss(&model, &(first..first + 8).collect::<Vec<_>>())?;
        fabric.backward(model.gradients(gradients))?;
        optimizer.step()?;
        optimizer.zero_grad();
        step += 1;
    }
    if let Some(path) = save {
        let state = State::new()
            .model("model", &model)
            .optimizer("optimizer", &mut optimizer);
        fabric.save(path, state.value("step", &mut step))?;
        assert!(path.exists(), "there on every rank's return");
    }
    let values = [model.read("weight"), model.read("bias")].concat();
    Ok(values.iter().map(|value| value.to_bits()).collect())
}

/// A run that is interrupted at step 4 and one that is not.
fn interrupted<O: Optimizer>(optimizer: impl Fn() -> O + Sync) {
    let (_folder, path) = place();
    let whole = ddp(2)
        .launch_threads(|fabric| train(fabric, optimizer(), 0..8, None, None))
        .unwrap();
    let half = ddp(2)
        .launch_threads(|fabric| train(fabric, optimizer(), 0..4, None, Some(&path)))
        .unwrap();
    let rest = ddp(2)
        .launch_threads(|fabric| train(fabric, optimizer(), 4..8, Some(&path), None))
        .unwrap();
    assert_eq!(rest, whole);
    assert_eq!(whole[0], whole[1]);
    assert_ne!(half, whole);
}

#[test]
fn training_goes_on_from_a_checkpoint_to_the_same_bits() {
    interrupted(|| {
        Sgd::new(0.01)
            .momentum(0.9)
            .nesterov(true)
            .weight_decay(0.1)
    });
    interrupted(|| AdamW::new(0.01).weight_decay(0.1));
    interrupted(|| Sgd::new(0.01));
}

#[derive(Debug, PartialEq, Clone, Serialize, Deserialize)]
struct Progress {
    epoch: u64,
    best: Option<f64>,
    history: Vec<f64>,
    single: Vec<f32>,
    names: HashMap<String, i32>,
}

impl Progress {
    fn new() -> Self {
        // Numbers whose decimal form is long: whoever reads it carelessly is one unit in the last place away.
        let history = (1..3000u64)
            .map(|n| f64::from_bits(0x3ff0_0000_0000_0000 | (n * 0x0003_9e37_79b9_7f4a) >> 12));
        let mut history = history.collect::<Vec<_>>();
        history.extend([
            -0.0,
            f64::MIN_POSITIVE,
            f64::MAX,
            5e-324,
            1e23,
            9007199254740993.0,
        ]);
        let single = history
            .iter()
            .map(|value| (value / 3.0) as f32)
            .filter(|value| value.is_finite());
        Self {
            epoch: u64::MAX,
            best: None,
            single: single.collect(),
            history,
            names: (0..20).map(|n| (format!("n{n}"), n)).collect(),
        }
    }

    fn bits(&self) -> (Vec<u64>, Vec<u32>) {
        let wide = self.history.iter().map(|value| value.to_bits());
        let single = self.single.iter().map(|value| value.to_bits());
        (wide.collect(), single.collect())
    }
}

#[test]
fn values_come_back_to_the_bit_and_what_was_not_asked_for_is_returned() {
    let (_folder, path) = place();
    ddp(2)
        .launch_threads(|fabric| {
            let (mut progress, mut note) = (Progress::new(), "a note".to_string());
            fabric.save(
                &path,
                State::new()
                    .value("progress", &mut progress)
                    .value("note", &mut note),
            )?;
            let mut found = Progress {
                history: vec![],
                single: vec![],
                ..Progress::new()
            };
            let rest = fabric.load(&path, State::new().value("progress", &mut found))?;
            assert_eq!(found, progress);
            assert_eq!(found.bits(), progress.bits());
            assert_eq!(rest, HashMap::from([("note".into(), "a note".into())]));
            Ok(())
        })
        .unwrap();
}

#[test]
fn parameters_of_every_type_come_back() {
    let (_folder, path) = place();
    let build = |seed: i64| {
        Puppet::new()
            .param("wide", &[seed as f64 / 3.0, f64::NAN])
            .param("small", &[bf16::from_f64(seed as f64 / 3.0)])
            .param("counts", &[i64::MIN + seed, 7])
            .frozen()
            .param("nothing", &[0f32; 0])
    };
    ddp(2)
        .launch_threads(|fabric| {
            let saved = fabric.setup_module(build(1))?;
            fabric.save(&path, State::new().model("model", &saved))?;
            let fresh = fabric.setup_module(build(2))?;
            assert_ne!(fresh.bytes(), saved.bytes());
            fabric.load(&path, State::new().model("model", &fresh))?;
            assert_eq!(fresh.bytes(), saved.bytes());
            Ok(())
        })
        .unwrap();
}

/// A saved model with one parameter "w" of 4, AdamW after one step, and a value `step` = 1.
fn saved(path: &Path) {
    let outcome = ddp(1).launch(|fabric| {
        let model = fabric::vec::VecModel::new([("w", vec![1f32; 4])]);
        let (model, mut optimizer) = fabric.setup(model, AdamW::new(0.1))?;
        fabric.backward(model.gradients(vec![Some(vec![1f32; 4])]))?;
        optimizer.step()?;
        let mut step = 1u64;
        let state = State::new()
            .model("model", &model)
            .optimizer("optimizer", &mut optimizer);
        fabric.save(path, state.value("step", &mut step))
    });
    outcome.unwrap();
}

#[test]
fn what_does_not_fit_is_refused_on_all_ranks_and_changes_nothing() {
    let (folder, path) = place();
    saved(&path);
    let garbage = folder.path().join("garbage");
    fs::write(
        &garbage,
        b"not a checkpoint at all, but long enough to look like one",
    )
    .unwrap();
    let cut = folder.path().join("cut");
    let bytes = fs::read(&path).unwrap();
    fs::write(&cut, &bytes[..bytes.len() - 3]).unwrap();
    // What is asked for, and what must be said. The first name is the model's, the second the optimizer's.
    struct Case<'a> {
        path: &'a Path,
        model: (&'a str, &'a str, usize),
        optimizer: &'a str,
        value: &'a str,
        says: &'a [&'a str],
    }
    let fits = Case {
        path: &path,
        model: ("model", "w", 4),
        optimizer: "optimizer",
        value: "step",
        says: &[],
    };
    let absent = folder.path().join("absent");
    let cases = [
        Case {
            path: &absent,
            says: &["cannot read the checkpoint", "absent"],
            ..fits
        },
        Case {
            path: &garbage,
            says: &["garbage is no checkpoint of this library"],
            ..fits
        },
        Case {
            path: &cut,
            says: &["cut is no checkpoint of this library"],
            ..fits
        },
        Case {
            model: ("model", "w", 5),
            says: &["'model.w' was saved as F32 [4], the model has F32 [5]"],
            ..fits
        },
        Case {
            model: ("model", "v", 4),
            says: &["the checkpoint holds no 'model.v'"],
            ..fits
        },
        Case {
            model: ("other", "w", 4),
            says: &["the checkpoint holds no 'other.w'"],
            ..fits
        },
        Case {
            optimizer: "adam",
            says: &["the checkpoint holds no 'adam'"],
            ..fits
        },
        Case {
            value: "epoch",
            says: &["the checkpoint holds no 'epoch'"],
            ..fits
        },
    ];
    for case in cases {
        let said = failures(2, |fabric| {
            let (name, param, numel) = case.model;
            let model = fabric::vec::VecModel::new([(param, vec![0f32; numel])]);
            let (model, mut optimizer) = fabric.setup(model, AdamW::new(0.1))?;
            let mut step = 77u64;
            let state = State::new()
                .model(name, &model)
                .optimizer(case.optimizer, &mut optimizer);
            let result = fabric.load(case.path, state.value(case.value, &mut step));
            assert_eq!(
                (model.read(param), step),
                (vec![0f32; numel], 77),
                "nothing changed"
            );
            result
        });
        all_say(&said, case.says);
    }
}

#[test]
fn a_value_or_an_optimizer_that_does_not_fit_leaves_the_model_alone() {
    let (_folder, path) = place();
    saved(&path);
    let said = failures(2, |fabric| {
        let model = fabric.setup_module(fabric::vec::VecModel::new([("w", vec![0f32; 4])]))?;
        let mut step = vec!["not a number".to_string()];
        let result = fabric.load(
            &path,
            State::new().model("model", &model).value("step", &mut step),
        );
        assert_eq!(model.read("w"), [0.0; 4]);
        assert_eq!(step, ["not a number"]);
        result
    });
    all_say(&said, &["the saved value 'step' has another type"]);
    let said = failures(2, |fabric| {
        let model = fabric::vec::VecModel::new([("w", vec![0f32; 4])]);
        let (model, mut optimizer) = fabric.setup(model, Sgd::new(0.1).momentum(0.5))?;
        let state = State::new().model("model", &model);
        let result = fabric.load(&path, state.optimizer("optimizer", &mut optimizer));
        assert_eq!(model.read("w"), [0.0; 4]);
        result
    });
    all_say(
        &said,
        &[
            "which this optimizer does not know",
            "the same kind of optimizer",
        ],
    );
    let said = failures(2, |fabric| {
        let model = fabric::vec::VecModel::new([("w", vec![0f64; 4])]);
        let (_model, mut optimizer) = fabric.setup(model, AdamW::new(0.1))?;
        fabric.load(&path, State::new().optimizer("optimizer", &mut optimizer))
    });
    all_say(&said, &["of 'w' is 4 x f32, this model needs 4 x f64"]);
}

#[test]
fn a_file_that_one_rank_cannot_read_is_loaded_by_none() {
    let (folder, path) = place();
    saved(&path);
    let elsewhere = folder.path().join("elsewhere");
    let said = failures(3, |fabric| {
        let model = fabric.setup_module(fabric::vec::VecModel::new([("w", vec![0f32; 4])]))?;
        let path = if fabric.global_rank() == 1 {
            &elsewhere
        } else {
            &path
        };
        let result = fabric.load(path, State::new().model("model", &model));
        assert_eq!(model.read("w"), [0.0; 4]);
        result
    });
    all_say(&said, &["cannot read the checkpoint"]);
    all_say(
        &[said[0].clone(), said[2].clone()],
        &["rank 1 could not load"],
    );
}

#[test]
fn a_save_that_fails_is_an_error_on_all_ranks_and_leaves_the_old_file() {
    let (folder, path) = place();
    saved(&path);
    let old = fs::read(&path).unwrap();
    let taken = folder.path().join("taken");
    fs::create_dir_all(taken.join("inside")).unwrap();
    let rights = "Check the folder's rights";
    for (bad, hint) in [
        (path.join("below a file"), rights),
        (taken.clone(), "something that is no whole checkpoint"),
        (PathBuf::from("/proc/nobody/x.safetensors"), rights),
    ] {
        let said = failures(2, |fabric| {
            let mut step = 5u64;
            fabric.save(&bad, State::new().value("step", &mut step))
        });
        all_say(&said, &["cannot write the checkpoint", hint]);
        all_say(&said[1..], &["rank 0 could not save"]);
    }
    let mut left = names(folder.path());
    left.sort();
    assert_eq!(left, ["last.safetensors", "taken"]);
    assert_eq!(fs::read(&path).unwrap(), old);
}

#[test]
fn line_48_a_save_that_is_refused_in_the_middle_leaves_the_old_file_and_no_other() {
    let (folder, path) = place();
    saved(&path);
    let old = fs::read(&path).unwrap();
    let said = failures(2, |fabric| {
        let model = fabric.setup_module(fabric::vec::VecModel::new([("w", vec![9f32; 4])]))?;
        let mut loss = f64::NAN;
        fabric.save(
            &path,
            State::new().model("model", &model).value("loss", &mut loss),
        )
    });
    all_say(&said, &["the value 'loss' cannot be"]);
    assert_eq!(fs::read(&path).unwrap(), old);
    assert_eq!(names(folder.path()), ["last.safetensors"]);
}

#[test]
fn a_save_replaces_the_file_and_leaves_no_other() {
    let (folder, path) = place();
    saved(&path);
    ddp(2)
        .launch_threads(|fabric| {
            for step in 0..3u64 {
                let mut step = step;
                fabric.save(&path, State::new().value("step", &mut step))?;
                let mut found = 9u64;
                fabric.load(&path, State::new().value("step", &mut found))?;
                assert_eq!(found, step);
                fabric.barrier()?; // else rank 0 replaces what another rank reads
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(names(folder.path()), ["last.safetensors"]);
}

#[test]
fn others_may_read_a_checkpoint_as_any_other_file() {
    let (folder, path) = place();
    saved(&path);
    let plain = folder.path().join("plain");
    fs::write(&plain, b"").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions();
    assert_eq!(mode(&path), mode(&plain));
}

#[test]
fn values_that_would_come_back_changed_are_refused() {
    let (_folder, path) = place();
    #[derive(Serialize, Deserialize)]
    struct Pair(u32, f64);
    fn refused<T: Serialize + DeserializeOwned>(path: &Path, value: impl Fn() -> T + Sync) {
        let said = failures(2, |fabric| {
            fabric.save(path, State::new().value("odd", &mut value()))
        });
        all_say(&said, &["the value 'odd' cannot be"]);
    }
    refused(&path, || f64::INFINITY);
    refused(&path, || Some(f32::NAN));
    refused(&path, || Some(f64::NEG_INFINITY));
    refused(&path, || vec![Some(Pair(1, f64::NAN))]);
    refused(&path, || HashMap::from([((1, 2), 3)]));
    refused(&path, || u128::MAX);
    assert!(!path.exists());
}

#[test]
fn names_that_collide_are_refused() {
    let (_folder, path) = place();
    let said = failures(2, |fabric| {
        let (mut one, mut two) = (1u8, 2u8);
        fabric.save(
            &path,
            State::new().value("x", &mut one).value("x", &mut two),
        )
    });
    all_say(&said, &["two things in a checkpoint are called 'x'"]);
    let said = failures(2, |fabric| {
        let module = || fabric.setup_module(fabric::vec::VecModel::new([("b.w", vec![0f32])]));
        let (first, second) = (module()?, module()?);
        fabric.save(&path, State::new().model("a", &first).model("a.b", &second))
    });
    all_say(&said, &["'a' and 'a.b'"]);
    assert!(!path.exists());
}

#[test]
fn a_value_is_no_optimizer() {
    let (_folder, path) = place();
    let said = failures(2, |fabric| {
        let model = fabric::vec::VecModel::new([("w", vec![0f32; 4])]);
        let (_model, mut optimizer) = fabric.setup(model, Sgd::new(0.1))?;
        fabric.save(&path, State::new().value("x", &mut "text".to_string()))?;
        fabric.load(&path, State::new().optimizer("x", &mut optimizer))
    });
    all_say(&said, &["'x' in the checkpoint is no optimizer"]);
}
