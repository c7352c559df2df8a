//! [`Reader`]: a file read in order, with chunks of it under way ahead of the application.
//!
//! ```text
//!   file:   ──────│ on loan or being copied │ ahead │ ahead │ ahead │──────►
//!                 ▲ position                  at first one short chunk; longer, and then more of them, with each
//!                                             that was read to its end; after a seek as at first
//! ```

use super::chunk::{Chunk, Chunks};
use super::{Memory, Target, io_error};
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::future::Future;
use std::io::SeekFrom;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// The first read of a stream, bytes.
const FIRST: usize = 64 << 10;

/// Reads a file in order, ahead of the application, into memory that is bounded by its [`Memory`].
///
/// [`Reader::next_chunk`] gives bytes where the server has placed them; as an [`AsyncRead`] it copies them. How far it reads
/// ahead grows while the application goes through the file in order, and begins anew after a seek.
///
/// The end of the file is told only when a read at that very place has found nothing there: asked again, it looks again,
/// and goes on if the file has grown. Bytes read ahead are as they were when they were read; of a file that is cut
/// meanwhile, up to so many may still be seen.
///
/// What was read ahead and is not wanted any more (after a seek) keeps its memory until it is answered. Dropping the reader
/// drops all.
///
/// ```no_run
/// # async fn example(binding: holdfast_client::Binding) -> holdfast_client::Result<()> {
/// use holdfast_client::stream::{Memory, Reader};
/// let mut reader = Reader::new(&binding, Memory { depth: 8, chunk: 1 << 20 })?;
/// let mut sum = 0u64;
/// while let Some(chunk) = reader.next_chunk().await? {
///     sum += chunk.as_atomics().iter().filter(|byte| byte.load(std::sync::atomic::Ordering::Relaxed) == b'\n').count() as u64;
/// }
/// println!("{sum} lines");
/// # Ok(()) }
/// ```
pub struct Reader {
    target: Target,
    chunks: Chunks,
    memory: Memory,
    /// Under way or answered, in the file's order.
    ahead: VecDeque<Ahead>,
    /// Being copied to the application.
    current: Option<Chunk>,
    /// Waits for memory.
    waiting: Option<Pin<Box<dyn Future<Output = Result<Chunk>> + Send>>>,
    /// Where the next read begins.
    next: u64,
    /// How many reads to have under way, and how long they are.
    window: usize,
    length: usize,
    seeking: Option<Seeking>,
    /// Reads under way; those nobody waits for any more, too.
    reads: JoinSet<()>,
}

/// A seek that was begun; with the file's size, if it counts from the end.
struct Seeking {
    to: SeekFrom,
    size: Option<Pin<Box<dyn Future<Output = Result<u64>> + Send>>>,
}

struct Ahead {
    offset: u64,
    wanted: usize,
    answer: oneshot::Receiver<Result<Chunk>>,
}

impl Reader {
    /// Reads from the file's beginning. To be used within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Usage`] if the memory is none, or its chunks are no regions.
    pub fn new(target: impl Into<Target>, memory: Memory) -> Result<Self> {
        memory.check()?;
        Ok(Self {
            target: target.into(),
            chunks: Chunks::new(memory.depth, memory.chunk),
            memory,
            ahead: VecDeque::new(),
            current: None,
            waiting: None,
            next: 0,
            window: 1,
            length: FIRST.min(memory.chunk),
            seeking: None,
            reads: JoinSet::new(),
        })
    }

    /// Where in the file the application is, bytes.
    pub fn position(&self) -> u64 {
        let ahead = self.ahead.front().map(|ahead| ahead.offset);
        self.current.as_ref().map(Chunk::offset).or(ahead).unwrap_or(self.next)
    }

    /// Goes to another place. What was read ahead is given up, unless it is the same place.
    pub fn seek_to(&mut self, offset: u64) {
        if offset == self.position() {
            return;
        }
        // Within what was read: the rest of it is as good as before.
        if let Some(current) = &mut self.current {
            let skip = offset.checked_sub(current.offset()).and_then(|skip| usize::try_from(skip).ok());
            if let Some(skip) = skip.filter(|skip| *skip < current.len()) {
                current.advance(skip);
                return;
            }
        }
        self.current = None;
        self.begin_anew(offset);
    }

    fn begin_anew(&mut self, offset: u64) {
        self.ahead.clear();
        self.next = offset;
        self.window = 1;
        self.length = FIRST.min(self.memory.chunk);
    }

