//! [`FileRing`]: reads of files that complete by themselves, through io_uring.
//!
//! ```text
//!   read ────────► submission queue ──submit: one system call for all──► kernel ──► device
//!   (buffer, file)                                                                    │
//!   take_done ◄── completion queue, in shared memory: no system call ◄────────────────┘
//! ```
//!
//! Reads alone, and that on purpose: what a process has begun this way outlives it. A write that was under way when its process was
//! killed would land after everybody had been told that nothing of that process can land any more. (A `pwrite` can't: its thread
//! does not end before it.) What a read leaves behind nobody sees.
//!
//! Why a buffer that is under way can't be touched by anybody else: it is moved into the ring, together with the file, and
//! comes back with its completion. A ring that is dropped waits for all of them first. Pool memory that was
//! [registered](FileRing::register) is pinned once, for the ring as it is for the NIC; what lies elsewhere is pinned by the kernel for each
//! operation.

use crate::memory::{Buffer, Pool};
use io_uring::{IoUring, opcode, types};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Longest registered mapping: the kernel takes no longer one.
const FIXED_BYTES_MAX: usize = 1 << 30;

/// An operation that has ended.
#[derive(Debug)]
pub struct Done {
    /// As given to [`FileRing::read`].
    pub token: u64,
    /// The buffer, the owner's again.
    pub buffer: Buffer,
    /// Bytes moved; or why not. As with `pread`, fewer than asked for may be moved.
    pub outcome: io::Result<usize>,
}

/// What the kernel works on.
struct UnderWay {
    token: u64,
    buffer: Buffer,
    /// Keeps the descriptor open until the kernel has taken it, which is at the latest when the operation is done.
    _file: Arc<OwnedFd>,
}

/// Two queues shared with the kernel; for one thread at a time.
pub struct FileRing {
    ring: IoUring,
    /// By number; the kernel hands the number back.
    under_way: Box<[Option<UnderWay>]>,
    free: Vec<u32>,
    /// [`Pool::id`] of the pool whose memory is registered.
    fixed: Option<u64>,
    /// Entries that the kernel has not been told of.
    pending: usize,
}

/// A piece that was not taken, because the ring is full or it makes no sense; it comes back.
#[derive(Debug)]
pub struct Refused(pub Buffer);

impl FileRing {
    /// A ring for at most `depth` operations under way, 1 to 4096.
    ///
    /// # Errors
    /// The kernel's: it may be too old, or be told not to allow it (`kernel.io_uring_disabled`, containers).
    pub fn new(depth: u32) -> io::Result<Self> {
        let depth = depth.clamp(1, 4096);
        let mut ring = IoUring::builder().dontfork().build(depth)?;
        // Whatever forbids its use shows now, and not when somebody waits for it.
        // SAFETY: it names no memory and no descriptor.
        unsafe { ring.submission().push(&opcode::Nop::new().build()) }
            .map_err(|_| io::Error::other("a ring without room"))?;
        ring.submit_and_wait(1)?;
        ring.completion().next();
        Ok(Self {
            ring,
            under_way: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            fixed: None,
            pending: 0,
        })
    }

