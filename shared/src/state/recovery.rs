//! From the journal's records to an authority, and from there to the moment when it may let anybody in.
//!
//! ```text
//!  records ─► Recovery ─► finish ─► Authority, Reopen... ─► Reopened... ─► LinkUp or LinkLost ─► settled
//!                                   (all opens detached)     hold times     which bindings live   marks, baselines
//!                                                            count anew
//! ```
//!
//! A record that cannot follow those before it is an error: the journal is not whole, or not ours. In a checkpoint, opens
//! are told one after another while the world goes on, so records of opens that were not told yet are passed over.

use super::lock::{LockLimits, LockOwner, LockTable, Process};
use super::locking::Executed;
use super::open::Created;
use super::persist::Journal;
use super::rules::{LockMode, VolumeRules};
use super::table::{Ending, Life, Open, OpenTable};
use super::{Authority, Effect, FileId, FileIdentity, Inspected, Limits, Located, Reopen};
use crate::auth::Keyring;
use crate::journal::record::{OpenRecord, Record, Started, TombstoneRecord};
use crate::types::{Access, Evidence, GoneReason, HandleId, OpenId, Status, Timestamp, VolumePath};
use std::collections::BTreeMap;

/// Records that cannot follow one another: the journal is not ours, or not whole.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the journal's record {record} cannot be: {reason}")]
pub struct RecoveryError {
    /// Which record, in words.
    pub record: String,
    /// Why.
    pub reason: String,
}

/// What is promised already has no limits.
const NO_LIMITS: LockLimits = LockLimits {
    batch: usize::MAX,
    per_open: usize::MAX,
    per_file: usize::MAX,
    waiters_per_file: usize::MAX,
};

/// Takes the journal's records in their order.
#[derive(Debug)]
pub struct Recovery {
    authority: Authority,
    started: Option<Started>,
}

type Applied = Result<(), String>;

impl Recovery {
    /// Before the first record. `generation` counts this start of control, and is higher than any before.
    pub fn new(limits: Limits, volumes: Vec<VolumeRules>, keyring: Keyring, generation: u64) -> Self {
        let mut authority = Authority::new(limits, volumes, keyring);
        authority.generation = generation;
        authority.opens = OpenTable::new(generation);
        authority.last_version = generation << 32;
        authority.locks = LockTable::new(NO_LIMITS);
        Self { authority, started: None }
    }

    /// Takes one record. `inside_checkpoint` is true for all records of a file that begins with a checkpoint, up to the
    /// checkpoint's end.
    ///
    /// # Errors
    /// [`RecoveryError`] if it cannot follow those before.
    pub fn apply(&mut self, record: Record, inside_checkpoint: bool) -> Result<(), RecoveryError> {
        let (name, open) = name_of(&record);
        self.take(record, inside_checkpoint).map_err(|reason| {
            let record = open.map_or_else(|| name.to_owned(), |open| format!("{name} of open {open}"));
            RecoveryError { record, reason }
        })
    }

    fn take(&mut self, record: Record, inside_checkpoint: bool) -> Applied {
        let authority = &mut self.authority;
        let id = match &record {
            Record::Started(started) => {
                if self.started.is_some_and(|before| before.generation > started.generation) {
                    return Err("an earlier start follows a later one".into());
                }
                self.started = Some(*started);
                return Ok(());
            }
            Record::Settled => {
                authority.restore_settled();
                return Ok(());
            }
            Record::Opened(opened) => opened.open,
            Record::Closed(id)
            | Record::Detached(id)
            | Record::Baseline(id, _)
            | Record::Marked(id)
            | Record::Heard(id)
            | Record::Forgotten(id) => *id,
            Record::Resumed(resumed) => resumed.open,
            Record::Locked(locked) => locked.open,
            Record::Unlocked(unlocked) => unlocked.open,
            Record::Tombstone(tombstone) => tombstone.open,
        };
        let record = match record {
            Record::Opened(opened) => return authority.restore_open(*opened),
            record => record,
        };
        let known = authority.opens.get(id).is_some();
        let needed = !matches!(record, Record::Tombstone(_) | Record::Forgotten(_));
        if needed && !known {
            return if inside_checkpoint { Ok(()) } else { Err("the open is not known".into()) };
        }
        authority.restore_change(id, record, inside_checkpoint)
    }

