//! The CUDA kernels against the oracle of fabric-kernels, bit for bit, on the processor: every length from 1 to 257 at
//! every misalignment of source and target, lengths around a chunk, grids of several sizes, all values of the small
//! types, and guards around everything that is written.

mod blocks;
mod chance;
mod fills;
mod folds;
mod moves;
mod names;
mod optim;
mod squares;
mod table;
mod values;
