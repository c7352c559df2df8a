//! Files of memory that two processes share: made, sealed, and looked at before they are believed.
//!
//! ```text
//!   maker:  create ── allocated to the last page, sealed: neither shorter nor longer ──► descriptor to the other process
//!   taker:  sealed_len ── really the kernel's own tmpfs, sealed so, so long ──► map ──► freeze: nobody makes holes any more
//!   maker:  is_frozen ──► touch it
//! ```
//!
//! What is touched beyond the end of a file, or where there is no memory for a hole of it, ends a process (`SIGBUS`). The seals exclude the
//! first. The second can happen where memory is accounted strictly (`vm.overcommit_memory=2`) and the other process has made a hole:
//! a frozen file has none, and gets none.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use super::nowait::IN_MEMORY;

/// Neither shorter nor longer.
const FIXED: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);
/// What `stat` counts in.
const BLOCK_BYTES: u64 = 512;
/// Nobody maps it for writing who has not, writes it by system calls, or makes holes; and nobody changes that.
const FROZEN: SealFlags = SealFlags::FUTURE_WRITE.union(SealFlags::SEAL);

/// A file of `len` zero bytes, all allocated, whose length is sealed.
pub(super) fn create(name: &str, len: usize) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let bytes = len as u64;
    rustix::fs::ftruncate(&file, bytes)?;
    // Here a shortage is an error.
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
    rustix::fs::fcntl_add_seals(&file, FIXED)?;
    Ok(file)
}

/// Length of a file that another process gave: it is a memory file of pages of the usual size, and stays as long as it is.
///
/// # Errors
/// `InvalidInput` if it is anything else; the kernel's.
pub(super) fn sealed_len(file: BorrowedFd<'_>) -> io::Result<u64> {
    let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    // Also hugetlbfs has seals; there a page may lack when it is touched.
    if rustix::fs::fstatfs(file)?.f_type != IN_MEMORY[0] {
        return refused("a descriptor that is no memory file");
    }
    // Only memory files can have these: so it is not of a mounted tmpfs, which can be full.
    if !rustix::fs::fcntl_get_seals(file)?.contains(FIXED) {
        return refused("a memory file whose length is not sealed");
    }
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or_default())
}

/// Ends all changes of the file but by mappings that exist, for everybody who has it.
pub(super) fn freeze(file: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::fcntl_add_seals(&file, FROZEN)?)
}

/// True if it is frozen and has no hole in its `len` bytes.
pub(super) fn is_frozen(file: impl AsFd, len: usize) -> io::Result<bool> {
    // First the seals: after them no hole can come. (`SEEK_HOLE` takes pages that nobody has touched yet for holes.)
    let sealed = rustix::fs::fcntl_get_seals(&file)?.contains(FIXED | FROZEN);
    Ok(sealed && is_allocated(&file, len)?)
}

/// True if it has no hole in its `len` bytes at this moment.
pub(super) fn is_allocated(file: impl AsFd, len: usize) -> io::Result<bool> {
    let blocks = u64::try_from(rustix::fs::fstat(&file)?.st_blocks).unwrap_or_default();
    Ok(blocks.saturating_mul(BLOCK_BYTES) >= len as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_was_made_is_taken_and_cannot_be_resized() {
        let file = create("memfd-test", 10_000).unwrap();
        assert_eq!(sealed_len(file.as_fd()).unwrap(), 10_000);
        for length in [0, 9_999, 10_001] {
            assert!(rustix::fs::ftruncate(&file, length).is_err());
        }
    }

    #[test]
    fn a_frozen_file_has_no_hole_and_gets_none() {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let file = create("memfd-test", 16 << 10).unwrap();
        assert!(!is_frozen(&file, 16 << 10).unwrap(), "not yet");
        freeze(&file).unwrap();
        assert!(is_frozen(&file, 16 << 10).unwrap());
        assert!(rustix::fs::fallocate(&file, punch, 4096, 4096).is_err());
        assert!(rustix::io::pwrite(&file, b"x", 0).is_err());
        let holed = create("memfd-test", 16 << 10).unwrap();
        rustix::fs::fallocate(&holed, punch, 4096, 4096).unwrap();
        freeze(&holed).unwrap();
        assert!(!is_frozen(&holed, 16 << 10).unwrap(), "it has a hole");
    }

    #[test]
    fn anything_else_is_refused() {
        let open = |path: &str| std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let kind = |file: BorrowedFd<'_>| sealed_len(file).unwrap_err().kind();
        assert_eq!(kind(open("/dev/null").as_fd()), io::ErrorKind::InvalidInput);
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(kind(reader.as_fd()), io::ErrorKind::InvalidInput);
        let loose = rustix::fs::memfd_create("memfd-test", MemfdFlags::ALLOW_SEALING).unwrap();
        assert_eq!(kind(loose.as_fd()), io::ErrorKind::InvalidInput, "not sealed");
        rustix::fs::fcntl_add_seals(&loose, SealFlags::GROW).unwrap();
        assert_eq!(kind(loose.as_fd()), io::ErrorKind::InvalidInput, "it could shrink");
        let huge = rustix::fs::memfd_create("memfd-test", MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB);
        if let Ok(huge) = huge {
            rustix::fs::fcntl_add_seals(&huge, FIXED).unwrap();
            assert_eq!(kind(huge.as_fd()), io::ErrorKind::InvalidInput, "huge pages");
        }
        // A second descriptor of the same file is the same file.
        let file = create("memfd-test", 1).unwrap();
        let again = open(&format!("/proc/self/fd/{}", file.as_raw_fd()));
        assert_eq!(sealed_len(again.as_fd()).unwrap(), 1);
    }
}
