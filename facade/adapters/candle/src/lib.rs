//! Candle models under Fabric. Unmodified candle-nn code gets its parameters from [`build`]'s `VarBuilder`; each
//! parameter carries an identity operation whose backward says "this gradient is ready", so that communication starts
//! while candle's own backward goes on.
//!
//! ```no_run
//! use candle_core::{DType, Tensor};
//! use candle_nn::{Module, linear};
//! use fabric::{Fabric, optim::AdamW};
//! use fabric_candle::{CandleFabric, Loss, build};
//!
//! # fn main() -> fabric::Result<()> {
//! let fabric = Fabric::builder().devices(2).build()?;
//! fabric.launch(|fabric| {
//!     let device = fabric.tensor_device()?;
//!     let model = build(&device, DType::F32, |vb| linear(4, 1, vb.pp("head")))?;
//!     let (model, mut optimizer) = fabric.setup(model, AdamW::new(1e-2))?;
//!     for _ in 0..10 {
//!         let loss = model.forward(&Tensor::ones((8, 4), DType::F32, &device)?)?.sqr()?.mean_all()?;
//!         fabric.backward(Loss(&loss))?;
//!         optimizer.step()?;
//!         optimizer.zero_grad();
//!     }
//!     Ok(())
//! })?;
//! # Ok(()) }
//! ```
//!
//! # Devices
//!
//! Models are on the CPU or, with the feature `cuda`, on NVIDIA's devices: `Fabric::builder().accelerator("cuda")`, and
//! [`CandleFabric::tensor_device`] for everything that is made of tensors. Gradients are packed, reduced and applied where they
//! lie, on the stream on which candle computes. A device of your own making does as well; make it with
//! `Device::new_cuda_with_stream`, whose stream all threads share. `Device::new_cuda` takes each thread's own, and its model must
//! stay in the thread that has built it. The feature needs CUDA's compiler (nvcc) to build candle's kernels, and its libraries to
//! link and to run (cublas, cublasLt, curand, nvrtc, cudart).
//!
//! # Where the weights are
//!
//! The memory of every parameter is in the hooked tensor that the model holds; the `Var` behind it is an empty shell.
//! Whatever wants `Var`s (an optimizer of candle's, `safetensors::save` over them) must run inside
//! [`CandleModel::with_vars`], which swaps the memory in and out without a copy. There is no `VarMap`, and one that is
//! made of these shells saves empty tensors: use `fabric.save`.
//!
//! # Sharded parameters
//!
//! A [`Unit`], declared in a block's constructor and run in its forward, is what a strategy that shards parameters gathers
//! and drops: outside it, in forward and in backward, its parameters have no memory, and a use of them is an error.
//! [`build_deferred`] builds a model that has no memory at all before `fabric.setup`. A view of a weight (`weight.t()`) sees
//! its memory come and go; a copy in the graph (`contiguous()`, `to_dtype`, `broadcast_matmul` of a weight that it must
//! repeat) stays there until the backward.
//!
//! # Operations that cut gradients
//!
//! Some of candle's fused operations have no backward and cut the gradient without a word: [`UNUSED_HINT`] names them.
//! Fabric warns after the first step of parameters that no gradient reached.
//!
//! One operation has a wrong gradient: `max_pool2d`'s (candle 0.11) is divided by the places of its window, a quarter of what it
//! should be for 2x2. Use a convolution with a stride, or `avg_pool2d`.
//!
//! # Unsafe code
//!
//! In `src/cuda.rs` alone, where addresses of candle's device memory become the engine's spans: each block says why it may.
//! Without the feature `cuda` there is none.
#![cfg_attr(not(feature = "cuda"), forbid(unsafe_code))]
#![cfg_attr(feature = "cuda", deny(unsafe_code))]

mod away;
mod backend;
mod checkpoint;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;
mod hook;
mod init;
mod made;
mod model;
mod optim;
mod pool;
mod shelf;
mod storage;
mod tensors;
mod unit;

pub use model::{CandleModel, Loss, UNUSED_HINT, build, build_deferred};
pub use optim::CandleOptimizer;
pub use tensors::CandleFabric;
pub use unit::Unit;

/// The README's programs, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../../README.md")]
pub struct Readme;
