//! A strategy applied to a model: which parameters travel together, in which order, in which type. A pure function of
//! (names, shapes, dtypes, units, world, options), so that all ranks make the same plan without talking; its hash is
//! compared.

mod cost;
mod cut;
mod explain;
mod memory;
mod options;

pub use cost::{Among, Forecast, Least, Prices};
pub use explain::{bytes_text, count_text, several, time_text};
pub use memory::Footprint;
pub use options::{Accumulate, Options, Reshard, ShardBy};

use std::ops::Range;

use fabric_kernels::Dtype;

use super::{
    ParamId, ParamMeta, UnitId,
    layout::Layout,
    mesh::Mesh,
    placement::{Axis, Row, Transition},
};
use crate::{
    comm::{Call, Label, Op, Rank, ReduceOp},
    error::Result,
};

/// Parameters that travel together.
#[derive(Clone, Debug, PartialEq)]
pub struct BucketPlan {
    /// How they stand among the ranks that share a replica's work.
    pub axis: Axis,
    /// The unit whose they are; `None` is the root.
    pub unit: Option<UnitId>,
    /// Whether they get gradients.
    pub trainable: bool,
    /// The type in which gradients are kept and reduced.
    pub dtype: Dtype,
    /// The type in which the model computes with them, and in which they are gathered.
    pub param_dtype: Dtype,
    /// The type in which they are updated.
    pub main_dtype: Dtype,
    /// Whether they are updated in the host's memory, wherever the model has them.
    pub offload: bool,
    /// Where each lies.
    pub layout: Layout,
    /// Elements that travel: the layout's, and zeros up to a multiple of the ranks where they own slices.
    pub padded: usize,
}

impl BucketPlan {
    /// Slice `shard` of `shards`.
    pub fn slice(&self, shard: usize, shards: usize) -> Range<usize> {
        let len = self.padded / shards;
        shard * len..(shard + 1) * len
    }

    /// Whether the engine keeps the parameters that are updated, beside or instead of the model.
    pub fn has_main(&self) -> bool {
        let apart = self.offload || self.main_dtype != self.param_dtype;
        self.axis.shards_param() || (self.trainable && apart)
    }
}

/// Elements of one parameter that one rank updates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Of which parameter.
    pub param: ParamId,
    /// Which of its elements.
    pub range: Range<usize>,
    /// In which bucket it lies.
    pub bucket: usize,
    /// Where in the bucket it lies.
    pub place: Range<usize>,
}

/// The plan.
#[derive(Clone, Debug)]
pub struct Plan {
    row: Row,
    mesh: Mesh,
    params: Vec<ParamMeta>,
    units: Vec<String>,
    buckets: Vec<BucketPlan>,
    places: Vec<Option<(usize, usize)>>, // by parameter: bucket, entry
    options: Options,
}

impl Plan {
    /// The plan for a model without units.
    ///
    /// # Errors
    /// As [`Plan::with_units`].
    pub fn new(row: Row, world: usize, params: Vec<ParamMeta>, options: &Options) -> Result<Self> {
        Self::with_units(row, world, params, Vec::new(), options)
    }

    /// Buckets of trainable parameters in reverse registration order (the order in which gradients become ready), one
    /// dtype each, ordered by when their last gradient is expected. Where parameters are sharded a unit is a bucket.
    ///
    /// # Errors
    /// When two parameters have one name, a trainable one is no float, a unit is empty or unknown, gradients would be
    /// reduced in a type that cannot be, or the world does not divide into groups.
    pub fn with_units(
        row: Row,
        world: usize,
        params: Vec<ParamMeta>,
        units: Vec<String>,
        options: &Options,
    ) -> Result<Self> {
        let mesh = match (row.replica, options.group) {
            (Some(_), Some(shards)) => Mesh::new(world, shards)?,
            _ => Mesh::flat(world),
        };
        if let Reshard::Within(ranks) = options.reshard_after_forward {
            Mesh::new(mesh.shards, ranks)?;
        }
        cut::check(&params, &units, options)?;
        let buckets = cut::buckets(&row, mesh, &params, options);
        let mut places = vec![None; params.len()];
        for (bucket, plan) in buckets.iter().enumerate() {
            for (entry, (param, _)) in plan.layout.entries().iter().enumerate() {
                places[param.0] = Some((bucket, entry));
            }
        }
        Ok(Self {
            row,
            mesh,
            params,
            units,
            buckets,
            places,
            options: options.clone(),
        })
    }

