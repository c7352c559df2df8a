//! [`TcpListener`]: takes connections, on a thread of its own.

use crate::channel::{Channel, Listener, Setup};
use crate::stopper::Stopper;
use std::io;
use std::net::SocketAddr;

/// Accepts TCP connections. There is no handshake at this level: an accepted connection is a channel, and who never
/// says anything on it is its owner's to drop.
pub struct TcpListener {
    listener: std::net::TcpListener,
    address: SocketAddr,
    stopper: Stopper,
}

impl TcpListener {
    /// Listens on `address`; port 0 picks a free one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, stopper: Stopper::new()? })
    }
}

impl Listener for TcpListener {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn accept(
        &mut self,
        prepare: &mut dyn FnMut(SocketAddr) -> Option<Setup>,
    ) -> io::Result<Box<dyn Channel>> {
        crate::stream::accept(&self.stopper, &self.listener, || {
            let (stream, peer) = self.listener.accept()?;
            Ok(prepare(peer).map(|setup| super::channel(stream, setup, false)))
        })
    }

    fn stopper(&self) -> Box<dyn Fn() + Send + Sync> {
        self.stopper.handle()
    }
}
