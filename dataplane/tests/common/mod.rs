//! What the tests share: a control in memory that checks proofs as the real one does, and a scripted client that builds
//! its frames from the layouts.
#![allow(dead_code, unreachable_pub, unused_imports, clippy::unwrap_used, clippy::cast_possible_truncation)] // each test binary uses a part

mod client;
mod control;
mod gate;
pub mod link;
mod server;

pub use client::{Client, Msg};
pub use control::{FakeControl, Open, Told, past_the_page_cache};
pub use gate::{Gate, gated};
pub use server::Server;

use holdfast_dataplane::config::{EngineConfig, Limits, MapConfig};
use holdfast_dataplane::engine::{Engine, KernelFile, Opener, Settings};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::Access;
use holdfast_transport::Listener;
use holdfast_transport::local::{LocalListener, connect};
use holdfast_transport::memory::{Faults, pair};
use holdfast_transport::tcp::{self, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An engine with its control.
pub struct Rig {
    pub engine: Arc<Engine>,
    pub control: Arc<FakeControl>,
}

pub fn settings() -> Settings {
    Settings {
        engine: EngineConfig {
            workers: 1,
            storage_threads: 2,
            pool_bytes: 4 << 20,
            message_pool_bytes: 16 << 20,
            ..EngineConfig::default()
        },
        limits: Limits { linger_ms: 50, channels_max: 128, ..Limits::default() },
        map: MapConfig::default(),
        instance: [7; 16],
        verifier: 0x5EED,
    }
}

impl Rig {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Settings)) -> Self {
        Self::with_files(change, KernelFile::opener())
    }

    pub fn with_files(change: impl FnOnce(&mut Settings), opener: Opener) -> Self {
        let mut settings = settings();
        change(&mut settings);
        let control = FakeControl::new();
        let engine = Engine::start(settings, Arc::clone(&control) as _, opener).unwrap();
        control.attach(&engine);
        Self { engine, control }
    }

    pub fn open(&self, content: &[u8]) -> Open {
        self.control.open(content, Access::ALL, MacPolicy::Header)
    }

    /// A client that has read the server's hello.
    pub fn client(&self) -> Client {
        self.client_and_faults().0
    }

    pub fn client_and_faults(&self) -> (Client, Faults) {
        let (mut client, faults) = self.silent_client();
        client.hello();
        (client, faults)
    }

    /// A client on the server's host, which has read the server's hello.
    pub fn local_client(&self) -> Client {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut listener = LocalListener::bind(&path, 0o600).unwrap();
        let parts = Client::parts();
        let channel = connect(&path, Duration::from_secs(10), parts.setup()).unwrap();
        let accepted = listener.accept(&mut |peer| self.engine.setup(peer)).unwrap();
        self.engine.adopt(accepted);
        let mut client = Client::new(Box::new(channel), parts);
        client.hello();
        client
    }

    /// Clients over TCP, which have read the server's hello.
    pub fn tcp_clients(&self, count: usize) -> Vec<Client> {
        let mut listener = TcpListener::bind(([127, 0, 0, 1], 0).into()).unwrap();
        let each = |_| {
            let parts = Client::parts();
            let channel = tcp::connect(listener.address(), Duration::from_secs(10), parts.setup()).unwrap();
            let accepted = listener.accept(&mut |peer| self.engine.setup(peer)).unwrap();
            self.engine.adopt(accepted);
            let mut client = Client::new(Box::new(channel), parts);
            client.hello();
            client
        };
        (0..count).map(each).collect()
    }

    /// A client that has not.
    pub fn silent_client(&self) -> (Client, Faults) {
        let parts = Client::parts();
        let (ours, theirs) =
            pair(parts.setup(), self.engine.setup(anyone()).expect("room for a channel")).unwrap();
        let faults = ours.faults();
        self.engine.adopt(Box::new(theirs));
        (Client::new(Box::new(ours), parts), faults)
    }

    /// A client and a binding of a fresh open.
    pub fn bound(&self, content: &[u8]) -> (Client, u32, Open) {
        let open = self.open(content);
        let mut client = self.client();
        let binding = client.bind(&open).unwrap();
        (client, binding, open)
    }

    pub fn gauge(&self, name: &str) -> u64 {
        self.engine.gauges().get(name).unwrap()
    }

    /// Waits until a gauge has a value.
    pub fn wait_gauge(&self, name: &str, value: u64) {
        eventually(&format!("{name} = {value}, is {}", self.gauge(name)), || self.gauge(name) == value);
    }
}

impl Drop for Rig {
    // Ends the workers while there is still a reference: none of them may be the one that drops the engine.
    fn drop(&mut self) {
        self.engine.stop();
    }
}

/// The address of the memory transport's peers.
pub fn anyone() -> std::net::SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Bytes that differ from place to place.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut z = seed;
    (0..length)
        .map(|_| {
            z = z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (z >> 56) as u8
        })
        .collect()
}
