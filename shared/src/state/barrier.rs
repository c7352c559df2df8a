//! Waiting for dataplane to obey, and for changes under way to end.
//!
//! What locks forbid the I/O of an open's bindings are its *rules*. Dataplane checks them; it confirms new ones when they
//! are in force and all I/O that began before has ended. Whoever relies on that waits behind a *barrier*:
//!
//! ```text
//!   lock taken ─► rules of other opens ─► Restrict ─► Restricted ─┐
//!   unlock     ─► own rules again      ─► Restrict ─► Restricted ─┼─► barrier is empty: granted, executed, resumed
//!   size change under way ───────────────────────────► Performed ─┘
//! ```
//!
//! An open whose last binding is gone has nothing left to obey.

use super::operation::{OperationId, Stage};
use super::{Authority, Effect, FileIdentity, LockMode};
use crate::types::{IoRule, OpenId};
use crate::wire::link::{Restrict, Restricted};
use std::collections::{BTreeMap, BTreeSet};

/// What the bindings of an open may not touch.
#[derive(Debug, Default)]
pub(super) struct Rules {
    pub(super) rules: Vec<IoRule>,
    /// Rises with every change; 0 if there never was a rule.
    pub(super) version: u64,
    /// The highest that dataplane has confirmed.
    pub(super) confirmed: u64,
    /// The record that the latest rules which forbid less than those before rely on: after a crash that it does not survive,
    /// the lock is back, and dataplane must never have let go of it.
    pub(super) loosened: u64,
}

/// True if the old rules forbid something that the new ones allow. Both are ordered and disjoint.
fn loosens(old: &[IoRule], new: &[IoRule]) -> bool {
    old.iter().any(|old| {
        // How far the new rules forbid all that the old one does.
        let mut covered = old.range.offset();
        let first = new.partition_point(|rule| rule.range.end() <= covered);
        for rule in new.iter().skip(first).take_while(|rule| rule.range.offset() < old.range.end()) {
            if rule.range.offset() > covered || !rule.deny.contains(old.deny) {
                return true;
            }
            covered = rule.range.end();
        }
        covered < old.range.end()
    })
}

/// What goes on when a barrier is empty.
#[derive(Clone, Copy, Debug)]
pub(super) enum Then {
    /// A change of locks, by open and number.
    Locks(OpenId, u64),
    /// A resume, by open and number: not another one of the same open.
    Resume(OpenId, u64),
}

#[derive(Debug)]
struct Barrier {
    restricts: BTreeMap<OpenId, u64>,
    operations: BTreeSet<OperationId>,
    then: Then,
}

#[derive(Debug, Default)]
pub(super) struct Barriers {
    by_id: BTreeMap<u64, Barrier>,
    by_open: BTreeSet<(OpenId, u64)>,
    by_operation: BTreeSet<(OperationId, u64)>,
    last: u64,
}

impl Barriers {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn is_consistent(&self) -> bool {
        let restricts: usize = self.by_id.values().map(|barrier| barrier.restricts.len()).sum();
        let operations: usize = self.by_id.values().map(|barrier| barrier.operations.len()).sum();
        restricts == self.by_open.len()
            && operations == self.by_operation.len()
            && self.by_id.values().all(|b| !b.restricts.is_empty() || !b.operations.is_empty())
    }

    /// Those that wait for nothing any more.
    fn take_empty(&mut self, ids: Vec<u64>) -> Vec<Then> {
        let mut free = Vec::new();
        for id in ids {
            let empty = self
                .by_id
                .get(&id)
                .is_some_and(|barrier| barrier.restricts.is_empty() && barrier.operations.is_empty());
            if empty && let Some(barrier) = self.by_id.remove(&id) {
                free.push(barrier.then);
            }
        }
        free
    }

    /// Dataplane has confirmed an open's rules up to this version.
    fn confirmed(&mut self, open: OpenId, version: u64) -> Vec<Then> {
        let waiting: Vec<u64> = self.by_open.range((open, 0)..=(open, u64::MAX)).map(|(_, id)| *id).collect();
        for id in &waiting {
            if let Some(barrier) = self.by_id.get_mut(id)
                && barrier.restricts.get(&open).is_some_and(|wanted| *wanted <= version)
            {
                barrier.restricts.remove(&open);
                self.by_open.remove(&(open, *id));
            }
        }
        self.take_empty(waiting)
    }

    fn ended(&mut self, operation: OperationId) -> Vec<Then> {
        let all = (operation, 0)..=(operation, u64::MAX);
        let waiting: Vec<u64> = self.by_operation.range(all).map(|(_, id)| *id).collect();
        for id in &waiting {
            if let Some(barrier) = self.by_id.get_mut(id) {
                barrier.operations.remove(&operation);
            }
            self.by_operation.remove(&(operation, *id));
        }
        self.take_empty(waiting)
    }
}

impl Authority {
    /// Goes on with `then` when all these are confirmed and have ended: at once if there are none.
    pub(super) fn wait_for(
        &mut self,
        restricts: BTreeMap<OpenId, u64>,
        operations: BTreeSet<OperationId>,
        then: Then,
        effects: &mut Vec<Effect>,
    ) {
        if restricts.is_empty() && operations.is_empty() {
            return self.pass(then, effects);
        }
        self.barriers.last += 1;
        let id = self.barriers.last;
        self.barriers.by_open.extend(restricts.keys().map(|open| (*open, id)));
        self.barriers.by_operation.extend(operations.iter().map(|operation| (*operation, id)));
        self.barriers.by_id.insert(id, Barrier { restricts, operations, then });
    }

