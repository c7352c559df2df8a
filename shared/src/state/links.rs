//! Dataplane comes, goes, and comes again.
//!
//! When it registers it tells of every binding that lives, so afterwards both sides know the same:
//!
//! | binding | known here | not known here |
//! |---|---|---|
//! | told of | stays; its fence and rules are asked for again | its open is known and of this epoch: adopted; else fenced |
//! | not told of | is gone | |
//!
//! While a binding lives whose open nobody knows (a *stray*), nothing is granted that it could conflict with.

use super::table::Binding;
use super::{Authority, Effect, LockMode};
use crate::types::{Access, Status};
use crate::wire::link::{Fence, Held, LinkBinding, Wrote};
use std::collections::{BTreeMap, BTreeSet};

/// The last write of a binding that goes on writing.
const NOW_AND_LATER_NS: u64 = i64::MAX as u64;

impl Authority {
    pub(super) fn link_up(&mut self, service_blob: Vec<u8>, held: Vec<Held>, effects: &mut Vec<Effect>) {
        self.service_blob = Some(service_blob);
        self.unknown_bindings = false;
        let mut last_writes = std::mem::take(&mut self.wrote);
        let held: BTreeMap<LinkBinding, Held> = held.into_iter().map(|held| (held.binding, held)).collect();
        self.strays.clear();
        for held in held.values() {
            if let Some(open) = self.opens.get(held.open) {
                // One that can write may be writing at this moment: how the file looks was read after it had told its time.
                let writes = held.access.contains(Access::WRITE);
                let told = if writes { NOW_AND_LATER_NS } else { held.last_write_ns };
                let last = last_writes.entry(open.identity).or_default();
                *last = told.max(*last);
            }
            self.meet(held, effects);
        }
        let gone = self.opens.bound().into_iter().filter(|binding| !held.contains_key(binding));
        for binding in gone.collect::<Vec<_>>() {
            self.released(binding, effects);
        }
        self.tell_rules_again(held.values(), effects);
        self.settle(&last_writes, 0, effects);
    }

    /// Only at the start is it of interest who wrote what is found changed.
    pub(super) fn wrote(&mut self, wrote: &[Wrote]) {
        for wrote in wrote.iter().filter(|_| self.settling) {
            if let Some(open) = self.opens.get(wrote.open) {
                let last = self.wrote.entry(open.identity).or_default();
                *last = wrote.last_write_ns.max(*last);
            }
        }
    }

    /// One binding that lives.
    fn meet(&mut self, held: &Held, effects: &mut Vec<Effect>) {
        let due = self.now.saturating_add(self.limits.fence_wait);
        let Some(open) = self.opens.get_mut(held.open) else {
            self.strays.insert(held.binding);
            let fence = Fence { binding: held.binding, epoch: held.epoch, reason: Status::Closed };
            effects.push(Effect::Fence(fence));
            return;
        };
        if let Some(known) = open.bindings.get(&held.binding) {
            if known.fencing {
                let (epoch, reason) = (known.epoch, Status::Fenced);
                effects.push(Effect::Fence(Fence { binding: held.binding, epoch, reason }));
            }
            return;
        }
        // It was granted by an earlier control, which had the journal write its open's epoch before.
        let current = held.epoch == open.epoch || open.kept.contains(&held.handle);
        let fencing = !current || open.is_closing();
        let binding =
            Binding { handle: held.handle, epoch: held.epoch, transcript: held.transcript, fencing };
        self.opens.adopt(held.open, held.binding, binding);
        if fencing {
            self.fences.ask(held.binding, due);
            let fence = Fence { binding: held.binding, epoch: held.epoch, reason: Status::Fenced };
            effects.push(Effect::Fence(fence));
        }
    }

    /// What was asked of the earlier link may be lost: rules that are not confirmed, or not in force, are told again.
    fn tell_rules_again<'h>(&mut self, held: impl Iterator<Item = &'h Held>, effects: &mut Vec<Effect>) {
        let mut told = BTreeSet::new();
        for held in held {
            let Some(open) = self.opens.get_mut(held.open) else { continue };
            if open.lock_mode != LockMode::Mandatory {
                continue;
            }
            let file = open.identity;
            let rules = self.locks.io_rules(file, held.open, |holder| self.lock_counts(holder));
            let Some(open) = self.opens.get(held.open) else { continue };
            let differ = open.rules.rules != rules;
            if !rules.is_empty() {
                self.ruled.insert(file);
            }
            if differ {
                self.set_rules(held.open, rules);
            }
            let Some(open) = self.opens.get_mut(held.open) else { continue };
            let unlike = held.rules_version != open.rules.version;
            if (unlike || open.rules.confirmed < open.rules.version) && told.insert(held.open) {
                if open.rules.version == 0 {
                    // An earlier control's rules are in force, and there are none now.
                    self.last_version += 1;
                    open.rules.version = self.last_version;
                    self.ruled.insert(file);
                }
                self.send_rules(held.open, effects);
            }
        }
    }

    /// Dataplane is proven dead.
    pub(super) fn link_lost(&mut self, effects: &mut Vec<Effect>) {
        self.lose_link(effects);
        // Nobody else can tell when the server wrote last.
        self.settle(&BTreeMap::new(), self.last_write, effects);
    }
}
