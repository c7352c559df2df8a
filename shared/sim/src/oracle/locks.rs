//! Locks: no two that conflict are told, and no I/O lands that one forbids.

use super::{Oracle, Sight, ToldLock, releasing};
use crate::files::{BLOCK, Node};
use holdfast_shared::types::{Access, ByteRange, LockKind, OpenId};
use holdfast_shared::wire::control::{Lock, Unlock};

impl Oracle {
    pub(super) fn locked(&mut self, sight: &Sight<'_>, lock: &Lock) {
        let Some(fact) = self.facts.get_mut(&lock.open) else {
            return self.fail(|| format!("a lock of {} is told, which is not there", lock.open));
        };
        if fact.forced || fact.tombstone.is_some() {
            // It was locked, and everybody obeyed; while that was being written the open was ended. The order of the two is
            // judged by their records.
            return;
        }
        if fact.ended.is_some() || fact.given_away {
            let fact = fact.clone();
            return self.fail(|| format!("a lock of {} is told after it ended: {fact:?}", lock.open));
        }
        if !fact.executed.insert(lock.sequence) {
            return;
        }
        let told =
            lock.locks.iter().map(|item| ToldLock { owner: lock.owner, item: *item, releasing: false });
        fact.locks.extend(told);
        let node = fact.node;
        let in_the_way: Vec<OpenId> = self
            .facts
            .iter()
            .filter(|(other, there)| **other != lock.open && there.node == node)
            .filter(|(_, there)| {
                let mut held = there.locks.iter().filter(|held| !held.releasing);
                held.any(|held| lock.locks.iter().any(|item| item.conflicts(held.item)))
            })
            .map(|(other, _)| *other)
            .collect();
        for other in in_the_way {
            self.give_away(sight, other, lock.open, "a lock that conflicts with one of its own is told");
        }
        self.quiet_under(sight, lock);
    }

    /// When a lock is told, nothing that it forbids is in flight.
    fn quiet_under(&mut self, sight: &Sight<'_>, lock: &Lock) {
        let Some(plane) = sight.plane else { return };
        let node = self.facts.get(&lock.open).and_then(|fact| fact.node);
        let forbidden = plane.in_flight.values().find(|flight| {
            let (block, access) = match flight.io {
                crate::plane::Io::Write { block, .. } => (block, Access::WRITE),
                crate::plane::Io::Read { block } => (block, Access::READ),
                crate::plane::Io::Flush => return false,
            };
            Some(flight.node) == node
                && lock.locks.iter().any(|item| {
                    let denied = match item.kind {
                        LockKind::Shared => access == Access::WRITE,
                        LockKind::Exclusive => flight.open != lock.open,
                    };
                    denied && touches(item.range.bytes(), block)
                })
        });
        if let Some(flight) = forbidden {
            let words = format!("a lock of {} is told while {flight:?} is in flight under it", lock.open);
            self.fail(|| words);
        }
    }

    pub(super) fn unlocked(&mut self, unlock: &Unlock) {
        let Some(fact) = self.facts.get_mut(&unlock.open) else { return };
        if !fact.executed.insert(unlock.sequence) {
            return;
        }
        releasing(&mut fact.locks, unlock.owner, &unlock.ranges, true);
        let mut left = unlock.ranges.clone();
        fact.locks.retain(|lock| {
            let named = lock.releasing && lock.owner == unlock.owner;
            match left.iter().position(|range| named && *range == lock.item.range) {
                Some(at) => {
                    left.swap_remove(at);
                    false
                }
                None => true,
            }
        });
    }

    /// I/O that lands is not forbidden by a lock that was told.
    pub(super) fn obeys_locks(
        &mut self,
        sight: &Sight<'_>,
        open: OpenId,
        node: Node,
        block: u64,
        access: Access,
    ) {
        let denied = self.facts.iter().find(|(other, fact)| {
            fact.node == Some(node)
                && fact.protected(sight.now)
                && fact.locks.iter().any(|lock| {
                    let forbids = match lock.item.kind {
                        LockKind::Shared => access == Access::WRITE,
                        LockKind::Exclusive => **other != open,
                    };
                    forbids && !lock.releasing && touches(lock.item.range.bytes(), block)
                })
        });
        if let Some((other, fact)) = denied {
            let words =
                format!("{access:?} of {open} on block {block} lands under a lock of {other}: {fact:?}");
            self.fail(|| words);
        }
    }
}

fn touches(range: Option<ByteRange>, block: u64) -> bool {
    let there = ByteRange::new(block * BLOCK, BLOCK);
    matches!((range, there), (Some(range), Ok(there)) if range.overlaps(there))
}
