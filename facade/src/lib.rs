//! Lightning Fabric for Rust.
