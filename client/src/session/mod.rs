//! [`Session`]: an authenticated client's life at the server, over one connection after the other.
//!
//! ```text
//!   caller ─ request ─► Session ─► Connection ─► TLS ─► control
//!                          ▲           │ ended
//!                          │           ▼
//!                          └── recovery: a new connection, every open resumed, and the request goes again
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `mod` | who is logged on; which connection a request takes |
//! | `connection` | one connection: requests out, replies in |
//! | [`crate::recovery`] | what happens when it ends |

pub(crate) mod connection;

use crate::config::Config;
use crate::error::{Ended, Error, Result};
use crate::open::Inner as OpenInner;
use crate::recovery::{Over, Patience, reconnect, repeat, resume::Orphan};
use connection::{Connection, Trouble};
use holdfast_shared::types::{OpenId, SessionId};
use holdfast_shared::wire::control::{Reply, Request};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot, watch};

/// An authenticated session with control. Cheap to clone.
///
/// When the connection ends, or the server is restarted, the session connects again by itself and resumes its opens, as
/// [`Config::recovery`] says; requests wait for that. It has a new id then. The session ends with its last clone (opens
/// hold one each), or with [`Session::close`], [`Session::logoff`] or [`Session::detach`].
///
/// A request that was under way when the connection ended is made again where that is safe (opens by their create id,
/// locks by their number, everything that only looks). Removing, renaming and making names is not: it ends with
/// [`Error::FateUnknown`], and the caller looks what has become of it.
///
/// ```no_run
/// # async fn example() -> holdfast_client::Result<()> {
/// use holdfast_client::{Config, OpenOptions, Place, Session};
/// let session = Session::connect(&Config::load("client.toml".as_ref())?).await?;
/// let open = session.open(&Place { volume: "data".into(), path: "a/b".into() }, &OpenOptions::read()).await?;
/// println!("{} bytes", open.attributes().size);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Session {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: Config,
    principal: String,
    opens_max: u32,
    pub(crate) phase: watch::Sender<Phase>,
    /// Those to resume on a new connection.
    pub(crate) opens: Mutex<HashMap<OpenId, Weak<OpenInner>>>,
    /// Dropped opens that could not be closed at once. Bounded by the opens a session may have.
    pub(crate) orphans: Mutex<Vec<Orphan>>,
    /// Tells the recovery task that there is an open to resume or to close.
    pub(crate) nudge: Arc<Notify>,
    /// Dropped with the session: the recovery task ends.
    _stop: oneshot::Sender<()>,
}

/// Which connection requests take.
#[derive(Clone)]
pub(crate) enum Phase {
    /// This one; it may have ended a moment ago.
    Up(Arc<Connection>),
    /// None at the moment; this was the last.
    Away(Arc<Connection>),
    /// None, and there will be none; this was the last.
    Over(Arc<Connection>, Over),
}

impl Phase {
    /// True while requests need not wait.
    pub(crate) fn is_up(&self) -> bool {
        matches!(self, Self::Up(connection) if !connection.is_over())
    }

    fn last(&self) -> &Arc<Connection> {
        match self {
            Self::Up(connection) | Self::Away(connection) | Self::Over(connection, _) => connection,
        }
    }
}

impl Session {
    /// Connects, proves who the client is, and says hello.
    ///
    /// # Errors
    /// [`Error::Io`] if the server cannot be reached or one side does not trust the other;
    /// [`Error::Incompatible`] if there is no common version; [`Error::Refused`] if the server turns the client away.
    pub async fn connect(config: &Config) -> Result<Self> {
        let connection = Connection::open(config).await?;
        let (stop, stopped) = oneshot::channel();
        let inner = Arc::new(Inner {
            config: config.clone(),
            principal: connection.welcome().principal.clone(),
            opens_max: connection.welcome().opens_max,
            phase: watch::Sender::new(Phase::Up(Arc::clone(&connection))),
            opens: Mutex::default(),
            orphans: Mutex::default(),
            nudge: Arc::default(),
            _stop: stop,
        });
        reconnect::start(&inner, connection, stopped);
        Ok(Self { inner })
    }

    /// Sends a request and waits for its reply; a refusal is an error. For requests that name no open.
    pub(crate) async fn call(&self, request: Request) -> Result<Reply> {
        self.call_for(request, Duration::ZERO).await.map(|(reply, _)| reply)
    }

    /// As [`Session::call`], for a request that the server may answer only after `longer`; says who answered.
    pub(crate) async fn call_for(
        &self,
        request: Request,
        longer: Duration,
    ) -> Result<(Reply, Arc<Connection>)> {
        let (mut patience, mut after) = (Patience::new(&self.inner.config), None);
        loop {
            let connection = self.connection(after.as_ref(), &mut patience).await?;
            match connection.call_for(request.clone(), longer).await {
                Ok(reply) => return Ok((reply, connection)),
                Err(Trouble::Lost { sent }) => repeat::may_be_made_again(&request, sent)?,
                Err(Trouble::Other(error)) => return Err(error),
            }
            after = Some(connection);
        }
    }