    fn pass(&mut self, then: Then, effects: &mut Vec<Effect>) {
        match then {
            Then::Locks(open, sequence) => self.go_on_locking(open, sequence, effects),
            Then::Resume(open, number) => self.look_for_resume(open, number, effects),
        }
    }

    fn pass_all(&mut self, free: Vec<Then>, effects: &mut Vec<Effect>) {
        for then in free {
            self.pass(then, effects);
        }
    }

    pub(super) fn restricted(&mut self, restricted: Restricted, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(restricted.open) else { return };
        if restricted.version > open.rules.version {
            return; // Nobody asked for that.
        }
        open.rules.confirmed = open.rules.confirmed.max(restricted.version);
        let free = self.barriers.confirmed(restricted.open, restricted.version);
        self.pass_all(free, effects);
    }

    /// A binding of an open is gone, or the open itself: if it was the last, nothing is left to obey.
    pub(super) fn open_unbound(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        if let Some(open) = self.opens.get_mut(id) {
            if !open.bindings.is_empty() {
                return;
            }
            open.rules.confirmed = open.rules.version;
        }
        let free = self.barriers.confirmed(id, u64::MAX);
        self.pass_all(free, effects);
    }

    pub(super) fn operation_over(&mut self, id: OperationId, effects: &mut Vec<Effect>) {
        let free = self.barriers.ended(id);
        self.pass_all(free, effects);
    }

    /// A number for rules that no earlier rules have had, those of an earlier control included.
    fn next_version(&mut self) -> u64 {
        self.last_version += 1;
        self.last_version
    }

    /// Makes the rules of every open of a file what its locks say, and tells dataplane where they are others than before.
    pub(super) fn update_rules(&mut self, file: FileIdentity, effects: &mut Vec<Effect>) {
        if !self.ruled.contains(&file) {
            return;
        }
        let mut any = false;
        let opens: Vec<OpenId> = self.opens.on(file).map(|(id, _)| id).collect();
        for id in opens {
            let rules = self.locks.io_rules(file, id, |holder| self.lock_counts(holder));
            any |= !rules.is_empty() || !self.locks.locks_of(file, id).is_empty();
            any |= self.opens.get(id).is_some_and(|open| open.rules.confirmed < open.rules.version);
            let differ = self
                .opens
                .get(id)
                .is_some_and(|open| open.lock_mode == LockMode::Mandatory && open.rules.rules != rules);
            if differ {
                any = true;
                self.set_rules(id, rules);
                self.send_rules(id, effects);
            }
        }
        if !any {
            self.ruled.remove(&file);
        }
    }

    /// Gives an open other rules, of the next version.
    pub(super) fn set_rules(&mut self, id: OpenId, rules: Vec<IoRule>) {
        let version = self.next_version();
        let last = self.journal.last;
        let Some(open) = self.opens.get_mut(id) else { return };
        if loosens(&open.rules.rules, &rules) {
            open.rules.loosened = last;
        }
        (open.rules.rules, open.rules.version) = (rules, version);
    }

    /// Tells dataplane an open's rules, if it has bindings: when all that they no longer forbid is surely over.
    pub(super) fn send_rules(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        let Rules { version, loosened, .. } = open.rules;
        if open.bindings.is_empty() {
            open.rules.confirmed = version;
        } else {
            let restrict = Restrict { open: id, version, rules: open.rules.rules.clone() };
            self.hold(loosened, Effect::Restrict(restrict), effects);
        }
    }

    /// Sends an open its rules anew, so that it is known when all I/O begun before has ended.
    pub(super) fn drain(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let version = self.next_version();
        if let Some(open) = self.opens.get_mut(id) {
            open.rules.version = version;
        }
        self.send_rules(id, effects);
    }

    /// The opens of a file, but one, whose rules dataplane has not confirmed yet.
    pub(super) fn unconfirmed(&self, file: FileIdentity, but: Option<OpenId>) -> BTreeMap<OpenId, u64> {
        if !self.ruled.contains(&file) {
            return BTreeMap::new();
        }
        let open = self.opens.on(file).filter(|(id, open)| {
            Some(*id) != but && open.rules.confirmed < open.rules.version && !open.bindings.is_empty()
        });
        open.map(|(id, open)| (id, open.rules.version)).collect()
    }

    /// Changes of a file through control that are under way: those of one open, or those of everybody but it.
    pub(super) fn alterations(&self, file: FileIdentity, of: OpenId, others: bool) -> BTreeSet<OperationId> {
        let concerned = |stage: &Stage| match stage {
            Stage::Altering(open) | Stage::Truncating(open, ..) => {
                self.opens.get(*open).is_some_and(|there| there.identity == file) && (*open == of) != others
            }
            stage => others && stage.claims().iter().any(|(claimed, ..)| *claimed == file),
        };
        let under_way = self.operations.iter().filter(|(_, operation)| concerned(&operation.stage));
        under_way.map(|(id, _)| id).collect()
    }
}
