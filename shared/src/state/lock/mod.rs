//! Byte-range locks: which are held, who waits, and what I/O they forbid.
//!
//! ```text
//!   lock, wait ──► batch ──► against what is held ──► taken ────► locks by place   who is in the way?
//!                            and earlier waiters      │           pieces by owner  (POSIX only)
//!                                   │                 │
//!                                   ▼ Queued          ▼ changed opens
//!   unlock, release ──► free ──► waiters, in turn     journal: locks_of(open)
//!   cancel                          │                 dataplane: io_rules(open)
//!                                   ▼
//!                            grant_waiters ──► granted
//! ```
//!
//! There are two kinds of owners, as there are two kinds of volumes:
//!
//! * An open of a *mandatory* volume holds exact ranges, as in SMB (MS-FSA 2.1.5.8 and 2.1.5.9). A lock conflicts
//!   with every lock that it overlaps if either is exclusive, those of the same open included: it is unlocked
//!   before it is taken otherwise. Shared locks stack. An unlock names open, number and range as they were locked,
//!   and takes one of a stack. Zero-length locks exist and lie between two bytes ([`crate::types::LockRange`]).
//! * A process on an *advisory* volume holds pieces, as in POSIX (`fcntl`). Its own locks replace one another,
//!   upgrade and downgrade included; they conflict with those of other owners only. Unlocking what is not locked is
//!   fine. There is no zero length.
//!
//! If both meet in one file (it is on two volumes), they conflict as different owners do, byte by byte: zero-length
//! locks do not count then.
//!
//! | module | question it answers |
//! |---|---|
//! | `owner` | who holds a lock? |
//! | `index` | what does a range overlap? |
//! | `file` | when is a batch of locks taken or given back? |
//! | `pieces` | how do POSIX locks cut and join? |
//! | `waiting` | whose turn is it? |
//! | `io` | what may not be read or written? |

mod check;
mod file;
mod index;
mod io;
mod owner;
mod pieces;
#[cfg(test)]
mod tests;
mod waiting;

pub use owner::{LockOwner, Process};

use super::FileIdentity;
use crate::types::{IoRule, LockItem, LockRange, OpenId};
use file::FileLocks;
use std::collections::BTreeMap;

/// How many locks there may be. Each limit answers [`LockError::Full`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockLimits {
    /// Elements of one request.
    pub batch: usize,
    /// Locks of one open; a stack counts as many as it has locks.
    pub per_open: usize,
    /// Locks of one file; and locks waited for.
    pub per_file: usize,
    /// Requests that wait for one file.
    pub waiters_per_file: usize,
}

impl LockLimits {
    /// No limit: for replaying a journal, whose locks were promised under whatever limits held then.
    pub const NONE: Self =
        Self { batch: usize::MAX, per_open: usize::MAX, per_file: usize::MAX, waiters_per_file: usize::MAX };
}

impl Default for LockLimits {
    fn default() -> Self {
        Self { batch: 64, per_open: 512, per_file: 1024, waiters_per_file: 256 }
    }
}

/// Why a request is refused. Nothing has changed then.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LockError {
    /// A POSIX lock without a byte, or on the byte at 2^64 - 1.
    #[error("not a range that this volume locks")]
    BadRange,
    /// Elements of the batch conflict with one another.
    #[error("the batch conflicts with itself")]
    Contradicts,
    /// These opens hold what stands in the way, sorted, each once; the asking open itself may be one.
    #[error("conflicting locks are held")]
    Conflict(Vec<OpenId>),
    /// An unlock names what is not locked so.
    #[error("not locked by this owner")]
    NotLocked,
    /// A limit is reached.
    #[error("too many locks")]
    Full,
    /// The waiter's id is in use: a fault of the caller.
    #[error("the waiter waits already")]
    WaiterExists,
}

/// A request that waits. The caller chooses the number; no two that wait have the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WaiterId(pub u64);

