//! The 24 bytes every frame begins with.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a frame asks or says. Client to server below 0x80, server to client from 0x80.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Opcode {
    /// Attach this channel to an open: [`super::Bind`] and the resume key.
    Bind = 0x01,
    /// Close the handle; no body.
    Unbind = 0x02,
    /// Place file bytes into the client's region: [`super::Io`].
    Read = 0x03,
    /// Fetch bytes from the client's region, or take them inline, into the file: [`super::Io`].
    Write = 0x04,
    /// Make acknowledged writes durable: [`super::Flush`].
    Flush = 0x05,
    /// Expose a range of the file for one-sided reads: [`super::Map`].
    Map = 0x06,
    /// Withdraw it: [`super::Unmap`].
    Unmap = 0x07,
    /// Ask for the open's descriptor itself, over a local channel; no body.
    Descriptor = 0x08,
    /// The first frame on a channel: [`super::Hello`].
    Hello = 0x80,
    /// The answer to `Bind`: [`super::BindReply`].
    BindReply = 0x81,
    /// The answer to `Unbind`, `Read`, `Write`, `Flush`, `Unmap` and `Descriptor`, and to a refused `Map`: [`super::Reply`].
    Reply = 0x82,
    /// The server speaks unasked: a binding was fenced, or the channel ends ([`super::Notice`]).
    Notice = 0x83,
    /// The answer to a granted `Map`: [`super::Mapped`].
    Mapped = 0x84,
}

impl Opcode {
    /// Reads an opcode as it travelled.
    pub const fn from_u8(opcode: u8) -> Option<Self> {
        Some(match opcode {
            0x01 => Self::Bind,
            0x02 => Self::Unbind,
            0x03 => Self::Read,
            0x04 => Self::Write,
            0x05 => Self::Flush,
            0x06 => Self::Map,
            0x07 => Self::Unmap,
            0x08 => Self::Descriptor,
            0x80 => Self::Hello,
            0x81 => Self::BindReply,
            0x82 => Self::Reply,
            0x83 => Self::Notice,
            0x84 => Self::Mapped,
            _ => return None,
        })
    }

    /// True for frames that only the server sends.
    pub const fn is_from_server(self) -> bool {
        self as u8 >= 0x80
    }

    /// Bytes of the fixed body.
    pub const fn body_len(self) -> usize {
        match self {
            Self::Bind => size_of::<super::Bind>(),
            Self::Unbind | Self::Descriptor => 0,
            Self::Read | Self::Write => size_of::<super::Io>(),
            Self::Flush => size_of::<super::Flush>(),
            Self::Map => size_of::<super::Map>(),
            Self::Unmap => size_of::<super::Unmap>(),
            Self::Hello => size_of::<super::Hello>(),
            Self::BindReply => size_of::<super::BindReply>(),
            Self::Reply => size_of::<super::Reply>(),
            Self::Notice => size_of::<super::Notice>(),
            Self::Mapped => size_of::<super::Mapped>(),
        }
    }
}

/// Flag bits of a frame; unknown bits are refused.
pub struct Flags;

impl Flags {
    /// A 16-byte payload digest stands between body and MAC.
    pub const DIGEST: u16 = 1;
    /// The payload follows the MAC (Write), or is the resume key (Bind).
    pub const INLINE: u16 = 2;
    /// Flush: the file's data and the size needed to read it, not its other attributes.
    pub const DATA_ONLY: u16 = 4;
    /// All that this version knows.
    pub const KNOWN: u16 = Self::DIGEST | Self::INLINE | Self::DATA_ONLY;
}

/// The header as it travels, 24 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`super::VERSION`].
    pub version: u8,
    /// See [`Opcode`].
    pub opcode: u8,
    /// See [`Flags`].
    pub flags: U16,
    /// Bytes of the whole frame, inline payload included.
    pub length: U32,
    /// The binding it belongs to; 0 is the channel itself.
    pub binding: U32,
    /// The client's number for a request; a reply echoes it.
    pub request: U32,
    /// Counts the frames of this channel in this direction from 0, without gap: a frame lost, repeated or
    /// out of order ends the channel.
    pub sequence: U64,
}

impl Header {
    /// Bytes on the wire.
    pub const SIZE: usize = size_of::<Self>();
}
