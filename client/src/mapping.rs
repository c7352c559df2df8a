//! [`Mapping`]: a range of a file that this client reads by itself, with no work for the server.
//!
//! ```text
//!   Binding::map ── lane: a queue pair of the mapping's own ── Map on the channel ──► address and key
//!   Mapping::read_at ── RDMA READ over the lane ──► Region          the server's device answers, no process of it
//!        │
//!        └─► MappingLost once the server has withdrawn it: read through the binding, or map again
//! ```
//!
//! A refused read ends its queue pair at both ends. That is why a mapping has its own: the channel, and every other mapping,
//! go on.

use crate::Region;
use crate::bind::BindingCore;
use crate::binding::{Binding, Seat};
use crate::channel::Shared;
use crate::channel::request::{Done, Granted, Purpose, Request};
use crate::claim::Claim;
use crate::error::{Error, Result};
use crate::recovery::rebind::{self, Trials};
use crate::recovery::{Backoff, Patience};
use holdfast_shared::types::{ByteRange, Status};
use holdfast_transport::verbs::{Lane, LaneRead};
use holdfast_transport::{Armed, Registration, SubmitError};
use parking_lot::Mutex;
use slab::Slab;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, oneshot};

/// Reads in flight on one mapping; more wait.
const DEPTH: usize = 64;
/// A short read that is alone looks so often for its end before it sleeps: waking up takes longer than such a read.
const SPIN_ROUNDS: usize = 400;
/// Reads up to this long are short, bytes.
const SPIN_BYTES: usize = 64 << 10;

/// Bytes of a file that are read one-sided: over verbs, and with a server that has it switched on. Cheap to clone; all clones
/// are the same mapping. It keeps its binding, and so its open, alive.
///
/// What is read is the file's page cache: writes that others make through the server, or on its host (but not past the page
/// cache, with `O_DIRECT`), are seen at once, and a read that overlaps one may see a part of it. The server withdraws a mapping before it lets anything happen that the
/// client must not see: a conflicting lock, a fence, the end of the open. Then, and if the lane fails, every read is
/// [`Error::MappingLost`]: go on with [`Binding::read_at`], or map again.
///
/// The bytes have no digest and are not sealed, so volumes with such a policy grant no mappings. A file that
/// is cut short *beside* the server is still read here as it was: map only what nobody cuts short there. A change of its size
/// through the server withdraws the mapping first.
///
/// [`Mapping::unmap`] waits for the server's word; dropping the last clone gives it back without waiting.
///
/// ```no_run
/// # async fn example(binding: holdfast_client::Binding) -> holdfast_client::Result<()> {
/// use holdfast_client::{Error, Region};
/// let region = Region::allocate(1 << 20)?;
/// let mapping = binding.map(0..64 << 20).await?;
/// let count = match mapping.read_at(&region, 0..4096, 8192).await {
///     // Withdrawn: the binding knows what is going on, or has the bytes.
///     Err(Error::MappingLost) => binding.read_at(&region, 0..4096, 8192).await?,
///     other => other?,
/// };
/// println!("{count} bytes are in the region");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Mapping {
    inner: Arc<Inner>,
}

struct Inner {
    lane: Mutex<LaneState>,
    /// Reads that may still be put in flight.
    room: Semaphore,
    offset: u64,
    granted: Granted,
    piece_max: usize,
    channel: Arc<Shared>,
    core: Arc<BindingCore>,
    _binding: Binding,
    unmapped: AtomicBool,
    /// Dropped with the mapping: the driver ends.
    _driver: oneshot::Sender<()>,
}

struct LaneState {
    lane: Lane,
    reads: Slab<Read>,
    done: Vec<LaneRead>,
}

#[derive(Default)]
struct Read {
    outcome: Option<bool>,
    waker: Option<Waker>,
    /// The caller has gone: the completion frees the entry.
    abandoned: bool,
}

