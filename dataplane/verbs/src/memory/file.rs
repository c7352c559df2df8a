//! [`FileMapping`]: a range of a file for a device to read, and for nobody else.
//!
//! ```text
//!   file ── page cache ◄── FileMapping: shared, read-only ── FileRegistration pins the pages ──► the device reads them
//!                │
//!                └── read and written by others with system calls, at the same time
//! ```
//!
//! No byte of it is ever touched by this process: there is no way to. So no `SIGBUS` can come of it, whatever becomes of
//! the file: the only access is the kernel's own, when it pins the pages, and that fails with an error. What is
//! pinned stays: a device never faults.

use std::io;
use std::os::fd::BorrowedFd;

use memmap2::{MmapOptions, MmapRaw};

use crate::gauges::MAPPED_BYTES;

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
    fn what_cannot_be_mapped_is_an_error() {
        let readable = file(5, std::fs::OpenOptions::new().read(true));
        assert_eq!(FileMapping::new(readable.as_fd(), 0, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let write_only = file(5, std::fs::OpenOptions::new().write(true));
        let refused = FileMapping::new(write_only.as_fd(), 0, 5).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }
}
