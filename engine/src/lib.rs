//! Collectives and sharding.
pub mod schedule;
