//! The authority: the open table and its rules, as a deterministic state machine.
//!
//! It performs no I/O and reads no clock: [`Authority::handle`] takes one input with the time at which it
//! arrived and appends the effects that the shell (control's driver) is to perform. Answers to effects come
//! back as inputs. The same code runs in production, in tests and in the simulator.
//!
//! ```text
//!   sessions ─ Request ─►┌───────────────────────────────┐─► Reply, Disconnect ─► sessions
//!                        │ Authority                     │
//!   file workers ───────►│  sessions   who is there      │─► OpenFile, Resolve, Perform, Inspect, CloseFile ─► file workers
//!     FileOpened         │  opens      what they hold    │
//!     Performed          │  shares     who excludes whom │
//!     Inspected          │  locks      on which bytes    │
//!                        │  bindings   what dataplane has│─► Grant, RefuseBind, Fence, Restrict ─► link
//!   link ─ Redeem ──────►│  operations what is under way │
//!     Fenced, Restricted │  contenders who waits         │
//!                        │  tombstones what was          │─► Persist ─► journal
//!   journal ─ Persisted ►└───────────────────────────────┘
//! ```
//!
//! | module | question it answers |
//! |---|---|
//! | [`rules`] | which volumes are there, and who may use them how? |
//! | `session` | who is connected, within which limits? |
//! | `open` | when is a file opened, and what does a repeated request get? |
//! | `share` | which opens exclude each other? |
//! | `contend` | who is in the way, and what becomes of it? |
//! | `life` | what happens to an open whose session is lost? |
//! | `resume` | who gets it back, and what is it told? |
//! | `tombstone` | what is told when it is gone? |
//! | [`lock`] | which byte ranges are locked, and by whom? |
//! | `locking` | when is a lock request answered? |
//! | `barrier` | does dataplane obey already? |
//! | `redeem` | which bind is granted? |
//! | `fence` | when is a binding, and with it an open, surely over? |
//! | `links` | what lives in a dataplane that registers? |
//! | `names` | when may a name be removed or renamed, or a file's size be changed? |
//! | `persist` | what waits for the journal? |
//! | `recovery`, `checkpoint` | what does the journal say? |
//! | `timers` | what is due? |
//! | `views` | what does the operator see? |

mod barrier;
mod checkpoint;
mod contend;
mod effect;
mod fence;
mod ids;
mod input;
mod invariants;
mod life;
mod limits;
mod links;
pub mod lock;
mod locking;
mod names;
mod open;
mod operation;
mod persist;
mod recovery;
mod redeem;
mod resume;
pub mod rules;
mod session;
mod share;
mod table;
#[cfg(test)]
mod tests;
mod timers;
mod tombstone;
mod views;

pub use checkpoint::Cursor;
pub use effect::{Changes, Effect, Located, Subject, Work};
pub use input::{FileIdentity, FileOpened, Fresh, Input, Inspected, Reopen, SessionBegan};
pub use limits::Limits;
pub use operation::OperationId;
pub use recovery::{Recovery, RecoveryError};
pub use rules::{LockMode, Right, VolumeRules};
pub use table::FileId;
pub use views::{BindingView, OpenState, OpenView, SessionView};

use crate::auth::Keyring;
use crate::types::{SessionId, Status, Timestamp};
use crate::wire::control::{Refusal, Reply};
use crate::wire::link::LinkBinding;
use barrier::Barriers;
use contend::Contenders;
use fence::Fences;
use lock::LockTable;
use locking::Locking;
use open::CreateIds;
use operation::Operations;
use persist::Journal;
use rules::Volumes;
use session::Sessions;
use share::ShareTable;
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use table::OpenTable;
use timers::Timers;
use tombstone::Tombstones;

