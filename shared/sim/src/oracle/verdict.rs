//! Verdicts: never a false "unchanged", never "changed" where nobody could have changed anything.

use super::{Ended, Oracle, Sight};
use crate::files::{Actor, Node};
use holdfast_shared::types::{GoneReason, HandleId, OpenId, SessionId, Status, Verdict};
use holdfast_shared::wire::control::{Gone, Refusal, Resumed};
use std::collections::BTreeMap;

impl Oracle {
    /// A change that somebody else made since the open was detached, among the first `until` of its file; in words.
    fn changed_by_others(&self, sight: &Sight<'_>, open: OpenId, until: usize) -> Option<String> {
        let fact = self.facts.get(&open)?;
        let file = sight.files.get(fact.node?)?;
        let lasting = file.history.iter().enumerate().take(until).filter(|(_, change)| !change.undone);
        let foreign = lasting.into_iter().find(|(number, change)| match change.by {
            Actor::Binding(by, _) | Actor::Open(by) => by != open && *number >= fact.window.server,
            Actor::Control => *number >= fact.window.server,
            Actor::Unknown => false,
            // A change that leaves no trace in the file's evidence is the one gap.
            Actor::Outside => change.shows && fact.window.outside.is_some_and(|from| *number >= from),
        });
        foreign.map(|(number, change)| format!("change {number} by {:?}", change.by))
    }

    pub(super) fn resumed(
        &mut self,
        sight: &Sight<'_>,
        session: SessionId,
        asked_at: u64,
        changes: &BTreeMap<Node, usize>,
        keep: &[HandleId],
        resumed: &Resumed,
    ) {
        let open = resumed.opened.open;
        self.keys.insert(resumed.opened.key.resume_key.clone(), open);
        self.resumed += 1;
        self.verdicts[resumed.verdict as usize] += 1;
        let principal = self.principals.get(&session).cloned();
        let Some(fact) = self.facts.get(&open).cloned() else {
            return self.fail(|| format!("{open} is resumed, and was never there"));
        };
        if fact.forced {
            // The operator closed it after it was resumed, and before that could be told.
            return;
        }
        if fact.ended.is_some() || fact.given_away || fact.tombstone.is_some() {
            return self.fail(|| format!("{open} is resumed after it ended: {fact:?}"));
        }
        if principal.as_deref() != Some(fact.principal.as_str()) {
            return self.fail(|| format!("{open} of {} is resumed by {principal:?}", fact.principal));
        }
        if resumed.opened.access != fact.access || resumed.share != fact.share {
            return self.fail(|| format!("{open} is not what it was: {resumed:?} {fact:?}"));
        }
        if resumed.opened.epoch <= fact.epoch {
            return self.fail(|| format!("{open} is resumed in its old epoch: {fact:?}"));
        }
        if let Some(handle) = resumed.kept.iter().find(|handle| !keep.contains(handle)) {
            return self.fail(|| format!("{open}: {handle} is kept, which nobody wanted"));
        }
        let until = fact.node.and_then(|node| changes.get(&node).copied()).unwrap_or(0);
        let foreign = self.changed_by_others(sight, open, until);
        match resumed.verdict {
            Verdict::Changed if fact.untouched => {
                return self.fail(|| format!("{open} is called changed, and nobody could: {fact:?}"));
            }
            Verdict::Unchanged | Verdict::ExpiredUnchanged if foreign.is_some() => {
                let verdict = resumed.verdict;
                return self
                    .fail(|| format!("{open} is called {verdict:?} in spite of {foreign:?}: {fact:?}"));
            }
            _ => {}
        }
        // The open may have been detached anew before the answer could leave: it speaks of the time before that.
        let since = fact.decided.get(&resumed.opened.epoch).copied().unwrap_or(fact.detached);
        let expired = resumed.verdict == Verdict::ExpiredUnchanged || !resumed.locks_kept;
        if fact.lapse_unheard && (resumed.verdict == Verdict::Unchanged) {
            return self.fail(|| {
                format!(
                    "{open} is called unchanged, and its client never heard that its time was over: {fact:?}"
                )
            });
        }
        if fact.lapse_unheard && resumed.locks_kept && fact.locks.iter().any(|lock| !lock.releasing) {
            return self.fail(|| {
                format!("{open} has kept its locks, and its client never heard that it had not: {fact:?}")
            });
        }
        if let Some(deadline) = fact.deadline(since) {
            if resumed.verdict == Verdict::Unchanged && asked_at > deadline {
                return self
                    .fail(|| format!("{open} is called unchanged within its time, after it: {fact:?}"));
            }
            if expired && sight.now < deadline && !fact.lapse_unproven {
                return self.fail(|| format!("{open} is called expired before its time: {fact:?}"));
            }
        }
        let leaving = self.leaving.contains(&session);
        if let Some(fact) = self.facts.get_mut(&open) {
            fact.told = true;
            fact.epoch = resumed.opened.epoch;
            fact.resuming = false;
            fact.decided.retain(|epoch, _| *epoch > resumed.opened.epoch);
            fact.lapse_unheard = expired;
            (fact.unheard, fact.unproven) = (true, true);
            fact.session = Some(session);
            // What was lost before the answer could leave is away since then.
            let lost = fact.detached.filter(|_| fact.lost_again);
            fact.detached = lost;
            fact.untouched &= lost.is_none();
            fact.closing = leaving;
            fact.bury_bindings("a resume that did not keep it was answered", &resumed.kept);
        }
        self.no_bindings(sight, open, &resumed.kept, "its resume is answered");
        self.stands_alone(sight, open);
    }

