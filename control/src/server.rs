//! Start and stop: everything is opened and checked before the first connection is taken.

use crate::accept::{self, Front};
use crate::config::{Config, Volume as VolumeConfig};
use crate::driver::{Driver, Event};
use crate::gauges::Gauges;
use crate::secrets::StateDir;
use crate::volume::Volume;
use crate::{admin, link, tls};
use anyhow::Context;
use holdfast_shared::state::Authority;
use holdfast_shared::state::rules::VolumeRules;
use holdfast_shared::types::{ClusterId, VolumeId};
use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;

/// Events that may wait for the driver.
const EVENTS_MAX: usize = 1024;

/// Where a running server is reached.
#[derive(Clone, Debug)]
pub struct Ready {
    /// Control's addresses.
    pub listen: Vec<SocketAddr>,
    /// The admin socket.
    pub admin: PathBuf,
    /// The link.
    pub link: PathBuf,
}

/// Runs the server until `stop` is done, then closes every open cleanly.
///
/// # Errors
/// If it cannot start, or something fails that nothing can go on without.
pub async fn run(
    config: Config,
    ready: impl FnOnce(&Ready),
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let state = StateDir::open(&config.state_dir).context("state directory")?;
    let keyring = state.keyring().context("state directory")?;
    let mut volumes = HashMap::new();
    let mut rules = Vec::new();
    for volume in &config.volumes {
        let opened = Volume::open(&volume.directory).with_context(|| {
            format!("volume {:?}: {} (openat2 and /proc are needed)", volume.name, volume.directory.display())
        })?;
        let rule = rules_of(volume, keyring.cluster())?;
        anyhow::ensure!(
            volumes.insert(rule.id, Arc::new(opened)).is_none(),
            "volume {:?} has another one's id",
            volume.name
        );
        rules.push(rule);
    }
    if rules.is_empty() {
        tracing::warn!("no volume is configured: there is nothing to open");
    }
    let acceptor = TlsAcceptor::from(tls::server_config(&config.tls).context("tls")?);

    let gauges = Arc::new(Gauges::default());
    let authority = Authority::new(config.limits.authority(), rules, keyring);
    let (events, queue) = mpsc::channel(EVENTS_MAX);
    let earlier = state.living_dataplane().context("state directory")?;
    let may_live = earlier.is_some();
    if let Some(lock) = earlier {
        let events = events.clone();
        // A thread of its own: it may wait for ever, and nobody waits for it.
        std::thread::spawn(move || match lock.wait_until_free() {
            // Nobody listens any more when the process ends.
            Ok(()) => drop(events.blocking_send(Event::EarlierDataplaneDead)),
            Err(error) => tracing::error!(%error, "cannot see whether dataplane lives; it must register"),
        });
    }
    let mut driver = tokio::spawn(Driver::run(authority, volumes, gauges.clone(), may_live, queue));

    let addresses =
        Ready { listen: Vec::new(), admin: state.file("admin.sock"), link: state.file("link.sock") };
    let socket = |path: &PathBuf| format!("socket {} (its path may have 107 bytes)", path.display());
    let link = link::listener(&addresses.link).with_context(|| socket(&addresses.link))?;
    let admin = admin::listener(&addresses.admin).with_context(|| socket(&addresses.admin))?;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(link::serve(link, events.clone(), config.limits.binds));
    tasks.spawn(admin::serve(admin, events.clone(), gauges.clone()));

    let front = Front::new(events.clone(), acceptor, Arc::new(config.limits.clone()), gauges);
    let mut listen = Vec::new();
    for address in &config.listen {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        listen.push(listener.local_addr()?);
        tasks.spawn(accept::serve(listener, front.clone()));
    }
    ready(&Ready { listen, ..addresses });

    tokio::select! {
        () = stop => {}
        ended = &mut driver => {
            ended.context("the driver died")??;
            anyhow::bail!("the driver ended");
        }
        _ = tasks.join_next() => anyhow::bail!("a listener ended"),
    }
    tracing::info!("stopping: every open is fenced and closed");
    let (stopped, all_closed) = oneshot::channel();
    if events.send(Event::Stop(stopped)).await.is_ok() {
        let wait = Duration::from_millis(config.limits.stop_ms);
        if tokio::time::timeout(wait, all_closed).await.is_err() {
            tracing::warn!("some opens were not confirmed closed in time");
        }
    }
    Ok(())
}

fn rules_of(volume: &VolumeConfig, cluster: ClusterId) -> anyhow::Result<VolumeRules> {
    let id = volume.id_bytes().map_err(anyhow::Error::msg)?.unwrap_or_else(|| {
        let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        context.update(b"holdfast volume v1");
        context.update(&cluster.0);
        context.update(volume.name.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&context.finish().as_ref()[..16]);
        id
    });
    let grants = volume.grants.iter().map(|grant| (grant.principal.clone(), grant.access.into()));
    Ok(VolumeRules {
        id: VolumeId(id),
        name: volume.name.clone(),
        policy: volume.mac_policy.into(),
        grants: grants.collect(),
    })
}
