//! The oracle: what every kernel means, on single values, in safe code that is obviously right.
//!
//! Nothing here is quick. The kernels in `simd` are held to these functions bit for bit (any NaN equals any NaN).

mod arithmetic;
mod block;
mod chunked;
mod combine;
mod exact;
mod float;
mod integer;
mod optim;
mod stochastic;

pub use arithmetic::{cast, cast_scaled, clamp, fold, sum_squares};
pub use block::{BLOCK, dequantize_block, quantize_block};
pub use chunked::{CHUNK, ChunkSquares, chunk_squares, end_squares};
pub use combine::{combine, combine_bool, combine_integer};
pub use exact::square_words;
pub use float::Float;
pub use integer::{Integer, divide, fold_bool, fold_integer, multiply};
pub(crate) use optim::power;
pub use optim::update;
pub use stochastic::{cast_stochastic, random_bits};
