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
//! A budget of nothing would stay so where sleeping itself takes longer than all there is: every 64th wait looks again.

use std::time::Duration;

/// The least budget but nothing.
const LEAST: Duration = Duration::from_micros(8);
/// One wait of so many tries the longest look, if there is no budget.
const PROBE: u32 = 64;

/// See the module's text. Tells no time itself.
#[derive(Clone, Debug)]
pub struct Spin {
    budget: Duration,
    max: Duration,
    /// Of the wait that goes on.
    looks: Duration,
    waits: u32,
}

impl Spin {
    /// Looks for at most `max`; zero never looks.
    pub const fn new(max: Duration) -> Self {
        Self { budget: max, max, looks: Duration::ZERO, waits: 0 }
    }

    /// A wait begins: how long it is to look before it sleeps. `None`: it sleeps at once, and [`Spin::ended`] need not be
    /// told of it.
    pub fn begin(&mut self) -> Option<Duration> {
        self.waits = self.waits.wrapping_add(1);
        let tries = self.budget.is_zero() && self.waits % PROBE == 0;
        self.looks = if tries { self.max } else { self.budget };
        (!self.looks.is_zero()).then_some(self.looks)
    }

    /// The wait has ended, `took` after it began.
    pub fn ended(&mut self, took: Duration) {
        if took <= self.looks {
            self.budget = self.looks;
        } else if took <= self.max {
            self.budget = (self.looks * 2).min(self.max);
        } else {
            self.budget = self.budget.min(self.looks) / 2;
            if self.budget < LEAST {
                self.budget = Duration::ZERO;
            }
        }
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
        assert_eq!(waits(&mut spin, 640, LONG), 10, "one in 64 tries again");
        while spin.begin().is_none() {}
        spin.ended(MAX / 10);
        assert_eq!(spin.begin(), Some(MAX), "it paid off");
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
    fn no_looking_means_none() {
        let mut spin = Spin::new(Duration::ZERO);
        assert_eq!(waits(&mut spin, 1000, Duration::ZERO), 0);
    }
}
