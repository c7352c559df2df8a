//! The thread that pins and unpins extents of files for all workers, and unmaps them.
//!
//! ```text
//!   worker ─► Pin ─► stamp ─ settled? ─► pages pinned (may read the disk) ─► Letter::Pinned ───► worker
//!   worker ─► Unpin ─► page by page ──────────────────────────────────────► Letter::Unpinned ─► worker
//!   worker ─► Unmap ─► page by page ──────────────────────────────────────► Letter::Unmapped ─► worker
//! ```
//!
//! It ends when the last worker has.

use super::backend::FileIo;
use super::inbox::{Inbox, Letter};
use super::pinned::{EXTENT_BYTES, FileKey, SETTLED, Stamp, pinned_bytes};
use crate::limiter::Limiter;
use holdfast_transport::verbs::{PinnedFile, Pinner};
use holdfast_verbs::memory::FileMapping;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

/// What a worker wants done.
pub(crate) enum Job {
    Pin(Pin),
    Unpin { worker: usize, pages: PinnedFile },
    Unmap { worker: usize, mappings: Vec<Arc<FileMapping>> },
}

/// An extent to be pinned.
pub(crate) struct Pin {
    pub(super) worker: usize,
    pub(super) key: FileKey,
    pub(super) index: u64,
    pub(super) file: Arc<dyn FileIo>,
    pub(super) pinner: Pinner,
}

/// What became of a [`Pin`].
pub(crate) struct PinDone {
    pub(super) key: FileKey,
    pub(super) index: u64,
    /// An error that is `true` will be the same for a while.
    pub(super) outcome: Result<(PinnedFile, Stamp), bool>,
}

/// Starts the thread.
pub(crate) fn start(inboxes: Vec<Arc<Inbox>>) -> io::Result<(Sender<Job>, JoinHandle<()>)> {
    let (sender, jobs) = channel();
    let run = move || run(&jobs, &inboxes);
    Ok((sender, std::thread::Builder::new().name("pinner".into()).spawn(run)?))
}

fn run(jobs: &Receiver<Job>, inboxes: &[Arc<Inbox>]) {
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Pin(Pin { worker, key, index, file, pinner }) => {
                let outcome = pin(&*file, &pinner, key, index);
                // The descriptor is held no longer than the job.
                drop(file);
                inboxes[worker].send(Letter::Pinned(Box::new(PinDone { key, index, outcome })));
            }
            Job::Unpin { worker, pages } => {
                let bytes = pinned_bytes(&pages);
                drop(pages);
                inboxes[worker].send(Letter::Unpinned(bytes));
            }
            Job::Unmap { worker, mappings } => {
                let bytes = mappings.iter().map(|mapping| mapping.len() as u64).sum();
                drop(mappings);
                inboxes[worker].send(Letter::Unmapped(bytes));
            }
        }
    }
}

fn pin(file: &dyn FileIo, pinner: &Pinner, key: FileKey, index: u64) -> Result<(PinnedFile, Stamp), bool> {
    let stamp = match file.stamp() {
        Ok(Some(stamp)) if stamp.file == key.file => stamp,
        _ => return Err(true),
    };
    // Later changes get later times: see `pinned`.
    if !is_settled(stamp.changed, SystemTime::now()) {
        return Err(false);
    }
    let start = index * EXTENT_BYTES;
    let length = stamp.length.saturating_sub(start).min(EXTENT_BYTES);
    let length = usize::try_from(length).map_err(|_| true)?;
    if length == 0 {
        return Err(false);
    }
    pinner.pin(file.descriptor(), start, length).map(|pages| (pages, stamp)).map_err(|error| {
        static LOGGED: Limiter = Limiter::new();
        if let Some(suppressed) = LOGGED.pass() {
            tracing::info!(%error, suppressed, "a file's pages cannot be pinned: long reads of it are copied");
        }
        true
    })
}

fn is_settled((seconds, nanoseconds): (i64, u32), now: SystemTime) -> bool {
    let Ok(seconds) = u64::try_from(seconds) else { return false };
    let changed = SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds));
    // Where there are no fractions (ext3, ext4 with small inodes) the clock ticks once a second.
    let wait = if nanoseconds == 0 { SETTLED + Duration::from_secs(1) } else { SETTLED };
    changed.and_then(|at| now.duration_since(at).ok()).is_some_and(|age| age >= wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_change_that_is_past_is_settled() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        assert!(is_settled((998, 0), now));
        assert!(is_settled((998, 999_999_999), now));
        assert!(!is_settled((999, 1), now), "too short a time ago");
        assert!(!is_settled((999, 0), now), "perhaps of a clock that ticks once a second");
        assert!(!is_settled((1001, 0), now), "of the future: a clock was set back");
        assert!(!is_settled((-1, 0), now), "before all time");
    }
}
