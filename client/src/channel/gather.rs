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
/// Longest time between a batch and the driver's return that is no loss.
const SHORT: Duration = Duration::from_micros(100);
/// Batches that gather nothing after one that took longer.
const PAUSE: u32 = 64;

/// The channel's share of it, behind its lock.
#[derive(Default)]
pub(super) struct Gather {
    since: Option<Instant>,
    queued: usize,
    /// Requests answered since the driver looked.
    answered: usize,
    pause: u32,
}

impl Gather {
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
            self.since = Some(Instant::now());
        }
        self.since.is_some()
    }

    /// A request was submitted. True if it can wait for others.
    pub(super) fn takes(&mut self) -> bool {
        if self.since.is_none() || self.queued + 1 >= MANY {
            self.queued = 0;
            return false;
        }
        self.queued += 1;
        true
    }

    /// The driver is back. True if there is something to be pushed out.
    pub(super) fn end(&mut self) -> bool {
        if self.since.take().is_some_and(|since| since.elapsed() > SHORT) {
            self.pause = PAUSE;
        }
        std::mem::take(&mut self.queued) > 0
    }
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
