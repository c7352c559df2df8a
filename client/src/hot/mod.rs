//! [`Hot`]: reads that the library makes one-sided by itself.
//!
//! ```text
//!   Seat::submit ── a read ─► Hot ── within a living mapping? ── yes ─► RDMA READ ─┬─► the bytes
//!                              │ no                                                └─ lost: let go, and the server is asked
//!                              ├─► counted (`heat`); hot? ─► a task maps it ─► the next reads find the mapping
//!                              └─► the server is asked, as ever
//! ```
//!
//! Whatever ends a mapping (a lock, a change of size, a fence, the server's end) ends it before it is answered to anybody, so
//! no read that begins later succeeds one-sided. It fails, goes to the server, and gets the server's word: bytes or refusal.
//! What was written and acknowledged is in the page cache that is mapped, so reads see it; also one's own writes.
//!
//! Each seat of a binding has its own: mappings belong to one connection. The next seat takes over what is known of the file.
//! A seat that can have no mapping (not verbs, not granted, a policy that covers payloads, switched off) has none.

mod heat;

use crate::bind::BindingCore;
use crate::channel::Shared;
use crate::config::{Config, OneSided};
use crate::error::{Error, Result};
use crate::mapping::{self, Mapping, Reading};
use crate::recovery::reissue::Piece;
use heat::{EXTENT_BYTES, Heat, Place, Refused, start_of};
use holdfast_shared::types::{Access, Status};
use holdfast_shared::wire::service::TransportKind;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// Mappings of one binding. And at most half of what its channel may have, so that the application finds a place.
const MAPPINGS_MAX: usize = 8;

/// The mappings of a seat, and what is known of its file.
pub(crate) struct Hot {
    heat: Mutex<Heat<Mapping>>,
    /// Nothing is mapped, and no more is to be.
    off: AtomicBool,
    /// The server has said that it never will be.
    never: AtomicBool,
    /// Something was mapped.
    ever: AtomicBool,
    /// The time is counted from there.
    begun: Instant,
    /// Longest wait for a lane.
    wait: Duration,
}

/// A one-sided read under way.
pub(crate) struct HotRead {
    reading: Reading,
    length: usize,
    place: Place,
    hot: Arc<Hot>,
}

impl HotRead {
    /// [`Error::MappingLost`]: the server is to be asked; it has been seen to that the mapping is not used again.
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Poll<Result<usize>> {
        let outcome = ready!(self.reading.poll(cx));
        if let Err(Error::MappingLost) = &outcome {
            self.hot.lost(self.place);
        }
        Poll::Ready(outcome.map(|()| self.length))
    }
}

impl Hot {
    /// For a new seat; `None` if nothing of it can be mapped. `old`: that of the seat before it.
    pub(crate) fn of(
        config: &Config,
        channel: &Shared,
        core: &BindingCore,
        old: Option<&Arc<Self>>,
    ) -> Option<Arc<Self>> {
        let granted = usize::try_from(channel.facts.mappings_max).unwrap_or(usize::MAX);
        let possible = config.one_sided == OneSided::Auto
            && channel.identity.transport == TransportKind::Verbs
            && granted > 1
            && core.access.contains(Access::READ)
            && !core.policy.covers_payload();
        if !possible || old.is_some_and(|old| old.never.load(Ordering::Acquire)) {
            return None;
        }
        let mapped_max = (granted / 2).min(MAPPINGS_MAX);
        let (heat, begun) = match old {
            None => (Heat::new(mapped_max), Instant::now()),
            Some(old) => (old.succeeded(mapped_max), old.begun),
        };
        let hot = Arc::new(Self {
            heat: Mutex::new(heat),
            off: AtomicBool::new(false),
            never: AtomicBool::new(false),
            ever: AtomicBool::new(false),
            begun,
            wait: config.connect_max(),
        });
        let mut all = channel.hots.lock();
        // Bounded by what lives.
        all.retain(|hot| hot.strong_count() > 0);
        all.push(Arc::downgrade(&hot));
        Some(hot)
    }

    /// Puts a read in flight, if it can be one-sided. `prompt`: the caller waits for it at once, and for nothing else.
    pub(crate) fn read(
        self: &Arc<Self>,
        channel: &Arc<Shared>,
        core: &Arc<BindingCore>,
        piece: &Piece,
        prompt: bool,
    ) -> Option<HotRead> {
        if self.off.load(Ordering::Relaxed) {
            return None;
        }
        let found = self.heat.lock().find(piece.offset, piece.length as u64);
        let Some((place, mapping)) = found else {
            self.count(channel, core, piece);
            return None;
        };
        let range = piece.start..piece.start + piece.length;
        let begun = if core.has_ended() {
            Err(Error::MappingLost)
        } else {
            mapping.begin(&piece.region, range, piece.offset, prompt)
        };
        match begun {
            Ok(reading) => {
                let hot = Arc::clone(self);
                reading.map(|reading| HotRead { reading, length: piece.length, place, hot })
            }
            Err(Error::MappingLost) => {
                self.lost(place);
                None
            }
            // What is wrong the server will say, or the registration that its read needs too.
            Err(_) => None,
        }
    }

