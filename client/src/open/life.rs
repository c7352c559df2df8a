//! An open's life at the server, as the client follows it: attached to a connection, away, or over.
//!
//! ```text
//!   On(connection) ── it ends ──► still On: requests fail there, and wait for another
//!        ▲                               │ resumed on the next
//!        └───────────────────────────────┤
//!                                        └── gone, or refused ──► Over
//! ```

use super::events::Event;
use super::{Inner, Open};
use crate::binding;
use crate::error::{Ended, Error, Result};
use crate::recovery::{Over, Patience, gone, repeat, resume};
use crate::session::connection::{Connection, Trouble};
use holdfast_shared::auth::BindSecret;
use holdfast_shared::types::{HandleId, SessionId, Status, Verdict};
use holdfast_shared::wire::control::{KeyGrant, Reply, Request, Resumed};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Which session has the open.
#[derive(Clone)]
pub(crate) enum Attachment {
    /// The one of this connection; it may have ended.
    On(Arc<Connection>),
    /// None any more.
    Over(Over),
}

/// What binds need, as it was last told.
pub(crate) struct Life {
    pub(crate) grant: KeyGrant,
    pub(crate) secret: BindSecret,
    pub(crate) epoch: u64,
    /// Counts resumes. Bindings of an earlier one that were not kept are fenced at the server.
    pub(crate) incarnation: u64,
    /// Sessions that may have the open: the last that surely had it, and those that asked for it since.
    held_by: Vec<SessionId>,
}

impl Life {
    pub(super) fn new(grant: KeyGrant, secret: BindSecret, epoch: u64, session: SessionId) -> Self {
        Self { grant, secret, epoch, incarnation: 0, held_by: vec![session] }
    }

    pub(super) fn held_by(&self) -> Vec<SessionId> {
        self.held_by.clone()
    }
}

impl Inner {
    /// The connection that has the open, if it lives.
    pub(crate) fn attached(&self) -> Option<Arc<Connection>> {
        match &*self.attachment.borrow() {
            Attachment::On(connection) if !connection.is_over() => Some(Arc::clone(connection)),
            _ => None,
        }
    }

    /// Waits until the open is attached to a connection that lives, and is not `after`.
    pub(crate) async fn ready(
        &self,
        after: Option<&Arc<Connection>>,
        patience: &mut Patience,
    ) -> Result<Arc<Connection>> {
        let mut attachment = self.attachment.subscribe();
        let usable = |attachment: &Attachment| match attachment {
            Attachment::On(connection) => {
                !connection.is_over() && after.is_none_or(|after| !Arc::ptr_eq(after, connection))
            }
            Attachment::Over(_) => true,
        };
        let found = async { attachment.wait_for(usable).await.ok().map(|found| found.clone()) };
        match patience.wait("the open to be resumed", found).await? {
            Some(Attachment::On(connection)) => Ok(connection),
            Some(Attachment::Over(over)) => Err(over.error()),
            None => Err(Error::session(Ended::Closed)),
        }
    }

    /// Asks something about this open, again on the next connection where that is safe.
    pub(crate) async fn call(
        &self,
        mut request: impl FnMut() -> Result<(Request, Duration)>,
    ) -> Result<Reply> {
        let (mut patience, mut after) = (Patience::new(self.session.config()), None);
        loop {
            let connection = self.ready(after.as_ref(), &mut patience).await?;
            let (request, longer) = request()?;
            match connection.call_for(request.clone(), longer).await {
                Ok(reply) => return Ok(reply),
                Err(Trouble::Lost { sent }) => repeat::may_be_made_again(&request, sent)?,
                Err(Trouble::Other(error)) => match error.status() {
                    // The connection will end too; it is not waited for.
                    Some(Status::SessionGone) => connection.cut(),
                    Some(status) if gone(status).is_some() => {
                        return Err(self.is_gone(&connection, &error).await);
                    }
                    _ => return Err(error),
                },
            }
            after = Some(connection);
        }
    }

    /// The server says that the open is gone: asks for the tombstone's word, and ends it.
    pub(crate) async fn is_gone(&self, connection: &Arc<Connection>, error: &Error) -> Error {
        let key = self.life.lock().grant.resume_key.clone();
        let over = match resume::autopsy(connection, &key).await {
            Some(over) => over,
            None => Over::of(error).unwrap_or(Over::Ended(Ended::Disconnected)),
        };
        self.over(&over);
        over.error()
    }

    /// True if this connection should resume the open.
    pub(crate) fn wants_resume(&self, connection: &Arc<Connection>) -> bool {
        let elsewhere = match &*self.attachment.borrow() {
            Attachment::On(on) => !Arc::ptr_eq(on, connection),
            Attachment::Over(_) => false,
        };
        elsewhere && !self.finished.load(Ordering::Acquire)
    }

