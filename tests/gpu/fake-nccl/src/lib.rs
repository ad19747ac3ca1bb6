//! NCCL without a GPU: its interface over the engine's communicators between host memories, which is what the memory of
//! the stand-in for libcuda is. Work goes into CUDA streams as host functions of whatever libcuda is loaded, so that it
//! runs in stream order and blocks its stream, as NCCL's kernels do.
//!
//! Stricter than NCCL where a mistake there only sometimes shows: what a non-blocking call has started is not in the
//! stream before it was asked for often enough; ranks that disagree are told; buffers must be alive and long enough.
//!
//! Read at the first call: `FAKE_NCCL_VERSION` (22803), `FAKE_NCCL_HANG=<rank>:<n>` (that rank's n-th operation on a
//! communicator never starts), `FAKE_NCCL_FAIL=<function>:<n>:<code>,...` (the n-th call of it returns that code).
//! Rank 0 must be in the process that made the id.
#![allow(non_snake_case)] // NCCL's own names

mod code;
mod collective;
mod comm;
mod cuda;
mod group;
mod init;
mod log;
mod memory;
mod messages;
mod settings;
mod split;
mod task;
mod work;
