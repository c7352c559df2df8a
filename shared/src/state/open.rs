//! Opening a file: from the request to the answer with its resume key.
//!
//! ```text
//!  request ─► rights, limits, create id ─► OpenFile ─► share check ─► Truncate, if asked ─► answer
//!                      │                                   │
//!                      └► the same request again: the      └► conflict: CloseFile, refused; the file
//!                         same open (rule 6)                  is as it was
//! ```

use super::operation::{Operation, OperationId, Stage};
use super::rules::Right;
use super::table::{Binding, FileId, Life, Open};
use super::{
    Asker, Authority, Changes, Effect, FileIdentity, FileOpened, Fresh, Located, Subject, Work, refusal,
};
use crate::auth::{MacPolicy, ResumeKey};
use crate::types::{Access, CreateId, HandleId, OpenId, SessionId, Status, Timestamp, VolumeId};
use crate::wire::control::{self, Attributes, KeyGrant, Opened, Refusal, Reply};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Repeats of one request that may wait for its answer at once.
const WAITERS_MAX: usize = 8;

/// An open request under way.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) request: control::Open,
    pub(super) principal: Arc<str>,
    /// The session it counts against.
    pub(super) session: SessionId,
    volume: VolumeId,
    policy: MacPolicy,
    /// The request itself and its repeats.
    pub(super) waiters: Vec<Asker>,
    fresh: Fresh,
}

/// What a create id stands for.
#[derive(Debug)]
pub(super) enum Created {
    Opening(OperationId),
    Open(OpenId, Box<control::Open>),
}

/// The create ids of all opens and of those being made (rule 6). Each principal has its own.
#[derive(Debug, Default)]
pub(super) struct CreateIds(pub(super) BTreeMap<(Arc<str>, CreateId), Created>);

impl Authority {
    pub(super) fn open(
        &mut self,
        now: Timestamp,
        asker: Asker,
        request: control::Open,
        fresh: Fresh,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let session = self.sessions.get(asker.session).ok_or_else(|| refusal(Status::SessionGone, ""))?;
        let principal = session.principal.clone();
        self.know_all_bindings()?;
        let changes = request.access.contains(Access::WRITE)
            || request.access.contains(Access::DELETE)
            || request.disposition.creates()
            || request.disposition.truncates();
        let right = if changes { Right::ReadWrite } else { Right::Read };
        let (rules, path) = self.volumes.place(&principal, &request.place, right)?;
        let (volume, policy) = (rules.id, rules.policy);
        if path.is_root() {
            return Err(refusal(Status::IsDirectory, ""));
        }
        if request.disposition.truncates() && !request.access.contains(Access::WRITE) {
            return Err(refusal(Status::AccessDenied, "to overwrite, the open must want write access"));
        }

        let create_key = (principal.clone(), request.create_id);
        if let Some(created) = self.create_ids.0.get(&create_key) {
            return match created {
                Created::Opening(operation) => {
                    let operation = *operation;
                    self.wait_for_opening(asker, operation, &request)
                }
                Created::Open(_, first) if **first != request => Err(refusal(Status::DuplicateCreate, "")),
                Created::Open(id, _) => {
                    let id = *id;
                    self.replay(now, asker, id, fresh, effects)
                }
            };
        }

        let opens = session.opens.len() + session.opening;
        if opens >= self.limits.opens_per_session
            || self.sessions.share(&principal).opens >= self.limits.opens_per_principal
            || self.create_ids.0.len() >= self.limits.opens
        {
            return Err(refusal(Status::TooMany, "no room for another open"));
        }
        let opening = Opening {
            principal: principal.clone(),
            session: asker.session,
            volume,
            policy,
            waiters: vec![asker],
            fresh,
            request: request.clone(),
        };
        let operation = self.start(asker, Stage::Opening(Box::new(opening)))?;
        self.create_ids.0.insert(create_key, Created::Opening(operation));
        self.sessions.count(&principal, |share| share.opens += 1);
        if let Some(session) = self.sessions.get_mut(asker.session) {
            session.opening += 1;
        }
        effects.push(Effect::OpenFile {
            operation,
            file: FileId(operation.0),
            at: Located { volume, path },
            access: request.access,
            disposition: request.disposition,
            mode: request.mode & 0o777,
            follow: true,
        });
        Ok(())
    }