    /// The next bytes of the file, where the server has placed them; `None` at its end.
    ///
    /// # Errors
    /// As [`crate::Binding::read_at`]; asked again, it reads again from the same place.
    pub async fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        std::future::poll_fn(|cx| self.poll_chunk(cx)).await
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Chunk>>> {
        if let Some(current) = self.current.take().filter(|current| !current.is_empty()) {
            return Poll::Ready(Ok(Some(current)));
        }
        while self.reads.try_join_next().is_some() {}
        self.read_ahead()?;
        if self.ahead.is_empty() {
            // All memory is on loan, or under way for nobody.
            let chunks = &self.chunks;
            let waiting = self.waiting.get_or_insert_with(|| Box::pin(chunks.clone().take()));
            let chunk = ready!(waiting.as_mut().poll(cx));
            self.waiting = None;
            self.start(chunk?);
        }
        let Some(front) = self.ahead.front_mut() else {
            return Poll::Ready(Err(Error::Internal("a stream reads nothing")));
        };
        let answer = ready!(Pin::new(&mut front.answer).poll(cx));
        let (offset, wanted) = (front.offset, front.wanted);
        self.ahead.pop_front();
        let chunk = match answer {
            Ok(Ok(chunk)) => chunk,
            Ok(Err(error)) => {
                self.begin_anew(offset);
                return Poll::Ready(Err(error));
            }
            Err(_) => {
                self.begin_anew(offset);
                return Poll::Ready(Err(Error::Internal("a read of a stream was cancelled")));
            }
        };
        if chunk.len() < wanted {
            // Read behind the end, at another time than this: it does not count.
            self.begin_anew(offset + chunk.len() as u64);
            return Poll::Ready(Ok((!chunk.is_empty()).then_some(chunk)));
        }
        if self.length < self.memory.chunk {
            self.length = (self.length * 2).min(self.memory.chunk);
        } else {
            self.window = (self.window * 2).min(self.memory.depth);
        }
        // The place that this one had is for the next.
        self.read_ahead()?;
        Poll::Ready(Ok(Some(chunk)))
    }

    /// Puts as many reads under way as there should be, and as there is memory for.
    fn read_ahead(&mut self) -> Result<()> {
        while self.ahead.len() < self.window {
            let Some(chunk) = self.chunks.try_take()? else { break };
            self.start(chunk);
        }
        Ok(())
    }

    fn start(&mut self, mut chunk: Chunk) {
        let (target, offset, wanted) = (self.target.clone(), self.next, self.length);
        chunk.holds(wanted, offset);
        let (tell, answer) = oneshot::channel();
        // A task of its own: it goes on while the application does something else.
        self.reads.spawn(async move {
            let read = target.read_full(chunk.region(), chunk.range(), offset).await;
            let answer = read.map(|count| {
                chunk.holds(count, offset);
                chunk
            });
            let _ = tell.send(answer);
        });
        self.next = offset.saturating_add(wanted as u64);
        self.ahead.push_back(Ahead { offset, wanted, answer });
    }
}

impl AsyncRead for Reader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let this = self.get_mut();
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let Some(mut chunk) = ready!(this.poll_chunk(cx)).map_err(io_error)? else {
            return Poll::Ready(Ok(()));
        };
        let count = chunk.len().min(buffer.remaining());
        let copied = chunk.copy_out(0, buffer.initialize_unfilled_to(count));
        if copied.is_ok() {
            buffer.advance(count);
            chunk.advance(count);
        }
        this.current = Some(chunk);
        Poll::Ready(copied.map_err(io_error))
    }
}

impl AsyncSeek for Reader {
    fn start_seek(self: Pin<&mut Self>, to: SeekFrom) -> std::io::Result<()> {
        let this = self.get_mut();
        let size = match to {
            SeekFrom::End(_) => {
                let open = this.target.open().cloned();
                let open = open.ok_or_else(|| io_error(Error::Internal("a stream without an open")))?;
                let size = async move { Ok(open.attributes_now().await?.size) };
                Some(Box::pin(size) as Pin<Box<dyn Future<Output = Result<u64>> + Send>>)
            }
            _ => None,
        };
        this.seeking = Some(Seeking { to, size });
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<u64>> {
        let this = self.get_mut();
        let Some(seeking) = &mut this.seeking else { return Poll::Ready(Ok(this.position())) };
        let size = match &mut seeking.size {
            Some(size) => ready!(size.as_mut().poll(cx)),
            None => Ok(0),
        };
        let to = seeking.to;
        this.seeking = None;
        let size = size.map_err(io_error)?;
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(by) => this.position().checked_add_signed(by),
            SeekFrom::End(by) => size.checked_add_signed(by),
        };
        let target = target.ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::InvalidInput, "a seek to before the file, or too far")
        })?;
        this.seek_to(target);
        Poll::Ready(Ok(target))
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader")
            .field("position", &self.position())
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}