impl Binding {
    /// Maps a range of the file for one-sided reads; what lies beyond the file's end is left out. The server pins all of it
    /// in memory, which takes time for much, and counts it against the limits of this client's channel. Waits while the file's
    /// size is being changed, as the policy for waiting says.
    ///
    /// # Errors
    /// [`Status::Unsupported`] if the channel is not verbs, the server has it switched off, the volume's policy covers
    /// payloads, or the server's kernel can't do it with this file; [`Status::BadRange`] if nothing of the range is in the
    /// file; [`Status::TooMany`] at a limit; [`Status::LockConflict`] if others have locked a byte of it against reading.
    pub async fn map(&self, range: Range<u64>) -> Result<Mapping> {
        let length = range.end.saturating_sub(range.start);
        ByteRange::new(range.start, length).map_err(|error| Error::Usage(error.to_string()))?;
        if length == 0 {
            return Err(Error::Usage("a mapping of no bytes".into()));
        }
        let open = self.open().ok_or(Error::Internal("a binding without an open"))?;
        let config = open.session().config();
        let (wait, mut patience, mut backoff) =
            (config.connect_max(), Patience::new(config), Backoff::control());
        let mut trials = None;
        loop {
            open.inner.gate.check()?;
            let seat = self.seat();
            match self.map_once(&seat, wait, range.start, length).await {
                Err(error) if rebind::is_wanted(&error) => {
                    let trials = trials.get_or_insert_with(|| Trials::new(open));
                    self.replace(trials, open, &seat).await?;
                }
                // The file's size is being changed: nothing of it is mapped before that has ended.
                Err(error) if error.status() == Some(Status::Unavailable) => {
                    patience.pause("a mapping", backoff.next()).await?;
                }
                outcome => return outcome,
            }
        }
    }

    async fn map_once(&self, seat: &Arc<Seat>, wait: Duration, offset: u64, length: u64) -> Result<Mapping> {
        let (channel, core) = (Arc::clone(&seat.channel), Arc::clone(&seat.core));
        if channel.facts.mappings_max == 0 {
            return Err(Error::refused(Status::Unsupported));
        }
        let (registrar, peer) = (Arc::clone(&channel.registrar), channel.peer);
        let lane = tokio::task::spawn_blocking(move || registrar.lane(peer, wait, DEPTH))
            .await
            .map_err(|_| Error::Internal("connecting panicked"))?
            .map_err(|error| Error::io(format!("cannot make a lane to the data plane at {peer}"), error))?;
        let watch = Watch::new(&lane)?;
        let request = Request::Map { offset, length, lane: lane.end() };
        let reply = channel.submit(Some(&core), request, Purpose::Map { length }).await?;
        let Done::Mapped(granted) = reply.outcome().await? else {
            return Err(Error::Internal("a map was answered as a read"));
        };
        let (stop, stopped) = oneshot::channel();
        let inner = Arc::new(Inner {
            piece_max: lane.read_bytes_max(),
            lane: Mutex::new(LaneState {
                lane,
                reads: Slab::with_capacity(DEPTH),
                done: Vec::with_capacity(DEPTH),
            }),
            room: Semaphore::new(DEPTH),
            offset,
            granted,
            channel,
            core,
            _binding: self.clone(),
            unmapped: AtomicBool::new(false),
            _driver: stop,
        });
        watch.drive(&inner, stopped);
        Ok(Mapping { inner })
    }
}

impl Mapping {
    /// Where in the file it begins, bytes.
    pub fn offset(&self) -> u64 {
        self.inner.offset
    }

