//! Channels over one byte stream each: Place and Fetch are frames that carry payload straight into, or from, registered
//! memory. [`crate::tcp`] gives it connected sockets, [`crate::local`] rings in memory that both processes have, and the peer's
//! regions themselves: then those frames are what is left for regions that are not shared.
//!
//! ```text
//!   submit ──► send.rs ──►  wire: a socket, or rings  ──► receive.rs ──► Recv buffers, regions, Fetch buffers
//!                 ▲                                            │
//!                 └──────────── answers to Fetches ◄───────────┘         framing.rs: the bytes on the wire
//! ```
//!
//! Place and Send are done when the wire has taken their last byte: the buffer is free then, and the bytes arrive in
//! order, or the channel ends and they may be lost. Nothing a peer sends sizes an allocation; a peer that does not read is
//! not read from either, once [`framing::FETCHES_MAX`] answers wait for it.

mod accept;
mod channel;
mod fetches;
pub mod framing;
mod receive;
mod send;
mod socket;
mod wire;

pub(crate) use accept::accept;
pub(crate) use channel::StreamChannel;
pub(crate) use socket::SocketWire;
pub(crate) use wire::{PIECES_MAX, Piece, Room, Wire};

use std::io;

/// Why a connection is to be ended.
#[derive(Debug)]
pub(crate) enum Ending {
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
