//! File access: at once on the worker when the page cache can serve, else on a storage thread that may wait.
//!
//! ```text
//!            read_now / write_now
//!   worker ──────────────────────► page cache: done
//!     │  would wait, or can't say; a file in memory (tmpfs) can't say, but never waits: it is done at once too
//!     ▼
//!   jobs (bounded queue) ─► storage threads: pread, pwrite, fdatasync ─► done queue of the worker ─► wake
//! ```
//!
//! A job owns its buffer and keeps the file open: a descriptor is closed only when no job of it is under way.

use super::inbox::Inbox;
use super::latch::Latch;
use super::pinned::{FileId, Stamp};
use crate::gauges::Gauges;
use crate::last_write::{LastWrite, Writing};
use crate::limiter::Limiter;
use crossbeam::queue::ArrayQueue;
use holdfast_shared::types::Status;
use holdfast_verbs::memory::{Buffer, IN_MEMORY, Nowait, pread_nowait, pwrite_nowait};
use rustix::event::EventfdFlags;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

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
    /// The descriptor it was made of, to be handed back to control.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

/// Makes a [`FileIo`] of a descriptor from control.
pub type Opener = Arc<dyn Fn(OwnedFd) -> Arc<dyn FileIo> + Send + Sync>;

/// Those whose files change their time of change with everything that takes a page away from them.
const STAMPED: [i64; 3] = [0x0102_1994, 0xef53, 0x5846_5342]; // tmpfs, ext2 to ext4, xfs

/// A file of the kernel. Remembers when it can't answer without waiting, so that it is asked once only.
pub struct KernelFile {
    fd: OwnedFd,
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
        Self { fd, in_memory, stamped, read_now: AtomicBool::new(true), write_now: AtomicBool::new(true) }
    }

    /// The usual [`Opener`].
    pub fn opener() -> Opener {
        Arc::new(|fd| Arc::new(Self::new(fd)))
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
        if !self.read_now.load(Ordering::Relaxed) {
            return Ok(Nowait::Unsupported);
        }
        remember(&self.read_now, pread_nowait(self.fd.as_fd(), data, at))
    }

    fn write_now(&self, data: &[u8], at: u64) -> io::Result<Nowait> {
        if self.in_memory {
            return self.write(data, at).map(Nowait::Done);
        }
        if !self.write_now.load(Ordering::Relaxed) {
            return Ok(Nowait::Unsupported);
        }
        remember(&self.write_now, pwrite_nowait(self.fd.as_fd(), data, at))
    }

    fn read(&self, data: &mut [u8], at: u64) -> io::Result<usize> {
        Ok(rustix::io::retry_on_intr(|| rustix::io::pread(&self.fd, &mut *data, at))?)
    }

    fn write(&self, data: &[u8], at: u64) -> io::Result<usize> {
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

/// What a storage thread is to do. `done` bytes of the piece are done already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Read,
    Write,
    Flush { data_only: bool },
}

/// Whose job it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag {
    pub(crate) worker: usize,
    pub(crate) conn: super::ConnKey,
    pub(crate) slot: u16,
    /// Where the piece begins within the request, bytes.
    pub(crate) piece: u32,
}

/// One job.
pub(crate) struct Job {
    pub(crate) tag: Tag,
    pub(crate) work: Work,
    pub(crate) file: Arc<dyn FileIo>,
    /// For a flush.
    pub(crate) latch: Option<Arc<Latch>>,
    pub(crate) buffer: Option<Buffer>,
    /// The piece's bytes within the buffer.
    pub(crate) range: std::ops::Range<usize>,
    /// Where the piece begins in the file.
    pub(crate) at: u64,
    pub(crate) done: usize,
}

/// A job done. The file is no longer held.
pub(crate) struct Done {
    pub(crate) tag: Tag,
    pub(crate) work: Work,
    pub(crate) buffer: Option<Buffer>,
    pub(crate) length: usize,
    pub(crate) progress: Progress,
    /// When a write had returned; 0 for other work.
    pub(crate) written_ns: u64,
}

