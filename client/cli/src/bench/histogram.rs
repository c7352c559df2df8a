//! Latencies in buckets of 1.6 %: no allocation and no loss, however many are counted.

use std::time::Duration;

/// Buckets for each doubling.
const FINE_BITS: u32 = 6;
const FINE: usize = 1 << FINE_BITS;

/// Counts of times, nanoseconds.
#[derive(Clone)]
pub(super) struct Histogram {
    counts: Vec<u64>,
    total: u64,
    sum: u128,
    least: u64,
    most: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        let counts = vec![0; bucket(u64::MAX) + 1];
        Self { counts, total: 0, sum: 0, least: u64::MAX, most: 0 }
    }
}

/// Values below [`FINE`] have a bucket each; every later doubling has [`FINE`] of them.
fn bucket(ns: u64) -> usize {
    let doublings = (u64::BITS - ns.leading_zeros()).saturating_sub(FINE_BITS + 1);
    // Less than 2 * FINE.
    let rest = usize::try_from(ns >> doublings).unwrap_or(usize::MAX);
    doublings as usize * FINE + rest
}

/// The highest value in a bucket.
fn highest(bucket: usize) -> u64 {
    if bucket < 2 * FINE {
        return bucket as u64;
    }
    let doublings = bucket / FINE - 1;
    let first = (bucket % FINE + FINE) as u64;
    ((u128::from(first + 1) << doublings) - 1).try_into().unwrap_or(u64::MAX)
}

impl Histogram {
    /// Counts one.
    pub(super) fn add(&mut self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(ns)] += 1;
        self.total += 1;
        self.sum += u128::from(ns);
        (self.least, self.most) = (self.least.min(ns), self.most.max(ns));
    }

    /// Counts what another has counted.
    pub(super) fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
        self.total += other.total;
        self.sum += other.sum;
        (self.least, self.most) = (self.least.min(other.least), self.most.max(other.most));
    }

    /// How many.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The least and the most, ns; 0 if there is none.
    pub(super) fn bounds(&self) -> (u64, u64) {
        if self.total == 0 { (0, 0) } else { (self.least, self.most) }
    }

    /// The mean, ns; 0 if there is none.
    pub(super) fn mean(&self) -> u64 {
        u64::try_from(self.sum / u128::from(self.total.max(1))).unwrap_or(u64::MAX)
    }

    /// So many of a thousand took no longer, ns; 0 if there is none.
    pub(super) fn per_mille(&self, of: u64) -> u64 {
        let wanted = (self.total * of).div_ceil(1000).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return highest(bucket).min(self.most);
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_without_gaps_and_narrow() {
        let mut before = None;
        for bucket_number in 0..=bucket(u64::MAX) {
            let high = highest(bucket_number);
            assert_eq!(bucket(high), bucket_number);
            if let Some(before) = before {
                assert!(high > before && bucket(before + 1) == bucket_number, "{bucket_number}");
                assert!(high - before <= 1 + before / FINE as u64);
            }
            before = Some(high);
        }
        assert_eq!(before, Some(u64::MAX));
    }

    #[test]
    fn percentiles_are_those_of_what_was_counted() {
        let mut all = Histogram::default();
        assert_eq!((all.per_mille(500), all.mean(), all.bounds()), (0, 0, (0, 0)));
        for half in [1..=500u64, 501..=1000] {
            let mut part = Histogram::default();
            half.for_each(|us| part.add(Duration::from_micros(us)));
            all.merge(&part);
        }
        assert_eq!((all.total(), all.bounds(), all.mean()), (1000, (1000, 1_000_000), 500_500));
        for (of, wanted) in [(500, 500_000), (990, 990_000), (1000, 1_000_000)] {
            let found = all.per_mille(of);
            assert!((wanted..=wanted + wanted / 60).contains(&found), "{of}: {found}");
        }
    }
}
