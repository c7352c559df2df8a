//! File access: at once on the worker when the page cache can serve, else by storage, which may wait.
//!
//! ```text
//!            read_now / write_now
//!   worker ──────────────────────► page cache: done
//!     │  would wait, or can't say; a file in memory (tmpfs) can't say, but never waits: it is done at once too;
//!     │  a volume of direct I/O has no page cache to ask, for what is aligned
//!     ▼
//!   `storage`
//! ```

use super::direct::DirectIo;
use super::pinned::{FileId, Stamp};
use holdfast_shared::types::Status;
use holdfast_verbs::memory::{IN_MEMORY, Nowait, PeerBytes, pread_nowait, pwrite_nowait};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the engine does with a file. The kernel's files are [`KernelFile`]; tests put faults in between.
pub trait FileIo: Send + Sync {
    /// Reads what needs no waiting.
    ///
    /// # Errors
    /// The kernel's.
    fn read_now(&self, data: &mut [u8], at: u64) -> io::Result<Nowait>;
    /// Writes what needs no waiting.
    ///
    /// # Errors
    /// The kernel's.
    fn write_now(&self, data: &[u8], at: u64) -> io::Result<Nowait>;
    /// Reads what needs no waiting into those bytes from `done` on.
    ///
    /// # Errors
    /// The kernel's: of the file, or of memory that can't be reached.
    fn read_into_now(&self, to: PeerBytes<'_>, done: usize, at: u64) -> io::Result<Nowait> {
        let _ = (to, done, at);
        Ok(Nowait::Unsupported)
    }
    /// Writes what needs no waiting from those bytes from `done` on.
    ///
    /// # Errors
    /// The kernel's: of the file, or of memory that can't be reached.
    fn write_from_now(&self, from: PeerBytes<'_>, done: usize, at: u64) -> io::Result<Nowait> {
        let _ = (from, done, at);
        Ok(Nowait::Unsupported)
    }
    /// Reads; may wait.
    ///
    /// # Errors
    /// The kernel's.
    fn read(&self, data: &mut [u8], at: u64) -> io::Result<usize>;
    /// Writes; may wait.
    ///
    /// # Errors
    /// The kernel's.
    fn write(&self, data: &[u8], at: u64) -> io::Result<usize>;
    /// Returns when the storage has everything written before.
    ///
    /// # Errors
    /// The kernel's.
    fn sync(&self, data_only: bool) -> io::Result<()>;
    /// How the file is now, to tell later whether its pages are still the same ones. `None`: this can't be told of it.
    ///
    /// # Errors
    /// The kernel's.
    fn stamp(&self) -> io::Result<Option<Stamp>> {
        Ok(None)
    }
    /// Its length, bytes, if a mapping of it shows the same as [`FileIo::read`]. `None`: not of this file.
    ///
    /// # Errors
    /// The kernel's.
    fn view_length(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
    /// Its way past the page cache, if it has one: then `read_now` and `write_now` of what [fits](DirectIo::fits) would wait.
    fn direct(&self) -> Option<&DirectIo> {
        None
    }
    /// The descriptor it was made of, to be handed back to control.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

/// Makes a [`FileIo`] of the descriptor from control, and of the one for direct I/O if there is one.
pub type Opener = Arc<dyn Fn(OwnedFd, Option<OwnedFd>) -> Arc<dyn FileIo> + Send + Sync>;

/// Those whose files change their time of change with everything that takes a page away from them, and whose page cache is all there is.
const STAMPED: [i64; 3] = [0x0102_1994, 0xef53, 0x5846_5342]; // tmpfs, ext2 to ext4, xfs

/// A file of the kernel. Remembers when it can't answer without waiting, so that it is asked once only.
pub struct KernelFile {
    fd: OwnedFd,
    direct: Option<DirectIo>,
    /// Never waits, though the kernel doesn't know `RWF_NOWAIT` for it. (Pages of a tmpfs that were swapped out do wait;
    /// a server that swaps is slow either way.)
    in_memory: bool,
    stamped: bool,
    read_now: AtomicBool,
    write_now: AtomicBool,
}

impl KernelFile {
    /// Takes the descriptor over.
    pub fn new(fd: OwnedFd) -> Self {
        let kind = rustix::fs::fstatfs(&fd).map_or(0, |fs| fs.f_type);
        let (in_memory, stamped) = (IN_MEMORY.contains(&kind), STAMPED.contains(&kind));
        let able = AtomicBool::new;
        Self { fd, direct: None, in_memory, stamped, read_now: able(true), write_now: able(true) }
    }

    /// As [`KernelFile::new`]; what fits goes through `direct`, another description of the same file with the same access, which
    /// was opened for direct I/O.
    pub fn with_direct(fd: OwnedFd, direct: Option<OwnedFd>) -> Self {
        Self { direct: direct.and_then(DirectIo::new), ..Self::new(fd) }
    }

    /// The usual [`Opener`].
    pub fn opener() -> Opener {
        Arc::new(|fd, direct| Arc::new(Self::with_direct(fd, direct)))
    }

    fn directly(&self, address: *const u8, length: usize, at: u64) -> Option<&DirectIo> {
        self.direct.as_ref().filter(|direct| direct.fits(address as u64, length, at))
    }
}

fn remember(able: &AtomicBool, result: io::Result<Nowait>) -> io::Result<Nowait> {
    if matches!(result, Ok(Nowait::Unsupported)) {
        able.store(false, Ordering::Relaxed);
    }
    result
}

impl FileIo for KernelFile {
    fn read_now(&self, data: &mut [u8], at: u64) -> io::Result<Nowait> {
        if self.in_memory {
            return self.read(data, at).map(Nowait::Done);
        }
        if self.direct.as_ref().is_some_and(|direct| direct.begins(data.as_ptr() as u64, at)) {
            return Ok(Nowait::WouldBlock);
        }
        if !self.read_now.load(Ordering::Relaxed) {
            return Ok(Nowait::Unsupported);
        }
        remember(&self.read_now, pread_nowait(self.fd.as_fd(), data, at))
    }

    fn write_now(&self, data: &[u8], at: u64) -> io::Result<Nowait> {
        if self.in_memory {
            return self.write(data, at).map(Nowait::Done);
        }
        if self.directly(data.as_ptr(), data.len(), at).is_some() {
            return Ok(Nowait::WouldBlock);
        }
        if !self.write_now.load(Ordering::Relaxed) {
            return Ok(Nowait::Unsupported);
        }
        remember(&self.write_now, pwrite_nowait(self.fd.as_fd(), data, at))
    }

    fn read_into_now(&self, to: PeerBytes<'_>, done: usize, at: u64) -> io::Result<Nowait> {
        if self.in_memory {
            return to.read_file(self.fd.as_fd(), at, done).map(Nowait::Done);
        }
        if self.direct.is_some() || !self.read_now.load(Ordering::Relaxed) {
            return Ok(Nowait::Unsupported);
        }
        remember(&self.read_now, to.read_file_nowait(self.fd.as_fd(), at, done))
    }

    fn write_from_now(&self, from: PeerBytes<'_>, done: usize, at: u64) -> io::Result<Nowait> {
        if self.in_memory {
            return from.write_file(self.fd.as_fd(), at, done).map(Nowait::Done);
        }
        if self.direct.is_some() || !self.write_now.load(Ordering::Relaxed) {
            return Ok(Nowait::Unsupported);
        }
        remember(&self.write_now, from.write_file_nowait(self.fd.as_fd(), at, done))
    }

    fn read(&self, data: &mut [u8], at: u64) -> io::Result<usize> {
        if let Some(direct) = self.directly(data.as_ptr(), data.len(), at) {
            let read = rustix::io::retry_on_intr(|| rustix::io::pread(direct.file(), &mut *data, at));
            match read {
                Err(error) if direct.refuses(&error.into()) => {}
                read => return Ok(read?),
            }
        }
        Ok(rustix::io::retry_on_intr(|| rustix::io::pread(&self.fd, &mut *data, at))?)
    }

    fn write(&self, data: &[u8], at: u64) -> io::Result<usize> {
        if let Some(direct) = self.directly(data.as_ptr(), data.len(), at) {
            let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(direct.file(), data, at));
            match written {
                Err(error) if direct.refuses(&error.into()) => {}
                written => return Ok(written?),
            }
        }
        Ok(rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.fd, data, at))?)
    }

    fn sync(&self, data_only: bool) -> io::Result<()> {
        Ok(rustix::io::retry_on_intr(|| {
            if data_only { rustix::fs::fdatasync(&self.fd) } else { rustix::fs::fsync(&self.fd) }
        })?)
    }

    fn stamp(&self) -> io::Result<Option<Stamp>> {
        if !self.stamped {
            return Ok(None);
        }
        let stat = rustix::fs::fstat(&self.fd)?;
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        // Pinning a hole of a file in memory would fill it, at the cost of memory.
        if self.in_memory && u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512) < length {
            return Ok(None);
        }
        let changed = (stat.st_ctime, u32::try_from(stat.st_ctime_nsec).unwrap_or(0));
        Ok(Some(Stamp { file: FileId(stat.st_dev, stat.st_ino), changed, length }))
    }

    fn view_length(&self) -> io::Result<Option<u64>> {
        // Others may have a cache that `read` asks the server of, and a mapping does not.
        if !self.stamped || self.direct.is_some() {
            return Ok(None);
        }
        Ok(u64::try_from(rustix::fs::fstat(&self.fd)?.st_size).ok())
    }

    fn direct(&self) -> Option<&DirectIo> {
        self.direct.as_ref()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The answer to a failed file operation. Total: what is not known is `Io`.
pub fn status_of(error: &io::Error) -> Status {
    use rustix::io::Errno;
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC | Errno::DQUOT) => Status::NoSpace,
        Some(Errno::FBIG) => Status::FileTooBig,
        Some(Errno::ROFS) => Status::ReadOnly,
        Some(Errno::BADF | Errno::PERM | Errno::ACCESS) => Status::AccessDenied,
        Some(Errno::ISDIR) => Status::IsDirectory,
        Some(Errno::INVAL) => Status::Invalid,
        Some(Errno::STALE) => Status::Closed,
        _ => Status::Io,
    }
}

