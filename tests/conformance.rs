//! What Lightning Fabric's own tests check, as far as it applies here: each test is named after its number in the list that
//! docs/FABRIC.md reproduces, its reference values, or the defect that it does not have. Those that concern one module
//! alone stand beside it, under the same names.

mod checkpoints;
mod collectives;
mod data;
mod defects;
mod reference;
mod setup;
mod training;
