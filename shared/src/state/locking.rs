//! Lock requests: from the request to the answer.
//!
//! ```text
//!  Lock ─► repeated? ─► free: taken, journalled ─► barrier: others obey ─────────────────────────► Done
//!            │            └ in the way: refused, evicted, or waits ─► granted later, the same way
//!  Unlock ───┤► held so? ─► barrier: own I/O begun before has ended ─► given up, journalled ─► barrier ─► Done
//!            ▼                                                             └► waiters
//!          the same answer again; one that is under way is joined
//! ```
//!
//! Every change carries a number. The last 32 that were executed are remembered, and journalled, so that a repeated one
//! is answered and not executed again. What was refused is not remembered.

use super::barrier::Then;
use super::contend::Judged;
use super::lock::{LockError, LockOwner, Process, Wait, WaiterId};
use super::timers::Timer;
use super::{Asker, Authority, Effect, FileIdentity, LockMode, refusal};
use crate::journal::record::{LockedRecord, Record, UnlockedRecord};
use crate::types::{Access, LockItem, LockRange, OpenId, Status, Timestamp};
use crate::wire::control::{CancelLock, Lock, Refusal, Reply, Unlock};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How many executed changes of an open's locks are remembered.
const REMEMBERED: u64 = 32;
/// Repeats of one request that may wait for its answer at once.
const ASKERS_MAX: usize = 8;

/// Numbers of the latest changes of an open's locks that were executed.
#[derive(Debug, Default)]
pub(super) struct Executed(BTreeSet<u64>);

impl Executed {
    pub(super) fn new(numbers: &[u64]) -> Self {
        let mut executed = Self::default();
        numbers.iter().for_each(|number| executed.insert(*number));
        executed
    }

    pub(super) fn highest(&self) -> u64 {
        self.0.last().copied().unwrap_or(0)
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.0.contains(&number)
    }

    /// True if it cannot be known any more whether the number was executed.
    fn is_too_old(&self, number: u64) -> bool {
        number == 0 || number.saturating_add(REMEMBERED) <= self.highest()
    }

    pub(super) fn insert(&mut self, number: u64) {
        self.0.insert(number);
        let highest = self.highest();
        self.0.retain(|number| number.saturating_add(REMEMBERED) > highest);
    }

    pub(super) fn list(&self) -> Vec<u64> {
        self.0.iter().copied().collect()
    }
}

/// How far a change of locks has come.
#[derive(Debug)]
pub(super) enum Change {
    /// It waits for locks in the way.
    Waiting { waiter: WaiterId, until: Timestamp, owner: u64, locks: Vec<LockItem> },
    /// It is executed when the open's own I/O has ended.
    Unlocking { owner: u64, ranges: Vec<LockRange> },
    /// It is executed, and answered when all obey.
    Executed { journalled: u64 },
}

/// A change under way, and who asked for it.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) askers: Vec<Asker>,
    pub(super) change: Change,
}

/// All changes under way.
#[derive(Debug, Default)]
pub(super) struct Locking {
    pub(super) pending: BTreeMap<(OpenId, u64), Pending>,
    pub(super) waiters: BTreeMap<WaiterId, (OpenId, u64)>,
    last_waiter: u64,
}

