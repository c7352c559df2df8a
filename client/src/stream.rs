//! Streams of a file's bytes, in order and pipelined, with bounded memory: through one binding, or several channels.
//!
//! | what | for |
//! |---|---|
//! | [`Reader`] | reading ahead of an application that reads in order |
//! | [`Writer`] | writing behind one that writes in order |
//! | [`Streamer`] | whole files to and from local files, with no copy in this process |
//!
//! The [`Streamer`]:
//!
//! ```text
//!   region: │ lane 0 │ lane 1 │ lane 2 │ ...      depth lanes of chunk bytes
//!              ▲ │
//!        pread │ │ pwrite (threads for blocking work)        each lane takes the next chunk of the file,
//!              │ ▼                                           moves it, and takes another
//!         local file          lane ◄── the server fetches or places ──► file on the server
//! ```

mod chunk;
mod reader;
mod target;
mod writer;

pub use chunk::Chunk;
pub use reader::Reader;
pub use target::Target;
pub use writer::Writer;

use crate::Region;
use crate::error::{Error, Result};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::task::JoinSet;

/// Told of each piece moved, in bytes.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// How much memory a stream has: `depth` chunks of `chunk` bytes, each registered with every channel it goes by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    /// Chunks at most, on loan or under way.
    pub depth: usize,
    /// Bytes of each.
    pub chunk: usize,
}

impl Default for Memory {
    /// 8 MiB: 8 chunks of 1 MiB.
    fn default() -> Self {
        Self { depth: 8, chunk: 1 << 20 }
    }
}

impl Memory {
    /// All of it, bytes.
    pub fn bytes(&self) -> usize {
        self.depth.saturating_mul(self.chunk)
    }

    fn check(&self) -> Result<()> {
        let Self { depth, chunk } = *self;
        if chunk == 0 || u32::try_from(chunk).is_err() {
            return Err(Error::Usage(format!("chunks of {chunk} bytes are no regions of 1 byte to 4 GiB")));
        }
        if depth == 0 || depth > DEPTH_MAX {
            return Err(Error::Usage(format!("a stream has 1 to {DEPTH_MAX} chunks, not {depth}")));
        }
        Ok(())
    }
}

/// Chunks of one stream at most.
const DEPTH_MAX: usize = 4096;

/// As tokio's traits tell it.
fn io_error(error: Error) -> std::io::Error {
    use std::io::ErrorKind;
    let kind = match std::io::Error::from_raw_os_error(error.errno()).kind() {
        // What a reader or writer of bytes would take for something of its own.
        ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::UnexpectedEof => ErrorKind::Other,
        kind => kind,
    };
    std::io::Error::new(kind, error)
}

/// Moves files one after the other through one region, which is registered with a channel once.
///
/// ```no_run
/// # async fn example(binding: holdfast_client::Binding) -> holdfast_client::Result<()> {
/// use holdfast_client::stream::Streamer;
/// use std::sync::Arc;
/// let file = Arc::new(std::fs::File::open("local").unwrap());
/// let length = file.metadata().unwrap().len();
/// let mut streamer = Streamer::new(8, 1 << 20)?;
/// streamer.upload(&file, &binding, length, Arc::new(|bytes| println!("{bytes} more"))).await?;
/// binding.flush().await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Streamer {
    depth: usize,
    chunk: usize,
    /// Taken while a file is moved: after a cancelled move the server may still use it, and the next gets a new one.
    region: Option<Region>,
}

#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
}

/// What all lanes of one file share.
struct Work {
    way: Way,
    file: Arc<File>,
    target: Target,
    region: Region,
    length: u64,
    chunk: usize,
    next: AtomicU64,
    moved: AtomicU64,
    failed: AtomicBool,
    progress: Progress,
}

impl Streamer {
    /// With up to `depth` chunks of `chunk` bytes under way at once.
    ///
    /// # Errors
    /// [`Error::Usage`] if one is 0, or their product no region.
    pub fn new(depth: usize, chunk: usize) -> Result<Self> {
        let total = depth.checked_mul(chunk).filter(|total| *total > 0 && u32::try_from(*total).is_ok());
        if total.is_none() {
            return Err(Error::Usage(format!(
                "{depth} chunks of {chunk} bytes are not a region of 1 byte to 4 GiB"
            )));
        }
        Ok(Self { depth, chunk, region: None })
    }

    /// Writes the first `length` bytes of a local file to the target. Returns how many were there: fewer if the
    /// file was cut meanwhile. Nothing is flushed.
    ///
    /// # Errors
    /// The first error of either side, when every request has been answered.
    pub async fn upload(
        &mut self,
        file: &Arc<File>,
        target: impl Into<Target>,
        length: u64,
        progress: Progress,
    ) -> Result<u64> {
        self.run(Way::Up, file, target.into(), length, progress).await
    }

