//! An engine behind a real verbs listener. Without an RDMA device there is none: tests say so, and fail if
//! `HOLDFAST_REQUIRE_RDMA` is set.

use super::{Client, Open, Rig};
use holdfast_dataplane::engine::{Opener, Settings};
use holdfast_transport::verbs::VerbsListener;
use holdfast_transport::{Channel, Listener, verbs};
use holdfast_verbs::{Device, FileRegistration};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// A server with a listener, whose thread takes channels and lanes until this is dropped.
pub struct Server {
    pub rig: Rig,
    pub address: SocketAddr,
    stop: Box<dyn Fn() + Send + Sync>,
    accepting: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// `None` without an RDMA device, or on a kernel that pins no files for reading.
    pub fn start(change: impl FnOnce(&mut Settings), opener: Opener) -> Option<Self> {
        Self::wrapped(change, opener, |channel| channel)
    }

    /// As [`Server::start`]; the engine gets what `wrap` makes of each channel.
    pub fn wrapped(
        change: impl FnOnce(&mut Settings),
        opener: Opener,
        wrap: impl Fn(Box<dyn Channel>) -> Box<dyn Channel> + Send + 'static,
    ) -> Option<Self> {
        let devices = Device::list().unwrap();
        if devices.iter().any(|device| !FileRegistration::is_possible(device).unwrap()) {
            println!("skipped: this kernel pins no read-only mappings of files");
            return None;
        }
        let addresses: Vec<_> = devices.iter().flat_map(|device| device.ipv4_addresses().unwrap()).collect();
        let Some(address) = addresses.first() else {
            assert!(std::env::var_os("HOLDFAST_REQUIRE_RDMA").is_none(), "there is no RDMA device");
            println!("skipped: no RDMA device here");
            return None;
        };
        let rig = Rig::with_files(change, opener);
        let mut listener = VerbsListener::bind((*address, 0).into()).unwrap();
        if let Some(lanes) = rig.engine.lanes() {
            listener.serve_lanes(Arc::clone(lanes));
        }
        let address = SocketAddr::from((*address, listener.address().port()));
        let (engine, stop) = (Arc::clone(&rig.engine), listener.stopper());
        let accepting = Some(std::thread::spawn(move || {
            while let Ok(channel) = listener.accept(&mut |peer| engine.setup(peer)) {
                engine.adopt(wrap(channel));
            }
        }));
        Some(Self { rig, address, stop, accepting })
    }

    pub fn client(&self) -> Client {
        let parts = Client::parts();
        let channel = verbs::connect(self.address, Duration::from_secs(10), parts.setup()).unwrap();
        let mut client = Client::new(Box::new(channel), parts);
        client.hello();
        client
    }

    pub fn bound(&self, content: &[u8]) -> (Client, u32, Open) {
        let open = self.rig.open(content);
        let mut client = self.client();
        let binding = client.bind(&open).unwrap();
        (client, binding, open)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        (self.stop)();
        self.accepting.take().unwrap().join().unwrap();
    }
}
