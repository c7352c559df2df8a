//! Changes beside the opens: removing and renaming names, and changing a file's attributes.
//!
//! Each acts like an open for a moment: it claims what it does to the file (`DELETE`, or `WRITE` for a change of
//! size) against the share modes of the opens there are, and while it is under way no open is granted that
//! denies it.
//!
//! ```text
//!  Remove, Rename ─► Resolve: which files? ─► claims ─► Perform, if the names still stand for them ─► answer
//!  mode, times, by name ─► Resolve ─► marks ─► Perform ─► answer
//!  size, by name  ─► OpenFile               ─► claim  ─► Perform on the descriptor ─► CloseFile, answer
//! ```

use super::contend::{Contending, Judged};
use super::operation::{Claim, Operation, OperationId, Stage};
use super::rules::Right;
use super::table::FileId;
use super::{Asker, Authority, Changes, Effect, FileIdentity, FileOpened, Located, Subject, Work, refusal};
use crate::types::{Access, ByteRange, Disposition, FileTime, ShareMode, Status};
use crate::wire::control::{self, Place, Refusal, Request, Target};
use std::sync::Arc;

/// A change of names that waits to learn which files are concerned.
#[derive(Debug)]
pub(super) enum NameChange {
    Remove(Located, Place),
    Rename { from: Located, to: Located, asked: control::Rename },
    Attributes(Located, Changes),
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
        let operation = self.start(asker, Stage::Resolving(NameChange::Remove(at.clone(), place.clone())))?;
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
        let change = NameChange::Rename { from, to, asked: rename.clone() };
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
        let found = match result {
            Ok(found) => found,
            Err(refused) => return asker.refuse(refused, effects),
        };
        if let NameChange::Attributes(at, changes) = change {
            let Some(file) = found.first().copied().flatten() else {
                return asker.refuse(refusal(Status::NotFound, ""), effects);
            };
            self.mark_others(file, None, effects);
            self.operations.insert(id, Operation { asker, principal, stage: Stage::Plain });
            let work = Work::SetAttributes(Subject::Name(at), changes);
            return self.defer_all(Effect::Perform { operation: id, work }, effects);
        }
        let moved = match &change {
            NameChange::Rename { from, to, .. } => Some((from.clone(), to.clone())),
            _ => None,
        };
        let (work, claims, request) = match names_work(change, &found) {
            Ok(named) => named,
            Err(refused) => return asker.refuse(refused, effects),
        };
        for (file, access, share) in &claims {
            let judged = self.judge_claim(*file, *access, *share);
            // A live open of either file is enough.
            if judged == Judged::Live {
                let words = "an open of the file denies its removal";
                return asker.refuse(refusal(Status::ShareConflict, words), effects);
            }
        }
        for (file, access, share) in &claims {
            let judged = self.judge_claim(*file, *access, *share);
            if judged != Judged::Free {
                let what = Contending::Request(asker, Box::new(request));
                return self.contend(judged, *file, None, what, Status::ShareConflict, effects);
            }
        }
        for (file, access, share) in &claims {
            self.shares.enter(*file, *access, *share);
            self.mark_others(*file, None, effects);
        }
        self.operations
            .insert(id, Operation { asker, principal, stage: Stage::ChangingNames(claims, moved) });
        self.defer_all(Effect::Perform { operation: id, work }, effects);
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
        match set.target.clone() {
            Target::Open(id) => {
                let open = self.own(asker, id)?;
                let (file, identity) = (open.file, open.identity);
                if changes.size.is_some() && !open.access().contains(Access::WRITE) {
                    return Err(refusal(Status::AccessDenied, "the open has no write access"));
                }
                if !self.volumes.may_write(&open.principal, open.volume()) {
                    return Err(refusal(Status::ReadOnly, ""));
                }
                // Its own claim on WRITE, if it has one, already stands against the others' share modes. How long the
                // file is now is not known: every lock of it counts.
                if let (Some(_), Ok(all)) = (changes.size, ByteRange::new(0, ByteRange::END_MAX)) {
                    let judged = self.judge_size(identity, Some(id), all);
                    if judged != Judged::Free {
                        let what = Contending::Request(asker, Box::new(Request::SetAttributes(set)));
                        self.contend(judged, identity, None, what, Status::LockConflict, effects);
                        return Ok(());
                    }
                }
                let operation = self.start(asker, Stage::Altering(id))?;
                self.mark_others(identity, Some(id), effects);
                self.begin_work(id);
                let work = Work::SetAttributes(Subject::File(file), changes);
                self.defer_all(Effect::Perform { operation, work }, effects);
                Ok(())
            }
            Target::Path(place) => {
                let at = self.locate_name(asker, &place)?;
                if changes.size.is_none() {
                    let stage = Stage::Resolving(NameChange::Attributes(at.clone(), changes));
                    let operation = self.start(asker, stage)?;
                    effects.push(Effect::Resolve { operation, names: vec![at] });
                    return Ok(());
                }
                self.know_all_bindings()?;
                let operation = self.start(asker, Stage::OpeningForChange(changes, Box::new(set)))?;
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
        principal: Option<Arc<str>>,
        (changes, request): (Changes, control::SetAttributes),
        result: Result<FileOpened, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let file = FileId(id.0);
        let opened = match result {
            Ok(opened) => opened,
            Err(refused) => return asker.refuse(refused, effects),
        };
        let claim = (opened.identity, Access::WRITE, ShareMode::ALL);
        let mut live = Status::ShareConflict;
        let mut judged = self.judge_claim(claim.0, claim.1, claim.2);
        if let (Judged::Free, Some(size)) = (&judged, changes.size) {
            let (from, to) = (opened.attributes.size.min(size), opened.attributes.size.max(size));
            if let Ok(range) = ByteRange::new(from, to.saturating_sub(from)) {
                judged = self.judge_size(opened.identity, None, range);
                live = Status::LockConflict;
            }
        }
        if judged != Judged::Free {
            effects.push(Effect::CloseFile(file));
            let what = Contending::Request(asker, Box::new(Request::SetAttributes(request)));
            return self.contend(judged, opened.identity, None, what, live, effects);
        }
        self.shares.enter(claim.0, claim.1, claim.2);
        self.mark_others(claim.0, None, effects);
        let stage = Stage::Changing(file, claim);
        self.operations.insert(id, Operation { asker, principal, stage });
        let work = Work::SetAttributes(Subject::File(file), changes);
        self.defer_all(Effect::Perform { operation: id, work }, effects);
    }
}

/// The work of a change of names, and what it claims, now that the files are known; and the request, in case it has to
/// be asked again.
fn names_work(
    change: NameChange,
    found: &[Option<FileIdentity>],
) -> Result<(Work, Vec<Claim>, Request), Refusal> {
    let source = found.first().copied().flatten().ok_or_else(|| refusal(Status::NotFound, ""))?;
    let target = found.get(1).copied().flatten();
    let mut claims: Vec<Claim> = vec![(source, Access::DELETE, ShareMode::ALL)];
    claims.extend(target.filter(|t| *t != source).map(|t| (t, Access::DELETE, ShareMode::ALL)));
    Ok(match change {
        NameChange::Attributes(..) => return Err(refusal(Status::Internal, "")),
        NameChange::Remove(at, place) => (Work::Remove(at, source), claims, Request::Remove(place)),
        NameChange::Rename { asked, .. } if asked.no_replace && target.is_some() => {
            return Err(refusal(Status::Exists, ""));
        }
        NameChange::Rename { from, to, asked } => {
            (Work::Rename { from: (from, source), to: (to, target) }, claims, Request::Rename(asked))
        }
    })
}
