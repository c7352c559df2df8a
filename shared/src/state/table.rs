//! The open table.
//!
//! ```text
//!            file open, share admitted            session lost               close, eviction, force close
//!  (none) ──────────────────────────────► Active ─────────────► Detached ──────────────┐
//!                                          │  ▲                    │                   │
//!                                          │  └────── resume ──────┘                   ▼
//!                                          └─ close, force close, hold time 0 ─────► Closing ──► (none), tombstone
//!                                                                                      │
//!                                                         until no binding and no work is left
//! ```
//!
//! An open is *expired* when it is detached and its deadline is not later than now: that is computed, never stored.

use super::barrier::Rules;
use super::ids::Ids;
use super::locking::Executed;
use super::resume::Resuming;
use super::rules::LockMode;
use super::{Asker, Authority, FileIdentity, Located, OperationId, refusal};
use crate::auth::{BindSecret, MacPolicy};
use crate::types::{
    Access, Evidence, GoneReason, HandleId, HoldClass, OpenId, ProcessId, SessionId, ShareMode, Status,
    Timestamp, VolumeId,
};
use crate::wire::control::{self, Refusal};
use crate::wire::link::LinkBinding;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Names a descriptor that the shell keeps; never used twice while control runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileId(pub u64);

/// Where an open is in its life.
#[derive(Debug)]
pub(super) enum Life {
    /// Its session is there; it can be bound.
    Active,
    /// Its session was lost; it is kept.
    Detached {
        since: Timestamp,
        deadline: Timestamp,
        /// A resume is under way: nobody else gets in its way until that is decided.
        resume: Option<Box<Resuming>>,
    },
    /// It is over, but bindings are still being fenced or work is still being done. It keeps its claims on the
    /// file until they end: fence before grant.
    Closing {
        /// Who waits to hear that it is closed.
        waiters: Vec<Asker>,
        ending: Ending,
        /// It was expired: its locks restrict nobody.
        expired: bool,
    },
}

/// Why an open ends, and so what is kept of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ending {
    /// Its owner has no more need of it: nothing.
    Closed,
    /// It was taken from its owner: a tombstone.
    Gone(GoneReason),
}

/// What dataplane holds of an open.
#[derive(Debug)]
pub(super) struct Binding {
    pub(super) handle: HandleId,
    /// The epoch of the open when it was bound.
    pub(super) epoch: u64,
    /// Digest of the transcript that was proven, so that it is not granted twice.
    pub(super) transcript: [u8; 32],
    /// A fence was asked for.
    pub(super) fencing: bool,
}

/// Looks at the file before an open ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Step {
    #[default]
    No,
    UnderWay,
    Done,
}

#[derive(Debug)]
pub(super) struct Open {
    /// While it is active, and while it closes and its session is there.
    pub(super) session: Option<SessionId>,
    pub(super) principal: Arc<str>,
    pub(super) process: ProcessId,
    /// As it was granted, for a repeated one to be compared with.
    pub(super) request: Box<control::Open>,
    pub(super) at: Located,
    pub(super) lock_mode: LockMode,
    pub(super) policy: MacPolicy,
    pub(super) file: FileId,
    pub(super) identity: FileIdentity,
    pub(super) file_handle: Vec<u8>,
    pub(super) created: bool,
    pub(super) opened_ms: u64,
    pub(super) handle: HandleId,
    pub(super) challenge: [u8; 32],
    /// Kr.
    pub(super) secret: BindSecret,
    /// The same as the journal has it.
    pub(super) sealed_secret: Vec<u8>,
    /// Rises with every resume.
    pub(super) epoch: u64,
    pub(super) hold_ms: u64,
    pub(super) bindings: BTreeMap<LinkBinding, Binding>,
    /// Handles of bindings that outlived a resume.
    pub(super) kept: Vec<HandleId>,
    /// Operations under way that use the descriptor.
    pub(super) works: usize,
    /// Its old content is being discarded: whoever repeats the request waits for this operation.
    pub(super) making: Option<OperationId>,
    /// See [`crate::journal::record::OpenRecord::truncating`].
    pub(super) truncating: bool,
    /// See [`crate::journal::record::OpenRecord::evidence`].
    pub(super) evidence: Evidence,
    /// The evidence was taken when nothing of the open could change the file any more.
    pub(super) baseline: bool,
    /// Somebody else may have changed the file since the open was detached.
    pub(super) marked: bool,
    /// It was resumed, and its client may not know yet what it was told. See [`OpenTable::set_unheard`].
    pub(super) unheard: bool,
    /// Its hold time was over when it was resumed, and its client may not know of that yet.
    pub(super) lapsed: bool,
    /// It is detached, and the journal does not say so yet: until all recovered opens are settled.
    pub(super) untold: bool,
    /// The baseline is being taken.
    pub(super) looking: bool,
    /// The last look before a tombstone.
    pub(super) last_look: Step,
    /// The removal of the name, if that was asked for.
    pub(super) removal: Step,
    /// The record that a bind relies on: the latest `Opened` or `Resumed`.
    pub(super) journalled: u64,
    /// Changes of its locks that were executed.
    pub(super) executed: Executed,
    /// What its bindings may not touch.
    pub(super) rules: Rules,
    /// After recovery: how the file looked when it was reopened. Until it is known which bindings live.
    pub(super) reopened: Option<Evidence>,
    pub(super) life: Life,
}

