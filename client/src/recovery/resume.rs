//! Taking opens over into a new session: by itself after a lost connection, or for an application that kept a key.
//!
//! ```text
//!   Resume{key, supersede: who had it, keep: bindings that live} ──► Resumed{verdict} : attached; its verdict is told
//!                                                                ├─► Gone, BadKey ... : the open is over
//!                                                                └─► Busy, Unavailable: again, with backoff
//! ```

use super::{Backoff, Over, Patience};
use crate::error::{Error, Result};
use crate::open::{Inner as OpenInner, Open};
use crate::session::connection::{Connection, Trouble};
use crate::session::{Inner as SessionInner, Session, unexpected};
use holdfast_shared::types::{HandleId, OpenId, SessionId, Status, Verdict};
use holdfast_shared::wire::control::{self, Reply, Request};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// An open that stays busy for so long has been taken over by another session of this client.
const TAKEN_AFTER: Duration = Duration::from_secs(10);

/// A dropped open that the server may still have.
pub(crate) struct Orphan {
    pub(crate) id: OpenId,
    pub(crate) key: Vec<u8>,
    pub(crate) held_by: Vec<SessionId>,
}

/// How to resume an open whose key an application kept.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct ResumeOptions {
    supersede: Option<SessionId>,
    keep: Vec<HandleId>,
}

impl ResumeOptions {
    /// The open may still be live in this session (of the same principal): that one ends first. Without it, a live open is
    /// refused as [`Status::Busy`].
    #[must_use]
    pub fn supersede(mut self, session: SessionId) -> Self {
        self.supersede = Some(session);
        self
    }

    /// Bindings that this client still has and uses: they stay. Every other is fenced before the answer.
    #[must_use]
    pub fn keep(mut self, handles: impl IntoIterator<Item = HandleId>) -> Self {
        self.keep = handles.into_iter().collect();
        self
    }
}

/// What [`Session::resume`] found.
#[derive(Debug)]
pub struct Resumed {
    /// The open, of this session now; its access, share mode, locks and hold time are those it was opened with.
    pub open: Open,
    /// Whether the file is unchanged. After [`Verdict::Changed`] the open does nothing before [`Open::accept_change`].
    pub verdict: Verdict,
    /// True if the open's locks, if it had any, protected it all the while.
    pub locks_kept: bool,
    /// The bindings that stay, of those to keep.
    pub kept: Vec<HandleId>,
}

impl Session {
    /// Takes an open over whose resume key the application kept, as after a restart of its own process.
    ///
    /// # Errors
    /// [`Error::Gone`] if the server closed it meanwhile; [`Status::BadKey`] if the key is of no open of this principal;
    /// [`Status::Busy`] if it is live in a session that is not superseded.
    ///
    /// ```no_run
    /// # async fn example(session: holdfast_client::Session) -> holdfast_client::Result<()> {
    /// use holdfast_client::{ResumeOptions, Verdict};
    /// let key = std::fs::read("key").unwrap();
    /// let resumed = session.resume(&key, &ResumeOptions::default()).await?;
    /// if resumed.verdict == Verdict::Changed {
    ///     // What this program knew of the file may be wrong: look again, and then go on.
    ///     resumed.open.accept_change();
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn resume(&self, resume_key: &[u8], options: &ResumeOptions) -> Result<Resumed> {
        let (mut patience, mut after) = (Patience::new(self.config()), None);
        let mut held_by: Vec<SessionId> = options.supersede.into_iter().collect();
        let deadline = Instant::now() + self.config().connect_max();
        let mut backoff = Backoff::control();
        loop {
            let connection = self.connection(after.as_ref(), &mut patience).await?;
            match ask(&connection, resume_key, &held_by, &options.keep).await {
                Ok(resumed) => return Ok(Open::resumed(self, &connection, resumed)),
                Err(Trouble::Lost { sent }) => {
                    if sent {
                        held_by.push(connection.id());
                    }
                    after = Some(connection);
                }
                // A server that has just been restarted asks for patience.
                Err(Trouble::Other(error))
                    if error.status() == Some(Status::Unavailable) && Instant::now() < deadline =>
                {
                    tokio::time::sleep(backoff.next()).await;
                }
                Err(Trouble::Other(error)) => return Err(error),
            }
        }
    }
}

