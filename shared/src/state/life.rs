//! Detached opens: from the loss of the session to the end of the hold time.
//!
//! ```text
//!   session lost ──► Detached ── linger ──► bindings fenced ──► baseline taken
//!      │ hold time 0      │                                          │
//!      ▼                  └───────────── hold time ──────────────────┴──► expired: locks restrict nobody's I/O,
//!   Closing                                                                who waits asks again
//! ```
//!
//! A detached open is *marked* when somebody else may change the file before there is a baseline: the baseline is how
//! the file looks when nothing of the open itself can change it any more.

use super::operation::Stage;
use super::table::{Ending, Life};
use super::timers::Timer;
use super::{Authority, Effect, FileIdentity, Inspected};
use crate::journal::record::Record;
use crate::types::{Access, OpenId, Status, Timestamp};
use crate::wire::control::Refusal;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

impl Authority {
    /// Opens whose session is lost: those that are to be held are detached, the others closed.
    pub(super) fn lose_opens(&mut self, opens: BTreeSet<OpenId>, effects: &mut Vec<Effect>) {
        let mut detached = Vec::new();
        for id in opens {
            let Some(open) = self.opens.get_mut(id) else { continue };
            open.session = None;
            if !open.is_active() {
                continue;
            }
            if open.hold_ms == 0 {
                self.end(id, None, Ending::Closed, Status::SessionGone, effects);
            } else {
                self.detach(id, effects);
                detached.push(id);
            }
        }
        self.mark_beside_writers(&detached, effects);
        for id in detached {
            self.take_baseline(id, effects);
        }
    }

    /// Detaches an active open; whether it is marked is decided later.
    pub(super) fn detach(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        self.drop_lock_requests(id);
        let Some(open) = self.opens.get_mut(id) else { return };
        open.session = None;
        open.reopened = None;
        let (hold, identity) = (open.hold_ms, open.identity);
        self.set_detached(id, hold);
        self.persist(Record::Detached(id), effects);
        self.changed.insert(identity);
    }

    /// Sets an open's life, and its timers.
    pub(super) fn set_detached(&mut self, id: OpenId, hold_ms: u64) {
        self.clear_detached_timers(id);
        self.opens.set_unheard(id, false);
        let (since, deadline) = (self.now, self.now.saturating_add(Duration::from_millis(hold_ms)));
        self.opens.set_life(id, Life::Detached { since, deadline, resume: None });
        self.timers.set(since.saturating_add(self.limits.linger), Timer::Linger(id));
        self.timers.set(deadline, Timer::Expiry(id));
    }

    pub(super) fn clear_detached_timers(&mut self, id: OpenId) {
        if let Some(Life::Detached { since, deadline, .. }) = self.opens.get(id).map(|open| &open.life) {
            self.timers.clear(since.saturating_add(self.limits.linger), Timer::Linger(id));
            self.timers.clear(*deadline, Timer::Expiry(id));
        }
    }

    /// An open goes on to another life than `Detached`; a resume that is under way fails.
    pub(super) fn leave_detached(
        &mut self,
        id: OpenId,
        reason: Status,
        life: Life,
        effects: &mut Vec<Effect>,
    ) {
        self.clear_detached_timers(id);
        if let Some(Life::Detached { resume: Some(resume), .. }) = self.opens.set_life(id, life) {
            self.resume_is_over(id, &resume);
            resume.asker.refuse(super::refusal(reason, ""), effects);
        }
    }

    /// Which of the detached opens have somebody beside them who may write at this moment?
    pub(super) fn mark_beside_writers(&mut self, detached: &[OpenId], effects: &mut Vec<Effect>) {
        let mut writers: BTreeMap<FileIdentity, (Vec<OpenId>, bool)> = BTreeMap::new();
        for id in detached {
            let Some(open) = self.opens.get(*id) else { continue };
            let identity = open.identity;
            let (opens, claimed) = writers.entry(identity).or_insert_with(|| {
                let opens = self.opens.on(identity).filter(|(_, open)| open.may_write());
                (opens.map(|(id, _)| id).take(2).collect(), self.is_being_changed(identity))
            });
            if *claimed || opens.iter().any(|writer| writer != id) {
                self.mark(*id, effects);
            }
        }
    }