    /// The request is repeated while its first is still under way.
    fn wait_for_opening(
        &mut self,
        asker: Asker,
        operation: OperationId,
        request: &control::Open,
    ) -> Result<(), Refusal> {
        let under_way = self.operations.get_mut(operation).map(|operation| &mut operation.stage);
        let Some(Stage::Opening(opening) | Stage::Truncating(opening, ..)) = under_way else {
            return Err(refusal(Status::Internal, ""));
        };
        if opening.request != *request {
            return Err(refusal(Status::DuplicateCreate, ""));
        }
        if opening.waiters.len() >= WAITERS_MAX {
            return Err(refusal(Status::TooMany, "the request has been repeated too often"));
        }
        opening.waiters.push(asker);
        Ok(())
    }

    /// The request is repeated after it was answered: the same open. If it comes from a later session of the
    /// principal, the open and its secret move there, and the earlier session ends: its client is not coming back, or
    /// is being replaced. What was bound with the earlier secret is fenced before the answer.
    fn replay(
        &mut self,
        now: Timestamp,
        asker: Asker,
        id: OpenId,
        fresh: Fresh,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let limit = self.limits.opens_per_session;
        let Some(open) = self.opens.get_mut(id).filter(|open| matches!(open.life, Life::Active)) else {
            return Err(refusal(Status::Closed, "the open of this create id is closing"));
        };
        let before = open.session;
        let room = self.sessions.get(asker.session).is_some_and(|s| s.opens.len() + s.opening < limit);
        if before != asker.session && !room {
            return Err(refusal(Status::TooMany, "no room for another open"));
        }
        let operation = self.start(asker, Stage::Replaying(id, Box::new(fresh)))?;
        let Some(open) = self.opens.get_mut(id) else { return Ok(()) };
        open.works += 1;
        open.replays.push(operation);
        if before != asker.session {
            let Some(session) = self.sessions.get_mut(asker.session) else { return Ok(()) };
            session.opens.insert(id);
            open.secret = session.key.bind_secret(id);
            open.session = asker.session;
            if let Some(session) = self.sessions.get_mut(before) {
                session.opens.remove(&id);
            }
            effects.push(Effect::Disconnect(before));
            self.lose_session(now, before, effects);
            self.fence(now, id, Status::SessionGone, effects);
        }
        self.go_on_replaying(id, effects);
        Ok(())
    }

    /// The shell has opened the file, or not.
    pub(super) fn file_opened(
        &mut self,
        id: OperationId,
        result: Result<FileOpened, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(Operation { asker, principal, stage }) = self.operations.remove(id) else { return };
        let file = FileId(id.0);
        let opening = match stage {
            Stage::Opening(opening) => opening,
            Stage::OpeningForChange(changes) => {
                return self.opened_for_change(id, asker, principal, changes, result, effects);
            }
            stage => return self.operations.insert(id, Operation { asker, principal, stage }),
        };
        let FileOpened { identity, attributes, created, .. } = match result {
            Ok(opened) => opened,
            Err(refused) => return self.give_up(*opening, &refused, effects),
        };
        let (access, share) = (opening.request.access, opening.request.share);
        if !self.shares.admits(identity, access, share) {
            effects.push(Effect::CloseFile(file));
            return self.give_up(*opening, &refusal(Status::ShareConflict, ""), effects);
        }
        self.shares.enter(identity, access, share);
        let wanted = opening.waiters.iter().any(|waiter| self.sessions.get(waiter.session).is_some());
        if wanted && opening.request.disposition.truncates() && !created {
            let changes = Changes { size: Some(0), ..Changes::default() };
            let stage = Stage::Truncating(opening, file, identity);
            self.operations.insert(id, Operation { asker, principal, stage });
            let work = Work::SetAttributes(Subject::File(file), changes);
            effects.push(Effect::Perform { operation: id, work });
        } else {
            self.finish_open(*opening, file, identity, attributes, created, effects);
        }
    }

    pub(super) fn truncated(
        &mut self,
        opening: Opening,
        file: FileId,
        identity: FileIdentity,
        result: Result<Reply, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let refused = match result {
            Ok(Reply::Attributes(attributes)) => {
                return self.finish_open(opening, file, identity, attributes, false, effects);
            }
            Ok(_) => refusal(Status::Internal, ""),
            Err(refused) => refused,
        };
        self.shares.leave(identity, opening.request.access, opening.request.share);
        effects.push(Effect::CloseFile(file));
        self.give_up(opening, &refused, effects);
    }