impl Authority {
    pub(super) fn lock(
        &mut self,
        asker: Asker,
        request: Lock,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let Lock { open: id, sequence, owner, locks, wait_ms } = request;
        let open = self.own(asker, id)?;
        if locks.is_empty() {
            return Err(refusal(Status::Invalid, "nothing to lock"));
        }
        let reads_or_writes = !open.access().intersection(Access::READ | Access::WRITE).is_empty();
        if open.lock_mode == LockMode::Mandatory && !reads_or_writes {
            return Err(refusal(Status::AccessDenied, "to lock, the open must read or write"));
        }
        if self.is_repeated(asker, id, sequence, effects)? {
            return Ok(());
        }
        self.have_room()?;
        let Some((file, lock_owner)) = self.lock_owner(id, owner) else { return Ok(()) };
        let in_the_way = match self.locks.lock(file, &lock_owner, &locks) {
            Ok(changed) => {
                let change = Change::Executed { journalled: 0 };
                self.locking.pending.insert((id, sequence), Pending { askers: vec![asker], change });
                self.locked(id, sequence, owner, locks, &changed, effects);
                return Ok(());
            }
            Err(LockError::Conflict(opens)) => opens,
            Err(error) => return Err(lock_refusal(&error)),
        };
        let wait = wait_ms.map(|ms| Duration::from_millis(ms).min(self.limits.lock_wait_max));
        let judged = self.judge(in_the_way);
        let wait = match &judged {
            Judged::Evict(_) => Some(wait.unwrap_or_default().max(self.limits.fence_wait)),
            _ => wait.filter(|wait| !wait.is_zero()),
        };
        let Some(wait) = wait else {
            return Err(match judged {
                Judged::Held(deadline) => self.busy(deadline),
                _ => refusal(Status::LockNotGranted, ""),
            });
        };
        self.locking.last_waiter += 1;
        let waiter = WaiterId(self.locking.last_waiter);
        let waits = self.locks.wait(file, waiter, lock_owner, locks.clone());
        waits.map_err(|error| lock_refusal(&error)).map(|waits| {
            let until = self.now.saturating_add(wait);
            let change = Change::Waiting { waiter, until, owner, locks: locks.clone() };
            self.locking.pending.insert((id, sequence), Pending { askers: vec![asker], change });
            self.locking.waiters.insert(waiter, (id, sequence));
            self.timers.set(until, Timer::LockWait(id, sequence));
            match waits {
                Wait::Granted { changed } => self.wait_granted(id, sequence, &changed, effects),
                Wait::Queued { .. } => {
                    // It is in the queue first: what it evicts makes room for it.
                    self.changed.insert(file);
                }
            }
        })
    }

    /// The owner of an open's locks, and the file.
    fn lock_owner(&self, id: OpenId, number: u64) -> Option<(FileIdentity, LockOwner)> {
        let open = self.opens.get(id)?;
        let owner = match open.lock_mode {
            LockMode::Mandatory => LockOwner::Open { open: id, number },
            LockMode::Advisory => {
                let process = Process { principal: open.principal.clone(), process: open.process, number };
                LockOwner::Process { open: id, process }
            }
        };
        Some((open.identity, owner))
    }

    /// True if the request was made before, and is answered or will be.
    fn is_repeated(
        &mut self,
        asker: Asker,
        id: OpenId,
        sequence: u64,
        effects: &mut Vec<Effect>,
    ) -> Result<bool, Refusal> {
        if let Some(pending) = self.locking.pending.get_mut(&(id, sequence)) {
            if pending.askers.len() >= ASKERS_MAX {
                return Err(refusal(Status::TooMany, "the request has been repeated too often"));
            }
            pending.askers.push(asker);
            return Ok(true);
        }
        if sequence > u64::MAX - REMEMBERED {
            return Err(refusal(Status::Invalid, "the number of the change is too high"));
        }
        let Some(open) = self.opens.get(id) else { return Ok(false) };
        if open.executed.contains(sequence) {
            self.defer_all(asker.effect(Reply::Done), effects);
            return Ok(true);
        }
        if open.executed.is_too_old(sequence) {
            return Err(refusal(Status::Invalid, "the number of the change is too low"));
        }
        Ok(false)
    }

    /// Locks are taken: journalled, and answered when everybody obeys. The request is entered already.
    fn locked(
        &mut self,
        id: OpenId,
        sequence: u64,
        owner: u64,
        locks: Vec<LockItem>,
        changed: &[OpenId],
        effects: &mut Vec<Effect>,
    ) {
        let Some(open) = self.opens.get_mut(id) else { return };
        open.executed.insert(sequence);
        let (file, mandatory) = (open.identity, open.lock_mode == LockMode::Mandatory);
        let record = LockedRecord { open: id, sequence, owner, locks };
        let journalled = self.persist(Record::Locked(record), effects);
        self.persist_others(id, changed, effects);
        if let Some(pending) = self.locking.pending.get_mut(&(id, sequence)) {
            pending.change = Change::Executed { journalled };
        }
        let (mut waits, mut alterations) = (BTreeMap::new(), BTreeSet::new());
        if mandatory {
            self.ruled.insert(file);
            self.update_rules(file, effects);
            waits = self.unconfirmed(file, None);
            alterations = self.alterations(file, id, true);
        } else {
            // A POSIX owner's new lock may be weaker than the one it replaces.
            self.changed.insert(file);
        }
        self.wait_for(waits, alterations, Then::Locks(id, sequence), effects);
    }

