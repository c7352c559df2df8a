//! Who is connected; and which module a request goes to.

use super::operation::Stage;
use super::rules::Right;
use super::table::Ending;
use super::{Asker, Authority, Effect, Fresh, SessionBegan, Subject, Work, refusal};
use crate::auth::SessionKey;
use crate::types::{OpenId, ProcessId, SessionId, Status};
use crate::wire::control::{self, Place, Refusal, Reply, Request, SetAttributes, Target, Welcome};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// An authenticated control connection's context.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) principal: Arc<str>,
    pub(super) key: SessionKey,
    pub(super) process: ProcessId,
    /// Its opens, closing ones included.
    pub(super) opens: BTreeSet<OpenId>,
    /// Opens being made: they count against the limit.
    pub(super) opening: usize,
    /// Opens being resumed into it: they count too.
    pub(super) resuming: BTreeSet<OpenId>,
    /// It ends: who waits to hear of it.
    pub(super) logoff: Option<Asker>,
}

/// What one principal has, over all its sessions.
#[derive(Debug, Default, PartialEq, Eq, Clone, Copy)]
pub(super) struct Share {
    pub(super) sessions: usize,
    pub(super) opens: usize,
}

#[derive(Debug, Default)]
pub(super) struct Sessions {
    by_id: BTreeMap<SessionId, Session>,
    pub(super) principals: BTreeMap<Arc<str>, Share>,
}

impl Sessions {
    pub(super) fn get(&self, id: SessionId) -> Option<&Session> {
        self.by_id.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.by_id.get_mut(&id)
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&SessionId, &Session)> {
        self.by_id.iter()
    }

    /// Changes what is counted for a principal, and forgets one that has nothing left.
    pub(super) fn count(&mut self, principal: &Arc<str>, change: impl FnOnce(&mut Share)) {
        let share = self.principals.entry(principal.clone()).or_default();
        change(share);
        if *share == Share::default() {
            self.principals.remove(principal);
        }
    }

    pub(super) fn share(&self, principal: &str) -> Share {
        self.principals.get(principal).copied().unwrap_or_default()
    }
}

impl Authority {
    pub(super) fn begin_session(&mut self, began: SessionBegan, effects: &mut Vec<Effect>) {
        let asker = Asker { session: began.session, request: began.request };
        let share = self.sessions.share(&began.principal);
        let full = self.sessions.len() >= self.limits.sessions
            || share.sessions >= self.limits.sessions_per_principal;
        if full || self.sessions.get(began.session).is_some() {
            asker.refuse(refusal(Status::TooMany, "no room for another session"), effects);
            effects.push(Effect::Disconnect(began.session));
            return;
        }
        let principal: Arc<str> = began.principal.into();
        self.sessions.count(&principal, |share| share.sessions += 1);
        let session = Session {
            principal: principal.clone(),
            key: began.key,
            process: began.process,
            opens: BTreeSet::new(),
            opening: 0,
            resuming: BTreeSet::new(),
            logoff: None,
        };
        self.sessions.by_id.insert(began.session, session);
        let welcome = Welcome {
            version: control::VERSION,
            session: began.session,
            principal: principal.as_ref().to_owned(),
            opens_max: u32::try_from(self.limits.opens_per_session).unwrap_or(u32::MAX),
        };
        asker.answer(Reply::Welcome(welcome), effects);
    }

    /// The session's connection is gone: its opens are detached, or closed if nothing is to be held. Operations under way
    /// come to their end; what they would have given to the session is undone.
    pub(super) fn lose_session(&mut self, id: SessionId, effects: &mut Vec<Effect>) {
        let Some(session) = self.sessions.by_id.remove(&id) else { return };
        self.sessions.count(&session.principal, |share| share.sessions -= 1);
        self.lose_opens(session.opens, effects);
        for open in session.resuming {
            self.abort_resume(open, None, effects);
        }
        self.drop_contenders(effects);
    }

    /// The session ends by its client's wish: nothing is held for it. It is answered when all is closed.
    fn logoff(&mut self, asker: Asker, effects: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get_mut(asker.session) else { return };
        session.logoff = Some(asker);
        let (opens, resuming) = (session.opens.clone(), session.resuming.clone());
        for open in resuming {
            self.abort_resume(open, Some(refusal(Status::SessionGone, "")), effects);
        }
        for open in opens {
            self.end(open, None, Ending::Closed, Status::Closed, effects);
        }
        self.drop_contenders(effects);
        self.finish_logoff(asker.session, effects);
    }

    pub(super) fn finish_logoff(&mut self, id: SessionId, effects: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get(id) else { return };
        let Some(asker) = session.logoff.filter(|_| session.opens.is_empty() && session.opening == 0) else {
            return;
        };
        self.defer_all(asker.effect(Reply::Done), effects);
        self.defer_all(Effect::Disconnect(id), effects);
        self.lose_session(id, effects);
    }

    /// True if somebody is there to be answered, and to own an open.
    pub(super) fn is_there(&self, asker: Asker) -> bool {
        self.sessions.get(asker.session).is_some_and(|session| session.logoff.is_none())
    }

