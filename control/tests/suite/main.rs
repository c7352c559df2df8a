//! The real process over TLS and the link. One program, because linking is most of what a test costs to build.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod binds;
mod files;
mod journal;
mod lost_volumes;
mod peers;
mod recovery;
mod sizes;
mod survivors;
