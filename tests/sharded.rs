//! Checkpoints know nothing of who wrote them: what one strategy has saved in one world, any other goes on from, to the
//! bit. Method: folders are put together again by a reader of the test's own, and compared with the one file, byte by byte.

mod consolidated;
mod refusals;
mod thrift;

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use fabric::{
    Builder, Clip, Fabric, FabricModule, FabricOptimizer, Result, State,
    engine::shard::plan::{Options, Reshard},
    optim::AdamW,
    vec::VecModel,
};
use half::bf16;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::blocks::{Real, backward, chain, model, read, uses_extra};

/// Every row, and a world for it.
const ROWS: [(&str, usize); 7] = [
    ("single", 1),
    ("ddp", 3),
    ("zero1", 3),
    ("zero2", 2),
    ("fsdp", 3),
    ("fsdp", 2),
    ("hsdp", 4),
];

fn builder(strategy: &str, world: usize, precision: &str, form: &str) -> Builder {
    let options = Options {
        bucket_bytes: 120,
        first_bucket_bytes: 60,
        ..Options::default()
    };
    let builder = Fabric::builder().devices(world).strategy(strategy);
    let builder = builder.precision(precision).buckets(options);
    let builder = builder.state_dict_type(form);
    match strategy {
        "hsdp" => builder.group(2),
        _ => builder,
    }
}

/// A folder, and the place of a checkpoint in it.
fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last");
    (folder, path)
}

/// The names of everything in `folder`, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| {
        let name = entry.unwrap().file_name();
        name.to_string_lossy().into_owned()
    };
    let mut names: Vec<_> = entries.map(name).collect();
    names.sort();
    names
}

/// A checkpoint's tensors by name: type, shape and bytes.
type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

/// The tensors of one file.
fn in_file(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
        let tensor = (
            format!("{:?}", view.dtype()),
            view.shape().to_vec(),
            view.data().to_vec(),
        );
        (name.to_string(), tensor)
    };
    file.iter().map(tensor).collect()
}

fn manifest(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap()).unwrap()
}

fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

/// The tensors of a folder: every byte of every file must belong to one tensor, and every element must be there once.
fn in_folder(folder: &Path) -> Tensors {
    let mut files = BTreeMap::new();
    for name in names(folder) {
        if name != "manifest.json" {
            let tensors = in_file(&folder.join(&name));
            files.insert(name, tensors);
        }
    }
    let manifest = manifest(folder);
    assert_eq!(files.len(), size(&manifest["world"]), "a file a rank");
    let mut tensors = Tensors::new();
    for (name, tensor) in manifest["tensors"].as_object().unwrap() {
        let shape: Vec<_> = tensor["shape"]
            .as_array()
            .unwrap()
            .iter()
            .map(size)
            .collect();
        let numel = shape.iter().product::<usize>();
        let mut pieces = Vec::new();
        for piece in tensor["pieces"].as_array().unwrap() {
            let file = files.get_mut(piece["file"].as_str().unwrap()).unwrap();
            let found = file.remove(piece["key"].as_str().unwrap());
            let (dtype, shape, bytes) = found.expect("a piece is named once");
            assert_eq!(tensor["dtype"], dtype);
            let range = size(&piece["range"][0])..size(&piece["range"][1]);
            assert_eq!(shape.iter().product::<usize>(), range.len());
            pieces.push((range, bytes));
        }
        pieces.sort_by_key(|(range, _)| range.start);
        let mut next = 0;
        for (range, _) in &pieces {
            assert_eq!(range.start, next, "{name}");
            next = range.end;
        }
        assert_eq!(next, numel, "{name}");
        let bytes = pieces.into_iter().flat_map(|(_, bytes)| bytes).collect();
        let dtype = tensor["dtype"].as_str().unwrap().to_string();
        tensors.insert(name.clone(), (dtype, shape, bytes));
    }
    let left: Vec<_> = files.values().flat_map(|file| file.keys()).collect();
    assert_eq!(left, Vec::<&String>::new(), "in no tensor");
    tensors
}

