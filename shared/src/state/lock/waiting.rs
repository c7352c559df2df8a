//! Who waits for locks, and whose turn it is.
//!
//! A waiter's batch is taken when nothing held and no earlier waiter's batch stands in its way. So a waiter is never
//! passed by a later one that would make it wait longer, and one that is in nobody's way does not wait behind others.
//!
//! ```text
//!   held      [XXXX)
//!   first       [XXXX)           waits for what is held
//!   second         [XXXX)        waits for the first
//!   third                [XX)    is granted
//! ```
//!
//! A request that does not wait ([`LockTable::lock`](super::LockTable::lock)) is measured against what is held
//! only, as with SMB and fcntl: it may pass those who wait.

use super::file::{FileLocks, check_batch};
use super::index::Locks;
use super::{Granted, LockError, LockLimits, LockOwner, Wait, WaiterId};
use crate::types::{LockItem, OpenId};

#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) id: WaiterId,
    pub(super) owner: LockOwner,
    pub(super) items: Vec<LockItem>,
}

impl Waiter {
    fn enter(&self, wanted: &mut Locks) {
        for item in &self.items {
            wanted.add(&self.owner, *item);
        }
    }
}

fn passes(wanted: &Locks, owner: &LockOwner, items: &[LockItem]) -> bool {
    items.iter().all(|item| wanted.against(owner, *item).next().is_none())
}

impl FileLocks {
    pub(super) fn wait(
        &mut self,
        limits: &LockLimits,
        id: WaiterId,
        owner: LockOwner,
        items: Vec<LockItem>,
    ) -> Result<Wait, LockError> {
        check_batch(limits, &owner, &items)?;
        let mut earlier = Locks::default();
        self.queue.iter().for_each(|waiter| waiter.enter(&mut earlier));
        let holders = if passes(&earlier, &owner, &items) {
            match self.lock(limits, &owner, &items) {
                Ok(changed) => return Ok(Wait::Granted { changed }),
                Err(LockError::Conflict(holders)) => holders,
                Err(error) => return Err(error),
            }
        } else {
            self.in_the_way(&owner, &items)
        };
        let wanted: usize = self.queue.iter().map(|waiter| waiter.items.len()).sum();
        let too_many = items.len() > limits.per_open || wanted + items.len() > limits.per_file;
        if too_many || self.queue.len() >= limits.waiters_per_file {
            return Err(LockError::Full);
        }
        self.queue.push(Waiter { id, owner, items });
        Ok(Wait::Queued { holders })
    }

    pub(super) fn grant(&mut self, limits: &LockLimits) -> Vec<Granted> {
        let mut earlier = Locks::default();
        let mut granted = Vec::new();
        for waiter in std::mem::take(&mut self.queue) {
            let taken = passes(&earlier, &waiter.owner, &waiter.items)
                .then(|| self.lock(limits, &waiter.owner, &waiter.items));
            // One that finds a limit reached keeps its turn too: room may come as a lock may.
            if let Some(Ok(changed)) = taken {
                granted.push(Granted { waiter: waiter.id, open: waiter.owner.open(), changed });
            } else {
                waiter.enter(&mut earlier);
                self.queue.push(waiter);
            }
        }
        granted
    }

    pub(super) fn drop_waiters(&mut self, gone: impl Fn(WaiterId, OpenId) -> bool) -> Vec<WaiterId> {
        let mut dropped = Vec::new();
        self.queue.retain(|waiter| {
            let goes = gone(waiter.id, waiter.owner.open());
            if goes {
                dropped.push(waiter.id);
            }
            !goes
        });
        dropped
    }
}
