//! [`Spin`]: how long to look for work before going to sleep.
//!
//! Falling asleep and being woken costs more than a small transfer over RDMA takes. So whoever waits for one looks for it
//! a while first, for as long as that has paid off lately:
//!
//! ```text
//!   wait ended after
//!   ├─ at most the budget ────────► it paid off: the same again
//!   ├─ at most the most there is ─► a longer look would have: twice the budget
//!   └─ longer ────────────────────► wasted: half of it, in the end nothing (an idle process uses no processor)
//! ```
//!
//! A budget of nothing would stay so where sleeping itself takes longer than all there is: the 64th wait looks again, and if that was in
//! vain, one after twice as many, up to 1024.
//!
//! Where others compute on all processors, who looks is soon made to wait for them, for milliseconds at a time, and who sleeps is not: a
//! look during which the thread [stalled](Spin::has_stalled) ends the looking at once.

use std::time::Duration;

/// The least budget but nothing.
const LEAST: Duration = Duration::from_micros(8);
/// One wait of so many tries the longest look, if there is no budget: at first, and at last.
const PROBE: u32 = 64;
const PROBE_MAX: u32 = 1024;

/// A look that is over so much later than it should be: the thread did not run meanwhile.
const STALL: Duration = Duration::from_micros(500);

/// See the module's text. Tells no time itself.
#[derive(Clone, Debug)]
pub struct Spin {
    budget: Duration,
    max: Duration,
    /// Of the wait that goes on.
    looks: Duration,
    /// Until one looks that has no budget, and how many those are.
    until: u32,
    probe: u32,
}

impl Spin {
    /// Looks for at most `max`; zero never looks.
    pub const fn new(max: Duration) -> Self {
        Self { budget: max, max, looks: Duration::ZERO, until: PROBE, probe: PROBE }
    }

    /// A wait begins: how long it is to look before it sleeps. `None`: it sleeps at once, and [`Spin::ended`] need not be
    /// told of it.
    pub fn begin(&mut self) -> Option<Duration> {
        self.looks = self.budget;
        if self.budget.is_zero() {
            self.until = self.until.saturating_sub(1);
            if self.until == 0 {
                self.probe = (self.probe * 2).min(PROBE_MAX);
                (self.until, self.looks) = (self.probe, self.max);
            }
        }
        (!self.looks.is_zero()).then_some(self.looks)
    }

    /// The wait has ended, `took` after it began.
    pub fn ended(&mut self, took: Duration) {
        if took <= self.looks {
            self.pays_off(self.looks);
        } else if took <= self.max {
            self.pays_off((self.looks * 2).min(self.max));
        } else {
            self.budget = self.budget.min(self.looks) / 2;
            if self.budget < LEAST {
                self.budget = Duration::ZERO;
            }
        }
    }

    /// A look goes on, or has ended, so long after it began. True if the thread was kept from looking: then this was the last for a
    /// while, and [`Spin::ended`] is not to be told of it.
    pub fn has_stalled(&mut self, took: Duration) -> bool {
        let stalled = took > self.looks + STALL;
        if stalled {
            self.budget = Duration::ZERO;
        }
        stalled
    }

    fn pays_off(&mut self, budget: Duration) {
        (self.budget, self.until, self.probe) = (budget, PROBE, PROBE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(100);
    const LONG: Duration = Duration::from_millis(1);

    /// Waits of the same length; returns how many looked.
    fn waits(spin: &mut Spin, count: u32, took: Duration) -> u32 {
        (0..count)
            .map(|_| {
                let looks = spin.begin().is_some();
                if looks {
                    spin.ended(took);
                }
                u32::from(looks)
            })
            .sum()
    }

    #[test]
    fn long_waits_end_the_looking_and_one_short_one_brings_it_back() {
        let mut spin = Spin::new(MAX);
        assert!(waits(&mut spin, 60, LONG) <= 5, "looks for nothing");
        assert_eq!(spin.budget, Duration::ZERO);
        assert_eq!(
            waits(&mut spin, 64 + 128 + 256 + 512 + 4 * 1024, LONG),
            8,
            "one tries again, ever more seldom"
        );
        while spin.begin().is_none() {}
        spin.ended(MAX / 10);
        assert_eq!(spin.begin(), Some(MAX), "it paid off");
        assert!(waits(&mut spin, 5, LONG) <= 5 && spin.budget.is_zero());
        assert_eq!(waits(&mut spin, 64, LONG), 1, "as often as at first");
    }

    #[test]
    fn a_budget_that_pays_off_is_kept_and_one_that_nearly_did_grows() {
        let mut spin = Spin::new(MAX);
        assert_eq!(waits(&mut spin, 1000, MAX / 3), 1000);
        assert_eq!(spin.begin(), Some(MAX));
        spin.ended(LONG);
        assert_eq!(spin.begin(), Some(MAX / 2));
        spin.ended(MAX);
        assert_eq!(spin.begin(), Some(MAX));
    }

    #[test]
    fn a_look_that_stalled_is_the_last_for_a_while() {
        let mut spin = Spin::new(MAX);
        assert_eq!(spin.begin(), Some(MAX));
        assert!(!spin.has_stalled(MAX + STALL));
        assert!(spin.has_stalled(MAX + STALL + Duration::from_micros(1)));
        assert_eq!((0..63).filter_map(|_| spin.begin()).count(), 0);
        assert_eq!(spin.begin(), Some(MAX));
        spin.ended(MAX / 2);
        assert_eq!(spin.begin(), Some(MAX), "it has room again");
    }

    #[test]
    fn no_looking_means_none() {
        let mut spin = Spin::new(Duration::ZERO);
        assert_eq!(waits(&mut spin, 1000, Duration::ZERO), 0);
    }
}
