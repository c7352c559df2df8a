//! Files that are read again and again: which of their pages are pinned, so that long reads are placed straight from them.
//!
//! ```text
//!   long read ─► warm: bytes read of each extent are counted ── read twice over ─► pinner thread: pins it ─┐
//!                                                                                                          ▼
//!   long read ─► covers? ─► is the file as it was when they were pinned? ── yes ─► placed from the extents (`place`)
//!                                        └── no ─► all of the file is let go, and the read goes the usual way
//! ```
//!
//! Each worker has its own, and its part of what may be pinned. An extent is let go when the file has changed, when its
//! last binding here ends, or for another one, once nobody has read it for a while.
//!
//! **Why what is placed is true.** A write to a file changes its pages where they are, and a device sees that. What takes pages
//! away from a file (cutting it short, punching a hole, writing past the page cache) changes its time of change, and that is
//! asked at each read ([`Stamp`]). A file is pinned only when that time is [`SETTLED`] past, so that a later change can't get
//! the same one. Where a file system can't be relied on for that, or would fill holes when they are pinned, there is no stamp.

use super::pinner::{Job, Pin, PinDone};
use crate::config::EngineConfig;
use crate::gauges::Gauges;
use holdfast_transport::verbs::{PinnedFile, Pinner};
use std::collections::HashMap;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::backend::FileIo;

/// What is pinned or let go at once, bytes; extents begin at multiples of it.
pub(crate) const EXTENT_BYTES: u64 = 4 << 20;
const PAGE: u64 = 4096;
/// Shorter reads are copied: asking for the stamp would cost as much.
pub(crate) const READ_BYTES_MIN: u32 = 64 << 10;
/// An extent is pinned when so many times its bytes have been read since the file was first read here, or changed.
const HEAT: u64 = 2;
/// An extent gives way to another only when it was not read for so long. Else a file larger than what may be pinned, read
/// round and round, would be pinned and unpinned all the time.
const IDLE: Duration = Duration::from_secs(1);
/// After a refusal nothing of the file is pinned for so long.
const REFUSED: Duration = Duration::from_secs(10);
/// Files that are watched for becoming hot, by one worker.
const FILES_MAX: usize = 1024;
/// Extents of one file whose reads are counted.
const COUNTED_MAX: usize = 4096;
/// So long ago must the last change of a file be: longer than the tick of the clock that stamps files, and than what is stamped
/// when it begins and takes pages away when it ends.
pub(super) const SETTLED: Duration = Duration::from_secs(1);

/// One file, by device and inode number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileId(pub u64, pub u64);

impl FileId {
    /// Of an open file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        Ok(Self(stat.st_dev, stat.st_ino))
    }
}

/// What tells one state of a file's page list from a later one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// Which file.
    pub file: FileId,
    /// Its time of change: seconds and nanoseconds.
    pub changed: (i64, u32),
    /// Its length, bytes.
    pub length: u64,
}

/// A file as the channels of one device see it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct FileKey {
    pub(super) device: usize,
    pub(super) file: FileId,
}

enum Extent {
    /// Bytes read since it was last pinned.
    Cold(u64),
    Pinning,
    Pinned {
        pages: PinnedFile,
        used: Instant,
    },
}

#[derive(Default)]
struct File {
    /// Bindings of it here.
    bindings: usize,
    /// As it was when what is pinned was pinned.
    stamp: Option<Stamp>,
    extents: HashMap<u64, Extent>,
    refused_until: Option<Instant>,
}

/// See the module's text.
pub(crate) struct PinnedFiles {
    worker: usize,
    bytes_max: u64,
    /// Pinned, being pinned and being unpinned.
    bytes: u64,
    files: HashMap<FileKey, File>,
    /// Let go, but still being placed from.
    leaving: Vec<PinnedFile>,
    jobs: Sender<Job>,
    gauges: Arc<Gauges>,
}

/// The extents of a range of at least one byte.
pub(crate) fn extents(offset: u64, length: u64) -> RangeInclusive<u64> {
    let last = offset.saturating_add(length.saturating_sub(1));
    offset / EXTENT_BYTES..=last / EXTENT_BYTES
}

/// What it pins: whole pages.
pub(super) fn pinned_bytes(pages: &PinnedFile) -> u64 {
    (pages.len() as u64).next_multiple_of(PAGE)
}

