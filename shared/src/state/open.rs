//! Opening a file: from the request to the answer with its resume key.
//!
//! ```text
//!  request ─► rights, limits, create id ─► OpenFile ─► who is in the way? ─► Opened journalled ─► truncated, if asked ─► answer
//!                      │                                   │
//!                      └► the same request again: the      └► CloseFile; refused, or asked again later: the file
//!                         same open (rule 6)                  is as it was
//! ```

use super::contend::{ContenderId, Contending, Judged};
use super::operation::{Operation, OperationId, Stage};
use super::resume::ReplayOf;
use super::rules::{LockMode, Right};
use super::table::{Ending, FileId, Life, Open};
use super::{Asker, Authority, Changes, Effect, FileOpened, Fresh, Located, Subject, Work, refusal};
use crate::auth::{MacPolicy, ResumeKey};
use crate::journal::record::{OpenRecord, Record};
use crate::types::{Access, ByteRange, CreateId, GoneReason, HandleId, OpenId, SessionId, Status, Timestamp};
use crate::wire::control::{self, Attributes, KeyGrant, Opened, Refusal, Reply};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Repeats of one request that may wait for its answer at once.
const WAITERS_MAX: usize = 8;

/// An open request under way.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) request: control::Open,
    pub(super) principal: Arc<str>,
    /// The session it counts against.
    pub(super) session: SessionId,
    pub(super) at: Located,
    policy: MacPolicy,
    lock_mode: LockMode,
    hold_ms: u64,
    /// How long it waits for opens that are held.
    wait_until: Option<Timestamp>,
    /// Until when it waits at the longest for those that it evicts: counted from the first.
    pub(super) evicts_until: Option<Timestamp>,
    /// The request itself and its repeats.
    pub(super) waiters: Vec<Asker>,
    fresh: Fresh,
}

/// What a create id stands for.
#[derive(Debug)]
pub(super) enum Created {
    Opening(OperationId),
    Waiting(ContenderId),
    Open(OpenId),
}

/// The create ids of all opens and of those being made (rule 6). Each principal has its own.
#[derive(Debug, Default)]
pub(super) struct CreateIds(pub(super) BTreeMap<(Arc<str>, CreateId), Created>);

/// Has the shell open the file of a request.
pub(super) fn open_file(
    operation: OperationId,
    file: FileId,
    at: Located,
    request: &control::Open,
) -> Effect {
    Effect::OpenFile {
        operation,
        file,
        at,
        access: request.access,
        disposition: request.disposition,
        mode: request.mode & 0o777,
        follow: true,
    }
}

