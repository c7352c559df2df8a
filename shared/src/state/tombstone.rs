//! What is kept of an open that was taken from its owner, and what a late resume is told.
//!
//! ```text
//!   evicted, force-closed, lost ──► tombstone ──► late resume: look at the file ──► Gone{reason, changed}
//!                                       │
//!                                       └ after its time, or when there are too many: forgotten
//! ```

use super::FileIdentity;
use super::operation::Stage;
use super::timers::Timer;
use super::{Asker, Authority, Effect, Inspected, Located};
use crate::journal::record::{Record, TombstoneRecord};
use crate::types::{Evidence, GoneReason, OpenId, Timestamp, VolumePath};
use crate::wire::control::{Gone, Refusal, Reply};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug)]
pub(super) struct Tombstone {
    pub(super) principal: Arc<str>,
    pub(super) reason: GoneReason,
    pub(super) at: Located,
    pub(super) identity: FileIdentity,
    pub(super) file_handle: Vec<u8>,
    /// How the file looked when nobody else had changed it; `None` if somebody may have.
    pub(super) evidence: Option<Evidence>,
    /// The record that says so.
    journalled: u64,
    /// The order in which they came.
    age: u64,
    /// When it is forgotten.
    until: Timestamp,
}

impl Tombstone {
    pub(super) fn record(&self, open: OpenId) -> Record {
        Record::Tombstone(Box::new(TombstoneRecord {
            open,
            principal: self.principal.as_ref().to_owned(),
            reason: self.reason,
            volume: self.at.volume,
            identity: self.identity,
            file_handle: self.file_handle.clone(),
            path: self.at.path.as_str().to_owned(),
            evidence: self.evidence,
        }))
    }
}

#[derive(Debug, Default)]
pub(super) struct Tombstones {
    by_open: BTreeMap<OpenId, Tombstone>,
    by_age: BTreeMap<u64, OpenId>,
    last: u64,
}

impl Tombstones {
    pub(super) fn get(&self, open: OpenId) -> Option<&Tombstone> {
        self.by_open.get(&open)
    }

    pub(super) fn len(&self) -> usize {
        self.by_open.len()
    }

    pub(super) fn after(&self, after: Option<OpenId>) -> impl Iterator<Item = (&OpenId, &Tombstone)> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.by_open.range((after.map_or(Unbounded, Excluded), Unbounded))
    }

    fn remove(&mut self, open: OpenId) -> Option<Tombstone> {
        let tombstone = self.by_open.remove(&open)?;
        self.by_age.remove(&tombstone.age);
        Some(tombstone)
    }

    pub(super) fn is_consistent(&self) -> bool {
        self.by_open.len() == self.by_age.len()
            && self.by_age.iter().all(|(age, id)| self.by_open.get(id).is_some_and(|t| t.age == *age))
    }
}

impl Authority {
    /// Makes a tombstone of an open that is not in the table any more; it is durable before what follows in this call.
    pub(super) fn bury(&mut self, id: OpenId, record: TombstoneRecord, effects: &mut Vec<Effect>) {
        let path = VolumePath::parse(&record.path).unwrap_or_else(|_| VolumePath::root());
        let tombstone = Tombstone {
            principal: record.principal.as_str().into(),
            reason: record.reason,
            at: Located { volume: record.volume, path },
            identity: record.identity,
            file_handle: record.file_handle.clone(),
            evidence: record.evidence,
            journalled: self.persist(Record::Tombstone(Box::new(record)), effects),
            age: 0,
            until: Timestamp::default(),
        };
        self.keep_tombstone(id, tombstone);
        while self.tombstones.len() > self.limits.tombstones {
            let Some(oldest) = self.tombstones.by_age.values().next().copied() else { break };
            self.forget(oldest, effects);
        }
    }

    fn keep_tombstone(&mut self, id: OpenId, mut tombstone: Tombstone) {
        self.drop_tombstone(id);
        self.tombstones.last += 1;
        tombstone.age = self.tombstones.last;
        tombstone.until = self.now.saturating_add(self.limits.tombstone_keep);
        self.timers.set(tombstone.until, Timer::Tombstone(id));
        self.tombstones.by_age.insert(tombstone.age, id);
        self.tombstones.by_open.insert(id, tombstone);
    }

    fn drop_tombstone(&mut self, id: OpenId) -> bool {
        let Some(tombstone) = self.tombstones.remove(id) else { return false };
        self.timers.clear(tombstone.until, Timer::Tombstone(id));
        true
    }

    pub(super) fn forget(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        if self.drop_tombstone(id) {
            self.persist(Record::Forgotten(id), effects);
        }
    }

    /// At recovery: the journal knows it already.
    pub(super) fn restore_tombstone(&mut self, record: TombstoneRecord) {
        let path = VolumePath::parse(&record.path).unwrap_or_else(|_| VolumePath::root());
        let tombstone = Tombstone {
            principal: record.principal.as_str().into(),
            reason: record.reason,
            at: Located { volume: record.volume, path },
            identity: record.identity,
            file_handle: record.file_handle,
            evidence: record.evidence,
            journalled: 0,
            age: 0,
            until: Timestamp::default(),
        };
        self.keep_tombstone(record.open, tombstone);
    }

    /// At recovery.
    pub(super) fn unrestore_tombstone(&mut self, id: OpenId) -> bool {
        self.drop_tombstone(id)
    }

    /// Their time counts from the first moment that the clock is known.
    pub(super) fn date_tombstones(&mut self) {
        let until = self.now.saturating_add(self.limits.tombstone_keep);
        for (id, tombstone) in &mut self.tombstones.by_open {
            self.timers.clear(tombstone.until, Timer::Tombstone(*id));
            tombstone.until = until;
            self.timers.set(until, Timer::Tombstone(*id));
        }
    }

    /// A resume that comes too late. Its principal and volume are checked.
    pub(super) fn late_resume(
        &mut self,
        asker: Asker,
        id: OpenId,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let Some(tombstone) = self.tombstones.get(id) else { return Ok(()) };
        let (reason, evidence, journalled) = (tombstone.reason, tombstone.evidence, tombstone.journalled);
        let Some(evidence) = evidence else {
            let reply = Reply::Gone(Gone { reason, changed: true });
            self.defer(journalled, asker.effect(reply), effects);
            return Ok(());
        };
        let (at, file_handle, identity) =
            (tombstone.at.clone(), tombstone.file_handle.clone(), tombstone.identity);
        let operation = self.start(asker, Stage::LateResume { reason, evidence, journalled })?;
        effects.push(Effect::InspectLost { operation, at, file_handle, identity });
        Ok(())
    }

    pub(super) fn late_resume_seen(
        &mut self,
        asker: Asker,
        (reason, before, journalled): (GoneReason, Evidence, u64),
        result: Result<Option<Inspected>, Refusal>,
        effects: &mut Vec<Effect>,
    ) {
        let same = matches!(result, Ok(Some(seen)) if seen.evidence == before);
        let reply = Reply::Gone(Gone { reason, changed: !same });
        self.defer(journalled, asker.effect(reply), effects);
    }
}