impl PinnedFiles {
    /// `None` if a worker's part is not even one extent.
    pub(crate) fn new(
        worker: usize,
        config: &EngineConfig,
        jobs: Sender<Job>,
        gauges: Arc<Gauges>,
    ) -> Option<Self> {
        let bytes_max = (config.pinned_bytes_max / config.worker_count()) as u64;
        let (files, leaving) = (HashMap::new(), Vec::new());
        (bytes_max >= EXTENT_BYTES).then_some(Self {
            worker,
            bytes_max,
            bytes: 0,
            files,
            leaving,
            jobs,
            gauges,
        })
    }

    /// A binding of the file is read through for the first time. False: there are too many to watch it.
    pub(crate) fn enter(&mut self, key: FileKey) -> bool {
        if self.files.len() >= FILES_MAX && !self.files.contains_key(&key) {
            return false;
        }
        self.files.entry(key).or_default().bindings += 1;
        true
    }

    /// A binding that entered is gone; with the last one all that is pinned of the file goes.
    pub(crate) fn leave(&mut self, key: FileKey) {
        let Some(file) = self.files.get_mut(&key) else { return };
        file.bindings = file.bindings.saturating_sub(1);
        if file.bindings == 0 {
            self.forget(key);
            self.files.remove(&key);
        }
    }

    /// True if all bytes of the range that the file had are pinned.
    pub(crate) fn covers(&self, key: FileKey, offset: u64, length: u64) -> bool {
        let Some(file) = self.files.get(&key) else { return false };
        let Some(there) = file.stamp.map(|stamp| stamp.length.saturating_sub(offset).min(length)) else {
            return false;
        };
        let pinned = |index| matches!(file.extents.get(&index), Some(Extent::Pinned { .. }));
        there > 0 && extents(offset, there).all(pinned)
    }

    /// True if what is pinned of the file is what the file has now. Otherwise it is let go.
    pub(crate) fn confirm(&mut self, key: FileKey, now: Option<Stamp>) -> bool {
        let same = now.is_some() && self.files.get(&key).is_some_and(|file| file.stamp == now);
        if !same {
            self.forget(key);
        }
        same
    }

    /// An extent that is pinned, to be placed from now.
    pub(crate) fn extent(&mut self, key: FileKey, index: u64, now: Instant) -> Option<&PinnedFile> {
        match self.files.get_mut(&key)?.extents.get_mut(&index)? {
            Extent::Pinned { pages, used } => {
                *used = now;
                Some(pages)
            }
            _ => None,
        }
    }

    /// A range is about to be read the usual way: counts it, and has pinned what has become hot.
    pub(crate) fn warm(
        &mut self,
        key: FileKey,
        io: &Arc<dyn FileIo>,
        pinner: &Pinner,
        (offset, length): (u64, u64),
        now: Instant,
    ) {
        let Some(file) = self.files.get_mut(&key) else { return };
        if file.refused_until.is_some_and(|until| now < until) {
            return;
        }
        file.refused_until = None;
        let mut hot = None;
        for index in extents(offset, length) {
            if file.extents.len() >= COUNTED_MAX && !file.extents.contains_key(&index) {
                // A very large file, read here and there: counting starts anew.
                file.extents.retain(|_, extent| !matches!(extent, Extent::Cold(_)));
            }
            let start = (index * EXTENT_BYTES).max(offset);
            let end = ((index + 1) * EXTENT_BYTES).min(offset.saturating_add(length));
            if let Extent::Cold(bytes) = file.extents.entry(index).or_insert(Extent::Cold(0)) {
                *bytes += end.saturating_sub(start);
                if *bytes >= HEAT * EXTENT_BYTES {
                    *bytes = 0;
                    hot = hot.or(Some(index));
                }
            }
        }
        let Some(index) = hot else { return };
        if self.bytes + EXTENT_BYTES > self.bytes_max && !self.make_room(now) {
            return;
        }
        let pin = Pin { worker: self.worker, key, index, file: Arc::clone(io), pinner: pinner.clone() };
        if self.jobs.send(Job::Pin(pin)).is_ok() {
            self.count_in(EXTENT_BYTES);
            if let Some(file) = self.files.get_mut(&key) {
                file.extents.insert(index, Extent::Pinning);
            }
        }
    }

