//! [`Writer`]: a file written in order, behind the application.
//!
//! ```text
//!   application ──copies, or fills──► chunk ──full, or flushed──► under way (a task each) ──► answered
//!                                                                     │ failed
//!                                                                     ▼
//!                                              every later write, flush and shutdown fails
//! ```

use super::chunk::{Chunk, Chunks};
use super::{Memory, Target, io_error};
use crate::error::{Error, Result};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;
use tokio::task::JoinSet;

/// Writes a file in order, from memory that is bounded by its [`Memory`]: a write returns when its bytes are in a chunk, and
/// waits only while all chunks are under way.
///
/// So an error may be told later than by the write it belongs to: at the next write, flush or shutdown, and at each that
/// follows. Then it is not known which bytes after the last successful flush have reached the file. Once a flush or
/// shutdown has told it, nothing of the stream is under way any more; what a writer had under way that was dropped may
/// still reach the file.
///
/// [`Writer::flush`] returns when every byte was answered for and the server has made it durable;
/// [`Writer::shutdown`] does the same, and ends the stream. A writer that is dropped without either has promised nothing: what
/// it still had may be lost.
///
/// ```no_run
/// # async fn example(stripes: holdfast_client::Stripes) -> holdfast_client::Result<()> {
/// use holdfast_client::stream::{Memory, Writer};
/// let mut writer = Writer::new(&stripes, 0, Memory::default())?;
/// for n in 0..1_000_000u64 {
///     writer.write(&n.to_le_bytes()).await?;
/// }
/// writer.shutdown().await?;
/// # Ok(()) }
/// ```
pub struct Writer {
    target: Target,
    chunks: Chunks,
    memory: Memory,
    /// Being filled, and how far it is.
    current: Option<(Chunk, usize)>,
    /// Waits for memory.
    waiting: Option<Pin<Box<dyn Future<Output = Result<Chunk>> + Send>>>,
    /// Where the next byte goes.
    position: u64,
    writes: JoinSet<Result<()>>,
    /// The server's flush.
    flushing: Option<Pin<Box<dyn Future<Output = Result<()>> + Send>>>,
    failed: Option<Failed>,
    /// Something was taken since the last flush began, or that failed.
    dirty: bool,
    shut: bool,
}

/// The first error: told as it is once, and in its words from then on.
struct Failed {
    error: Option<Error>,
    text: String,
}

impl Writer {
    /// Writes from `offset` on. To be used within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Usage`] if the memory is none, or its chunks are no regions.
    pub fn new(target: impl Into<Target>, offset: u64, memory: Memory) -> Result<Self> {
        memory.check()?;
        Ok(Self {
            target: target.into(),
            chunks: Chunks::new(memory.depth, memory.chunk),
            memory,
            current: None,
            waiting: None,
            position: offset,
            writes: JoinSet::new(),
            flushing: None,
            failed: None,
            dirty: false,
            shut: false,
        })
    }