    /// True if an operation that nobody's open stands for changes the file.
    pub(super) fn is_being_changed(&self, file: FileIdentity) -> bool {
        self.shares.is_claimed(file)
            && self
                .operations
                .iter()
                .any(|(_, operation)| operation.stage.claims().iter().any(|(claimed, ..)| *claimed == file))
    }

    /// Somebody else may change the file of an open, or have changed it.
    pub(super) fn mark(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        let deciding = open.resuming().is_some();
        if !open.marked && (!open.baseline || deciding) {
            open.marked = true;
            // The tombstone of one that is closing will say it.
            if !open.is_closing() {
                self.tell_detached(id, effects);
                self.persist(Record::Marked(id), effects);
            }
        }
    }

    /// Somebody is let in who may change the file: every open of it is marked that is detached, or whose client may not know
    /// yet that it no longer is, or that is being taken from its owner, and that could not tell. Before the grant, in the same call.
    pub(super) fn mark_others(&mut self, file: FileIdentity, me: Option<OpenId>, effects: &mut Vec<Effect>) {
        let concerned = self.opens.of_file(file).into_iter().flat_map(|of_file| {
            let away = of_file.detached.iter().chain(of_file.unheard.iter());
            away.chain(of_file.leaving.iter())
        });
        let concerned: BTreeSet<OpenId> = concerned.collect();
        for id in concerned.into_iter().filter(|id| Some(*id) != me) {
            self.mark(id, effects);
        }
    }

    /// The client of an open has shown that it knows the answer to its resume.
    pub(super) fn heard(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id).filter(|open| open.unheard && open.is_active()) else {
            return;
        };
        (open.baseline, open.marked, open.lapsed) = (false, false, false);
        self.opens.set_unheard(id, false);
        self.persist(Record::Heard(id), effects);
    }

    /// Begins to take the baseline of a detached open, if nothing of it can change the file any more.
    pub(super) fn take_baseline(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        let still = open.works == 0 && (open.bindings.is_empty() || !open.access().contains(Access::WRITE));
        if !open.is_away()
            || open.baseline
            || open.marked
            || open.looking
            || open.reopened.is_some()
            || !still
        {
            return;
        }
        open.looking = true;
        let file = open.file;
        let operation = self.start_own(id, Stage::Baseline(id));
        effects.push(Effect::Inspect { operation, file });
    }

    pub(super) fn baseline_seen(
        &mut self,
        id: OpenId,
        result: Result<Option<Inspected>, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(open) = self.opens.get_mut(id) else { return };
        open.looking = false;
        if !matches!(open.life, Life::Detached { .. }) {
            return;
        }
        if let Ok(Some(seen)) = result {
            open.evidence = seen.evidence;
            open.baseline = true;
            self.persist(Record::Baseline(id, seen.evidence), effects);
        } else {
            // It can't be known what happens to it from now on.
            self.mark(id, effects);
        }
    }

    /// The bindings of a detached open have lived on for long enough.
    pub(super) fn linger_over(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let linger = self.limits.linger;
        match self.opens.get(id).map(|open| &open.life) {
            Some(Life::Detached { since, resume: None, .. }) if since.saturating_add(linger) <= self.now => {
                self.fence(id, Status::SessionGone, |_| true, effects);
            }
            _ => {}
        }
    }

    /// A hold time is over: what the open stood in the way of is looked at again.
    pub(super) fn hold_over(&mut self, id: OpenId) {
        if let Some(open) = self.opens.get(id) {
            self.changed.insert(open.identity);
        }
    }
}

/// How long until then, milliseconds, rounded up.
pub(super) fn left_ms(now: Timestamp, then: Timestamp) -> u64 {
    u64::try_from(then.saturating_since(now).as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
