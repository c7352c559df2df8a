//! What travels on the socket of a local channel, beside the rings: notes of 24 bytes, some with a descriptor (SCM_RIGHTS).
//!
//! | offset | bytes | field   | meaning |
//! |-------:|------:|---------|---------|
//! | 0      | 1     | kind    | 1 Area, 2 Ready, 3 Bell, 4 Region, 5 Withdrawn, 6 Descriptor |
//! | 1      | 1     | access  | Region: 1 Fetch, 2 Place, 3 both; else 0 |
//! | 2      | 2     | slot    | Region, Withdrawn: the registration's word in the area; Area: the layout's version, 1; else 0 |
//! | 4      | 4     | length  | Area: bytes of each ring; Region: its length; else 0 |
//! | 8      | 8     | address | Area: bytes of regions that may be shared at once; Region: as in the region descriptor; else 0 |
//! | 16     | 4     | rkey    | Area: regions that may be; Region, Withdrawn: as in the region descriptor; else 0 |
//! | 20     | 4     | zero    | 0 |
//!
//! Everything is little endian. Area comes first, from the server, with the area's descriptor; Ready answers it. Region and
//! Withdrawn come from the client, Descriptor from the server: the next message with one has it; it comes without if it was lost on
//! the way. Bell wakes who has said in the area that it sleeps. Anything else ends the channel.

use crate::channel::RemoteAccess;
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::{
    RecvSegment, SendSegment, recv_segments_and_descriptor, send_segments, send_segments_and_descriptor,
};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a note.
pub(super) const NOTE_BYTES: usize = size_of::<Bytes>();
/// The area's layout: see [`super::area`].
const VERSION: u16 = 1;
/// Notes taken with one system call.
const BATCH: usize = 32;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Bytes {
    kind: u8,
    access: u8,
    slot: U16,
    length: U32,
    address: U64,
    rkey: U32,
    zero: U32,
}

/// A note, understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Note {
    /// The rings, and what may be shared.
    Area { ring_bytes: u32, regions_max: u32, bytes_max: u64 },
    /// The client has the area.
    Ready,
    /// Look at the rings.
    Bell,
    /// A region is shared.
    Region { slot: u16, access: RemoteAccess, region: RegionDescriptor },
    /// It is not any more.
    Withdrawn { slot: u16, rkey: u32 },
    /// For the next message with a descriptor.
    Descriptor,
}

impl Note {
    fn encode(self) -> Bytes {
        let mut bytes = Bytes {
            kind: 0,
            access: 0,
            slot: U16::ZERO,
            length: U32::ZERO,
            address: U64::ZERO,
            rkey: U32::ZERO,
            zero: U32::ZERO,
        };
        match self {
            Self::Area { ring_bytes, regions_max, bytes_max } => {
                (bytes.kind, bytes.slot) = (1, VERSION.into());
                bytes.length = ring_bytes.into();
                bytes.rkey = regions_max.into();
                bytes.address = bytes_max.into();
            }
            Self::Ready => bytes.kind = 2,
            Self::Bell => bytes.kind = 3,
            Self::Region { slot, access, region } => {
                (bytes.kind, bytes.slot) = (4, slot.into());
                bytes.access = match access {
                    RemoteAccess::Fetch => 1,
                    RemoteAccess::Place => 2,
                    RemoteAccess::FetchAndPlace => 3,
                };
                bytes.length = region.length().into();
                bytes.rkey = region.rkey().into();
                bytes.address = region.address().into();
            }
            Self::Withdrawn { slot, rkey } => {
                (bytes.kind, bytes.slot, bytes.rkey) = (5, slot.into(), rkey.into());
            }
            Self::Descriptor => bytes.kind = 6,
        }
        bytes
    }