    /// A request that had to wait is asked again.
    pub(super) fn request_again(&mut self, asker: Asker, request: Request, effects: &mut Vec<Effect>) {
        if !self.is_there(asker) {
            return;
        }
        let done = match request {
            Request::SetAttributes(set) => self.set_attributes(asker, set, effects),
            Request::Remove(place) => self.remove(asker, &place, effects),
            Request::Rename(rename) => self.rename(asker, &rename, effects),
            _ => Err(refusal(Status::Internal, "")),
        };
        if let Err(refused) = done {
            asker.refuse(refused, effects);
        }
    }

    pub(super) fn request(
        &mut self,
        asker: Asker,
        request: Request,
        fresh: Fresh,
        effects: &mut Vec<Effect>,
    ) {
        let Some(session) = self.sessions.get(asker.session) else { return };
        let principal = session.principal.clone();
        if session.logoff.is_some() {
            return asker.refuse(refusal(Status::SessionGone, ""), effects);
        }
        let heard = self.heard_by(asker, &request);
        let done = match request {
            Request::Hello(_) => Err(refusal(Status::Protocol, "hello was said already")),
            Request::Ping => {
                asker.answer(Reply::Done, effects);
                Ok(())
            }
            Request::Volumes => {
                asker.answer(Reply::Volumes(self.volumes.seen_by(&principal)), effects);
                Ok(())
            }
            Request::Open(open) => self.open(asker, open, fresh, effects),
            Request::QueryKey(open) => self.query_key(asker, open, &fresh, effects),
            // Also when it is closing already: then the answer comes with the other one's.
            Request::Close(open) => self.owned(asker, open).map(drop).map(|()| {
                self.end(open, Some(asker), Ending::Closed, Status::Closed, effects);
            }),
            Request::GetAttributes(Target::Open(id)) => self
                .own(asker, id)
                .map(|open| Work::Attributes(Subject::File(open.file)))
                .and_then(|work| self.perform_on(asker, id, work, effects)),
            Request::SetAttributes(set) => self.set_attributes(asker, set, effects),
            Request::Remove(place) => self.remove(asker, &place, effects),
            Request::Rename(rename) => self.rename(asker, &rename, effects),
            Request::VolumeStatus(name) => self
                .volumes
                .admit(&principal, &name.volume, Right::Read)
                .map(|rules| rules.id)
                .and_then(|volume| self.perform(asker, Work::VolumeStatus(volume), Stage::Plain, effects)),
            Request::GetAttributes(Target::Path(place)) => {
                self.work_at(asker, &place, Right::Read, effects, |at| Work::Attributes(Subject::Name(at)))
            }
            Request::List(list) => {
                self.work_at(asker, &list.place, Right::Read, effects, |at| Work::List(at, list.after))
            }
            Request::MakeDirectory(make) => {
                self.work_at(asker, &make.place, Right::ReadWrite, effects, |at| {
                    Work::MakeDirectory(at, make.mode & 0o777)
                })
            }
            Request::MakeSymlink(make) => self.work_at(asker, &make.place, Right::ReadWrite, effects, |at| {
                Work::MakeSymlink(at, make.text)
            }),
            Request::Resume(resume) => self.resume(asker, &resume, fresh, effects),
            Request::Lock(lock) => self.lock(asker, lock, effects),
            Request::Unlock(unlock) => self.unlock(asker, unlock, effects),
            Request::CancelLock(cancel) => self.cancel_lock(asker, cancel, effects),
            Request::Logoff => {
                self.logoff(asker, effects);
                Ok(())
            }
            Request::ReadSymlink(place) => {
                self.work_at(asker, &place, Right::Read, effects, Work::ReadSymlink)
            }
        };
        if let Err(refused) = done {
            asker.refuse(refused, effects);
        }
        // Last: what is answered at once need not wait for the record.
        if let Some(open) = heard {
            self.heard(open, effects);
        }
    }

    /// The open whose client shows by this request that it knows the answer to its resume: it names the open, in the
    /// session that has it now, and the answer has left.
    fn heard_by(&self, asker: Asker, request: &Request) -> Option<OpenId> {
        let id = match request {
            Request::QueryKey(id) | Request::Close(id) | Request::GetAttributes(Target::Open(id)) => *id,
            Request::SetAttributes(SetAttributes { target: Target::Open(id), .. }) => *id,
            Request::Lock(lock) => lock.open,
            Request::Unlock(unlock) => unlock.open,
            Request::CancelLock(cancel) => cancel.open,
            _ => return None,
        };
        let open = self.opens.get(id).filter(|open| open.unheard && open.session == Some(asker.session))?;
        (open.journalled <= self.journal.durable).then_some(id)
    }

    /// Work on a name that touches no open.
    fn work_at(
        &mut self,
        asker: Asker,
        place: &Place,
        right: Right,
        effects: &mut Vec<Effect>,
        work: impl FnOnce(super::Located) -> Work,
    ) -> Result<(), Refusal> {
        let at = self.locate(asker, place, right)?;
        self.perform(asker, work(at), Stage::Plain, effects)
    }

    /// A place, if the asker has at least `right` there.
    pub(super) fn locate(
        &self,
        asker: Asker,
        place: &Place,
        right: Right,
    ) -> Result<super::Located, Refusal> {
        let session = self.sessions.get(asker.session).ok_or_else(|| refusal(Status::SessionGone, ""))?;
        let (rules, path) = self.volumes.place(&session.principal, place, right)?;
        Ok(super::Located { volume: rules.id, path })
    }
}