    /// The pinner has done what [`PinnedFiles::warm`] asked for.
    pub(crate) fn pinned(&mut self, done: PinDone, now: Instant) {
        let PinDone { key, index, outcome } = done;
        let (pages, stamp) = match outcome {
            Ok(pinned) => pinned,
            Err(lasting) => {
                self.count_out(EXTENT_BYTES);
                if let Some(file) = self.files.get_mut(&key) {
                    if let Some(Extent::Pinning) = file.extents.get(&index) {
                        file.extents.remove(&index);
                    }
                    file.refused_until = lasting.then_some(now + REFUSED);
                }
                return;
            }
        };
        // The file may end before the extent does.
        self.count_out(EXTENT_BYTES.saturating_sub(pinned_bytes(&pages)));
        if self.files.get(&key).is_some_and(|file| file.stamp.is_some_and(|old| old != stamp)) {
            // Pinned later, so what this one says is the newer.
            self.forget(key);
        }
        match self.files.get_mut(&key) {
            Some(file) if file.bindings > 0 => {
                file.stamp = Some(stamp);
                // Its binding had gone and come again meanwhile, and it was asked for twice.
                if let Some(Extent::Pinned { pages, .. }) =
                    file.extents.insert(index, Extent::Pinned { pages, used: now })
                {
                    self.let_go(pages);
                }
            }
            _ => self.let_go(pages),
        }
    }

    /// The pinner has unpinned so many bytes.
    pub(crate) fn unpinned(&mut self, bytes: u64) {
        self.count_out(bytes);
    }

    /// Operations have completed: what was let go meanwhile can be unpinned.
    pub(crate) fn sweep(&mut self) {
        let mut at = 0;
        while at < self.leaving.len() {
            if self.leaving[at].is_idle() {
                let pages = self.leaving.swap_remove(at);
                self.let_go(pages);
            } else {
                at += 1;
            }
        }
    }

    /// True if something waits for [`PinnedFiles::sweep`].
    pub(crate) fn wants_sweep(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// Lets all go that is pinned of a file, and counts its reads from the beginning.
    fn forget(&mut self, key: FileKey) {
        let Some(file) = self.files.get_mut(&key) else { return };
        file.stamp = None;
        // One that is being pinned comes with a stamp of its own.
        let gone: Vec<u64> = file
            .extents
            .iter()
            .filter_map(|(index, extent)| (!matches!(extent, Extent::Pinning)).then_some(*index))
            .collect();
        for index in gone {
            let extent = self.files.get_mut(&key).and_then(|file| file.extents.remove(&index));
            if let Some(Extent::Pinned { pages, .. }) = extent {
                self.let_go(pages);
            }
        }
    }

    /// Lets the extent go that was not read for longest, if that is long enough. True if there is room for another now.
    fn make_room(&mut self, now: Instant) -> bool {
        let mut oldest: Option<(Instant, FileKey, u64)> = None;
        for (key, file) in &self.files {
            for (index, extent) in &file.extents {
                if let Extent::Pinned { used, .. } = extent {
                    if oldest.is_none_or(|(at, ..)| *used < at) {
                        oldest = Some((*used, *key, *index));
                    }
                }
            }
        }
        if let Some((used, key, index)) = oldest {
            if now.saturating_duration_since(used) >= IDLE {
                let extent = self.files.get_mut(&key).and_then(|file| file.extents.remove(&index));
                if let Some(Extent::Pinned { pages, .. }) = extent {
                    self.let_go(pages);
                }
            }
        }
        // It is unpinned by the time of the next read that would need its room.
        self.bytes + EXTENT_BYTES <= self.bytes_max
    }

    /// Unpinning goes page by page: not on this thread.
    fn let_go(&mut self, pages: PinnedFile) {
        if pages.is_idle() {
            // The thread ends after the workers: there is always somebody to take it.
            let _ = self.jobs.send(Job::Unpin { worker: self.worker, pages });
        } else {
            self.leaving.push(pages);
        }
    }

    fn count_in(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.gauges.pinned_file_bytes.add(bytes);
    }

    fn count_out(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.gauges.pinned_file_bytes.sub(bytes);
    }
}
