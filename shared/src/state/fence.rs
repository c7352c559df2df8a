//! The end of bindings, and of opens with them.
//!
//! An open that ends is first *closing*: every binding is fenced, and only when dataplane has confirmed each (or is
//! proven dead, or has registered anew, which it does only when everything it held is drained) is the descriptor closed, the claim on the file given up, and the close
//! answered. So nothing lands after the answer, and no conflicting open is granted before.

use super::table::Life;
use super::{Asker, Authority, Effect, Subject, Work};
use crate::types::{OpenId, Status, Timestamp};
use crate::wire::control::Reply;
use crate::wire::link::{Fence, LinkBinding};
use std::collections::{BTreeMap, BTreeSet};

/// Fences asked for and not confirmed.
#[derive(Debug, Default)]
pub(super) struct Fences {
    asked: BTreeMap<LinkBinding, Timestamp>,
    /// Those of which the operator has not been told, the oldest first.
    untold: BTreeSet<(Timestamp, LinkBinding)>,
}

impl Fences {
    pub(super) fn len(&self) -> usize {
        self.asked.len()
    }

    pub(super) fn contains(&self, binding: LinkBinding) -> bool {
        self.asked.contains_key(&binding)
    }

    fn ask(&mut self, binding: LinkBinding, due: Timestamp) {
        self.asked.insert(binding, due);
        self.untold.insert((due, binding));
    }

    fn confirm(&mut self, binding: LinkBinding) {
        if let Some(due) = self.asked.remove(&binding) {
            self.untold.remove(&(due, binding));
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        self.untold.first().map(|(due, _)| *due)
    }

    pub(super) fn overdue(&mut self, now: Timestamp, mut tell: impl FnMut(LinkBinding)) {
        while let Some((due, binding)) = self.untold.first().copied().filter(|(due, _)| *due <= now) {
            self.untold.remove(&(due, binding));
            tell(binding);
        }
    }
}

impl Authority {
    /// Begins to close an open, or joins those who wait for it to be closed.
    pub(super) fn close(
        &mut self,
        now: Timestamp,
        id: OpenId,
        waiter: Option<Asker>,
        reason: Status,
        effects: &mut Vec<Effect>,
    ) {
        let Some(open) = self.opens.get_mut(id) else { return };
        if let Life::Closing { waiters } = &mut open.life {
            waiters.extend(waiter);
            return;
        }
        open.life = Life::Closing { waiters: waiter.into_iter().collect() };
        self.fence(now, id, reason, effects);
        self.finish_close(id, effects);
    }

    /// Begins a new epoch of an open: whatever is bound to it is fenced.
    pub(super) fn fence(&mut self, now: Timestamp, id: OpenId, reason: Status, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        open.epoch += 1;
        let due = now.saturating_add(self.limits.fence_wait);
        for (number, binding) in open.bindings.iter_mut().filter(|(_, binding)| !binding.fencing) {
            binding.fencing = true;
            self.fences.ask(*number, due);
            effects.push(Effect::Fence(Fence { binding: *number, epoch: binding.epoch, reason }));
        }
    }

    /// Repeated open requests that waited for an earlier session's bindings go on when those are fenced.
    pub(super) fn go_on_replaying(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        if open.bindings.values().any(|binding| binding.fencing) {
            return;
        }
        for operation in std::mem::take(&mut open.replays) {
            effects.push(Effect::Perform { operation, work: Work::Attributes(Subject::File(open.file)) });
        }
    }

    /// Ends an open that is closing and has nothing left to wait for.
    pub(super) fn finish_close(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        match self.opens.get(id) {
            Some(open)
                if matches!(open.life, Life::Closing { .. })
                    && open.bindings.is_empty()
                    && open.works == 0 => {}
            _ => return,
        }
        let Some(open) = self.opens.remove(id) else { return };
        self.shares.leave(open.identity, open.access, open.share);
        self.create_ids.0.remove(&(open.principal.clone(), open.create_id));
        self.sessions.count(&open.principal, |share| share.opens -= 1);
        if let Some(session) = self.sessions.get_mut(open.session) {
            session.opens.remove(&id);
        }
        effects.push(Effect::CloseFile(open.file));
        if let Life::Closing { waiters } = open.life {
            for waiter in waiters {
                waiter.answer(Reply::Done, effects);
            }
        }
    }

    /// Dataplane confirms a fence. One that was not asked for, or of another epoch, changes nothing.
    pub(super) fn fenced(&mut self, fence: Fence, effects: &mut Vec<Effect>) {
        let asked = self
            .opens
            .open_of(fence.binding)
            .and_then(|id| self.opens.get(id)?.bindings.get(&fence.binding))
            .is_some_and(|binding| binding.fencing && binding.epoch == fence.epoch);
        if asked {
            self.released(fence.binding, effects);
        }
    }

    /// A binding is over, and its descriptor in dataplane closed.
    pub(super) fn released(&mut self, binding: LinkBinding, effects: &mut Vec<Effect>) {
        self.fences.confirm(binding);
        if let Some((open, _)) = self.opens.unbind(binding) {
            self.go_on_replaying(open, effects);
            self.finish_close(open, effects);
        }
    }

    /// Dataplane is dead, or has drained everything it held: no binding is left.
    pub(super) fn lose_link(&mut self, effects: &mut Vec<Effect>) {
        self.service_blob = None;
        self.unknown_bindings = false;
        self.fences = Fences::default();
        for open in self.opens.unbind_all() {
            self.go_on_replaying(open, effects);
            self.finish_close(open, effects);
        }
    }
}
