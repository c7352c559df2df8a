//! The lane of a mapping: reads under way on it, and the task that collects them while nobody looks.
//!
//! ```text
//!   begin ─► room? ─► RDMA READ ─► completion ─► outcome, waker ─► Reading
//!                                   ▲ whoever looks, else the driver at the wake descriptor's edge
//! ```

use super::Inner;
use crate::channel::Shared;
use crate::error::{Error, Result};
use holdfast_transport::verbs::{Lane, LaneRead};
use holdfast_transport::{Armed, Registration, SubmitError};
use parking_lot::Mutex;
use slab::Slab;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
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

/// A lane, and who waits for what on it.
pub(super) struct Reads {
    state: Mutex<LaneState>,
    /// Reads that may still be put in flight.
    room: Semaphore,
    /// Longest read, bytes.
    pub(super) read_bytes_max: usize,
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

/// Connects a lane to the data plane that a channel leads to.
pub(super) async fn connect(channel: &Arc<Shared>, wait: Duration) -> Result<Lane> {
    let (registrar, peer): (_, SocketAddr) = (Arc::clone(&channel.registrar), channel.peer);
    tokio::task::spawn_blocking(move || registrar.lane(peer, wait, DEPTH))
        .await
        .map_err(|_| Error::Internal("connecting panicked"))?
        .map_err(|error| Error::io(format!("cannot make a lane to the data plane at {peer}"), error))
}

impl Reads {
    pub(super) fn new(lane: Lane) -> Self {
        Self {
            read_bytes_max: lane.read_bytes_max(),
            room: Semaphore::new(DEPTH),
            state: Mutex::new(LaneState {
                lane,
                reads: Slab::with_capacity(DEPTH),
                done: Vec::with_capacity(DEPTH),
            }),
        }
    }

    /// Cuts the device off. Who waits is told by the driver, as the reads come back.
    pub(super) fn close(&self) {
        self.state.lock().lane.close();
    }

    pub(super) fn has_ended(&self) -> bool {
        self.state.lock().lane.has_ended()
    }
}

impl Inner {
    /// Puts one RDMA READ in flight, when there is room. `spin`: it is looked for, if it is short, before anybody sleeps.
    pub(super) async fn read(
        self: &Arc<Self>,
        into: &Registration,
        range: Range<usize>,
        address: u64,
    ) -> Result<Reading> {
        let room = self.reads.room.acquire().await.map_err(|_| Error::MappingLost)?;
        let reading = self.submit(into, range, address, true)?;
        // The completion gives it back.
        room.forget();
        Ok(reading)
    }

    /// As [`Inner::read`]; `None` if there is no room.
    pub(super) fn try_read(
        self: &Arc<Self>,
        into: &Registration,
        range: Range<usize>,
        address: u64,
        spin: bool,
    ) -> Result<Option<Reading>> {
        let room = match self.reads.room.try_acquire() {
            Ok(room) => room,
            Err(tokio::sync::TryAcquireError::NoPermits) => return Ok(None),
            Err(tokio::sync::TryAcquireError::Closed) => return Err(Error::MappingLost),
        };
        let reading = self.submit(into, range, address, spin)?;
        room.forget();
        Ok(Some(reading))
    }

    fn submit(
        self: &Arc<Self>,
        into: &Registration,
        range: Range<usize>,
        address: u64,
        spin: bool,
    ) -> Result<Reading> {
        if !self.is_live() {
            return Err(Error::MappingLost);
        }
        let spin = spin && range.len() <= SPIN_BYTES;
        let token = self.reads.state.lock().submit(into, range, address, self.granted.rkey)?;
        Ok(Reading { inner: Arc::clone(self), token: Some(token), spin })
    }
}

/// A read under way. Dropped, it is forgotten, and the device's work with it goes on: the memory is kept till its end.
pub(crate) struct Reading {
    inner: Arc<Inner>,
    token: Option<usize>,
    spin: bool,
}

impl Reading {
    pub(super) async fn finish(mut self) -> Result<()> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<Result<()>> {
        let spin = std::mem::take(&mut self.spin);
        let Some(token) = self.token else {
            return Poll::Ready(Err(Error::Internal("a read was collected twice")));
        };
        let mut state = self.inner.reads.state.lock();
        let room = &self.inner.reads.room;
        let rounds = if spin && state.lane.in_flight() == 1 { SPIN_ROUNDS } else { 1 };
        for _ in 0..rounds {
            state.collect(room);
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
            state.collect(room);
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Some(token) = self.token.take() {
            let mut state = self.inner.reads.state.lock();
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
}

/// The lane's wake descriptor in tokio's hands.
pub(super) struct Watch {
    /// A duplicate, so that it may outlive the lane by a moment.
    fd: AsyncFd<OwnedFd>,
}

impl Watch {
    pub(super) fn new(lane: &Lane) -> Result<Self> {
        let failed = |error| Error::io("cannot watch a lane", error);
        let fd = lane.wake_fd().try_clone_to_owned().map_err(failed)?;
        // Deprecated because an `AsRawFd` may lie about its descriptor; an `OwnedFd` does not. Its successor is unsafe.
        #[allow(deprecated)]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
        Ok(Self { fd })
    }

    /// Collects at each edge, until the mapping is gone.
    pub(super) fn drive(self, inner: &Arc<Inner>, mut stopped: oneshot::Receiver<()>) {
        let weak = Arc::downgrade(inner);
        tokio::spawn(async move {
            loop {
                let edge = tokio::select! {
                    biased;
                    _ = &mut stopped => return,
                    edge = self.fd.ready(Interest::READABLE | Interest::WRITABLE) => edge,
                };
                let Some(inner) = weak.upgrade() else { return };
                let mut state = inner.reads.state.lock();
                match edge {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(_) => state.lane.close(),
                }
                loop {
                    state.collect(&inner.reads.room);
                    if state.lane.arm() == Armed::Idle {
                        break;
                    }
                }
                if state.lane.has_ended() && state.lane.in_flight() == 0 {
                    inner.reads.room.close();
                    return;
                }
            }
        });
    }
}
