//! What is refused, in which words, and what is left then: what was there before, on disks and in models.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use fabric::{
    Fabric, Result, State,
    engine::{Error as EngineError, Result as EngineResult, buffer::Buffer},
    model::{Events, Model, ParamId, ParamMeta},
    optim::{AdamW, Sgd},
    vec::VecModel,
};
use half::bf16;
use serde_json::{Value, json};

use super::{builder, manifest, names, place, save};
use crate::{
    blocks::{Real, model, read},
    puppet::{all_say, failures_of},
};

/// A checkpoint of the blocks, saved under fsdp on two ranks.
fn saved(path: &Path) {
    save::<f32>(builder("fsdp", 2, "32-true", "sharded"), path);
}

fn fsdp(precision: &str) -> Fabric {
    builder("fsdp", 3, precision, "sharded").build().unwrap()
}

/// What three ranks say when they load `path`. Their models must stay as they are.
fn refused<T: Real>(fabric: &Fabric, path: &Path) -> Vec<String> {
    failures_of(fabric, |fabric| {
        let (model, mut optimizer) = fabric.setup(model::<T>(), AdamW::new(0.1))?;
        let (before, mut step) = (read(&model)?, 77);
        let state = State::new()
            .model("model", &model)
            .optimizer("optimizer", &mut optimizer);
        let result = fabric.load(path, state.value("step", &mut step));
        assert_eq!((read(&model)?, step), (before, 77), "nothing changed");
        result
    })
}

/// Rewrite the manifest.
fn change(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json = manifest(path);
    change(&mut json);
    fs::write(path.join("manifest.json"), json.to_string()).unwrap();
}

/// One case: what happens to a good checkpoint, and what is said then.
fn spoilt(spoil: impl FnOnce(&Path), says: &[&str]) {
    let (_room, path) = place();
    saved(&path);
    spoil(&path);
    all_say(&refused::<f32>(&fsdp("32-true"), &path), says);
}

const WEIGHT: &str = "model.block.0.weight";

#[test]
fn line_52_a_folder_without_its_files_is_refused() {
    spoilt(
        |path| fs::remove_file(path.join("manifest.json")).unwrap(),
        &["is no checkpoint of this library", "manifest.json"],
    );
    spoilt(
        |path| fs::remove_file(path.join("rank-00001.safetensors")).unwrap(),
        &["'model.", "rank-00001.safetensors cannot be opened"],
    );
    spoilt(
        |path| {
            let file = path.join("rank-00001.safetensors");
            let bytes = fs::read(&file).unwrap();
            fs::write(&file, &bytes[..bytes.len() - 3]).unwrap();
        },
        &[
            "rank-00001.safetensors is damaged: it is cut off: '",
            "ends at byte",
        ],
    );
    spoilt(
        |path| fs::write(path.join("rank-00000.safetensors"), b"{}").unwrap(),
        &["rank-00000.safetensors is damaged", "too few"],
    );
    spoilt(
        |path| {
            let name = |rank: usize| path.join(format!("rank-0000{rank}.safetensors"));
            fs::copy(name(0), name(1)).unwrap();
        },
        &["'model.", "rank-00001.safetensors has no '"],
    );
}

#[test]
fn a_manifest_that_does_not_make_sense_is_refused() {
    spoilt(
        |path| fs::write(path.join("manifest.json"), b"{").unwrap(),
        &["manifest.json is no manifest of this library"],
    );
    spoilt(
        |path| change(path, |json| json["format"] = "other".into()),
        &["its format is \"other\""],
    );
    spoilt(
        |path| change(path, |json| json["version"] = 2.into()),
        &["has version 2 of the format", "reads version 1"],
    );
    let pieces = |json: &mut Value, change: &dyn Fn(&mut Vec<Value>)| {
        change(json["tensors"][WEIGHT]["pieces"].as_array_mut().unwrap());
    };
    spoilt(
        |path| change(path, |json| pieces(json, &|pieces| drop(pieces.remove(1)))),
        &[WEIGHT, "is not whole", "elements 15..36 are in no piece"],
    );
    spoilt(
        |path| {
            change(path, |json| {
                pieces(json, &|pieces| pieces.push(pieces[1].clone()))
            })
        },
        &[WEIGHT, "is not whole", "elements 15..36 are in two pieces"],
    );
    spoilt(
        |path| {
            change(path, |json| {
                pieces(json, &|pieces| pieces[0]["file"] = "../x".into())
            })
        },
        &[WEIGHT, "'../x' is no name of a file"],
    );
    spoilt(
        |path| change(path, |json| json["tensors"][WEIGHT]["dtype"] = "F64".into()),
        &[
            WEIGHT,
            "was saved as F64 [36], the model has F32 [36]",
            "no value is rounded",
        ],
    );
    spoilt(
        |path| {
            change(path, |json| {
                json["tensors"][WEIGHT]["dtype"] = "BF16".into()
            })
        },
        &[WEIGHT, " x F32, and it should be "],
    );
    spoilt(
        |path| {
            change(path, |json| {
                json["tensors"][WEIGHT]["shape"] = json!([6, 6])
            })
        },
        &[WEIGHT, "was saved as F32 [6, 6], the model has F32 [36]"],
    );
    spoilt(
        |path| {
            change(path, |json| {
                json["tensors"].as_object_mut().unwrap().remove(WEIGHT);
            });
        },
        &["the checkpoint holds no 'model.block.0.weight'"],
    );
    spoilt(
        |path| change(path, |json| json["optimizers"] = json!({})),
        &["the checkpoint holds no 'optimizer'"],
    );
    spoilt(
        |path| change(path, |json| json["values"] = json!({})),
        &["the checkpoint holds no 'step'"],
    );
    spoilt(
        |path| {
            change(path, |json| {
                let tensors = json["tensors"].as_object_mut().unwrap();
                let moments = tensors.remove("optimizer.exp_avg.some").unwrap();
                tensors.insert("optimizer.exp_avg.another".into(), moments);
            });
        },
        &["'exp_avg.another', which belongs to no parameter"],
    );
}

