//! [`DirectIo`]: the way to a file past the page cache, for what is aligned.
//!
//! ```text
//!            offset, length and address aligned ─► the description for direct I/O ─► device ◄─► buffer, no copy
//!   piece ───┤
//!            └─ anything else ───────────────────► the open's own description ─► page cache, a copy
//! ```
//!
//! The kernel keeps both ways coherent: direct I/O first writes back what the page cache has of the range, and a direct write
//! drops it from there. So the ways may be mixed, which a client with unaligned requests does. What it does not keep coherent are pages
//! that are pinned: nothing of a volume of direct I/O is mapped for one-sided reads or pinned for long ones.

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where the kernel does not say (before 6.1, and some file systems): enough for every disk.
const ALIGN_UNKNOWN: u32 = 4096;

/// See the module's text.
#[derive(Debug)]
pub struct DirectIo {
    file: Arc<OwnedFd>,
    /// Of offset and length in the file, bytes; a power of two.
    offset_align: u64,
    /// Of the memory's address.
    memory_align: u64,
    /// The kernel did not take an operation that seemed to fit: it is not asked again.
    refused: AtomicBool,
}

impl DirectIo {
    /// `None` if the file system says that it has no direct I/O.
    pub fn new(file: OwnedFd) -> Option<Self> {
        let stat = rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let told = stat.filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        let (offset, memory) = told.map_or((ALIGN_UNKNOWN, ALIGN_UNKNOWN), |stat| {
            (stat.stx_dio_offset_align, stat.stx_dio_mem_align)
        });
        if !offset.is_power_of_two() || !memory.is_power_of_two() {
            return None;
        }
        Some(Self {
            file: Arc::new(file),
            offset_align: offset.into(),
            memory_align: memory.into(),
            refused: AtomicBool::new(false),
        })
    }

    /// The description.
    pub fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// True if an operation on so many bytes at `address` and `at` in the file can go this way.
    pub fn fits(&self, address: u64, length: usize, at: u64) -> bool {
        // What the kernel takes for an offset is signed.
        let end = at.checked_add(length as u64).is_some_and(|end| i64::try_from(end).is_ok());
        length > 0 && end && self.rounded(length) == length && self.begins(address, at)
    }

    /// True if one can that begins there, should its length be [rounded](DirectIo::rounded).
    pub fn begins(&self, address: u64, at: u64) -> bool {
        (at & (self.offset_align - 1)) | (address & (self.memory_align - 1)) == 0
            && !self.refused.load(Ordering::Relaxed)
    }

    /// The next length that fits.
    pub fn rounded(&self, length: usize) -> usize {
        let align = usize::try_from(self.offset_align).unwrap_or(usize::MAX);
        length.checked_next_multiple_of(align).unwrap_or(usize::MAX)
    }

    /// True if this is how the kernel says that it does not take the operation at all; then all goes through the page cache from
    /// now on.
    pub fn refuses(&self, error: &io::Error) -> bool {
        let refuses = matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::OPNOTSUPP));
        if refuses && !self.refused.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "direct I/O of a file is refused: it is served through the page cache");
        }
        refuses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_aligned_fits_and_nothing_after_a_refusal() {
        let file = rustix::fs::memfd_create("direct", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let refused = AtomicBool::new(false);
        let direct = DirectIo { file: Arc::new(file), offset_align: 4096, memory_align: 512, refused };
        assert!(direct.fits(512, 8192, 4096));
        assert!(!direct.fits(511, 8192, 4096) && !direct.fits(512, 8191, 4096));
        assert!(!direct.fits(512, 8192, 512) && !direct.fits(512, 0, 0));
        assert!(direct.begins(1024, 0) && !direct.fits(0, 8192, (1 << 63) - 4096), "beyond the last offset");
        assert_eq!(
            (direct.rounded(1), direct.rounded(4096), direct.rounded(usize::MAX)),
            (4096, 4096, usize::MAX)
        );
        assert!(!direct.refuses(&Errno::IO.into()) && direct.fits(0, 4096, 0));
        assert!(direct.refuses(&Errno::INVAL.into()) && !direct.fits(0, 4096, 0));
    }
}