fn tensors(path: &Path) -> Tensors {
    match path.is_dir() {
        true => in_folder(path),
        false => in_file(path),
    }
}

/// A model and its optimizer, set up.
struct Job<'a, T: Real> {
    fabric: &'a Fabric,
    model: FabricModule<VecModel<T>>,
    optimizer: FabricOptimizer<AdamW>,
}

impl<'a, T: Real> Job<'a, T> {
    fn new(fabric: &'a Fabric) -> Result<Self> {
        // One that is frozen, in a unit.
        let model = model::<T>().freeze("block.1.bias");
        let (model, optimizer) = fabric.setup(model, AdamW::new(0.02).weight_decay(0.1))?;
        Ok(Self {
            fabric,
            model,
            optimizer,
        })
    }

    fn train(&mut self, steps: Range<usize>) -> Result<()> {
        let rank = self.fabric.global_rank();
        let chain = chain(&self.model, uses_extra(rank));
        for step in steps {
            backward(self.fabric, &self.model, &chain, rank, step, 0)?;
            self.fabric.clip_gradients(&self.model, Clip::norm(0.5))?;
            self.optimizer.step()?;
            self.optimizer.zero_grad();
        }
        Ok(())
    }

    fn state<'b>(&'b mut self, step: &'b mut usize) -> State<'b> {
        let state = State::new().model("model", &self.model);
        let state = state.optimizer("optimizer", &mut self.optimizer);
        state.value("step", step)
    }

    fn save(&mut self, path: &Path) -> Result<()> {
        let fabric = self.fabric;
        fabric.save(path, self.state(&mut 3))
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let (fabric, mut step) = (self.fabric, 0);
        let rest = fabric.load(path, self.state(&mut step))?;
        assert_eq!((step, rest.len()), (3, 0));
        Ok(())
    }
}

/// Train three steps and save; the parameters' bits.
fn save<T: Real>(builder: Builder, path: &Path) -> Vec<u32> {
    let ranks = builder.build().unwrap().launch_threads(|fabric| {
        let mut job = Job::<T>::new(fabric)?;
        job.train(0..3)?;
        job.save(path)?;
        read(&job.model)
    });
    ranks.unwrap().remove(0)
}

/// Load into a model that has trained otherwise, so that gathers are under way and stale, and save again; the parameters'
/// bits.
fn load_and_save<T: Real>(builder: Builder, from: &Path, into: &Path) -> Vec<u32> {
    let ranks = builder.build().unwrap().launch_threads(|fabric| {
        let mut job = Job::<T>::new(fabric)?;
        job.train(5..7)?;
        read(&job.model)?;
        job.load(from)?;
        let bits = read(&job.model)?;
        job.save(into)?;
        Ok(bits)
    });
    let ranks = ranks.unwrap();
    assert!(ranks.iter().all(|rank| *rank == ranks[0]), "ranks agree");
    ranks.into_iter().next().unwrap()
}

fn a_folder_is_the_file<T: Real>(precision: &str, dtype: &str) {
    for (row, world) in ROWS {
        let (room, path) = place();
        let file = room.path().join("file");
        let bits = save::<T>(builder(row, world, precision, "sharded"), &path);
        assert_eq!(
            save::<T>(builder(row, world, precision, "full"), &file),
            bits
        );
        let (sharded, full) = (tensors(&path), tensors(&file));
        assert!(sharded == full, "{row} on {world} ranks, {precision}");
        assert_eq!(full["model.block.0.weight"].0, dtype);
        assert_eq!(full["optimizer.exp_avg.block.0.weight"].0, "F32");
        let frozen = &full["model.block.1.bias"];
        assert_eq!(frozen.1, [6], "frozen parameters are saved too");
        let manifest = manifest(&path);
        assert_eq!(manifest["version"], 1);
        assert_eq!(manifest["strategy"], row);
        assert_eq!(manifest["values"]["step"], 3);
        assert_eq!(manifest["optimizers"]["optimizer"], 3);
        assert_eq!(names(room.path()), ["file", "last"]);
    }
}

