//! Start and stop: everything is opened and checked, and every open of before is back, before the first connection is taken.
//!
//! ```text
//!   state directory ─► volumes, TLS ─► link, admin ─► boot ─► driver ─► TCP listeners ─► ready
//!                                                                            │ stop
//!                                       journal synced, nothing closed ◄─────┘
//! ```

use crate::accept::{self, Front};
use crate::boot::{self, Found, Plan, Sources};
use crate::config::{Config, Grant as VolumeGrant, Volume as VolumeConfig};
use crate::driver::{Driver, Event, Hands, Recovered};
use crate::gauges::Gauges;
use crate::notify::Store;
use crate::secrets::StateDir;
use crate::volume::{Direct, Files, Volume};
use crate::{admin, link, tls};
use anyhow::Context;
use holdfast_shared::state::{Right, VolumeRules};
use holdfast_shared::types::{ClusterId, VolumeId};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ffi::OsString;
use std::future::Future;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
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
    /// Opens that were recovered.
    pub recovered: u64,
    /// Opens whose file is lost.
    pub lost: u64,
}

/// How to start, beside the config.
#[derive(Debug, Default)]
pub struct Options {
    /// Start anew where the journal is damaged, lost or older than it was.
    pub accept_journal_loss: bool,
    /// Start though volumes are missing of which opens are recorded: those are lost.
    pub accept_lost_volumes: bool,
    /// Descriptors that the supervisor kept, with their names.
    pub inherited: Vec<(String, OwnedFd)>,
    /// The supervisor's notify socket.
    pub notify: Option<OsString>,
}

/// Runs the server until `stop` is done. Nothing is closed then: opens are in the journal, and the next start has them.
///
/// # Errors
/// If it cannot start, or something fails that nothing can go on without.
pub async fn run(
    config: Config,
    options: Options,
    ready: impl FnOnce(&Ready),
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    tokio::pin!(stop);
    let begin = Instant::now();
    let state = StateDir::open(&config.state_dir).context("state directory")?;
    let cluster = state.keyring().context("state directory")?.cluster();
    let (volumes, rules, facts) = volumes(&config, cluster)?;
    let acceptor = TlsAcceptor::from(tls::server_config(&config.tls).context("tls")?);
    let gauges = Arc::new(Gauges::default());
    gauges.recovering.store(1, Relaxed);
    let limits = Arc::new(config.limits.clone());
    let addresses = config.listen.clone();
    let (events, mut queue) = mpsc::channel(EVENTS_MAX);

    let (admin_path, link_path) = (state.file("admin.sock"), state.file("link.sock"));
    let socket = |path: &PathBuf| format!("socket {} (its path may have 107 bytes)", path.display());
    let link = link::listener(&link_path).with_context(|| socket(&link_path))?;
    let admin = admin::listener(&admin_path).with_context(|| socket(&admin_path))?;
    let descriptors_max = descriptors_max(&limits);
    let wanted = Arc::new(AtomicUsize::new(descriptors_max));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(link::serve(link, events.clone(), limits.binds, wanted.clone()));
    tasks.spawn(admin::serve(admin, events.clone(), gauges.clone(), Arc::new(facts)));

    let earlier = watch_earlier(&state, &events)?;
    let plan = Plan {
        config,
        state,
        volumes: volumes.clone(),
        rules,
        gauges: gauges.clone(),
        accept_journal_loss: options.accept_journal_loss,
        accept_lost_volumes: options.accept_lost_volumes,
    };
    let recover = async {
        let read = tokio::task::spawn_blocking(move || plan.read_journal().map(|read| (plan.state, read)));
        let (state, read) = read.await.context("the start died")??;
        let registered = if earlier { boot::living(&mut queue).await } else { None };
        let store = Store::connect(options.notify.as_deref(), read.generation)
            .context("the supervisor's notify socket")?;
        recover(
            state,
            read,
            registered,
            (options.inherited, store),
            (volumes, gauges.clone()),
            descriptors_max,
        )
        .await
    };
    let (_state, driver, store) = tokio::select! {
        recovered = recover => recovered?,
        () = &mut stop => {
            tracing::info!("stopped while recovering; nothing has changed");
            return Ok(());
        }
        _ = tasks.join_next() => anyhow::bail!("a listener ended"),
    };
    // A registration from now on meets opens that have their descriptors.
    wanted.store(0, Relaxed);
    let mut driver = tokio::spawn(driver.run(queue));

    let mut listen = Vec::new();
    let mut listeners = Vec::new();
    for address in &addresses {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        listen.push(listener.local_addr()?);
        listeners.push(listener);
    }
    let front = Front::new(events.clone(), acceptor, limits.clone(), gauges.clone());
    for listener in listeners {
        tasks.spawn(accept::serve(listener, front.clone()));
    }
    gauges.recovering.store(0, Relaxed);
    gauges.recovery_ms.store(u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX), Relaxed);
    let (recovered, lost) = (gauges.recovered_opens.load(Relaxed), gauges.recovered_lost.load(Relaxed));
    ready(&Ready { listen, admin: admin_path, link: link_path, recovered, lost });
    if let Some(store) = &store {
        store.ready();
    }

    tokio::select! {
        () = stop => {}
        ended = &mut driver => {
            ended.context("the driver died")??;
            anyhow::bail!("the driver ended");
        }
        _ = tasks.join_next() => anyhow::bail!("a listener ended"),
    }
    tracing::info!("stopping: opens stay in the journal, and are back at the next start");
    if let Some(store) = &store {
        store.stopping();
    }
    let (stopped, all_durable) = oneshot::channel();
    if events.send(Event::Stop(stopped)).await.is_ok() {
        let wait = Duration::from_millis(limits.stop_ms);
        if tokio::time::timeout(wait, all_durable).await.is_err() {
            tracing::warn!("the journal took too long; what it did not confirm was not promised to anybody");
        }
    }
    Ok(())
}