    fn decode(bytes: &[u8; NOTE_BYTES]) -> Result<Self, &'static str> {
        let bytes = Bytes::read_from_bytes(bytes).map_err(|_| "a note of a wrong size")?;
        let (slot, length, rkey) = (bytes.slot.get(), bytes.length.get(), bytes.rkey.get());
        let note = match (bytes.kind, bytes.access) {
            (1, _) if slot == VERSION => {
                Self::Area { ring_bytes: length, regions_max: rkey, bytes_max: bytes.address.get() }
            }
            (1, _) => return Err("another version of the area's layout"),
            (2, _) => Self::Ready,
            (3, _) => Self::Bell,
            (4, 1..=3) if length > 0 => {
                let access = match bytes.access {
                    1 => RemoteAccess::Fetch,
                    2 => RemoteAccess::Place,
                    _ => RemoteAccess::FetchAndPlace,
                };
                let region = RegionDescriptor::new(bytes.address.get(), rkey, length);
                Self::Region { slot, access, region }
            }
            (5, _) => Self::Withdrawn { slot, rkey },
            (6, _) => Self::Descriptor,
            _ => return Err("an unknown kind of note"),
        };
        // One way to say it: what does not belong to the kind is zero.
        if note.encode().as_bytes() == bytes.as_bytes() {
            Ok(note)
        } else {
            Err("a note with more than it says")
        }
    }

    /// Sends it whole, and a duplicate of `descriptor` with it.
    ///
    /// # Errors
    /// The kernel's; then nothing was sent.
    pub(super) fn send(self, socket: BorrowedFd<'_>, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = self.encode();
        let segments = [SendSegment::slice(bytes.as_bytes())];
        let count = match descriptor {
            Some(descriptor) => send_segments_and_descriptor(socket, &segments, descriptor)?,
            None => send_segments(socket, &segments)?,
        };
        // A Unix socket takes so few bytes whole, or not.
        if count == NOTE_BYTES { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

/// What a look at the socket found.
pub(super) enum Found {
    /// Nothing, for now.
    Nothing,
    /// The peer has gone.
    Gone,
    /// Notes.
    Notes,
}

/// Notes on their way in.
#[derive(Default)]
pub(super) struct Inbox {
    bytes: [[u8; NOTE_BYTES]; BATCH],
    /// Bytes that have come, and whole notes of them that were handed out.
    filled: usize,
    taken: usize,
    /// Came with the notes that were received last, and belongs to the last of them.
    descriptor: Option<OwnedFd>,
}

impl Inbox {
    /// Takes what is there with one system call; all that was taken before must have been handed out.
    pub(super) fn look(&mut self, socket: BorrowedFd<'_>) -> io::Result<Found> {
        // What is left is less than a note.
        let start = self.taken * NOTE_BYTES;
        self.bytes.as_flattened_mut().copy_within(start..self.filled.max(start), 0);
        (self.filled, self.taken) = (self.filled.saturating_sub(start), 0);
        self.descriptor = None;
        let room = self.bytes.as_flattened_mut().get_mut(self.filled..).unwrap_or_default();
        match recv_segments_and_descriptor(socket, &mut [RecvSegment::slice(room)]) {
            Ok((0, _)) => Ok(Found::Gone),
            Ok((count, descriptor)) => {
                self.filled += count;
                self.descriptor = descriptor;
                Ok(Found::Notes)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Found::Nothing),
            // It went with notes of ours unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Found::Gone),
            Err(error) => Err(error),
        }
    }

    /// The next note, with the descriptor that came with it.
    pub(super) fn next(&mut self) -> Option<Result<(Note, Option<OwnedFd>), &'static str>> {
        if (self.taken + 1) * NOTE_BYTES > self.filled {
            return None;
        }
        let bytes = self.bytes.get(self.taken)?;
        self.taken += 1;
        let is_last = (self.taken + 1) * NOTE_BYTES > self.filled;
        let descriptor = self.descriptor.take_if(|_| is_last);
        Some(Note::decode(bytes).map(|note| (note, descriptor)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn all() -> [(Note, &'static str); 6] {
        let region = RegionDescriptor::new(0x1122_3344_5566_7788, 0xA1A2_A3A4, 0x100);
        let access = RemoteAccess::FetchAndPlace;
        [
            (
                Note::Area { ring_bytes: 0x2_0000, regions_max: 256, bytes_max: 1 << 30 },
                "010001000000020000000040000000000001000000000000",
            ),
            (Note::Ready, "020000000000000000000000000000000000000000000000"),
            (Note::Bell, "030000000000000000000000000000000000000000000000"),
            (Note::Region { slot: 5, access, region }, "0403050000010000887766554433221 1a4a3a2a100000000"),
            (
                Note::Withdrawn { slot: 5, rkey: 0xA1A2_A3A4 },
                "050005000000000000000000000000 00a4a3a2a100000000",
            ),
            (Note::Descriptor, "060000000000000000000000000000000000000000000000"),
        ]
    }

    #[test]
    fn golden_bytes() {
        for (note, golden) in all() {
            let bytes = note.encode();
            let hex: String = bytes.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, golden.replace(' ', ""), "{note:?}");
            assert_eq!(Note::decode(bytes.as_bytes().first_chunk().unwrap()), Ok(note));
        }
    }

    #[test]
    fn whatever_is_accepted_encodes_to_the_same_bytes() {
        let mut refused = 0;
        for (note, _) in all() {
            for index in 0..NOTE_BYTES {
                for value in 0..=u8::MAX {
                    let mut bytes = *note.encode().as_bytes().first_chunk::<NOTE_BYTES>().unwrap();
                    bytes[index] = value;
                    match Note::decode(&bytes) {
                        Ok(note) => assert_eq!(note.encode().as_bytes(), bytes),
                        Err(_) => refused += 1,
                    }
                }
            }
        }
        assert!(refused > 1000);
    }

    #[test]
    fn a_descriptor_comes_with_its_note_among_others() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        for (note, _) in all() {
            let with = matches!(note, Note::Area { .. } | Note::Descriptor).then(|| writer.as_fd());
            note.send(ours.as_fd(), with).unwrap();
        }
        let (mut inbox, mut seen) = (Inbox::default(), Vec::new());
        while seen.len() < 6 {
            assert!(matches!(inbox.look(theirs.as_fd()).unwrap(), Found::Notes));
            while let Some(note) = inbox.next() {
                let (note, descriptor) = note.unwrap();
                assert_eq!(descriptor.is_some(), matches!(note, Note::Area { .. } | Note::Descriptor));
                seen.push(note);
            }
        }
        assert_eq!(seen, all().map(|(note, _)| note));
        drop((reader, writer));
    }

    #[test]
    fn parts_of_notes_wait_for_the_rest_and_the_end_is_told() {
        use std::io::Write;
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut inbox = Inbox::default();
        theirs.set_nonblocking(true).unwrap();
        for (count, byte) in Note::Bell.encode().as_bytes().iter().enumerate() {
            assert!(inbox.next().is_none(), "after {count} bytes");
            ours.write_all(&[*byte]).unwrap();
            assert!(matches!(inbox.look(theirs.as_fd()).unwrap(), Found::Notes));
        }
        assert!(matches!(inbox.next(), Some(Ok((Note::Bell, None)))));
        assert!(matches!(inbox.look(theirs.as_fd()).unwrap(), Found::Nothing));
        drop(ours);
        assert!(matches!(inbox.look(theirs.as_fd()).unwrap(), Found::Gone));
    }
}
