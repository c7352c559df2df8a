//! Log lines that a peer can cause: at most one a second of each kind, with the number of those left out.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Time between two lines.
const PERIOD: Duration = Duration::from_secs(1);

/// One kind of log line.
#[derive(Debug)]
pub(crate) struct Throttle {
    first: OnceLock<Instant>,
    /// When the next line may be written, nanoseconds after the first.
    next: AtomicU64,
    left_out: AtomicU64,
}

impl Throttle {
    pub(crate) const fn new() -> Self {
        Self { first: OnceLock::new(), next: AtomicU64::new(0), left_out: AtomicU64::new(0) }
    }

    /// If a line may be written now: how many were left out before it.
    pub(crate) fn admit(&self) -> Option<u64> {
        self.admit_at(self.first.get_or_init(Instant::now).elapsed())
    }

    fn admit_at(&self, now: Duration) -> Option<u64> {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let next = self.next.load(Relaxed);
        let after = nanos(now.saturating_add(PERIOD));
        // Of several threads at once one writes.
        if nanos(now) < next || self.next.compare_exchange(next, after, Relaxed, Relaxed).is_err() {
            self.left_out.fetch_add(1, Relaxed);
            return None;
        }
        Some(self.left_out.swap(0, Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_the_rest_is_counted() {
        let throttle = Throttle::new();
        assert_eq!(throttle.admit(), Some(0));
        let throttle = Throttle::new();
        let mut written = Vec::new();
        for ms in 0..2500 {
            written.extend(throttle.admit_at(Duration::from_millis(ms)).map(|left_out| (ms, left_out)));
        }
        assert_eq!(written, [(0, 0), (1000, 999), (2000, 999)]);
    }
}