    /// On an advisory volume locks of other opens of the same owner may have been replaced: the journal has them anew.
    fn persist_others(&mut self, id: OpenId, changed: &[OpenId], effects: &mut Vec<Effect>) {
        for other in changed.iter().filter(|other| **other != id) {
            self.persist_open(*other, effects);
        }
    }

    pub(super) fn unlock(
        &mut self,
        asker: Asker,
        request: Unlock,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let Unlock { open: id, sequence, owner, ranges } = request;
        let open = self.own(asker, id)?;
        let (file, mandatory) = (open.identity, open.lock_mode == LockMode::Mandatory);
        if ranges.is_empty() {
            return Err(refusal(Status::Invalid, "nothing to unlock"));
        }
        if self.is_repeated(asker, id, sequence, effects)? {
            return Ok(());
        }
        if ranges.len() > self.limits.locks.batch {
            return Err(lock_refusal(&LockError::Full));
        }
        let (mut waits, mut alterations) = (BTreeMap::new(), BTreeSet::new());
        if mandatory {
            let mut held = self.locks.locks_of(file, id);
            for range in &ranges {
                let found = held.iter().position(|(number, lock)| *number == owner && lock.range == *range);
                held.swap_remove(found.ok_or_else(|| lock_refusal(&LockError::NotLocked))?);
            }
            self.drain(id, effects);
            let open = self.opens.get(id).filter(|open| !open.bindings.is_empty());
            waits.extend(open.map(|open| (id, open.rules.version)));
            alterations = self.alterations(file, id, false);
        }
        let change = Change::Unlocking { owner, ranges };
        self.locking.pending.insert((id, sequence), Pending { askers: vec![asker], change });
        self.wait_for(waits, alterations, Then::Locks(id, sequence), effects);
        Ok(())
    }

    /// A barrier is empty.
    pub(super) fn go_on_locking(&mut self, id: OpenId, sequence: u64, effects: &mut Vec<Effect>) {
        match self.locking.pending.get(&(id, sequence)).map(|pending| &pending.change) {
            None | Some(Change::Waiting { .. }) => {}
            Some(Change::Executed { journalled }) => {
                let journalled = *journalled;
                let Some(pending) = self.locking.pending.remove(&(id, sequence)) else { return };
                for asker in pending.askers {
                    self.defer(journalled, asker.effect(Reply::Done), effects);
                }
            }
            Some(Change::Unlocking { owner, ranges }) => {
                let (owner, ranges) = (*owner, ranges.clone());
                self.execute_unlock(id, sequence, owner, ranges, effects);
            }
        }
    }

    fn execute_unlock(
        &mut self,
        id: OpenId,
        sequence: u64,
        owner: u64,
        ranges: Vec<LockRange>,
        effects: &mut Vec<Effect>,
    ) {
        let Some((file, lock_owner)) = self.lock_owner(id, owner) else { return };
        let changed = match self.locks.unlock(file, &lock_owner, &ranges) {
            Ok(changed) => changed,
            Err(error) => {
                let Some(pending) = self.locking.pending.remove(&(id, sequence)) else { return };
                for asker in pending.askers {
                    asker.refuse(lock_refusal(&error), effects);
                }
                return;
            }
        };
        let record = UnlockedRecord { open: id, sequence, owner, ranges };
        let journalled = self.persist(Record::Unlocked(record), effects);
        self.persist_others(id, &changed, effects);
        if let Some(open) = self.opens.get_mut(id) {
            open.executed.insert(sequence);
        }
        if let Some(pending) = self.locking.pending.get_mut(&(id, sequence)) {
            pending.change = Change::Executed { journalled };
        }
        self.update_rules(file, effects);
        let waits = self.unconfirmed(file, None);
        self.changed.insert(file);
        self.wait_for(waits, BTreeSet::new(), Then::Locks(id, sequence), effects);
    }

    pub(super) fn cancel_lock(
        &mut self,
        asker: Asker,
        cancel: CancelLock,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.own(asker, cancel.open)?;
        self.stop_waiting(cancel.open, cancel.sequence, Some(&refusal(Status::Cancelled, "")), effects);
        asker.answer(Reply::Done, effects);
        Ok(())
    }

