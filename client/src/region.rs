//! [`Region`]: memory that servers place file bytes into, and fetch them from.

use crate::channel::Shared;
use crate::error::{Error, Result};
use holdfast_transport::{Registration, RemoteAccess, local};
use holdfast_verbs::memory;
use parking_lot::Mutex;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// Bytes of all regions of this process that live, and the most there ever were.
static LIVING: AtomicU64 = AtomicU64::new(0);
static LIVING_MAX: AtomicU64 = AtomicU64::new(0);
/// Regions with a memory file, each an open descriptor. No server maps more of one channel.
static SHAREABLE: AtomicU64 = AtomicU64::new(0);
const SHAREABLE_MAX: u64 = 256;

/// Memory of all regions of this process: see [`Region::memory`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionMemory {
    /// Of those that live, bytes.
    pub bytes: u64,
    /// The most there ever were at once, bytes.
    pub bytes_max: u64,
}

/// Memory that the server of a channel may read and write while requests name it. Cheap to clone: clones are the
/// same memory.
///
/// It is registered with a channel when a request first names it there, and stays so while it lives: make regions
/// once and use them again. (A first registration with an RDMA device pins the pages; that takes milliseconds for many
/// megabytes.) A registration with a channel that has ended is of no use to anybody, but keeps the pages pinned until
/// the region is registered with another channel, or dropped. Its bytes are never a slice: a peer may change them at any moment.
///
/// With a server on this host, make regions after the first channel to it: what was made before the process had one can't be given to
/// the server, whose bytes then are copied twice more.
#[derive(Clone)]
pub struct Region {
    inner: Arc<Inner>,
}

struct Inner {
    memory: Arc<memory::Region>,
    /// One for each channel that has seen this region.
    registrations: Mutex<Vec<(Weak<Shared>, Arc<Registration>)>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        LIVING.fetch_sub(self.memory.len() as u64, Ordering::Relaxed);
        if self.memory.file().is_some() {
            SHAREABLE.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Region {
    /// Zeroed, page-aligned memory of `length` bytes, 1 to 2^32 - 1.
    ///
    /// # Errors
    /// [`Error::Usage`] for a length outside, [`Error::Io`] if there is no memory.
    pub fn allocate(length: usize) -> Result<Self> {
        // Only a server on this host can be given memory, and memory files are slower to pin for a device.
        Self::of(length, local::in_use() && SHAREABLE.load(Ordering::Relaxed) < SHAREABLE_MAX)
    }

    /// As [`Region::allocate`], for what is used once: not worth a memory file.
    pub(crate) fn private(length: usize) -> Result<Self> {
        Self::of(length, false)
    }

    fn of(length: usize, shareable: bool) -> Result<Self> {
        if length == 0 || u32::try_from(length).is_err() {
            return Err(Error::Usage(format!("a region has 1 to {} bytes, not {length}", u32::MAX)));
        }
        // Without a file (as of too many open ones) it is served all the same.
        let shareable = if shareable { memory::Region::shareable(length).ok() } else { None };
        if shareable.is_some() {
            SHAREABLE.fetch_add(1, Ordering::Relaxed);
        }
        let memory = shareable
            .map_or_else(|| memory::Region::new(length), Ok)
            .map_err(|error| Error::io(format!("cannot allocate a region of {length} bytes"), error))?;
        let living = LIVING.fetch_add(memory.len() as u64, Ordering::Relaxed) + memory.len() as u64;
        LIVING_MAX.fetch_max(living, Ordering::Relaxed);
        Ok(Self { inner: Arc::new(Inner { memory, registrations: Mutex::new(Vec::new()) }) })
    }

    /// How much memory all regions of this process have: those of the application, those that streams make for themselves,
    /// and those that a request under way still needs. Registered with several channels, the same memory counts once here,
    /// and with verbs once for each channel in what the kernel calls pinned (`VmPin`, `ulimit -l`).
    pub fn memory() -> RegionMemory {
        RegionMemory { bytes: LIVING.load(Ordering::Relaxed), bytes_max: LIVING_MAX.load(Ordering::Relaxed) }
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.inner.memory.len()
    }

    /// Copies `data` to the bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Usage`] if they do not lie inside.
    pub fn copy_in(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.inner.memory.copy_in(offset, data).map_err(outside)
    }

    /// Copies the bytes from `offset` on to `data`, filling it.
    ///
    /// # Errors
    /// [`Error::Usage`] if they do not lie inside.
    pub fn copy_out(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.inner.memory.copy_out(offset, data).map_err(outside)
    }

    /// Reads from a local file straight into `range`, as `pread`: blocks, and may read less.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read_file(
        &self,
        file: BorrowedFd<'_>,
        file_offset: u64,
        range: Range<usize>,
    ) -> std::io::Result<usize> {
        self.inner.memory.read_file(file, file_offset, range)
    }

    /// As [`Region::read_file`], and never waits for the disk.
    pub(crate) fn read_file_nowait(
        &self,
        file: BorrowedFd<'_>,
        file_offset: u64,
        range: Range<usize>,
    ) -> std::io::Result<memory::Nowait> {
        self.inner.memory.read_file_nowait(file, file_offset, range)
    }

    /// Writes `range` straight to a local file, as `pwrite`: blocks, and may write less.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write_file(
        &self,
        file: BorrowedFd<'_>,
        file_offset: u64,
        range: Range<usize>,
    ) -> std::io::Result<usize> {
        self.inner.memory.write_file(file, file_offset, range)
    }

    /// The bytes of `range` as atomics: a view without a copy; `None` if they do not lie inside.
    pub fn as_atomics(&self, range: Range<usize>) -> Option<&[AtomicU8]> {
        self.inner.memory.as_atomics(range)
    }

    /// Checks a range that a request names, and gives its length.
    pub(crate) fn check(&self, range: &Range<usize>) -> Result<usize> {
        if range.start <= range.end && range.end <= self.len() {
            Ok(range.end - range.start)
        } else {
            Err(Error::Usage(format!("bytes {range:?} do not lie within the region's {}", self.len())))
        }
    }

    /// The registration with one channel; made now if there is none.
    pub(crate) fn registration(&self, channel: &Arc<Shared>) -> Result<Arc<Registration>> {
        let mut all = self.inner.registrations.lock();
        if let Some((_, known)) =
            all.iter().find(|(weak, _)| std::ptr::eq(weak.as_ptr(), Arc::as_ptr(channel)))
        {
            return Ok(Arc::clone(known));
        }
        all.retain(|(weak, _)| weak.strong_count() > 0);
        let made = channel
            .registrar
            .register(Arc::clone(&self.inner.memory), RemoteAccess::FetchAndPlace)
            .map_err(|error| Error::io("cannot register a region with the channel", error))?;
        let made = Arc::new(made);
        all.push((Arc::downgrade(channel), Arc::clone(&made)));
        Ok(made)
    }
}

fn outside(error: memory::OutOfRange) -> Error {
    Error::Usage(error.to_string())
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("len", &self.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_ranges_are_checked() {
        assert!(matches!(Region::allocate(0), Err(Error::Usage(_))));
        assert!(matches!(Region::allocate(1 << 32), Err(Error::Usage(_))));
        let region = Region::allocate(10).unwrap();
        assert_eq!(region.check(&(3..10)).unwrap(), 7);
        assert!(region.check(&(3..11)).is_err());
        assert!(region.check(&std::ops::Range { start: 4, end: 3 }).is_err());
        assert!(region.copy_in(8, &[0; 3]).is_err());
    }
}