    /// The strategy.
    pub fn row(&self) -> Row {
        self.row
    }

    /// How the ranks stand.
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// What the model was cut by.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// All parameters, frozen ones too, in registration order.
    pub fn params(&self) -> &[ParamMeta] {
        &self.params
    }

    /// One parameter.
    ///
    /// # Panics
    /// When the model has no such parameter.
    pub fn param(&self, param: ParamId) -> &ParamMeta {
        &self.params[param.0]
    }

    /// The names of the units, in forward order.
    pub fn units(&self) -> &[String] {
        &self.units
    }

    /// The buckets, in launch order.
    pub fn buckets(&self) -> &[BucketPlan] {
        &self.buckets
    }

    /// In which bucket, and as which entry of it, a parameter lies; `None` for a frozen one that stays in the model.
    pub fn place(&self, param: ParamId) -> Option<(usize, usize)> {
        self.places.get(param.0).copied().flatten()
    }

    /// The same, for a parameter that gets gradients.
    pub fn grad_place(&self, param: ParamId) -> Option<(usize, usize)> {
        self.place(param)
            .filter(|(bucket, _)| self.buckets[*bucket].trainable)
    }

    /// The elements of bucket `index` that `rank` updates, or keeps.
    pub fn own(&self, index: usize, rank: Rank) -> Range<usize> {
        let bucket = &self.buckets[index];
        match bucket.axis.shards_update() {
            true => bucket.slice(self.mesh.shard(rank), self.mesh.shards),
            false => 0..bucket.padded,
        }
    }

    /// Whether ranks update different elements, or update them elsewhere than in the model.
    pub fn updates_pieces(&self) -> bool {
        self.buckets
            .iter()
            .any(|bucket| bucket.axis.shards_update() || bucket.has_main())
    }

    /// What `rank` updates: all parameters, or, where the update is sharded, its slice of every bucket cut at the borders of
    /// parameters; in bucket order.
    pub fn pieces(&self, rank: Rank) -> Vec<Piece> {
        self.each_piece(rank).collect()
    }

    /// The same, one after the other.
    pub fn each_piece(&self, rank: Rank) -> impl Iterator<Item = Piece> {
        let indices = 0..self.buckets.len();
        let trainable = indices.filter(|index| self.buckets[*index].trainable);
        trainable.flat_map(move |index| self.cut(index, rank))
    }

    /// The parts of bucket `index` that `rank` owns, cut at the borders of parameters.
    pub fn cut(&self, index: usize, rank: Rank) -> impl Iterator<Item = Piece> {
        let entries = 0..self.buckets[index].layout.entries().len();
        entries.filter_map(move |entry| self.part(index, entry, rank))
    }

    /// The part of entry `entry` of bucket `index` that `rank` owns.
    pub fn part(&self, index: usize, entry: usize, rank: Rank) -> Option<Piece> {
        let own = self.own(index, rank);
        let (param, range) = &self.buckets[index].layout.entries()[entry];
        let place = range.start.max(own.start)..range.end.min(own.end);
        (place.start < place.end).then(|| Piece {
            param: *param,
            range: place.start - range.start..place.end - range.start,
            bucket: index,
            place,
        })
    }

    /// Whether a micro-batch that is not the last reduces the gradients of bucket `index`.
    pub fn reduces_each(&self, index: usize) -> bool {
        self.buckets[index].axis.reduces_each() && self.options.accumulate == Accumulate::Reduce
    }

    /// Whether a synchronised backward reduces anything.
    pub fn reduces(&self) -> bool {
        self.row.shard.reduction() != Transition::Local
    }

    /// Whether gradients are summed in one group, then over groups, and scaled at the end.
    pub(crate) fn has_replicas(&self) -> bool {
        self.row.replica.is_some()
    }

    /// Whether ranks hold different gradients after the reduction, so that their norm takes a collective.
    pub(crate) fn shards_norm(&self) -> bool {
        self.buckets
            .iter()
            .any(|bucket| bucket.trainable && bucket.axis.shards_update())
    }

