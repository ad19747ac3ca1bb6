//! The CUDA kernels against the oracle of fabric-kernels, bit for bit, on the processor: every length from 1 to 257 at
//! every misalignment of source and target, lengths around a chunk, grids of several sizes, all values of the small
//! types, and guards around everything that is written.

mod moves;
mod names;
mod table;
mod values;
