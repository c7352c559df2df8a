//! [`Rail`]: one channel of several, and its binding; and who takes the next piece.
//!
//! ```text
//!   live ── a request fails on its seat, or it is seen to have ended ──► healing: binds again, for ever
//!    ▲                                                                      │
//!    └──────────────────────── bound again ◄────────────────────────────────┤
//!                                                                           └─ nothing heals it ──► left out
//! ```

use super::Inner;
use crate::binding::{Binding, Seat};
use crate::channel::DataChannel;
use crate::channel::home::may_heal;
use crate::error::{Ended, Error, Result};
use crate::recovery::rebind::Trials;
use crate::recovery::{Backoff, Over, Patience};
use crate::stripe::RailState;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// One channel and its binding.
pub(super) struct Rail {
    pub(super) binding: Binding,
    channel: DataChannel,
    /// Bytes of pieces under way.
    load: AtomicU64,
    /// Bytes of pieces answered.
    moved: AtomicU64,
    /// Somebody brings it back.
    healing: AtomicBool,
}

/// A piece under way, counted until this is dropped.
pub(super) struct Load<'a> {
    rail: &'a Rail,
    bytes: u64,
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.rail.load.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Rail {
    pub(super) fn new(binding: Binding, channel: &DataChannel) -> Self {
        Self {
            binding,
            channel: channel.clone(),
            load: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            healing: AtomicBool::new(false),
        }
    }

    /// Counts a piece as under way.
    pub(super) fn load(&self, bytes: usize) -> Load<'_> {
        let bytes = bytes as u64;
        self.load.fetch_add(bytes, Ordering::Relaxed);
        Load { rail: self, bytes }
    }

    /// Counts what a piece came to.
    pub(super) fn moved(&self, bytes: usize) {
        self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn state(&self) -> RailState {
        RailState {
            transport: self.channel.transport(),
            peer: self.channel.peer(),
            live: !self.healing.load(Ordering::Acquire) && is_live(&self.binding.seat()),
            bytes_under_way: self.load.load(Ordering::Relaxed),
            bytes_moved: self.moved.load(Ordering::Relaxed),
        }
    }
}

fn is_live(seat: &Seat) -> bool {
    seat.core.fenced().is_none() && seat.channel.why_ended().is_none()
}

/// Why a rail was left out for good.
pub(super) enum Lost {
    Over(Over),
    Channel(Ended),
}

impl Lost {
    /// `None` for an error that may pass with time.
    fn of(error: &Error) -> Option<Self> {
        match error {
            Error::Ended { what: "channel", why } => (!may_heal(why)).then(|| Self::Channel(why.clone())),
            error => Over::of(error).map(Self::Over),
        }
    }

    fn error(&self) -> Error {
        match self {
            Self::Over(over) => over.error(),
            Self::Channel(why) => Error::channel(why.clone()),
        }
    }
}

/// Says that a rail is not being healed any more, also if its healer is cancelled.
struct Healing(Arc<Rail>);

impl Drop for Healing {
    fn drop(&mut self) {
        self.0.healing.store(false, Ordering::Release);
    }
}

impl Inner {
    /// One more rail takes part.
    pub(super) fn join(&self, rail: Arc<Rail>) {
        self.rails.rcu(|rails| {
            let mut rails = Vec::clone(rails);
            rails.push(Arc::clone(&rail));
            rails
        });
        self.tell();
    }

    /// Rails that live.
    pub(super) fn living(&self) -> usize {
        self.rails.load().iter().filter(|rail| !rail.healing.load(Ordering::Acquire)).count()
    }

    /// A rail that lives, with the fewest bytes under way; waits for one if there is none.
    pub(super) async fn rail(self: &Arc<Self>, patience: &mut Patience) -> Result<(Arc<Rail>, Arc<Seat>)> {
        loop {
            if let Some(found) = self.least()? {
                return Ok(found);
            }
            let mut news = self.news.subscribe();
            // What came before that is seen now.
            if let Some(found) = self.least()? {
                return Ok(found);
            }
            self.open.inner.gate.check()?;
            // Whoever tells lives as long as this.
            let _ = patience.wait("a data channel", news.changed()).await?;
        }
    }

    /// As [`Inner::rail`]; `None` if none lives at the moment. Sees to those that it finds dead.
    fn least(self: &Arc<Self>) -> Result<Option<(Arc<Rail>, Arc<Seat>)>> {
        let rails = self.rails.load();
        if rails.is_empty() {
            let lost = self.lost.lock();
            return Err(lost.as_ref().map_or_else(|| Error::channel(Ended::Closed), Lost::error));
        }
        // From another one each time, or the first would get all that comes one by one.
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut best: Option<(u64, &Arc<Rail>, Arc<Seat>)> = None;
        for nth in 0..rails.len() {
            let Some(rail) = rails.get((turn.wrapping_add(nth)) % rails.len()) else { continue };
            if rail.healing.load(Ordering::Acquire) {
                continue;
            }
            let load = rail.load.load(Ordering::Relaxed);
            if best.as_ref().is_some_and(|(least, ..)| *least <= load) {
                continue;
            }
            let seat = rail.binding.seat();
            if is_live(&seat) {
                best = Some((load, rail, seat));
            } else {
                self.failed(rail, seat);
            }
        }
        Ok(best.map(|(_, rail, seat)| (Arc::clone(rail), seat)))
    }

    /// A rail is of no use on this seat: it drops out, and is brought back in the background.
    pub(super) fn failed(self: &Arc<Self>, rail: &Arc<Rail>, seat: Arc<Seat>) {
        if self.unbound.load(Ordering::Acquire) || rail.healing.swap(true, Ordering::AcqRel) {
            return;
        }
        let healing = Healing(Arc::clone(rail));
        // Bound again by the healer before: that seat is another matter.
        if !Arc::ptr_eq(&rail.binding.seat(), &seat) {
            // Who has looked meanwhile saw one that was being healed.
            drop(healing);
            return self.tell();
        }
        let inner = Arc::downgrade(self);
        let open = self.open.clone();
        let mut healers = self.healers.lock();
        while healers.try_join_next().is_some() {}
        healers.spawn(async move {
            let rail = Arc::clone(&healing.0);
            let mut backoff = Backoff::data();
            let lost = loop {
                tokio::time::sleep(backoff.next()).await;
                match rail.binding.replace(&mut Trials::new(&open), &open, &seat).await {
                    Ok(()) => break None,
                    // An open that is over does not come back, whatever the attempt met.
                    Err(error) => {
                        match open.inner.gate.over().cloned().map(Lost::Over).or_else(|| Lost::of(&error)) {
                            Some(lost) => {
                                tracing::debug!(%error, "a data channel is left out from now on");
                                break Some(lost);
                            }
                            None => tracing::debug!(%error, "a data channel is not back yet"),
                        }
                    }
                }
            };
            let Some(inner) = inner.upgrade() else { return };
            if let Some(lost) = lost {
                inner.leave_out(&rail, lost);
            }
            // Whoever is told finds it so.
            drop(healing);
            inner.tell();
        });
    }

    fn leave_out(&self, rail: &Arc<Rail>, lost: Lost) {
        // First: who finds no rail looks for the reason.
        *self.lost.lock() = Some(lost);
        self.rails
            .rcu(|rails| rails.iter().filter(|other| !Arc::ptr_eq(other, rail)).cloned().collect::<Vec<_>>());
    }

    /// Wakes who waits for a rail.
    pub(super) fn tell(&self) {
        self.news.send_modify(|count| *count = count.wrapping_add(1));
    }
}
