//! [`TcpListener`]: takes connections, on a thread of its own.

use super::channel::TcpChannel;
use crate::channel::{Channel, Listener, Setup};
use crate::stopper::Stopper;
use rustix::event::PollFlags;
use rustix::io::Errno;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// How long to wait when the process or the host has run out of something.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

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
        let mut short = false;
        loop {
            self.stopper.wait(&self.listener, PollFlags::IN, None)?;
            match self.listener.accept() {
                Ok((stream, peer)) => {
                    short = false;
                    let Some(setup) = prepare(peer) else { continue };
                    match TcpChannel::new(stream, setup, false) {
                        Ok(channel) => return Ok(Box::new(channel)),
                        // A peer that is gone already, most likely; its buffers went back to their pool.
                        Err(error) => tracing::debug!(%peer, %error, "connection not taken"),
                    }
                }
                Err(error) if concerns_one_peer(&error) => {}
                Err(error) if is_shortage(&error) => {
                    if !short {
                        tracing::warn!(%error, "connections wait until there is room again");
                        short = true;
                    }
                    self.stopper.sleep(SHORTAGE_PAUSE)?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn stopper(&self) -> Box<dyn Fn() + Send + Sync> {
        self.stopper.handle()
    }
}

/// The connection failed before it was taken; the listener is well.
fn concerns_one_peer(error: &io::Error) -> bool {
    matches!(
        errno(error),
        Some(
            Errno::AGAIN
                | Errno::INTR
                | Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::PROTO
                | Errno::PERM
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::TIMEDOUT
        )
    )
}

fn is_shortage(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}
