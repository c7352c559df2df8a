//! Operations under way in the file system, and what is to happen when they end.

use super::open::Opening;
use super::table::FileId;
use super::{Asker, Authority, Changes, Effect, FileIdentity, Fresh, Work, names::NameChange, refusal};
use crate::types::{Access, OpenId, ShareMode, Status};
use crate::wire::control::{Refusal, Reply};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Names one operation under way; never used twice while control runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OperationId(pub u64);

/// Access and share mode of an operation that acts like an open for a moment.
pub(super) type Claim = (FileIdentity, Access, ShareMode);

/// How far an operation has come, and so what its next answer means.
#[derive(Debug)]
pub(super) enum Stage {
    /// Only its answer counts.
    Plain,
    /// Work on an open, which does not close before it ends.
    OnOpen(OpenId),
    /// A repeated open request waits for the file's attributes.
    Replaying(OpenId, Box<Fresh>),
    /// The file of an open request is being opened.
    Opening(Box<Opening>),
    /// It is open and claimed; its old content is being discarded.
    Truncating(Box<Opening>, FileId, FileIdentity),
    /// A file is being opened for a change of its attributes by name.
    OpeningForChange(Changes),
    /// The change is being made.
    Changing(FileId, Claim),
    /// It is being found out which files are concerned.
    Resolving(NameChange),
    /// Names are being changed.
    ChangingNames(Vec<Claim>),
}

#[derive(Debug)]
pub(super) struct Operation {
    pub(super) asker: Asker,
    /// Whose share of the room it takes, whatever becomes of the session.
    pub(super) principal: Arc<str>,
    pub(super) stage: Stage,
}

#[derive(Debug, Default)]
pub(super) struct Operations {
    under_way: BTreeMap<OperationId, Operation>,
    /// How many each principal has; those without any are left out.
    pub(super) principals: BTreeMap<Arc<str>, usize>,
    last: u64,
}

impl Operations {
    pub(super) fn len(&self) -> usize {
        self.under_way.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Operation> {
        self.under_way.values()
    }

    pub(super) fn get_mut(&mut self, id: OperationId) -> Option<&mut Operation> {
        self.under_way.get_mut(&id)
    }

    pub(super) fn next_id(&mut self) -> OperationId {
        self.last += 1;
        OperationId(self.last)
    }

    /// How many a principal has under way.
    fn share(&self, principal: &str) -> usize {
        self.principals.get(principal).copied().unwrap_or(0)
    }

    pub(super) fn insert(&mut self, id: OperationId, operation: Operation) {
        *self.principals.entry(operation.principal.clone()).or_default() += 1;
        self.under_way.insert(id, operation);
    }

    pub(super) fn remove(&mut self, id: OperationId) -> Option<Operation> {
        let operation = self.under_way.remove(&id)?;
        if let Some(count) = self.principals.get_mut(&operation.principal) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.principals.remove(&operation.principal);
            }
        }
        Some(operation)
    }
}

impl Authority {
    /// Starts an operation, if there is room for one.
    pub(super) fn start(&mut self, asker: Asker, stage: Stage) -> Result<OperationId, Refusal> {
        let session = self.sessions.get(asker.session).ok_or_else(|| refusal(Status::SessionGone, ""))?;
        let principal = session.principal.clone();
        // What one principal asks for, however slow it is, leaves room for the others.
        if self.operations.len() >= self.limits.operations
            || self.operations.share(&principal) >= self.limits.operations_per_principal
        {
            return Err(Refusal {
                retry_ms: Some(100),
                ..refusal(Status::TooMany, "too many operations are under way in the file system")
            });
        }
        let id = self.operations.next_id();
        self.operations.insert(id, Operation { asker, principal, stage });
        Ok(id)
    }

    pub(super) fn perform(
        &mut self,
        asker: Asker,
        work: Work,
        stage: Stage,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let operation = self.start(asker, stage)?;
        effects.push(Effect::Perform { operation, work });
        Ok(())
    }

    /// Work on a live open: it keeps the open from closing until it ends.
    pub(super) fn perform_on(&mut self, asker: Asker, open: OpenId, work: Work, effects: &mut Vec<Effect>) {
        match self.perform(asker, work, Stage::OnOpen(open), effects) {
            Ok(()) => {
                if let Some(open) = self.opens.get_mut(open) {
                    open.works += 1;
                }
            }
            Err(refused) => asker.refuse(refused, effects),
        }
    }

    pub(super) fn performed(
        &mut self,
        id: OperationId,
        result: Result<Reply, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(Operation { asker, principal, stage }) = self.operations.remove(id) else { return };
        match stage {
            Stage::Truncating(opening, file, identity) => {
                self.truncated(*opening, file, identity, result, effects);
                return;
            }
            Stage::Replaying(open, fresh) => {
                match result {
                    Ok(Reply::Attributes(attributes)) => {
                        self.answer_opened(asker, open, attributes, &fresh, effects);
                    }
                    Ok(_) => asker.refuse(refusal(Status::Internal, ""), effects),
                    Err(refused) => asker.refuse(refused, effects),
                }
                self.end_work(open, effects);
                return;
            }
            Stage::ChangingNames(claims) => {
                for (file, access, share) in claims {
                    self.shares.leave(file, access, share);
                }
            }
            Stage::Changing(file, (identity, access, share)) => {
                self.shares.leave(identity, access, share);
                effects.push(Effect::CloseFile(file));
            }
            Stage::OnOpen(open) => self.end_work(open, effects),
            Stage::Plain => {}
            // An answer that does not fit the question: the shell's bug. The operation goes on.
            stage @ (Stage::Opening(_) | Stage::OpeningForChange(_) | Stage::Resolving(_)) => {
                self.operations.insert(id, Operation { asker, principal, stage });
                return;
            }
        }
        match result {
            Ok(reply) => asker.answer(reply, effects),
            Err(refused) => asker.refuse(refused, effects),
        }
    }

    fn end_work(&mut self, open: OpenId, effects: &mut Vec<Effect>) {
        if let Some(record) = self.opens.get_mut(open) {
            record.works = record.works.saturating_sub(1);
            self.finish_close(open, effects);
        }
    }
}