    /// The connection to use; a later one than `after`.
    pub(crate) async fn connection(
        &self,
        after: Option<&Arc<Connection>>,
        patience: &mut Patience,
    ) -> Result<Arc<Connection>> {
        let mut phase = self.inner.phase.subscribe();
        let usable = |phase: &Phase| match phase {
            Phase::Up(connection) => after.is_none_or(|after| !Arc::ptr_eq(after, connection)),
            Phase::Away(_) => false,
            Phase::Over(..) => true,
        };
        let found = async { phase.wait_for(usable).await.ok().map(|phase| phase.clone()) };
        match patience.wait("the server's return", found).await? {
            Some(Phase::Over(_, over)) => Err(over.error()),
            Some(Phase::Up(connection) | Phase::Away(connection)) => Ok(connection),
            None => Err(Error::session(Ended::Closed)),
        }
    }

    /// Asks for nothing; returns how long the answer took.
    ///
    /// # Errors
    /// As any request.
    pub async fn ping(&self) -> Result<Duration> {
        let start = Instant::now();
        match self.call(Request::Ping).await? {
            Reply::Done => Ok(start.elapsed()),
            _ => Err(unexpected("ping")),
        }
    }

    /// Ends the session, for every clone, and closes its opens. A server that is away is not waited for: it keeps the opens
    /// for their hold time.
    pub async fn close(self) {
        let away = !self.inner.phase.borrow().is_up();
        let opens = self.inner.opens.lock().values().any(|open| open.strong_count() > 0);
        if opens && !away {
            let _ = tokio::time::timeout(self.inner.config.request_max(), self.logoff()).await;
        }
        self.end().await;
    }

    /// Ends the session, for every clone: the server closes its opens, and keeps nothing for it. Waits for a server
    /// that is away, as the policy says.
    ///
    /// # Errors
    /// As any request. After an error the session goes on.
    pub async fn logoff(&self) -> Result<()> {
        match self.call(Request::Logoff).await? {
            Reply::Done => self.end().await,
            _ => return Err(unexpected("logoff")),
        }
        Ok(())
    }

    /// Ends the session, for every clone, but lets the server keep its opens for their hold time: whoever has their
    /// resume keys may resume them. What else ends a process without closing has the same effect.
    ///
    /// ```no_run
    /// # async fn example(session: holdfast_client::Session, open: holdfast_client::Open) -> holdfast_client::Result<()> {
    /// std::fs::write("key", open.resume_key()).unwrap();
    /// session.detach().await;
    /// # Ok(()) }
    /// ```
    pub async fn detach(self) {
        self.end().await;
    }

    async fn end(&self) {
        let over = Over::Ended(Ended::Closed);
        let last = Arc::clone(self.inner.phase.borrow().last());
        self.inner.over(&last, &over);
        last.shut().await;
    }

    /// The session's id, for the operator, and for whoever resumes its opens while they are live ([`crate::ResumeOptions`]).
    /// Another one after each recovery.
    pub fn id(&self) -> SessionId {
        self.inner.phase.borrow().last().id()
    }

    /// Who the server says the client is.
    pub fn principal(&self) -> &str {
        &self.inner.principal
    }

    /// Opens this session may have at once.
    pub fn opens_max(&self) -> u32 {
        self.inner.opens_max
    }

    /// The address at which control was reached.
    pub fn server(&self) -> SocketAddr {
        self.inner.phase.borrow().last().server()
    }

    /// What the session was made with.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }
}

impl Inner {
    /// Nothing more will come: tells everybody who waits.
    pub(crate) fn over(&self, last: &Arc<Connection>, over: &Over) {
        let first = self.phase.send_if_modified(|phase| {
            let first = !matches!(phase, Phase::Over(..));
            if first {
                *phase = Phase::Over(Arc::clone(last), over.clone());
            }
            first
        });
        let opens: Vec<_> = if first { self.opens.lock().values().cloned().collect() } else { Vec::new() };
        for open in opens.iter().filter_map(Weak::upgrade) {
            open.over(over);
        }
    }

    /// Notes an open of a connection, so that it is resumed on the next one.
    pub(crate) fn register(&self, open: &Arc<OpenInner>, on: &Arc<Connection>) {
        let mut opens = self.opens.lock();
        // Bounded by twice what lives, also for those who open and close for ever; and no open pays for all the others.
        if opens.len() == opens.capacity() {
            opens.retain(|_, open| open.strong_count() > 0);
            let live = opens.len();
            opens.reserve(live.max(16));
        }
        opens.insert(open.id, Arc::downgrade(open));
        drop(opens);
        let phase = self.phase.borrow().clone();
        match phase {
            Phase::Over(_, over) => open.over(&over),
            Phase::Up(connection) if Arc::ptr_eq(&connection, on) => {}
            _ => self.nudge.notify_one(),
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id())
            .field("server", &self.server())
            .finish_non_exhaustive()
    }
}

/// A reply of another kind than the request asks for.
pub(crate) fn unexpected(request: &str) -> Error {
    Error::Misbehaved(format!("the reply to '{request}' is of another kind"))
}

#[cfg(test)]
mod tests;
