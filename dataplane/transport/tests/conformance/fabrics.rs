//! The transports, and how the tests get at a pair of channels of each.

use crate::kit::{Fabric, Listening};
use holdfast_transport::{Channel, Listener, Setup, local, memory, tcp, verbs};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct Memory;

impl Fabric for Memory {
    const NAME: &'static str = "memory";
    const PLACE_IS_BUFFERED: bool = false;
    const OWNER_KNOWS: bool = true;
    const SEND_WAITS: bool = true;

    fn pair(client: Setup, server: Setup) -> (Box<dyn Channel>, Box<dyn Channel>) {
        let (client, server) = memory::pair(client, server).unwrap();
        (Box::new(client), Box::new(server))
    }
}

pub(crate) struct Tcp;

impl Fabric for Tcp {
    const NAME: &'static str = "tcp";
    const PLACE_IS_BUFFERED: bool = true;
    const OWNER_KNOWS: bool = true;
    const SEND_WAITS: bool = true;

    fn pair(client: Setup, server: Setup) -> (Box<dyn Channel>, Box<dyn Channel>) {
        accept::<Self>(client, server)
    }
}

impl Listening for Tcp {
    fn listen() -> Box<dyn Listener> {
        Box::new(tcp::TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap())
    }

    fn connect(address: SocketAddr, setup: Setup) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(tcp::connect(address, TIMEOUT, setup)?))
    }
}

pub(crate) struct Local;

impl Fabric for Local {
    const NAME: &'static str = "local";
    const PLACE_IS_BUFFERED: bool = true;
    const OWNER_KNOWS: bool = true;
    const SEND_WAITS: bool = true;

    fn pair(client: Setup, server: Setup) -> (Box<dyn Channel>, Box<dyn Channel>) {
        accept::<Self>(client, server)
    }
}

impl Listening for Local {
    fn listen() -> Box<dyn Listener> {
        Box::new(Numbered::new())
    }

    fn connect(address: SocketAddr, setup: Setup) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(local::connect(&Numbered::directory(address.port()).join("socket"), TIMEOUT, setup)?))
    }
}

/// The suite names listeners by address and port: here the port stands for a directory with the socket.
struct Numbered {
    listener: local::LocalListener,
    port: u16,
}

impl Numbered {
    fn new() -> Self {
        // None twice: a test may count on nobody being where a listener was.
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let first = std::process::id() as u16;
        let port = std::iter::repeat_with(|| first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)))
            .take(u16::MAX.into())
            .find(|port| std::fs::create_dir(Self::directory(*port)).is_ok())
            .unwrap();
        let listener = local::LocalListener::bind(&Self::directory(port).join("socket"), 0o600).unwrap();
        Self { listener, port }
    }

    fn directory(port: u16) -> PathBuf {
        std::env::temp_dir().join(format!("holdfast-suite-{port}"))
    }
}

impl Drop for Numbered {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(Self::directory(self.port));
    }
}

impl Listener for Numbered {
    fn address(&self) -> SocketAddr {
        SocketAddr::new(self.listener.address().ip(), self.port)
    }

    fn accept(
        &mut self,
        prepare: &mut dyn FnMut(SocketAddr) -> Option<Setup>,
    ) -> io::Result<Box<dyn Channel>> {
        self.listener.accept(prepare)
    }

    fn stopper(&self) -> Box<dyn Fn() + Send + Sync> {
        self.listener.stopper()
    }
}

pub(crate) struct Verbs;

impl Fabric for Verbs {
    const NAME: &'static str = "verbs";
    const PLACE_IS_BUFFERED: bool = false;
    const OWNER_KNOWS: bool = false;
    const SEND_WAITS: bool = false;

    fn is_available() -> bool {
        if rdma_address().is_some() {
            return true;
        }
        let required = std::env::var_os("HOLDFAST_REQUIRE_RDMA").is_some_and(|value| value == "1");
        assert!(!required, "HOLDFAST_REQUIRE_RDMA is set, and no RDMA device leads to HOLDFAST_RXE_ADDR");
        println!("not exercised: no RDMA device here that leads to HOLDFAST_RXE_ADDR");
        false
    }

    fn pair(client: Setup, server: Setup) -> (Box<dyn Channel>, Box<dyn Channel>) {
        accept::<Self>(client, server)
    }
}

impl Listening for Verbs {
    fn listen() -> Box<dyn Listener> {
        Box::new(verbs::VerbsListener::bind(rdma_address().unwrap()).unwrap())
    }

    fn connect(address: SocketAddr, setup: Setup) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(verbs::connect(address, TIMEOUT, setup)?))
    }
}

/// Where this host's RDMA device can be reached, if it has one; with port 0.
pub(crate) fn rdma_address() -> Option<SocketAddr> {
    let ip = std::env::var("HOLDFAST_RXE_ADDR").unwrap_or_else(|_| "10.9.0.1".into()).parse().unwrap();
    let here = holdfast_verbs::Device::list().ok()?.iter().any(|device| {
        device
            .ipv4_addresses()
            .is_ok_and(|all| all.iter().any(|address| std::net::IpAddr::V4(*address) == ip))
    });
    here.then(|| SocketAddr::new(ip, 0))
}

/// A listener's channel, and the one that was connected to it.
fn accept<F: Listening>(client: Setup, server: Setup) -> (Box<dyn Channel>, Box<dyn Channel>) {
    let mut listener = F::listen();
    let address = listener.address();
    std::thread::scope(|scope| {
        let mut setup = Some(server);
        let server = scope.spawn(move || listener.accept(&mut |_| setup.take()).unwrap());
        (F::connect(address, client).unwrap(), server.join().unwrap())
    })
}