#[test]
fn a_rounded_value_is_not_loaded() {
    let (_room, path) = place();
    saved(&path);
    let said = refused::<bf16>(&fsdp("bf16-true"), &path);
    all_say(&said, &["was saved as F32", "the model has BF16"]);
    assert!(
        said.iter().any(|text| text.contains("bf16-mixed")),
        "what would do"
    );
}

#[test]
fn another_optimizer_is_refused() {
    let (_room, path) = place();
    saved(&path);
    let said = failures_of(&fsdp("32-true"), |fabric| {
        let (_model, mut optimizer) = fabric.setup(model::<f32>(), Sgd::new(0.1).momentum(0.9))?;
        fabric.load(&path, State::new().optimizer("optimizer", &mut optimizer))
    });
    all_say(&said, &["which this optimizer does not know"]);
}

/// A model that refuses to be read when it is told to.
struct Stubborn {
    inner: VecModel,
    refuses: AtomicBool,
}

impl Stubborn {
    fn new() -> Self {
        let params = (0..4).map(|index| (format!("p{index}"), vec![index as f32; 6]));
        Self {
            inner: VecModel::new(params),
            refuses: AtomicBool::new(false),
        }
    }
}

impl Model for Stubborn {
    fn params(&self) -> &[ParamMeta] {
        self.inner.params()
    }
    fn with(
        &self,
        param: ParamId,
        f: &mut dyn FnMut(&mut dyn Buffer) -> EngineResult<()>,
    ) -> EngineResult<()> {
        match self.refuses.load(Ordering::Relaxed) {
            true => Err(EngineError::argument("I would rather not", "Ask again")),
            false => self.inner.with(param, f),
        }
    }
    fn attach(&self, events: Arc<dyn Events>) {
        self.inner.attach(events);
    }
}

/// Everything below a folder, by name.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |name: String| {
        let bytes = fs::read(folder.join(&name)).unwrap();
        (name, bytes)
    };
    names(folder).into_iter().map(read).collect()
}

#[test]
fn a_rank_that_cannot_write_leaves_the_old_checkpoint_and_nothing_else() {
    for form in ["sharded", "full"] {
        let (room, path) = place();
        saved(&path);
        let old = contents(&path);
        let fabric = builder("ddp", 3, "32-true", form).build().unwrap();
        let bad = match form {
            "sharded" => 1,
            _ => 0, // who writes
        };
        let said = failures_of(&fabric, |fabric| {
            let module = fabric.setup_module(Stubborn::new())?;
            let refuses = fabric.global_rank() == bad;
            module.refuses.store(refuses, Ordering::Relaxed);
            fabric.save(&path, State::new().model("model", &module))
        });
        all_say(&said, &["I would rather not"]);
        for (rank, text) in said.iter().enumerate().filter(|(rank, _)| *rank != bad) {
            let words = format!("rank {bad} could not save {}", path.display());
            assert!(text.contains(&words), "rank {rank}: {text}");
        }
        assert_eq!(contents(&path), old);
        assert_eq!(names(room.path()), ["last"]);
    }
}

#[test]
fn a_place_where_nothing_can_be_written_is_an_error_on_all_ranks() {
    let (room, path) = place();
    let (file, other) = (room.path().join("file"), room.path().join("other"));
    fs::write(&file, b"no folder").unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.tex"), b"of years").unwrap();
    fs::create_dir(&path).unwrap(); // an empty one is nobody's
    let fabric = || builder("zero1", 2, "32-true", "sharded").build().unwrap();
    for (bad, words) in [
        (file.join("last"), "Check the folder's rights"),
        (file.clone(), "something that is no whole checkpoint"),
        (other.clone(), "something that is no whole checkpoint"),
    ] {
        let said = failures_of(&fabric(), |fabric| {
            fabric.save(&bad, State::new().value("step", &mut 5))
        });
        all_say(&said, &["cannot write the checkpoint", words]);
        all_say(&said[1..], &["rank 0 could not save"]);
    }
    let saved =
        fabric().launch_threads(|fabric| fabric.save(&path, State::new().value("step", &mut 5)));
    saved.unwrap();
    assert_eq!(names(room.path()), ["file", "last", "other"]);
    assert_eq!(names(&other), ["thesis.tex"]);
}

#[test]
fn ranks_that_save_different_things_hear_of_it() {
    let (room, path) = place();
    let said = failures_of(&fsdp("32-true"), |fabric| {
        let model = fabric.setup_module(model::<f32>())?;
        let state = match fabric.global_rank() {
            2 => State::new(),
            _ => State::new().model("model", &model),
        };
        fabric.save(&path, state)
    });
    all_say(
        &said,
        &["rank 0 saves the model 'model', and rank 2 saves nothing"],
    );
    assert_eq!(names(room.path()), Vec::<String>::new());
}

#[test]
fn an_unknown_form_is_refused() {
    let outcome = Fabric::builder().state_dict_type("distributed").build();
    let said: Result<_> = outcome.map(drop);
    let said = said.unwrap_err().to_string();
    assert!(said.contains("Choose one of full, sharded"), "{said}");
}
