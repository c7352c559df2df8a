//! Data-plane frames, version 1: one frame is one transport message (Send).
//!
//! ```text
//!  0        8        16       24               24+body  +16 if DIGEST  +16         length
//! ┌────────┬────────┬────────┬─────────────────┬───────────────┬───────────┬──────────────────┐
//! │ header: 24 bytes         │ body, by opcode │ digest, maybe │ MAC       │ inline payload   │
//! └────────┴────────┴────────┴─────────────────┴───────────────┴───────────┴──────────────────┘
//!                                               the MAC covers everything before it
//! ```
//!
//! Little endian throughout. A frame is built with [`Writer`] and taken apart with [`Frame::parse`], neither
//! of which allocates. Byte offsets of every body are in docs/PROTOCOL.md, and golden bytes in the tests.

mod body;
mod frame;
mod header;

pub use body::{Bind, BindReply, Flush, Hello, Io, LANE_END_BYTES, Map, Mapped, Notice, Reply, Unmap};
pub use frame::{Body, Frame, Writer};
pub use header::{Flags, Header, Opcode};

/// The version of these layouts.
pub const VERSION: u8 = 1;
/// Bytes of a MAC or a digest.
pub const TAG_BYTES: usize = 16;
