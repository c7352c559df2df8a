//! Replacing a binding: when its channel has ended, or the server has fenced it.
//!
//! ```text
//!   the open attached? ─► the channel connected? ─► could the old binding's writes still land?
//!        (waits)               (connects again)          │ yes: the session is replaced, and the resume fences them
//!                                                        ▼ no
//!                                                      bind ─► the new seat
//! ```
//!
//! Writes of an old binding cannot land once it is fenced, which the server does before it answers a resume that does not
//! keep it, or once its data plane is dead: that has no queue pairs, and finishes no request. A data plane that lives
//! (the same instance as before), and only lost the channel, may still be at one that it has not answered. Then the next
//! session is connected while this one still lives, and its resume of the open supersedes it: so the open is never without a
//! session, and survives also with a hold time of zero. The session's other opens follow; of those with a hold time of zero
//! the server spares only the one by which a session is superseded, and the others end with an error that says so.

use super::{Backoff, Patience, gone, may_pass};
use crate::bind::{self, BindRequest, BindingCore};
use crate::binding::{Inner, Seat};
use crate::channel::Shared;
use crate::channel::home::{Home, may_heal};
use crate::error::{Error, Result};
use crate::hot::Hot;
use crate::open::Open;
use crate::session::connection::Connection;
use holdfast_shared::types::{Access, Status};
use holdfast_shared::wire::service::ServiceBlob;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Refusals of a key that should be good, before they are believed: it may be that of a moment ago.
const BAD_KEYS_MAX: u32 = 3;

/// True if the request may succeed on another binding.
pub(crate) fn is_wanted(error: &Error) -> bool {
    match error {
        Error::Ended { what: "channel", why } => may_heal(why),
        Error::Refused(refusal) => {
            matches!(
                refusal.status,
                Status::Fenced | Status::NotBound | Status::SessionGone | Status::Superseded | Status::Closed
            ) || gone(refusal.status).is_some()
        }
        _ => false,
    }
}

/// Attempts of one request that needs a binding which works.
pub(crate) struct Trials {
    patience: Patience,
    backoff: Backoff,
}

impl Trials {
    pub(crate) fn new(open: &Open) -> Self {
        Self { patience: Patience::new(open.session().config()), backoff: Backoff::data() }
    }

    /// Replaces the seat on which the request failed, unless somebody else has done so.
    pub(crate) async fn replace(&mut self, binding: &Inner, open: &Open, failed: &Arc<Seat>) -> Result<()> {
        self.patience.pause("the binding", self.backoff.next()).await?;
        let _turn = self.patience.wait("the binding", binding.rebinding.lock()).await?;
        if !Arc::ptr_eq(failed, &binding.seat.load_full()) {
            return Ok(());
        }
        if binding.is_unbound() {
            return Err(Error::refused(Status::NotBound));
        }
        let seat = seat(open, &binding.home, binding.access, Some(failed), &mut self.patience).await?;
        let seat = Arc::new(seat);
        binding.seat.store(Arc::clone(&seat));
        // Given back meanwhile? That may have been the seat of before.
        if binding.is_unbound() {
            seat.channel.unbind_later(Arc::clone(&seat.core));
        }
        // On a channel that lives, its number goes back, and nothing is read by what it was given.
        failed.core.end();
        failed.channel.unbind_later(Arc::clone(&failed.core));
        Ok(())
    }
}

/// True if writes of `old` that were not answered may still be carried out, as far as this side knows.
pub(crate) fn may_land(open: &Open, old: &Seat) -> bool {
    let incarnation = open.inner.life.lock().incarnation;
    // Whether its data plane still lives is another question.
    old.may_still_write(&old.channel.facts.instance, incarnation)
}

