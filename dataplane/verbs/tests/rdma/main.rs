//! The safe wrapper against a real device, or soft-RoCE: `ci/rxe` runs a command where there is one.
#![allow(clippy::unwrap_used)] // tests

mod common;
mod data;
mod failure;
mod mapping;
