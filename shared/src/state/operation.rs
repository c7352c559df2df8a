//! Operations under way in the file system, and what is to happen when they end.

use super::open::Opening;
use super::resume::ReplayOf;
use super::table::FileId;
use super::{
    Asker, Authority, Changes, Effect, FileIdentity, Fresh, Inspected, Located, Work, names::NameChange,
    refusal,
};
use crate::types::{Access, Evidence, GoneReason, OpenId, ShareMode, Status};
use crate::wire::control::{Attributes, Refusal, Reply};
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
    /// The same, and it changes the file.
    Altering(OpenId),
    /// A repeated open request waits for the file's attributes.
    Replaying(ReplayOf, Box<Fresh>),
    /// The file of an open request is being opened.
    Opening(Box<Opening>),
    /// The open is there; its file's old content is being discarded. Who waits for the answer.
    Truncating(OpenId, Vec<Asker>, Box<Fresh>),
    /// A file is being opened for a change of its attributes by name.
    OpeningForChange(Changes, Box<crate::wire::control::SetAttributes>),
    /// The change is being made.
    Changing(FileId, Claim),
    /// It is being found out which files are concerned.
    Resolving(NameChange),
    /// Names are being changed; of a rename, from where to where.
    ChangingNames(Vec<Claim>, Option<(Located, Located)>),
    /// The baseline of a detached open is being taken.
    Baseline(OpenId),
    /// A resume wants to know how the file looks.
    Resuming(OpenId),
    /// A late resume wants to know how the file looks.
    LateResume { reason: GoneReason, evidence: Evidence, journalled: u64 },
    /// The last look at the file before the open's tombstone.
    LastLook(OpenId),
    /// The name is being removed, as an open that ends had asked.
    Removing(OpenId),
}

#[derive(Debug)]
pub(super) struct Operation {
    pub(super) asker: Asker,
    /// Whose share of the room it takes, whatever becomes of the session; `None` for what nobody asked for: there is one
    /// of each kind for an open at most.
    pub(super) principal: Option<Arc<str>>,
    pub(super) stage: Stage,
}

#[derive(Debug, Default)]
pub(super) struct Operations {
    under_way: BTreeMap<OperationId, Operation>,
    /// How many each principal has; those without any are left out.
    pub(super) principals: BTreeMap<Arc<str>, usize>,
    /// How many were asked for.
    pub(super) asked: usize,
    last: u64,
}

impl Operations {
    pub(super) fn len(&self) -> usize {
        self.under_way.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (OperationId, &Operation)> {
        self.under_way.iter().map(|(id, operation)| (*id, operation))
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
        if let Some(principal) = &operation.principal {
            *self.principals.entry(principal.clone()).or_default() += 1;
            self.asked += 1;
        }
        self.under_way.insert(id, operation);
    }

    pub(super) fn remove(&mut self, id: OperationId) -> Option<Operation> {
        let operation = self.under_way.remove(&id)?;
        if let Some(principal) = &operation.principal {
            self.asked = self.asked.saturating_sub(1);
            if let Some(count) = self.principals.get_mut(principal) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.principals.remove(principal);
                }
            }
        }
        Some(operation)
    }
}

impl Stage {
    /// What the operation claims for its moment.
    pub(super) fn claims(&self) -> &[Claim] {
        match self {
            Self::Changing(_, claim) => std::slice::from_ref(claim),
            Self::ChangingNames(claims, _) => claims,
            _ => &[],
        }
    }

    /// The open that does not close before the operation ends.
    pub(super) fn works_on(&self) -> Option<OpenId> {
        match self {
            Self::OnOpen(open)
            | Self::Altering(open)
            | Self::Replaying(ReplayOf(open), _)
            | Self::Truncating(open, ..)
            | Self::Baseline(open)
            | Self::Resuming(open)
            | Self::LastLook(open)
            | Self::Removing(open) => Some(*open),
            _ => None,
        }
    }
}

impl Authority {
    /// Starts an operation, if there is room for one.
    pub(super) fn start(&mut self, asker: Asker, stage: Stage) -> Result<OperationId, Refusal> {
        let session = self.sessions.get(asker.session).ok_or_else(|| refusal(Status::SessionGone, ""))?;
        let principal = session.principal.clone();
        // What one principal asks for, however slow it is, leaves room for the others.
        if self.operations.asked >= self.limits.operations
            || self.operations.share(&principal) >= self.limits.operations_per_principal
        {
            return Err(Refusal {
                retry_ms: Some(100),
                ..refusal(Status::TooMany, "too many operations are under way in the file system")
            });
        }
        let id = self.operations.next_id();
        self.operations.insert(id, Operation { asker, principal: Some(principal), stage });
        Ok(id)
    }

