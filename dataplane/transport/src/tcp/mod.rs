//! Channels over one TCP connection each: Place and Fetch are frames that carry payload straight into, or from,
//! registered memory.
//!
//! ```text
//!   submit ──► send.rs ──sendmsg──►  socket  ──recvmsg──► receive.rs ──► Recv buffers, regions, Fetch buffers
//!                 ▲                                            │
//!                 └──────────── answers to Fetches ◄───────────┘         framing.rs: the bytes on the wire
//! ```
//!
//! Place and Send are done when the socket has taken their last byte: the buffer is free then, and the bytes arrive in
//! order, or the channel ends and they may be lost. A peer that takes no bytes for 20 s, or whose host gives no sign of
//! life for that long, is gone. Nothing a peer sends sizes an allocation; a peer that does not read is not read from
//! either, once [`framing::FETCHES_MAX`] answers wait for it.

mod channel;
mod fetches;
pub mod framing;
mod listener;
mod receive;
mod send;

pub use channel::{TcpChannel, connect};
pub use listener::TcpListener;

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
