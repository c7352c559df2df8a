//! New connections: how many may be half-open, in all and from one address, and for how long.
//!
//! A half-open connection is one whose peer has not finished the TLS handshake and said hello. It costs one place of a fixed
//! number; without a free place the oldest of them is closed. What such peers do is counted, and logged only
//! at debug level: they must not write our log.

use crate::config::Limits;
use crate::driver::Event;
use crate::gauges::{Gauges, Held};
use crate::half_open::{Entered, HalfOpen};
use crate::session;
use crate::throttle::Throttle;
use parking_lot::Mutex;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
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
    half_open: Arc<Mutex<HalfOpen>>,
}

impl Front {
    /// What all connections share.
    pub fn new(
        events: mpsc::Sender<Event>,
        acceptor: TlsAcceptor,
        limits: Arc<Limits>,
        gauges: Arc<Gauges>,
    ) -> Self {
        Self { events, acceptor, limits, gauges, half_open: Arc::default() }
    }
}

/// A half-open connection's place; free again when it is dropped.
pub struct Place {
    _held: Held,
    entered: Entered,
    half_open: Arc<Mutex<HalfOpen>>,
}

impl Place {
    /// Waits until the place is needed for another connection.
    pub async fn evicted(&self) {
        self.entered.evicted.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.half_open.lock().leave(self.entered.number);
    }
}

impl Front {
    /// A place for a connection from there; `None` if the address has its share.
    fn place(&self, address: IpAddr) -> Option<Place> {
        let (max, per_address) = (self.limits.half_open_handshakes, self.limits.half_open_per_address);
        let entered = self.half_open.lock().enter(address, max, per_address)?;
        if entered.replaced {
            self.gauges.half_open_evicted_total.fetch_add(1, Relaxed);
        }
        let held = Held::new(&self.gauges, |g| &g.half_open_handshakes);
        Some(Place { _held: held, entered, half_open: self.half_open.clone() })
    }
}

/// Takes connections for ever.
pub async fn serve(listener: TcpListener, front: Front) {
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                failing = false;
                let Some(place) = front.place(peer.ip()) else {
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
    let handshake = tokio::time::timeout_at(deadline, front.acceptor.accept(stream));
    let handshake = tokio::select! {
        handshake = handshake => handshake,
        () = place.evicted() => {
            tracing::debug!(%peer, "handshake gave way to a newer one");
            return;
        }
    };
    let tls = match handshake {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            front.gauges.handshakes_failed_total.fetch_add(1, Relaxed);
            tracing::debug!(%peer, %error, "handshake failed");
            return;
        }
        Err(_) => {
            front.gauges.handshakes_failed_total.fetch_add(1, Relaxed);
            tracing::debug!(%peer, "handshake took too long");
            return;
        }
    };
    match session::run(tls, deadline, place, &front).await {
        Ok(()) => tracing::debug!(%peer, "session ended"),
        Err(error) if error.before_hello() => tracing::debug!(%peer, %error, "no session"),
        Err(error) => {
            static LINES: Throttle = Throttle::new();
            if let Some(left_out) = LINES.admit() {
                tracing::info!(%peer, %error, left_out, "session ended");
            }
        }
    }
}