#[test]
fn a_folder_holds_every_element_once_and_the_same_as_the_file() {
    a_folder_is_the_file::<f32>("32-true", "F32");
}

#[test]
fn the_main_values_are_saved_and_not_the_models_copies() {
    a_folder_is_the_file::<bf16>("bf16-mixed", "F32");
    a_folder_is_the_file::<bf16>("bf16-true", "BF16");
}

#[test]
fn ranks_that_hold_the_same_share_the_writing() {
    for (row, world) in [("ddp", 3), ("zero1", 3), ("zero2", 2), ("fsdp", 3)] {
        let (_room, path) = place();
        save::<f32>(builder(row, world, "32-true", "sharded"), &path);
        let bytes = (0..world).map(|rank| {
            let tensors = in_file(&path.join(format!("rank-{rank:05}.safetensors")));
            tensors.values().map(|(_, _, data)| data.len()).sum()
        });
        let bytes: Vec<usize> = bytes.collect();
        let (least, most) = (bytes.iter().min().unwrap(), bytes.iter().max().unwrap());
        assert!(most - least <= 6 * 6 * 4, "{row}: {bytes:?}");
    }
}

fn from_world_to_world<T: Real>(precision: &str) {
    for form in ["sharded", "full"] {
        let (room, path) = place();
        let bits = save::<T>(builder("fsdp", 2, precision, form), &path);
        let saved = tensors(&path);
        let mut last = path.clone();
        let mut trip = vec![("ddp", 1), ("fsdp", 3), ("zero1", 2)];
        trip.extend(ROWS);
        for (at, (row, world)) in trip.into_iter().enumerate() {
            // In turns, so that each form is read under each row.
            let form = ["sharded", "full"][at % 2];
            let next = room.path().join(format!("{at}"));
            let builder = builder(row, world, precision, form);
            let loaded = load_and_save::<T>(builder, &last, &next);
            assert_eq!(loaded, bits, "{row} on {world} ranks, {precision}");
            assert!(
                tensors(&next) == saved,
                "{row} on {world} ranks, {precision}"
            );
            last = next;
        }
    }
}

#[test]
fn what_one_world_has_saved_every_other_has_loaded() {
    from_world_to_world::<f32>("32-true");
}

#[test]
fn main_values_travel_from_world_to_world() {
    from_world_to_world::<bf16>("bf16-mixed");
}