    pub(super) fn lock_wait_over(&mut self, id: OpenId, sequence: u64, effects: &mut Vec<Effect>) {
        self.stop_waiting(id, sequence, Some(&refusal(Status::LockNotGranted, "")), effects);
    }

    /// A request that waits for locks does not wait any longer.
    fn stop_waiting(
        &mut self,
        id: OpenId,
        sequence: u64,
        refused: Option<&Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let key = (id, sequence);
        let waits = self.locking.pending.get(&key).map(|pending| &pending.change);
        let Some(Change::Waiting { waiter, until, .. }) = waits else { return };
        let (waiter, until) = (*waiter, *until);
        self.timers.clear(until, Timer::LockWait(id, sequence));
        self.locking.waiters.remove(&waiter);
        if let Some(file) = self.locks.cancel(waiter) {
            self.changed.insert(file);
        }
        let Some(pending) = self.locking.pending.remove(&key) else { return };
        if let Some(refused) = refused {
            for asker in pending.askers {
                asker.refuse(refused.clone(), effects);
            }
        }
    }

    fn lock_requests_of(&self, id: OpenId) -> Vec<u64> {
        self.locking.pending.range((id, 0)..=(id, u64::MAX)).map(|((_, sequence), _)| *sequence).collect()
    }

    /// An open loses its session: there is nobody to be answered, and nothing more is taken or given up for it.
    pub(super) fn drop_lock_requests(&mut self, id: OpenId) {
        for sequence in self.lock_requests_of(id) {
            self.stop_waiting(id, sequence, None, &mut Vec::new());
            self.locking.pending.remove(&(id, sequence));
        }
    }

    /// An open ends: what is under way is refused. That holds for locks that are taken too, as not everybody obeys them yet;
    /// they end with the open.
    pub(super) fn end_lock_requests(&mut self, id: OpenId, reason: Status, effects: &mut Vec<Effect>) {
        let refused = refusal(reason, "");
        for sequence in self.lock_requests_of(id) {
            self.stop_waiting(id, sequence, Some(&refused), effects);
            let Some(pending) = self.locking.pending.remove(&(id, sequence)) else { continue };
            for asker in pending.askers {
                asker.refuse(refused.clone(), effects);
            }
        }
    }

    fn wait_granted(&mut self, id: OpenId, sequence: u64, changed: &[OpenId], effects: &mut Vec<Effect>) {
        let Some(pending) = self.locking.pending.get_mut(&(id, sequence)) else { return };
        let executed = Change::Executed { journalled: 0 };
        let Change::Waiting { waiter, until, owner, locks } =
            std::mem::replace(&mut pending.change, executed)
        else {
            return;
        };
        self.locking.waiters.remove(&waiter);
        self.timers.clear(until, Timer::LockWait(id, sequence));
        self.locked(id, sequence, owner, locks, changed, effects);
    }

    /// Something about a file's locks has changed: whose turn is it, and who is in the way of the others?
    pub(super) fn poke_lock_waiters(&mut self, file: FileIdentity, effects: &mut Vec<Effect>) {
        if self.locks.waiters(file).next().is_none() {
            return;
        }
        if !self.journal.full {
            for granted in self.locks.grant_waiters(file) {
                if let Some((id, sequence)) = self.locking.waiters.get(&granted.waiter).copied() {
                    self.wait_granted(id, sequence, &granted.changed, effects);
                }
            }
        }
        let left: Vec<WaiterId> = self.locks.waiters(file).map(|(waiter, _)| waiter).collect();
        for waiter in left {
            if let Judged::Evict(opens) = self.judge(self.locks.in_the_way(waiter)) {
                self.evict(opens, effects);
            }
        }
    }
}

fn lock_refusal(error: &LockError) -> Refusal {
    let status = match error {
        LockError::BadRange => Status::BadRange,
        LockError::Contradicts | LockError::Conflict(_) => Status::LockNotGranted,
        LockError::NotLocked => Status::NotLocked,
        LockError::Full => Status::TooMany,
        LockError::WaiterExists => Status::Internal,
    };
    refusal(status, &error.to_string())
}
