//! Cutting a model into buckets.

use fabric_kernels::Dtype;

use super::{BucketPlan, Options, ShardBy};
use crate::{
    error::{Error, Result},
    shard::{
        ParamId, ParamMeta, UnitId,
        layout::Layout,
        mesh::Mesh,
        placement::{Axis, Row},
    },
};

/// Whether these parameters can be planned at all.
pub(super) fn check(params: &[ParamMeta], units: &[String], options: &Options) -> Result<()> {
    let twice = |names: &mut Vec<&str>| {
        names.sort_unstable();
        let pair = names.windows(2).find(|pair| pair[0] == pair[1])?;
        Some(pair[0].to_string())
    };
    if let Some(name) = twice(&mut params.iter().map(|param| param.name.as_str()).collect()) {
        return Err(Error::argument(
            format!("two parameters are called '{name}'"),
            "Give every parameter its own name",
        ));
    }
    if let Some(name) = twice(&mut units.iter().map(String::as_str).collect()) {
        return Err(Error::argument(
            format!("two units are called '{name}'"),
            "Give every unit its own name",
        ));
    }
    for (index, unit) in units.iter().enumerate() {
        let mut members = params.iter().filter_map(|param| param.unit);
        if !members.any(|member| member == UnitId(index)) {
            return Err(Error::argument(
                format!("unit '{unit}' holds no parameter"),
                "Declare units around the blocks that hold parameters",
            ));
        }
    }
    for param in params {
        let mut used_by = param.tied.iter().chain([&param.unit]).flatten();
        if let Some(UnitId(unknown)) = used_by.find(|unit| unit.0 >= units.len()) {
            return Err(Error::argument(
                format!(
                    "'{}' belongs to unit {unknown} of {}",
                    param.name,
                    units.len()
                ),
                "Name all units in Model::units",
            ));
        }
        if !param.trainable {
            continue;
        }
        if !param.dtype.is_float() {
            return Err(Error::argument(
                format!(
                    "'{}' would have gradients of type {}",
                    param.name, param.dtype
                ),
                "Train float parameters; freeze the others",
            ));
        }
        let reduce = options.reduce_dtype.unwrap_or(param.dtype.accumulator());
        let main = main_dtype(param, options);
        for (what, dtype) in [("reduced", reduce), ("updated", main)] {
            let arithmetic = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];
            if !arithmetic.contains(&dtype) {
                return Err(Error::argument(
                    format!(
                        "'{}' would be {what} as {dtype}, which nothing here can add up",
                        param.name
                    ),
                    "Choose f32, f64, bf16 or f16",
                ));
            }
        }
    }
    Ok(())
}

/// The type in which `param` is updated.
fn main_dtype(param: &ParamMeta, options: &Options) -> Dtype {
    let wider = |main: &Dtype| param.trainable && main.size() > param.dtype.size();
    options.main_dtype.filter(wider).unwrap_or(param.dtype)
}

/// Parameters with the same key may travel together.
#[derive(Clone, Copy, PartialEq)]
struct Key {
    axis: Axis,
    unit: Option<UnitId>,
    trainable: bool,
    dtype: Dtype,
    param_dtype: Dtype,
    main_dtype: Dtype,
}

impl Key {
    /// How `param` stands, and with whom it travels; `None` when it never moves.
    fn of(row: &Row, param: &ParamMeta, options: &Options) -> Option<Self> {
        let unit = param.home();
        let axis = match row.shard.shards_param() {
            true if param.numel() < options.replicate_below => Axis::REPLICATE,
            // What is in no unit is never dropped: there is no telling when it is used.
            true if unit.is_none() => Axis::SHARD_GRAD,
            _ => row.shard,
        };
        let unit = unit.filter(|_| axis.shards_param());
        if !param.trainable && !axis.shards_param() {
            return None;
        }
        Some(Self {
            axis,
            unit,
            trainable: param.trainable,
            dtype: options.reduce_dtype.unwrap_or(param.dtype.accumulator()),
            param_dtype: param.dtype,
            main_dtype: main_dtype(param, options),
        })
    }
}

pub(super) fn buckets(
    row: &Row,
    mesh: Mesh,
    params: &[ParamMeta],
    options: &Options,
) -> Vec<BucketPlan> {
    let mut open: Vec<(Key, Layout)> = Vec::new(); // at most one of each key
    let mut closed: Vec<(Key, Layout)> = Vec::new();
    for (index, param) in params.iter().enumerate().rev() {
        let Some(key) = Key::of(row, param, options) else {
            continue;
        };
        let at = open.iter().position(|(other, _)| *other == key);
        let at = at.unwrap_or_else(|| {
            open.push((key, Layout::default()));
            open.len() - 1
        });
        open[at].1.push(ParamId(index), param.numel());
        if key.unit.is_some() {
            continue; // a unit is one bucket
        }
        let limit = match closed.iter().any(|(other, _)| *other == key) {
            true => options.bucket_bytes,
            false => options.first_bucket_bytes,
        };
        if open[at].1.numel() * key.dtype.size() >= limit {
            closed.push(open.swap_remove(at));
        }
    }
    closed.extend(open);
    // The last entry of a bucket is its lowest parameter, the one that becomes ready last.
    closed.sort_by_key(|(_, layout)| {
        std::cmp::Reverse(layout.entries().last().map(|(param, _)| *param))
    });
    let plan = |(key, layout): (Key, Layout)| {
        let (layout, padded) = match (key.axis.shards_update(), options.shard_by) {
            (false, _) => (layout.clone(), layout.numel()),
            (true, ShardBy::Element) => {
                let padded = layout.numel().next_multiple_of(mesh.shards);
                (layout, padded)
            }
            (true, ShardBy::Tensor) => whole_tensors(&layout, mesh.shards),
        };
        BucketPlan {
            axis: key.axis,
            unit: key.unit,
            trainable: key.trainable,
            dtype: key.dtype,
            param_dtype: key.param_dtype,
            main_dtype: key.main_dtype,
            offload: options.offload,
            padded,
            layout,
        }
    };
    closed.into_iter().map(plan).collect()
}

/// The same parameters, each within one of `shards` equal slices: the largest first, to whoever has least (Graham 1969).
fn whole_tensors(layout: &Layout, shards: usize) -> (Layout, usize) {
    let mut entries = layout.entries().iter().collect::<Vec<_>>();
    entries.sort_by_key(|(_, range)| std::cmp::Reverse(range.len())); // stable: the same on all ranks
    let mut slices = vec![(0, Vec::new()); shards];
    for (param, range) in entries {
        let least = slices.iter_mut().min_by_key(|(load, _)| *load);
        let (load, members) = least.expect("a group has a rank");
        *load += range.len();
        members.push((*param, range.len()));
    }
    let longest = slices.iter().map(|(load, _)| *load).max().unwrap_or(0);
    let mut packed = Layout::default();
    for (slice, (_, members)) in slices.into_iter().enumerate() {
        let mut start = slice * longest;
        for (param, numel) in members {
            packed.push_at(param, start, numel);
            start += numel;
        }
    }
    (packed, longest * shards)
}
