//! Opens: nothing that conflicts stands beside a protected open, and nothing of an ended one lands.

use super::{CLOSED, Ended, Oracle, Sight};
use crate::files::{Actor, Node};
use holdfast_shared::types::{Access, HandleId, OpenId, SessionId, ShareMode, conflicts};
use holdfast_shared::wire::control::Opened;
use holdfast_shared::wire::link::LinkBinding;

impl Oracle {
    pub(super) fn opened(&mut self, sight: &Sight<'_>, session: SessionId, opened: &Opened) {
        let open = opened.open;
        self.keys.insert(opened.key.resume_key.clone(), open);
        let leaving = self.leaving.contains(&session);
        let Some(fact) = self.facts.get_mut(&open) else {
            return self.fail(|| format!("{open} is told, and no record of it was made"));
        };
        let again = fact.told;
        if fact.ended.is_some() || fact.given_away {
            let fact = fact.clone();
            return self.fail(|| format!("{open} is told again after it ended: {fact:?}"));
        }
        fact.told = true;
        fact.hold_ms = opened.hold_ms;
        fact.class = opened.class;
        let moved = again && (fact.session != Some(session) || fact.detached.is_some());
        fact.told_at = sight.now;
        if moved && opened.epoch <= fact.epoch {
            let fact = fact.clone();
            return self.fail(|| format!("{open} moved to another session in its old epoch: {fact:?}"));
        }
        fact.epoch = opened.epoch;
        fact.resuming = false;
        fact.decided.retain(|epoch, _| *epoch > opened.epoch);
        (fact.unheard, fact.lapse_unheard) = (false, false);
        fact.session = Some(session);
        fact.detached = None;
        fact.closing = leaving;
        if moved {
            fact.bury_bindings("the open moved to a later session", &[]);
            self.no_bindings(sight, open, &[], "its open request was repeated elsewhere");
        }
        self.stands_alone(sight, open);
    }

    /// Nothing protected conflicts with an open that is told now. What does conflict is given away.
    pub(super) fn stands_alone(&mut self, sight: &Sight<'_>, open: OpenId) {
        let Some(fact) = self.facts.get(&open).cloned() else { return };
        let claim = (fact.access, fact.share);
        let others: Vec<OpenId> = self
            .facts
            .iter()
            .filter(|(other, there)| **other != open && there.node == fact.node && there.told)
            .filter(|(_, there)| conflicts(claim, (there.access, there.share)))
            .map(|(other, _)| *other)
            .collect();
        for other in others {
            self.give_away(sight, other, open, "an open that conflicts with it is told");
        }
    }

    /// Something of `to` that conflicts with `open` is told.
    pub(super) fn give_away(&mut self, sight: &Sight<'_>, open: OpenId, to: OpenId, why: &'static str) {
        let Some(fact) = self.facts.get_mut(&open) else { return };
        if fact.ended.is_some() {
            return;
        }
        if fact.protected(sight.now) {
            let fact = fact.clone();
            return self.fail(|| format!("{why} ({to}) while {open} is protected: {fact:?}"));
        }
        fact.given_away = true;
        fact.locks.clear();
        fact.bury_bindings(why, &[]);
        self.no_bindings(sight, open, &[], why);
    }

    pub(super) fn closed(&mut self, sight: &Sight<'_>, open: OpenId) {
        let Some(fact) = self.facts.get_mut(&open) else { return };
        fact.ended = Some(Ended::Closed);
        fact.locks.clear();
        fact.bury_bindings("its close was answered", &[]);
        self.no_bindings(sight, open, &[], "its close is answered");
        self.closed.push_back(open);
        if self.closed.len() > CLOSED {
            if let Some(fact) = self.closed.pop_front().and_then(|oldest| self.facts.remove(&oldest)) {
                self.creates.retain(|_, open| self.facts.contains_key(open));
                drop(fact);
            }
        }
    }

    /// The data plane has no binding of the open but those of `keep`.
    pub(super) fn no_bindings(&mut self, sight: &Sight<'_>, open: OpenId, keep: &[HandleId], why: &str) {
        let Some(plane) = sight.plane else { return };
        let Some(fact) = self.facts.get(&open) else { return };
        let kept = |binding: &LinkBinding| {
            fact.bindings.get(binding).is_some_and(|(handle, _)| keep.contains(handle))
        };
        let left: Vec<LinkBinding> = plane.of(open).filter(|binding| !kept(binding)).collect();
        if !left.is_empty() {
            self.fail(|| format!("{open}: {why}, and the data plane still has {left:?} of it"));
        }
    }

    /// A bind is granted.
    pub(crate) fn granted(&mut self, open: OpenId, binding: LinkBinding, handle: HandleId) {
        let Some(fact) = self.facts.get_mut(&open) else {
            return self.fail(|| format!("{binding:?} is granted for {open}, which was never there"));
        };
        if fact.ended.is_some() || fact.given_away || fact.tombstone.is_some() {
            let fact = fact.clone();
            return self.fail(|| format!("{binding:?} is granted for {open}, which has ended: {fact:?}"));
        }
        fact.bindings.insert(binding, (handle, None));
    }

    /// A binding's I/O lands.
    pub(crate) fn landed(
        &mut self,
        sight: &Sight<'_>,
        open: OpenId,
        binding: LinkBinding,
        node: Node,
        block: u64,
        access: Access,
    ) {
        let dead =
            self.facts.get(&open).and_then(|fact| fact.bindings.get(&binding)).and_then(|(_, dead)| *dead);
        if let Some(why) = dead {
            return self.fail(|| format!("{access:?} of {binding:?} of {open} lands after {why}"));
        }
        self.obeys_locks(sight, open, node, block, access);
        if access == Access::WRITE {
            self.obeys_shares(sight, Some(open), node, Access::WRITE, "a write lands");
        }
    }

    /// Somebody does something with a file that only an open with `access` may do.
    pub(crate) fn obeys_shares(
        &mut self,
        sight: &Sight<'_>,
        open: Option<OpenId>,
        node: Node,
        access: Access,
        what: &str,
    ) {
        let denied = self.facts.iter().find(|(other, fact)| {
            Some(**other) != open
                && fact.node == Some(node)
                && fact.protected(sight.now)
                && conflicts((access, ShareMode::ALL), (fact.access, fact.share))
        });
        if let Some((other, fact)) = denied {
            let words = format!("{what} (by {open:?}), which {other} denies: {fact:?}");
            self.fail(|| words);
        }
    }

    /// The open, if it is known, that a descriptor belongs to.
    pub(crate) fn actor_of(
        &self,
        principal: &str,
        create: holdfast_shared::types::CreateId,
    ) -> Option<Actor> {
        self.creates.get(&(principal.to_owned(), create)).map(|open| Actor::Open(*open))
    }

    /// The file of an open.
    pub(crate) fn node_of(&self, open: OpenId) -> Option<Node> {
        self.facts.get(&open).and_then(|fact| fact.node)
    }
}