impl Authority {
    pub(super) fn open(
        &mut self,
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
        let (policy, lock_mode) = (rules.policy, rules.lock_mode);
        let hold_ms = request.hold_ms.unwrap_or(rules.hold_default_ms).min(rules.hold_max_ms);
        let at = Located { volume: rules.id, path };
        if at.path.is_root() {
            return Err(refusal(Status::IsDirectory, ""));
        }
        if request.disposition.truncates() && !request.access.contains(Access::WRITE) {
            return Err(refusal(Status::AccessDenied, "to overwrite, the open must want write access"));
        }
        if request.delete_on_close && !request.access.contains(Access::DELETE) {
            return Err(refusal(
                Status::AccessDenied,
                "to delete on close, the open must want delete access",
            ));
        }

        let create_key = (principal.clone(), request.create_id);
        match self.create_ids.0.get(&create_key) {
            None => {}
            Some(Created::Open(id)) => return self.replay(asker, *id, &request, fresh, effects),
            Some(_) => return self.wait_for_opening(asker, &create_key, &request),
        }

        self.have_room()?;
        let opens = session.opens.len() + session.opening + session.resuming.len();
        if opens >= self.limits.opens_per_session || self.create_ids.0.len() >= self.limits.opens {
            return Err(refusal(Status::TooMany, "no room for another open"));
        }
        self.make_room_for(&principal, effects)?;
        let wait = request.wait_ms.map(|ms| Duration::from_millis(ms).min(self.limits.open_wait_max));
        let opening = Opening {
            principal: principal.clone(),
            session: asker.session,
            at: at.clone(),
            policy,
            lock_mode,
            hold_ms,
            wait_until: wait.map(|wait| self.now.saturating_add(wait)),
            evicts_until: None,
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
        effects.push(open_file(operation, FileId(operation.0), at, &request));
        Ok(())
    }

    /// A principal that has all the opens it may have makes room with its own oldest expired one, never with another's.
    fn make_room_for(&mut self, principal: &Arc<str>, effects: &mut Vec<Effect>) -> Result<(), Refusal> {
        if self.sessions.share(principal).opens < self.limits.opens_per_principal {
            return Ok(());
        }
        let full = refusal(Status::TooMany, "no room for another open");
        let later = Refusal { retry_ms: Some(100), ..full.clone() };
        if self.opens.is_making_room(principal) {
            return Err(later);
        }
        let Some(oldest) = self.opens.oldest_expired(principal, self.now) else { return Err(full) };
        self.end(oldest, None, Ending::Gone(GoneReason::Evicted), Status::Evicted, effects);
        if self.sessions.share(principal).opens < self.limits.opens_per_principal {
            return Ok(());
        }
        Err(later)
    }

    /// The request is repeated while its first is still under way.
    fn wait_for_opening(
        &mut self,
        asker: Asker,
        key: &(Arc<str>, CreateId),
        request: &control::Open,
    ) -> Result<(), Refusal> {
        let opening = match self.create_ids.0.get(key) {
            Some(Created::Opening(operation)) => {
                match self.operations.get_mut(*operation).map(|operation| &mut operation.stage) {
                    Some(Stage::Opening(opening)) => Some(opening),
                    _ => None,
                }
            }
            Some(Created::Waiting(contender)) => {
                match self.contenders.get_mut(*contender).map(|contender| &mut contender.what) {
                    Some(Contending::Open(opening)) => Some(opening),
                    _ => None,
                }
            }
            _ => None,
        };
        let opening = opening.ok_or_else(|| refusal(Status::Internal, ""))?;
        if opening.request != *request {
            return Err(refusal(Status::DuplicateCreate, ""));
        }
        join(&mut opening.waiters, asker)
    }

    /// An open request waits for a detached open to go: it is found there when it is repeated.
    pub(super) fn opening_waits(&mut self, opening: &Opening, contender: ContenderId) {
        let key = (opening.principal.clone(), opening.request.create_id);
        self.create_ids.0.insert(key, Created::Waiting(contender));
    }

    /// The request is repeated after the open was made. From the same session: the same answer. From a later session of
    /// the principal: it takes the open over, as a resume does that names the session.
    fn replay(
        &mut self,
        asker: Asker,
        id: OpenId,
        request: &control::Open,
        fresh: Fresh,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let Some(open) = self.opens.get(id) else { return Err(refusal(Status::Internal, "")) };
        if *open.request != *request {
            return Err(refusal(Status::DuplicateCreate, ""));
        }
        if open.is_closing() {
            return Err(refusal(Status::Closed, "the open of this create id is closing"));
        }
        if open.session != Some(asker.session) {
            let supersede = open.session;
            return self.begin_resume(asker, id, supersede, Vec::new(), fresh, true, effects);
        }
        if let Some(operation) = open.making {
            return match self.operations.get_mut(operation).map(|operation| &mut operation.stage) {
                Some(Stage::Truncating(_, waiters, _)) => join(waiters, asker),
                _ => Err(refusal(Status::Internal, "")),
            };
        }
        let subject = Subject::File(open.file);
        let stage = Stage::Replaying(ReplayOf(id), Box::new(fresh));
        self.perform(asker, Work::Attributes(subject), stage, effects)?;
        self.begin_work(id);
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
            Stage::OpeningForChange(changes, request) => {
                return self.opened_for_change(id, asker, principal, (changes, *request), result, effects);
            }
            stage => return self.operations.insert(id, Operation { asker, principal, stage }),
        };
        let opened = match result {
            Ok(opened) => opened,
            Err(refused) => return self.give_up(*opening, &refused, effects),
        };
        let refused = if !opening.waiters.iter().any(|waiter| self.is_there(*waiter)) {
            Some(refusal(Status::SessionGone, ""))
        } else {
            self.have_room().err()
        };
        if let Some(refused) = refused {
            effects.push(Effect::CloseFile(file));
            return self.give_up(*opening, &refused, effects);
        }
        let truncates = opening.request.disposition.truncates() && !opened.created;
        let (judged, live) = self.judge_opening(&opening, &opened, truncates);
        if judged == Judged::Free {
            return self.admit(*opening, file, opened, truncates, effects);
        }
        effects.push(Effect::CloseFile(file));
        let wait_until = opening.wait_until;
        self.contend(judged, opened.identity, wait_until, Contending::Open(opening), live, effects);
    }

    /// Who is in the way, and what the request is refused with if somebody live is.
    fn judge_opening(&self, opening: &Opening, opened: &FileOpened, truncates: bool) -> (Judged, Status) {
        let (access, share) = (opening.request.access, opening.request.share);
        let judged = self.judge_claim(opened.identity, access, share);
        if judged != Judged::Free || !truncates {
            return (judged, Status::ShareConflict);
        }
        let all = ByteRange::new(0, opened.attributes.size.min(ByteRange::END_MAX));
        let judged = all.map_or(Judged::Free, |all| self.judge_size(opened.identity, None, all));
        (judged, Status::LockConflict)
    }

