//! Resume: a new session of the same principal takes an open over.
//!
//! ```text
//!  key ─► ours? whose? ─► live elsewhere: that session ends, if named ─► fence what is not kept
//!    │ BadKey, Busy                                                          │ all confirmed, all work done
//!    ▼                                                                       ▼
//!  nothing has happened        the open's locks are in force again ─► look at the file
//!                                                                            │
//!         new epoch, handle, secret ─► Resumed journalled ─► answer ◄── verdict ┘
//! ```
//!
//! Until the last step the open is what it was: if the asking session is lost, or the file can't be looked at, it stays
//! detached with its old deadline. While a resume is under way nobody evicts the open: who came first, wins.

use super::barrier::Then;
use super::operation::{OperationId, Stage};
use super::rules::Right;
use super::table::{Ending, Life};
use super::{Asker, Authority, DATAPLANE_RETRY_MS, Effect, Fresh, Inspected, refusal};
use crate::journal::record::{Record, ResumedRecord};
use crate::types::{Access, HandleId, OpenId, SessionId, Status, Verdict};
use crate::wire::control::{Refusal, Reply, Resume, Resumed};
use std::collections::BTreeSet;

/// When to ask again for an open that is being resumed, ms.
const RESUME_RETRY_MS: u64 = 50;

/// Which open a repeated open request is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReplayOf(pub(super) OpenId);

/// How far a resume has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// Fences are being confirmed, and work is coming to its end.
    Fencing,
    /// The I/O of others is being made to respect the open's locks again.
    Restricting,
    /// The file is being looked at.
    Looking(OperationId),
}

/// A resume under way.
#[derive(Debug)]
pub(super) struct Resuming {
    pub(super) asker: Asker,
    /// Tells it from an earlier one of the same open that has failed.
    number: u64,
    fresh: Fresh,
    /// It is an open request that was repeated: its answer is `Opened`.
    replay: bool,
    /// The hold time was over when it came.
    expired: bool,
    pub(super) progress: Progress,
}

impl Authority {
    pub(super) fn resume(
        &mut self,
        asker: Asker,
        resume: &Resume,
        fresh: Fresh,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.know_all_bindings()?;
        let bad_key = || refusal(Status::BadKey, "");
        let principal =
            self.sessions.get(asker.session).map(|session| session.principal.clone()).ok_or_else(bad_key)?;
        let key = self.keyring.open(&resume.resume_key).map_err(|_| bad_key())?;
        let tombstone = self.tombstones.get(key.open);
        if tombstone.is_some_and(|t| t.principal == principal && t.at.volume == key.volume) {
            return self.late_resume(asker, key.open, effects);
        }
        let open = self.opens.get(key.open).filter(|open| {
            open.principal == principal && open.volume() == key.volume && open.opened_ms == key.opened_ms
        });
        let open = open.ok_or_else(bad_key)?;
        match &open.life {
            Life::Closing { ending: Ending::Closed, .. } => Err(bad_key()),
            // Soon there is a tombstone that can tell.
            Life::Closing { .. } => {
                Err(Refusal { retry_ms: Some(100), ..refusal(Status::Busy, "the open is being closed") })
            }
            _ => {
                let keep = resume.keep.clone();
                self.begin_resume(asker, key.open, resume.supersede, keep, fresh, false, effects)
            }
        }
    }

