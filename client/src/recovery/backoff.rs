//! How long to wait between two attempts, and for how long to go on.

use crate::config::Config;
use crate::error::{Error, Result};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Waits between attempts: none before the first; then `first` for a while; then doubling up to a second. Each is cut by
/// up to a quarter at random, so that many clients of one server do not come in step.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    /// Attempts before it doubles.
    steady: u32,
    made: u32,
}

impl Backoff {
    pub(crate) const MAX: Duration = Duration::from_secs(1);
    /// Whatever a server asks for.
    const LEAST: Duration = Duration::from_millis(5);

    /// For control: 10 ms, doubling at once.
    pub(crate) fn control() -> Self {
        Self { first: Duration::from_millis(10), steady: 0, made: 0 }
    }

    /// For a data plane, which is back within moments if it is restarted: every 20 ms for half a second.
    pub(crate) fn data() -> Self {
        Self { first: Duration::from_millis(20), steady: 25, made: 0 }
    }

    /// Begins anew.
    pub(crate) fn reset(&mut self) {
        self.made = 0;
    }

    /// As [`Backoff::next`], but no longer than the server has asked for.
    pub(crate) fn next_within(&mut self, asked: Option<Duration>) -> Duration {
        let wait = self.next();
        asked.map_or(wait, |asked| wait.min(asked.max(Self::LEAST)))
    }

    /// What to wait before the next attempt.
    pub(crate) fn next(&mut self) -> Duration {
        let made = self.made;
        self.made = made.saturating_add(1);
        let Some(waits) = made.checked_sub(1) else { return Duration::ZERO };
        let doublings = waits.saturating_sub(self.steady).min(16);
        let whole = (self.first * (1 << doublings)).min(Self::MAX);
        // Without randomness in step, but never at once.
        let [cut] = crate::random().unwrap_or([0]);
        whole - whole / 4 * u32::from(cut) / 256
    }
}

/// For how long one caller goes on waiting: for ever (`recovery = "hard"`), or for `soft_ms` from its first wait on.
#[derive(Debug)]
pub(crate) struct Patience {
    max: Option<Duration>,
    since: Option<Instant>,
}

impl Patience {
    pub(crate) fn new(config: &Config) -> Self {
        Self { max: config.away_max(), since: None }
    }

    /// Waits for something.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when the caller's time is up.
    pub(crate) async fn wait<T>(&mut self, what: &'static str, until: impl Future<Output = T>) -> Result<T> {
        let Some(after) = self.max else { return Ok(until.await) };
        let since = *self.since.get_or_insert_with(Instant::now);
        timeout_at(since + after, until).await.map_err(|_| Error::TimedOut { what, after })
    }

    /// Waits for a while.
    ///
    /// # Errors
    /// As [`Patience::wait`].
    pub(crate) async fn pause(&mut self, what: &'static str, pause: Duration) -> Result<()> {
        self.wait(what, tokio::time::sleep(pause)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_second_and_no_further() {
        let mut backoff = Backoff::control();
        assert_eq!(backoff.next(), Duration::ZERO, "the first attempt is made at once");
        for whole in [10, 20, 40, 80, 160, 320, 640, 1000, 1000] {
            let (wait, whole) = (backoff.next(), Duration::from_millis(whole));
            assert!(
                wait <= whole && wait > whole * 3 / 4 - Duration::from_millis(1),
                "{wait:?} of {whole:?}"
            );
        }
        backoff.made = u32::MAX;
        assert!(backoff.next() > Backoff::MAX / 2, "nothing wraps");
        backoff.reset();
        assert_eq!(backoff.next(), Duration::ZERO);
    }

    #[test]
    fn a_data_plane_is_looked_for_often_at_first() {
        let mut backoff = Backoff::data();
        let waits: Duration = (0..12).map(|_| backoff.next()).sum();
        assert!(waits <= Duration::from_millis(220), "{waits:?}");
        for _ in 0..30 {
            backoff.next();
        }
        assert!(backoff.next() > Backoff::MAX / 2);
    }

    #[test]
    fn nobody_waits_longer_than_the_server_asks_for() {
        let mut backoff = Backoff { made: 20, ..Backoff::control() };
        assert!(backoff.next_within(None) > Duration::from_millis(700));
        assert_eq!(backoff.next_within(Some(Duration::from_millis(50))), Duration::from_millis(50));
        assert_eq!(backoff.next_within(Some(Duration::ZERO)), Backoff::LEAST);
        assert!(backoff.next_within(Some(Duration::from_secs(60))) <= Backoff::MAX);
    }

    #[test]
    fn jitter_differs() {
        let waits = |()| {
            let mut backoff = Backoff::control();
            (0..9).map(|_| backoff.next()).collect::<Vec<_>>()
        };
        assert_ne!(waits(()), waits(()));
    }

    #[tokio::test]
    async fn soft_patience_ends_and_hard_does_not() {
        let mut soft = Patience { max: Some(Duration::from_millis(70)), since: None };
        soft.pause("x", Duration::from_millis(60)).await.unwrap();
        let error = soft.pause("x", Duration::from_millis(60)).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { what: "x", .. }), "all waits of one caller count");
        let mut hard = Patience { max: None, since: None };
        hard.pause("x", Duration::from_millis(90)).await.unwrap();
    }
}
