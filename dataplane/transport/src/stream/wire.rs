//! [`Wire`]: what carries the bytes of a stream, and what it can do beside.
//!
//! ```text
//!   Transmit ── pieces ──► Wire ── rooms ──► Receive         socket.rs: a connected socket
//!   Place, Fetch ── reach ──► memory of the peer,            local/wire.rs: rings in shared memory
//!                             if the wire gets at it
//! ```

use super::Ending;
use crate::channel::{Armed, Registrar};
use crate::region_table::{RegionTable, TableRegistrar, Wanted};
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::{FileMapping, PeerBytes, Region};
use rustix::net::Shutdown;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Most pieces, or rooms, that one call looks at.
pub(crate) const PIECES_MAX: usize = holdfast_verbs::memory::MAX_SEGMENTS;

/// Bytes to send.
pub(crate) enum Piece<'a> {
    Slice(&'a [u8]),
    /// Of a region, which the range lies within.
    Region(&'a Region, Range<usize>),
    /// Of a file, if the wire [takes](Wire::TAKES_FILES) it.
    File(&'a FileMapping, Range<usize>),
}

impl Piece<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Slice(bytes) => bytes.len(),
            Self::Region(_, range) | Self::File(_, range) => range.len(),
        }
    }
}

/// Where received bytes go.
pub(crate) enum Room<'a> {
    Slice(&'a mut [u8]),
    /// Of a region, which the range lies within.
    Region(&'a Region, Range<usize>),
}

impl Room<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Slice(bytes) => bytes.len(),
            Self::Region(_, range) => range.len(),
        }
    }
}

/// Carries bytes both ways, in order. Nothing here waits.
pub(crate) trait Wire: Send + Sized {
    /// True if a call that moves nothing is no system call.
    const IS_CHEAP: bool;
    /// Bytes received beyond the payload under way, in the hope that they are the next frames: many save calls, few save copies.
    const STAGING_BYTES: usize;
    /// True if what it sends is copied by the kernel, which alone may touch a mapped file.
    const TAKES_FILES: bool = false;

    /// Sends from the first [`PIECES_MAX`] pieces, as much as is taken now; `None` if nothing is, and then it makes an edge of the
    /// wake descriptor when something would be. (One that is not cheap does so too if it takes less than it was given,
    /// unless a file's pages are gone.)
    fn send(&mut self, pieces: &[Piece<'_>]) -> Result<Option<usize>, Ending>;

    /// Receives into the first [`PIECES_MAX`] rooms; `None` if nothing has come, [`Ending::Disconnected`] if nothing will.
    fn recv(&mut self, rooms: &mut [Room<'_>]) -> Result<Option<usize>, Ending>;

    /// Gives the peer a duplicate of the descriptor, for the next message that says it has one. False if that can't be.
    fn send_descriptor(&mut self, descriptor: OwnedFd) -> bool {
        drop(descriptor);
        false
    }

    /// The descriptor of the message that has come, if it was not lost.
    fn take_descriptor(&mut self) -> Result<Option<OwnedFd>, Ending> {
        Err(Ending::Misbehaved("it sends a descriptor where none is taken"))
    }

    /// Gives `act` the peer's memory that `remote` names, if the wire gets at it and it is allowed; else false, and the peer is to be
    /// asked.
    fn reach(
        &mut self,
        remote: RegionDescriptor,
        wanted: Wanted,
        act: &mut dyn FnMut(PeerBytes<'_>),
    ) -> Result<bool, Ending> {
        let _ = (remote, wanted, act);
        Ok(false)
    }

    /// Makes an edge of the wake descriptor when something comes, if nothing has. `was_empty`: the last [`Wire::recv`] found
    /// nothing, and no edge has been passed over since. `is_stalled`: what comes is not wanted, but that the peer goes is.
    fn arm(&mut self, was_empty: bool, is_stalled: bool) -> Result<Armed, Ending>;

    /// The wake descriptor.
    fn wake_fd(&self) -> BorrowedFd<'_>;

    /// See [`crate::Channel::bound`].
    fn bound(&mut self, is_bound: bool) {
        let _ = is_bound;
    }

    /// Ends it: nothing is received any more, nor does the peer get at memory of this side.
    fn cut(&mut self, how: Shutdown);

    /// Registers memory of this side in the table, by which frames of the peer reach it.
    fn registrar(&self, table: &Arc<RegionTable>) -> Arc<dyn Registrar> {
        Arc::new(TableRegistrar(Arc::clone(table)))
    }
}
