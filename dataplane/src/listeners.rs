//! The listeners: one thread each, that admits peers and hands their channels to the engine.

use crate::config::{Config, Enabled, advertised};
use crate::engine::Engine;
use anyhow::Context;
use holdfast_shared::wire::service::{Endpoint, TransportKind};
use holdfast_transport::verbs::Lanes;
use holdfast_transport::{Listener, local, tcp, verbs};
use holdfast_verbs::memory::Pool;
use holdfast_verbs::{Device, FileRegistration};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Where the kernel says which run of it this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A thread that accepts, and what ends it.
struct Acceptor {
    stop: Box<dyn Fn() + Send + Sync>,
    thread: JoinHandle<()>,
}

/// All listeners of the process.
#[derive(Default)]
pub struct Listeners {
    /// Where verbs listens.
    pub verbs: Vec<SocketAddr>,
    /// Where tcp listens.
    pub tcp: Option<SocketAddr>,
    /// The socket for clients on this host, absolute.
    pub local: Option<PathBuf>,
    /// This run of the kernel, if there is a local socket.
    boot_id: Option<String>,
    waiting: Vec<Box<dyn Listener>>,
    running: Vec<Acceptor>,
}

impl Listeners {
    /// Listens wherever the configuration says; verbs listeners leave lanes in `lanes`.
    ///
    /// # Errors
    /// An address that can't be had; memory that can't be registered; no RDMA device when verbs is `on`; nowhere to listen at all.
    pub fn bind(config: &Config, pools: &[Pool], lanes: Option<&Arc<Lanes>>) -> anyhow::Result<Self> {
        let mut all = Self::default();
        match config.verbs.enabled {
            Enabled::Off => {}
            enabled => {
                if let Err(error) = all.bind_verbs(config, pools, lanes) {
                    if enabled == Enabled::On {
                        return Err(error);
                    }
                    tracing::info!(reason = format!("{error:#}"), "no verbs");
                }
            }
        }
        if config.tcp.enabled {
            let listener = tcp::TcpListener::bind(config.tcp.listen)
                .with_context(|| format!("cannot listen on tcp {}", config.tcp.listen))?;
            all.tcp = Some(listener.address());
            all.waiting.push(Box::new(listener));
        }
        // Last: by now the port shows that no other data plane runs with this configuration.
        if config.local.enabled {
            if let Err(error) = all.bind_local(config) {
                tracing::warn!(
                    socket = %config.local_socket().display(),
                    reason = format!("{error:#}"),
                    "no local data channels: clients on this host use the other transports"
                );
            }
        }
        anyhow::ensure!(
            !all.waiting.is_empty(),
            "there is nowhere to listen: neither tcp nor verbs nor local"
        );
        Ok(all)
    }

    fn bind_local(&mut self, config: &Config) -> anyhow::Result<()> {
        let path = std::path::absolute(config.local_socket())?;
        anyhow::ensure!(
            path.to_str().is_some(),
            "its path is not UTF-8, and clients could not be told of it"
        );
        let listener = local::LocalListener::bind(&path, config.local.mode.0)?
            .with_shared_bytes_max(config.local.shared_bytes_max);
        self.boot_id = Some(std::fs::read_to_string(BOOT_ID).context("no boot id")?.trim().to_owned());
        self.local = Some(path);
        self.waiting.push(Box::new(listener));
        Ok(())
    }

    /// Without addresses of its own, one listener for all devices: so the pools are registered once for each of them.
    fn bind_verbs(
        &mut self,
        config: &Config,
        pools: &[Pool],
        lanes: Option<&Arc<Lanes>>,
    ) -> anyhow::Result<()> {
        let listen = |address: Ipv4Addr| {
            let mut listener = verbs::VerbsListener::bind((address, config.verbs.port).into())
                .with_context(|| format!("cannot listen on verbs {address}:{}", config.verbs.port))?;
            // Here, where a memlock limit that is too low can still be told, and tcp be used instead.
            listener.register(pools).context("cannot register the buffer pools with the RDMA device")?;
            if let Some(lanes) = lanes {
                listener.serve_lanes(Arc::clone(lanes));
            }
            anyhow::Ok(listener)
        };
        if lanes.is_some() {
            // Not fatal: each Map is refused, and clients read as ever.
            for device in Device::list()? {
                match FileRegistration::is_possible(&device) {
                    Ok(true) => {}
                    Ok(false) => tracing::warn!(
                        "no one-sided reads: this kernel pins no read-only mappings of files (6.12 does)"
                    ),
                    Err(error) => tracing::warn!(%error, "one-sided reads may fail"),
                }
            }
        }
        let (mut addresses, mut listeners) = (Vec::new(), Vec::new());
        if config.verbs.addresses.is_empty() {
            let listener = listen(Ipv4Addr::UNSPECIFIED)?;
            for device in Device::list()? {
                addresses.extend(
                    device
                        .ipv4_addresses()?
                        .into_iter()
                        .map(|ip| SocketAddr::from((ip, listener.address().port()))),
                );
            }
            anyhow::ensure!(!addresses.is_empty(), "no RDMA device has an IPv4 address");
            listeners.push(listener);
        } else {
            for address in &config.verbs.addresses {
                let listener = listen(*address)?;
                addresses.push(listener.address());
                listeners.push(listener);
            }
        }
        self.verbs = addresses;
        self.waiting.extend(listeners.into_iter().map(|listener| Box::new(listener) as Box<dyn Listener>));
        Ok(())
    }

    /// What the service blob says, best first.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        let endpoint = |transport, address: SocketAddr| Endpoint {
            transport,
            address: advertised(address.ip()),
            port: address.port(),
            boot_id: None,
        };
        let local = self.local.iter().map(|path| Endpoint {
            transport: TransportKind::Local,
            address: path.to_str().map(str::to_owned),
            port: 0,
            boot_id: self.boot_id.clone(),
        });
        let verbs = self.verbs.iter().map(|address| endpoint(TransportKind::Verbs, *address));
        let tcp = self.tcp.map(|address| endpoint(TransportKind::Tcp, address));
        local.chain(verbs).chain(tcp).collect()
    }

    /// Starts accepting.
    ///
    /// # Errors
    /// The kernel's, when a thread can't be had.
    pub fn start(&mut self, engine: &Arc<Engine>) -> anyhow::Result<()> {
        for (n, mut listener) in self.waiting.drain(..).enumerate() {
            let engine = Arc::clone(engine);
            let stop = listener.stopper();
            let address = listener.address();
            let thread = std::thread::Builder::new().name(format!("accept-{n}")).spawn(move || {
                loop {
                    match listener.accept(&mut |peer| engine.setup(peer)) {
                        Ok(channel) => engine.adopt(channel),
                        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return,
                        Err(error) => {
                            crate::fault::fatal(&format!("listening at {address} has ended"), &error);
                        }
                    }
                }
            })?;
            self.running.push(Acceptor { stop, thread });
        }
        Ok(())
    }

    /// Stops accepting. Idempotent.
    pub fn stop(&mut self) {
        for Acceptor { stop, thread } in self.running.drain(..) {
            stop();
            if thread.join().is_err() {
                tracing::error!("an acceptor had panicked");
            }
        }
    }
}
