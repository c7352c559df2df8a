//! What several benchmarks share.

pub mod transport;
