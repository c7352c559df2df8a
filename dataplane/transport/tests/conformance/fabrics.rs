//! The transports, and how the tests get at a pair of channels of each.

use crate::kit::Fabric;
use holdfast_transport::{Channel, Listener, Setup, memory, tcp};
use std::net::SocketAddr;
use std::time::Duration;

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
        let listener = tcp::TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        accept(listener, server, |address| {
            Box::new(tcp::connect(address, Duration::from_secs(10), client).unwrap())
        })
    }
}

/// Accepts one channel while `connect` makes its other end.
pub(crate) fn accept(
    mut listener: impl Listener,
    setup: Setup,
    connect: impl FnOnce(SocketAddr) -> Box<dyn Channel>,
) -> (Box<dyn Channel>, Box<dyn Channel>) {
    let address = listener.address();
    std::thread::scope(|scope| {
        let mut setup = Some(setup);
        let server = scope.spawn(move || listener.accept(&mut |_| setup.take()).unwrap());
        (connect(address), server.join().unwrap())
    })
}