/// How far an operation came: `Complete` includes the end of the file for a read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing more to do; so many bytes.
    Complete(usize),
    /// So many bytes; the rest would wait.
    Partial(usize),
    /// So many bytes, then this.
    Failed(usize, Status),
}

/// Reads until full, the end of the file, or it would wait.
pub(crate) fn read_now(file: &dyn FileIo, data: &mut [u8], at: u64) -> Progress {
    let mut done = 0;
    while done < data.len() {
        match file.read_now(&mut data[done..], at + done as u64) {
            Ok(Nowait::Done(0)) => break,
            Ok(Nowait::Done(n)) => done += n,
            Ok(Nowait::WouldBlock | Nowait::Unsupported) => return Progress::Partial(done),
            Err(error) => return Progress::Failed(done, status_of(&error)),
        }
    }
    Progress::Complete(done)
}

/// Writes until all is written or it would wait.
pub(crate) fn write_now(file: &dyn FileIo, data: &[u8], at: u64) -> Progress {
    let mut done = 0;
    while done < data.len() {
        match file.write_now(&data[done..], at + done as u64) {
            Ok(Nowait::Done(0) | Nowait::WouldBlock | Nowait::Unsupported) => return Progress::Partial(done),
            Ok(Nowait::Done(n)) => done += n,
            Err(error) => return Progress::Failed(done, status_of(&error)),
        }
    }
    Progress::Complete(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_a_status_each() {
        for (errno, status) in [
            (rustix::io::Errno::NOSPC, Status::NoSpace),
            (rustix::io::Errno::FBIG, Status::FileTooBig),
            (rustix::io::Errno::ROFS, Status::ReadOnly),
            (rustix::io::Errno::IO, Status::Io),
            (rustix::io::Errno::BADF, Status::AccessDenied),
        ] {
            assert_eq!(status_of(&errno.into()), status);
        }
        assert_eq!(status_of(&io::ErrorKind::WriteZero.into()), Status::Io);
    }

    #[test]
    fn reads_at_once_stop_at_the_end_of_the_file() {
        let fd = rustix::fs::memfd_create("backend", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&fd, b"0123456789", 0).unwrap();
        let file = KernelFile::new(fd);
        let mut data = [0; 8];
        // A memfd is on a tmpfs: done at once, whatever the kernel says of RWF_NOWAIT there.
        assert_eq!(read_now(&file, &mut data, 6), Progress::Complete(4));
        assert_eq!(&data[..4], b"6789");
        assert_eq!(write_now(&file, b"ab", 10), Progress::Complete(2));
        assert_eq!(read_now(&file, &mut data, 9), Progress::Complete(3));
        assert_eq!(&data[..3], b"9ab");
    }
}
