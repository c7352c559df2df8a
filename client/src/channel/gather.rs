//! Requests that go out together.
//!
//! Answers come in batches, and each wakes a task that is likely to ask again at once. Sent one by one their requests would
//! cost a system call each here, and a wake-up each at the server. So after a batch the driver lets the others run first:
//!
//! ```text
//!   driver: drain ── several answered ─► gathering ─► yield ... resumed ─► push all ─► sleep
//!                                           │            ▲
//!   tasks:                                  └► submit, submit, ... (not pushed; at most MANY)
//! ```
//!
//! A task that computes before it yields would hold up what the others have asked. Where that was seen, nothing is
//! gathered for a while.

use std::time::{Duration, Instant};

/// So many that are gathered go out at once.
const MANY: usize = 16;
/// Longest time between a batch and the driver's return that is no loss: so much, and where sending costs a system call so
/// much for each request that was asked meanwhile. (Where many channels share a processor and its cache, a task takes several
/// times as long to ask.)
const SHORT: Duration = Duration::from_micros(100);
const SHORT_EACH: Duration = Duration::from_micros(25);
/// Batches that gather nothing after one that took longer.
const PAUSE: u32 = 64;

/// The channel's share of it, behind its lock.
#[derive(Default)]
pub(super) struct Gather {
    since: Option<Instant>,
    queued: usize,
    /// Requests submitted since the batch.
    asked: u32,
    /// Requests answered since the driver looked.
    answered: usize,
    pause: u32,
    /// Sending costs no system call.
    is_cheap: bool,
}

impl Gather {
    pub(super) fn new(is_cheap: bool) -> Self {
        Self { is_cheap, ..Self::default() }
    }

    /// A request was answered.
    pub(super) fn answered(&mut self) {
        self.answered += 1;
    }

    /// The driver has drained. True if it is to let others run, and come back.
    pub(super) fn begin(&mut self) -> bool {
        let several = std::mem::take(&mut self.answered) > 1;
        if several && self.pause > 0 {
            self.pause -= 1;
        } else if several {
            (self.since, self.asked) = (Some(Instant::now()), 0);
        }
        self.since.is_some()
    }

    /// A request was submitted. True if it can wait for others.
    pub(super) fn takes(&mut self) -> bool {
        self.asked = self.asked.saturating_add(1);
        if self.since.is_none() || self.queued + 1 >= MANY {
            self.queued = 0;
            return false;
        }
        self.queued += 1;
        true
    }

    /// The driver is back. True if there is something to be pushed out.
    pub(super) fn end(&mut self) -> bool {
        let asked = if self.is_cheap { 0 } else { self.asked };
        if self.since.take().is_some_and(|since| is_long(since.elapsed(), asked)) {
            self.pause = PAUSE;
        }
        std::mem::take(&mut self.queued) > 0
    }
}

/// True if a time between a batch and the driver's return, in which so many requests were asked, held some of them up.
fn is_long(took: Duration, asked: u32) -> bool {
    took > SHORT + SHORT_EACH.saturating_mul(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_answers_let_requests_wait_for_each_other_and_one_does_not() {
        let mut gather = Gather::default();
        gather.answered();
        assert!(!gather.begin() && !gather.takes(), "one alone goes out at once");
        gather.answered();
        gather.answered();
        assert!(gather.begin());
        assert!(gather.takes() && gather.takes());
        gather.since = Some(Instant::now());
        assert!(gather.end(), "two wait");
        assert!(!gather.takes() && !gather.end());
    }

    #[test]
    fn many_go_out_before_the_driver_is_back() {
        let mut gather = Gather { answered: 2, ..Gather::default() };
        assert!(gather.begin());
        for round in 1..=3 * MANY {
            assert_eq!(gather.takes(), round % MANY != 0);
        }
        assert!(!gather.end(), "all have gone out");
    }

    #[test]
    fn a_long_round_in_which_many_asked_is_no_reason_to_pause() {
        assert!(is_long(2 * SHORT, 1) && !is_long(2 * SHORT, 16));
        assert!(!is_long(SHORT, 0) && is_long(10 * SHORT, 16));
        let mut gather = Gather { answered: 2, ..Gather::default() };
        assert!(gather.begin() && gather.takes() && gather.takes());
        assert_eq!(gather.asked, 2);
        gather.since = None;
        gather.answered = 2;
        assert!(gather.begin());
        assert_eq!(gather.asked, 0, "each batch counts its own");
    }

    #[test]
    fn after_a_long_round_nothing_waits_for_a_while() {
        let mut gather = Gather { answered: 2, ..Gather::default() };
        assert!(gather.begin());
        gather.since = Instant::now().checked_sub(2 * SHORT);
        assert!(!gather.end());
        for _ in 0..PAUSE {
            gather.answered = 2;
            assert!(!gather.begin());
        }
        gather.answered = 2;
        assert!(gather.begin());
    }
}
