//! What can be chosen about a plan.

use fabric_kernels::Dtype;

/// What a model is cut by. The defaults of the buckets are torch's.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// A bucket is closed when it holds this many bytes.
    pub bucket_bytes: usize,
    /// The first bucket is smaller, so that communication starts early.
    pub first_bucket_bytes: usize,
    /// The type in which gradients are kept and reduced; `None` is each parameter's own, but at least f32. bf16 and f16
    /// travel as such, are added in f32 and rounded once.
    pub reduce_dtype: Option<Dtype>,
    /// The type in which parameters are updated and saved, where it is wider than a parameter's own: it is kept beside the
    /// parameters that the model computes with, of all of them, or of this rank's slice.
    pub main_dtype: Option<Dtype>,
    /// Keep what is updated, and so the optimizer's states, in memory of the host, beside the parameters that the model
    /// computes with, wherever these are (Ren et al. 2021, "ZeRO-Offload").
    pub offload: bool,
    /// Where ranks own slices: at which borders they may be cut.
    pub shard_by: ShardBy,
    /// Where only slices of gradients are kept: what a micro-batch without synchronisation does.
    pub accumulate: Accumulate,
    /// Where parameters are sharded: whether a unit's are dropped between its forward and its backward.
    pub reshard_after_forward: Reshard,
    /// Where parameters are sharded: how many units ahead are gathered.
    pub prefetch: usize,
    /// Where parameters are sharded: those with fewer elements stay whole on every rank, and their gradients are
    /// averaged as under `ddp`.
    pub replicate_below: usize,
    /// Where groups of ranks hold replicas: the size of a group; `None` is all ranks, one replica.
    pub group: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bucket_bytes: 25 << 20,
            first_bucket_bytes: 1 << 20,
            reduce_dtype: None,
            main_dtype: None,
            offload: false,
            shard_by: ShardBy::Element,
            accumulate: Accumulate::Reduce,
            reshard_after_forward: Reshard::Yes,
            prefetch: 1,
            replicate_below: 0,
            group: None,
        }
    }
}

/// At which borders slices may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardBy {
    /// Anywhere: all slices are as long, to an element.
    Element,
    /// Between parameters: each is updated whole by one rank, as an optimizer needs that looks at matrices (Muon, Shampoo).
    /// Slices are padded to the longest.
    Tensor,
}

/// What a micro-batch without synchronisation does with its gradients, where only slices of them are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulate {
    /// Reduces them and adds this rank's slice: a reduction for each micro-batch, memory for slices only.
    Reduce,
    /// Adds them whole: one reduction for all micro-batches, memory for all gradients.
    Keep,
}

/// Whether a unit's parameters are dropped between its forward and its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reshard {
    /// They are, and gathered again: two gathers a step, memory for the units in use.
    Yes,
    /// They stay until the update: one gather a step, memory for all parameters.
    No,
    /// Each rank keeps a slice of a group of this many neighbours, which gathers it again without the others (Wang et
    /// al. 2023, "ZeRO++", hpZ).
    Within(usize),
}