    /// Reads the first `length` bytes of the target into a local file. Returns how many were there.
    ///
    /// # Errors
    /// As [`Streamer::upload`].
    pub async fn download(
        &mut self,
        file: &Arc<File>,
        target: impl Into<Target>,
        length: u64,
        progress: Progress,
    ) -> Result<u64> {
        self.run(Way::Down, file, target.into(), length, progress).await
    }

    async fn run(
        &mut self,
        way: Way,
        file: &Arc<File>,
        target: Target,
        length: u64,
        progress: Progress,
    ) -> Result<u64> {
        let region = match self.region.take() {
            Some(region) => region,
            None => Region::allocate(self.depth * self.chunk)?,
        };
        let chunks = usize::try_from(length.div_ceil(self.chunk as u64)).unwrap_or(usize::MAX);
        let lanes = self.depth.min(chunks);
        let work = Arc::new(Work {
            way,
            file: Arc::clone(file),
            target,
            region: region.clone(),
            length,
            chunk: self.chunk,
            next: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            progress,
        });
        let result =
            if lanes <= 1 { lane(Arc::clone(&work), 0).await } else { all_lanes(&work, lanes).await };
        // Every request has been answered: the region may be used again.
        self.region = Some(region);
        result.map(|()| work.moved.load(Ordering::Relaxed))
    }
}

async fn all_lanes(work: &Arc<Work>, lanes: usize) -> Result<()> {
    let mut running = JoinSet::new();
    for number in 0..lanes {
        running.spawn(lane(Arc::clone(work), number));
    }
    let mut result = Ok(());
    // All of them, also after an error: the region must be quiet before it is used again.
    while let Some(ended) = running.join_next().await {
        let ended = ended.unwrap_or(Err(Error::Internal("a copy lane panicked")));
        if result.is_ok() {
            result = ended;
        }
    }
    result
}

async fn lane(work: Arc<Work>, number: usize) -> Result<()> {
    let start = number * work.chunk;
    while !work.failed.load(Ordering::Relaxed) {
        let offset = work.next.fetch_add(1, Ordering::Relaxed).saturating_mul(work.chunk as u64);
        if offset >= work.length {
            break;
        }
        let wanted = usize::try_from(work.length - offset).unwrap_or(usize::MAX).min(work.chunk);
        match chunk(&work, start..start + wanted, offset).await {
            Ok(0) => break,
            Ok(count) => {
                work.moved.fetch_add(count as u64, Ordering::Relaxed);
                (work.progress)(count as u64);
            }
            Err(error) => {
                work.failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Moves one chunk, and returns how much of it there was.
async fn chunk(work: &Arc<Work>, range: Range<usize>, offset: u64) -> Result<usize> {
    match work.way {
        Way::Up => {
            let count = local(work, range.clone(), offset).await?;
            work.target.write_all(&work.region, range.start..range.start + count, offset).await?;
            Ok(count)
        }
        Way::Down => {
            let count = work.target.read_full(&work.region, range.clone(), offset).await?;
            local(work, range.start..range.start + count, offset).await
        }
    }
}

/// Reads or writes the local file, on a thread for blocking work; all of the range, unless the file ends.
async fn local(work: &Arc<Work>, range: Range<usize>, offset: u64) -> Result<usize> {
    let work = Arc::clone(work);
    tokio::task::spawn_blocking(move || {
        let mut count = 0;
        while count < range.len() {
            let (rest, at) = (range.start + count..range.end, offset + count as u64);
            let moved = match work.way {
                Way::Up => work.region.read_file(work.file.as_fd(), at, rest),
                Way::Down => work.region.write_file(work.file.as_fd(), at, rest),
            };
            match (moved, work.way) {
                (Ok(0), Way::Up) => break,
                (Ok(0), Way::Down) => {
                    return Err(Error::io(
                        "the local file takes no more",
                        std::io::ErrorKind::WriteZero.into(),
                    ));
                }
                (Ok(more), _) => count += more,
                (Err(error), _) if error.kind() == std::io::ErrorKind::Interrupted => {}
                (Err(error), Way::Up) => return Err(Error::io("cannot read the local file", error)),
                (Err(error), Way::Down) => return Err(Error::io("cannot write the local file", error)),
            }
        }
        Ok(count)
    })
    .await
    .unwrap_or(Err(Error::Internal("local file work panicked")))
}
