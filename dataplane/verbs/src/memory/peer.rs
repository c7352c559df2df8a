//! [`PeerRegion`]: memory of another process, mapped here, for the kernel to copy to and from, and for nobody else.
//!
//! ```text
//!   a buffer's bytes ──process_vm_writev──►  PeerRegion: a shared mapping of the other      ◄──► its own mapping, a Region
//!   a buffer's room  ◄──process_vm_readv───  process's memory file; an address, no accessor
//!   a file           ◄──preadv, pwritev───►
//! ```
//!
//! The other process may do with its memory what it wants, at any moment: write it, make holes in it, let there be no memory for what is
//! touched. So no instruction of this process ever touches it: the kernel copies, and answers `EFAULT` where a processor would
//! have got a signal that ends the process.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use super::memfd::{is_allocated, sealed_len};
use super::nowait::{Nowait, file_offset, nowait_result, once};
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
        // Holes would be filled at the cost of this process.
        if len == 0 || sealed_len(file)? < len as u64 || !is_allocated(file, len)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a memory file shorter than it should be, or with holes",
            ));
        }
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        // Another's bytes are nothing for a dump of this process.
        let _ = map.advise(memmap2::Advice::DontDump);
        MAPPED_BYTES.add(len as u64);
        Ok(Self { map })
    }

    /// True if this kernel, and what confines this process, let it copy this way.
    pub fn is_possible() -> bool {
        // Kept once it is so: what fails now may be possible later.
        static POSSIBLE: AtomicBool = AtomicBool::new(false);
        POSSIBLE.load(Ordering::Relaxed) || {
            let tried = super::Region::shareable(1).and_then(|region| {
                let file = region.file().ok_or(io::ErrorKind::Unsupported)?;
                let mapped = Self::map(file, 1)?;
                let bytes = mapped.bytes(0, 1)?;
                bytes.store(b"x")?;
                bytes.load(&mut [0])
            });
            POSSIBLE.store(tried.is_ok(), Ordering::Relaxed);
            tried.is_ok()
        }
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Some of its bytes, to be moved.
    ///
    /// # Errors
    /// If they do not lie inside.
    pub fn bytes(&self, offset: usize, len: usize) -> Result<PeerBytes<'_>, OutOfRange> {
        let range = span(offset, len, self.len())?;
        Ok(PeerBytes { region: self, start: range.start, len })
    }
}

/// Bytes of a [`PeerRegion`]. Each call moves the kernel to copy; after an error some may have been copied.
#[derive(Clone, Copy, Debug)]
pub struct PeerBytes<'a> {
    region: &'a PeerRegion,
    /// Together within the region.
    start: usize,
    len: usize,
}

