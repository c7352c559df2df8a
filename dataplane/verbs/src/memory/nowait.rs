//! File I/O that never waits: what the page cache can answer is done at once, the rest is for a worker thread.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What `statfs` says of file systems whose files are memory and nothing else: nothing there waits for a disk, though the kernel
/// doesn't know `RWF_NOWAIT` for them.
pub const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6]; // tmpfs, ramfs

/// What came of an attempt that must not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nowait {
    /// So many bytes were moved. For a read, fewer than asked for means that *either* the file ends there *or* the rest
    /// isn't in the page cache; 0 means the end of the file.
    Done(usize),
    /// It would have had to wait: do it on a thread that may block.
    WouldBlock,
    /// This file or file system can't say: always use a thread that may block.
    Unsupported,
}

/// Reads at `offset` into `data`, only what is in the page cache.
pub fn pread_nowait(fd: BorrowedFd<'_>, data: &mut [u8], offset: u64) -> io::Result<Nowait> {
    let offset = file_offset(offset)?;
    let iov = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: `iov` names the bytes of `data`, exclusively borrowed for the call; the kernel writes at most `iov_len`.
    nowait_result(once(|| unsafe {
        libc::preadv2(fd.as_raw_fd(), &raw const iov, 1, offset, libc::RWF_NOWAIT)
    }))
}

/// Writes `data` at `offset` if that needs no waiting.
pub fn pwrite_nowait(fd: BorrowedFd<'_>, data: &[u8], offset: u64) -> io::Result<Nowait> {
    let offset = file_offset(offset)?;
    let iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: `iov` names the bytes of `data`, borrowed for the call; the kernel only reads them.
    nowait_result(once(|| unsafe {
        libc::pwritev2(fd.as_raw_fd(), &raw const iov, 1, offset, libc::RWF_NOWAIT)
    }))
}

/// `offset` as the kernel takes it. Refuses what would turn negative: -1 would mean "the current position".
pub(super) fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Makes a system call, again if a signal came in between, and turns its answer into a result.
pub(super) fn once(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

pub(super) fn nowait_result(result: io::Result<usize>) -> io::Result<Nowait> {
    match result {
        Ok(count) => Ok(Nowait::Done(count)),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN) => Ok(Nowait::WouldBlock),
            // EINVAL: kernels and file systems that don't know the flag. A truly invalid call fails again, with its
            // reason, on the path that may block.
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => Ok(Nowait::Unsupported),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn cached_bytes_come_at_once_or_the_answer_says_so() {
        let file = std::fs::File::from(
            rustix::fs::memfd_create("nowait-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        );
        rustix::io::pwrite(&file, b"0123456789", 0).unwrap();
        let mut data = [0; 4];
        match pread_nowait(file.as_fd(), &mut data, 3).unwrap() {
            Nowait::Done(count) => assert_eq!((count, &data), (4, b"3456")),
            other => assert_eq!(other, Nowait::Unsupported),
        }
        match pwrite_nowait(file.as_fd(), b"ab", 1).unwrap() {
            Nowait::Done(count) => {
                assert_eq!(count, 2);
                rustix::io::pread(&file, &mut data, 0).unwrap();
                assert_eq!(&data, b"0ab3");
            }
            other => assert_ne!(other, Nowait::Done(0)),
        }
    }

    #[test]
    fn a_pipe_is_unsupported_or_an_error_and_never_blocks() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let outcome = pread_nowait(reader.as_fd(), &mut [0; 4], 0);
        assert!(!matches!(outcome, Ok(Nowait::Done(_))), "{outcome:?}");
    }

    #[test]
    fn offsets_beyond_the_signed_range_are_refused() {
        let file = std::fs::File::from(
            rustix::fs::memfd_create("nowait-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        );
        for offset in [u64::MAX, 1 << 63] {
            assert_eq!(
                pread_nowait(file.as_fd(), &mut [0], offset).unwrap_err().raw_os_error(),
                Some(libc::EINVAL)
            );
        }
    }
}
