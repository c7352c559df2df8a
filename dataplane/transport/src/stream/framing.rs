//! The bytes on the wire. Everything is little endian.
//!
//! A connection carries frames in both directions, one after the other, with nothing before the first. Each is a
//! header of 24 bytes and, for kinds 1, 2 and 4, `length` bytes of payload:
//!
//! | offset | bytes | field   | meaning |
//! |-------:|------:|---------|---------|
//! | 0      | 1     | kind    | 1 Message, 2 Place, 3 Fetch, 4 FetchData, 5 Refused |
//! | 1      | 1     | reason  | Refused: 1 access, 2 length; Message: 1 if a descriptor comes with it; else 0 |
//! | 2      | 2     | zero    | 0 |
//! | 4      | 4     | length  | bytes of payload; Fetch: bytes wanted; Refused: 0. At most 2^30 |
//! | 8      | 8     | address | Place, Fetch: as in the region descriptor, plus an offset; else 0 |
//! | 16     | 4     | rkey    | Place, Fetch: as in the region descriptor; else 0 |
//! | 20     | 4     | tag     | Place, Fetch: the sender's number for it; FetchData, Refused: that number; else 0 |
//!
//! * Message goes into the receiver's oldest posted Recv. If none is posted, the receiver stops reading until one is.
//!   If it is longer than that buffer, the answer is Refused{length} with tag 0.
//! * A descriptor goes over local channels alone, from the server to the client, beside the stream ([`crate::local`]): the next
//!   one is this message's. It may be missing: the receiver had no room for it.
//! * Place writes its payload into the receiver's region. Place and Fetch are never empty.
//! * Fetch is answered with FetchData of exactly the length and tag asked for; answers may come in any order. At
//!   most [`FETCHES_MAX`] may be unanswered; the asker sees to it.
//! * Place or Fetch of memory that the receiver did not register so is answered with Refused{access}.
//! * Refused is the last frame of its sender. A sender sets the top bit in the tags of its Places and not in those of
//!   its Fetches, so that it knows which was refused; to the receiver all tags are alike.
//!
//! Whoever sees anything else ends the connection. A frame is answered, or its payload stored, only after its
//! header has been checked; no length from the wire ever sizes an allocation.

use holdfast_shared::types::RegionDescriptor;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header.
pub const HEADER_BYTES: usize = size_of::<Header>();
/// Longest payload, and longest Fetch.
pub const LENGTH_MAX: usize = 1 << 30;
/// Fetches that may be unanswered in one direction.
pub const FETCHES_MAX: usize = 64;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    kind: u8,
    reason: u8,
    zero: U16,
    length: U32,
    address: U64,
    rkey: U32,
    tag: U32,
}

/// A header, understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Frame {
    /// A message follows.
    Message { length: u32, descriptor: bool },
    /// Bytes for a region follow.
    Place { remote: RegionDescriptor, tag: u32 },
    /// Bytes of a region are wanted.
    Fetch { remote: RegionDescriptor, tag: u32 },
    /// The bytes wanted follow.
    FetchData { length: u32, tag: u32 },
    /// The sender of this ends the connection because of what the receiver asked.
    Refused { refusal: Refusal, tag: u32 },
}

/// Why a frame was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// The region named does not exist or does not allow it.
    Access,
    /// The message is longer than the buffer.
    Length,
}

