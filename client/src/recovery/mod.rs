//! Recovery: what the library does by itself when a plane, the network or the session goes away.
//!
//! ```text
//!   control's connection ends                          a data channel ends, or a binding is fenced
//!         │ reconnect (backoff, for ever)                     │ seen by the request that fails
//!         ▼                                                   ▼
//!   a new connection ── resume every open ──► attached ──► rebind (new channel if need be, bind)
//!         │               keep = living bindings              │
//!         ▼                                                   ▼
//!   requests go again where that is safe               reissue: reads; writes while nobody else could write
//! ```
//!
//! | file | answers |
//! |---|---|
//! | `reconnect` | when is there a connection again, and who sees to its opens? |
//! | `resume` | is the open still ours, and unchanged? |
//! | `repeat` | may a request be made twice? |
//! | `rebind` | when may a binding be replaced, and by what? |
//! | `reissue` | what becomes of a read or write under way? |
//!
//! While control alone is away nothing of the data path is touched: its channel and bindings go on.
//!
//! Tasks: one for each session, which ends with it, and one for each open being resumed, which ends with that one.
//! Binding again is done by whoever needs the binding, so there is nothing to end.

mod backoff;
pub(crate) mod rebind;
pub(crate) mod reconnect;
pub(crate) mod reissue;
pub(crate) mod repeat;
pub(crate) mod resume;
#[cfg(test)]
mod tests;

pub(crate) use backoff::{Backoff, Patience};

use crate::error::{Ended, Error, Refusal};
use holdfast_shared::types::{GoneReason, Status};

/// Why a session or an open is over for good.
#[derive(Clone, Debug)]
pub(crate) enum Over {
    Ended(Ended),
    Refused(Refusal),
    Incompatible(String),
    Gone { reason: GoneReason, changed: bool },
}

impl Over {
    /// What whoever comes too late is told.
    pub(crate) fn error(&self) -> Error {
        match self {
            Self::Ended(why) => Error::session(why.clone()),
            Self::Refused(refusal) => Error::Refused(refusal.clone()),
            Self::Incompatible(text) => Error::Incompatible(text.clone()),
            Self::Gone { reason, changed } => Error::Gone { reason: *reason, changed: *changed },
        }
    }

    /// `None` for an error that may pass with time.
    pub(crate) fn of(error: &Error) -> Option<Self> {
        match error {
            Error::Refused(refusal) if may_pass(refusal.status) => None,
            Error::Refused(refusal) => Some(match gone(refusal.status) {
                // What is known without the tombstone's word.
                Some(reason) => Self::Gone { reason, changed: true },
                None => Self::Refused(refusal.clone()),
            }),
            Error::Gone { reason, changed } => Some(Self::Gone { reason: *reason, changed: *changed }),
            Error::Incompatible(text) => Some(Self::Incompatible(text.clone())),
            Error::Misbehaved(_) => Some(Self::Ended(Ended::Misbehaved("an answer that makes no sense"))),
            Error::Config { .. } | Error::Usage(_) | Error::Internal(_) => {
                Some(Self::Ended(Ended::Transport(error.to_string())))
            }
            _ => None,
        }
    }
}

/// Refusals that time heals.
pub(crate) fn may_pass(status: Status) -> bool {
    matches!(
        status,
        Status::Unavailable
            | Status::Busy
            | Status::TooMany
            | Status::NoSpace
            | Status::TimedOut
            | Status::SessionGone
    )
}

/// Refusals that say that an open is gone.
pub(crate) fn gone(status: Status) -> Option<GoneReason> {
    match status {
        Status::Evicted => Some(GoneReason::Evicted),
        Status::ForceClosed => Some(GoneReason::ForceClosed),
        Status::FileLost => Some(GoneReason::FileLost),
        _ => None,
    }
}
