//! Which data plane endpoint a client connects to, and why.
//!
//! ```text
//!   auto:   local endpoints, if this is the server's host ──failed──►
//!           verbs endpoints, if this host has an RDMA device ──failed: remember why──► tcp endpoints
//!   local, verbs, tcp:  endpoints of that transport or an error
//! ```

use crate::channel::{self, DataChannel, Shared};
use crate::config::Transport;
use crate::error::{Error, Result};
use crate::open::Open;
use holdfast_shared::types::Status;
use holdfast_shared::wire::data;
use holdfast_shared::wire::service::{Endpoint, ServiceBlob, TransportKind};
use holdfast_transport::{Channel, local, tcp, verbs};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two attempts to reach a data plane that is away.
const AGAIN: Duration = Duration::from_millis(200);

impl Open {
    /// Connects a data channel to a data plane that serves this open; the channel may carry bindings of other opens of
    /// the same server too. While no data plane is there, tries again for as long as a connection may take.
    ///
    /// # Errors
    /// [`Status::Unavailable`] if there is no data plane; else why the last endpoint could not be reached.
    pub async fn connect(&self, transport: Transport) -> Result<DataChannel> {
        self.connect_nth(transport, 0).await
    }

    /// As [`Open::connect`], beginning with the server's `nth` endpoint of each transport (round, if it names fewer): so that
    /// several channels use several of them, and with them several networks.
    ///
    /// # Errors
    /// As [`Open::connect`].
    pub async fn connect_nth(&self, transport: Transport, nth: usize) -> Result<DataChannel> {
        let deadline = Instant::now() + self.session().config().connect_max();
        loop {
            let error = match self.connect_once(transport, nth).await {
                Ok((shared, why_not_verbs)) => {
                    return Ok(DataChannel::new(shared, transport, nth, why_not_verbs));
                }
                Err(error) => error,
            };
            let may_pass = matches!(error, Error::Io { .. } | Error::Ended { .. })
                || error.status() == Some(Status::Unavailable);
            // Verbs that cannot be had does not come by waiting.
            if !may_pass || transport == Transport::Verbs || Instant::now() + AGAIN > deadline {
                return Err(error);
            }
            tokio::time::sleep(AGAIN).await;
            self.query_key().await?;
        }
    }

    /// One attempt; says why it is not a better transport, if one was to be tried.
    pub(crate) async fn connect_once(
        &self,
        transport: Transport,
        nth: usize,
    ) -> Result<(Arc<Shared>, Option<String>)> {
        let grant = self.grant();
        if grant.service_blob.is_empty() {
            return Err(Error::refused(Status::Unavailable));
        }
        let blob = ServiceBlob::decode(&grant.service_blob).map_err(|e| Error::Misbehaved(e.to_string()))?;
        if !(blob.version_min..=blob.version_max).contains(&data::VERSION) {
            return Err(Error::Incompatible(format!(
                "the data plane speaks versions {} to {}, this client {}",
                blob.version_min,
                blob.version_max,
                data::VERSION
            )));
        }
        let only = match transport {
            Transport::Auto => None,
            Transport::Local => Some(TransportKind::Local),
            Transport::Verbs => Some(TransportKind::Verbs),
            Transport::Tcp => Some(TransportKind::Tcp),
        };
        if let Some(kind) = only {
            return Ok((self.try_all(&blob, kind, nth).await?, None));
        }
        let why_not_local = match self.try_all(&blob, TransportKind::Local, nth).await {
            Ok(channel) => return Ok((channel, None)),
            // The usual case: the server is elsewhere.
            Err(Error::Usage(why)) => {
                tracing::debug!(why, "not local");
                None
            }
            // On this host, and yet its socket can't be used: perhaps this user may not enter its directory.
            Err(error) => Some(error.to_string()),
        };
        let why_not_verbs = match self.try_all(&blob, TransportKind::Verbs, nth).await {
            Ok(channel) => return Ok((channel, why_not_local)),
            Err(error) => error.to_string(),
        };
        let why =
            why_not_local.map_or_else(|| why_not_verbs.clone(), |local| format!("{why_not_verbs}; {local}"));
        Ok((self.try_all(&blob, TransportKind::Tcp, nth).await?, Some(why)))
    }