    /// Begins to hand an open over to the asker's session. The principal is checked.
    #[expect(clippy::too_many_arguments, reason = "what a resume and a repeated open request differ in")]
    pub(super) fn begin_resume(
        &mut self,
        asker: Asker,
        id: OpenId,
        supersede: Option<SessionId>,
        keep: Vec<HandleId>,
        fresh: Fresh,
        replay: bool,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let Some(open) = self.opens.get(id) else { return Err(refusal(Status::BadKey, "")) };
        let busy = |words| Err(refusal(Status::Busy, words));
        let before = match &open.life {
            Life::Active if open.session.is_none() => {
                let words = "the open is not open again yet";
                return Err(Refusal { retry_ms: Some(DATAPLANE_RETRY_MS), ..refusal(Status::Busy, words) });
            }
            Life::Active if open.session == Some(asker.session) => {
                return busy("the open is live in this session");
            }
            Life::Active if supersede != open.session => {
                return busy("the open is live in another session");
            }
            // That is a matter of a moment; then it is live, and it can be said where.
            Life::Detached { resume: Some(_), .. } => {
                let words = "the open is being resumed";
                return Err(Refusal { retry_ms: Some(RESUME_RETRY_MS), ..refusal(Status::Busy, words) });
            }
            Life::Active => open.session,
            Life::Detached { .. } => None,
            Life::Closing { .. } => return Err(refusal(Status::BadKey, "")),
        };
        self.have_room()?;
        let wants = open.access().contains(Access::WRITE) || open.access().contains(Access::DELETE);
        let right = if wants { Right::ReadWrite } else { Right::Read };
        self.volumes.allow(&open.principal, open.volume(), right)?;
        let limit = self.limits.opens_per_session;
        let session = self.sessions.get_mut(asker.session);
        let session = session.ok_or_else(|| refusal(Status::SessionGone, ""))?;
        if session.opens.len() + session.opening + session.resuming.len() >= limit {
            return Err(refusal(Status::TooMany, "no room for another open"));
        }
        session.resuming.insert(id);
        if let Some(before) = before {
            // This one is not closed with its session, whatever its hold time: it goes on to the next.
            if let Some(session) = self.sessions.get_mut(before) {
                session.opens.remove(&id);
            }
            self.detach(id, effects);
            effects.push(Effect::Disconnect(before));
            self.lose_session(before, effects);
            self.mark_beside_writers(&[id], effects);
        }
        // One that was live until now is not, whatever its hold time.
        let expired = before.is_none() && self.opens.get(id).is_some_and(|open| open.is_expired(self.now));
        let keep: BTreeSet<HandleId> = keep.into_iter().collect();
        self.last_resume += 1;
        let number = self.last_resume;
        let resuming = Resuming { asker, number, fresh, replay, expired, progress: Progress::Fencing };
        if let Some(resume) = self.opens.get_mut(id).and_then(|open| open.resuming_mut()) {
            *resume = Some(Box::new(resuming));
        }
        self.fence(id, Status::Superseded, |binding| !keep.contains(&binding.handle), effects);
        self.go_on_resuming(id, effects);
        Ok(())
    }

    /// A resume goes on when nothing is left of the lost incarnation but what is kept.
    pub(super) fn go_on_resuming(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        let fencing = open.bindings.values().any(|binding| binding.fencing) || open.works > 0;
        let identity = open.identity;
        let Some(Some(resume)) = open.resuming_mut() else { return };
        if resume.progress != Progress::Fencing || fencing {
            return;
        }
        resume.progress = Progress::Restricting;
        let number = resume.number;
        // Its locks count again from now on. What others began before that has ended when the file is looked at.
        self.update_rules(identity, effects);
        let waits = self.unconfirmed(identity, None);
        let locks = !self.locks.locks_of(identity, id).is_empty();
        let changes = if locks { self.alterations(identity, id, true) } else { BTreeSet::new() };
        self.wait_for(waits, changes, Then::Resume(id, number), effects);
    }

    pub(super) fn look_for_resume(&mut self, id: OpenId, number: u64, effects: &mut Vec<Effect>) {
        let waits = self.opens.get(id).and_then(|open| open.resuming());
        if waits.is_none_or(|resume| resume.number != number || resume.progress != Progress::Restricting) {
            return;
        }
        let operation = self.start_own(id, Stage::Resuming(id));
        let Some(open) = self.opens.get_mut(id) else { return };
        let file = open.file;
        if let Some(Some(resume)) = open.resuming_mut() {
            resume.progress = Progress::Looking(operation);
        }
        effects.push(Effect::Inspect { operation, file });
    }

    pub(super) fn resume_seen(
        &mut self,
        id: OpenId,
        operation: OperationId,
        result: Result<Option<Inspected>, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let resume = self.opens.get(id).and_then(|open| open.resuming());
        if resume.is_none_or(|resume| resume.progress != Progress::Looking(operation)) {
            return;
        }
        let seen = match result {
            Ok(Some(seen)) => self.have_room().map(|()| seen),
            Ok(None) => Err(refusal(Status::Io, "the file cannot be looked at")),
            Err(refused) => Err(refused),
        };
        match seen {
            Ok(seen) => self.hand_over(id, seen, effects),
            Err(refused) => self.abort_resume(id, Some(refused), effects),
        }
    }