    /// Some bytes are about to be written by this client.
    pub(crate) fn wrote(&self, piece: &Piece) {
        if !self.off.load(Ordering::Relaxed) {
            let now = self.now_ms();
            // Dropped when the lock is free again; so below.
            let let_go = self.heat.lock().wrote(now, piece.offset, piece.length as u64);
            drop(let_go);
        }
    }

    /// The binding is being given back: what was mapped goes with it.
    pub(crate) fn end(&self) {
        self.off.store(true, Ordering::Release);
        let all = self.heat.lock().clear();
        all.iter().for_each(Mapping::leave);
    }

    /// The channel is closed: the device is cut off from all regions before this returns.
    pub(crate) fn cut(&self) {
        self.off.store(true, Ordering::Release);
        let all = self.heat.lock().clear();
        all.iter().for_each(Mapping::cut);
    }

    /// The application wants the places for itself: none is taken for a while. Those to be given back now, and whether one more is
    /// given back as soon as it is there.
    pub(crate) fn make_room(&self) -> (Vec<Mapping>, bool) {
        let now = self.now_ms();
        let mut heat = self.heat.lock();
        heat.limit(now);
        let making = heat.forget_making();
        (heat.clear(), making)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn succeeded(&self, mapped_max: usize) -> Heat<Mapping> {
        self.off.store(true, Ordering::Release);
        let (heat, let_go) = self.heat.lock().succeed(self.now_ms(), mapped_max);
        // Reads under way there are made again at once, by the new one.
        let_go.iter().for_each(Mapping::cut);
        heat
    }

    fn lost(&self, place: Place) {
        let now = self.now_ms();
        let lost = self.heat.lock().lost(now, place);
        if let Some(mapping) = lost {
            tracing::debug!(?mapping, "what was read one-sided goes to the server again");
        }
    }

    /// Counts a read that goes to the server, and has its extent mapped if that made it hot.
    fn count(self: &Arc<Self>, channel: &Arc<Shared>, core: &Arc<BindingCore>, piece: &Piece) {
        let now = self.now_ms();
        let Some(wish) = self.heat.lock().read(now, piece.offset, piece.length as u64) else { return };
        drop(wish.let_go);
        let making = Making { hot: Arc::downgrade(self), number: wish.number, answered: false };
        let (channel, core, wait) = (Arc::clone(channel), Arc::clone(core), self.wait);
        let runtime = channel.runtime.clone();
        // Where the channel lives, the mapping's own task does.
        runtime.spawn(async move {
            let offset = start_of(making.number);
            let outcome = mapping::map(&channel, &core, wait, offset, EXTENT_BYTES, None).await;
            making.done(offset, outcome);
        });
    }
}

/// An extent that is being mapped. Dropped without an answer, it was not.
struct Making {
    hot: Weak<Hot>,
    number: u64,
    answered: bool,
}

impl Making {
    fn done(mut self, offset: u64, outcome: Result<Mapping>) {
        self.answered = true;
        let Some(hot) = self.hot.upgrade() else { return };
        let now = hot.now_ms();
        match outcome {
            Ok(mapping) => {
                tracing::debug!(?mapping, "hot: read one-sided from now on");
                hot.ever.store(true, Ordering::Release);
                let end = offset.saturating_add(mapping.len());
                let unwanted = hot.heat.lock().made(now, self.number, mapping, end);
                drop(unwanted);
                // Ended meanwhile?
                if hot.off.load(Ordering::Acquire) {
                    let all = hot.heat.lock().clear();
                    drop(all);
                }
            }
            Err(error) => {
                tracing::debug!(%error, offset, "hot, and not mapped");
                let why = match &error {
                    Error::Refused(refusal) => match refusal.status {
                        // Who was granted something before has met a moment, not a rule.
                        Status::Unsupported | Status::AccessDenied if !hot.ever.load(Ordering::Acquire) => {
                            hot.never.store(true, Ordering::Release);
                            hot.off.store(true, Ordering::Release);
                            Refused::Limit
                        }
                        Status::TooMany => Refused::Limit,
                        _ => Refused::ForNow,
                    },
                    // No lane: another extent would get none either.
                    Error::Io { .. } => Refused::Limit,
                    _ => Refused::ForNow,
                };
                hot.heat.lock().refused(now, self.number, why);
            }
        }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if let (false, Some(hot)) = (self.answered, self.hot.upgrade()) {
            let now = hot.now_ms();
            hot.heat.lock().refused(now, self.number, Refused::ForNow);
        }
    }
}
