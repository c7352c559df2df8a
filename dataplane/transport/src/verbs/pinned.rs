//! Files whose pages a device sends from, without a copy by any processor.
//!
//! ```text
//!   file ── page cache ◄─ pinned, local, for reading ─ PinnedFile ─ Channel::place_pinned ─► RDMA WRITE ─► the peer's region
//! ```
//!
//! No peer can name the pages: they are registered without remote access, and what leaves is what this side posts. What
//! is pinned stays, also after the file was cut short or punched: whoever uses it asks first whether the file is the same.

use super::io_error;
use holdfast_verbs::memory::FileMapping;
use holdfast_verbs::{Local, MemoryRegistration, ProtectionDomain, VerbsError};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Pins files for the channels of one device that one listener accepts. Usable from any thread.
#[derive(Clone)]
pub struct Pinner(pub(super) Arc<ProtectionDomain>);

impl Pinner {
    /// Pins `length` bytes (at least one) of a file from `offset` on. May wait for the disk.
    ///
    /// # Errors
    /// The kernel's: `EFAULT` if the file ends before, or this kernel pins no pages for reading alone; the device's, for want
    /// of lockable memory with a text that says how to raise the limit.
    pub fn pin(&self, file: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<PinnedFile> {
        let mapping = FileMapping::new(file, offset, length)?;
        MemoryRegistration::of_file(&self.0, mapping).map(PinnedFile).map_err(io_error)
    }

    /// The same number for all channels that can place what this one pins, and for no others as long as something is pinned.
    pub fn id(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

impl std::fmt::Debug for Pinner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinner").finish_non_exhaustive()
    }
}

/// Pinned pages of a file. Dropping the last of it unpins them, page by page; channels hold it while they place from it.
#[derive(Debug)]
pub struct PinnedFile(Arc<MemoryRegistration>);

impl PinnedFile {
    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if no channel is placing from it: dropping it unpins the pages there and then.
    pub fn is_idle(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    pub(super) fn local(&self, range: Range<usize>) -> Result<Local, VerbsError> {
        Local::file(&self.0, range)
    }

    pub(super) fn is_of(&self, domain: &Arc<ProtectionDomain>) -> bool {
        Arc::ptr_eq(self.0.domain(), domain)
    }
}