    /// The last step of a resume.
    fn hand_over(&mut self, id: OpenId, seen: Inspected, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        let Some(Some(resume)) = open.resuming_mut().map(Option::take) else { return };
        let Resuming { asker, fresh, replay, expired, .. } = *resume;
        // That the time was over is told until the client is heard, like a change.
        let expired = expired || open.lapsed;
        let Some(session) = self.sessions.get_mut(asker.session) else { return };
        let changed = open.marked || (open.baseline && open.evidence != seen.evidence);
        let verdict = match (changed, expired) {
            (true, _) => Verdict::Changed,
            (false, true) => Verdict::ExpiredUnchanged,
            (false, false) => Verdict::Unchanged,
        };
        session.resuming.remove(&id);
        session.opens.insert(id);
        open.session = Some(asker.session);
        open.secret = session.key.bind_secret(id);
        open.sealed_secret = self.keyring.seal_secret(id, &open.secret, fresh.secret_nonce);
        open.handle = HandleId::from_random(fresh.handle);
        open.epoch = open.epoch.saturating_add(1);
        open.evidence = seen.evidence;
        open.kept = open.bindings.values().map(|binding| binding.handle).collect();
        let kept = open.kept.clone();
        // The answer may be lost. Until the client is heard, the next one must say no less than this one; and what changes
        // until then, unless by bindings that were kept, must be told too.
        (open.baseline, open.marked) = (!replay && kept.is_empty(), !replay && changed);
        open.lapsed = !replay && expired;
        let (identity, share, writes) = (open.identity, open.share(), open.access().contains(Access::WRITE));
        let record = Record::Resumed(ResumedRecord {
            open: id,
            epoch: open.epoch,
            sealed_secret: open.sealed_secret.clone(),
            evidence: seen.evidence,
            kept: kept.clone(),
            changed: (!replay).then_some(changed),
            lapsed: open.lapsed,
        });
        let lock_sequence = open.executed.highest();
        self.clear_detached_timers(id);
        self.opens.set_life(id, Life::Active);
        if writes {
            self.mark_others(identity, Some(id), effects);
        }
        let sequence = self.persist(record, effects);
        if !replay {
            self.opens.set_unheard(id, true);
            self.mark_beside_writers(&[id], effects);
        }
        let Some(open) = self.opens.get_mut(id) else { return };
        open.journalled = sequence;
        let Some(open) = self.opens.get(id) else { return };
        let opened = self.opened(id, open, seen.attributes, &fresh);
        let locks_kept = !expired || self.locks.locks_of(identity, id).is_empty();
        let reply = if replay {
            Reply::Opened(opened)
        } else {
            Reply::Resumed(Resumed { opened, verdict, locks_kept, kept, lock_sequence, share })
        };
        asker.answer(reply, effects);
        self.changed.insert(identity);
    }

    /// A resume fails: the open is as it was.
    pub(super) fn abort_resume(&mut self, id: OpenId, refused: Option<Refusal>, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get_mut(id) else { return };
        let Some(Some(resume)) = open.resuming_mut().map(Option::take) else { return };
        let nothing_held = open.hold_ms == 0;
        self.resume_is_over(id, &resume);
        if let Some(refused) = refused {
            resume.asker.refuse(refused, effects);
        }
        if nothing_held {
            return self.end(id, None, Ending::Closed, Status::SessionGone, effects);
        }
        self.linger_over(id, effects);
        self.take_baseline(id, effects);
    }

    /// What is counted for a resume is given back.
    pub(super) fn resume_is_over(&mut self, id: OpenId, resume: &Resuming) {
        if let Some(session) = self.sessions.get_mut(resume.asker.session) {
            session.resuming.remove(&id);
        }
        if let Some(open) = self.opens.get(id) {
            self.changed.insert(open.identity);
        }
    }
}