impl Open {
    pub(super) fn access(&self) -> Access {
        self.request.access
    }

    pub(super) fn share(&self) -> ShareMode {
        self.request.share
    }

    pub(super) fn class(&self) -> HoldClass {
        self.request.class
    }

    pub(super) fn volume(&self) -> VolumeId {
        self.at.volume
    }

    pub(super) fn is_active(&self) -> bool {
        matches!(self.life, Life::Active)
    }

    pub(super) fn is_closing(&self) -> bool {
        matches!(self.life, Life::Closing { .. })
    }

    /// It ends without its owner's wish.
    pub(super) fn is_being_taken(&self) -> bool {
        matches!(self.life, Life::Closing { ending: Ending::Gone(_), .. })
    }

    /// Detached, and nobody is resuming it.
    pub(super) fn is_away(&self) -> bool {
        matches!(self.life, Life::Detached { resume: None, .. })
    }

    pub(super) fn is_expired(&self, now: Timestamp) -> bool {
        matches!(self.life, Life::Detached { resume: None, deadline, .. } if now >= deadline)
    }

    /// True if bytes of the file may change through it at this moment.
    pub(super) fn may_write(&self) -> bool {
        self.access().contains(Access::WRITE)
            && (!self.is_away() && !self.is_closing() || !self.bindings.is_empty() || self.works > 0)
    }

    pub(super) fn resuming(&self) -> Option<&Resuming> {
        match &self.life {
            Life::Detached { resume, .. } => resume.as_deref(),
            _ => None,
        }
    }

    pub(super) fn resuming_mut(&mut self) -> Option<&mut Option<Box<Resuming>>> {
        match &mut self.life {
            Life::Detached { resume, .. } => Some(resume),
            _ => None,
        }
    }

    /// True if a binding that is still there was granted for this very transcript.
    pub(super) fn has_seen(&self, transcript: &[u8; 32]) -> bool {
        self.bindings.values().any(|Binding { transcript: seen, .. }| seen == transcript)
    }
}

/// The opens of one file.
#[derive(Debug, Default)]
pub(super) struct FileOpens {
    pub(super) all: Ids,
    pub(super) detached: Ids,
    /// Live ones whose client may not know yet that they were resumed.
    pub(super) unheard: Ids,
    /// Those that are being taken from their owners.
    pub(super) leaving: Ids,
    /// An open that asked for the name's removal is closed; the last one removes it.
    pub(super) remove: Option<Located>,
}

