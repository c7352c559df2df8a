//! The bytes of a segment file.
//!
//! All numbers are little-endian. A file is one header and then frames, each beginning at a multiple of 8:
//!
//! ```text
//!  header, 64 bytes                                   frame, 32 bytes + payload + zeros up to a multiple of 8
//!  +----+--------------------------------------+     +----+---------------------------------------------+
//!  |  0 | "HFJL"                               |     |  0 | "HFJR"                                      |
//!  |  4 | format version, u16                  |     |  4 | length of the payload, u32                  |
//!  |  6 | kind of segment, u16                 |     |  8 | sequence, u64                               |
//!  |  8 | cluster, 16 bytes                    |     | 16 | batch, u64: where in this file the write    |
//!  | 24 | number of the segment, u64           |     |    | began that this frame was part of           |
//!  | 32 | generation, u64                      |     | 24 | kind of frame, u16                          |
//!  | 40 | sequence of the first record, u64    |     | 26 | zero, u16                                   |
//!  | 48 | zero, 12 bytes                       |     | 28 | CRC32C of all else, begun with the header's |
//!  | 60 | CRC32C of the 60 bytes before        |     | 32 | payload, zeros                              |
//!  +----+--------------------------------------+     +----+---------------------------------------------+
//! ```
//!
//! In every version the first 8 bytes mean this, and bytes 60 to 64 are this checksum: thus a newer format is told
//! from a damaged header.
//!
//! A frame's checksum begins with its header's, and so with cluster, segment and generation: bytes left over from
//! another file never pass for a frame, and nobody who only chooses payloads can make one.
//!
//! A batch is written only after the one before it is on the disk. A damaged frame was therefore once whole if a whole
//! frame of a *later batch* follows it, and may be a write that a crash cut short if none does.

use crate::types::ClusterId;

/// The version of the format that is written.
pub const FORMAT_VERSION: u16 = 1;
/// Bytes of a segment's header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of a frame before its payload.
pub const FRAME_HEAD_BYTES: usize = 32;
/// The longest payload, bytes.
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;
/// Frames begin at multiples of this.
pub(super) const ALIGNMENT: usize = 8;

const HEADER_MAGIC: [u8; 4] = *b"HFJL";
const FRAME_MAGIC: [u8; 4] = *b"HFJR";
const HEADER_CHECKSUM_AT: usize = 60;
const FRAME_CHECKSUM_AT: usize = 28;

/// Bytes that a record takes in a file.
pub const fn framed_bytes(payload: usize) -> usize {
    (FRAME_HEAD_BYTES + payload).next_multiple_of(ALIGNMENT)
}

/// A segment's file name.
pub(super) fn file_name(segment: u64) -> String {
    format!("journal-{segment:016x}.log")
}

/// The segment of a file name; none if the file is not one of ours.
pub(super) fn segment_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("journal-")?.strip_suffix(".log")?;
    let number = u64::from_str_radix(digits, 16).ok()?;
    // Only the one spelling that is written: no signs, no capitals, no other length.
    (file_name(number) == name).then_some(number)
}

/// How a segment stands to those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SegmentKind {
    /// There is none before it.
    First,
    /// It goes on after them: the server was started anew.
    Continues,
    /// It stands for all of them once its checkpoint's end mark is there.
    Checkpoint,
}

/// What a segment's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: SegmentKind,
    pub(super) cluster: ClusterId,
    pub(super) segment: u64,
    pub(super) generation: u64,
    pub(super) first_sequence: u64,
}