    /// Pins the pool's memory for the ring: its buffers then need no pinning of their own. At most one pool, of at most 1 GiB.
    ///
    /// # Errors
    /// The kernel's (`ENOMEM` beyond the memlock limit); `InvalidInput` for a second pool, or a larger one. All goes on as
    /// before then.
    pub fn register(&mut self, pool: &Pool) -> io::Result<()> {
        let memory = pool.memory();
        if self.fixed.is_some() || memory.len() > FIXED_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "one pool of at most 1 GiB"));
        }
        let whole = libc::iovec { iov_base: memory.addr() as *mut libc::c_void, iov_len: memory.len() };
        // SAFETY: the mapping is the pool's. The kernel pins its pages and does not touch a byte of them but for operations,
        // each of which owns a buffer of a pool, and a buffer keeps the mapping. Should the mapping go before the ring does, the
        // pages stay pinned, and nobody names them any more: `prepare` names the memory only of buffers that it holds.
        unsafe { self.ring.submitter().register_buffers(&[whole]) }?;
        self.fixed = Some(pool.id());
        Ok(())
    }

    /// Reads at `offset` of the file into `range` of the buffer. Begins with the next [`FileRing::submit`].
    ///
    /// # Errors
    /// [`Refused`] if as many are under way as may be, or the range does not lie within the buffer.
    pub fn read(
        &mut self,
        token: u64,
        file: &Arc<OwnedFd>,
        mut buffer: Buffer,
        range: Range<usize>,
        offset: u64,
    ) -> Result<(), Refused> {
        let fixed = self.fixed == Some(buffer.pool_id());
        // Refuses what would turn negative: -1 would mean the current position.
        let bounds = i64::try_from(offset).is_ok();
        let piece = if bounds { buffer.get_mut(range) } else { None };
        let Some((address, length)) =
            piece.and_then(|piece| Some((piece.as_mut_ptr(), u32::try_from(piece.len()).ok()?)))
        else {
            return Err(Refused(buffer));
        };
        let Some(number) = self.free.pop() else { return Err(Refused(buffer)) };
        let fd = types::Fd(file.as_raw_fd());
        let entry = if fixed {
            opcode::ReadFixed::new(fd, address, length, 0).offset(offset).build()
        } else {
            opcode::Read::new(fd, address, length).offset(offset).build()
        }
        .user_data(u64::from(number));
        self.under_way[number as usize] = Some(UnderWay { token, buffer, _file: Arc::clone(file) });
        // SAFETY: the entry names `range` of a buffer and a descriptor; both were just moved into `under_way` and leave it only
        // when the kernel has told that the operation is done (`take_done`), or never (`drop`). Moving a `Buffer` does not
        // move its bytes.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // As many entries as operations: it has room for each, once the kernel has taken those before.
            self.free.push(number);
            let taken = self.under_way[number as usize].take();
            return match taken {
                Some(taken) => Err(Refused(taken.buffer)),
                None => unreachable!("it was put there above"),
            };
        }
        self.pending += 1;
        Ok(())
    }

    /// Operations that have not been taken back.
    pub fn under_way(&self) -> usize {
        self.under_way.len() - self.free.len()
    }

    /// True if there are operations that [`FileRing::submit`] has not begun.
    pub fn is_pending(&self) -> bool {
        self.pending > 0
    }

    /// Begins everything that was asked for: one system call. What the kernel has no room for now stays pending.
    ///
    /// # Errors
    /// The kernel's, when nothing can be begun any more.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.pending == 0 {
            return Ok(());
        }
        match self.ring.submit() {
            Ok(taken) => {
                self.pending = self.pending.saturating_sub(taken);
                Ok(())
            }
            Err(error) => match error.raw_os_error() {
                // Short of memory, or completions to be taken first: it goes on with the next call.
                Some(libc::EAGAIN | libc::EBUSY | libc::EINTR) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next operation that is done. No system call.
    pub fn take_done(&mut self) -> Option<Done> {
        let entry = self.ring.completion().next()?;
        let number = u32::try_from(entry.user_data()).ok()?;
        let taken = self.under_way.get_mut(number as usize)?.take()?;
        self.free.push(number);
        let outcome = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
        Some(Done { token: taken.token, buffer: taken.buffer, outcome })
    }
}

impl AsFd for FileRing {
    /// Readable while there is something to be taken.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor, and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for FileRing {
    fn drop(&mut self) {
        while self.under_way() > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => while self.take_done().is_some() {},
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    // The kernel may still write into them: they must never be anybody's again.
                    tracing::error!(%error, lost = self.under_way(), "cannot wait for file operations under way");
                    return std::mem::forget(std::mem::take(&mut self.under_way));
                }
            }
        }
    }
}

