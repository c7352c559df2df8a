//! [`HandedFile`]: the file itself, which the server gave to a binding on its own host; reads go past the server.
//!
//! ```text
//!   bind over a local channel ─► Descriptor ─┬─ refused: every read goes to the server, as ever
//!                                            └─ given ─► read: what is in the page cache, on the caller's thread
//!                                                          └─ else: the rest, on a thread that may wait for the disk
//! ```
//!
//! The server can't take the descriptor back. This side stops using it when the binding is fenced or given back, when its channel
//! has ended, and while the open is shut: then reads go to the server again, which says why not, also those that were waiting
//! for the disk at that moment. A read that fails at once goes there too; one that fails while it waits is an error.

use crate::bind::BindingCore;
use crate::channel::Shared;
use crate::channel::request::{Done, Purpose, Request};
use crate::error::{Error, Result};
use crate::region::Region;
use holdfast_shared::types::Status;
use holdfast_shared::wire::service::TransportKind;
use holdfast_verbs::memory::{IN_MEMORY, Nowait};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::task::JoinHandle;

/// More than this is read on a thread of its own, whether it is in the page cache or not: copying it takes long.
const NOW_BYTES_MAX: usize = 1 << 20;

/// A task that reads so much without waiting, some tenths of a millisecond long, lets others run.
const YIELD_BYTES: usize = 4 << 20;
/// What a read costs besides its bytes, as bytes.
const READ_COST_BYTES: usize = 8 << 10;

/// A descriptor of the open.
pub(crate) struct HandedFile {
    descriptor: Arc<OwnedFd>,
    /// A read never waits for a disk, though the kernel may not know how to say so.
    in_memory: bool,
    /// The kernel can say that it would wait.
    says: AtomicBool,
    /// Bytes read since others were let run, and some for each read.
    since_yield: AtomicUsize,
}

/// How far a read came that must not wait.
pub(crate) enum Now {
    /// To its end, or that of the file: so many bytes.
    Done(usize),
    /// So far; the rest would wait.
    Rest(usize),
    /// The server is to be asked.
    Failed,
}

impl HandedFile {
    fn new(descriptor: OwnedFd) -> Self {
        let in_memory = rustix::fs::fstatfs(&descriptor).is_ok_and(|fs| IN_MEMORY.contains(&fs.f_type));
        Self {
            descriptor: Arc::new(descriptor),
            in_memory,
            says: AtomicBool::new(true),
            since_yield: AtomicUsize::new(0),
        }
    }

    /// Reads from `offset` on into `range`, as far as that needs no waiting and is soon done.
    pub(crate) fn read_now(&self, region: &Region, range: Range<usize>, offset: u64) -> Now {
        if range.len() > NOW_BYTES_MAX {
            return Now::Rest(0);
        }
        let mut done = 0;
        loop {
            let (rest, at) = (range.start + done..range.end, offset + done as u64);
            if rest.is_empty() {
                return Now::Done(done);
            }
            match self.once(region, rest, at) {
                Ok(Nowait::Done(0)) => return Now::Done(done),
                Ok(Nowait::Done(count)) => done += count,
                Ok(Nowait::WouldBlock) => return Now::Rest(done),
                Ok(Nowait::Unsupported) => {
                    self.says.store(false, Ordering::Relaxed);
                    return Now::Rest(done);
                }
                Err(_) => return Now::Failed,
            }
        }
    }

    fn once(&self, region: &Region, range: Range<usize>, offset: u64) -> io::Result<Nowait> {
        if self.in_memory {
            return region.read_file(self.descriptor.as_fd(), offset, range).map(Nowait::Done);
        }
        if !self.says.load(Ordering::Relaxed) {
            return Ok(Nowait::Unsupported);
        }
        region.read_file_nowait(self.descriptor.as_fd(), offset, range)
    }

    /// Counts a read. True if it is time to let others run: who reads and reads never waits, and among the others is the
    /// task that hears of a fence.
    pub(crate) fn is_others_turn(&self, length: usize) -> bool {
        // Of two who count at the same time one may not be counted: it is a rough measure, and the dearer one costs a bus lock.
        let since = self.since_yield.load(Ordering::Relaxed) + length + READ_COST_BYTES;
        let is_turn = since >= YIELD_BYTES;
        self.since_yield.store(if is_turn { 0 } else { since }, Ordering::Relaxed);
        is_turn
    }

    /// Reads the rest on a thread that may wait. It counts the `done` bytes before it too.
    pub(crate) fn read_rest(
        &self,
        region: &Region,
        range: Range<usize>,
        offset: u64,
        done: usize,
    ) -> Waiting {
        let (descriptor, region) = (Arc::clone(&self.descriptor), region.clone());
        Waiting(tokio::task::spawn_blocking(move || {
            let mut done = done;
            while range.start + done < range.end {
                let rest = range.start + done..range.end;
                match region.read_file(descriptor.as_fd(), offset + done as u64, rest)? {
                    0 => break,
                    count => done += count,
                }
            }
            Ok(done)
        }))
    }
}

/// A read on another thread.
pub(crate) struct Waiting(JoinHandle<io::Result<usize>>);

impl Future for Waiting {
    type Output = Result<usize>;

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        std::pin::Pin::new(&mut self.0).poll(cx).map(|joined| match joined {
            Ok(Ok(count)) => Ok(count),
            Ok(Err(error)) => {
                tracing::warn!(%error, "a read of the file itself failed");
                Err(Error::refused(Status::Io))
            }
            Err(_) => Err(Error::Internal("a read of the file itself was cut off")),
        })
    }
}

/// Asks for the descriptor, where the server may give one. That it does not is no error.
pub(crate) async fn ask(channel: &Arc<Shared>, core: &Arc<BindingCore>) {
    if channel.identity.transport != TransportKind::Local {
        return;
    }
    let asked = async {
        let reply = channel.submit(Some(core), Request::Descriptor, Purpose::Descriptor).await?;
        reply.outcome().await
    };
    match asked.await {
        Ok(Done::Descriptor(Some(descriptor))) => {
            let _ = core.file.set(HandedFile::new(descriptor));
            tracing::debug!("reads go to the file itself");
        }
        Ok(_) => tracing::debug!("this process had no room for the file's descriptor"),
        Err(error) => tracing::debug!(%error, "reads go to the server"),
    }
}
