//! Lines 43, 44 and 47 of the list: parts of checkpoints, whatever has written them.

use std::path::Path;

use fabric::{
    Fabric, FabricModule, Result, State,
    optim::{Adam, Sgd},
    vec::VecModel,
};
use fabric_engine::buffer::Slab;

use crate::puppet::{all_say, failures};

const ROWS: [&str; 4] = ["ddp", "zero1", "fsdp", "hsdp"];

fn world(strategy: &str) -> Fabric {
    let mut builder = Fabric::builder().devices(2).strategy(strategy);
    if strategy == "hsdp" {
        builder = builder.group(1);
    }
    builder.build().unwrap()
}

fn model(first: f32) -> VecModel {
    let model = VecModel::new([
        ("base.w", vec![first; 5]),
        ("adapter.w", vec![first + 1.0; 3]),
    ]);
    model.in_units(["base", "adapter"]).unwrap()
}

/// The values of a model, whoever holds them.
fn values(fabric: &Fabric, module: &FabricModule<VecModel>) -> Result<Vec<Vec<f32>>> {
    let folder = tempfile::tempdir()?;
    let path = fabric.broadcast(folder.path().join("all"), 0)?;
    fabric.save(&path, State::new().model("m", module))?;
    let values = whole(&path, "m")?;
    fabric.barrier()?;
    Ok(values)
}

/// What a checkpoint holds of a model, read by one rank.
fn whole(path: &Path, name: &str) -> Result<Vec<Vec<f32>>> {
    let single = Fabric::builder().devices(1).build()?;
    let read = single.launch_threads(|single| {
        let module = single.setup_module(model(-1.0))?;
        single.load(path, State::new().model(name, &module).strict(false))?;
        Ok(vec![module.read("base.w"), module.read("adapter.w")])
    })?;
    Ok(read.concat())
}

// API-39, GAP-14: filters hold for sharded checkpoints too; what is filtered away is nowhere in them.
#[test]
fn line_44_a_filter_keeps_what_passes_of_any_form() {
    for strategy in ROWS {
        let folder = tempfile::tempdir().unwrap();
        let (part, none) = (folder.path().join("part"), folder.path().join("none"));
        let run = world(strategy).launch_threads(|fabric| {
            let (module, mut optimizer) = fabric.setup(model(3.0), Adam::new(0.1))?;
            let mut step = 7u64;
            let state = State::new().model("m", &module).value("step", &mut step);
            fabric.save(
                &part,
                state.filter("m", |name| name.starts_with("adapter.")),
            )?;
            let state = State::new()
                .model("m", &module)
                .optimizer("o", &mut optimizer);
            let state = state.filter("m", |_| false).filter("o", |_| false);
            fabric.save(&none, state)
        });
        run.unwrap();
        assert_eq!(whole(&part, "m").unwrap(), [vec![-1.0; 5], vec![4.0; 3]]);
        assert_eq!(whole(&none, "m").unwrap(), [vec![-1.0; 5], vec![0.0; 3]]);
        // Under another strategy, only what is meant is asked for.
        let run = world("fsdp").launch_threads(|fabric| {
            let module = fabric.setup_module(model(9.0))?;
            let adapter = |name: &str| name.starts_with("adapter.");
            let mut step = 0u64;
            let state = State::new().model("m", &module).value("step", &mut step);
            fabric.load(&part, state.filter("m", adapter))?;
            assert_eq!(step, 7);
            values(fabric, &module)
        });
        assert_eq!(run.unwrap()[0], [vec![9.0; 5], vec![4.0; 3]], "{strategy}");
    }
}

#[test]
fn line_44_a_filter_for_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let said = failures(2, |fabric| {
        let module = fabric.setup_module(model(1.0))?;
        let mut step = 1u64;
        let state = State::new().model("m", &module).value("step", &mut step);
        fabric.save(folder.path().join("x"), state.filter("step", |_| true))
    });
    all_say(&said, &["a filter for 'step'", "no model and no optimizer"]);
    assert!(!folder.path().join("x").exists());
}

