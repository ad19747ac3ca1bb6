//! The file of a checkpoint: safetensors with every tensor, and every other value as JSON in its metadata. It is written
//! beside its place, synced and renamed, so that it is there whole or not at all.

use std::{
    borrow::Cow,
    collections::{HashMap, VecDeque},
    fs, io,
    os::unix::fs::PermissionsExt,
    path::Path,
};

use fabric_engine::{
    buffer::Slab,
    kernels::{self, Dtype},
    shard::ParamId,
};
use safetensors::{
    SafeTensors,
    tensor::{Dtype as TensorDtype, TensorView, View},
};
use serde_json::Value;

use super::{Entry, State};
use crate::{
    error::{Error, Result},
    model::Core,
    optim::OptimizerState,
};

const VALUES: &str = "fabric"; // the metadata key under which the values are

/// A tensor on its way into a file.
struct Tensor {
    slab: Slab,
    shape: Vec<usize>,
    dtype: TensorDtype,
}

impl View for &Tensor {
    fn dtype(&self) -> TensorDtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.slab.as_bytes().into()
    }
    fn data_len(&self) -> usize {
        self.slab.bytes()
    }
}

/// `states`: the optimizers', in the order of the entries.
pub(super) fn write(
    path: &Path,
    state: &State<'_>,
    mut states: VecDeque<OptimizerState>,
) -> Result<()> {
    state.check_names()?;
    let (mut tensors, mut values) = (Vec::new(), serde_json::Map::new());
    for (name, entry) in &state.0 {
        match entry {
            Entry::Model(core) => model_tensors(name, core, &mut tensors)?,
            Entry::Optimizer(_) => {
                let OptimizerState {
                    steps,
                    tensors: states,
                } = states.pop_front().expect("a state for each optimizer");
                values.insert(name.clone(), steps.into());
                for (kind, slab) in states {
                    let (shape, dtype) = (vec![slab.numel()], tensor_dtype(slab.dtype())?);
                    tensors.push((format!("{name}.{kind}"), Tensor { slab, shape, dtype }));
                }
            }
            Entry::Value(value) => {
                values.insert(name.clone(), value.to_json(name)?);
            }
        }
    }
    let metadata = HashMap::from([(VALUES.to_string(), Value::Object(values).to_string())]);
    let views = tensors.iter().map(|(name, tensor)| (name, tensor));
    replace(path, |temporary| {
        safetensors::serialize_to_file(views, Some(metadata), temporary).map_err(io::Error::other)
    })
}

fn model_tensors(name: &str, core: &Core, tensors: &mut Vec<(String, Tensor)>) -> Result<()> {
    for (index, param) in core.model.params().iter().enumerate() {
        let mut slab = Slab::zeroed(param.dtype, param.numel());
        core.model.with(ParamId(index), &mut |buffer| {
            buffer.read(0..param.numel(), slab.part_mut(0..param.numel()))
        })?;
        let (shape, dtype) = (param.shape.clone(), tensor_dtype(param.dtype)?);
        tensors.push((
            format!("{name}.{}", param.name),
            Tensor { slab, shape, dtype },
        ));
    }
    Ok(())
}

/// Write a file beside `path`, sync it, and rename it over `path`.
fn replace(path: &Path, fill: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let failed = |error: io::Error| {
        Error::argument(
            format!("cannot write the checkpoint {}: {error}", path.display()),
            "Check the folder's rights and the space on its disk",
        )
    };
    fs::create_dir_all(folder).map_err(failed)?;
    let temporary = tempfile::Builder::new()
        .prefix(".fabric-")
        .permissions(fs::Permissions::from_mode(0o666)) // less the umask
        .tempfile_in(folder)
        .map_err(failed)?;
    let mode = temporary
        .as_file()
        .metadata()
        .map_err(failed)?
        .permissions();
    fill(temporary.path()).map_err(failed)?;
    // The writer may have put a private file of its own in place of ours; others may read this one as any other file.
    fs::set_permissions(temporary.path(), mode).map_err(failed)?;
    fs::File::open(temporary.path())
        .and_then(|file| file.sync_all())
        .map_err(failed)?;
    temporary
        .persist(path)
        .map_err(|error| failed(error.error))?;
    fs::File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed)
}

/// A checkpoint in memory.
pub(super) struct File {
    bytes: Vec<u8>,
    values: HashMap<String, Value>,
}

pub(super) fn read(path: &Path) -> Result<File> {
    let bytes = fs::read(path).map_err(|error| {
        Error::argument(
            format!("cannot read the checkpoint {}: {error}", path.display()),
            "Give the path that was given to fabric.save",
        )
    })?;
    let broken = |what: String| {
        Error::argument(
            format!(
                "{} is no checkpoint of this library: {what}",
                path.display()
            ),
            "Give the path that was given to fabric.save",
        )
    };
    let (_, metadata) =
        SafeTensors::read_metadata(&bytes).map_err(|error| broken(error.to_string()))?;
    let values = metadata
        .metadata()
        .as_ref()
        .and_then(|metadata| metadata.get(VALUES));
    let values = values.ok_or_else(|| broken("its metadata has no values".into()))?;
    let values = serde_json::from_str(values).map_err(|error| broken(error.to_string()))?;
    SafeTensors::deserialize(&bytes).map_err(|error| broken(error.to_string()))?;
    Ok(File { bytes, values })
}

