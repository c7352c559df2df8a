//! The end of bindings, and of opens with them.
//!
//! An open that ends is first *closing*: every binding is fenced, and only when dataplane has confirmed each (or is
//! proven dead, or does not tell of it when it registers anew) is the descriptor closed, the claim on the file given up,
//! and the close answered. So nothing lands after the answer, and no conflicting open is granted before.
//!
//! ```text
//!  close, logoff, eviction, force close ─► Closing ─► fences confirmed, work done
//!     ─► last look (tombstone without evidence) ─► name removed (delete on close) ─► record ─► CloseFile, answers
//! ```

use super::operation::Stage;
use super::table::{Ending, Life, Step};
use super::{Asker, Authority, Effect, FileIdentity, Inspected, Located, Work};
use crate::journal::record::{Record, TombstoneRecord};
use crate::types::{OpenId, Status, Timestamp};
use crate::wire::control::{Refusal, Reply};
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

    pub(super) fn ask(&mut self, binding: LinkBinding, due: Timestamp) {
        self.confirm(binding);
        self.asked.insert(binding, due);
        self.untold.insert((due, binding));
    }

    pub(super) fn confirm(&mut self, binding: LinkBinding) {
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
    /// Begins to end an open, or joins those who wait for its end.
    pub(super) fn end(
        &mut self,
        id: OpenId,
        waiter: Option<Asker>,
        ending: Ending,
        reason: Status,
        effects: &mut Vec<Effect>,
    ) {
        let Some(open) = self.opens.get_mut(id) else { return };
        if let Life::Closing { waiters, .. } = &mut open.life {
            waiters.extend(waiter);
            return;
        }
        let expired = open.is_expired(self.now);
        let life = Life::Closing { waiters: waiter.into_iter().collect(), ending, expired };
        self.leave_detached(id, reason, life, effects);
        self.mark_leaving(id);
        self.end_lock_requests(id, reason, effects);
        self.fence(id, reason, |_| true, effects);
        self.finish_close(id, effects);
    }

    /// An open is taken from its owner while somebody else may write: what its last look will see can't be told apart. Those
    /// who come later mark it when they are let in.
    fn mark_leaving(&mut self, id: OpenId) {
        let Some(open) = self.opens.get(id) else { return };
        if !open.is_being_taken() || open.baseline || open.marked {
            return;
        }
        let file = open.identity;
        let beside = self.opens.on(file).any(|(other, open)| other != id && open.may_write());
        if (beside || self.is_being_changed(file))
            && let Some(open) = self.opens.get_mut(id)
        {
            open.marked = true;
        }
    }

    /// Fences those bindings of an open that `which` says, unless that was asked for already.
    pub(super) fn fence(
        &mut self,
        id: OpenId,
        reason: Status,
        which: impl Fn(&super::table::Binding) -> bool,
        effects: &mut Vec<Effect>,
    ) {
        let Some(open) = self.opens.get_mut(id) else { return };
        let due = self.now.saturating_add(self.limits.fence_wait);
        for (number, binding) in open.bindings.iter_mut() {
            if !binding.fencing && which(binding) {
                binding.fencing = true;
                self.fences.ask(*number, due);
                effects.push(Effect::Fence(Fence { binding: *number, epoch: binding.epoch, reason }));
            }
        }
    }

    /// A binding or some work of an open has ended: whatever waited for that goes on.
    pub(super) fn go_on(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        self.take_baseline(id, effects);
        self.go_on_resuming(id, effects);
        self.finish_close(id, effects);
    }

    /// Ends an open that is closing and has nothing left to wait for.
    pub(super) fn finish_close(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        let Life::Closing { ending, .. } = open.life else { return };
        if !open.bindings.is_empty() || open.works > 0 {
            return;
        }
        let file = open.file;
        if matches!(ending, Ending::Gone(_)) && !open.marked && !open.baseline && open.last_look == Step::No {
            open.last_look = Step::UnderWay;
            let operation = self.start_own(id, Stage::LastLook(id));
            effects.push(Effect::Inspect { operation, file });
            return;
        }
        if self.remove_name(id, effects) {
            return;
        }
        let Some(mut open) = self.opens.remove(id) else { return };
        self.keep_removal(open.identity, effects);
        self.shares.leave(open.identity, open.access(), open.share());
        self.locks.release(open.identity, id);
        self.create_ids.0.remove(&(open.principal.clone(), open.request.create_id));
        self.sessions.count(&open.principal, |share| share.opens -= 1);
        match ending {
            Ending::Closed => {
                self.persist(Record::Closed(id), effects);
            }
            Ending::Gone(reason) => {
                let record = TombstoneRecord {
                    open: id,
                    principal: open.principal.as_ref().to_owned(),
                    reason,
                    volume: open.at.volume,
                    identity: open.identity,
                    file_handle: std::mem::take(&mut open.file_handle),
                    path: open.at.path.as_str().to_owned(),
                    evidence: (open.baseline && !open.marked).then_some(open.evidence),
                };
                self.bury(id, record, effects);
            }
        }
        effects.push(Effect::CloseFile(open.file));
        if let Life::Closing { waiters, .. } = open.life {
            for waiter in waiters {
                waiter.answer(Reply::Done, effects);
            }
        }
        self.open_unbound(id, effects);
        self.changed.insert(open.identity);
        if let Some(session) = open.session {
            if let Some(session) = self.sessions.get_mut(session) {
                session.opens.remove(&id);
            }
            self.finish_logoff(session, effects);
        }
    }

    pub(super) fn last_look_seen(&mut self, id: OpenId, result: Result<Option<Inspected>, Refusal>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        open.last_look = Step::Done;
        if let Ok(Some(seen)) = result {
            open.evidence = seen.evidence;
            open.baseline = true;
        } else {
            open.marked = true;
        }
    }

    /// Delete on close: the name goes with the last open of the file, if this or an earlier one asked for it. True
    /// while that is under way.
    fn remove_name(&mut self, id: OpenId, effects: &mut Vec<Effect>) -> bool {
        let Some(open) = self.opens.get_mut(id) else { return false };
        let identity = open.identity;
        let own = open.request.delete_on_close.then(|| open.at.clone());
        let Some(of_file) = self.opens.of_file_mut(identity) else { return false };
        if of_file.remove.is_none() {
            of_file.remove = own;
        }
        let alone = of_file.all.len() == 1;
        let Some(at) = of_file.remove.clone().filter(|_| alone) else { return false };
        match self.opens.get_mut(id) {
            Some(open) if open.removal == Step::No => open.removal = Step::UnderWay,
            _ => return false,
        }
        let operation = self.start_own(id, Stage::Removing(id));
        // All that let go of the file is durable before its name goes.
        self.defer_all(Effect::Perform { operation, work: Work::Remove(at, identity) }, effects);
        true
    }

    /// A file was renamed: if an open of it asked for the name's removal, it is the new name that goes.
    pub(super) fn move_removal(
        &mut self,
        file: FileIdentity,
        from: &Located,
        to: Located,
        effects: &mut Vec<Effect>,
    ) {
        let asked = self.opens.on(file).any(|(_, open)| open.request.delete_on_close && open.at == *from);
        let Some(of_file) = self.opens.of_file_mut(file) else { return };
        if !of_file.remove.as_ref().map_or(asked, |remove| remove == from) {
            return;
        }
        of_file.remove = Some(to);
        // With every open: an earlier record of any of them may have the old name.
        let stay = self.opens.on(file).filter(|(_, open)| !open.is_closing() && !self.journal.full);
        for id in stay.map(|(id, _)| id).collect::<Vec<_>>() {
            self.persist_open(id, effects);
        }
    }

    /// An open that asked for the name's removal goes before others of the file: the journal has that with one that is left.
    fn keep_removal(&mut self, file: FileIdentity, effects: &mut Vec<Effect>) {
        let Some(of_file) = self.opens.of_file(file).filter(|of_file| of_file.remove.is_some()) else {
            return;
        };
        let stays = |id: &OpenId| self.opens.get(*id).is_some_and(|open| !open.is_closing());
        let heir = of_file.all.iter().find(stays).or(of_file.all.iter().next());
        // A full journal takes the ends of things only.
        if let Some(heir) = heir.filter(|_| !self.journal.full) {
            self.persist_open(heir, effects);
        }
    }

    /// Dataplane confirms a fence. One that was not asked for, or of another epoch, changes nothing.
    pub(super) fn fenced(&mut self, fence: Fence, effects: &mut Vec<Effect>) {
        self.strays.remove(&fence.binding);
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
        self.strays.remove(&binding);
        self.fences.confirm(binding);
        if let Some((open, gone)) = self.opens.unbind(binding) {
            if let Some(open) = self.opens.get_mut(open) {
                open.kept.retain(|kept| *kept != gone.handle);
            }
            self.open_unbound(open, effects);
            self.go_on(open, effects);
        }
    }

    /// Dataplane is dead: no binding is left.
    pub(super) fn lose_link(&mut self, effects: &mut Vec<Effect>) {
        self.service_blob = None;
        self.unknown_bindings = false;
        self.strays.clear();
        for binding in self.opens.bound() {
            self.released(binding, effects);
        }
    }
}