/// What became of a request that may wait.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wait {
    /// The batch was free and is taken; the waiter's id was not used.
    Granted {
        /// As [`LockTable::lock`] answers.
        changed: Vec<OpenId>,
    },
    /// It waits.
    Queued {
        /// The opens that hold what stands in its way, as in [`LockError::Conflict`]; none if it waits for an earlier
        /// waiter only.
        holders: Vec<OpenId>,
    },
}

/// A waiter whose batch is taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Granted {
    /// Which.
    pub waiter: WaiterId,
    /// The open that holds the locks.
    pub open: OpenId,
    /// As [`LockTable::lock`] answers.
    pub changed: Vec<OpenId>,
}

/// How much there is, for the operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LockCounts {
    /// Files with a lock or a waiter.
    pub files: usize,
    /// Locks held.
    pub locks: usize,
    /// Requests that wait.
    pub waiters: usize,
}

/// The locks of all files. It knows nothing of sessions, hold times or fences: those who call it do.
///
/// After anything that may have freed a range (`unlock`, `release`, `cancel`, `cancel_waits`, and a `lock` of a POSIX
/// owner, which may downgrade) call [`LockTable::grant_waiters`].
#[derive(Debug)]
pub struct LockTable {
    limits: LockLimits,
    /// Only files with a lock or a waiter.
    files: BTreeMap<FileIdentity, FileLocks>,
    /// Where each waiter waits.
    waiters: BTreeMap<WaiterId, FileIdentity>,
    /// Locks of all files together: told after every event, so never counted anew.
    held: usize,
}

impl LockTable {
    /// A table without locks.
    pub fn new(limits: LockLimits) -> Self {
        Self { limits, files: BTreeMap::new(), waiters: BTreeMap::new(), held: 0 }
    }

    /// Sets other limits. What is there already stays, if it is more.
    pub fn set_limits(&mut self, limits: LockLimits) {
        self.limits = limits;
    }

    /// Does something with a file's locks, and keeps no file that has none.
    fn with<T>(&mut self, file: FileIdentity, act: impl FnOnce(&mut FileLocks, &LockLimits) -> T) -> T {
        let locks = self.files.entry(file).or_default();
        let before = locks.total;
        let result = act(locks, &self.limits);
        self.held = (self.held + locks.total).saturating_sub(before);
        if locks.is_empty() {
            self.files.remove(&file);
        }
        result
    }

    /// Takes a whole batch, or nothing. Answers which opens' locks are not what they were, sorted: on an advisory
    /// volume another open of the same owner can be among them, as its locks are replaced.
    ///
    /// # Errors
    /// [`LockError::BadRange`], [`LockError::Contradicts`], [`LockError::Conflict`], [`LockError::Full`].
    pub fn lock(
        &mut self,
        file: FileIdentity,
        owner: &LockOwner,
        items: &[LockItem],
    ) -> Result<Vec<OpenId>, LockError> {
        self.with(file, |locks, limits| locks.lock(limits, owner, items))
    }

    /// Gives a whole batch back, or nothing. Answers as [`LockTable::lock`] does.
    ///
    /// # Errors
    /// Of an open: [`LockError::NotLocked`]. Of a process: [`LockError::BadRange`], and [`LockError::Full`] where a
    /// piece would be cut in two. Of both: [`LockError::Full`] for too long a batch.
    pub fn unlock(
        &mut self,
        file: FileIdentity,
        owner: &LockOwner,
        ranges: &[LockRange],
    ) -> Result<Vec<OpenId>, LockError> {
        self.with(file, |locks, limits| locks.unlock(limits, owner, ranges))
    }

    /// Takes a whole batch now, if nothing held and no earlier waiter is in the way, else later:
    /// [`LockTable::grant_waiters`] says when.
    ///
    /// # Errors
    /// [`LockError::BadRange`], [`LockError::Contradicts`], [`LockError::Full`], [`LockError::WaiterExists`].
    pub fn wait(
        &mut self,
        file: FileIdentity,
        waiter: WaiterId,
        owner: LockOwner,
        items: Vec<LockItem>,
    ) -> Result<Wait, LockError> {
        if self.waiters.contains_key(&waiter) {
            return Err(LockError::WaiterExists);
        }
        let result = self.with(file, |locks, limits| locks.wait(limits, waiter, owner, items));
        if let Ok(Wait::Queued { .. }) = result {
            self.waiters.insert(waiter, file);
        }
        result
    }

