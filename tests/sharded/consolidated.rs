//! A folder becomes the one file, without ranks: the same bytes that a full save would have written. Method: save in both
//! forms, consolidate, compare; go on from the file under other rows; spoil folders, and look at what is said and left.

use std::{fs, path::Path, process::Output};

use fabric::{
    State,
    checkpoint::{consolidate, consolidate_with, inspect},
    optim::Sgd,
    vec::VecModel,
};
use half::bf16;
use safetensors::SafeTensors;
use serde_json::Value;

use super::{Real, builder, load_and_save, manifest, names, place, save, tensors};
use crate::{
    launching::{CLI, program},
    process::finish,
};

/// The command line's end, and everything it said.
fn cli(args: &[&str]) -> (Output, String) {
    finish(program(CLI, args).spawn().unwrap())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn becomes_the_file<T: Real>(precision: &str) {
    for (row, world) in [("fsdp", 3), ("zero1", 3), ("hsdp", 4)] {
        let (room, path) = place();
        let [file, full, again] = ["file", "full", "again"].map(|name| room.path().join(name));
        let bits = save::<T>(builder(row, world, precision, "sharded"), &path);
        save::<T>(builder(row, world, precision, "full"), &full);
        consolidate(&path, &file).unwrap();
        let bytes = fs::read(&file).unwrap();
        assert!(bytes == fs::read(&full).unwrap(), "{row}, {precision}");
        SafeTensors::deserialize(&bytes).unwrap();
        for (row, world) in [("single", 1), ("zero2", 2), ("ddp", 2)] {
            let loaded =
                load_and_save::<T>(builder(row, world, precision, "sharded"), &file, &again);
            assert_eq!(loaded, bits);
            assert!(tensors(&again) == tensors(&path), "the optimizer's too");
        }
        assert_eq!(names(room.path()), ["again", "file", "full", "last"]);
    }
}

// Line 46, IO-08, GAP-13, BUG-19, BUG-22
#[test]
fn line_46_a_consolidated_folder_is_the_file_that_a_full_save_writes() {
    becomes_the_file::<f32>("32-true");
    becomes_the_file::<bf16>("bf16-mixed");
}

// Line 46, IO-08, BUG-19: under the name that its owner gave it.
#[test]
fn large_tensors_stream_through_a_part_at_a_time() {
    let (room, path) = place();
    let values: Vec<f32> = (0..3_000_001).map(|i| i as f32).collect();
    let fabric = builder("fsdp", 2, "32-true", "sharded").build().unwrap();
    let saved = fabric.launch_threads(|fabric| {
        let model = VecModel::new([("w", values.clone())]);
        let (model, _) = fabric.setup(model, Sgd::new(0.1))?;
        fabric.save(&path, State::new().model("net", &model))
    });
    saved.unwrap();
    let file = room.path().join("file");
    let mut told = Vec::new();
    consolidate_with(&path, &file, &mut |done, total| told.push((done, total))).unwrap();
    assert_eq!(
        (told[0], told[told.len() - 1]),
        ((0, 12_000_004), (12_000_004, 12_000_004))
    );
    let steps = told.windows(2).map(|pair| pair[1].0 - pair[0].0);
    assert!(
        steps.into_iter().all(|bytes| bytes > 0 && bytes <= 4 << 20),
        "{told:?}"
    );
    let bytes = fs::read(&file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = file.tensor("net.w").unwrap().data().as_chunks::<4>().0;
    assert!(
        data.iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .eq(values)
    );
}

/// One case: what happens to a good checkpoint, and what the command line says then. Nothing new may be left.
fn refused(spoil: impl FnOnce(&Path, &Path), says: &[&str]) {
    let (room, path) = place();
    save::<f32>(builder("fsdp", 2, "32-true", "sharded"), &path);
    let file = room.path().join("file");
    spoil(&path, &file);
    let before = names(room.path());
    let (output, said) = cli(&["consolidate", text(&path), "--output-file", text(&file)]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for what in says {
        assert!(said.contains(what), "{what} is not in:\n{said}");
    }
    assert_eq!(names(room.path()), before);
}

// Line 15 and 46, CLI-02
#[test]
fn folders_that_cannot_be_consolidated_are_refused_in_words() {
    refused(
        |path, _| fs::remove_dir_all(path).unwrap(),
        &["there is no checkpoint", "fabric.save"],
    );
    refused(
        |path, _| {
            fs::remove_dir_all(path).unwrap();
            fs::write(path, b"a file").unwrap();
        },
        &["is a file, and not the folder", "fabric inspect"],
    );
    refused(
        |path, _| fs::remove_file(path.join("manifest.json")).unwrap(),
        &["is no checkpoint of this library", "manifest.json"],
    );
    refused(
        |_, file| fs::write(file, b"precious").unwrap(),
        &["exists already", "Choose another file"],
    );
    // Torn ones: a file is gone, cut off, another's; a piece is not listed.
    let part = |path: &Path| path.join("rank-00001.safetensors");
    refused(
        |path, _| fs::remove_file(part(path)).unwrap(),
        &["rank-00001.safetensors cannot be opened"],
    );
    refused(
        |path, _| {
            let bytes = fs::read(part(path)).unwrap();
            fs::write(part(path), &bytes[..bytes.len() - 3]).unwrap();
        },
        &["rank-00001.safetensors is damaged: it is cut off"],
    );
    refused(
        |path, _| {
            fs::copy(path.join("rank-00000.safetensors"), part(path)).unwrap();
        },
        &["rank-00001.safetensors has no '"],
    );
    refused(
        |path, _| {
            let mut json = manifest(path);
            let pieces = &mut json["tensors"]["model.block.0.weight"]["pieces"];
            pieces.as_array_mut().unwrap().remove(1);
            fs::write(path.join("manifest.json"), json.to_string()).unwrap();
        },
        &["is not whole", "are in no piece"],
    );
}

// Line 15, CLI-02: the default place, either spelling of the option, what is there already stays.
#[test]
fn the_command_line_names_the_file_after_the_folder() {
    let (room, path) = place();
    save::<f32>(builder("zero1", 3, "32-true", "sharded"), &path);
    let (output, said) = cli(&["consolidate", &format!("{}/", text(&path))]);
    assert!(output.status.success(), "{said}");
    let file = room.path().join("last.consolidated.safetensors");
    assert_eq!(said.trim(), text(&file));
    let (output, said) = cli(&["consolidate", text(&path)]);
    assert!(
        output.status.code() == Some(1) && said.contains("exists already"),
        "{said}"
    );
    for option in ["--output-file", "--output_file"] {
        let other = room.path().join("deeper").join(option);
        let (output, said) = cli(&["consolidate", text(&path), option, text(&other)]);
        assert!(output.status.success(), "{said}");
        assert_eq!(fs::read(&other).unwrap(), fs::read(&file).unwrap());
    }
    let (output, said) = cli(&["consolidate", "/"]);
    assert!(
        output.status.code() == Some(1) && said.contains("--output-file"),
        "{said}"
    );
}

// Issue 18881
#[test]
fn a_checkpoint_says_what_it_holds_and_who_wrote_it() {
    let (room, path) = place();
    save::<f32>(builder("fsdp", 2, "32-true", "sharded"), &path);
    let listing = inspect(&path).unwrap();
    assert_eq!(
        (listing.form, listing.world, listing.strategy.as_deref()),
        ("sharded", Some(2), Some("fsdp"))
    );
    assert_eq!(
        (&listing.values["step"], &listing.values["optimizer"]),
        (&Value::from(3), &Value::from(3))
    );
    let weight = listing
        .tensors
        .iter()
        .find(|tensor| tensor.name == "model.block.0.weight")
        .unwrap();
    assert_eq!(
        (weight.dtype.as_str(), weight.shape.as_slice(), weight.bytes),
        ("F32", &[36][..], 144)
    );
    let pieces = weight
        .pieces
        .iter()
        .map(|piece| (piece.rank, piece.elements));
    assert_eq!(
        pieces.collect::<Vec<_>>(),
        [(Some(0), [0, 15]), (Some(1), [15, 36])]
    );
    assert_eq!(
        listing.bytes,
        tensors(&path)
            .values()
            .map(|(_, _, data)| data.len() as u64)
            .sum::<u64>()
    );

    let file = room.path().join("file");
    consolidate(&path, &file).unwrap();
    let whole = inspect(&file).unwrap();
    assert_eq!(
        (whole.form, whole.world, whole.bytes),
        ("full", None, listing.bytes)
    );
    assert_eq!(whole.values, listing.values);
    assert!(whole.tensors.iter().all(|tensor| tensor.pieces.is_empty()));

    let (output, said) = cli(&["inspect", text(&path)]);
    assert!(output.status.success(), "{said}");
    for what in [
        "saved under fsdp by 2 ranks",
        "rank 0: 0..15, rank 1: 15..36",
        "step = 3",
    ] {
        assert!(said.contains(what), "{said}");
    }
    let (_, said) = cli(&["inspect", "--json", text(&file)]);
    let json: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        json["tensors"].as_array().unwrap().len(),
        listing.tensors.len()
    );
}

#[test]
fn what_is_torn_is_listed_with_what_is_wrong() {
    let (room, path) = place();
    save::<f32>(builder("fsdp", 2, "32-true", "sharded"), &path);
    fs::remove_file(path.join("rank-00001.safetensors")).unwrap();
    let (output, said) = cli(&["inspect", text(&path)]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("DAMAGED: 'model.") && said.contains("cannot be loaded"),
        "{said}"
    );

    // A file of another program is listed; something else is refused.
    let data = [0u8; 8];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2], &data);
    let foreign = room.path().join("foreign");
    let bytes = safetensors::serialize([("weight", view.unwrap())], None).unwrap();
    fs::write(&foreign, bytes).unwrap();
    let listing = inspect(&foreign).unwrap();
    assert_eq!((listing.form, listing.bytes), ("safetensors", 8));
    for (what, why) in [
        ("manifest.json", "no checkpoint"),
        ("missing", "cannot read"),
    ] {
        let error = inspect(path.join(what)).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}
