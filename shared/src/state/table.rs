//! The open table.
//!
//! ```text
//!            file open, share admitted                close, session lost
//!  (none) ──────────────────────────────► Active ─────────────────────────► Closing ──► (none)
//!                                                                              │
//!                                             until no binding and no work is left
//! ```
//!
//! Today every open has hold time zero, so a lost session closes its opens. [`Life`] is where `Detached` and
//! `Expired` join.

use super::{Asker, Authority, FileIdentity, OperationId, refusal};
use crate::auth::{BindSecret, MacPolicy};
use crate::types::{Access, CreateId, HandleId, OpenId, ProcessId, SessionId, ShareMode, Status, VolumeId};
use crate::wire::control::Refusal;
use crate::wire::link::LinkBinding;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Names a descriptor that the shell keeps; never used twice while control runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileId(pub u64);

/// Where an open is in its life.
#[derive(Debug)]
pub(super) enum Life {
    /// Its session is there; it can be bound.
    Active,
    /// It is over, but bindings are still being fenced or work is still being done. It keeps its claims on the
    /// file until they end: fence before grant.
    Closing {
        /// Who waits to hear that it is closed.
        waiters: Vec<Asker>,
    },
}

/// What dataplane holds of an open.
#[derive(Debug)]
pub(super) struct Binding {
    /// The incarnation of the open that was bound.
    pub(super) epoch: u64,
    /// Digest of the transcript that was proven, so that it is not granted twice.
    pub(super) transcript: [u8; 32],
    /// A fence was asked for.
    pub(super) fencing: bool,
}

#[derive(Debug)]
pub(super) struct Open {
    pub(super) session: SessionId,
    pub(super) principal: Arc<str>,
    pub(super) process: ProcessId,
    pub(super) create_id: CreateId,
    pub(super) volume: VolumeId,
    pub(super) policy: MacPolicy,
    pub(super) file: FileId,
    pub(super) identity: FileIdentity,
    pub(super) access: Access,
    pub(super) share: ShareMode,
    pub(super) created: bool,
    pub(super) opened_ms: u64,
    pub(super) handle: HandleId,
    pub(super) challenge: [u8; 32],
    /// Kr.
    pub(super) secret: BindSecret,
    /// Rises with every fence of the whole open.
    pub(super) epoch: u64,
    pub(super) bindings: BTreeMap<LinkBinding, Binding>,
    /// Operations under way that use the descriptor.
    pub(super) works: usize,
    /// Those among them that are held back until every fence asked for is confirmed.
    pub(super) replays: Vec<OperationId>,
    pub(super) life: Life,
}

#[derive(Debug, Default)]
pub(super) struct OpenTable {
    by_id: BTreeMap<OpenId, Open>,
    by_binding: BTreeMap<LinkBinding, OpenId>,
    last_binding: u64,
}

impl OpenTable {
    pub(super) fn get(&self, id: OpenId) -> Option<&Open> {
        self.by_id.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: OpenId) -> Option<&mut Open> {
        self.by_id.get_mut(&id)
    }

    pub(super) fn insert(&mut self, id: OpenId, open: Open) {
        self.by_id.insert(id, open);
    }

    pub(super) fn remove(&mut self, id: OpenId) -> Option<Open> {
        self.by_id.remove(&id)
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn bindings(&self) -> usize {
        self.by_binding.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&OpenId, &Open)> {
        self.by_id.iter()
    }

    pub(super) fn open_of(&self, binding: LinkBinding) -> Option<OpenId> {
        self.by_binding.get(&binding).copied()
    }

    /// Enters a binding of an open that is there.
    pub(super) fn bind(&mut self, id: OpenId, binding: Binding) -> Option<LinkBinding> {
        let open = self.by_id.get_mut(&id)?;
        self.last_binding += 1;
        let number = LinkBinding(self.last_binding);
        open.bindings.insert(number, binding);
        self.by_binding.insert(number, id);
        Some(number)
    }

    pub(super) fn unbind(&mut self, number: LinkBinding) -> Option<(OpenId, Binding)> {
        let id = self.by_binding.remove(&number)?;
        let binding = self.by_id.get_mut(&id)?.bindings.remove(&number)?;
        Some((id, binding))
    }

    /// Forgets every binding; the opens that had any.
    pub(super) fn unbind_all(&mut self) -> Vec<OpenId> {
        let mut had: Vec<OpenId> = std::mem::take(&mut self.by_binding).into_values().collect();
        had.sort_unstable();
        had.dedup();
        for id in &had {
            if let Some(open) = self.by_id.get_mut(id) {
                open.bindings.clear();
            }
        }
        had
    }
}

impl Authority {
    /// An open of the asker's session. One of another session, a closed one and one that never was get the
    /// same answer.
    pub(super) fn owned(&self, asker: Asker, id: OpenId) -> Result<&Open, Refusal> {
        match self.opens.get(id) {
            Some(open) if open.session == asker.session => Ok(open),
            _ => Err(refusal(Status::Closed, "this session has no such open")),
        }
    }

    /// The descriptor of a live open of the asker's session.
    pub(super) fn own(&self, asker: Asker, id: OpenId) -> Result<FileId, Refusal> {
        match self.owned(asker, id)? {
            Open { life: Life::Active, file, .. } => Ok(*file),
            Open { life: Life::Closing { .. }, .. } => Err(refusal(Status::Closed, "the open is closing")),
        }
    }
}