fn goes_on<T: Real>(build: impl Fn() -> Builder, what: &str) {
    let (_room, path) = place();
    let run = |body: &(dyn Fn(&mut Job<'_, T>) -> Result<()> + Sync)| {
        let ranks = build().build().unwrap().launch_threads(|fabric| {
            let mut job = Job::<T>::new(fabric)?;
            body(&mut job)?;
            read(&job.model)
        });
        ranks.unwrap()
    };
    let whole = run(&|job| job.train(0..6));
    run(&|job| {
        job.train(0..3)?;
        job.save(&path)
    });
    let rest = run(&|job| {
        job.train(8..9)?;
        job.load(&path)?;
        job.train(3..6)
    });
    assert_eq!(rest, whole, "{what}");
}

#[test]
fn line_45_training_goes_on_to_the_bits_of_a_run_that_never_stopped() {
    for (row, world) in ROWS {
        for form in ["sharded", "full"] {
            let what = format!("{row} on {world} ranks, {form}");
            goes_on::<f32>(|| builder(row, world, "32-true", form), &what);
            goes_on::<bf16>(|| builder(row, world, "bf16-mixed", form), &what);
        }
    }
}

#[test]
fn every_way_of_sharding_parameters_is_saved() {
    for reshard_after_forward in [Reshard::No, Reshard::Within(2)] {
        for replicate_below in [0, 7] {
            let options = Options {
                reshard_after_forward,
                replicate_below,
                prefetch: 2,
                ..Options::default()
            };
            let build = || builder("fsdp", 4, "bf16-mixed", "sharded").buckets(options.clone());
            goes_on::<bf16>(build, &format!("{options:?}"));
        }
    }
}

#[test]
fn a_smaller_float_is_loaded_into_a_wider_one_as_it_is() {
    let (room, path) = place();
    save::<bf16>(builder("fsdp", 2, "bf16-true", "sharded"), &path);
    let wide = room.path().join("wide");
    load_and_save::<bf16>(builder("zero2", 2, "bf16-mixed", "full"), &path, &wide);
    let (small, wide) = (tensors(&path), tensors(&wide));
    let values = |tensor: &(String, Vec<usize>, Vec<u8>)| -> Vec<f32> {
        let bytes = tensor.2.chunks(if tensor.0 == "BF16" { 2 } else { 4 });
        bytes
            .map(|bytes| match bytes {
                [a, b] => bf16::from_le_bytes([*a, *b]).to_f32(),
                [a, b, c, d] => f32::from_le_bytes([*a, *b, *c, *d]),
                _ => unreachable!(),
            })
            .collect()
    };
    let key = "model.block.2.weight";
    assert_eq!((&*small[key].0, &*wide[key].0), ("BF16", "F32"));
    assert_eq!(values(&small[key]), values(&wide[key]));
}

#[test]
fn several_models_are_in_one_checkpoint() {
    let (_room, path) = place();
    let job = |strategy: &str, world: usize, loads: bool| {
        let builder = builder(strategy, world, "32-true", "sharded");
        let ranks = builder.build().unwrap().launch_threads(|fabric| {
            let mut first = Job::<f32>::new(fabric)?;
            let second = VecModel::new([("w", vec![0f32; 5]), ("none", vec![])]);
            let (second, mut optimizer) = fabric.setup(second, AdamW::new(0.1))?;
            if !loads {
                first.train(0..3)?;
                fabric.backward(second.gradients(vec![Some(vec![1.0; 5]), None]))?;
                optimizer.step()?;
            }
            let mut step = 3;
            let state = first.state(&mut step).model("second", &second);
            let state = state.optimizer("its optimizer", &mut optimizer);
            match loads {
                true => drop(fabric.load(&path, state)?),
                false => fabric.save(&path, state)?,
            }
            Ok((read(&first.model)?, second.read("w")))
        });
        ranks.unwrap().remove(0)
    };
    let saved = job("zero2", 3, false);
    assert!(in_folder(&path).contains_key("its optimizer.exp_avg.w"));
    assert_eq!(job("fsdp", 2, true), saved);
    assert_eq!(job("ddp", 1, true), saved);
}

#[test]
fn a_save_replaces_a_checkpoint_of_either_form_whole() {
    let (room, path) = place();
    for (row, world, form) in [
        ("fsdp", 3, "sharded"),
        ("fsdp", 2, "sharded"),
        ("ddp", 2, "full"),
        ("zero1", 2, "full"),
        ("zero1", 2, "sharded"),
    ] {
        let bits = save::<f32>(builder(row, world, "32-true", form), &path);
        assert_eq!(names(room.path()), ["last"], "{row}, {form}");
        assert_eq!(path.is_dir(), form == "sharded");
        tensors(&path); // a file a rank, and no rank's file of before
        let again = room.path().join("again");
        let loaded = load_and_save::<f32>(builder("single", 1, "32-true", "full"), &path, &again);
        assert_eq!(loaded, bits);
        fs::remove_file(again).unwrap();
    }
}

#[test]
fn a_file_of_the_first_version_is_loaded() {
    let (room, path) = place();
    let new = room.path().join("new");
    let bits = save::<f32>(builder("ddp", 1, "32-true", "full"), &new);
    // As the library of that version wrote it: all tensors at once, by safetensors' own writer.
    let bytes = fs::read(&new).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let metadata = header.metadata().clone();
    safetensors::serialize_to_file(file.tensors(), metadata, &path).unwrap();
    assert_eq!(fs::read(&path).unwrap().len(), bytes.len());
    for (row, world) in ROWS {
        let again = room.path().join("again");
        let builder = builder(row, world, "32-true", "full");
        assert_eq!(load_and_save::<f32>(builder, &path, &again), bits);
    }
}
