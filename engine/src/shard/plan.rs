//! A strategy applied to a model: which parameters travel together, in which order, in which type. A pure function of
//! (names, shapes, dtypes, world, options), so that all ranks make the same plan without talking; its hash is compared.

use std::ops::Range;

use fabric_kernels::Dtype;

use super::{
    ParamId, ParamMeta,
    layout::Layout,
    placement::{Row, Transition},
};
use crate::{
    comm::{Call, Communicator, Label, Op, ReduceOp, Spent},
    error::{Error, Result},
};

/// How gradients are cut into buckets. The defaults are torch's.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// A bucket is closed when it holds this many bytes.
    pub bucket_bytes: usize,
    /// The first bucket is smaller, so that communication starts early.
    pub first_bucket_bytes: usize,
    /// The type in which gradients are kept and reduced; `None` is each parameter's own, but at least f32.
    pub reduce_dtype: Option<Dtype>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bucket_bytes: 25 << 20,
            first_bucket_bytes: 1 << 20,
            reduce_dtype: None,
        }
    }
}

/// Parameters whose gradients travel together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketPlan {
    /// The type in which they are kept and reduced.
    pub dtype: Dtype,
    /// Where each lies.
    pub layout: Layout,
    /// Elements that travel: the layout's, and zeros up to a multiple of the world size where ranks own slices.
    pub padded: usize,
}

impl BucketPlan {
    /// The slice of the bucket that `rank` of `world` owns.
    pub fn slice(&self, rank: usize, world: usize) -> Range<usize> {
        let len = self.padded / world;
        rank * len..(rank + 1) * len
    }
}

/// Elements of one parameter that one rank updates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Of which parameter.
    pub param: ParamId,
    /// Which of its elements.
    pub range: Range<usize>,
    /// In which bucket their gradient lies.
    pub bucket: usize,
    /// Where in the bucket it lies.
    pub place: Range<usize>,
}

/// The plan.
#[derive(Clone, Debug)]
pub struct Plan {
    row: Row,
    world: usize,
    params: Vec<ParamMeta>,
    buckets: Vec<BucketPlan>,
    places: Vec<Option<(usize, usize)>>, // by parameter: bucket, entry
}

