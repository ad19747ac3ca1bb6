//! Collectives as data.