/// Finds the files again, and makes the driver that knows them.
async fn recover(
    state: StateDir,
    read: boot::Journalled,
    mut registered: Option<boot::Registered>,
    (inherited, store): (Vec<(String, OwnedFd)>, Option<Store>),
    (volumes, gauges): (HashMap<VolumeId, Arc<Volume>>, Arc<Gauges>),
    descriptors_max: usize,
) -> anyhow::Result<(StateDir, Driver, Option<Store>)> {
    let held = registered.as_mut().map(|(_, registration, _)| std::mem::take(&mut registration.descriptors));
    let work = move || {
        let sources = Sources {
            volumes: &volumes,
            held: held.unwrap_or_default(),
            inherited,
            store: store.as_ref(),
            descriptors_max,
            gauges: &gauges,
        };
        let Found { reopened, files } = boot::reopen(read.reopens, sources)?;
        let recovered = Recovered { authority: read.authority, reopened, files, registered };
        let hands = Hands {
            volumes,
            gauges,
            store: store.clone(),
            journal: read.journal,
            journal_early: read.early,
            journal_events: read.events,
        };
        Ok::<_, anyhow::Error>((Driver::new(recovered, hands), store))
    };
    let (driver, store) = tokio::task::spawn_blocking(work).await.context("the start died")??;
    Ok((state, driver, store))
}

/// True if a dataplane of before lives. Its end is told as an event.
fn watch_earlier(state: &StateDir, events: &mpsc::Sender<Event>) -> anyhow::Result<bool> {
    let Some(lock) = state.living_dataplane().context("state directory")? else { return Ok(false) };
    let events = events.clone();
    // A thread of its own: it may wait for ever, and nobody waits for it.
    std::thread::spawn(move || match lock.wait_until_free() {
        // Nobody listens any more when the process ends.
        Ok(()) => drop(events.blocking_send(Event::EarlierDataplaneDead)),
        Err(error) => tracing::error!(%error, "cannot see whether dataplane lives; it must register"),
    });
    Ok(true)
}

/// Descriptors that recovered opens may take.
fn descriptors_max(limits: &crate::config::Limits) -> usize {
    if limits.reopened_files > 0 {
        return limits.reopened_files;
    }
    let allowed = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    allowed.map_or(usize::MAX, |allowed| usize::try_from(allowed / 4 * 3).unwrap_or(usize::MAX))
}

type OpenVolumes = (HashMap<VolumeId, Arc<Volume>>, Vec<VolumeRules>, Value);

fn volumes(config: &Config, cluster: ClusterId) -> anyhow::Result<OpenVolumes> {
    let (mut volumes, mut rules, mut facts) = (HashMap::new(), Vec::new(), Vec::new());
    for volume in &config.volumes {
        let opened = Volume::open(&volume.directory).with_context(|| {
            format!("volume {:?}: {} (openat2 and /proc are needed)", volume.name, volume.directory.display())
        })?;
        let files = opened.files(volume.is_direct());
        let mut rule = rules_of(volume, cluster)?;
        if rule.direct && files.direct == Direct::Impossible {
            tracing::warn!(
                volume = volume.name,
                file_system = files.file_system,
                "file_io = \"direct\", and this file system has no direct I/O, or none that can be relied on: files are served through the page cache"
            );
            rule.direct = false;
        }
        facts.push(facts_of(volume, &files));
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
    Ok((volumes, rules, facts.into()))
}

/// As [`admin`] tells it.
fn facts_of(volume: &VolumeConfig, files: &Files) -> Value {
    let (direct, blocks) = match files.direct {
        Direct::Blocks(blocks) => ("possible", Some(blocks)),
        Direct::Possible => ("possible", None),
        Direct::Impossible => ("impossible", None),
        Direct::Untried => ("untried", None),
    };
    json!({
        "name": volume.name,
        "directory": volume.directory,
        "file_io": if volume.is_direct() { "direct" } else { "cached" },
        "file_system": files.file_system,
        "direct": direct,
        "direct_blocks": blocks,
    })
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
    let right = |grant: &VolumeGrant| if volume.immutable { Right::Read } else { grant.access.into() };
    let grants = volume.grants.iter().map(|grant| (grant.principal.clone(), right(grant)));
    Ok(VolumeRules {
        id: VolumeId(id),
        name: volume.name.clone(),
        policy: volume.mac_policy.into(),
        grants: grants.collect(),
        lock_mode: volume.locks.into(),
        hold_default_ms: volume.hold_ms,
        hold_max_ms: volume.hold_max_ms,
        local_descriptors: volume.gives_descriptors(),
        direct: volume.is_direct(),
    })
}
