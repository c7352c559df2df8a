//! The engine behind every transport, the link, and the process itself. One program, because linking is most of what a test
//! costs to build; what counts allocations of its whole process is a program of its own, beside this directory.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // helpers of tests

#[path = "../common/mod.rs"]
mod common;

mod descriptor;
mod direct;
mod engine;
mod fence;
mod link;
mod map;
mod model;
mod pinned;
mod process;
mod refusals;
mod restrict;
mod shortage;
mod straight;
mod verbs;
mod views;
mod within;
mod written;
