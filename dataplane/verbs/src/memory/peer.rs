//! [`PeerRegion`]: memory of another process, mapped here, for the kernel to copy to and from, and for nobody else.
//!
//! ```text
//!   a buffer's bytes ──process_vm_writev──►  PeerRegion: a shared mapping of the other      ◄──► its own mapping, a Region
//!   a buffer's room  ◄──process_vm_readv───  process's memory file; an address, no accessor
//! ```
//!
//! The other process may do with its memory what it wants, at any moment: write it, make holes in it, let there be no memory for what is
//! touched. So no instruction of this process ever touches it: the kernel copies, and answers `EFAULT` where a processor would
//! have got a signal that ends the process.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

use memmap2::{MmapOptions, MmapRaw};

use super::memfd::sealed_len;
use super::nowait::once;
use super::{OutOfRange, span};
use crate::gauges::MAPPED_BYTES;

/// All bytes of a region of another process.
pub struct PeerRegion {
    map: MmapRaw,
}

impl PeerRegion {
    /// Maps the first `len` bytes of what another process says is a memory file of its own; keeps no descriptor.
    ///
    /// # Errors
    /// `InvalidInput` if it is not: see [`super::Region::shareable`] for what is; if it is shorter; if `len` is 0. The kernel's.
    pub fn map(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        if len == 0 || sealed_len(file)? < len as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a memory file shorter than it should be",
            ));
        }
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        MAPPED_BYTES.add(len as u64);
        Ok(Self { map })
    }

    /// True if this kernel, and what confines this process, let it copy this way.
    pub fn is_possible() -> bool {
        static POSSIBLE: OnceLock<bool> = OnceLock::new();
        *POSSIBLE.get_or_init(|| {
            let tried = super::Region::shareable(1).and_then(|region| {
                let file = region.file().ok_or(io::ErrorKind::Unsupported)?;
                let mapped = Self::map(file, 1)?;
                mapped.store(0, b"x")?;
                mapped.load(0, &mut [0])
            });
            tried.is_ok()
        })
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Copies `data` to the bytes from `offset` on. After an error some may have been copied.
    ///
    /// # Errors
    /// `InvalidInput` for bytes outside; the kernel's.
    pub fn store(&self, offset: usize, data: &[u8]) -> io::Result<()> {
        let there = self.iovec(offset, data.len())?;
        let here = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        // SAFETY: `here` names the bytes of `data`, borrowed for the call and only read; `there` lies within the mapping, which lives
        // as long as self, and of which no reference exists: nothing but such calls reaches it in this process.
        let copied = once(|| unsafe {
            libc::process_vm_writev(libc::getpid(), &raw const here, 1, &raw const there, 1, 0)
        })?;
        whole(copied, data.len())
    }

    /// Copies the bytes from `offset` on to `data`, filling it. They may be torn if the other process writes them. After an
    /// error some may have been copied.
    ///
    /// # Errors
    /// As [`PeerRegion::store`].
    pub fn load(&self, offset: usize, data: &mut [u8]) -> io::Result<()> {
        let there = self.iovec(offset, data.len())?;
        let here = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        // SAFETY: `here` names the bytes of `data`, exclusively borrowed for the call; `there` as in `store`.
        let copied = once(|| unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const here, 1, &raw const there, 1, 0)
        })?;
        whole(copied, data.len())
    }

    fn iovec(&self, offset: usize, count: usize) -> Result<libc::iovec, OutOfRange> {
        let range = span(offset, count, self.len())?;
        // An address only: nothing is reached through it here.
        let start = self.map.as_mut_ptr().wrapping_add(range.start);
        Ok(libc::iovec { iov_base: start.cast(), iov_len: count })
    }
}

/// The kernel copies up to what it could not reach.
fn whole(copied: usize, wanted: usize) -> io::Result<()> {
    if copied == wanted { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EFAULT)) }
}

impl Drop for PeerRegion {
    fn drop(&mut self) {
        MAPPED_BYTES.sub(self.map.len() as u64);
    }
}

impl std::fmt::Debug for PeerRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerRegion").field("len", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;

    #[test]
    fn bytes_go_both_ways_and_nowhere_else() {
        let region = Region::shareable(20_000).unwrap();
        let peer = PeerRegion::map(region.file().unwrap(), 20_000).unwrap();
        assert!(PeerRegion::is_possible());
        peer.store(4090, &[7; 100]).unwrap();
        let mut all = vec![0; 20_000];
        region.copy_out(0, &mut all).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte == 7).count(), 100);
        assert_eq!((all[4089], all[4090], all[4189], all[4190]), (0, 7, 7, 0));
        region.copy_in(19_000, b"from the other side").unwrap();
        let mut there = [0; 19];
        peer.load(19_000, &mut there).unwrap();
        assert_eq!(&there, b"from the other side");
        for (offset, count) in [(19_999, 2), (20_001, 0), (usize::MAX, 1)] {
            assert!(peer.store(offset, &[1; 2][..count]).is_err());
            assert!(peer.load(offset, &mut [0; 2][..count]).is_err());
        }
        peer.store(20_000, &[]).unwrap();
    }

    #[test]
    fn a_hole_that_the_owner_makes_is_no_trouble() {
        let region = Region::shareable(3 * 4096).unwrap();
        let peer = PeerRegion::map(region.file().unwrap(), 3 * 4096).unwrap();
        peer.store(0, &[9; 3 * 4096]).unwrap();
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(region.file().unwrap(), punch, 4096, 4096).unwrap();
        let mut bytes = [1; 3 * 4096];
        peer.load(0, &mut bytes).unwrap();
        assert_eq!((bytes[4095], bytes[4096], bytes[8191], bytes[8192]), (9, 0, 0, 9));
        peer.store(5000, &[3; 10]).unwrap();
    }

    #[test]
    fn what_is_not_such_a_file_or_shorter_is_refused() {
        let region = Region::shareable(5000).unwrap();
        assert!(PeerRegion::map(region.file().unwrap(), 0).is_err());
        assert!(PeerRegion::map(region.file().unwrap(), 5001).is_err());
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        use std::os::fd::AsFd;
        assert_eq!(PeerRegion::map(reader.as_fd(), 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