    /// Bytes from there on: fewer than asked for if the file ended before.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.inner.granted.length
    }

    /// False once it is known that no read can succeed any more.
    pub fn is_live(&self) -> bool {
        self.inner.is_live() && !self.inner.lane.lock().lane.has_ended()
    }

    /// Reads file bytes from `file_offset` on into `range` of the region. Returns how many: fewer than asked for at
    /// the mapping's end, 0 beyond it. Long reads go in pieces, one after the other. A call that is dropped may leave a read
    /// behind that still fills the region.
    ///
    /// # Errors
    /// [`Error::MappingLost`]: bytes of the range may have been filled, and are not to be used. [`Error::Usage`] for a range
    /// outside of the region, or an offset before the mapping.
    pub async fn read_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        let inner = &self.inner;
        let wanted = region.check(&range)?;
        let Some(skip) = file_offset.checked_sub(inner.offset) else {
            let text = format!("byte {file_offset} is before the mapping, which begins at {}", inner.offset);
            return Err(Error::Usage(text));
        };
        let there = usize::try_from(inner.granted.length.saturating_sub(skip)).unwrap_or(usize::MAX);
        let count = wanted.min(there);
        if count == 0 {
            return Ok(0);
        }
        let registration = region.registration(&inner.channel)?;
        let mut done = 0;
        while done < count {
            let piece = (count - done).min(inner.piece_max);
            let start = range.start + done;
            // Within what was granted, whose end does not overflow.
            let address = inner.granted.address + skip + done as u64;
            inner.read(&registration, start..start + piece, address).await?;
            done += piece;
        }
        Ok(count)
    }

    /// Gives it back, for every clone: when this returns the server has withdrawn it.
    ///
    /// # Errors
    /// What the server refuses; none if the binding or its channel has ended: then the mapping has, too.
    pub async fn unmap(&self) -> Result<()> {
        let inner = &*self.inner;
        let Some(claim) = Claim::take(&inner.unmapped) else { return Ok(()) };
        let request = Request::Unmap { mapping: inner.granted.mapping };
        let outcome = match inner.channel.submit(Some(&inner.core), request, Purpose::Unmap).await {
            Ok(reply) => {
                claim.keep();
                reply.count().await.map(drop)
            }
            Err(error) => Err(error),
        };
        inner.lane.lock().close();
        match outcome {
            Err(error) if rebind::is_wanted(&error) => Ok(()),
            outcome => outcome,
        }
    }
}

impl Inner {
    fn is_live(&self) -> bool {
        !self.unmapped.load(Ordering::Acquire) && self.core.fenced().is_none()
    }

    /// One RDMA READ.
    async fn read(&self, into: &Registration, range: Range<usize>, address: u64) -> Result<()> {
        let room = self.room.acquire().await.map_err(|_| Error::MappingLost)?;
        if !self.is_live() {
            return Err(Error::MappingLost);
        }
        let short = range.len() <= SPIN_BYTES;
        let token = self.lane.lock().submit(into, range, address, self.granted.rkey)?;
        // The completion gives it back.
        room.forget();
        let reading = Reading { inner: self, token: Some(token) };
        reading.finish(short).await
    }
}

/// A read under way. Dropped, it is forgotten, and the device's work with it goes on: the memory is kept till its end.
struct Reading<'a> {
    inner: &'a Inner,
    token: Option<usize>,
}

impl Reading<'_> {
    async fn finish(mut self, short: bool) -> Result<()> {
        let mut spin = short;
        std::future::poll_fn(|cx| self.poll(cx, std::mem::take(&mut spin))).await
    }

    fn poll(&mut self, cx: &Context<'_>, spin: bool) -> Poll<Result<()>> {
        let Some(token) = self.token else {
            return Poll::Ready(Err(Error::Internal("a read was collected twice")));
        };
        let mut state = self.inner.lane.lock();
        let rounds = if spin && state.lane.in_flight() == 1 { SPIN_ROUNDS } else { 1 };
        for _ in 0..rounds {
            state.collect(&self.inner.room);
            if state.outcome(token).is_some() {
                break;
            }
            std::hint::spin_loop();
        }
        // Armed whenever somebody waits and the lock is free: the driver then gets an edge.
        loop {
            if let Some(success) = state.outcome(token) {
                state.reads.remove(token);
                self.token = None;
                return Poll::Ready(if success { Ok(()) } else { Err(Error::MappingLost) });
            }
            if let Some(read) = state.reads.get_mut(token) {
                match &mut read.waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    none => *none = Some(cx.waker().clone()),
                }
            }
            if state.lane.arm() == Armed::Idle {
                return Poll::Pending;
            }
            state.collect(&self.inner.room);
        }
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if let Some(token) = self.token.take() {
            let mut state = self.inner.lane.lock();
            match state.reads.get_mut(token) {
                Some(read) if read.outcome.is_none() => read.abandoned = true,
                Some(_) => drop(state.reads.remove(token)),
                None => {}
            }
        }
    }
}

