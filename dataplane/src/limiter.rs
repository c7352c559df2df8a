//! Log lines that a peer can cause: at most one a second from each place.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// One place; a `static`.
#[derive(Debug)]
pub struct Limiter {
    /// The second from which the next line may come.
    next: AtomicU64,
    suppressed: AtomicU64,
}

impl Limiter {
    /// Lets the first line through.
    pub const fn new() -> Self {
        Self { next: AtomicU64::new(0), suppressed: AtomicU64::new(0) }
    }

    /// `Some` if a line may be written: with how many were not, since the last.
    pub fn pass(&self) -> Option<u64> {
        static BEGIN: OnceLock<Instant> = OnceLock::new();
        self.pass_at(BEGIN.get_or_init(Instant::now).elapsed().as_secs())
    }

    fn pass_at(&self, second: u64) -> Option<u64> {
        let next = self.next.load(Relaxed);
        if second < next || self.next.compare_exchange(next, second + 1, Relaxed, Relaxed).is_err() {
            self.suppressed.fetch_add(1, Relaxed);
            return None;
        }
        Some(self.suppressed.swap(0, Relaxed))
    }
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_with_the_count_of_the_others() {
        let limiter = Limiter::new();
        assert_eq!(limiter.pass_at(0), Some(0));
        assert_eq!(limiter.pass_at(0), None);
        assert_eq!(limiter.pass_at(0), None);
        assert_eq!(limiter.pass_at(1), Some(2));
        assert_eq!(limiter.pass_at(1), None);
        assert_eq!(limiter.pass_at(9), Some(1));
    }
}