#[derive(Debug, Default)]
pub(super) struct OpenTable {
    /// In boxes: opens are large, and come in no order.
    by_id: BTreeMap<OpenId, Box<Open>>,
    by_binding: BTreeMap<LinkBinding, OpenId>,
    by_file: BTreeMap<FileIdentity, FileOpens>,
    /// Detached opens of each principal, by deadline.
    detached: BTreeSet<(Arc<str>, Timestamp, OpenId)>,
    /// Opens that are being taken from each principal.
    leaving: BTreeSet<(Arc<str>, OpenId)>,
    last_binding: u64,
}

impl OpenTable {
    /// `generation` counts the starts of control: it makes the numbers of bindings unlike any earlier ones.
    pub(super) fn new(generation: u64) -> Self {
        Self { last_binding: generation << 32, ..Self::default() }
    }

    pub(super) fn get(&self, id: OpenId) -> Option<&Open> {
        self.by_id.get(&id).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, id: OpenId) -> Option<&mut Open> {
        self.by_id.get_mut(&id).map(Box::as_mut)
    }

    pub(super) fn insert(&mut self, id: OpenId, open: Open) {
        let of_file = self.by_file.entry(open.identity).or_default();
        of_file.all.insert(id);
        if let Life::Detached { deadline, .. } = open.life {
            of_file.detached.insert(id);
            self.detached.insert((open.principal.clone(), deadline, id));
        }
        if open.unheard {
            of_file.unheard.insert(id);
        }
        self.by_id.insert(id, Box::new(open));
    }

    /// Sets whether the answer to an open's resume may still be lost. While it may, what others do to the file concerns
    /// the open as if it were detached: the next answer must tell it.
    pub(super) fn set_unheard(&mut self, id: OpenId, unheard: bool) {
        let Some(open) = self.by_id.get_mut(&id).filter(|open| open.unheard != unheard) else { return };
        open.unheard = unheard;
        let of_file = self.by_file.entry(open.identity).or_default();
        if unheard {
            of_file.unheard.insert(id);
        } else {
            of_file.unheard.remove(id);
        }
    }

    pub(super) fn remove(&mut self, id: OpenId) -> Option<Open> {
        let life = self.set_life(id, Life::Active)?;
        let mut open = self.by_id.remove(&id)?;
        open.life = life;
        if let Some(of_file) = self.by_file.get_mut(&open.identity) {
            of_file.all.remove(id);
            of_file.unheard.remove(id);
            if of_file.all.is_empty() {
                self.by_file.remove(&open.identity);
            }
        }
        Some(*open)
    }

    /// Changes where an open is in its life, and what is sorted by that. Answers what was before.
    pub(super) fn set_life(&mut self, id: OpenId, life: Life) -> Option<Life> {
        let open = self.by_id.get_mut(&id)?;
        let of_file = self.by_file.entry(open.identity).or_default();
        if let Life::Detached { deadline, .. } = open.life {
            of_file.detached.remove(id);
            self.detached.remove(&(open.principal.clone(), deadline, id));
        }
        if let Life::Detached { deadline, .. } = life {
            of_file.detached.insert(id);
            self.detached.insert((open.principal.clone(), deadline, id));
        }
        if open.is_being_taken() {
            of_file.leaving.remove(id);
            self.leaving.remove(&(open.principal.clone(), id));
        }
        let before = std::mem::replace(&mut open.life, life);
        if open.is_being_taken() {
            of_file.leaving.insert(id);
            self.leaving.insert((open.principal.clone(), id));
        }
        Some(before)
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn bindings(&self) -> usize {
        self.by_binding.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&OpenId, &Open)> {
        self.by_id.iter().map(|(id, open)| (id, open.as_ref()))
    }

    /// Opens in the order of their ids, behind one of them.
    pub(super) fn after(&self, after: Option<OpenId>) -> impl Iterator<Item = (&OpenId, &Open)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let behind = self.by_id.range((after.map_or(Unbounded, Excluded), Unbounded));
        behind.map(|(id, open)| (id, open.as_ref()))
    }

    pub(super) fn of_file(&self, file: FileIdentity) -> Option<&FileOpens> {
        self.by_file.get(&file)
    }

    pub(super) fn of_file_mut(&mut self, file: FileIdentity) -> Option<&mut FileOpens> {
        self.by_file.get_mut(&file)
    }