impl LaneState {
    fn submit(&mut self, into: &Registration, range: Range<usize>, address: u64, rkey: u32) -> Result<usize> {
        let token = self.reads.insert(Read::default());
        self.lane.read(token as u64, into, range, address, rkey).map(|()| token).map_err(|error| {
            self.reads.remove(token);
            match error {
                SubmitError::Closed => Error::MappingLost,
                // There is a place for each that may be in flight, and the rest was checked.
                SubmitError::Full | SubmitError::Invalid => Error::Internal("the lane does not take a read"),
            }
        })
    }

    /// How a read ended, if it has.
    fn outcome(&self, token: usize) -> Option<bool> {
        // One that is unknown would never end.
        self.reads.get(token).map_or(Some(false), |read| read.outcome)
    }

    /// Takes what has ended, and wakes who waits for it.
    fn collect(&mut self, room: &Semaphore) {
        let mut done = std::mem::take(&mut self.done);
        while self.lane.poll(&mut done) > 0 {
            for LaneRead { token, outcome } in done.drain(..) {
                room.add_permits(1);
                let Some(token) = usize::try_from(token).ok().filter(|token| self.reads.contains(*token))
                else {
                    continue;
                };
                let read = &mut self.reads[token];
                read.outcome = Some(outcome.is_ok());
                read.waker.take().into_iter().for_each(Waker::wake);
                if read.abandoned {
                    self.reads.remove(token);
                }
            }
        }
        self.done = done;
    }

    /// Cuts the device off. Who waits is told by the driver, as the reads come back.
    fn close(&mut self) {
        self.lane.close();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !*self.unmapped.get_mut() {
            self.channel.unmap_later(Arc::clone(&self.core), self.granted.mapping);
        }
    }
}

/// The lane's wake descriptor in tokio's hands.
struct Watch {
    /// A duplicate, so that it may outlive the lane by a moment.
    fd: AsyncFd<OwnedFd>,
}

impl Watch {
    fn new(lane: &Lane) -> Result<Self> {
        let failed = |error| Error::io("cannot watch a lane", error);
        let fd = lane.wake_fd().try_clone_to_owned().map_err(failed)?;
        // Deprecated because an `AsRawFd` may lie about its descriptor; an `OwnedFd` does not. Its successor is unsafe.
        #[allow(deprecated)]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
        Ok(Self { fd })
    }

    /// Collects at each edge, until the mapping is gone.
    fn drive(self, inner: &Arc<Inner>, mut stopped: oneshot::Receiver<()>) {
        let weak = Arc::downgrade(inner);
        tokio::spawn(async move {
            loop {
                let edge = tokio::select! {
                    biased;
                    _ = &mut stopped => return,
                    edge = self.fd.ready(Interest::READABLE | Interest::WRITABLE) => edge,
                };
                let Some(inner) = weak.upgrade() else { return };
                let mut state = inner.lane.lock();
                match edge {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(_) => state.close(),
                }
                loop {
                    state.collect(&inner.room);
                    if state.lane.arm() == Armed::Idle {
                        break;
                    }
                }
                if state.lane.has_ended() && state.lane.in_flight() == 0 {
                    inner.room.close();
                    return;
                }
            }
        });
    }
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapping")
            .field("offset", &self.offset())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