    /// The request fails: everything counted for it is given back. Its descriptor and claim are gone already.
    fn give_up(&mut self, opening: Opening, refused: &Refusal, effects: &mut Vec<Effect>) {
        self.create_ids.0.remove(&(opening.principal.clone(), opening.request.create_id));
        self.sessions.count(&opening.principal, |share| share.opens -= 1);
        if let Some(session) = self.sessions.get_mut(opening.session) {
            session.opening -= 1;
        }
        for waiter in opening.waiters {
            waiter.refuse(refused.clone(), effects);
        }
    }

    fn finish_open(
        &mut self,
        mut opening: Opening,
        file: FileId,
        identity: FileIdentity,
        attributes: Attributes,
        created: bool,
        effects: &mut Vec<Effect>,
    ) {
        let (access, share) = (opening.request.access, opening.request.share);
        let id = OpenId::from_random(opening.fresh.open);
        // The last to repeat the request is the one whose connection still works.
        opening.waiters.retain(|waiter| self.sessions.get(waiter.session).is_some());
        let owner = opening.waiters.last().copied();
        let session = owner.and_then(|owner| self.sessions.get_mut(owner.session));
        let (Some(owner), Some(session), true) = (owner, session, self.opens.get(id).is_none()) else {
            self.shares.leave(identity, access, share);
            effects.push(Effect::CloseFile(file));
            return self.give_up(opening, &refusal(Status::Internal, ""), effects);
        };
        session.opens.insert(id);
        let open = Open {
            session: owner.session,
            principal: opening.principal.clone(),
            process: session.process,
            create_id: opening.request.create_id,
            volume: opening.volume,
            policy: opening.policy,
            file,
            identity,
            access,
            share,
            created,
            opened_ms: opening.fresh.wall_ms,
            handle: HandleId::from_random(opening.fresh.handle),
            challenge: opening.fresh.challenge,
            secret: session.key.bind_secret(id),
            epoch: 1,
            bindings: BTreeMap::new(),
            works: 0,
            replays: Vec::new(),
            life: Life::Active,
        };
        self.opens.insert(id, open);
        if let Some(first) = self.sessions.get_mut(opening.session) {
            first.opening -= 1;
        }
        let create_key = (opening.principal, opening.request.create_id);
        self.create_ids.0.insert(create_key, Created::Open(id, Box::new(opening.request)));
        for waiter in opening.waiters {
            self.answer_opened(waiter, id, attributes.clone(), &opening.fresh, effects);
        }
    }

    pub(super) fn answer_opened(
        &self,
        asker: Asker,
        id: OpenId,
        attributes: Attributes,
        fresh: &Fresh,
        effects: &mut Vec<Effect>,
    ) {
        let Some(open) = self.opens.get(id).filter(|open| matches!(open.life, Life::Active)) else {
            return asker.refuse(refusal(Status::Closed, ""), effects);
        };
        let opened = Opened {
            open: id,
            handle: open.handle,
            access: open.access,
            created: open.created,
            hold_ms: 0,
            attributes,
            key: self.key_grant(id, open, fresh),
            class: crate::types::HoldClass::Hold,
            epoch: open.epoch,
        };
        asker.answer(Reply::Opened(opened), effects);
    }

    pub(super) fn query_key(
        &mut self,
        asker: Asker,
        id: OpenId,
        fresh: &Fresh,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.own(asker, id)?;
        let grant = self.key_grant(id, self.owned(asker, id)?, fresh);
        asker.answer(Reply::Key(grant), effects);
        Ok(())
    }

    fn key_grant(&self, id: OpenId, open: &Open, fresh: &Fresh) -> KeyGrant {
        let key = ResumeKey {
            cluster: self.keyring.cluster(),
            volume: open.volume,
            open: id,
            opened_ms: open.opened_ms,
            process: open.process,
        };
        KeyGrant {
            resume_key: self.keyring.seal(&key, fresh.nonce),
            service_blob: self.service_blob.clone().unwrap_or_default(),
            challenge: open.challenge,
            volume: open.volume,
            policy: open.policy,
        }
    }
}

impl Open {
    /// True if a binding that is still there was granted for this very transcript.
    pub(super) fn has_seen(&self, transcript: &[u8; 32]) -> bool {
        self.bindings.values().any(|Binding { transcript: seen, .. }| seen == transcript)
    }
}