impl Plan {
    /// Buckets of trainable parameters in reverse registration order (the order in which gradients become ready), one
    /// dtype each, ordered by when their last gradient is expected.
    ///
    /// # Errors
    /// When two parameters have one name, a trainable one is no float, or the reduce dtype is no float.
    pub fn new(row: Row, world: usize, params: Vec<ParamMeta>, options: &Options) -> Result<Self> {
        let mut names = params
            .iter()
            .map(|param| param.name.as_str())
            .collect::<Vec<_>>();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::argument(
                format!("two parameters are called '{}'", pair[0]),
                "Give every parameter its own name",
            ));
        }
        let trainable = || {
            params
                .iter()
                .enumerate()
                .filter(|(_, param)| param.trainable)
        };
        let float = |dtype: Dtype| {
            if dtype.is_float() {
                return Ok(());
            }
            Err(Error::argument(
                format!("gradients of type {dtype}"),
                "Train float parameters; freeze the others",
            ))
        };
        options.reduce_dtype.map_or(Ok(()), float)?;
        for (_, param) in trainable() {
            float(param.dtype)?;
        }
        let mut open: Vec<BucketPlan> = Vec::new(); // at most one of each dtype
        let mut closed: Vec<BucketPlan> = Vec::new();
        for (index, param) in trainable().rev() {
            let dtype = options.reduce_dtype.unwrap_or(param.dtype.accumulator());
            let at = open
                .iter()
                .position(|bucket| bucket.dtype == dtype)
                .unwrap_or_else(|| {
                    open.push(BucketPlan {
                        padded: 0,
                        dtype,
                        layout: Layout::default(),
                    });
                    open.len() - 1
                });
            open[at].layout.push(ParamId(index), param.numel());
            let first = !closed.iter().any(|bucket| bucket.dtype == dtype);
            let limit = if first {
                options.first_bucket_bytes
            } else {
                options.bucket_bytes
            };
            if open[at].layout.numel() * dtype.size() >= limit {
                closed.push(open.swap_remove(at));
            }
        }
        closed.extend(open);
        // The last entry of a bucket is its lowest parameter, the one that becomes ready last.
        closed.sort_by_key(|bucket| {
            std::cmp::Reverse(bucket.layout.entries().last().map(|(param, _)| *param))
        });
        let whole = if row.shards_update() { world } else { 1 };
        for bucket in &mut closed {
            bucket.padded = bucket.layout.numel().next_multiple_of(whole);
        }
        let mut places = vec![None; params.len()];
        for (bucket, plan) in closed.iter().enumerate() {
            for (entry, (param, _)) in plan.layout.entries().iter().enumerate() {
                places[param.0] = Some((bucket, entry));
            }
        }
        Ok(Self {
            row,
            world,
            params,
            buckets: closed,
            places,
        })
    }

    /// The strategy.
    pub fn row(&self) -> Row {
        self.row
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

    /// The buckets, in launch order.
    pub fn buckets(&self) -> &[BucketPlan] {
        &self.buckets
    }

    /// In which bucket, and as which entry of it, a parameter's gradient lies; `None` for a frozen one.
    pub fn place(&self, param: ParamId) -> Option<(usize, usize)> {
        self.places.get(param.0).copied().flatten()
    }

    /// What `rank` updates: all parameters, or, where the update is sharded, its slice of every bucket cut at the borders of
    /// parameters; in bucket order.
    pub fn pieces(&self, rank: usize) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for (index, bucket) in self.buckets.iter().enumerate() {
            let own = match self.row.shards_update() {
                true => bucket.slice(rank, self.world),
                false => 0..bucket.padded,
            };
            for (param, range) in bucket.layout.entries() {
                let place = range.start.max(own.start)..range.end.min(own.end);
                if !place.is_empty() {
                    pieces.push(Piece {
                        param: *param,
                        range: place.start - range.start..place.end - range.start,
                        bucket: index,
                        place,
                    });
                }
            }
        }
        pieces
    }

    /// The reduction of one bucket's gradients, where the strategy has one.
    pub fn reduction(&self) -> Option<ReduceOp> {
        match self.row.reduction() {
            Transition::AllReduce(op) | Transition::ReduceScatter(op) => Some(op),
            _ => None,
        }
    }

    /// The collective that reduces bucket `index`.
    pub(crate) fn bucket_call(&self, index: usize, op: ReduceOp) -> Call {
        let op = match self.row.reduction() {
            Transition::ReduceScatter(_) => Op::ReduceScatter(op),
            _ => Op::AllReduce(op),
        };
        Call::new(op).label(Label::Bucket(index as u32))
    }

    /// The collective that brings the updated parameters of bucket `index` to all ranks, where each updates its own.
    pub(crate) fn gather_call(&self, index: usize) -> Option<Call> {
        let gathers = self.row.after_step() == Transition::AllGather;
        gathers.then(|| Call::new(Op::AllGather).label(Label::Params(index as u32)))
    }

    /// The control word at the end of a synchronised backward: one i32 a parameter, how many ranks have a gradient.
    pub(crate) fn control_call(&self) -> Call {
        Call::new(Op::AllReduce(ReduceOp::Sum))
            .label(Label::Control(0))
            .blocking()
    }

    /// What one synchronised backward will cost this rank, by the schedules alone.
    pub fn predict(&self, comm: &dyn Communicator) -> Spent {
        let mut spent = Spent::default();
        if let Some(op) = self.reduction() {
            for (index, bucket) in self.buckets.iter().enumerate() {
                let call = self.bucket_call(index, op);
                spent += comm.price(&call, bucket.dtype, bucket.padded);
            }
            spent += comm.price(&self.control_call(), Dtype::I32, self.params.len());
        }
        spent
    }

    /// What one optimizer step will cost this rank, by the schedules alone.
    pub fn predict_step(&self, comm: &dyn Communicator) -> Spent {
        let mut spent = Spent::default();
        for (index, bucket) in self.buckets.iter().enumerate() {
            if let Some(call) = self.gather_call(index) {
                spent += comm.price(&call, bucket.dtype, bucket.padded);
            }
        }
        spent
    }

    /// A line for each fact that all ranks must share.
    pub fn facts(&self) -> Vec<String> {
        let mut facts = vec![format!(
            "strategy {} on {} ranks",
            self.row.name, self.world
        )];
        facts.extend(self.params.iter().map(|param| {
            let frozen = if param.trainable { "" } else { ", frozen" };
            format!(
                "parameter '{}': {} {:?}{frozen}",
                param.name, param.dtype, param.shape
            )
        }));
        facts.extend(self.buckets.iter().enumerate().map(|(index, bucket)| {
            format!("bucket {index}: {} x {}", bucket.padded, bucket.dtype)
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
            reduce_dtype: None,
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
        assert_eq!(members(&plan), [vec![3, 1], vec![2, 0]]);
        assert_eq!(
            plan.buckets()
                .iter()
                .map(|bucket| bucket.dtype)
                .collect::<Vec<_>>(),
            [Dtype::F32, Dtype::F64]
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
