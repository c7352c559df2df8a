//! The memory that data moves through: mapping, pool, region, and the system calls that take pieces of them.
//!
//! ```text
//!              ┌── Pool ── take() ──► Buffer ── drop ──┐     one owner at a time: &mut [u8] is true
//!   Memory ────┤     ▲                                 │
//!  (a mapping) │     └────────── free list ◄───────────┘
//!              └── Region        the peer may write it at any moment: no slice of it is ever made
//! ```
//!
//! The line between the two is what keeps the rest of Holdfast free of unsafe code:
//!
//! * Pool memory is registered with local access only, so no peer can name it. The device touches a [`Buffer`] only
//!   while a posted work request owns it.
//! * [`Region`] memory is shared with a peer. It is reached by copies made of atomic accesses, or by system calls.
//! * A [`FileMapping`] has an address for the device and for the kernel, and no byte that this process can touch.
//! * A [`PeerRegion`] is another process's region: the kernel copies to and from it, this process touches no byte of it.
//! * A [`SharedWord`] is a number in a region, reached by atomic accesses only.
//! * A [`MappedWord`] is one number of a file, reached by atomic accesses only.

mod file;
mod io;
mod mapping;
mod memfd;
mod nowait;
mod peer;
mod pool;
mod region;
mod word;

pub use file::FileMapping;
pub use io::{
    MAX_SEGMENTS, RecvSegment, SendSegment, advance_recv, advance_send, recv_segments,
    recv_segments_and_descriptor, send_segments, send_segments_and_descriptor,
};
pub use mapping::Memory;
pub use nowait::{IN_MEMORY, Nowait, pread_nowait, pwrite_nowait};
pub use peer::{PeerBytes, PeerRegion};
pub use pool::{Buffer, Pool};
pub use region::{Region, SharedWord};
pub use word::MappedWord;

use std::ops::Range;

/// A range that doesn't lie inside the memory it was meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {start}..{end} don't lie within the {len} bytes of the memory")]
pub struct OutOfRange {
    /// First byte asked for.
    pub start: usize,
    /// One past the last byte asked for (saturated if the sum overflows).
    pub end: usize,
    /// Length of the memory, in bytes.
    pub len: usize,
}

impl From<OutOfRange> for std::io::Error {
    fn from(error: OutOfRange) -> Self {
        Self::new(std::io::ErrorKind::InvalidInput, error)
    }
}

/// Checks that `range` is well-formed and lies within `len` bytes.
pub(crate) fn check_range(range: &Range<usize>, len: usize) -> Result<(), OutOfRange> {
    if range.start <= range.end && range.end <= len {
        Ok(())
    } else {
        Err(OutOfRange { start: range.start, end: range.end, len })
    }
}

/// The range of `count` bytes from `offset`, checked to lie within `len` bytes.
pub(crate) fn span(offset: usize, count: usize, len: usize) -> Result<Range<usize>, OutOfRange> {
    let range = offset..offset.saturating_add(count);
    // A saturated sum can't be mistaken for a fitting one: no memory is usize::MAX bytes long.
    check_range(&range, len)?;
    Ok(range)
}