    /// The collective that reduces bucket `index`'s gradients within a group.
    pub(crate) fn reduce_call(&self, index: usize) -> Option<Call> {
        let bucket = &self.buckets[index];
        let within = |op| match self.has_replicas() {
            true => ReduceOp::Sum, // the mean is taken once, after the last axis
            false => op,
        };
        let op = match bucket.axis.reduction() {
            _ if !bucket.trainable => return None,
            Transition::AllReduce(op) => Op::AllReduce(within(op)),
            Transition::ReduceScatter(op) => Op::ReduceScatter(within(op)),
            _ => return None,
        };
        Some(Call::new(op).label(Label::Bucket(index as u32)))
    }

    /// The collective that adds up bucket `index`'s reduced gradients over the groups.
    pub(crate) fn replica_call(&self, index: usize) -> Option<Call> {
        let call = Call::new(Op::AllReduce(ReduceOp::Sum)).label(Label::Bucket(index as u32));
        (self.has_replicas() && self.buckets[index].trainable).then_some(call)
    }

    /// The collective that brings the updated parameters of bucket `index` to all ranks, where each updates its own.
    pub(crate) fn after_step_call(&self, index: usize) -> Option<Call> {
        let bucket = &self.buckets[index];
        let gathers = bucket.trainable && bucket.axis.after_step() == Transition::AllGather;
        gathers.then(|| self.gather_call(index))
    }

    /// The collective that brings the parameters of bucket `index` to all ranks of a group.
    pub(crate) fn gather_call(&self, index: usize) -> Call {
        Call::new(Op::AllGather).label(Label::Params(index as u32))
    }

    /// The control word at the end of a synchronised backward: for each parameter, how many ranks have a gradient; and,
    /// where ranks hold different gradients, the bins of their squares.
    pub(crate) fn control_call(&self) -> Call {
        Call::new(Op::AllReduce(ReduceOp::Sum))
            .label(Label::Control(0))
            .blocking()
    }

    /// The control word's type and length.
    pub(crate) fn control_word(&self) -> (Dtype, usize) {
        match self.shards_norm() {
            true => (
                Dtype::I64,
                self.params.len() + fabric_kernels::SquareBins::WORDS,
            ),
            false => (Dtype::I32, self.params.len()),
        }
    }

    /// The blocks in which parameters travel: how many bytes each has, and how many there are.
    pub fn gather_blocks(&self) -> (usize, usize) {
        let travels = |index: &usize| {
            self.buckets[*index].axis.shards_param() || self.after_step_call(*index).is_some()
        };
        let bytes = |index: usize| {
            let bucket = &self.buckets[index];
            bucket.padded * bucket.param_dtype.size()
        };
        let all = (0..self.buckets.len()).filter(travels);
        let largest = all.map(bytes).max().unwrap_or(0);
        let in_unit = |unit: usize| {
            let members = self.buckets.iter();
            members
                .filter(move |bucket| bucket.unit == Some(UnitId(unit)))
                .count()
        };
        let most = (0..self.units.len()).map(in_unit).max().unwrap_or(0);
        let after_step =
            (0..self.buckets.len()).filter(|index| self.after_step_call(*index).is_some());
        // No more units are on their way than there are beside the one in use.
        let ahead = self
            .options
            .prefetch
            .min(self.units.len().saturating_sub(1));
        (
            largest,
            (most * ahead.max(1)).max(after_step.count().min(2)),
        )
    }

    /// The blocks that gradients are lent for a backward, where only slices of them are kept: bytes of each, and how
    /// many: one that fills, one on its way.
    pub fn reduce_blocks(&self) -> (usize, usize) {
        let lent = |index: &usize| self.buckets[*index].trainable && self.reduces_each(*index);
        let bytes = |index: usize| self.buckets[index].padded * self.buckets[index].dtype.size();
        let all = (0..self.buckets.len()).filter(lent);
        (
            all.clone().map(bytes).max().unwrap_or(0),
            all.count().min(2),
        )
    }