    /// What a resume names: the key, sessions that may have the open, handles that live. The asking session is noted: it may
    /// have the open though its answer is lost.
    pub(crate) fn to_resume(&self, connection: &Arc<Connection>) -> (Vec<u8>, Vec<SessionId>, Vec<HandleId>) {
        let mut life = self.life.lock();
        let held_by = life.held_by.clone();
        if !held_by.contains(&connection.id()) {
            life.held_by.push(connection.id());
            // The first had it surely; of those that asked, the last ones may.
            if life.held_by.len() > 4 {
                life.held_by.remove(1);
            }
        }
        let key = life.grant.resume_key.clone();
        drop(life);
        let keep = self.living_bindings().iter().filter_map(|binding| binding.handle_if_live()).collect();
        (key, held_by, keep)
    }

    fn living_bindings(&self) -> Vec<Arc<binding::Inner>> {
        let mut bindings = self.bindings.lock();
        bindings.retain(|binding| binding.strong_count() > 0);
        bindings.iter().filter_map(Weak::upgrade).collect()
    }

    /// The open is this connection's.
    pub(crate) fn is_resumed(&self, connection: &Arc<Connection>, resumed: Resumed) {
        // First: nothing may be bound or sent by what follows before the gate is shut.
        self.shut_if_changed(resumed.verdict);
        let incarnation = {
            let mut life = self.life.lock();
            life.grant = resumed.opened.key;
            life.secret = connection.key().bind_secret(self.id);
            life.epoch = resumed.opened.epoch;
            life.incarnation += 1;
            life.held_by = vec![connection.id()];
            life.incarnation
        };
        for binding in self.living_bindings() {
            binding.resumed(incarnation, &resumed.kept);
        }
        self.locks.executed(resumed.lock_sequence);
        self.tell(resumed.verdict, resumed.locks_kept);
        connection.say_heard(self.id);
        // Last: whoever waits for it finds all of the above.
        self.attach(connection);
    }

    fn attach(&self, connection: &Arc<Connection>) {
        self.attachment.send_if_modified(|attachment| {
            let lives = matches!(attachment, Attachment::On(_));
            if lives {
                *attachment = Attachment::On(Arc::clone(connection));
            }
            lives
        });
    }

    pub(super) fn shut_if_changed(&self, verdict: Verdict) {
        if verdict == Verdict::Changed {
            tracing::warn!(open = %self.id, "the file was changed by somebody else while the open was detached");
            self.gate.changed();
        }
    }

    pub(super) fn tell(&self, verdict: Verdict, locks_kept: bool) {
        if !locks_kept {
            self.locks_lapsed.store(true, Ordering::Release);
        }
        let _ = self.events.send(Event::Resumed { verdict, locks_kept });
    }

    pub(crate) fn hold(&self) -> Duration {
        self.hold
    }

    /// Why it is over, in words that fit an open which ends with its session.
    pub(crate) fn explained(&self, over: Over) -> Over {
        match over {
            Over::Refused(mut refusal) if refusal.status == Status::BadKey && self.hold.is_zero() => {
                refusal.detail = "the open had no hold time, and ended with its session".into();
                Over::Refused(refusal)
            }
            over => over,
        }
    }

    /// The open is over: tells everybody who waits, and everybody who comes.
    pub(crate) fn over(&self, over: &Over) {
        if !self.gate.end(over) {
            return;
        }
        match over {
            Over::Gone { reason, changed } => {
                let _ = self.events.send(Event::Gone { reason: *reason, changed: *changed });
            }
            Over::Refused(refusal) => drop(self.events.send(Event::Refused(refusal.clone()))),
            Over::Ended(_) | Over::Incompatible(_) => {}
        }
        self.attachment.send_replace(Attachment::Over(over.clone()));
    }
}

impl Open {
    /// The file was found changed, and the application knows: reads, writes and locks go on. True if there was such a
    /// verdict to accept.
    pub fn accept_change(&self) -> bool {
        self.inner.gate.accept()
    }

    /// True if its locks, if it had any, protected it all the while: at every resume the server said so. Once false it stays
    /// false: what was read and written under a lock may have been so beside another's.
    pub fn locks_held_throughout(&self) -> bool {
        !self.inner.locks_lapsed.load(Ordering::Acquire)
    }

    /// Writes were reported lost ([`Error::WritesLost`]), and the application will repeat them: flushes succeed again.
    pub fn accept_lost_writes(&self) {
        self.inner.durable.accept();
    }
}
