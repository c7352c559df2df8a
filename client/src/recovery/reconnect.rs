//! The task that keeps a session connected: one for each session, for as long as that lives.
//!
//! ```text
//!   Up ── the connection ends ──► Away ── connect, with backoff ──► Up, and every open is resumed
//!    │                              └── a refusal that time does not heal ──► Over
//!    └── closed by this side, or the server breaks the protocol ──► Over
//! ```
//!
//! It holds the session weakly, so that it never keeps alive what it serves.

use super::{Backoff, Over, resume};
use crate::config::Config;
use crate::error::{Ended, Error};
use crate::session::connection::Connection;
use crate::session::{Inner, Phase};
use holdfast_shared::types::OpenId;
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::task::JoinSet;

/// Opens resumed at once.
const RESUMES_MAX: usize = 32;
/// Different warnings about one outage.
const WARNINGS_MAX: usize = 16;
/// A connection that lived for so long was a good one: the next attempt begins without delay.
const HEALTHY: Duration = Duration::from_secs(2);

/// Starts the task. It ends when `stopped` does.
pub(crate) fn start(inner: &Arc<Inner>, connection: Arc<Connection>, stopped: oneshot::Receiver<()>) {
    let (weak, nudge, config) = (Arc::downgrade(inner), Arc::clone(&inner.nudge), inner.config.clone());
    tokio::spawn(async move {
        tokio::select! {
            _ = stopped => {}
            () = keep_up(weak, nudge, config, connection) => {}
        }
    });
}

async fn keep_up(weak: Weak<Inner>, nudge: Arc<Notify>, config: Config, mut connection: Arc<Connection>) {
    let mut backoff = Backoff::control();
    loop {
        let since = Instant::now();
        let why = serve(&weak, &nudge, &connection).await;
        {
            let Some(inner) = weak.upgrade() else { return };
            if matches!(why, Ended::Misbehaved(_)) {
                return inner.over(&connection, &Over::Ended(why));
            }
            if !inner.turn(Phase::Away(Arc::clone(&connection))) {
                return;
            }
        }
        tracing::info!(server = %connection.server(), %why, "the session's connection has ended: connecting again");
        if since.elapsed() > HEALTHY {
            backoff.reset();
        }
        match connect(&config, &mut backoff).await {
            Ok(new) => connection = new,
            Err(over) => {
                if let Some(inner) = weak.upgrade() {
                    inner.over(&connection, &over);
                }
                return;
            }
        }
        let Some(inner) = weak.upgrade() else { return };
        tracing::info!(session = %connection.id(), "connected again");
        if !inner.turn(Phase::Up(Arc::clone(&connection))) {
            return;
        }
    }
}

/// Tries until it succeeds; every attempt is a TLS session of its own.
async fn connect(config: &Config, backoff: &mut Backoff) -> Result<Arc<Connection>, Over> {
    let mut warned = HashSet::new();
    loop {
        tokio::time::sleep(backoff.next()).await;
        let error = match Connection::open(config).await {
            Ok(connection) => return Ok(connection),
            Err(error) => error,
        };
        // A file of the configuration that cannot be read now may be one that is being replaced.
        if let (Some(over), false) = (Over::of(&error), matches!(error, Error::Config { .. })) {
            return Err(over);
        }
        let text = error.to_string();
        if is_for_the_operator(&error) && warned.len() < WARNINGS_MAX && warned.insert(text) {
            tracing::warn!(%error, "the session cannot be connected again, and goes on trying");
        } else {
            tracing::debug!(%error, "the server is still away");
        }
    }
}

/// True for what does not look like a server that is away: somebody should know that it is tried for ever.
fn is_for_the_operator(error: &Error) -> bool {
    match error {
        Error::Config { .. } | Error::Refused(_) => true,
        Error::Io { error, .. } => error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()),
        _ => false,
    }
}

/// Sees to the opens of a connection until it ends.
async fn serve(weak: &Weak<Inner>, nudge: &Notify, connection: &Arc<Connection>) -> Ended {
    let mut end = connection.end();
    let mut work = Work { running: JoinSet::new(), under_way: HashSet::new(), missed: true };
    let places = Arc::new(Semaphore::new(RESUMES_MAX));
    loop {
        if let Some(why) = end.borrow_and_update().clone() {
            return why;
        }
        if std::mem::take(&mut work.missed) {
            if let Some(inner) = weak.upgrade() {
                work.start(&inner, connection, &places);
            }
        }
        tokio::select! {
            _ = end.changed() => {}
            () = nudge.notified() => work.missed = true,
            Some(done) = work.running.join_next() => {
                if let Ok(id) = done {
                    // What was asked for it meanwhile is looked at now.
                    work.missed |= work.under_way.remove(&id);
                }
            }
        }
    }
}

struct Work {
    running: JoinSet<OpenId>,
    under_way: HashSet<OpenId>,
    /// There may be something to start.
    missed: bool,
}

impl Work {
    fn start(&mut self, inner: &Arc<Inner>, connection: &Arc<Connection>, places: &Arc<Semaphore>) {
        let opens: Vec<_> = inner.opens.lock().iter().map(|(id, open)| (*id, Weak::clone(open))).collect();
        let mut wanted = Vec::new();
        for (id, weak) in opens {
            let Some(open) = weak.upgrade().filter(|open| open.wants_resume(connection)) else { continue };
            if self.under_way.insert(id) {
                let first = open.hold().is_zero() && open.replaces.swap(false, Ordering::AcqRel);
                wanted.push((id, weak, first));
            }
        }
        // The session before this one may still live. The open that supersedes it is the one that the server spares, so with no
        // hold time that must be the one for whose sake the session is replaced.
        let first = wanted.iter().position(|(_, _, first)| *first).map(|at| wanted.swap_remove(at));
        let (done, after) = watch::channel(());
        if let Some((id, weak, _)) = first {
            let (connection, places) = (Arc::clone(connection), Arc::clone(places));
            self.running.spawn(async move {
                let _done = done;
                resume::keep(&weak, &connection, &places).await;
                id
            });
        }
        for (id, weak, _) in wanted {
            let (connection, places, mut after) = (Arc::clone(connection), Arc::clone(places), after.clone());
            self.running.spawn(async move {
                // An error as soon as the first one is through, or if there is none.
                let _ = after.changed().await;
                resume::keep(&weak, &connection, &places).await;
                id
            });
        }
        let orphans = std::mem::take(&mut *inner.orphans.lock());
        for orphan in orphans {
            let (connection, places) = (Arc::clone(connection), Arc::clone(places));
            let session = Arc::downgrade(inner);
            self.running.spawn(async move {
                let _place = places.acquire_owned().await;
                let id = orphan.id;
                resume::close(orphan, &connection, &session).await;
                id
            });
        }
    }
}

impl Inner {
    /// Takes up the next phase, unless the session is over; false then.
    fn turn(&self, next: Phase) -> bool {
        self.phase.send_if_modified(|phase| {
            let goes_on = !matches!(phase, Phase::Over(..));
            if goes_on {
                *phase = next;
            }
            goes_on
        })
    }
}
