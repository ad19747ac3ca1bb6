//! Elementwise arithmetic on raw memory.