    /// A line for each fact that all ranks must share.
    pub fn facts(&self) -> Vec<String> {
        let Options {
            accumulate,
            reshard_after_forward,
            prefetch,
            shard_by,
            ..
        } = &self.options;
        let mut facts = vec![
            format!(
                "strategy {} on {} x {} ranks",
                self.row.name, self.mesh.replicas, self.mesh.shards
            ),
            format!(
                "accumulate {accumulate:?}, reshard after forward {reshard_after_forward:?}, prefetch {prefetch}, shard \
                 by {shard_by:?}"
            ),
        ];
        facts.extend(self.params.iter().map(|param| {
            let frozen = if param.trainable { "" } else { ", frozen" };
            let home = param.home().map(|unit| format!(", in unit {}", unit.0));
            format!(
                "parameter '{}': {} {:?}{frozen}{}",
                param.name,
                param.dtype,
                param.shape,
                home.unwrap_or_default()
            )
        }));
        facts.extend(self.units.iter().map(|unit| format!("unit '{unit}'")));
        facts.extend(self.buckets.iter().enumerate().map(|(index, bucket)| {
            let stands = match (bucket.axis.shards_param(), bucket.axis.shards_update()) {
                (true, _) => "sharded",
                (false, true) => "updated in slices",
                (false, false) => "whole",
            };
            format!(
                "bucket {index}: {} x {}, {stands}, updated as {}",
                bucket.padded, bucket.dtype, bucket.main_dtype
            )
        }));
        facts
    }

    /// A number that differs when any fact does.
    pub fn hash(&self) -> u64 {
        let hash = blake3::hash(self.facts().join("\n").as_bytes());
        u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::placement::DDP;
    use super::*;

    fn params(sizes: &[(usize, Dtype)]) -> Vec<ParamMeta> {
        let meta = |(index, (numel, dtype)): (usize, &(usize, Dtype))| {
            ParamMeta::new(format!("p{index}"), &[*numel], *dtype)
        };
        sizes.iter().enumerate().map(meta).collect()
    }

    fn members(plan: &Plan) -> Vec<Vec<usize>> {
        let ids = |bucket: &BucketPlan| {
            bucket
                .layout
                .entries()
                .iter()
                .map(|(param, _)| param.0)
                .collect()
        };
        plan.buckets().iter().map(ids).collect()
    }

    #[test]
    fn buckets_follow_reverse_registration_with_a_small_first_one() {
        let options = Options {
            bucket_bytes: 80,
            first_bucket_bytes: 40,
            ..Options::default()
        };
        let plan = Plan::new(DDP, 2, params(&[(10, Dtype::F32); 6]), &options).unwrap();
        assert_eq!(members(&plan), [vec![5], vec![4, 3], vec![2, 1], vec![0]]);
        assert_eq!(plan.place(ParamId(3)), Some((1, 1)));
    }

    #[test]
    fn each_bucket_has_one_dtype_and_small_floats_are_reduced_in_f32() {
        let mixed = params(&[
            (4, Dtype::F64),
            (4, Dtype::F32),
            (4, Dtype::F64),
            (4, Dtype::BF16),
        ]);
        let plan = Plan::new(DDP, 2, mixed, &Options::default()).unwrap();
        assert_eq!(members(&plan), [vec![3], vec![1], vec![2, 0]]);
        assert_eq!(
            plan.buckets()
                .iter()
                .map(|bucket| bucket.dtype)
                .collect::<Vec<_>>(),
            [Dtype::F32, Dtype::F32, Dtype::F64]
        );
    }

    #[test]
    fn a_frozen_parameter_has_no_place_but_counts_as_a_fact() {
        let mut some = params(&[(4, Dtype::F32), (4, Dtype::I64)]);
        some[1].trainable = false;
        let plan = Plan::new(DDP, 2, some.clone(), &Options::default()).unwrap();
        assert_eq!(plan.place(ParamId(1)), None);
        some[1].shape = vec![5];
        assert_ne!(
            Plan::new(DDP, 2, some, &Options::default()).unwrap().hash(),
            plan.hash()
        );
    }

    #[test]
    fn what_cannot_be_trained_is_refused() {
        let error = Plan::new(DDP, 2, params(&[(4, Dtype::I64)]), &Options::default()).unwrap_err();
        assert!(
            error.to_string().contains("gradients of type i64"),
            "{error}"
        );
        let twins = vec![
            ParamMeta::new("w", &[1], Dtype::F32),
            ParamMeta::new("w", &[2], Dtype::F32),
        ];
        assert!(
            Plan::new(DDP, 2, twins, &Options::default())
                .unwrap_err()
                .to_string()
                .contains("called 'w'")
        );
    }
}
