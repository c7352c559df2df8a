//! The journal on a file system, written by a thread of its own.
//!
//! ```text
//!  driver ──append──► queue ──all of it──► thread ──one write, one fdatasync──► state/journal/journal-*.log
//!     ▲               (bounded)              │
//!     └────────────── events ◄───────────────┘     Persisted(n): every record up to n is durable
//! ```
//!
//! While the thread waits for one sync the queue fills, and the next sync is for all of that: the more is asked, the
//! more is done by one. What the records mean is the authority's; how they are laid out and read back is
//! [`holdfast_shared::journal`].
//!
//! The directory is locked while a journal in it is read or written.

mod disk;
#[cfg(test)]
mod room_tests;
#[cfg(test)]
pub(crate) mod tests;
mod writer;

pub use disk::FileDisk;
pub use writer::{AppendError, Journal, JournalEvent, Kind, QUEUE_BYTES_MAX, RELEASE_BYTES_PER_OPEN};

use holdfast_shared::journal::{Disk, Options, RELEASE_RESERVE_BYTES, RecoverError, Recovered, Recovery};
use holdfast_shared::types::ClusterId;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc::UnboundedSender;

/// How the journal is kept. The config's section `[journal]` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Wait for the disk before anything is promised. **Unsafe to switch off**: after a power cut or a crash of the
    /// kernel, opens, locks and closes that were answered are forgotten, and clients may read or write what they must
    /// not. It is there to measure what the waiting costs. Default: true.
    pub sync: bool,
    /// The journal is rewritten when it has grown beyond this, and beyond twice what the last rewriting took, MiB.
    /// Default: 64.
    pub checkpoint_mib: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { sync: true, checkpoint_mib: 64 }
    }
}

impl Settings {
    fn options(&self) -> Options {
        Options {
            reserve_bytes: reserve_bytes(0),
            checkpoint_bytes: u64::from(self.checkpoint_mib) << 20,
            ..Options::default()
        }
    }
}

/// Bytes that are kept on the disk while there are so many opens: what waits in the queue when the disk turns out to be full
/// still fits, and after it the end of every open.
fn reserve_bytes(opens: u64) -> u64 {
    let releases = opens.saturating_mul(RELEASE_BYTES_PER_OPEN).max(RELEASE_RESERVE_BYTES);
    releases.saturating_add(QUEUE_BYTES_MAX as u64)
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its directory cannot be used.
    #[error("{path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What is in it cannot be read, or not gone on with.
    #[error("the journal in {path}: {source}")]
    Journal {
        /// The directory.
        path: PathBuf,
        /// Why, and what to do.
        source: RecoverError,
    },
    /// It cannot be gone on with.
    #[error("the journal: {0}")]
    Start(#[from] RecoverError),
    /// Its thread cannot be started.
    #[error("the journal's thread: {0}")]
    Thread(std::io::Error),
}

/// Reads the journal in `directory`, which is made if it is missing, and gives each record to `visit`, in order and
/// one at a time, however many there are. Words from `visit` end it as damage at that record. Changes nothing else.
///
/// # Errors
/// See [`OpenError`].
pub fn recover(
    directory: &Path,
    cluster: ClusterId,
    settings: &Settings,
    visit: &mut dyn FnMut(Recovered<'_>) -> Result<(), String>,
) -> Result<Recovery<FileDisk>, OpenError> {
    let opened = FileDisk::open(directory, settings.sync);
    let disk = opened.map_err(|source| OpenError::Directory { path: directory.to_owned(), source })?;
    let recovery = holdfast_shared::journal::recover(disk, cluster, visit)
        .map_err(|source| OpenError::Journal { path: directory.to_owned(), source })?;
    if let Some(cut) = &recovery.summary().cut {
        tracing::warn!(
            file = cut.file,
            offset = cut.offset,
            bytes = cut.bytes,
            "the journal's last write was cut short by a crash ({}); nobody was told that it was done",
            cut.problem
        );
    }
    if !settings.sync {
        tracing::warn!("journal.sync is off: a power cut makes this server forget what it has promised");
    }
    Ok(recovery)
}

/// Goes on with a journal that was read: cuts what a crash left half written, begins a new file of this `generation`
/// (one more than the [`holdfast_shared::journal::Summary`] says, unless more is known from elsewhere), and starts the
/// thread. Blocks for a few writes.
///
/// # Errors
/// See [`OpenError`].
pub fn start<D>(
    recovery: Recovery<D>,
    generation: u64,
    settings: &Settings,
    events: UnboundedSender<JournalEvent>,
) -> Result<Journal, OpenError>
where
    D: Disk + Send + 'static,
    D::File: Send,
{
    start_with_queue(recovery, generation, settings, events, QUEUE_BYTES_MAX)
}

/// The same, with so many bytes in the queue.
pub(crate) fn start_with_queue<D>(
    recovery: Recovery<D>,
    generation: u64,
    settings: &Settings,
    events: UnboundedSender<JournalEvent>,
    queue_bytes_max: usize,
) -> Result<Journal, OpenError>
where
    D: Disk + Send + 'static,
    D::File: Send,
{
    let engine = recovery.start(generation, settings.options())?;
    Journal::start(engine, events, queue_bytes_max).map_err(OpenError::Thread)
}
