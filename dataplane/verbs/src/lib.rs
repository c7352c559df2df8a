//! Safe wrapper round libibverbs and librdmacm, and the one memory module: all unsafe code of Holdfast.
//!
//! ```text
//! memory/   Memory ─► Pool ─► Buffer     exclusive bytes, never exposed to a peer: &mut [u8]
//!                  └► Region             bytes a peer may write at any time: copy in, copy out, file I/O
//! gauges    what this process holds at the moment, for metrics, tests and leak hunts
//! ```
// The workspace denies unsafe code. It is allowed in this crate, and in no other: talking to the device, mapping memory
// and handing that memory to the kernel can't be done without. Every block names the facts that make it sound.
#![allow(unsafe_code)]

pub mod gauges;
pub mod memory;

pub use gauges::{Gauges, gauges};