/// Makes sure that no write of `old` can land any more, without a new connection in its place: for those who go on over
/// another channel of the open, which has answered since. So the data plane lives, and unless that is another one the session
/// is replaced.
pub(crate) async fn silence(open: &Open, old: &Seat, patience: &mut Patience) -> Result<()> {
    let inner = &*open.inner;
    loop {
        let connection = inner.ready(None, patience).await?;
        if !may_land(open, old) {
            return Ok(());
        }
        let grant = patience.wait("the open's key", open.query_key()).await??;
        // Control has one data plane at a time: if that is another, the old one is dead.
        let now = ServiceBlob::decode(&grant.service_blob).ok().map(|blob| blob.instance);
        if now.is_some_and(|now| now != old.channel.facts.instance) {
            return Ok(());
        }
        replace_session(open, &connection, patience).await?;
    }
}

/// Has the session replaced, so that the open's resume fences every binding that is not in use.
async fn replace_session(open: &Open, connection: &Arc<Connection>, patience: &mut Patience) -> Result<()> {
    tracing::info!(
        "the data channel broke with its data plane alive and writes under way: the session is replaced to fence them"
    );
    open.inner.replaces.store(true, Ordering::Release);
    connection.leave();
    open.inner.ready(Some(connection), patience).await.map(drop)
}

/// Given back, unless it is kept: who waits may be cancelled.
struct Bound<'a> {
    channel: &'a Arc<Shared>,
    core: &'a Arc<BindingCore>,
    kept: bool,
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.channel.unbind_later(Arc::clone(self.core));
        }
    }
}

/// Binds, for the first time or in the place of `old`.
pub(crate) async fn seat(
    open: &Open,
    home: &Home,
    access: Access,
    old: Option<&Arc<Seat>>,
    patience: &mut Patience,
) -> Result<Seat> {
    let inner = &*open.inner;
    let (mut backoff, mut bad_keys) = (Backoff::data(), 0);
    loop {
        patience.pause("the binding", backoff.next()).await?;
        if inner.is_closed() {
            return Err(Error::refused(Status::Closed));
        }
        let connection = inner.ready(None, patience).await?;
        let channel = home.live(open, patience).await?;
        let (grant, secret, incarnation) = {
            let life = inner.life.lock();
            (life.grant.clone(), life.secret.clone(), life.incarnation)
        };
        if old.is_some_and(|old| old.may_still_write(&channel.facts.instance, incarnation)) {
            replace_session(open, &connection, patience).await?;
            continue;
        }
        let request = BindRequest {
            resume_key: &grant.resume_key,
            open_challenge: &grant.challenge,
            volume: grant.volume,
            policy: grant.policy,
            access,
            secret: &secret,
        };
        let bound = patience.wait("the binding", bind::bind(&channel, &request)).await?;
        let error = match bound {
            Ok(core) => {
                inner.durable.bound(core.verifier);
                // Only what cannot write is ever given.
                if access == Access::READ && !open.access().contains(Access::WRITE) {
                    let mut bound = Bound { channel: &channel, core: &core, kept: false };
                    // Without a descriptor, or the time to wait for it, reads go to the server.
                    let _ = patience.wait("the descriptor", crate::handed::ask(&channel, &core)).await;
                    bound.kept = true;
                }
                let old = old.and_then(|old| old.hot.as_ref());
                let hot = Hot::of(open.session().config(), &channel, &core, old);
                return Ok(Seat::new(core, channel, incarnation, hot));
            }
            Err(error) => error,
        };
        // The key was of a session that is lost: the next one has another.
        if connection.is_over() || inner.life.lock().incarnation != incarnation {
            continue;
        }
        match error.status() {
            Some(Status::BadKey) if old.is_some() && bad_keys < BAD_KEYS_MAX => {
                bad_keys += 1;
                patience.wait("the binding", open.query_key()).await??;
            }
            Some(Status::Fenced | Status::NotBound) => {}
            Some(status) if may_pass(status) && status != Status::TooMany => {}
            Some(status) if gone(status).is_some() => return Err(inner.is_gone(&connection, &error).await),
            _ if is_wanted(&error) && error.status() != Some(Status::Closed) => {}
            _ => return Err(error),
        }
        tracing::debug!(%error, "not bound yet");
    }
}
