//! The fixed bodies. Every struct is its own wire layout; reserved bytes are zero and checked.

use crate::types::RegionDescriptor;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First frame on a channel, from the server. 80 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Hello {
    /// The server's nonce for the next bind on this channel; each bind attempt uses it up.
    pub nonce: [u8; 32],
    /// Which dataplane process speaks; the same value as in the service blob.
    pub instance: [u8; 16],
    /// Requests that may be in flight before the first bind is granted.
    pub credits: U16,
    /// Bindings one channel may have.
    pub bindings_max: U16,
    /// Longest inline payload, bytes.
    pub inline_max: U32,
    /// Longest read or write, bytes, under MAC policies `none` and `header`.
    pub transfer_max: U32,
    /// Longest read or write, bytes, under policies that digest or seal the payload.
    pub sealed_transfer_max: U32,
    /// Mappings one channel may have; 0: this server has no one-sided reads, or not on this transport.
    pub mappings_max: U32,
    /// Zero.
    pub reserved: [u8; 12],
}

/// Attach to an open; the resume key is the inline payload. 72 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Bind {
    /// The client's challenge: 32 fresh random bytes.
    pub challenge: [u8; 32],
    /// The client's proof over the transcript.
    pub proof: [u8; 32],
    /// [`crate::types::Access`] wanted, within what the open has.
    pub access: u8,
    /// The [`crate::auth::MacPolicy`] the client expects for this volume; anything else is refused, so that
    /// nobody can lower it on the way.
    pub policy: u8,
    /// Zero.
    pub reserved: [u8; 6],
}

/// The answer to a bind. All but `status` and `nonce` are zero unless it succeeded. 112 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BindReply {
    /// [`crate::types::Status`].
    pub status: U16,
    /// Requests the channel may have in flight from now on.
    pub credits: U16,
    /// Access granted.
    pub access: u8,
    /// MAC policy in force.
    pub policy: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// The new handle.
    pub handle: [u8; 16],
    /// The binding's fencing epoch.
    pub epoch: U64,
    /// The server's proof, which the client must check before it uses the binding.
    pub proof: [u8; 32],
    /// The nonce for the next bind on this channel.
    pub nonce: [u8; 32],
    /// Changes when dataplane restarts: a client that sees it change repeats its unflushed writes.
    pub verifier: U64,
    /// Zero.
    pub reserved2: [u8; 8],
}

/// Read or write. 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Io {
    /// Where in the file, bytes.
    pub offset: U64,
    /// How much, bytes.
    pub length: U32,
    /// Zero.
    pub reserved: U32,
    /// Where in the client's memory; [`RegionDescriptor::NONE`] with an inline payload.
    pub region: RegionDescriptor,
}

/// Make writes durable: those acknowledged before this was sent. 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Flush {
    /// Zero.
    pub reserved: U64,
}

/// Bytes of a lane's end: queue pair number (u32) and GID (16 bytes), as in the bind transcript.
pub const LANE_END_BYTES: usize = 20;

/// Expose a range of the file for one-sided reads over a lane. 40 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Map {
    /// Where in the file, bytes.
    pub offset: U64,
    /// How much, bytes; at least one.
    pub length: U64,
    /// The client's end of a lane to this server that has no mapping yet.
    pub lane: [u8; LANE_END_BYTES],
    /// Zero.
    pub reserved: [u8; 4],
}

/// Withdraw a mapping of this binding. 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Unmap {
    /// Its number.
    pub mapping: U32,
    /// Zero.
    pub reserved: U32,
}

/// What may be read over the lane from now on. 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Mapped {
    /// Credits given back, as in [`Reply`].
    pub credits: U16,
    /// Zero.
    pub reserved: [u8; 2],
    /// Names it in [`Unmap`]; counts from 1 on each channel and is never used again.
    pub mapping: U32,
    /// The server's address of the first byte.
    pub address: U64,
    /// Bytes from there on: fewer than asked for if the file ends before.
    pub length: U64,
    /// The server's key for them.
    pub rkey: U32,
    /// Zero.
    pub reserved2: [u8; 4],
}

/// The answer to a request. 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Reply {
    /// [`crate::types::Status`].
    pub status: U16,
    /// Credits given back; 1 for each request answered.
    pub credits: U16,
    /// Bytes read or written; with an error, how many leading bytes of a write certainly took effect.
    pub count: U32,
    /// The write verifier, as in [`BindReply`].
    pub verifier: U64,
}

/// The server speaks unasked. 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Notice {
    /// Why: [`crate::types::Status`]. For binding 0 the channel ends after this frame.
    pub status: U16,
    /// Zero.
    pub reserved: [u8; 6],
}