/// One attempt. An open that is live in a session is tried with each session that may have it.
async fn ask(
    connection: &Arc<Connection>,
    key: &[u8],
    held_by: &[SessionId],
    keep: &[HandleId],
) -> std::result::Result<control::Resumed, Trouble> {
    // Superseding the session that asks would end it.
    let mut others = held_by.iter().rev().copied().filter(|session| *session != connection.id());
    let mut supersede = others.next();
    loop {
        if let Some(resumed) = connection.late_resume(key) {
            return Ok(resumed);
        }
        let resume = control::Resume { resume_key: key.to_vec(), supersede, keep: keep.to_vec() };
        match connection.call(Request::Resume(resume)).await {
            Ok(Reply::Resumed(resumed)) => return Ok(resumed),
            Ok(Reply::Gone(gone)) => {
                return Err(Trouble::Other(Error::Gone { reason: gone.reason, changed: gone.changed }));
            }
            Ok(_) => return Err(Trouble::Other(unexpected("resume"))),
            Err(Trouble::Other(error)) if is_live_elsewhere(&error) => match others.next() {
                Some(other) => supersede = Some(other),
                None => return Err(Trouble::Other(error)),
            },
            Err(trouble) => return Err(trouble),
        }
    }
}

/// True if a session has the open; else it is busy for a moment, and it is said when to ask again.
fn is_live_elsewhere(error: &Error) -> bool {
    matches!(error, Error::Refused(refusal) if refusal.status == Status::Busy && refusal.retry.is_none())
}

/// Asks once more what has become of an open that a request says is gone: a tombstone knows more.
pub(crate) async fn autopsy(connection: &Arc<Connection>, key: &[u8]) -> Option<Over> {
    match ask(connection, key, &[], &[]).await {
        Err(Trouble::Other(Error::Gone { reason, changed })) => Some(Over::Gone { reason, changed }),
        _ => None,
    }
}

/// Resumes one open on a new connection: until it is attached, over, or dropped, or the connection ends.
/// A place of `places` is taken for each attempt, and not while it waits for the next.
pub(super) async fn keep(open: &Weak<OpenInner>, connection: &Arc<Connection>, places: &Semaphore) {
    let (mut backoff, mut busy_since) = (Backoff::control(), None);
    let mut retry = None;
    loop {
        tokio::time::sleep(backoff.next_within(retry)).await;
        let place = places.acquire().await;
        // Not held while it waits: an open that is dropped meanwhile is closed.
        let Some((key, held_by, kept)) = open.upgrade().map(|open| open.to_resume(connection)) else {
            return;
        };
        let answer = ask(connection, &key, &held_by, &kept).await;
        drop(place);
        let error = match answer {
            Ok(resumed) => {
                let id = resumed.opened.open;
                match open.upgrade() {
                    Some(open) => open.is_resumed(connection, resumed),
                    None => drop(connection.call_and_forget(Request::Close(id))),
                }
                return;
            }
            Err(Trouble::Lost { .. }) => return,
            Err(Trouble::Other(error)) => error,
        };
        if matches!(error, Error::TimedOut { .. }) {
            // It may succeed yet, behind our back: a session to supersede is clear, this is not.
            return connection.cut();
        }
        retry = match &error {
            Error::Refused(refusal) => refusal.retry,
            _ => None,
        };
        let busy = is_live_elsewhere(&error);
        let since: &mut Option<Instant> = &mut busy_since;
        let taken = busy && since.get_or_insert_with(Instant::now).elapsed() > TAKEN_AFTER;
        if !busy {
            *since = None;
        }
        let over = if taken { Some(Over::taken()) } else { Over::of(&error) };
        let Some(over) = over else { continue };
        tracing::warn!(%error, "an open could not be resumed");
        if let Some(open) = open.upgrade() {
            open.over(&open.explained(over));
        }
        return;
    }
}

/// Closes what a dropped open has left at the server.
pub(super) async fn close(orphan: Orphan, connection: &Arc<Connection>, session: &Weak<SessionInner>) {
    let lost = 'tried: {
        // It may be this connection's own, and have met a busy moment.
        match connection.call(Request::Close(orphan.id)).await {
            Ok(_) => return,
            Err(Trouble::Lost { .. }) => break 'tried true,
            Err(Trouble::Other(_)) => {}
        }
        match ask(connection, &orphan.key, &orphan.held_by, &[]).await {
            Ok(_) => {}
            Err(Trouble::Lost { .. }) => break 'tried true,
            Err(Trouble::Other(error)) => {
                // Then it is not ours any more, or the hold time will do.
                tracing::debug!(open = %orphan.id, %error, "a dropped open could not be closed");
                return;
            }
        }
        matches!(connection.call(Request::Close(orphan.id)).await, Err(Trouble::Lost { .. }))
    };
    if let (true, Some(session)) = (lost, session.upgrade()) {
        session.orphans.lock().push(orphan);
    }
}

impl Over {
    fn taken() -> Self {
        Self::Refused(crate::Refusal::new(Status::Superseded))
    }
}