fn run(mut job: Job, last_write: &LastWrite) -> Done {
    let length = job.range.len();
    let mut done = job.done;
    let mut failed = None;
    let writing = (job.work == Work::Write).then(|| last_write.begin());
    match (job.work, job.buffer.as_mut()) {
        (Work::Flush { data_only }, _) => {
            failed = match &job.latch {
                Some(latch) => latch.sync(&*job.file, data_only),
                None => job.file.sync(data_only),
            }
            .err();
        }
        (work, Some(buffer)) => {
            let piece = &mut buffer[job.range.clone()];
            while done < length {
                let at = job.at + done as u64;
                let moved = if work == Work::Read {
                    job.file.read(&mut piece[done..], at)
                } else {
                    job.file.write(&piece[done..], at)
                };
                match moved {
                    Ok(0) if work == Work::Read => break,
                    // A write of some bytes that moves none: no kernel does that; never spin on it.
                    Ok(0) => failed = Some(io::ErrorKind::WriteZero.into()),
                    Ok(n) => done += n,
                    Err(error) => failed = Some(error),
                }
                if failed.is_some() {
                    break;
                }
            }
        }
        (_, None) => failed = Some(io::ErrorKind::InvalidInput.into()),
    }
    let written_ns = writing.map_or(0, Writing::returned);
    let progress = match failed {
        None => Progress::Complete(done),
        Some(error) => {
            let status = status_of(&error);
            static LOGGED: Limiter = Limiter::new();
            if let (Status::Io, Some(suppressed)) = (status, LOGGED.pass()) {
                tracing::warn!(%error, suppressed, "storage failed");
            }
            Progress::Failed(done, status)
        }
    };
    Done { tag: job.tag, work: job.work, buffer: job.buffer, length, progress, written_ns }
}

struct Queue {
    jobs: ArrayQueue<Job>,
    /// Counts the jobs: a semaphore that storage threads wait on.
    ready: OwnedFd,
    stop: AtomicBool,
    inboxes: Vec<Arc<Inbox>>,
    gauges: Arc<Gauges>,
    last_write: Arc<LastWrite>,
}

/// The storage threads and their queue.
pub(crate) struct Storage {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Storage {
    /// `length` jobs may wait in the shared queue; what comes on top waits at its worker.
    pub(crate) fn start(
        threads: usize,
        length: usize,
        inboxes: Vec<Arc<Inbox>>,
        gauges: Arc<Gauges>,
        last_write: Arc<LastWrite>,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            jobs: ArrayQueue::new(length.max(1)),
            ready: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE)?,
            stop: AtomicBool::new(false),
            inboxes,
            gauges,
            last_write,
        });
        let mut storage = Self { queue: Arc::clone(&queue), threads: Vec::new() };
        for n in 0..threads {
            let queue = Arc::clone(&queue);
            storage
                .threads
                .push(std::thread::Builder::new().name(format!("storage-{n}")).spawn(move || queue.serve())?);
        }
        Ok(storage)
    }

    pub(crate) fn sender(&self) -> StorageSender {
        StorageSender {
            queue: Arc::clone(&self.queue),
            waiting: VecDeque::with_capacity(self.queue.jobs.capacity()),
        }
    }

    /// Lets the threads finish what is queued and ends them.
    pub(crate) fn stop(&mut self) {
        self.queue.stop.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.queue.ready, &(self.threads.len() as u64).to_ne_bytes());
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a storage thread had panicked");
            }
        }
    }
}

impl Queue {
    fn serve(&self) {
        let mut count = [0; 8];
        loop {
            match rustix::io::read(&self.ready, &mut count) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "a storage thread cannot wait for jobs");
                    return;
                }
            }
            match self.jobs.pop() {
                Some(job) => {
                    let done = run(job, &self.last_write);
                    let inbox = &self.inboxes[done.tag.worker];
                    self.gauges.storage_queue.sub(1);
                    inbox.storage_done(done);
                }
                None if self.stop.load(Ordering::SeqCst) => return,
                None => {}
            }
        }
    }
}

/// A worker's end of the storage queue.
pub(crate) struct StorageSender {
    queue: Arc<Queue>,
    waiting: VecDeque<Job>,
}

impl StorageSender {
    /// Hands a job over. Its answer comes to the worker's inbox.
    pub(crate) fn submit(&mut self, job: Job) {
        self.queue.gauges.storage_queue.add(1);
        self.queue.gauges.storage_handovers_total.add(1);
        self.waiting.push_back(job);
        self.push();
    }

    /// True if jobs found the queue full.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Moves jobs that found the queue full.
    pub(crate) fn push(&mut self) {
        while let Some(job) = self.waiting.pop_front() {
            if let Err(job) = self.queue.jobs.push(job) {
                self.waiting.push_front(job);
                return;
            }
            // Never fails: the counter is far from its end, and the descriptor is ours.
            let _ = rustix::io::write(&self.queue.ready, &1u64.to_ne_bytes());
        }
    }
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
