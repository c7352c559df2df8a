//! What is due when.

use super::contend::ContenderId;
use super::{Authority, Effect};
use crate::types::{OpenId, Timestamp};
use std::collections::BTreeSet;

/// How much may be done in one call: what is due at once for many opens does not hold up the rest.
const DUE_PER_CALL: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Timer {
    /// The bindings of a detached open have lived on for long enough.
    Linger(OpenId),
    /// A hold time is over.
    Expiry(OpenId),
    /// A request has waited for a detached open for as long as it wanted.
    Contender(ContenderId),
    /// A lock request has waited for as long as it wanted.
    LockWait(OpenId, u64),
    /// A tombstone is forgotten.
    Tombstone(OpenId),
}

#[derive(Debug, Default)]
pub(super) struct Timers(pub(super) BTreeSet<(Timestamp, Timer)>);

impl Timers {
    pub(super) fn set(&mut self, at: Timestamp, timer: Timer) {
        self.0.insert((at, timer));
    }

    pub(super) fn clear(&mut self, at: Timestamp, timer: Timer) {
        self.0.remove(&(at, timer));
    }

    pub(super) fn next(&self) -> Option<Timestamp> {
        self.0.first().map(|(at, _)| *at)
    }
}

impl Authority {
    pub(super) fn run_timers(&mut self, effects: &mut Vec<Effect>) {
        for _ in 0..DUE_PER_CALL {
            let Some((at, timer)) = self.timers.0.first().copied().filter(|(at, _)| *at <= self.now) else {
                return;
            };
            self.timers.clear(at, timer);
            match timer {
                Timer::Linger(id) => self.linger_over(id, effects),
                Timer::Expiry(id) => self.hold_over(id),
                Timer::Contender(id) => self.contender_timed_out(id, effects),
                Timer::LockWait(id, sequence) => self.lock_wait_over(id, sequence, effects),
                Timer::Tombstone(id) => self.forget(id, effects),
            }
        }
    }
}
