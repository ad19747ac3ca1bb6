//! Lightning Fabric for Rust, over any tensor library: change five lines of a training loop and get N devices.
//!
//! ```
//! use fabric::{Fabric, optim::Sgd, vec::VecModel};
//!
//! let fabric = Fabric::builder().devices(2).strategy("ddp").build()?;          // 1
//! fabric.launch_threads(|fabric| {                                             // 2: `launch` for processes
//!     let model = VecModel::new([("weight", vec![1f32; 3])]);
//!     let (model, mut optimizer) = fabric.setup(model, Sgd::new(0.5))?;        // 3
//!     for _ in 0..2 {
//!         let mine = vec![fabric.global_rank() as f32; 3];
//!         fabric.backward(model.gradients(vec![Some(mine)]))?;                 // 4: averaged over the ranks
//!         optimizer.step()?;
//!         optimizer.zero_grad();
//!     }
//!     assert_eq!(model.read("weight"), [0.5; 3]);
//!     Ok(())
//! })?;
//! # Ok::<(), fabric::Error>(())
//! ```
#![forbid(unsafe_code)]

pub mod accelerator;
pub mod callback;
pub mod checkpoint;
pub mod data;
pub mod environment;
pub mod error;
mod fabric;
pub mod launch;
pub mod logger;
pub mod machine;
pub mod model;
mod number;
pub mod optim;
pub mod planner;
pub mod precision;
pub mod rank_zero;
pub mod resolve;
pub mod seed;
mod shards;
pub mod strategy;
pub mod throughput;
mod turn;
pub mod vec;

pub use checkpoint::{State, StateDictType};
pub use error::{Error, Result};
pub use fabric::{Accumulate, Builder, Clip, Fabric, FabricOptimizer, Micro};
pub use fabric_engine as engine;
pub use fabric_engine::comm::ReduceOp;
pub use model::FabricModule;
