//! [`DataChannel`]: the channel as its users know it, over one connection after the other.
//!
//! ```text
//!   bindings ──► Home ── current ──► Shared: one connected transport
//!                 │                     │ ended
//!                 └── connected again ◄─┘ by the first who needs it: where control says that the data plane is now
//! ```

use super::Shared;
use crate::config::Transport;
use crate::error::{Ended, Error, Result};
use crate::open::Open;
use crate::recovery::{Backoff, Patience, may_pass};
use arc_swap::ArcSwap;
use holdfast_shared::types::Status;
use holdfast_shared::wire::service::TransportKind;
use holdfast_transport::Capabilities;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// For so long a channel that was verbs waits for verbs, before it takes what there is: a data plane that starts may
/// have its TCP port first.
const STICKS_TO_VERBS: Duration = Duration::from_secs(5);

/// A data channel to a data plane. Cheap to clone; it ends with [`DataChannel::close`], or when the last clone,
/// binding and request under way are gone.
///
/// When its connection is lost, whoever needs it next connects again.
#[derive(Clone)]
pub struct DataChannel {
    pub(crate) home: Arc<Home>,
    fallback: Option<Arc<str>>,
}

pub(crate) struct Home {
    current: ArcSwap<Shared>,
    wanted: Transport,
    /// With which of the server's endpoints it begins.
    nth: usize,
    closed: AtomicBool,
    /// It was verbs once, and will be again if it can.
    was_verbs: AtomicBool,
    /// One connects; the others wait for it.
    healing: tokio::sync::Mutex<()>,
}

/// True if a new connection may do better than one that ended so.
pub(crate) fn may_heal(why: &Ended) -> bool {
    match why {
        Ended::Disconnected | Ended::Transport(_) | Ended::BadMac => true,
        // The server found fault with what this side sends: it would again.
        Ended::Notice(status) => !matches!(
            status,
            Status::Protocol
                | Status::Version
                | Status::OverCredit
                | Status::Unsupported
                | Status::Invalid
                | Status::TooLong
        ),
        Ended::Closed | Ended::Misbehaved(_) | Ended::BadProof => false,
    }
}

impl DataChannel {
    pub(crate) fn new(shared: Arc<Shared>, wanted: Transport, nth: usize, fallback: Option<String>) -> Self {
        let was_verbs = AtomicBool::new(shared.identity.transport == TransportKind::Verbs);
        let home = Home {
            was_verbs,
            current: ArcSwap::new(shared),
            wanted,
            nth,
            closed: AtomicBool::new(false),
            healing: tokio::sync::Mutex::default(),
        };
        Self { home: Arc::new(home), fallback: fallback.map(Into::into) }
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.home.current.load_full()
    }

    /// Which transport carries it.
    pub fn transport(&self) -> TransportKind {
        self.shared().identity.transport
    }

    /// Why it is not a better transport (local, then verbs), if it was chosen automatically and that one could not be had. Not told
    /// where the server is on another host: then there is no local one.
    pub fn fallback_reason(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// The data plane's address.
    pub fn peer(&self) -> SocketAddr {
        self.shared().peer
    }

    /// What the transport can do.
    pub fn capabilities(&self) -> Capabilities {
        self.shared().capabilities
    }

    /// Longest piece that one request moves, bytes; longer reads and writes are split.
    pub fn transfer_max(&self) -> u32 {
        self.shared().facts.transfer_max
    }

    /// Bindings the channel may have at once.
    pub fn bindings_max(&self) -> u16 {
        self.shared().facts.bindings_max
    }

    /// Requests that may be in flight at once at the moment, as granted by the server.
    pub fn credits(&self) -> usize {
        self.shared().state.lock().credits_total()
    }

    /// Why its connection has ended, if it has and nobody has needed it since.
    pub fn ended(&self) -> Option<Ended> {
        self.shared().why_ended()
    }

    /// Ends it for good, for every clone and binding: the device is cut off from all regions before this returns, and
    /// requests under way fail.
    pub fn close(&self) {
        self.home.closed.store(true, Ordering::Release);
        self.shared().fail(Ended::Closed);
    }
}

impl Home {
    /// The connection, made again if it has ended.
    ///
    /// # Errors
    /// Why it ended, if a new one would not do better; what keeps a new one from being made, if waiting does not help.
    pub(crate) async fn live(&self, open: &Open, patience: &mut Patience) -> Result<Arc<Shared>> {
        if let Some(live) = self.usable()? {
            return Ok(live);
        }
        let _turn = patience.wait("the data channel", self.healing.lock()).await?;
        let (mut backoff, since) = (Backoff::data(), Instant::now());
        loop {
            if let Some(live) = self.usable()? {
                return Ok(live);
            }
            patience.pause("the data plane's return", backoff.next()).await?;
            match patience.wait("the data plane's return", self.again(open, since)).await? {
                Ok(shared) => {
                    tracing::info!(peer = %shared.peer, "the data channel is connected again");
                    self.was_verbs
                        .fetch_or(shared.identity.transport == TransportKind::Verbs, Ordering::AcqRel);
                    self.current.store(shared);
                    // Closed meanwhile? The next round sees to it.
                    if self.closed.load(Ordering::Acquire) {
                        self.current.load().fail(Ended::Closed);
                    }
                }
                Err(error) if passes(&error) => tracing::debug!(%error, "the data plane is still away"),
                Err(error) => return Err(error),
            }
        }
    }

    fn usable(&self) -> Result<Option<Arc<Shared>>> {
        let current = self.current.load_full();
        match current.why_ended() {
            None => Ok(Some(current)),
            Some(why) if may_heal(&why) && !self.closed.load(Ordering::Acquire) => Ok(None),
            Some(why) => Err(Error::channel(why)),
        }
    }

    async fn again(&self, open: &Open, since: Instant) -> Result<Arc<Shared>> {
        // Endpoints change with a new data plane.
        open.query_key().await?;
        let sticks = self.wanted == Transport::Auto
            && self.was_verbs.load(Ordering::Acquire)
            && since.elapsed() < STICKS_TO_VERBS;
        match open.connect_once(if sticks { Transport::Verbs } else { self.wanted }, self.nth).await {
            Ok((shared, _)) => Ok(shared),
            Err(_) if sticks => Err(Error::refused(Status::Unavailable)),
            Err(error) => Err(error),
        }
    }
}

fn passes(error: &Error) -> bool {
    match error {
        Error::Io { .. } | Error::TimedOut { .. } => true,
        Error::Ended { what: "channel", why } => may_heal(why),
        Error::Refused(refusal) => may_pass(refusal.status),
        _ => false,
    }
}

impl std::fmt::Debug for DataChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataChannel")
            .field("transport", &self.transport())
            .field("peer", &self.peer())
            .finish_non_exhaustive()
    }
}
