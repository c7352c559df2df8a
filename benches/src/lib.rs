//! Criterion benchmarks of Holdfast.
