//! Storage: who does the file operations that would hold a worker up.
//!
//! ```text
//!            ┌─ direct reads ─► the worker's ring (`ring`) ─► kernel ─► taken by the worker itself, no other thread
//!   jobs ────┤
//!            └─ the rest ─────► bounded queue ─► storage threads: pread, pwrite, fdatasync ─► done queue of the worker ─► wake
//! ```
//!
//! A job owns its buffer and keeps the file open: a descriptor is closed only when no job of it is under way.

use super::backend::{FileIo, Progress, status_of};
use super::direct::DirectIo;
use super::inbox::Inbox;
use super::latch::Latch;
use super::ring::StorageRing;
use crate::gauges::Gauges;
use crate::last_write::LastWrite;
use crate::limiter::Limiter;
use crossbeam::queue::ArrayQueue;
use holdfast_shared::types::Status;
use holdfast_verbs::memory::Buffer;
use rustix::event::EventfdFlags;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

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

fn run(mut job: Job, last_write: &LastWrite, gauges: &Gauges) -> Done {
    let length = job.range.len();
    let mut done = job.done;
    let mut failed = None;
    let writing = (job.work == Work::Write).then(|| match job.file.direct() {
        Some(_) => last_write.begin_direct(),
        None => last_write.begin(),
    });
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
                    let piece = &piece[done..];
                    let written = job.file.write(piece, at);
                    // Asked behind it: one that was refused has gone another way.
                    let fits = |direct: &DirectIo| direct.fits(piece.as_ptr() as u64, piece.len(), at);
                    if written.is_ok() && job.file.direct().is_some_and(fits) {
                        gauges.writes_direct_total.add(1);
                    }
                    written
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
    let written_ns = writing.map_or(0, |writing| last_write.returned(writing));
    let progress = match failed {
        None => Progress::Complete(done),
        Some(error) => Progress::Failed(done, failed_with(&error)),
    };
    Done { tag: job.tag, work: job.work, buffer: job.buffer, length, progress, written_ns }
}

/// The answer to an operation that storage could not do; logged if it is storage's own fault.
pub(super) fn failed_with(error: &io::Error) -> Status {
    let status = status_of(error);
    static LOGGED: Limiter = Limiter::new();
    if let (Status::Io, Some(suppressed)) = (status, LOGGED.pass()) {
        tracing::warn!(%error, suppressed, "storage failed");
    }
    status
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

    /// A worker's end. `ring`: what it does by itself.
    pub(crate) fn sender(&self, ring: Option<StorageRing>) -> StorageSender {
        StorageSender {
            queue: Arc::clone(&self.queue),
            ring,
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
                    let done = run(job, &self.last_write, &self.gauges);
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
    ring: Option<StorageRing>,
    waiting: VecDeque<Job>,
}

impl StorageSender {
    /// Hands a job over. Its answer comes to the worker's inbox, or from [`StorageSender::done`].
    pub(crate) fn submit(&mut self, job: Job) {
        self.queue.gauges.storage_queue.add(1);
        let job = match &mut self.ring {
            Some(ring) => match ring.begin(job, &self.queue.gauges) {
                Ok(()) => return,
                Err(job) => job,
            },
            None => job,
        };
        self.hand_over(job);
    }

    fn hand_over(&mut self, job: Job) {
        self.queue.gauges.storage_handovers_total.add(1);
        self.waiting.push_back(job);
        self.push();
    }

    /// The next job that the ring has done.
    pub(crate) fn done(&mut self) -> Option<Done> {
        loop {
            match self.ring.as_mut()?.done()? {
                Ok(done) => {
                    self.queue.gauges.storage_queue.sub(1);
                    return Some(done);
                }
                // What the ring can't finish a thread does.
                Err(job) => self.hand_over(job),
            }
        }
    }

    /// Lets the kernel begin what was given to the ring since; one system call for all of it.
    pub(crate) fn begin(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.submit();
        }
    }

    /// Becomes readable when the ring has done something.
    pub(crate) fn ring_fd(&self) -> Option<BorrowedFd<'_>> {
        self.ring.as_ref().map(StorageRing::fd)
    }

    /// True if jobs found the queue full, or the kernel could not begin them yet.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty() || self.ring.as_ref().is_some_and(StorageRing::is_pending)
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