    /// The request fails: everything counted for it is given back. Its descriptor is gone already.
    pub(super) fn give_up(&mut self, opening: Opening, refused: &Refusal, effects: &mut Vec<Effect>) {
        self.create_ids.0.remove(&(opening.principal.clone(), opening.request.create_id));
        self.sessions.count(&opening.principal, |share| share.opens -= 1);
        for waiter in opening.waiters {
            waiter.refuse(refused.clone(), effects);
        }
        self.opening_over(opening.session, effects);
    }

    fn opening_over(&mut self, session: SessionId, effects: &mut Vec<Effect>) {
        if let Some(session) = self.sessions.get_mut(session) {
            session.opening = session.opening.saturating_sub(1);
        }
        self.finish_logoff(session, effects);
    }

    /// Nobody is in the way: the open is made, journalled, and answered; its file truncated before, if asked.
    fn admit(
        &mut self,
        mut opening: Opening,
        file: FileId,
        opened: FileOpened,
        truncates: bool,
        effects: &mut Vec<Effect>,
    ) {
        let id = OpenId::from_random(opening.fresh.open);
        // The last to repeat the request is the one whose connection still works.
        opening.waiters.retain(|waiter| self.is_there(*waiter));
        let owner = opening.waiters.last().copied();
        let fresh_id = self.opens.get(id).is_none() && self.tombstones.get(id).is_none();
        let session = owner.and_then(|owner| self.sessions.get_mut(owner.session));
        let (Some(owner), Some(session), true) = (owner, session, fresh_id) else {
            effects.push(Effect::CloseFile(file));
            return self.give_up(opening, &refusal(Status::Internal, ""), effects);
        };
        let FileOpened { identity, attributes, created, file_handle, evidence } = opened;
        let (access, share) = (opening.request.access, opening.request.share);
        session.opens.insert(id);
        let secret = session.key.bind_secret(id);
        let open = Open {
            session: Some(owner.session),
            principal: opening.principal.clone(),
            process: opening.request.process.unwrap_or(session.process),
            at: opening.at,
            lock_mode: opening.lock_mode,
            policy: opening.policy,
            file,
            identity,
            file_handle,
            created,
            opened_ms: opening.fresh.wall_ms,
            handle: HandleId::from_random(opening.fresh.handle),
            challenge: opening.fresh.challenge,
            sealed_secret: self.keyring.seal_secret(id, &secret, opening.fresh.secret_nonce),
            secret,
            epoch: 1,
            hold_ms: opening.hold_ms,
            bindings: BTreeMap::new(),
            kept: Vec::new(),
            works: 0,
            making: None,
            truncating: truncates,
            evidence,
            baseline: false,
            marked: false,
            unheard: false,
            lapsed: false,
            untold: false,
            looking: false,
            last_look: Default::default(),
            removal: Default::default(),
            journalled: 0,
            executed: Default::default(),
            rules: Default::default(),
            reopened: None,
            life: Life::Active,
            request: Box::new(opening.request),
        };
        let create_key = (opening.principal, open.request.create_id);
        self.create_ids.0.insert(create_key, Created::Open(id));
        self.shares.enter(identity, access, share);
        self.opens.insert(id, open);
        if self.ruled.contains(&identity) {
            // It comes under the locks that are there already.
            self.changed.insert(identity);
        }
        if truncates || access.contains(Access::WRITE) {
            self.mark_others(identity, Some(id), effects);
        }
        self.persist_open(id, effects);
        if truncates {
            let stage = Stage::Truncating(id, opening.waiters, Box::new(opening.fresh));
            let operation = self.start_own(id, stage);
            if let Some(open) = self.opens.get_mut(id) {
                open.making = Some(operation);
            }
            let changes = Changes { size: Some(0), ..Changes::default() };
            let work = Work::SetAttributes(Subject::File(file), changes);
            effects.push(Effect::Perform { operation, work });
        } else {
            for waiter in opening.waiters {
                self.answer_opened(waiter, id, attributes.clone(), &opening.fresh, effects);
            }
        }
        self.opening_over(opening.session, effects);
    }

    /// The whole state of an open, into the journal.
    pub(super) fn persist_open(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        let Some(open) = self.opens.get(id) else { return };
        let record = Record::Opened(Box::new(self.open_record(id, open)));
        let sequence = self.persist(record, effects);
        if let Some(open) = self.opens.get_mut(id) {
            open.journalled = sequence;
        }
    }