    /// Tries the endpoints of one transport in the server's order, from the `nth` on and round.
    async fn try_all(&self, blob: &ServiceBlob, kind: TransportKind, nth: usize) -> Result<Arc<Shared>> {
        if kind == TransportKind::Verbs {
            local_rdma()?;
        }
        let mut last = Error::Usage(format!("the server offers no {} endpoint", kind.name()));
        let all: Vec<_> = blob.endpoints.iter().filter(|endpoint| endpoint.transport == kind).collect();
        for endpoint in all.iter().cycle().skip(nth % all.len().max(1)).take(all.len()) {
            match self.try_one(blob, endpoint).await {
                Ok(channel) => return Ok(channel),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn try_one(&self, blob: &ServiceBlob, endpoint: &Endpoint) -> Result<Arc<Shared>> {
        let goal = self.goal(endpoint)?;
        let config = self.session().config();
        let (wait_max, in_flight_max) = (config.connect_max(), config.in_flight_max);
        let prepared = channel::prepare(in_flight_max)?;
        let (kind, setup, frames) = (endpoint.transport, prepared.setup, prepared.frames);
        let name = goal.to_string();
        let connected = tokio::task::spawn_blocking(move || -> std::io::Result<Box<dyn Channel>> {
            Ok(match (goal, kind) {
                (Goal::Path(path), _) => Box::new(local::connect(&path, wait_max, setup)?),
                (Goal::Address(address), TransportKind::Verbs) => {
                    Box::new(verbs::connect(address, wait_max, setup)?)
                }
                (Goal::Address(address), _) => Box::new(tcp::connect(address, wait_max, setup)?),
            })
        });
        let transport =
            connected.await.map_err(|_| Error::Internal("connecting panicked"))?.map_err(|e| {
                Error::io(format!("cannot reach the data plane at {name} over {}", kind.name()), e)
            })?;
        let channel = Shared::start(transport, frames, in_flight_max, wait_max).await?;
        if channel.facts.instance != blob.instance {
            // It restarted since control told us: ask again.
            return Err(Error::refused(Status::Unavailable));
        }
        Ok(channel)
    }

    fn goal(&self, endpoint: &Endpoint) -> Result<Goal> {
        if endpoint.transport == TransportKind::Local {
            let ours = boot_id();
            if ours.is_none() || ours != endpoint.boot_id {
                return Err(Error::Usage("the server is on another host".into()));
            }
            let path = endpoint.address.as_deref().map(PathBuf::from).filter(|path| path.is_absolute());
            let path = path.ok_or_else(|| Error::Misbehaved("a local endpoint without a path".into()))?;
            return Ok(Goal::Path(path));
        }
        let ip = match &endpoint.address {
            None => self.session().server().ip(),
            Some(text) => text
                .parse::<IpAddr>()
                .map_err(|_| Error::Misbehaved(format!("'{text}' in the service blob is not an address")))?,
        };
        Ok(Goal::Address(SocketAddr::new(ip, endpoint.port)))
    }
}

/// What to connect to.
enum Goal {
    Address(SocketAddr),
    Path(PathBuf),
}

impl std::fmt::Display for Goal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

/// Which run of which kernel this is; `None` where that can't be read.
fn boot_id() -> Option<String> {
    Some(std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

/// An error that says why this host cannot use verbs, if it cannot.
fn local_rdma() -> Result<()> {
    match holdfast_verbs::Device::list() {
        Ok(devices) if devices.is_empty() => Err(Error::Usage("this host has no RDMA device".into())),
        Ok(_) => Ok(()),
        Err(error) => Err(Error::Usage(format!("the RDMA devices of this host cannot be used: {error}"))),
    }
}