    /// Starts an operation on an open that nobody asked for.
    pub(super) fn start_own(&mut self, open: OpenId, stage: Stage) -> OperationId {
        let id = self.operations.next_id();
        self.operations.insert(id, Operation { asker: Asker::NOBODY, principal: None, stage });
        self.begin_work(open);
        id
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

    /// Work on a live open that changes nothing: it keeps the open from closing until it ends.
    pub(super) fn perform_on(
        &mut self,
        asker: Asker,
        open: OpenId,
        work: Work,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.perform(asker, work, Stage::OnOpen(open), effects)?;
        self.begin_work(open);
        Ok(())
    }

    pub(super) fn begin_work(&mut self, open: OpenId) {
        if let Some(open) = self.opens.get_mut(open) {
            open.works += 1;
        }
    }

    pub(super) fn end_work(&mut self, open: OpenId, effects: &mut Vec<Effect>) {
        if let Some(record) = self.opens.get_mut(open) {
            record.works = record.works.saturating_sub(1);
            self.go_on(open, effects);
        }
    }

    pub(super) fn performed(
        &mut self,
        id: OperationId,
        result: Result<Reply, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(Operation { asker, principal, stage }) = self.operations.remove(id) else { return };
        let (reply, worked_on) = match stage {
            Stage::Truncating(open, askers, fresh) => {
                self.truncated(open, askers, &fresh, attributes_of(result), effects);
                (None, Some(open))
            }
            Stage::Replaying(ReplayOf(open), fresh) => {
                match attributes_of(result) {
                    Ok(attributes) => self.answer_opened(asker, open, attributes, &fresh, effects),
                    Err(refused) => asker.refuse(refused, effects),
                }
                (None, Some(open))
            }
            Stage::ChangingNames(claims, moved) => {
                self.drop_claims(&claims);
                match (result, claims.first(), moved) {
                    (Ok(reply), Some((file, ..)), Some((from, to))) => {
                        self.move_removal(*file, &from, to, effects);
                        self.defer_all(asker.effect(reply), effects);
                        (None, None)
                    }
                    (result, ..) => (Some(result), None),
                }
            }
            Stage::Changing(file, claim) => {
                self.drop_claims(&[claim]);
                effects.push(Effect::CloseFile(file));
                (Some(result), None)
            }
            Stage::Altering(open) => {
                self.altered(open, &result, effects);
                (Some(result), Some(open))
            }
            Stage::OnOpen(open) => (Some(result), Some(open)),
            Stage::Removing(open) => {
                if let Some(open) = self.opens.get_mut(open) {
                    open.removal = super::table::Step::Done;
                }
                (None, Some(open))
            }
            Stage::Plain => (Some(result), None),
            // An answer that does not fit the question: the shell's bug. The operation goes on.
            stage @ (Stage::Opening(_)
            | Stage::OpeningForChange(..)
            | Stage::Resolving(_)
            | Stage::Baseline(_)
            | Stage::Resuming(_)
            | Stage::LateResume { .. }
            | Stage::LastLook(_)) => {
                self.operations.insert(id, Operation { asker, principal, stage });
                return;
            }
        };
        match reply {
            Some(Ok(reply)) => asker.answer(reply, effects),
            Some(Err(refused)) => asker.refuse(refused, effects),
            None => {}
        }
        self.operation_over(id, effects);
        if let Some(open) = worked_on {
            self.end_work(open, effects);
        }
    }

    /// An open's own change through control: what the file looks like now is its own doing, after a crash, too.
    fn altered(&mut self, id: OpenId, result: &Result<Reply, Refusal>, effects: &mut Vec<Effect>) {
        let Ok(Reply::Attributes(attributes)) = result else { return };
        let Some(open) = self.opens.get_mut(id).filter(|open| open.is_active()) else { return };
        open.evidence = evidence_of(attributes);
        if !self.journal.full {
            self.persist_open(id, effects);
        }
    }

    fn drop_claims(&mut self, claims: &[Claim]) {
        for (file, access, share) in claims {
            self.shares.leave(*file, *access, *share);
            self.changed.insert(*file);
        }
    }

    pub(super) fn inspected(
        &mut self,
        id: OperationId,
        result: Result<Option<Inspected>, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(Operation { asker, principal, stage }) = self.operations.remove(id) else { return };
        let open = match stage {
            Stage::Baseline(open) => {
                self.baseline_seen(open, result, effects);
                open
            }
            Stage::Resuming(open) => {
                self.resume_seen(open, id, result, effects);
                open
            }
            Stage::LastLook(open) => {
                self.last_look_seen(open, result);
                open
            }
            Stage::LateResume { reason, evidence, journalled } => {
                return self.late_resume_seen(asker, (reason, evidence, journalled), result, effects);
            }
            stage => return self.operations.insert(id, Operation { asker, principal, stage }),
        };
        self.end_work(open, effects);
    }
}

/// The evidence that attributes hold.
pub(super) fn evidence_of(attributes: &Attributes) -> Evidence {
    let nanos = |time: crate::types::FileTime| {
        time.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(time.nanos))
    };
    Evidence {
        changed_ns: nanos(attributes.changed),
        modified_ns: nanos(attributes.modified),
        size: attributes.size,
    }
}

fn attributes_of(result: Result<Reply, Refusal>) -> Result<Attributes, Refusal> {
    match result? {
        Reply::Attributes(attributes) => Ok(attributes),
        _ => Err(refusal(Status::Internal, "")),
    }
}