    /// The latest start that the journal tells of.
    pub fn started(&self) -> Option<Started> {
        self.started
    }

    /// The authority, and the files that are to be opened again, each to be answered with
    /// [`Input::Reopened`](super::Input::Reopened) before anything else. `last_sequence` is the highest number of a record in the
    /// journal, with the [`Record::Started`] of this start if that is written already (0 if there is none): the authority
    /// numbers on from there.
    pub fn finish(self, last_sequence: u64) -> (Authority, Vec<Reopen>) {
        let mut authority = self.authority;
        authority.journal = Journal::after(last_sequence);
        authority.settling = true;
        authority.undated = true;
        let mut locks = LockTable::new(authority.limits.locks);
        let mut reopens = Vec::new();
        let ids: Vec<OpenId> = authority.opens.iter().map(|(id, _)| *id).collect();
        for id in ids {
            let file = FileId(authority.operations.next_id().0);
            let Some(open) = authority.opens.get_mut(id) else { continue };
            open.file = file;
            reopens.push(Reopen {
                open: id,
                file,
                at: open.at.clone(),
                file_handle: open.file_handle.clone(),
                identity: open.identity,
                access: open.access(),
            });
            let identity = open.identity;
            for (number, lock) in authority.locks.locks_of(identity, id) {
                if let Some(owner) = authority.owner_at_recovery(id, number) {
                    // They stood beside one another a moment ago.
                    let _ = locks.restore(identity, &owner, lock);
                }
                authority.ruled.insert(identity);
            }
        }
        authority.locks = locks;
        (authority, reopens)
    }
}

fn name_of(record: &Record) -> (&'static str, Option<OpenId>) {
    let (name, open) = match record {
        Record::Started(_) => return ("Started", None),
        Record::Settled => return ("Settled", None),
        Record::Opened(opened) => ("Opened", opened.open),
        Record::Closed(id) => ("Closed", *id),
        Record::Detached(id) => ("Detached", *id),
        Record::Baseline(id, _) => ("Baseline", *id),
        Record::Marked(id) => ("Marked", *id),
        Record::Resumed(resumed) => ("Resumed", resumed.open),
        Record::Locked(locked) => ("Locked", locked.open),
        Record::Unlocked(unlocked) => ("Unlocked", unlocked.open),
        Record::Tombstone(tombstone) => ("Tombstone", tombstone.open),
        Record::Forgotten(id) => ("Forgotten", *id),
        Record::Heard(id) => ("Heard", *id),
    };
    (name, Some(open))
}

impl Authority {
    fn owner_at_recovery(&self, id: OpenId, number: u64) -> Option<LockOwner> {
        let open = self.opens.get(id)?;
        Some(match open.lock_mode {
            LockMode::Mandatory => LockOwner::Open { open: id, number },
            LockMode::Advisory => {
                let process = Process { principal: open.principal.clone(), process: open.process, number };
                LockOwner::Process { open: id, process }
            }
        })
    }

    /// Takes an open out that the journal tells anew, or says is over.
    fn unrestore(&mut self, id: OpenId) {
        let Some(open) = self.opens.remove(id) else { return };
        self.shares.leave(open.identity, open.access(), open.share());
        self.locks.release(open.identity, id);
        self.create_ids.0.remove(&(open.principal.clone(), open.request.create_id));
        self.sessions.count(&open.principal, |share| share.opens = share.opens.saturating_sub(1));
    }

