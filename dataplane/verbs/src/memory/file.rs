//! [`FileMapping`]: a range of a file for a device to read, or for the kernel to send, and for nobody else.
//!
//! ```text
//!   file ── page cache ◄── FileMapping: shared, read-only ─┬─ MemoryRegistration pins the pages ──► the device reads them
//!                │                                         └─ SendSegment::file ──► the kernel copies them to a socket
//!                └── read and written by others with system calls, at the same time
//! ```
//!
//! No byte of it is ever touched by this process: there is no way to. So no `SIGBUS` can come of it, whatever becomes of
//! the file: the only access is the kernel's own, when it pins the pages or copies them, and that fails with an error. What is
//! pinned stays: a device never faults.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use memmap2::{MmapOptions, MmapRaw};
use rustix::param::page_size;

use super::{OutOfRange, check_range};
use crate::gauges::MAPPED_BYTES;

/// Pages that are asked for with one call: a megabyte, where they have 4 KiB.
const PAGES_AT_ONCE: usize = 256;

/// A shared, read-only mapping of some bytes of a file. Has an address for the device, and no accessor.
pub struct FileMapping {
    map: MmapRaw,
}

impl FileMapping {
    /// Maps `len` bytes (at least one) from `offset` on. The file may be open for reading alone. That the bytes are there
    /// is not looked at: who pins the mapping is told.
    ///
    /// # Errors
    /// The kernel's: `EACCES` if the file is not open for reading, `ENODEV` if it can't be mapped.
    pub fn new(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a mapping of zero bytes asked for"));
        }
        let map = MmapOptions::new().offset(offset).len(len).map_raw_read_only(&file)?;
        MAPPED_BYTES.add(len as u64);
        Ok(Self { map })
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// True if all pages of the range are in memory: to send them waits for no disk. Only an [honest](Self::is_honest) mapping
    /// says so truly. Costs one system call for a megabyte.
    ///
    /// # Errors
    /// The kernel's; [`OutOfRange`] as `InvalidInput`.
    pub fn is_resident(&self, range: Range<usize>) -> io::Result<bool> {
        check_range(&range, self.map.len())?;
        let page = page_size();
        let before = self.map.as_ptr().addr() % page;
        let mut start = (range.start + before) / page * page;
        let end = range.end + before;
        let mut pages = [0u8; PAGES_AT_ONCE];
        while start < end {
            let length = (end - start).min(PAGES_AT_ONCE * page);
            let pages = &mut pages[..length.div_ceil(page)];
            let at = self.map.as_mut_ptr().wrapping_sub(before).wrapping_add(start);
            // SAFETY: the pages lie within the mapping, which begins `before` bytes before its first byte and is alive; nothing of
            // them is touched. The kernel writes one byte for each page, and there is room for as many.
            if unsafe { libc::mincore(at.cast(), length, pages.as_mut_ptr()) } != 0 {
                return Err(io::Error::last_os_error());
            }
            if pages.iter().any(|page| page & 1 == 0) {
                return Ok(false);
            }
            start += length;
        }
        Ok(true)
    }

    /// True if the kernel tells this process which pages of the file are in memory. Of files that it could not open for writing it
    /// says of all that they are. `beyond` is a place that is far behind the end of the file: nothing of it can be in memory.
    ///
    /// # Errors
    /// The kernel's, as of [`FileMapping::new`].
    pub fn is_honest(file: BorrowedFd<'_>, beyond: u64) -> io::Result<bool> {
        Ok(!Self::new(file, beyond, 1)?.is_resident(0..1)?)
    }

    /// Part of it, for the kernel alone.
    pub(super) fn raw(&self, range: Range<usize>) -> Result<(*const u8, usize), OutOfRange> {
        check_range(&range, self.map.len())?;
        Ok((self.map.as_ptr().wrapping_add(range.start), range.len()))
    }

    /// Virtual address of the first byte asked for; not page-aligned unless the offset was.
    pub fn addr(&self) -> u64 {
        self.map.as_ptr() as u64
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        MAPPED_BYTES.sub(self.map.len() as u64);
    }
}

impl std::fmt::Debug for FileMapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileMapping").field("len", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, AsRawFd};

    fn file(len: usize, options: &mut std::fs::OpenOptions) -> std::fs::File {
        let made = rustix::fs::memfd_create("file-mapping", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&made, &vec![1; len], 0).unwrap();
        options.open(format!("/proc/self/fd/{}", made.as_raw_fd())).unwrap()
    }

    #[test]
    fn any_range_of_a_file_open_for_reading_is_mapped() {
        let file = file(10_000, std::fs::OpenOptions::new().read(true));
        let mapping = FileMapping::new(file.as_fd(), 5000, 3000).unwrap();
        assert_eq!((mapping.len(), mapping.addr() % 4096), (3000, 5000 % 4096));
        // Beyond the end too: nobody touches it.
        assert_eq!(FileMapping::new(file.as_fd(), 1 << 20, 4096).unwrap().len(), 4096);
    }

    #[test]
    fn it_says_which_pages_are_in_memory() {
        const PAGE: usize = 4096;
        const LENGTH: usize = 600 * PAGE;
        let made = rustix::fs::memfd_create("file-mapping", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&made, LENGTH as u64).unwrap();
        rustix::io::pwrite(&made, &vec![1; 300 * PAGE], 100 * PAGE as u64).unwrap();
        assert!(FileMapping::is_honest(made.as_fd(), LENGTH as u64 + (1 << 30)).unwrap());
        for before in [0, 5000] {
            let mapping = FileMapping::new(made.as_fd(), before as u64, LENGTH - before).unwrap();
            let resident =
                |start: usize, end: usize| mapping.is_resident(start - before..end - before).unwrap();
            assert!(resident(100 * PAGE, 400 * PAGE));
            assert!(resident(100 * PAGE + 1, 100 * PAGE + 2) && resident(399 * PAGE + 4095, 400 * PAGE));
            assert!(!resident(100 * PAGE - 1, 200 * PAGE), "the first page is a hole");
            assert!(!resident(200 * PAGE, 400 * PAGE + 1), "the last page is a hole");
            assert!(!resident(390 * PAGE, LENGTH));
            assert!(mapping.is_resident(LENGTH..LENGTH + 1).is_err());
        }
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        let readable = file(5, std::fs::OpenOptions::new().read(true));
        assert_eq!(FileMapping::new(readable.as_fd(), 0, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let write_only = file(5, std::fs::OpenOptions::new().write(true));
        let refused = FileMapping::new(write_only.as_fd(), 0, 5).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }
}