impl PeerBytes<'_> {
    /// How many they are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `data`, which is not longer, to their beginning.
    ///
    /// # Errors
    /// `InvalidInput` if it is longer; the kernel's.
    pub fn store(&self, data: &[u8]) -> io::Result<()> {
        let there = libc::iovec { iov_len: data.len(), ..self.iovec(0)? };
        span(0, data.len(), self.len)?;
        let here = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        // SAFETY: `here` names the bytes of `data`, borrowed for the call and only read; `there` lies within the mapping, which lives
        // as long as the region, and of which no reference exists: nothing but such calls reaches it in this process.
        let copied = once(|| unsafe {
            libc::process_vm_writev(libc::getpid(), &raw const here, 1, &raw const there, 1, 0)
        })?;
        whole(copied, data.len())
    }

    /// Copies their beginning to `data`, filling it; it is not longer. The bytes may be torn if the other process writes them.
    ///
    /// # Errors
    /// As [`PeerBytes::store`].
    pub fn load(&self, data: &mut [u8]) -> io::Result<()> {
        let there = libc::iovec { iov_len: data.len(), ..self.iovec(0)? };
        span(0, data.len(), self.len)?;
        let here = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        // SAFETY: `here` names the bytes of `data`, exclusively borrowed for the call; `there` as in `store`.
        let copied = once(|| unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const here, 1, &raw const there, 1, 0)
        })?;
        whole(copied, data.len())
    }

    /// Reads from `file` at `at` into those from `done` on, as `pread`. Returns how many bytes came; 0 is the end of the file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read_file(&self, file: BorrowedFd<'_>, at: u64, done: usize) -> io::Result<usize> {
        let (iov, offset) = (self.iovec(done)?, file_offset(at)?);
        // SAFETY: as in `store`; `iov` lives across the call.
        once(|| unsafe { libc::preadv(file.as_raw_fd(), &raw const iov, 1, offset) })
    }

    /// As [`PeerBytes::read_file`], but only what the page cache holds: never waits for the disk.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read_file_nowait(&self, file: BorrowedFd<'_>, at: u64, done: usize) -> io::Result<Nowait> {
        let (iov, offset) = (self.iovec(done)?, file_offset(at)?);
        // SAFETY: as in `store`; `iov` lives across the call.
        nowait_result(once(|| unsafe {
            libc::preadv2(file.as_raw_fd(), &raw const iov, 1, offset, libc::RWF_NOWAIT)
        }))
    }

    /// Writes those from `done` on to `file` at `at`, as `pwrite`. Returns how many were written.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write_file(&self, file: BorrowedFd<'_>, at: u64, done: usize) -> io::Result<usize> {
        let (iov, offset) = (self.iovec(done)?, file_offset(at)?);
        // SAFETY: as in `store`; the kernel only reads them, and `iov` lives across the call.
        once(|| unsafe { libc::pwritev(file.as_raw_fd(), &raw const iov, 1, offset) })
    }

    /// As [`PeerBytes::write_file`], but never waits.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write_file_nowait(&self, file: BorrowedFd<'_>, at: u64, done: usize) -> io::Result<Nowait> {
        let (iov, offset) = (self.iovec(done)?, file_offset(at)?);
        // SAFETY: as in `write_file`.
        nowait_result(once(|| unsafe {
            libc::pwritev2(file.as_raw_fd(), &raw const iov, 1, offset, libc::RWF_NOWAIT)
        }))
    }

    /// Address and length of those from `done` on.
    fn iovec(&self, done: usize) -> Result<libc::iovec, OutOfRange> {
        let len = self.len.checked_sub(done).ok_or(OutOfRange { start: done, end: done, len: self.len })?;
        // An address only: nothing is reached through it here.
        let start = self.region.map.as_mut_ptr().wrapping_add(self.start + done);
        Ok(libc::iovec { iov_base: start.cast(), iov_len: len })
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
    use std::os::fd::AsFd;

    #[test]
    fn bytes_go_both_ways_and_nowhere_else() {
        let region = Region::shareable(20_000).unwrap();
        let peer = PeerRegion::map(region.file().unwrap(), 20_000).unwrap();
        assert!(PeerRegion::is_possible());
        peer.bytes(4090, 100).unwrap().store(&[7; 100]).unwrap();
        let mut all = vec![0; 20_000];
        region.copy_out(0, &mut all).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte == 7).count(), 100);
        assert_eq!((all[4089], all[4090], all[4189], all[4190]), (0, 7, 7, 0));
        region.copy_in(19_000, b"from the other side").unwrap();
        let mut there = [0; 19];
        peer.bytes(19_000, 19).unwrap().load(&mut there).unwrap();
        assert_eq!(&there, b"from the other side");
        for (offset, count) in [(19_999, 2), (20_001, 0), (usize::MAX, 1)] {
            assert!(peer.bytes(offset, count).is_err());
        }
        let last = peer.bytes(19_990, 10).unwrap();
        assert!(last.store(&[1; 11]).is_err() && last.load(&mut [0; 11]).is_err());
        peer.bytes(20_000, 0).unwrap().store(&[]).unwrap();
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let file = rustix::fs::memfd_create("peer-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&file, b"what is in the file", 0).unwrap();
        let region = Region::shareable(8192).unwrap();
        let peer = PeerRegion::map(region.file().unwrap(), 8192).unwrap();
        let bytes = peer.bytes(4090, 30).unwrap();
        assert_eq!(bytes.read_file(file.as_fd(), 5, 10).unwrap(), 14);
        assert_eq!(bytes.read_file(file.as_fd(), 19, 0).unwrap(), 0, "the end");
        let mut there = [0; 14];
        region.copy_out(4100, &mut there).unwrap();
        assert_eq!(&there, b"is in the file");
        assert!(
            bytes.read_file(file.as_fd(), 0, 31).is_err()
                && bytes.read_file(file.as_fd(), u64::MAX, 0).is_err()
        );
        assert_eq!(peer.bytes(4106, 8).unwrap().write_file(file.as_fd(), 0, 0).unwrap(), 8);
        let mut now = [0; 8];
        rustix::io::pread(&file, &mut now, 0).unwrap();
        assert_eq!(&now, b"the file");
        match bytes.read_file_nowait(file.as_fd(), 0, 0).unwrap() {
            Nowait::Done(count) => assert_eq!(count, 19),
            other => assert_eq!(other, Nowait::Unsupported),
        }
        assert_ne!(bytes.write_file_nowait(file.as_fd(), 0, 0).unwrap(), Nowait::Done(0));
    }

    #[test]
    fn a_hole_that_the_owner_makes_is_no_trouble() {
        let region = Region::shareable(3 * 4096).unwrap();
        let peer = PeerRegion::map(region.file().unwrap(), 3 * 4096).unwrap();
        let all = peer.bytes(0, 3 * 4096).unwrap();
        all.store(&[9; 3 * 4096]).unwrap();
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(region.file().unwrap(), punch, 4096, 4096).unwrap();
        let mut bytes = [1; 3 * 4096];
        all.load(&mut bytes).unwrap();
        assert_eq!((bytes[4095], bytes[4096], bytes[8191], bytes[8192]), (9, 0, 0, 9));
        all.store(&[3; 10]).unwrap();
    }

    #[test]
    fn what_is_not_such_a_file_or_shorter_is_refused() {
        let region = Region::shareable(5000).unwrap();
        assert!(PeerRegion::map(region.file().unwrap(), 0).is_err());
        assert!(PeerRegion::map(region.file().unwrap(), 5001).is_err());
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(PeerRegion::map(reader.as_fd(), 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