    fn restore_open(&mut self, record: OpenRecord) -> Applied {
        let id = record.open;
        self.unrestore(id);
        self.unrestore_tombstone(id);
        let (access, share) = (record.request.access, record.request.share);
        if !self.shares.admits(record.identity, access, share) {
            return Err("it conflicts with another open of the file".into());
        }
        let secret = self.keyring.open_secret(id, &record.sealed_secret);
        let secret = secret.map_err(|error| format!("its secret cannot be opened: {error}"))?;
        let path = VolumePath::parse(&record.request.place.path).map_err(|error| error.to_string())?;
        let known = self.sessions.principals.get_key_value(record.principal.as_str());
        let principal = known.map_or_else(|| record.principal.as_str().into(), |(known, _)| known.clone());
        let create_key = (principal.clone(), record.request.create_id);
        if self.create_ids.0.contains_key(&create_key) {
            return Err("another open has its create id".into());
        }
        let far = Timestamp::from_nanos(u64::MAX);
        let open = Open {
            session: None,
            principal: principal.clone(),
            process: record.process,
            at: Located { volume: record.volume, path },
            lock_mode: record.lock_mode.unwrap_or_else(|| self.volumes.lock_mode(record.volume)),
            policy: record.policy,
            file: FileId(0),
            identity: record.identity,
            file_handle: record.file_handle,
            created: record.created,
            opened_ms: record.opened_ms,
            handle: HandleId::NONE,
            challenge: record.challenge,
            secret,
            sealed_secret: record.sealed_secret,
            epoch: record.epoch,
            hold_ms: record.hold_ms,
            bindings: BTreeMap::new(),
            kept: record.kept,
            works: 0,
            making: None,
            truncating: record.truncating,
            evidence: record.evidence,
            baseline: record.baseline,
            marked: record.marked,
            unheard: record.unheard,
            lapsed: record.lapsed,
            untold: false,
            looking: false,
            last_look: Default::default(),
            removal: Default::default(),
            journalled: 0,
            executed: Executed::new(&record.sequences),
            rules: Default::default(),
            reopened: None,
            life: if record.detached {
                Life::Detached { since: Timestamp::default(), deadline: far, resume: None }
            } else {
                Life::Active
            },
            request: Box::new(record.request),
        };
        let identity = open.identity;
        self.shares.enter(identity, access, share);
        self.create_ids.0.insert(create_key, Created::Open(id));
        self.sessions.count(&principal, |share| share.opens += 1);
        self.opens.insert(id, open);
        if let (Some((volume, path)), Some(of_file)) = (record.remove, self.opens.of_file_mut(identity)) {
            let path = VolumePath::parse(&path).map_err(|error| error.to_string())?;
            of_file.remove = Some(Located { volume, path });
        }
        for (number, lock) in record.locks {
            let Some(owner) = self.owner_at_recovery(id, number) else { continue };
            self.locks.restore(identity, &owner, lock).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn restore_change(&mut self, id: OpenId, record: Record, lenient: bool) -> Applied {
        match record {
            Record::Closed(_) => self.unrestore(id),
            Record::Tombstone(tombstone) => {
                let known = self.opens.get(id).is_some() || self.tombstones.get(id).is_some();
                if !known && !lenient {
                    return Err("the open is not known".into());
                }
                self.unrestore(id);
                self.restore_tombstone(*tombstone);
            }
            Record::Forgotten(_) => {
                if !self.unrestore_tombstone(id) && !lenient {
                    return Err("there is no such tombstone".into());
                }
            }
            Record::Locked(locked) => {
                let Some(owner) = self.owner_at_recovery(id, locked.owner) else { return Ok(()) };
                let Some(open) = self.opens.get_mut(id) else { return Ok(()) };
                open.executed.insert(locked.sequence);
                let taken = self.locks.lock(open.identity, &owner, &locked.locks);
                taken.map_err(|error| error.to_string())?;
            }
            Record::Unlocked(unlocked) => {
                let Some(owner) = self.owner_at_recovery(id, unlocked.owner) else { return Ok(()) };
                let Some(open) = self.opens.get_mut(id) else { return Ok(()) };
                open.executed.insert(unlocked.sequence);
                let given = self.locks.unlock(open.identity, &owner, &unlocked.ranges);
                given.map_err(|error| error.to_string())?;
            }
            Record::Resumed(resumed) => {
                let secret = self.keyring.open_secret(id, &resumed.sealed_secret);
                let secret = secret.map_err(|error| format!("its secret cannot be opened: {error}"))?;
                let Some(open) = self.opens.get_mut(id) else { return Ok(()) };
                if resumed.epoch <= open.epoch || open.is_active() {
                    return Err("the open was not detached in an earlier epoch".into());
                }
                (open.secret, open.sealed_secret) = (secret, resumed.sealed_secret);
                (open.epoch, open.evidence, open.kept) = (resumed.epoch, resumed.evidence, resumed.kept);
                let told = resumed.changed;
                (open.baseline, open.marked) = (told.is_some() && open.kept.is_empty(), told == Some(true));
                open.lapsed = resumed.lapsed;
                self.opens.set_life(id, Life::Active);
                self.opens.set_unheard(id, told.is_some());
            }
            Record::Heard(_) => {
                let Some(open) = self.opens.get_mut(id) else { return Ok(()) };
                if !open.unheard {
                    return Err("it does not fit the open's life".into());
                }
                (open.baseline, open.marked, open.lapsed) = (false, false, false);
                self.opens.set_unheard(id, false);
            }
            Record::Detached(_) | Record::Baseline(..) | Record::Marked(_) => {
                let Some(open) = self.opens.get_mut(id) else { return Ok(()) };
                let unheard = open.unheard && matches!(record, Record::Marked(_));
                if open.is_active() != matches!(record, Record::Detached(_)) && !unheard {
                    return Err("it does not fit the open's life".into());
                }
                match record {
                    Record::Baseline(_, evidence) => (open.baseline, open.evidence) = (true, evidence),
                    Record::Marked(_) => open.marked = true,
                    _ => self.restore_detached(id),
                }
            }
            Record::Started(_) | Record::Settled | Record::Opened(_) => {}
        }
        Ok(())
    }

    /// The shell has opened a recorded file again, or can't. The open's hold time counts anew.
    pub(super) fn reopened(
        &mut self,
        id: OpenId,
        result: Result<Inspected, String>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(open) = self.opens.get_mut(id).filter(|_| self.settling) else { return };
        let (was_active, hold_ms) = (open.is_active(), open.hold_ms);
        match result {
            Ok(seen) => {
                open.reopened = Some(seen.evidence);
                open.untold |= was_active;
                self.set_detached(id, hold_ms);
            }
            Err(_) => {
                let record = TombstoneRecord {
                    open: id,
                    principal: open.principal.as_ref().to_owned(),
                    reason: GoneReason::FileLost,
                    volume: open.at.volume,
                    identity: open.identity,
                    file_handle: open.file_handle.clone(),
                    path: open.at.path.as_str().to_owned(),
                    evidence: (open.baseline && !open.marked).then_some(open.evidence),
                };
                self.clear_detached_timers(id);
                self.unrestore(id);
                self.bury(id, record, effects);
            }
        }
    }

    /// When dataplane last changed any file before control and dataplane both died: nanoseconds since 1970; 0 if that is
    /// not known. To be told before the link comes up or anybody is let in.
    pub fn set_last_write(&mut self, ns: u64) {
        self.last_write = ns;
    }

    /// It is known which bindings live, and when they last wrote: so it can be decided whether each recovered open's file
    /// was changed by others meanwhile. `last_write` is for all files, and 0 if a dataplane lives: it tells of each binding it
    /// has, and the stamp of others says nothing about a file of which it has none.
    pub(super) fn settle(
        &mut self,
        last_writes: &BTreeMap<FileIdentity, u64>,
        last_write: u64,
        effects: &mut Vec<Effect>,
    ) {
        if !std::mem::take(&mut self.settling) {
            return;
        }
        let reopened: Vec<OpenId> =
            self.opens.iter().filter(|(_, open)| open.reopened.is_some()).map(|(id, _)| *id).collect();
        let mut writers: BTreeMap<FileIdentity, Vec<OpenId>> = BTreeMap::new();
        for id in &reopened {
            let Some(open) = self.opens.get(*id) else { continue };
            let Some(seen) = open.reopened.filter(|seen| *seen != open.evidence) else { continue };
            // The mark for a writer that was there when the session was lost may be among what was not durable yet, so
            // the server's own writes explain nothing if another open could have made them.
            let writers = writers.entry(open.identity).or_insert_with(|| {
                let on_file = self.opens.on(open.identity);
                let writing = on_file.filter(|(_, open)| open.access().contains(Access::WRITE));
                writing.map(|(id, _)| id).take(2).collect()
            });
            let alone = writers.iter().all(|writer| writer == id);
            let own_writes = last_writes.get(&open.identity).copied().unwrap_or(0).max(last_write);
            let own = alone && i64::try_from(own_writes).is_ok_and(|last| seen.changed_ns <= last);
            if open.baseline || !own {
                self.mark_recovered(*id, effects);
            }
        }
        // Who has no binding, and nothing under way, writes nothing.
        let idle = self.opens.bindings() == 0 && self.operations.len() == 0;
        if !idle || self.opens.detached() < self.opens.len() {
            self.mark_beside_writers(&reopened, effects);
        }
        let mut settled = false;
        for id in reopened {
            let Some(open) = self.opens.get_mut(id) else { continue };
            let Some(seen) = open.reopened.take() else { continue };
            if self.ends_with_crash(id, effects) {
                continue;
            }
            let Some(open) = self.opens.get_mut(id) else { continue };
            let quiet = open.bindings.is_empty() || !open.access().contains(Access::WRITE);
            let (identity, judged) = (open.identity, open.marked || open.baseline);
            if !judged && !quiet {
                self.tell_detached(id, effects);
            } else if !judged && (open.evidence != seen || !open.untold) {
                self.set_baseline(id, seen, effects);
            } else if open.untold {
                // One record says it of all of them: a crash with a million opens must not cost a million more.
                open.baseline |= !open.marked;
                open.untold = false;
                settled = true;
            }
            if self.ruled.contains(&identity) || self.contenders.len() > 0 {
                self.changed.insert(identity);
            }
        }
        if settled {
            self.persist(Record::Settled, effects);
        }
    }

    /// The journal is told that an open is detached, if it does not know yet.
    pub(super) fn tell_detached(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        if let Some(open) = self.opens.get_mut(id).filter(|open| open.untold) {
            open.untold = false;
            self.persist(Record::Detached(id), effects);
        }
    }

    /// What an earlier start found when it had settled: see [`Record::Settled`].
    fn restore_settled(&mut self) {
        let live = self.opens.iter().filter(|(_, open)| open.is_active()).map(|(id, _)| *id);
        for id in live.collect::<Vec<_>>() {
            let Some(open) = self.opens.get_mut(id) else { continue };
            open.baseline |= !open.marked;
            self.restore_detached(id);
        }
    }

    fn restore_detached(&mut self, id: OpenId) {
        let deadline = Timestamp::from_nanos(u64::MAX);
        self.opens.set_life(id, Life::Detached { since: Timestamp::default(), deadline, resume: None });
        self.opens.set_unheard(id, false);
    }

    /// Opens that do not outlive a crash. One with nothing to hold ends as its session has. One whose file was still to be
    /// truncated was never answered: it never was, and a repeated request opens afresh.
    fn ends_with_crash(&mut self, id: OpenId, effects: &mut Vec<Effect>) -> bool {
        let Some(open) = self.opens.get_mut(id) else { return true };
        let ends = open.truncating || open.hold_ms == 0;
        if open.truncating {
            open.request.delete_on_close = false;
        }
        if ends {
            self.end(id, None, Ending::Closed, Status::SessionGone, effects);
        }
        ends
    }

    /// Differs from [`Authority::mark`]: a baseline that is not met is the very reason.
    fn mark_recovered(&mut self, id: OpenId, effects: &mut Vec<Effect>) {
        if let Some(open) = self.opens.get_mut(id).filter(|open| !open.marked) {
            open.marked = true;
            self.tell_detached(id, effects);
            self.persist(Record::Marked(id), effects);
        }
    }

    fn set_baseline(&mut self, id: OpenId, seen: Evidence, effects: &mut Vec<Effect>) {
        if let Some(open) = self.opens.get_mut(id) {
            (open.baseline, open.evidence) = (true, seen);
            self.tell_detached(id, effects);
            self.persist(Record::Baseline(id, seen), effects);
        }
    }
}