impl std::fmt::Debug for FileRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileRing")
            .field("depth", &self.under_way.len())
            .field("under_way", &self.under_way())
            .field("fixed", &self.fixed.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `None`, and words, where the kernel does not allow it.
    fn ring(depth: u32) -> Option<FileRing> {
        match FileRing::new(depth) {
            Ok(ring) => Some(ring),
            Err(error) => {
                eprintln!("skipped: no io_uring here: {error}");
                None
            }
        }
    }

    fn file(bytes: &[u8]) -> Arc<OwnedFd> {
        let file = rustix::fs::memfd_create("ring-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&file, bytes, 0).unwrap();
        Arc::new(file)
    }

    fn wait(ring: &mut FileRing) -> Done {
        ring.submit().unwrap();
        loop {
            if let Some(done) = ring.take_done() {
                return done;
            }
            let mut poll = [rustix::event::PollFd::new(&*ring, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut poll, None).unwrap();
        }
    }

    #[test]
    fn bytes_go_where_they_are_meant_to_with_and_without_registration() {
        let Some(mut ring) = ring(4) else { return };
        let pool = Pool::new(4096, 3).unwrap();
        for registered in [false, true] {
            if registered {
                ring.register(&pool).unwrap();
                assert!(ring.register(&pool).is_err(), "one pool");
            }
            assert_eq!(ring.fixed.is_some(), registered);
            let file = file(b"0123456789");
            let mut buffer = pool.take().unwrap();
            buffer.fill(b'.');
            ring.read(7, &file, buffer, 2..6, 3).unwrap();
            let done = wait(&mut ring);
            assert_eq!((done.token, done.outcome.unwrap(), &done.buffer[..8]), (7, 4, &b"..3456.."[..]));
            ring.read(9, &file, done.buffer, 0..4096, 8).unwrap();
            let done = wait(&mut ring);
            assert_eq!(
                (done.outcome.unwrap(), &done.buffer[..2]),
                (2, &b"89"[..]),
                "and the end of the file"
            );
        }
    }

    #[test]
    fn what_is_too_much_or_outside_comes_back() {
        let Some(mut ring) = ring(2) else { return };
        let pool = Pool::new(64, 4).unwrap();
        let file = file(b"abc");
        let take = || pool.take().unwrap();
        assert!(ring.read(0, &file, take(), 0..65, 0).is_err(), "beyond the buffer");
        assert!(ring.read(0, &file, take(), 0..4, u64::MAX).is_err(), "the current position");
        ring.read(1, &file, take(), 0..1, 0).unwrap();
        ring.read(2, &file, take(), 0..1, 1).unwrap();
        assert!(ring.is_pending());
        let Err(Refused(buffer)) = ring.read(3, &file, take(), 0..1, 2) else { panic!("two at most") };
        drop(buffer);
        let (one, two) = (wait(&mut ring).token, wait(&mut ring).token);
        assert_eq!(one + two, 3);
        ring.read(3, &file, take(), 0..1, 2).unwrap();
        assert_eq!(wait(&mut ring).buffer[0], b'c');
        assert_eq!(ring.under_way(), 0);
        // The kernel's errors are told.
        let directory = Arc::new(OwnedFd::from(std::fs::File::open("/").unwrap()));
        ring.read(4, &directory, take(), 0..1, 0).unwrap();
        assert_eq!(wait(&mut ring).outcome.unwrap_err().raw_os_error(), Some(libc::EISDIR));
    }

    #[test]
    fn a_ring_that_is_dropped_waits_for_what_is_under_way() {
        let Some(mut ring) = ring(4) else { return };
        let pool = Pool::new(64, 1).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        // Of a pipe nothing comes until it is written: the read is under way for as long as that takes.
        ring.read(0, &Arc::new(reader), pool.take().unwrap(), 0..64, 0).unwrap();
        ring.submit().unwrap();
        assert!(ring.take_done().is_none());
        let dropped = std::thread::spawn(move || drop(ring));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(pool.available(), 0, "the kernel has the buffer");
        rustix::io::write(&writer, b"x").unwrap();
        dropped.join().unwrap();
        assert_eq!(pool.available(), 1);
    }
}
