//! New connections: how many may be half-open, in all and from one address, and for how long.
//!
//! A half-open connection is one whose peer has not finished the TLS handshake and said hello. It costs one place of a fixed
//! number; without a free place the kernel's own queue holds further ones back.

use crate::config::Limits;
use crate::driver::Event;
use crate::gauges::{Gauges, Held};
use crate::session;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;

/// What all connections share.
#[derive(Clone)]
pub struct Front {
    /// The driver.
    pub events: mpsc::Sender<Event>,
    /// TLS.
    pub acceptor: TlsAcceptor,
    /// Limits.
    pub limits: Arc<Limits>,
    /// Counters.
    pub gauges: Arc<Gauges>,
    half_open: HalfOpen,
}

impl Front {
    /// What all connections share.
    pub fn new(
        events: mpsc::Sender<Event>,
        acceptor: TlsAcceptor,
        limits: Arc<Limits>,
        gauges: Arc<Gauges>,
    ) -> Self {
        let half_open = HalfOpen {
            places: Arc::new(Semaphore::new(limits.half_open_handshakes)),
            by_address: Arc::default(),
        };
        Self { events, acceptor, limits, gauges, half_open }
    }
}

#[derive(Clone)]
struct HalfOpen {
    places: Arc<Semaphore>,
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A half-open connection's place; free again when it is dropped.
pub struct Place {
    _permit: OwnedSemaphorePermit,
    _held: Held,
    address: IpAddr,
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_address = self.by_address.lock();
        if let Some(count) = by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

impl Front {
    /// A place for a connection from there; `None` if the address has its share.
    fn place(&self, address: IpAddr, permit: OwnedSemaphorePermit) -> Option<Place> {
        let by_address = self.half_open.by_address.clone();
        {
            let mut counts = by_address.lock();
            let count = counts.entry(address).or_default();
            if *count >= self.limits.half_open_per_address {
                return None;
            }
            *count += 1;
        }
        let held = Held::new(&self.gauges, |g| &g.half_open_handshakes);
        Some(Place { _permit: permit, _held: held, address, by_address })
    }
}

/// Takes connections for ever.
pub async fn serve(listener: TcpListener, front: Front) {
    let mut failing = false;
    loop {
        let Ok(permit) = front.half_open.places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                failing = false;
                let Some(place) = front.place(peer.ip(), permit) else {
                    front.gauges.connections_dropped_total.fetch_add(1, Relaxed);
                    continue;
                };
                if let Err(error) = prepare(&stream, front.limits.keepalive_s) {
                    tracing::debug!(%peer, %error, "connection gone at once");
                    continue;
                }
                tokio::spawn(connection(stream, peer, place, front.clone()));
            }
            // The peer was quicker than we: nothing is wrong here.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                if !failing {
                    tracing::error!(%error, "cannot accept connections; trying on");
                }
                failing = true;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn prepare(stream: &TcpStream, keepalive_s: u64) -> std::io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(keepalive_s))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(keepalive_s.div_ceil(3)))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_socket_keepalive(stream, true)?;
    Ok(())
}

async fn connection(stream: TcpStream, peer: SocketAddr, place: Place, front: Front) {
    let _held = Held::new(&front.gauges, |g| &g.connections);
    let deadline = tokio::time::Instant::now() + Duration::from_millis(front.limits.handshake_ms);
    let tls = match tokio::time::timeout_at(deadline, front.acceptor.accept(stream)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            front.gauges.handshakes_failed_total.fetch_add(1, Relaxed);
            tracing::info!(%peer, %error, "handshake failed");
            return;
        }
        Err(_) => {
            front.gauges.handshakes_failed_total.fetch_add(1, Relaxed);
            tracing::info!(%peer, "handshake took too long");
            return;
        }
    };
    match session::run(tls, deadline, place, &front).await {
        Ok(()) => tracing::debug!(%peer, "session ended"),
        Err(error) => tracing::info!(%peer, %error, "session ended"),
    }
}
