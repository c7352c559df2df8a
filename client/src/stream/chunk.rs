//! [`Chunk`]: a piece of registered memory on loan; and the [`Chunks`] that lend it, which bound how much there is.
//!
//! ```text
//!   Chunks: places ──take──► Chunk (a place and a region) ──► under way ──► the application
//!      ▲                                                                        │
//!      └────────────── dropped, by whoever had it last ◄────────────────────────┘
//! ```

use crate::error::{Error, Result};
use crate::region::Region;
use parking_lot::Mutex;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Lends chunks of one size, so many at once.
#[derive(Clone)]
pub(super) struct Chunks {
    inner: Arc<Inner>,
}

struct Inner {
    bytes: usize,
    places: Arc<Semaphore>,
    /// Regions nobody uses: registered already.
    idle: Mutex<Vec<Region>>,
}

/// Registered memory on loan from a [`super::Reader`] or a [`super::Writer`]: it can be filled or used without a copy, and
/// goes back when it is dropped. Whoever holds all of them waits for ever for the next.
///
/// Its bytes are never a slice, as a region's are not: a server that breaks the protocol may change them at any moment. Nothing
/// of it is under way while the application has it.
pub struct Chunk {
    region: Region,
    range: Range<usize>,
    offset: u64,
    home: Arc<Inner>,
    _place: OwnedSemaphorePermit,
}

impl Chunks {
    pub(super) fn new(count: usize, bytes: usize) -> Self {
        let places = Arc::new(Semaphore::new(count));
        Self { inner: Arc::new(Inner { bytes, places, idle: Mutex::default() }) }
    }

    /// One, if one is free.
    pub(super) fn try_take(&self) -> Result<Option<Chunk>> {
        match Arc::clone(&self.inner.places).try_acquire_owned() {
            Ok(place) => self.lend(place).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// One, when one is free.
    pub(super) async fn take(self) -> Result<Chunk> {
        let places = Arc::clone(&self.inner.places);
        let place =
            places.acquire_owned().await.map_err(|_| Error::Internal("chunks are closed by nobody"))?;
        self.lend(place)
    }

    fn lend(&self, place: OwnedSemaphorePermit) -> Result<Chunk> {
        let idle = self.inner.idle.lock().pop();
        let region = match idle {
            Some(region) => region,
            None => Region::allocate(self.inner.bytes)?,
        };
        let range = 0..self.inner.bytes;
        Ok(Chunk { region, range, offset: 0, home: Arc::clone(&self.inner), _place: place })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.home.idle.lock().push(self.region.clone());
    }
}

impl Chunk {
    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Where they are in the file, bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Copies the bytes from `at` on to `data`, filling it.
    ///
    /// # Errors
    /// [`Error::Usage`] if they do not lie inside.
    pub fn copy_out(&self, at: usize, data: &mut [u8]) -> Result<()> {
        self.region.copy_out(self.inside(at, data.len())?, data)
    }

    /// Copies `data` to the bytes from `at` on.
    ///
    /// # Errors
    /// [`Error::Usage`] if they do not lie inside.
    pub fn copy_in(&self, at: usize, data: &[u8]) -> Result<()> {
        self.region.copy_in(self.inside(at, data.len())?, data)
    }

    /// A view of the bytes without a copy.
    pub fn as_atomics(&self) -> &[AtomicU8] {
        self.region.as_atomics(self.range.clone()).unwrap_or_default()
    }

    /// Writes the bytes of `part` to a local file, as `pwrite`: blocks, and may write less.
    ///
    /// # Errors
    /// The kernel's; `InvalidInput` if they do not lie inside.
    pub fn write_file(
        &self,
        file: BorrowedFd<'_>,
        file_offset: u64,
        part: Range<usize>,
    ) -> std::io::Result<usize> {
        self.region.write_file(file, file_offset, self.part(&part)?)
    }

    /// Reads into the bytes of `part` from a local file, as `pread`: blocks, and may read less.
    ///
    /// # Errors
    /// As [`Chunk::write_file`].
    pub fn read_file(
        &self,
        file: BorrowedFd<'_>,
        file_offset: u64,
        part: Range<usize>,
    ) -> std::io::Result<usize> {
        self.region.read_file(file, file_offset, self.part(&part)?)
    }

    fn inside(&self, at: usize, length: usize) -> Result<usize> {
        if at.checked_add(length).is_some_and(|end| end <= self.len()) {
            Ok(self.range.start + at)
        } else {
            Err(Error::Usage(format!("{length} bytes from {at} do not lie in a chunk of {}", self.len())))
        }
    }

    fn part(&self, part: &Range<usize>) -> std::io::Result<Range<usize>> {
        let length = part.end.checked_sub(part.start).ok_or(std::io::ErrorKind::InvalidInput)?;
        let start = self.inside(part.start, length).map_err(|_| std::io::ErrorKind::InvalidInput)?;
        Ok(start..start + length)
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    pub(super) fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// It holds so many bytes of the file, from `offset` on.
    pub(super) fn holds(&mut self, length: usize, offset: u64) {
        self.range.end = self.region.len().min(self.range.start + length);
        self.offset = offset;
    }

    /// The first bytes are used up.
    pub(super) fn advance(&mut self, count: usize) {
        let count = count.min(self.len());
        self.range.start += count;
        self.offset += count as u64;
    }
}

impl std::fmt::Debug for Chunk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chunk")
            .field("offset", &self.offset)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