// API-40, R-10: what is missing is an error that names it, unless that was allowed; the rest is returned.
#[test]
fn line_43_what_is_missing_is_named_or_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("part");
    let run = world("ddp").launch_threads(|fabric| {
        let module = fabric.setup_module(model(3.0))?;
        let (mut step, mut note) = (7u64, "a note".to_string());
        let state = State::new().model("m", &module).value("step", &mut step);
        let state = state.value("note", &mut note);
        fabric.save(&path, state.filter("m", |name| name == "base.w"))
    });
    run.unwrap();
    for missing in ["m.adapter.w", "o", "more"] {
        let said = failures(2, |fabric| {
            let (module, mut optimizer) = fabric.setup(model(0.0), Adam::new(0.1))?;
            let mut more = 0u64;
            let state = match missing {
                "o" => State::new().optimizer("o", &mut optimizer),
                "more" => State::new().value("more", &mut more),
                _ => State::new().model("m", &module),
            };
            fabric.load(&path, state).map(drop)
        });
        all_say(&said, &[&format!("'{missing}'")]);
    }
    for strategy in ROWS {
        let run = world(strategy).launch_threads(|fabric| {
            let (module, mut optimizer) = fabric.setup(model(0.0), Adam::new(0.1))?;
            let (mut step, mut more) = (0u64, 5u64);
            let state = State::new()
                .model("m", &module)
                .optimizer("o", &mut optimizer);
            let state = state.value("more", &mut more).value("step", &mut step);
            let rest = fabric.load(&path, state.strict(false))?;
            assert_eq!((step, more), (7, 5));
            assert_eq!(rest["note"], "a note");
            assert_eq!(rest.len(), 1);
            values(fabric, &module)
        });
        assert_eq!(run.unwrap()[1], [vec![3.0; 5], vec![1.0; 3]], "{strategy}");
    }
}

/// A file as other programs write them: tensors by the parameters' names, no word of Fabric.
fn bare(path: &Path) {
    let (base, more) = (Slab::from_slice(&[2f32; 5]), Slab::from_slice(&[8f32; 1]));
    let view = |slab: &'static Slab| {
        let shape = vec![slab.numel()];
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, slab.as_bytes())
    };
    let tensors = [("base.w", base), ("head.w", more)];
    let tensors = tensors.map(|(name, slab)| (name, view(Box::leak(Box::new(slab))).unwrap()));
    safetensors::serialize_to_file(tensors, None, path).unwrap();
}

// API-41: a published file into a model, under every strategy.
#[test]
fn line_43_a_bare_file_of_tensors_is_loaded_into_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("published.safetensors");
    bare(&path);
    for strategy in ROWS {
        let run = world(strategy).launch_threads(|fabric| {
            let (module, _) = fabric.setup(model(0.0), Sgd::new(0.1))?;
            let left = fabric.load_raw(&path, &module, false)?;
            assert_eq!(left, ["head.w"]);
            values(fabric, &module)
        });
        assert_eq!(run.unwrap()[0], [vec![2.0; 5], vec![1.0; 3]], "{strategy}");
    }
    let said = failures(2, |fabric| {
        let module = fabric.setup_module(model(0.0))?;
        fabric.load_raw(&path, &module, true)
    });
    all_say(&said, &["'adapter.w'"]);
}

// Line 47: what is no such file is refused, with the way out.
#[test]
fn line_47_a_file_is_loaded_as_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("published.safetensors");
    bare(&path);
    let said = failures(2, |fabric| {
        let module = fabric.setup_module(model(0.0))?;
        fabric
            .load(&path, State::new().model("m", &module))
            .map(drop)
    });
    all_say(&said, &["no checkpoint of this library", "load_raw"]);
    let text = folder.path().join("text");
    std::fs::write(&text, "not a tensor in sight").unwrap();
    for (path, words) in [
        (&text, "no safetensors file"),
        (&folder.path().join("nothing"), "cannot read"),
        (&folder.path().to_path_buf(), "no safetensors file"),
    ] {
        let said = failures(2, |fabric| {
            let module = fabric.setup_module(model(0.0))?;
            fabric.load_raw(path, &module, true)
        });
        all_say(&said, &[words]);
    }
}