/// The one owner of every open, and of every decision about them.
///
/// * In: [`Authority::handle`], [`Authority::handle_timeout`].
/// * Out: the effects these append, and [`Authority::poll_timeout`].
/// * To look: [`Authority::counts`], [`Authority::list_opens`], [`Authority::check_invariants`].
/// * To keep: [`Authority::checkpoint`]; back by [`Recovery`].
#[derive(Debug)]
pub struct Authority {
    limits: Limits,
    volumes: Volumes,
    keyring: Keyring,
    /// Counts the starts of control.
    generation: u64,
    /// The latest time that was told.
    now: Timestamp,
    sessions: Sessions,
    opens: OpenTable,
    shares: ShareTable,
    create_ids: CreateIds,
    operations: Operations,
    contenders: Contenders,
    fences: Fences,
    locks: LockTable,
    locking: Locking,
    barriers: Barriers,
    /// The highest version of any open's I/O rules.
    last_version: u64,
    /// Counts the resumes that were begun.
    last_resume: u64,
    /// Files on which an open has I/O rules, or may get some.
    ruled: BTreeSet<FileIdentity>,
    tombstones: Tombstones,
    timers: Timers,
    journal: Journal,
    /// Files about which something changed in this call: those who wait for them are looked at in its end.
    changed: BTreeSet<FileIdentity>,
    /// What dataplane registered; `None` while no dataplane is linked.
    service_blob: Option<Vec<u8>>,
    /// A dataplane may live that serves bindings of an earlier control.
    unknown_bindings: bool,
    /// Bindings that live without an open, and are being fenced.
    strays: BTreeSet<LinkBinding>,
    /// After recovery, until it is known which bindings live.
    settling: bool,
    /// After recovery, until the first input tells the time.
    undated: bool,
    /// Before recovery: see [`Authority::set_last_write`].
    last_write: u64,
    /// Before recovery is settled: when bindings that are gone last wrote.
    wrote: BTreeMap<FileIdentity, u64>,
}

/// How much there is of everything, for the operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Sessions.
    pub sessions: usize,
    /// Opens, closing ones included.
    pub opens: usize,
    /// Bindings that dataplane holds.
    pub bindings: usize,
    /// Bindings being fenced.
    pub fences: usize,
    /// Operations under way in the file system.
    pub operations: usize,
    /// Files with at least one claim on access.
    pub claimed_files: usize,
    /// Detached opens, expired ones included.
    pub detached: usize,
    /// Locks held.
    pub locks: usize,
    /// Lock requests that wait.
    pub lock_waiters: usize,
    /// Other requests that wait for detached opens.
    pub contenders: usize,
    /// What waits for dataplane to obey new rules.
    pub barriers: usize,
    /// Tombstones.
    pub tombstones: usize,
    /// Effects that wait for the journal.
    pub held_effects: usize,
}

impl Authority {
    /// An authority without sessions, opens or dataplane, and with nothing in its journal.
    pub fn new(limits: Limits, volumes: Vec<rules::VolumeRules>, keyring: Keyring) -> Self {
        Self {
            limits,
            volumes: Volumes::new(volumes),
            keyring,
            generation: 0,
            now: Timestamp::default(),
            sessions: Sessions::default(),
            opens: OpenTable::default(),
            shares: ShareTable::default(),
            create_ids: CreateIds::default(),
            operations: Operations::default(),
            contenders: Contenders::default(),
            fences: Fences::default(),
            locks: LockTable::new(limits.locks),
            locking: Locking::default(),
            barriers: Barriers::default(),
            last_version: 0,
            last_resume: 0,
            ruled: BTreeSet::new(),
            tombstones: Tombstones::default(),
            timers: Timers::default(),
            journal: Journal::default(),
            changed: BTreeSet::new(),
            service_blob: None,
            unknown_bindings: false,
            strays: BTreeSet::new(),
            settling: false,
            undated: false,
            last_write: 0,
            wrote: BTreeMap::new(),
        }
    }

    /// Takes one input. Every input is answered in bounded time and never panics on what came from outside.
    pub fn handle(&mut self, now: Timestamp, input: Input, effects: &mut Vec<Effect>) {
        self.tell_time(now);
        let mut own = Vec::new();
        self.take(input, &mut own);
        self.look_at_changed(&mut own);
        self.journal.gate(own, effects);
    }

    fn tell_time(&mut self, now: Timestamp) {
        self.now = self.now.max(now);
        if std::mem::take(&mut self.undated) {
            self.date_tombstones();
        }
    }

