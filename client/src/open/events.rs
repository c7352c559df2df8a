//! [`Events`]: what an application is told of an open's life.

use crate::error::Refusal;
use holdfast_shared::types::{GoneReason, Verdict};
use tokio::sync::broadcast;

/// Kept for a listener that is slow; older ones are forgotten. What must not be missed, requests say too.
pub(super) const EVENTS_MAX: usize = 16;

/// Something that happened to an open while the server, or the way to it, was lost.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Event {
    /// It was resumed in a new session.
    Resumed {
        /// Whether the file is unchanged. After [`Verdict::Changed`] the open does nothing before
        /// [`crate::Open::accept_change`].
        verdict: Verdict,
        /// True if its locks, if it had any, protected it all the while.
        locks_kept: bool,
    },
    /// It is gone.
    Gone {
        /// Why.
        reason: GoneReason,
        /// True if the file was changed since the open was detached, or if that can't be known.
        changed: bool,
    },
    /// It could not be resumed, and will not be.
    Refused(Refusal),
}

/// What happens to one open from now on; see [`crate::Open::events`].
#[derive(Debug)]
pub struct Events {
    pub(super) receiver: broadcast::Receiver<Event>,
}

impl Events {
    /// The next event; `None` when the open has been dropped.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            match self.receiver.recv().await {
                Ok(event) => return Some(event),
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::debug!(missed, "events of an open were not taken in time");
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}
