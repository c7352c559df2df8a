//! Requests whose answer is looked for instead of slept for.
//!
//! Over RDMA an answer may be there in less time than it takes to arm, fall asleep and be woken. A *prompt* request is one
//! whose caller waits for it at once and for nothing else; if it is alone on its channel, and looking has paid off
//! lately ([`Spin`]), its caller polls the transport itself:
//!
//! ```text
//!   submit (not armed) ─► look, for as long as the budget ──found──► collected, still not armed ─► the next request
//!                           │ not found, or somebody else came                    │ none for WATCH
//!                           ▼                                                     ▼
//!                         arm, sleep                                    the driver's watch arms
//! ```
//!
//! So this is the one case in which the transport is not armed while the lock is free. It does not last: as long as it may
//! be so the driver looks after the channel every [`WATCH`], and arms it once no prompt request was made in between.

use super::Shared;
use super::state::State;
use holdfast_transport::{Capabilities, Spin};
use std::time::{Duration, Instant};

/// Longest look.
const LOOK_MAX: Duration = Duration::from_micros(100);
/// The same where the peer is a process of this host: one that runs answers sooner, and one that does not must be woken.
const LOOK_MAX_LOCAL: Duration = Duration::from_micros(30);
/// So many requests in a row must have been alone before one is looked for: others may be held up by who looks.
const ALONE_MIN: u32 = 8;
/// Looks between two looks at the clock.
const CLOCK: u32 = 16;
/// How often the driver looks after a channel that may not be armed.
pub(super) const WATCH: Duration = Duration::from_millis(4);

/// The channel's share of it, behind its lock.
pub(super) struct Prompt {
    /// The transport can be polled cheaply.
    cheap: bool,
    /// Who looks is to give way now and then.
    gives_way: bool,
    spin: Spin,
    /// Requests in a row that had the channel to themselves.
    alone: u32,
    /// The driver watches.
    watched: bool,
    /// A prompt request was made since the driver looked.
    used: bool,
}

impl Prompt {
    pub(super) fn new(can: Capabilities) -> Self {
        let (cheap, gives_way) = (can.cheap_poll, can.gives_way);
        let spin = Spin::new(if gives_way { LOOK_MAX } else { LOOK_MAX_LOCAL });
        Self { cheap, gives_way, spin, alone: 0, watched: false, used: false }
    }

    /// A request was sent. Tells how long its answer may be looked for, if its caller does that.
    pub(super) fn sent(&mut self, prompt: bool, alone: bool) -> Option<Duration> {
        self.alone = if alone { self.alone.saturating_add(1) } else { 0 };
        if prompt && self.cheap && self.alone > ALONE_MIN { self.spin.begin() } else { None }
    }

    /// The transport is left without being armed. True if the driver has to be told.
    pub(super) fn leaves(&mut self) -> bool {
        self.used = true;
        !std::mem::replace(&mut self.watched, true)
    }

    #[cfg(test)]
    pub(super) fn is_watched(&self) -> bool {
        self.watched
    }

    /// The driver looks. True if nothing happened since: it is to arm, and watches no more.
    pub(super) fn is_quiet(&mut self) -> bool {
        let quiet = !std::mem::take(&mut self.used);
        self.watched = !quiet;
        quiet
    }
}

/// A look that is to be taken, or that was in vain.
pub(super) struct Look {
    budget: Duration,
    begun: Instant,
    over: bool,
    /// It was not in vain.
    found: bool,
}

impl Look {
    pub(super) fn new(budget: Duration) -> Self {
        Self { budget, begun: Instant::now(), over: false, found: false }
    }

    /// True until it was taken: the transport may not be armed.
    pub(super) fn is_due(&self) -> bool {
        !self.over
    }

    /// Looks for the answer; leaves the transport armed if it did not come.
    pub(super) fn take(&mut self, channel: &Shared, number: u32) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        for round in 1u32.. {
            let mut state = channel.state.lock();
            state.collect(&channel.credits);
            if state.slot(number).is_none_or(|slot| slot.outcome.is_some()) && !state.wants_drain() {
                self.found = true;
                return;
            }
            let mut late = false;
            if round % CLOCK == 0 {
                let took = self.begun.elapsed();
                late = took > self.budget;
                if late {
                    state.prompt.spin.has_stalled(took);
                }
            }
            if late || state.wants_drain() {
                return state.drain(&channel.credits);
            }
            let gives_way = state.prompt.gives_way;
            drop(state);
            if gives_way && round % CLOCK == 0 {
                // What is waited for may need this processor: soft-RoCE works in kernel threads.
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    /// The answer was collected.
    pub(super) fn ended(&self, state: &mut State) {
        let (spin, took) = (&mut state.prompt.spin, self.begun.elapsed());
        if !(self.found && spin.has_stalled(took)) {
            spin.ended(took);
        }
    }
}

impl State {
    /// There is more to do than to wait for the one answer.
    fn wants_drain(&self) -> bool {
        self.slots.len() > 1
            || self.ended.is_some()
            || self.channel.ended().is_some()
            || self.gives_back()
            || !self.room.is_empty()
    }
}
