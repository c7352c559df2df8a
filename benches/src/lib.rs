//! Criterion benchmarks of Holdfast; the programs are beside this folder, and README.md says how to run them.
