//! Channels over one byte stream each, which a connected socket is: Place and Fetch are frames that carry payload straight
//! into, or from, registered memory. [`crate::tcp`] and [`crate::local`] connect the sockets.
//!
//! ```text
//!   submit ──► send.rs ──sendmsg──►  socket  ──recvmsg──► receive.rs ──► Recv buffers, regions, Fetch buffers
//!                 ▲                                            │
//!                 └──────────── answers to Fetches ◄───────────┘         framing.rs: the bytes on the wire
//! ```
//!
//! Place and Send are done when the socket has taken their last byte: the buffer is free then, and the bytes arrive in
//! order, or the channel ends and they may be lost. Nothing a peer sends sizes an allocation; a peer that does not read is
//! not read from either, once [`framing::FETCHES_MAX`] answers wait for it.

mod accept;
mod channel;
mod fetches;
pub mod framing;
mod receive;
mod send;

pub(crate) use accept::accept;
pub use channel::StreamChannel;

use std::io;

/// Why a connection is to be ended.
enum Ending {
    /// The stream is over.
    Disconnected,
    /// The kernel says so.
    Io(io::Error),
    /// The peer broke the framing.
    Misbehaved(&'static str),
    /// The peer asked for what it may not have, and is to be told.
    Refuse { why: &'static str, refusal: framing::Refusal, tag: u32 },
    /// The peer refused what we asked.
    Refused { refusal: framing::Refusal, tag: u32 },
}
