//! A worker's ring: direct reads that no thread waits for.
//!
//! ```text
//!   read that fits ─► entry ─► FileRing ─► device ─► done, by number ─┬─ all of it, or an error ─► Done
//!                                                                  └─ part of it ───────────► a storage thread does the rest
//! ```
//!
//! Writes go to storage threads: see [`holdfast_verbs::file_ring`] for why. A read is rounded up to what direct I/O takes, as far as its
//! buffer goes; what lies behind the bytes asked for is never placed.

use super::backend::Progress;
use super::storage::{Done, Job, Work, failed_with};
use crate::gauges::Gauges;
use crate::limiter::Limiter;
use holdfast_verbs::file_ring::{FileRing, Refused};
use holdfast_verbs::memory::Pool;
use rustix::io::Errno;
use slab::Slab;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Operations under way; one more is done by a storage thread.
const DEPTH: u32 = 128;

/// See the module's text.
pub(crate) struct StorageRing {
    ring: FileRing,
    /// What each operation is for; their buffers are with the ring.
    jobs: Slab<Job>,
    /// Registered with the ring when it is first used.
    pool: Option<Pool>,
}

impl StorageRing {
    /// Operations on buffers of `pool` are the cheapest.
    ///
    /// # Errors
    /// The kernel's, where it has no io_uring for us.
    pub(crate) fn new(pool: Pool) -> io::Result<Self> {
        let ring = FileRing::new(DEPTH)?;
        Ok(Self { ring, jobs: Slab::with_capacity(DEPTH as usize), pool: Some(pool) })
    }

    /// Takes a job, to begin with the next [`StorageRing::submit`]; or gives it back, if it is no direct read.
    pub(crate) fn begin(&mut self, mut job: Job, gauges: &Gauges) -> Result<(), Job> {
        let Some(direct) = job.file.direct().filter(|_| job.work == Work::Read) else { return Err(job) };
        let (start, at) = (job.range.start + job.done, job.at + job.done as u64);
        let Some(buffer) = &job.buffer else { return Err(job) };
        let length = direct.rounded(job.range.len() - job.done);
        let end = start.saturating_add(length);
        if end > buffer.len() || !direct.fits(buffer.addr() + start as u64, length, at) {
            return Err(job);
        }
        self.register(gauges);
        let file = Arc::clone(direct.file());
        let Some(buffer) = job.buffer.take() else { return Err(job) };
        let entry = self.jobs.vacant_entry();
        if let Err(Refused(buffer)) = self.ring.read(entry.key() as u64, &file, buffer, start..end, at) {
            job.buffer = Some(buffer);
            return Err(job);
        }
        gauges.reads_direct_total.add(1);
        entry.insert(job);
        Ok(())
    }

    /// Pins the pool, once, when there is something to use it for.
    fn register(&mut self, gauges: &Gauges) {
        let Some(pool) = self.pool.take() else { return };
        match self.ring.register(&pool) {
            Ok(()) => gauges.file_rings_registered.add(1),
            Err(error) => {
                tracing::info!(%error, "buffers are pinned for each direct operation: the pool can't be registered with io_uring");
            }
        }
    }

    /// The next job done; as an error one of which a thread is to do the rest.
    pub(crate) fn done(&mut self) -> Option<Result<Done, Job>> {
        // Asked in every round of a worker, most of which have nothing here.
        while !self.jobs.is_empty() {
            let done = self.ring.take_done()?;
            let token = usize::try_from(done.token).unwrap_or(usize::MAX);
            let Some(mut job) = self.jobs.try_remove(token) else {
                tracing::error!("a file operation nobody asked for is done: our own fault");
                continue;
            };
            job.buffer = Some(done.buffer);
            let length = job.range.len();
            let progress = match done.outcome {
                Ok(count) => {
                    job.done = length.min(job.done + count);
                    if job.done < length {
                        // The end of the file, or not: the page cache tells.
                        return Some(Err(job));
                    }
                    Progress::Complete(length)
                }
                Err(error) => {
                    let again = matches!(
                        Errno::from_io_error(&error),
                        Some(Errno::AGAIN | Errno::INTR | Errno::CANCELED)
                    ) || job.file.direct().is_some_and(|direct| direct.refuses(&error));
                    if again {
                        return Some(Err(job));
                    }
                    Progress::Failed(job.done, failed_with(&error))
                }
            };
            let Job { tag, work, buffer, .. } = job;
            return Some(Ok(Done { tag, work, buffer, length, progress, written_ns: 0 }));
        }
        None
    }

    /// Lets the kernel begin what was taken.
    pub(crate) fn submit(&mut self) {
        if !self.ring.is_pending() {
            return;
        }
        if let Err(error) = self.ring.submit() {
            static LOGGED: Limiter = Limiter::new();
            if let Some(suppressed) = LOGGED.pass() {
                tracing::error!(%error, suppressed, "io_uring takes nothing; tried again");
            }
        }
    }

    /// True if the kernel could not begin all of it.
    pub(crate) fn is_pending(&self) -> bool {
        self.ring.is_pending()
    }

    /// Readable while something is done.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