impl Frame {
    /// The header's bytes.
    pub(super) fn encode(self) -> [u8; HEADER_BYTES] {
        let none = RegionDescriptor::NONE;
        let (kind, reason, length, remote, tag) = match self {
            Self::Message { length, descriptor } => (1, u8::from(descriptor), length, none, 0),
            Self::Place { remote, tag } => (2, 0, remote.length(), remote, tag),
            Self::Fetch { remote, tag } => (3, 0, remote.length(), remote, tag),
            Self::FetchData { length, tag } => (4, 0, length, none, tag),
            Self::Refused { refusal: Refusal::Access, tag } => (5, 1, 0, none, tag),
            Self::Refused { refusal: Refusal::Length, tag } => (5, 2, 0, none, tag),
        };
        let header = Header {
            kind,
            reason,
            zero: U16::ZERO,
            length: length.into(),
            address: remote.address().into(),
            rkey: remote.rkey().into(),
            tag: tag.into(),
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(header.as_bytes());
        bytes
    }

    /// Reads a header.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, &'static str> {
        let header = Header::read_from_bytes(bytes).map_err(|_| "header of a wrong size")?;
        let (length, rkey, tag) = (header.length.get(), header.rkey.get(), header.tag.get());
        let remote = RegionDescriptor::new(header.address.get(), rkey, length);
        let reason_max = match header.kind {
            1 => 1,
            5 => u8::MAX,
            _ => 0,
        };
        if header.zero.get() != 0 || header.reason > reason_max {
            return Err("a reserved field is not zero");
        }
        if length as usize > LENGTH_MAX {
            return Err("a frame is too long");
        }
        let names_no_region = header.address.get() == 0 && rkey == 0;
        match header.kind {
            1 if names_no_region && tag == 0 => Ok(Self::Message { length, descriptor: header.reason == 1 }),
            2 if length > 0 => Ok(Self::Place { remote, tag }),
            3 if length > 0 => Ok(Self::Fetch { remote, tag }),
            4 if names_no_region && length > 0 => Ok(Self::FetchData { length, tag }),
            5 if names_no_region && length == 0 => match header.reason {
                1 => Ok(Self::Refused { refusal: Refusal::Access, tag }),
                2 => Ok(Self::Refused { refusal: Refusal::Length, tag }),
                _ => Err("an unknown reason of refusal"),
            },
            1..=5 => {
                Err("a field that does not belong to the kind of frame is not zero, or one that does is")
            }
            _ => Err("an unknown kind of frame"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let remote = RegionDescriptor::new(0x1122_3344_5566_7788, 0xA1A2_A3A4, 0x100);
        let frames = [
            (
                Frame::Message { length: 5, descriptor: false },
                "010000000500000000000000000000000000000000000000",
            ),
            (
                Frame::Message { length: 5, descriptor: true },
                "010100000500000000000000000000000000000000000000",
            ),
            (Frame::Place { remote, tag: 7 }, "02000000000100008877665544332211a4a3a2a107000000"),
            (Frame::Fetch { remote, tag: 8 }, "03000000000100008877665544332211a4a3a2a108000000"),
            (Frame::FetchData { length: 256, tag: 8 }, "040000000001000000000000000000000000000008000000"),
            (
                Frame::Refused { refusal: Refusal::Access, tag: 8 },
                "050100000000000000000000000000000000000008000000",
            ),
            (
                Frame::Refused { refusal: Refusal::Length, tag: 0 },
                "050200000000000000000000000000000000000000000000",
            ),
        ];
        for (frame, golden) in frames {
            let bytes = frame.encode();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, golden, "{frame:?}");
            assert_eq!(Frame::decode(&bytes), Ok(frame));
        }
    }

    #[test]
    fn whatever_is_accepted_encodes_to_the_same_bytes() {
        // Every single-byte change of valid headers, and a walk through pseudo-random ones.
        let remote = RegionDescriptor::new(1, 2, 3);
        let seeds = [
            Frame::Message { length: 0, descriptor: false },
            Frame::Place { remote, tag: 1 },
            Frame::Fetch { remote, tag: 1 },
        ];
        let mut accepted = 0;
        for seed in seeds {
            for index in 0..HEADER_BYTES {
                for value in 0..=u8::MAX {
                    let mut bytes = seed.encode();
                    bytes[index] = value;
                    if let Ok(frame) = Frame::decode(&bytes) {
                        assert_eq!(frame.encode(), bytes);
                        accepted += 1;
                    }
                }
            }
        }
        assert!(accepted > 1000);
        for kind in [0, 6, 255] {
            let mut bytes = seeds[0].encode();
            bytes[0] = kind;
            assert!(Frame::decode(&bytes).is_err());
        }
        assert!(
            Frame::decode(&Frame::Message { length: (1 << 30) + 1, descriptor: false }.encode()).is_err()
        );
    }
}