    fn take(&mut self, input: Input, effects: &mut Vec<Effect>) {
        match input {
            Input::Reopened { open, result } => return self.reopened(open, result, effects),
            Input::DataplaneMayLive => return self.unknown_bindings = true,
            Input::Wrote(wrote) => return self.wrote(&wrote),
            Input::LinkUp { service_blob, held } => return self.link_up(service_blob, held, effects),
            Input::LinkLost => return self.link_lost(effects),
            Input::Persisted(sequence) => return self.persisted(sequence, effects),
            _ => {}
        }
        match input {
            Input::SessionBegan(began) => self.begin_session(*began, effects),
            Input::SessionLost(session) => self.lose_session(session, effects),
            Input::Request { session, id, request, fresh } => {
                self.request(Asker { session, request: id }, request, *fresh, effects);
            }
            Input::FileOpened { operation, result } => self.file_opened(operation, result, effects),
            Input::Resolved { operation, result } => self.names_resolved(operation, result, effects),
            Input::Performed { operation, result } => self.performed(operation, result, effects),
            Input::Inspected { operation, result } => self.inspected(operation, result, effects),
            Input::JournalRoom(room) => self.journal_room(room),
            Input::ForceClose(open) => {
                let ending = table::Ending::Gone(crate::types::GoneReason::ForceClosed);
                self.end(open, None, ending, Status::ForceClosed, effects);
            }
            Input::LinkDown => self.service_blob = None,
            Input::Redeem { redeem, fresh } => self.redeem(&redeem, &fresh, effects),
            Input::Fenced(fence) => self.fenced(fence, effects),
            Input::Released(binding) => self.released(binding, effects),
            Input::Restricted(restricted) => self.restricted(restricted, effects),
            Input::Reopened { .. }
            | Input::DataplaneMayLive
            | Input::Wrote(_)
            | Input::LinkUp { .. }
            | Input::LinkLost
            | Input::Persisted(_) => {}
        }
    }

    /// Where something changed: new rules for I/O, locks for those who wait, requests asked again. What that changes in
    /// turn is looked at too; it comes to an end, as each turn ends opens or answers requests.
    fn look_at_changed(&mut self, effects: &mut Vec<Effect>) {
        while let Some(file) = self.changed.pop_first() {
            self.update_rules(file, effects);
            self.poke_lock_waiters(file, effects);
            self.ask_contenders_again(file, effects);
        }
    }

    fn journal_room(&mut self, room: bool) {
        self.journal.full = !room;
        if room {
            let waited_for = self.locking.pending.keys().filter_map(|(open, _)| self.opens.get(*open));
            self.changed.extend(waited_for.map(|open| open.identity));
        }
    }

    /// When [`Authority::handle_timeout`] wants to be called; `None` if never.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        let deadlines = [self.fences.next_deadline(), self.timers.next()];
        deadlines.into_iter().flatten().min()
    }

    /// Does what is due at `now`: a part of it if it is much, and then [`Authority::poll_timeout`] says so.
    pub fn handle_timeout(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        self.tell_time(now);
        let mut own = Vec::new();
        self.fences.overdue(self.now, |binding| own.push(Effect::FenceOverdue(binding)));
        self.run_timers(&mut own);
        self.look_at_changed(&mut own);
        self.journal.gate(own, effects);
    }

    /// How much there is of everything.
    pub fn counts(&self) -> Counts {
        Counts {
            sessions: self.sessions.len(),
            opens: self.opens.len(),
            bindings: self.opens.bindings(),
            fences: self.fences.len(),
            operations: self.operations.len(),
            claimed_files: self.shares.len(),
            detached: self.opens.detached(),
            locks: self.locks.counts().locks,
            lock_waiters: self.locks.counts().waiters,
            contenders: self.contenders.len(),
            barriers: self.barriers.len(),
            tombstones: self.tombstones.len(),
            held_effects: self.journal.held(),
        }
    }
}

/// Whom an answer goes to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Asker {
    pub(crate) session: SessionId,
    pub(crate) request: u64,
}

impl Asker {
    /// For what the authority asks by itself.
    pub(crate) const NOBODY: Self = Self { session: SessionId::NONE, request: 0 };

    fn effect(self, reply: Reply) -> Effect {
        Effect::Reply { session: self.session, id: self.request, reply }
    }

    fn answer(self, reply: Reply, effects: &mut Vec<Effect>) {
        effects.push(self.effect(reply));
    }

    fn refuse(self, refusal: Refusal, effects: &mut Vec<Effect>) {
        self.answer(Reply::Refused(refusal), effects);
    }
}

/// How long a client should wait before it asks again for what must wait for dataplane, milliseconds.
const DATAPLANE_RETRY_MS: u64 = 200;

impl Authority {
    /// Refuses what a binding of an earlier control could conflict with, while one may live. Fence before grant
    /// holds across restarts too.
    fn know_all_bindings(&self) -> Result<(), Refusal> {
        if self.unknown_bindings || self.settling || !self.strays.is_empty() {
            let words = "dataplane has not let go of earlier bindings yet";
            return Err(Refusal {
                retry_ms: Some(DATAPLANE_RETRY_MS),
                ..refusal(Status::Unavailable, words)
            });
        }
        Ok(())
    }
}

/// A refusal whose words are the status's own, or better ones.
fn refusal(status: Status, detail: &str) -> Refusal {
    let detail = if detail.is_empty() { status.text() } else { detail };
    Refusal { status, detail: detail.to_owned(), retry_ms: None }
}