impl File {
    fn tensors(&self) -> Result<SafeTensors<'_>> {
        Ok(SafeTensors::deserialize(&self.bytes)?)
    }

    /// Does everything in `state` stand in the file, and fit? What is to be loaded, by entry.
    pub(super) fn fit(&self, state: &State<'_>) -> Result<Vec<Fitted>> {
        state.check_names()?;
        let tensors = self.tensors()?;
        let fit = |(name, entry): &(String, Entry<'_>)| {
            let value = || self.values.get(name).ok_or_else(|| absent(name));
            match entry {
                Entry::Model(core) => fit_model(name, core, &tensors).map(|()| Fitted::Model),
                Entry::Optimizer(optimizer) => {
                    let state = optimizer_state(name, value()?, &tensors)?;
                    optimizer.check_state(&state)?;
                    Ok(Fitted::Optimizer(state))
                }
                Entry::Value(target) => {
                    target.check_json(name, value()?)?;
                    Ok(Fitted::Value)
                }
            }
        };
        state.0.iter().map(fit).collect()
    }

    /// Change everything in `state`; returns the values that are left.
    pub(super) fn apply(
        mut self,
        state: State<'_>,
        fitted: Vec<Fitted>,
    ) -> Result<HashMap<String, Value>> {
        let mut values = std::mem::take(&mut self.values);
        let tensors = self.tensors()?;
        for ((name, entry), fitted) in state.0.into_iter().zip(fitted) {
            let value = values.remove(&name);
            match (entry, fitted, value) {
                (Entry::Model(core), ..) => load_model(&name, &core, &tensors)?,
                (Entry::Optimizer(optimizer), Fitted::Optimizer(state), _) => {
                    optimizer.load_state(state)?
                }
                (Entry::Value(target), _, Some(json)) => target.set_json(&name, &json)?,
                _ => unreachable!("fit() has seen the same entries and values"),
            }
        }
        Ok(values)
    }
}

/// What was found for an entry of a state.
pub(super) enum Fitted {
    Model,
    Optimizer(OptimizerState),
    Value,
}

fn fit_model(name: &str, core: &Core, tensors: &SafeTensors<'_>) -> Result<()> {
    for param in core.model.params() {
        let key = format!("{name}.{}", param.name);
        let saved = tensors.tensor(&key).map_err(|_| absent(&key))?;
        let (dtype, shape) = (tensor_dtype(param.dtype)?, &param.shape);
        if saved.dtype() != dtype || saved.shape() != shape {
            return Err(Error::argument(
                format!(
                    "'{key}' was saved as {:?} {:?}, the model has {dtype:?} {shape:?}",
                    saved.dtype(),
                    saved.shape()
                ),
                "Build the model with the sizes that were saved",
            ));
        }
    }
    Ok(())
}

fn load_model(name: &str, core: &Core, tensors: &SafeTensors<'_>) -> Result<()> {
    for (index, param) in core.model.params().iter().enumerate() {
        let slab = slab_of(&tensors.tensor(&format!("{name}.{}", param.name))?)?;
        core.model.with(ParamId(index), &mut |buffer| {
            buffer.write(0..slab.numel(), slab.part(0..slab.numel()))
        })?;
    }
    Ok(())
}

fn optimizer_state(name: &str, steps: &Value, tensors: &SafeTensors<'_>) -> Result<OptimizerState> {
    let steps = steps.as_u64().ok_or_else(|| {
        Error::argument(
            format!("'{name}' in the checkpoint is no optimizer"),
            "Load it as what it was saved as",
        )
    })?;
    let prefix = format!("{name}.");
    let own = tensors.iter();
    let own = own.filter_map(|(key, view)| Some((key.strip_prefix(&prefix)?, view)));
    let tensors = own.map(|(key, view)| Ok((key.to_string(), slab_of(&view)?)));
    Ok(OptimizerState {
        steps,
        tensors: tensors.collect::<Result<_>>()?,
    })
}

fn absent(name: &str) -> Error {
    Error::argument(
        format!("the checkpoint holds no '{name}'"),
        "Ask for what was saved, under the name under which it was saved",
    )
}

fn slab_of(view: &TensorView<'_>) -> Result<Slab> {
    let dtype = DTYPES
        .iter()
        .find(|(_, dtype)| *dtype == view.dtype())
        .map(|(ours, _)| *ours);
    let dtype = dtype.ok_or_else(|| {
        Error::argument(
            format!("the checkpoint holds tensors of type {:?}", view.dtype()),
            "Convert them first",
        )
    })?;
    let mut slab = Slab::zeroed(dtype, view.data().len() / dtype.size());
    slab.as_bytes_mut().copy_from_slice(view.data());
    Ok(slab)
}

fn tensor_dtype(dtype: Dtype) -> Result<TensorDtype> {
    let found = DTYPES
        .iter()
        .find(|(ours, _)| *ours == dtype)
        .map(|(_, theirs)| *theirs);
    found.ok_or_else(|| kernels::KernelError::Unsupported { op: "save", dtype }.into())
}

const DTYPES: [(Dtype, TensorDtype); 15] = [
    (Dtype::F64, TensorDtype::F64),
    (Dtype::F32, TensorDtype::F32),
    (Dtype::F16, TensorDtype::F16),
    (Dtype::BF16, TensorDtype::BF16),
    (Dtype::F8E4M3, TensorDtype::F8_E4M3),
    (Dtype::F8E5M2, TensorDtype::F8_E5M2),
    (Dtype::I8, TensorDtype::I8),
    (Dtype::I16, TensorDtype::I16),
    (Dtype::I32, TensorDtype::I32),
    (Dtype::I64, TensorDtype::I64),
    (Dtype::U8, TensorDtype::U8),
    (Dtype::U16, TensorDtype::U16),
    (Dtype::U32, TensorDtype::U32),
    (Dtype::U64, TensorDtype::U64),
    (Dtype::Bool, TensorDtype::BOOL),
];
