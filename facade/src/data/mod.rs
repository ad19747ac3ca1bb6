//! Data: what there is ([`Dataset`]), in which order it comes and whose share it is ([`Sampler`]), and how it comes in
//! batches ([`DataLoader`]).

mod batches;
mod dataset;
mod loader;
mod sampler;
mod workers;

pub use batches::Batches;
pub use dataset::Dataset;
pub use loader::DataLoader;
pub use sampler::Sampler;