    pub(super) fn open_record(&self, id: OpenId, open: &Open) -> OpenRecord {
        OpenRecord {
            open: id,
            principal: open.principal.as_ref().to_owned(),
            process: open.process,
            request: (*open.request).clone(),
            volume: open.at.volume,
            policy: open.policy,
            identity: open.identity,
            file_handle: open.file_handle.clone(),
            created: open.created,
            opened_ms: open.opened_ms,
            challenge: open.challenge,
            sealed_secret: open.sealed_secret.clone(),
            epoch: open.epoch,
            hold_ms: open.hold_ms,
            class: open.class(),
            evidence: open.evidence,
            detached: matches!(open.life, Life::Detached { .. }) && !open.untold,
            baseline: open.baseline,
            marked: open.marked,
            locks: self.locks.locks_of(open.identity, id),
            sequences: open.executed.list(),
            kept: open.kept.clone(),
            unheard: open.unheard,
            lapsed: open.lapsed,
            truncating: open.truncating,
            lock_mode: Some(open.lock_mode),
            remove: self.opens.of_file(open.identity).and_then(|of_file| {
                of_file.remove.as_ref().map(|at| (at.volume, at.path.as_str().to_owned()))
            }),
        }
    }

    /// The old content is discarded, or not; then the open ends again.
    pub(super) fn truncated(
        &mut self,
        id: OpenId,
        waiters: Vec<Asker>,
        fresh: &Fresh,
        result: Result<Attributes, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(open) = self.opens.get_mut(id) {
            open.making = None;
        }
        match result {
            Ok(attributes) => {
                if let Some(open) = self.opens.get_mut(id).filter(|open| !open.is_closing()) {
                    // Its own doing: not to be taken for another's after a crash. That it is done must be known then, too.
                    open.truncating = false;
                    open.evidence = super::operation::evidence_of(&attributes);
                    self.persist_open(id, effects);
                }
                for waiter in waiters {
                    self.answer_opened(waiter, id, attributes.clone(), fresh, effects);
                }
            }
            Err(refused) => {
                self.end(id, None, Ending::Closed, Status::Closed, effects);
                for waiter in waiters {
                    waiter.refuse(refused.clone(), effects);
                }
            }
        }
    }

    pub(super) fn answer_opened(
        &mut self,
        asker: Asker,
        id: OpenId,
        attributes: Attributes,
        fresh: &Fresh,
        effects: &mut Vec<Effect>,
    ) {
        let Some(open) = self.opens.get(id).filter(|open| open.is_active()) else {
            return asker.refuse(refusal(Status::Closed, ""), effects);
        };
        if open.session != Some(asker.session) {
            // The request was repeated in a later session, and the open is that one's.
            return asker.refuse(refusal(Status::Superseded, ""), effects);
        }
        let (journalled, opened) = (open.journalled, self.opened(id, open, attributes, fresh));
        self.defer(journalled, asker.effect(Reply::Opened(opened)), effects);
    }

    pub(super) fn opened(&self, id: OpenId, open: &Open, attributes: Attributes, fresh: &Fresh) -> Opened {
        Opened {
            open: id,
            handle: open.handle,
            access: open.access(),
            created: open.created,
            hold_ms: open.hold_ms,
            attributes,
            key: self.key_grant(id, open, fresh),
            class: open.class(),
            epoch: open.epoch,
        }
    }

    pub(super) fn query_key(
        &mut self,
        asker: Asker,
        id: OpenId,
        fresh: &Fresh,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let open = self.own(asker, id)?;
        let (journalled, grant) = (open.journalled, self.key_grant(id, open, fresh));
        self.defer(journalled, asker.effect(Reply::Key(grant)), effects);
        Ok(())
    }

    fn key_grant(&self, id: OpenId, open: &Open, fresh: &Fresh) -> KeyGrant {
        let key = ResumeKey {
            cluster: self.keyring.cluster(),
            volume: open.volume(),
            open: id,
            opened_ms: open.opened_ms,
            process: open.process,
        };
        KeyGrant {
            resume_key: self.keyring.seal(&key, fresh.nonce),
            service_blob: self.service_blob.clone().unwrap_or_default(),
            challenge: open.challenge,
            volume: open.volume(),
            policy: open.policy,
        }
    }
}

fn join(waiters: &mut Vec<Asker>, asker: Asker) -> Result<(), Refusal> {
    if waiters.len() >= WAITERS_MAX {
        return Err(refusal(Status::TooMany, "the request has been repeated too often"));
    }
    waiters.push(asker);
    Ok(())
}
