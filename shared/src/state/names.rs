//! Changes beside the opens: removing and renaming names, and changing a file's attributes.
//!
//! Each acts like an open for a moment: it claims what it does to the file (`DELETE`, or `WRITE` for a change of
//! size) against the share modes of the opens there are, and while it is under way no open is granted that
//! denies it.
//!
//! ```text
//!  Remove, Rename ─► Resolve: which files? ─► claims ─► Perform, if the names still stand for them ─► answer
//!  size, by name  ─► OpenFile               ─► claim  ─► Perform on the descriptor ─► CloseFile, answer
//! ```

use super::operation::{Claim, Operation, OperationId, Stage};
use super::rules::Right;
use super::table::FileId;
use super::{Asker, Authority, Changes, Effect, FileIdentity, FileOpened, Located, Subject, Work, refusal};
use crate::types::{Access, Disposition, FileTime, ShareMode, Status};
use crate::wire::control::{self, Place, Refusal, Target};
use std::sync::Arc;

/// A change of names that waits to learn which files are concerned.
#[derive(Debug)]
pub(super) enum NameChange {
    Remove(Located),
    Rename { from: Located, to: Located, no_replace: bool },
}

impl Authority {
    pub(super) fn remove(
        &mut self,
        asker: Asker,
        place: &Place,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.know_all_bindings()?;
        let at = self.locate_name(asker, place)?;
        let operation = self.start(asker, Stage::Resolving(NameChange::Remove(at.clone())))?;
        effects.push(Effect::Resolve { operation, names: vec![at] });
        Ok(())
    }

    pub(super) fn rename(
        &mut self,
        asker: Asker,
        rename: &control::Rename,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.know_all_bindings()?;
        let from = self.locate_name(asker, &rename.from)?;
        let to = self.locate_name(asker, &rename.to)?;
        if from.volume != to.volume {
            return Err(refusal(Status::Invalid, "a rename stays within one volume"));
        }
        let names = vec![from.clone(), to.clone()];
        let change = NameChange::Rename { from, to, no_replace: rename.no_replace };
        let operation = self.start(asker, Stage::Resolving(change))?;
        effects.push(Effect::Resolve { operation, names });
        Ok(())
    }

    fn locate_name(&self, asker: Asker, place: &Place) -> Result<Located, Refusal> {
        let at = self.locate(asker, place, Right::ReadWrite)?;
        if at.path.is_root() {
            return Err(refusal(Status::Invalid, "the volume's root stays"));
        }
        Ok(at)
    }

    pub(super) fn names_resolved(
        &mut self,
        id: OperationId,
        result: Result<Vec<Option<FileIdentity>>, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(Operation { asker, principal, stage }) = self.operations.remove(id) else { return };
        let Stage::Resolving(change) = stage else {
            return self.operations.insert(id, Operation { asker, principal, stage });
        };
        match result.and_then(|found| self.claim_names(change, &found)) {
            Err(refused) => asker.refuse(refused, effects),
            Ok((work, claims)) => {
                for (file, access, share) in &claims {
                    self.shares.enter(*file, *access, *share);
                }
                let stage = Stage::ChangingNames(claims);
                self.operations.insert(id, Operation { asker, principal, stage });
                effects.push(Effect::Perform { operation: id, work });
            }
        }
    }

    fn claim_names(
        &self,
        change: NameChange,
        found: &[Option<FileIdentity>],
    ) -> Result<(Work, Vec<Claim>), Refusal> {
        let source = found.first().copied().flatten().ok_or_else(|| refusal(Status::NotFound, ""))?;
        let target = found.get(1).copied().flatten();
        if matches!(change, NameChange::Rename { no_replace: true, .. }) && target.is_some() {
            return Err(refusal(Status::Exists, ""));
        }
        let mut claims: Vec<Claim> = vec![(source, Access::DELETE, ShareMode::ALL)];
        claims.extend(target.filter(|t| *t != source).map(|t| (t, Access::DELETE, ShareMode::ALL)));
        if claims.iter().any(|(file, access, share)| !self.shares.admits(*file, *access, *share)) {
            return Err(refusal(Status::ShareConflict, "an open of the file denies its removal"));
        }
        let work = match change {
            NameChange::Remove(at) => Work::Remove(at, source),
            NameChange::Rename { from, to, .. } => Work::Rename { from: (from, source), to: (to, target) },
        };
        Ok((work, claims))
    }

    pub(super) fn set_attributes(
        &mut self,
        asker: Asker,
        set: control::SetAttributes,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let changes = Changes {
            size: set.size,
            mode: set.mode.map(|mode| mode & 0o777),
            accessed: set.accessed,
            modified: set.modified,
        };
        if changes.size.is_some_and(|size| !control::size_is_valid(size)) {
            return Err(refusal(Status::FileTooBig, ""));
        }
        if [changes.accessed, changes.modified]
            .into_iter()
            .flatten()
            .any(|FileTime { nanos, .. }| nanos >= 1_000_000_000)
        {
            return Err(refusal(Status::Invalid, "a second has 1,000,000,000 nanoseconds"));
        }
        match set.target {
            Target::Open(id) => {
                let file = self.own(asker, id)?;
                let open = self.owned(asker, id)?;
                if changes.size.is_some() && !open.access.contains(Access::WRITE) {
                    return Err(refusal(Status::AccessDenied, "the open has no write access"));
                }
                if !self.volumes.may_write(&open.principal, open.volume) {
                    return Err(refusal(Status::ReadOnly, ""));
                }
                // Its own claim on WRITE, if it has one, already stands against the others' share modes.
                self.perform_on(asker, id, Work::SetAttributes(Subject::File(file), changes), effects);
                Ok(())
            }
            Target::Path(place) => {
                let at = self.locate_name(asker, &place)?;
                if changes.size.is_none() {
                    let work = Work::SetAttributes(Subject::Name(at), changes);
                    return self.perform(asker, work, Stage::Plain, effects);
                }
                self.know_all_bindings()?;
                let operation = self.start(asker, Stage::OpeningForChange(changes))?;
                effects.push(Effect::OpenFile {
                    operation,
                    file: FileId(operation.0),
                    at,
                    access: Access::WRITE,
                    disposition: Disposition::Open,
                    mode: 0,
                    follow: false,
                });
                Ok(())
            }
        }
    }

    pub(super) fn opened_for_change(
        &mut self,
        id: OperationId,
        asker: Asker,
        principal: Arc<str>,
        changes: Changes,
        result: Result<FileOpened, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let file = FileId(id.0);
        let opened = match result {
            Ok(opened) => opened,
            Err(refused) => return asker.refuse(refused, effects),
        };
        let claim = (opened.identity, Access::WRITE, ShareMode::ALL);
        if !self.shares.admits(claim.0, claim.1, claim.2) {
            effects.push(Effect::CloseFile(file));
            return asker
                .refuse(refusal(Status::ShareConflict, "an open of the file denies writing"), effects);
        }
        self.shares.enter(claim.0, claim.1, claim.2);
        let stage = Stage::Changing(file, claim);
        self.operations.insert(id, Operation { asker, principal, stage });
        let work = Work::SetAttributes(Subject::File(file), changes);
        effects.push(Effect::Perform { operation: id, work });
    }
}
