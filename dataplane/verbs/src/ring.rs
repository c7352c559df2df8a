//! [`Ring`]: what is in flight on one queue, in the order of posting. Pure bookkeeping, bounded, no allocation in use.
//!
//! ```text
//!   push ─►  | 7 | 8 | 9 | 10 |  ─► finish(9): 7, 8 and 9 leave, in order
//!            first (oldest)
//! ```
//!
//! A reliable connection completes its work in order: the completion of one request says that all before it, which were
//! posted without asking for a completion, are done too.

use std::collections::VecDeque;

/// Entries in flight, each known by its sequence number. At most `capacity`.
pub(crate) struct Ring<T> {
    entries: VecDeque<T>,
    capacity: usize,
    /// Sequence number of the oldest entry.
    first: u64,
}

impl<T> Ring<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { entries: VecDeque::with_capacity(capacity), capacity, first: 0 }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn room(&self) -> usize {
        self.capacity.saturating_sub(self.entries.len())
    }

    /// The number the next entry will have.
    pub(crate) fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// Adds an entry; the caller has seen that there is room.
    pub(crate) fn push(&mut self, entry: T) {
        debug_assert!(self.room() > 0);
        self.entries.push_back(entry);
    }

    /// Takes out all entries up to and including number `sequence`, oldest first; the flag says "this is the one named".
    /// False if no such entry is in flight; nothing is taken out then.
    pub(crate) fn finish(&mut self, sequence: u64, mut each: impl FnMut(T, bool)) -> bool {
        if sequence < self.first || sequence >= self.next() {
            return false;
        }
        while self.first <= sequence {
            let Some(entry) = self.entries.pop_front() else { break };
            each(entry, self.first == sequence);
            self.first += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finishing_one_finishes_all_before_it_in_order() {
        let mut ring = Ring::new(4);
        for entry in ["a", "b", "c", "d"] {
            ring.push(entry);
        }
        assert_eq!((ring.room(), ring.next()), (0, 4));
        let mut seen = Vec::new();
        assert!(ring.finish(2, |entry, named| seen.push((entry, named))));
        assert_eq!(seen, [("a", false), ("b", false), ("c", true)]);
        assert_eq!((ring.room(), ring.len(), ring.next()), (3, 1, 4));
    }

    #[test]
    fn numbers_not_in_flight_change_nothing() {
        let mut ring = Ring::new(2);
        ring.push(1);
        assert!(ring.finish(0, |_, _| ()));
        for sequence in [0, 1, u64::MAX] {
            assert!(!ring.finish(sequence, |_, _| panic!("nothing is in flight")));
        }
        ring.push(2);
        assert!(ring.finish(1, |entry, named| assert_eq!((entry, named), (2, true))));
    }
}
