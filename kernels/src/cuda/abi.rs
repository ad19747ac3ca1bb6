//! What the launcher and the kernels agree on: `kernels/cuda/abi.cuh`, word for word. A test in `kernels/cuda/host` holds
//! the two together by running every kernel with these layouts.

use bytemuck::{Pod, Zeroable};

/// Threads of a block, in every kernel.
pub const THREADS: u32 = 256;

/// Elements that a block takes at a time; of plain copies, [`COPY_CHUNK`] bytes.
pub const CHUNK: u64 = 8192;

/// Bytes that a block of a plain copy takes at a time.
pub const COPY_CHUNK: u64 = 4 * CHUNK;

/// One source and one target.
#[repr(C)]
#[derive(Copy, Clone, Debug, Default, Pod, Zeroable)]
pub struct Move {
    /// Address of the source; a fill has none.
    pub from: u64,
    /// Address of the target.
    pub into: u64,
    /// Elements; of plain copies, bytes.
    pub numel: u64,
    /// Number of the first chunk.
    pub first: u64,
}

/// One parameter with what belongs to it. An address of 0: there is none.
#[repr(C)]
#[derive(Copy, Clone, Debug, Default, Pod, Zeroable)]
pub struct Update {
    /// Address of the parameter.
    pub param: u64,
    /// Address of its gradient.
    pub grad: u64,
    /// Address of the first state.
    pub state0: u64,
    /// Address of the second state.
    pub state1: u64,
    /// Address of the copy that is computed with.
    pub copy: u64,
    /// Elements.
    pub numel: u64,
    /// Number of the first chunk.
    pub first: u64,
    /// Nothing.
    pub unused: u64,
}

/// Elements and their scales.
#[repr(C)]
#[derive(Copy, Clone, Debug, Default, Pod, Zeroable)]
pub struct Blocks {
    /// Address of the source.
    pub from: u64,
    /// Address of the target.
    pub into: u64,
    /// Address of the scales.
    pub scales: u64,
    /// Elements.
    pub numel: u64,
    /// Number of the first chunk.
    pub first: u64,
    /// Nothing.
    pub unused: u64,
}

/// An optimizer's numbers, by value; `abi.cuh` says what each rule calls them.
#[repr(C)]
#[derive(Copy, Clone, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct Rule {
    /// The learning rate; of Adam, over the first bias correction.
    pub lr: f64,
    /// Momentum; beta1.
    pub a: f64,
    /// 1 - beta1.
    pub a_rest: f64,
    /// 1 - dampening; beta2.
    pub b: f64,
    /// 1 - beta2.
    pub b_rest: f64,
    /// Weight decay; where it is decoupled, 1 - lr * weight decay.
    pub c: f64,
    /// The root of the second bias correction.
    pub d: f64,
    /// Added to the denominator.
    pub e: f64,
    /// What gradients are multiplied by.
    pub grad_scale: f64,
    /// Nothing.
    pub unused0: f64,
    /// `FLAG_*`.
    pub flags: u32,
    /// `Dtype::code` of the gradients.
    pub grad_dtype: u32,
    /// `Dtype::code` of the copies.
    pub copy_dtype: u32,
    /// Nothing.
    pub unused1: u32,
}

/// SGD ascends.
pub const FLAG_MAXIMIZE: u32 = 1;
/// SGD looks ahead.
pub const FLAG_NESTEROV: u32 = 2;
/// SGD's first step: the buffer is written and not read.
pub const FLAG_FIRST: u32 = 4;
/// SGD has a momentum buffer.
pub const FLAG_MOMENTUM: u32 = 8;
/// The decay is AdamW's.
pub const FLAG_DECOUPLED: u32 = 16;

const _: () = assert!(size_of::<Move>() == 32 && size_of::<Update>() == 64);
const _: () = assert!(size_of::<Rule>() == 96 && size_of::<Blocks>() == 48);
