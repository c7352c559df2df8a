//! The pure core of Holdfast.
//!
//! Everything here is deterministic: no I/O, no clock, no thread, no `unsafe`. Time and randomness come in
//! as arguments, so that the simulator and the tests run the very code that ships.
//!
//! ```text
//!   types   ids, access, ranges, region descriptors, status        (nouns)
//!   wire    data-plane frames, control messages, link messages     (bytes <-> nouns)
//!   auth    resume keys, key schedule, transcripts, frame MACs     (who may)
//!   state   the authority: the open table and its rules            (what happens)
//!   journal the journal's layout, over a trait for the disk        (what outlives a crash)
//! ```
//!
//! `state` may use all the others, `auth` and `wire` use `types`. Nothing points back but the journal's records, which hold
//! what `state` knows of a file.

#![forbid(unsafe_code)]

pub mod auth;
pub mod journal;
pub mod state;
pub mod types;
pub mod wire;
