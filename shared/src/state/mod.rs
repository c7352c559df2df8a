//! The authority: the open table and its rules, as a deterministic state machine.
//!
//! It performs no I/O and reads no clock: [`Authority::handle`] takes one input with the time at which it
//! arrived and appends the effects that the shell (control's driver) is to perform. Answers to effects come
//! back as inputs. The same code runs in production, in tests and in the simulator.
//!
//! ```text
//!   sessions ─ Request ─►┌───────────────────────────────┐─► Reply, Disconnect ─► sessions
//!                        │ Authority                     │
//!   file workers ───────►│  sessions   who is there      │─► OpenFile, Resolve, Perform, CloseFile ─► file workers
//!     FileOpened         │  opens      what they hold    │
//!     Performed          │  shares     who excludes whom │
//!                        │  bindings   what dataplane has│─► Grant, RefuseBind, Fence ─► link
//!   link ─ Redeem ──────►│  operations what is under way │
//!     Fenced, Released   └───────────────────────────────┘
//! ```
//!
//! | module | question it answers |
//! |---|---|
//! | [`rules`] | which volumes are there, and who may use them how? |
//! | [`session`](self) | who is connected, within which limits? |
//! | `open` | when is a file opened, and what does a repeated request get? |
//! | `share` | which opens exclude each other? |
//! | [`lock`] | which byte ranges are locked, and by whom? |
//! | `redeem` | which bind is granted? |
//! | `fence` | when is a binding, and with it an open, surely over? |
//! | `names` | when may a name be removed or renamed, or a file's size be changed? |

mod checkpoint;
mod effect;
mod fence;
mod input;
mod invariants;
mod limits;
pub mod lock;
mod names;
mod open;
mod operation;
mod recovery;
mod redeem;
pub mod rules;
mod session;
mod share;
mod table;
#[cfg(test)]
mod tests;
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
use fence::Fences;
use open::CreateIds;
use operation::Operations;
use rules::Volumes;
use session::Sessions;
use share::ShareTable;
use table::OpenTable;

/// The one owner of every open, and of every decision about them.
///
/// * In: [`Authority::handle`], [`Authority::handle_timeout`].
/// * Out: the effects these append, and [`Authority::poll_timeout`].
/// * To look: [`Authority::counts`], [`Authority::check_invariants`].
#[derive(Debug)]
pub struct Authority {
    limits: Limits,
    volumes: Volumes,
    keyring: Keyring,
    sessions: Sessions,
    opens: OpenTable,
    shares: ShareTable,
    create_ids: CreateIds,
    operations: Operations,
    fences: Fences,
    /// What dataplane registered; `None` while no dataplane is linked.
    service_blob: Option<Vec<u8>>,
    /// A dataplane may live that serves bindings of an earlier control.
    unknown_bindings: bool,
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
}

impl Authority {
    /// An authority without sessions, opens or dataplane.
    pub fn new(limits: Limits, volumes: Vec<rules::VolumeRules>, keyring: Keyring) -> Self {
        Self {
            limits,
            volumes: Volumes::new(volumes),
            keyring,
            sessions: Sessions::default(),
            opens: OpenTable::default(),
            shares: ShareTable::default(),
            create_ids: CreateIds::default(),
            operations: Operations::default(),
            fences: Fences::default(),
            service_blob: None,
            unknown_bindings: false,
        }
    }

    /// Takes one input. Every input is answered in bounded time and never panics on what came from outside.
    pub fn handle(&mut self, now: Timestamp, input: Input, effects: &mut Vec<Effect>) {
        match input {
            Input::SessionBegan(began) => self.begin_session(*began, effects),
            Input::SessionLost(session) => self.lose_session(now, session, effects),
            Input::Request { session, id, request, fresh } => {
                self.request(now, Asker { session, request: id }, request, *fresh, effects);
            }
            Input::FileOpened { operation, result } => self.file_opened(operation, result, effects),
            Input::Resolved { operation, result } => self.names_resolved(operation, result, effects),
            Input::Performed { operation, result } => self.performed(operation, result, effects),
            Input::DataplaneMayLive => self.unknown_bindings = true,
            Input::LinkUp { service_blob, .. } => {
                self.lose_link(effects);
                self.service_blob = Some(service_blob);
            }
            Input::LinkDown => self.service_blob = None,
            Input::LinkLost => self.lose_link(effects),
            Input::Redeem { redeem, fresh } => self.redeem(&redeem, &fresh, effects),
            Input::Fenced(fence) => self.fenced(fence, effects),
            Input::Released(binding) => self.released(binding, effects),
            Input::Persisted(_)
            | Input::JournalRoom(_)
            | Input::Restricted(_)
            | Input::Inspected { .. }
            | Input::Reopened { .. }
            | Input::ForceClose(_) => {}
        }
    }

    /// When [`Authority::handle_timeout`] wants to be called; `None` if never.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.fences.next_deadline()
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        self.fences.overdue(now, |binding| effects.push(Effect::FenceOverdue(binding)));
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
    fn answer(self, reply: Reply, effects: &mut Vec<Effect>) {
        effects.push(Effect::Reply { session: self.session, id: self.request, reply });
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
        if self.unknown_bindings {
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
