//! Time as the core sees it: numbers that come in from outside.

use std::time::Duration;

/// A point on the monotonic clock of the shell that drives the core, in nanoseconds from an arbitrary start.
/// Comparable only with others of the same process (or simulation).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Timestamp(u64);

impl Timestamp {
    /// From nanoseconds since the clock's start.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the clock's start.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// This much later; the end of time at the most.
    #[must_use]
    pub fn saturating_add(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long from `earlier` to this; zero if it is not earlier.
    pub const fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A time of the wall clock as files carry it: seconds since 1970 and nanoseconds.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, minicbor::Encode, minicbor::Decode,
)]
pub struct FileTime {
    /// Seconds since 1970-01-01 UTC; negative before.
    #[n(0)]
    pub seconds: i64,
    /// Nanoseconds, below 1,000,000,000.
    #[n(1)]
    pub nanos: u32,
}
