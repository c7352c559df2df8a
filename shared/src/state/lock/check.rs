//! What is true of the lock table after every call. On in tests and in simulation.

use super::file::{FileLocks, check_batch};
use super::pieces::Pieces;
use super::{LockLimits, LockOwner, LockTable};
use crate::types::{LockItem, LockKind, LockRange, OpenId};
use std::collections::{BTreeMap, BTreeSet};

impl LockTable {
    /// Checks everything that must hold between calls.
    ///
    /// # Panics
    /// If something does not: that is our bug.
    pub fn check_invariants(&self) {
        let (mut waiters, mut held) = (0, 0);
        for (identity, file) in &self.files {
            assert!(!file.is_empty(), "{identity:?} is kept for nothing");
            file.check_held();
            file.check_pieces();
            for waiter in &file.queue {
                assert_eq!(self.waiters.get(&waiter.id), Some(identity), "a waiter is found by its id");
                assert_eq!(check_batch(&LockLimits::NONE, &waiter.owner, &waiter.items), Ok(()));
            }
            waiters += file.queue.len();
            held += file.total;
        }
        assert_eq!(self.waiters.len(), waiters, "every id known is one of a waiter");
        assert_eq!(self.held, held, "the sum is that of all files");
    }
}

impl FileLocks {
    /// No two locks conflict, and each open has as many as it is counted to have.
    fn check_held(&self) {
        let mut opens: BTreeMap<OpenId, usize> = BTreeMap::new();
        for (owner, item) in self.held.iter() {
            *opens.entry(owner.open()).or_default() += 1;
            assert!(self.held.count(owner, item) > 0, "found by place");
            // An exclusive lock of an open finds itself, and nothing else; all others find nothing.
            let mut against = self.held.against(owner, item);
            if let (LockOwner::Open { .. }, LockKind::Exclusive, false) =
                (owner, item.kind, item.range.is_empty())
            {
                assert_eq!(against.next(), Some(owner));
                assert_eq!(self.held.count(owner, item), 1, "an exclusive lock is one");
            }
            assert_eq!(against.next(), None, "conflict with {owner:?}'s {item:?}");
        }
        assert_eq!(opens.values().sum::<usize>(), self.total);
        assert_eq!(opens, self.opens);
    }

    /// The pieces are exactly the POSIX locks held, and as few as can be.
    fn check_pieces(&self) {
        let process_locks = self.held.iter().filter(|(owner, _)| matches!(owner, LockOwner::Process { .. }));
        let held: Vec<(LockOwner, LockItem)> =
            process_locks.map(|(owner, item)| (owner.clone(), item)).collect();
        let mut listed = BTreeSet::new();
        for (process, pieces) in &self.processes {
            check_order(pieces);
            for (offset, piece) in pieces {
                let owner = LockOwner::Process { open: piece.open, process: process.clone() };
                let range = LockRange::new(*offset, piece.end - offset).ok();
                let item = range.map(|range| LockItem { range, kind: piece.kind });
                assert!(item.is_some_and(|item| listed.insert((owner, item))));
            }
        }
        assert_eq!(held.len(), listed.len(), "a POSIX lock is held once");
        assert!(held.iter().all(|lock| listed.contains(lock)));
    }
}

fn check_order(pieces: &Pieces) {
    assert!(!pieces.is_empty(), "an owner is kept for nothing");
    assert!(pieces.iter().all(|(offset, piece)| *offset < piece.end));
    for ((_, piece), (offset, next)) in pieces.iter().zip(pieces.iter().skip(1)) {
        assert!(piece.end <= *offset, "pieces of one owner overlap");
        let alike = (piece.kind, piece.open) == (next.kind, next.open);
        assert!(!alike || piece.end < *offset, "pieces that touch are one");
    }
}
