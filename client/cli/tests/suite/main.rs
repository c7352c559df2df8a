//! The real processes, seen from outside. One program, because linking is most of what a test costs to build; tests that
//! measure or that count what their whole process does are programs of their own, beside this directory.

#![allow(clippy::unwrap_used)] // helpers of tests stand outside of #[test] functions

#[path = "../common/mod.rs"]
mod common;

mod bench_command;
mod copying;
mod direct;
mod hot;
mod local;
mod main_job;
mod one_open;
mod onesided;
mod probe_auth;
mod probe_lock;
mod probe_open;
mod probe_resume;
mod refused;
mod resume;
mod serving;
mod share_lock;
mod streamed;
mod striped;
mod viewed;

/// Not a test: the load, in a process of its own.
#[test]
#[ignore = "it is the load that the other tests start"]
fn load_process() {
    common::load::run_if_asked();
}