    /// Every open of a file.
    pub(super) fn on(&self, file: FileIdentity) -> impl Iterator<Item = (OpenId, &Open)> {
        let all = self.by_file.get(&file).into_iter().flat_map(|of_file| of_file.all.iter());
        all.filter_map(|id| Some((id, self.get(id)?)))
    }

    /// How many are detached.
    pub(super) fn detached(&self) -> usize {
        self.detached.len()
    }

    /// The detached open of a principal whose deadline is the earliest of those that are over.
    pub(super) fn oldest_expired(&self, principal: &Arc<str>, now: Timestamp) -> Option<OpenId> {
        let first = (principal.clone(), Timestamp::default(), OpenId::NONE);
        let own = self
            .detached
            .range(first..)
            .take_while(|(whose, deadline, _)| whose == principal && *deadline <= now);
        own.map(|(_, _, id)| *id).find(|id| self.get(*id).is_some_and(|open| open.is_expired(now)))
    }

    /// True if an open is being taken from a principal: soon it has room for another.
    pub(super) fn is_making_room(&self, principal: &Arc<str>) -> bool {
        let mut own = self.leaving.range((principal.clone(), OpenId::NONE)..);
        own.next().is_some_and(|(whose, _)| whose == principal)
    }

    pub(super) fn open_of(&self, binding: LinkBinding) -> Option<OpenId> {
        self.by_binding.get(&binding).copied()
    }

    /// All bindings there are.
    pub(super) fn bound(&self) -> Vec<LinkBinding> {
        self.by_binding.keys().copied().collect()
    }

    /// Enters a binding of an open that is there.
    pub(super) fn bind(&mut self, id: OpenId, binding: Binding) -> Option<LinkBinding> {
        self.last_binding += 1;
        let number = LinkBinding(self.last_binding);
        self.adopt(id, number, binding).then_some(number)
    }

    /// Enters a binding that has its number already.
    pub(super) fn adopt(&mut self, id: OpenId, number: LinkBinding, binding: Binding) -> bool {
        let Some(open) = self.by_id.get_mut(&id) else { return false };
        open.bindings.insert(number, binding);
        self.by_binding.insert(number, id);
        true
    }

    pub(super) fn unbind(&mut self, number: LinkBinding) -> Option<(OpenId, Binding)> {
        let id = self.by_binding.remove(&number)?;
        let binding = self.by_id.get_mut(&id)?.bindings.remove(&number)?;
        Some((id, binding))
    }
}

impl Authority {
    /// An open of the asker's session. One of another session, a closed one and one that never was get the
    /// same answer; the owner of one that was taken away is told so.
    pub(super) fn owned(&self, asker: Asker, id: OpenId) -> Result<&Open, Refusal> {
        match self.opens.get(id) {
            Some(open) if open.session == Some(asker.session) => Ok(open),
            _ => {
                let principal = self.sessions.get(asker.session).map(|session| &session.principal);
                match self.tombstones.get(id) {
                    Some(tombstone) if Some(&tombstone.principal) == principal => {
                        Err(refusal(gone_status(tombstone.reason), ""))
                    }
                    _ => Err(refusal(Status::Closed, "this session has no such open")),
                }
            }
        }
    }

    /// A live open of the asker's session.
    pub(super) fn own(&self, asker: Asker, id: OpenId) -> Result<&Open, Refusal> {
        let open = self.owned(asker, id)?;
        match open.life {
            Life::Closing { ending: Ending::Gone(reason), .. } => Err(refusal(gone_status(reason), "")),
            Life::Closing { .. } => Err(refusal(Status::Closed, "the open is closing")),
            _ => Ok(open),
        }
    }
}

/// What a request on an open that is gone is refused with.
pub(super) fn gone_status(reason: GoneReason) -> Status {
    match reason {
        GoneReason::Evicted => Status::Evicted,
        GoneReason::ForceClosed => Status::ForceClosed,
        GoneReason::FileLost => Status::FileLost,
    }
}