    pub(super) fn gone(
        &mut self,
        sight: &Sight<'_>,
        changes: &BTreeMap<Node, usize>,
        key: &[u8],
        gone: Gone,
    ) {
        self.verdicts[3] += 1;
        let Some(open) = self.keys.get(key).copied() else {
            return self.fail(|| format!("{gone:?} is told about a key that was never issued"));
        };
        let Some(fact) = self.facts.get(&open).cloned() else { return };
        if fact.tombstone.is_none() {
            return self.fail(|| format!("{open} is told gone ({gone:?}), and has no tombstone: {fact:?}"));
        }
        if fact.tombstone != Some(gone.reason) {
            return self.fail(|| format!("{open} is told gone for the wrong reason ({gone:?}): {fact:?}"));
        }
        let until = fact.node.and_then(|node| changes.get(&node).copied()).unwrap_or(0);
        // A live open that is closed by force was never detached: its client knows what it did until then.
        if fact.detached.is_some() && gone.reason == GoneReason::Evicted && !gone.changed {
            if let Some(foreign) = self.changed_by_others(sight, open, until) {
                return self.fail(|| {
                    format!("{open} is told gone and not changed, in spite of {foreign}: {fact:?}")
                });
            }
        }
        self.no_bindings(sight, open, &[], "its client is told that it is gone");
        if let Some(fact) = self.facts.get_mut(&open) {
            fact.ended = Some(Ended::Gone);
            fact.bury_bindings("its client was told that it is gone", &[]);
        }
    }

    pub(super) fn resume_refused(
        &mut self,
        sight: &Sight<'_>,
        session: SessionId,
        key: &[u8],
        refusal: &Refusal,
    ) {
        if self.leaving.contains(&session) {
            return;
        }
        let principal = self.principals.get(&session).cloned();
        let fact = self.keys.get(key).and_then(|open| self.facts.get(open).map(|fact| (*open, fact.clone())));
        let Some((open, fact)) = fact else {
            if refusal.status != Status::BadKey && refusal.status != Status::Unavailable {
                self.fail(|| format!("a key that was never issued is answered {refusal:?}"));
            }
            return;
        };
        let own = principal.as_deref() == Some(fact.principal.as_str());
        // One without a hold time ends with its session, and that may end before it is told so.
        if own && refusal.status == Status::BadKey && fact.hold_ms > 0 && fact.protected(sight.now) {
            self.fail(|| format!("{open} is protected, and its own key is bad: {fact:?}"));
        } else if !own && !matches!(refusal.status, Status::BadKey | Status::Unavailable) {
            self.fail(|| format!("{principal:?} learns of {open} of {}: {refusal:?}", fact.principal));
        } else if fact.ended == Some(Ended::Closed)
            && !matches!(refusal.status, Status::BadKey | Status::Unavailable)
        {
            self.fail(|| format!("{open} is closed, and its key is answered {refusal:?}"));
        }
    }
}