    /// Where in the file the next byte goes, bytes.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Takes all of `data`.
    ///
    /// # Errors
    /// The error of any write of this stream.
    pub async fn write(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            let count = std::future::poll_fn(|cx| self.poll_take(cx, data)).await?;
            data = data.get(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Memory to be filled without a copy, and given to [`Writer::write_chunk`]: [`Memory::chunk`] bytes.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub async fn chunk(&mut self) -> Result<Chunk> {
        self.check()?;
        std::future::poll_fn(|cx| self.poll_room(cx)).await
    }

    /// Takes the first `length` bytes of a chunk, behind what was written before.
    ///
    /// # Errors
    /// As [`Writer::write`]; [`Error::Usage`] if the chunk has not so many.
    pub async fn write_chunk(&mut self, mut chunk: Chunk, length: usize) -> Result<()> {
        self.check()?;
        if length > chunk.len() {
            return Err(Error::Usage(format!("{length} bytes of a chunk of {}", chunk.len())));
        }
        self.push_out();
        if length > 0 {
            chunk.holds(length, self.position);
            self.position = self.position.saturating_add(length as u64);
            self.start(chunk);
        }
        Ok(())
    }

    /// Waits until every byte was answered for, and durable.
    ///
    /// # Errors
    /// As [`Writer::write`]; and as [`crate::Binding::flush`]: after [`Error::WritesLost`] all since the last flush is to be
    /// written again, with another writer.
    pub async fn flush(&mut self) -> Result<()> {
        std::future::poll_fn(|cx| self.poll_durable(cx)).await
    }

    /// As [`Writer::flush`]; nothing can be written any more afterwards.
    ///
    /// # Errors
    /// As [`Writer::flush`].
    pub async fn shutdown(&mut self) -> Result<()> {
        std::future::poll_fn(|cx| self.poll_end(cx)).await
    }

    /// Takes what has ended, and tells what has failed.
    fn check(&mut self) -> Result<()> {
        while let Some(ended) = self.writes.try_join_next() {
            self.ended(ended.unwrap_or(Err(Error::Internal("a write of a stream was cancelled"))));
        }
        if let Some(failed) = &mut self.failed {
            let again = || Error::Usage(format!("an earlier write of this stream failed: {}", failed.text));
            return Err(failed.error.take().unwrap_or_else(again));
        }
        if self.shut {
            return Err(Error::Usage("this stream was shut down".into()));
        }
        Ok(())
    }

    fn ended(&mut self, outcome: Result<()>) {
        if let (Err(error), None) = (outcome, &self.failed) {
            self.failed = Some(Failed { text: error.to_string(), error: Some(error) });
        }
    }

    /// Memory to fill; takes what has ended while it waits.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<Chunk>> {
        if self.waiting.is_none() {
            if let Some(chunk) = self.chunks.try_take()? {
                return Poll::Ready(Ok(chunk));
            }
        }
        let chunks = &self.chunks;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(chunks.clone().take()));
        let chunk = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        // The one that gave its memory back may have failed.
        self.check()?;
        Poll::Ready(chunk)
    }

    fn poll_take(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        self.check()?;
        let (chunk, filled) = match &mut self.current {
            Some(current) => current,
            None => {
                let chunk = ready!(self.poll_room(cx))?;
                self.current.insert((chunk, 0))
            }
        };
        let count = data.len().min(chunk.len() - *filled);
        chunk.copy_in(*filled, data.get(..count).unwrap_or_default())?;
        *filled += count;
        let full = *filled == chunk.len();
        self.position = self.position.saturating_add(count as u64);
        self.dirty = true;
        if full {
            self.push_out();
        }
        Poll::Ready(Ok(count))
    }

    /// Puts what is in the current chunk under way.
    fn push_out(&mut self) {
        let Some((mut chunk, filled)) = self.current.take() else { return };
        if filled > 0 {
            chunk.holds(filled, self.position - filled as u64);
            self.start(chunk);
        }
    }

    fn start(&mut self, chunk: Chunk) {
        let target = self.target.clone();
        self.dirty = true;
        self.writes
            .spawn(async move { target.write_all(chunk.region(), chunk.range(), chunk.offset()).await });
    }

    fn poll_durable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        loop {
            if self.flushing.is_none() {
                if self.failed.is_none() && !self.shut {
                    self.push_out();
                }
                // All of them, also after an error: who writes those bytes again must not be overtaken by an old chunk.
                while let Some(ended) = ready!(self.writes.poll_join_next(cx)) {
                    self.ended(ended.unwrap_or(Err(Error::Internal("a write of a stream was cancelled"))));
                }
                self.check()?;
                let target = self.target.clone();
                self.flushing = Some(Box::pin(async move { target.flush().await }));
                self.dirty = false;
            }
            let Some(flushing) = &mut self.flushing else { return Poll::Ready(Ok(())) };
            let flushed = ready!(flushing.as_mut().poll(cx));
            self.flushing = None;
            self.dirty |= flushed.is_err();
            self.ended(flushed);
            self.check()?;
            // One that was begun, abandoned and finished now covers nothing that was written meanwhile.
            if !self.dirty {
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.shut {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_durable(cx))?;
        self.shut = true;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Writer {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.get_mut().poll_take(cx, data).map_err(io_error)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.get_mut().poll_durable(cx).map_err(io_error)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.get_mut().poll_end(cx).map_err(io_error)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.dirty || self.flushing.is_some() {
            tracing::warn!(
                position = self.position,
                "a stream was dropped before what was written was flushed"
            );
        }
    }
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("position", &self.position)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}
