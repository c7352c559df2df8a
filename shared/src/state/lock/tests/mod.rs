//! The lock table against its rules. Every call of every test is followed by a check of the invariants.

mod io;
mod mandatory;
mod model;
mod posix;
mod waiting;

use super::*;
use crate::types::{LockKind, ProcessId};
use LockKind::{Exclusive, Shared};
use std::sync::Arc;

const FILE: FileIdentity = FileIdentity { device: 1, inode: 2, generation: 3 };

fn id(open: u8) -> OpenId {
    OpenId([open; 16])
}

fn ids(opens: &[u8]) -> Vec<OpenId> {
    opens.iter().map(|open| id(*open)).collect()
}

fn conflict<T>(opens: &[u8]) -> Result<T, LockError> {
    Err(LockError::Conflict(ids(opens)))
}

/// An owner on a mandatory volume.
fn open(open: u8, number: u64) -> LockOwner {
    LockOwner::Open { open: id(open), number }
}

/// An owner on an advisory volume: process `process`, through `open`.
fn process(open: u8, process: u64) -> LockOwner {
    let process = Process { principal: Arc::from("u1"), process: ProcessId(process), number: 7 };
    LockOwner::Process { open: id(open), process }
}

/// `length@offset`, as the cases have it.
fn range(length: u64, offset: u64) -> LockRange {
    LockRange::new(offset, length).unwrap()
}

fn item(kind: LockKind, length: u64, offset: u64) -> LockItem {
    LockItem { range: range(length, offset), kind }
}

/// A table of which every call is checked, on one file.
struct Table(LockTable);

impl Table {
    fn new() -> Self {
        Self::limited(LockLimits::default())
    }

    fn limited(limits: LockLimits) -> Self {
        Self(LockTable::new(limits))
    }

    fn checked<T>(&mut self, act: impl FnOnce(&mut LockTable) -> T) -> T {
        let result = act(&mut self.0);
        self.0.check_invariants();
        result
    }

    fn lock(&mut self, owner: &LockOwner, items: &[LockItem]) -> Result<Vec<OpenId>, LockError> {
        self.checked(|table| table.lock(FILE, owner, items))
    }

    fn unlock(&mut self, owner: &LockOwner, ranges: &[LockRange]) -> Result<Vec<OpenId>, LockError> {
        self.checked(|table| table.unlock(FILE, owner, ranges))
    }

    fn wait(&mut self, waiter: u64, owner: &LockOwner, items: &[LockItem]) -> Result<Wait, LockError> {
        self.checked(|table| table.wait(FILE, WaiterId(waiter), owner.clone(), items.to_vec()))
    }

    /// Which waiters are granted now.
    fn grant(&mut self) -> Vec<u64> {
        self.checked(|table| table.grant_waiters(FILE)).into_iter().map(|granted| granted.waiter.0).collect()
    }

    fn release(&mut self, open: u8) -> Vec<WaiterId> {
        self.checked(|table| table.release(FILE, id(open)))
    }

    fn restore(&mut self, owner: &LockOwner, item: LockItem) -> Result<(), LockError> {
        self.checked(|table| table.restore(FILE, owner, item))
    }

    /// What an open holds, without owner numbers.
    fn held(&self, open: u8) -> Vec<LockItem> {
        self.0.locks_of(FILE, id(open)).into_iter().map(|(_, item)| item).collect()
    }

    fn waiting(&self) -> Vec<u64> {
        self.0.waiters(FILE).map(|(waiter, _)| waiter.0).collect()
    }
}
