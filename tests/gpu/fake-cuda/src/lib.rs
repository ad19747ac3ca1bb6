//! A CUDA driver without a GPU: device memory is host memory, each stream is a thread that works off a queue with random
//! delays, kernels are compiled for the host. What a program gets wrong on a real driver (a missing wait between
//! streams, memory freed too early, a handle used after its end) goes wrong here too, often or always.
//!
//! Read at the first call: `FAKE_CUDA_DEVICES` (2), `FAKE_CUDA_MEMORY` (bytes of each, 1 GiB), `FAKE_CUDA_CAPABILITY`
//! (80), `FAKE_CUDA_DELAY_US` (the longest pause before a piece of work, 200), `FAKE_CUDA_SEED` (1), and
//! `FAKE_CUDA_FAIL=cuLaunchKernel:3:719,...` (the third call of it returns 719).
#![allow(non_snake_case)] // the driver's own names

mod code;
mod context;
mod device;
mod driver;
mod event;
mod kernels;
mod memory;
mod module;
mod outside;
mod pool;
mod registry;
mod settings;
mod stream;
mod transfer;