    /// Takes, in turn, the batches of those waiters that nothing is in the way of any more.
    pub fn grant_waiters(&mut self, file: FileIdentity) -> Vec<Granted> {
        let granted = self.with(file, FileLocks::grant);
        for granted in &granted {
            self.waiters.remove(&granted.waiter);
        }
        granted
    }

    /// Ends a wait. Answers the file that was waited for; `None` if there is no such waiter.
    pub fn cancel(&mut self, waiter: WaiterId) -> Option<FileIdentity> {
        let file = self.waiters.remove(&waiter)?;
        self.with(file, |locks, _| locks.drop_waiters(|id, _| id == waiter));
        Some(file)
    }

    /// Ends all waits of an open whose locks stay: nobody is there to be told. Answers which waits.
    pub fn cancel_waits(&mut self, file: FileIdentity, open: OpenId) -> Vec<WaiterId> {
        let dropped = self.with(file, |locks, _| locks.drop_waiters(|_, of| of == open));
        for waiter in &dropped {
            self.waiters.remove(waiter);
        }
        dropped
    }

    /// Gives back all that an open holds, and ends all its waits. Answers which waits.
    pub fn release(&mut self, file: FileIdentity, open: OpenId) -> Vec<WaiterId> {
        self.with(file, |locks, _| locks.release(open));
        self.cancel_waits(file, open)
    }

    /// Who waits for a file, in turn, and for which open.
    pub fn waiters(&self, file: FileIdentity) -> impl Iterator<Item = (WaiterId, OpenId)> {
        let queue = self.files.get(&file).map(|locks| &locks.queue);
        queue.into_iter().flatten().map(|waiter| (waiter.id, waiter.owner.open()))
    }

    /// The opens that hold what stands in a waiter's way, as in [`LockError::Conflict`].
    pub fn in_the_way(&self, waiter: WaiterId) -> Vec<OpenId> {
        let locks = self.waiters.get(&waiter).and_then(|file| self.files.get(file));
        let found = locks.and_then(|locks| {
            let waiter = locks.queue.iter().find(|there| there.id == waiter)?;
            Some(locks.in_the_way(&waiter.owner, &waiter.items))
        });
        found.unwrap_or_default()
    }

    /// All that an open holds, as (owner number, lock), in an order that depends on nothing but these; for the
    /// journal. A stack is listed lock by lock.
    pub fn locks_of(&self, file: FileIdentity, open: OpenId) -> Vec<(u64, LockItem)> {
        let held = self.files.get(&file).into_iter().flat_map(|locks| locks.held.iter());
        let mut of_open: Vec<_> = held
            .filter(|(owner, _)| owner.open() == open)
            .map(|(owner, item)| (owner.number(), item))
            .collect();
        of_open.sort_unstable();
        of_open
    }

    /// Enters, at recovery, one lock that [`LockTable::locks_of`] had listed. Limits do not apply.
    ///
    /// # Errors
    /// [`LockError::Conflict`] or [`LockError::BadRange`] if such a lock cannot have been held beside those entered
    /// before: the record is wrong.
    pub fn restore(
        &mut self,
        file: FileIdentity,
        owner: &LockOwner,
        item: LockItem,
    ) -> Result<(), LockError> {
        self.with(file, |locks, _| locks.restore(owner, item))
    }

    /// What dataplane must refuse the bindings of `open`: ordered, disjoint, as few rules as can be. Locks of opens
    /// for which `counts` says false restrict nothing (those past their hold time).
    pub fn io_rules(
        &self,
        file: FileIdentity,
        open: OpenId,
        counts: impl FnMut(OpenId) -> bool,
    ) -> Vec<IoRule> {
        self.files.get(&file).map(|locks| locks.io_rules(open, counts)).unwrap_or_default()
    }

    /// How much there is.
    pub fn counts(&self) -> LockCounts {
        LockCounts { files: self.files.len(), locks: self.held, waiters: self.waiters.len() }
    }
}