/// Why a header is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeaderProblem {
    /// It was damaged or never written.
    Damaged(&'static str),
    /// Whole, and of another version.
    Version(u16),
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let kind: u16 = match self.kind {
            SegmentKind::First => 0,
            SegmentKind::Continues => 1,
            SegmentKind::Checkpoint => 2,
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&HEADER_MAGIC);
        bytes[4..6].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.cluster.0);
        bytes[24..32].copy_from_slice(&self.segment.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.generation.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.first_sequence.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..HEADER_CHECKSUM_AT]);
        bytes[HEADER_CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The checksum of an encoded header, with which those of its frames begin.
    pub(super) fn salt(encoded: &[u8; HEADER_BYTES]) -> u32 {
        crc32c::crc32c(&encoded[..HEADER_CHECKSUM_AT])
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderProblem> {
        if bytes[0..4] != HEADER_MAGIC {
            return Err(HeaderProblem::Damaged("it does not begin with HFJL"));
        }
        if u32_at(bytes, HEADER_CHECKSUM_AT) != Self::salt(bytes) {
            return Err(HeaderProblem::Damaged("the header's checksum is wrong"));
        }
        let version = u16_at(bytes, 4);
        if version != FORMAT_VERSION {
            return Err(HeaderProblem::Version(version));
        }
        let kind = match u16_at(bytes, 6) {
            0 => SegmentKind::First,
            1 => SegmentKind::Continues,
            2 => SegmentKind::Checkpoint,
            _ => {
                return Err(HeaderProblem::Damaged("the header names a kind of segment that does not exist"));
            }
        };
        let mut cluster = [0; 16];
        cluster.copy_from_slice(&bytes[8..24]);
        Ok(Self {
            kind,
            cluster: ClusterId(cluster),
            segment: u64_at(bytes, 24),
            generation: u64_at(bytes, 32),
            first_sequence: u64_at(bytes, 40),
        })
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameKind {
    /// A record.
    Record,
    /// The end of the checkpoint that the segment began with. Its sequence is that of the record before it.
    CheckpointEnd,
}

/// A frame's first 32 bytes, not yet proven by the checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameHead {
    pub(super) kind: FrameKind,
    /// Bytes of the payload, at most [`PAYLOAD_BYTES_MAX`].
    pub(super) length: usize,
    pub(super) sequence: u64,
    pub(super) batch: u64,
}

impl FrameHead {
    /// Reads what stands there; the checksum needs the whole frame, see [`is_whole`].
    pub(super) fn decode(head: &[u8; FRAME_HEAD_BYTES]) -> Result<Self, &'static str> {
        if head[0..4] != FRAME_MAGIC {
            return Err("no frame begins here");
        }
        let length = usize::try_from(u32_at(head, 4)).unwrap_or(usize::MAX);
        if length > PAYLOAD_BYTES_MAX {
            return Err("the frame's length is beyond the limit");
        }
        let kind = match (u16_at(head, 24), u16_at(head, 26)) {
            (0, 0) => FrameKind::Record,
            (1, 0) => FrameKind::CheckpointEnd,
            _ => return Err("the frame is of a kind that does not exist"),
        };
        Ok(Self { kind, length, sequence: u64_at(head, 8), batch: u64_at(head, 16) })
    }

    /// Bytes of the whole frame.
    pub(super) fn framed(&self) -> usize {
        framed_bytes(self.length)
    }

    /// Appends the frame to `to`.
    pub(super) fn encode(&self, payload: &[u8], salt: u32, to: &mut Vec<u8>) {
        debug_assert_eq!(payload.len(), self.length);
        let kind: u16 = match self.kind {
            FrameKind::Record => 0,
            FrameKind::CheckpointEnd => 1,
        };
        let length = u32::try_from(self.length).unwrap_or(u32::MAX);
        let start = to.len();
        to.extend_from_slice(&FRAME_MAGIC);
        to.extend_from_slice(&length.to_le_bytes());
        to.extend_from_slice(&self.sequence.to_le_bytes());
        to.extend_from_slice(&self.batch.to_le_bytes());
        to.extend_from_slice(&kind.to_le_bytes());
        to.extend_from_slice(&[0; 6]);
        to.extend_from_slice(payload);
        to.resize(start + self.framed(), 0);
        let checksum = frame_checksum(&to[start..], salt);
        to[start + FRAME_CHECKSUM_AT..start + FRAME_HEAD_BYTES].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// Whether the bytes of a whole frame, at least [`FRAME_HEAD_BYTES`], are what was written.
pub(super) fn is_whole(frame: &[u8], salt: u32) -> bool {
    u32_at(frame, FRAME_CHECKSUM_AT) == frame_checksum(frame, salt)
}

fn frame_checksum(frame: &[u8], salt: u32) -> u32 {
    let before = crc32c::crc32c_append(salt, &frame[..FRAME_CHECKSUM_AT]);
    crc32c::crc32c_append(before, &frame[FRAME_HEAD_BYTES..])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let mut number = [0; 2];
    number.copy_from_slice(&bytes[at..at + 2]);
    u16::from_le_bytes(number)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        kind: SegmentKind::Checkpoint,
        cluster: ClusterId([0xc1; 16]),
        segment: 3,
        generation: 2,
        first_sequence: 7,
    };

    /// The format on disk: if this fails, old journals are no longer read, and the version must rise.
    #[test]
    fn golden_bytes_of_version_1() {
        let header = HEADER.encode();
        let mut expected = b"HFJL\x01\0\x02\0".to_vec();
        expected.extend([0xc1; 16]);
        expected.extend([3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0; 12]);
        assert_eq!(header[..60], expected);
        assert_eq!(Header::salt(&header), GOLDEN_SALT);
        let mut frame = Vec::new();
        FrameHead { kind: FrameKind::Record, length: 5, sequence: 7, batch: 64 }.encode(
            b"hello",
            GOLDEN_SALT,
            &mut frame,
        );
        let mut expected = b"HFJR\x05\0\0\0\x07\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        expected.extend(GOLDEN_FRAME_CHECKSUM.to_le_bytes());
        expected.extend(b"hello\0\0\0");
        assert_eq!(frame, expected);
    }
    /// Computed by another implementation of CRC32C.
    const GOLDEN_SALT: u32 = 0x702b_ced6;
    const GOLDEN_FRAME_CHECKSUM: u32 = 0x14b3_9bb0;

    #[test]
    fn every_flipped_bit_of_header_and_frame_is_noticed() {
        let whole = HEADER.encode();
        assert_eq!(Header::decode(&whole), Ok(HEADER));
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(Header::decode(&bytes), Err(HeaderProblem::Damaged(_))), "bit {bit}");
        }
        let mut frame = Vec::new();
        FrameHead { kind: FrameKind::Record, length: 5, sequence: 7, batch: 64 }
            .encode(b"hello", 9, &mut frame);
        assert!(is_whole(&frame, 9));
        assert!(!is_whole(&frame, 8), "a frame of another segment");
        for bit in 0..frame.len() * 8 {
            let mut bytes = frame.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_whole(&bytes, 9), "bit {bit}");
        }
    }

    #[test]
    fn another_version_is_told_from_a_damaged_header() {
        for version in [0_u16, 2, 77] {
            let mut bytes = HEADER.encode();
            bytes[4..6].copy_from_slice(&version.to_le_bytes());
            assert!(matches!(Header::decode(&bytes), Err(HeaderProblem::Damaged(_))));
            let checksum = crc32c::crc32c(&bytes[..60]);
            bytes[60..].copy_from_slice(&checksum.to_le_bytes());
            assert_eq!(Header::decode(&bytes), Err(HeaderProblem::Version(version)));
        }
    }

    #[test]
    fn only_our_own_file_names_are_ours() {
        assert_eq!(segment_of(&file_name(0xab)), Some(0xab));
        for name in ["journal-ab.log", "journal-00000000000000AB.log", "kek", "journal-+0000000000000ab.log"]
        {
            assert_eq!(segment_of(name), None, "{name}");
        }
    }
}
