//! [`Listener`]: takes connect requests; [`ConnectRequest`]: one of them, to be accepted or dropped (which refuses it).
//!
//! ```text
//!   peer ─► request ──(room among the half-open?)── no ─► refused
//!                │ yes
//!                ▼
//!        callback(ConnectRequest) ─► connection() ─► post receives ─► accept() ─► established: no longer half-open
//!                                                                        │
//!                                     the caller drops what takes too long
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::connection::{ConnectionConfig, Incoming};
use super::id::{Id, Role, State};
use crate::device::Device;
use crate::error::VerbsError;
use crate::ffi;
use crate::pd::ProtectionDomain;

/// Bounds of what strangers can make a listener hold.
#[derive(Clone, Copy, Debug)]
pub struct ListenerLimits {
    /// Requests the kernel keeps that haven't been looked at.
    pub backlog: u16,
    /// Connect requests delivered, and connections accepted, that aren't established yet. More are refused.
    pub half_open: usize,
}

impl Default for ListenerLimits {
    fn default() -> Self {
        Self { backlog: 128, half_open: 256 }
    }
}

type Callback = Box<dyn Fn(ConnectRequest) + Send + Sync>;

/// What a listener and its requests share.
pub(crate) struct Shared {
    callback: Callback,
    half_open: Arc<AtomicUsize>,
    limit: usize,
}

/// One of the limited places for half-open connections; free again on drop.
pub(crate) struct HalfOpen(Arc<AtomicUsize>);

impl HalfOpen {
    fn take(count: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| (now < limit).then_some(now + 1))
            .ok()
            .map(|_| Self(Arc::clone(count)))
    }
}

impl Drop for HalfOpen {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Takes connect requests at an address until it is dropped.
pub struct Listener {
    id: Id,
    half_open: Arc<AtomicUsize>,
}

impl Listener {
    /// Listens at `address` (port 0: one is chosen). `callback` gets each connect request, on the connection manager's
    /// one thread: it must not block, and hands the request on to where the work is done.
    pub fn bind(
        address: SocketAddr,
        limits: ListenerLimits,
        callback: impl Fn(ConnectRequest) + Send + Sync + 'static,
    ) -> Result<Self, VerbsError> {
        let half_open = Arc::new(AtomicUsize::new(0));
        let shared = Shared {
            callback: Box::new(callback),
            half_open: Arc::clone(&half_open),
            limit: limits.half_open,
        };
        let id = Id::create(Role::Listener, Some(Arc::new(shared)))?;
        // So that a restarted server gets its address back while old connections linger.
        id.set_option(ffi::OPTION_REUSE_ADDRESS, 1i32);
        let mut raw = ffi::RawAddress::new(address);
        // SAFETY: the id is alive, and the address outlives the call.
        if unsafe { ffi::rdma_bind_addr(id.as_ptr(), raw.as_mut_ptr()) } != 0 {
            return Err(VerbsError::call("rdma_bind_addr", std::io::Error::last_os_error()));
        }
        // SAFETY: the id is alive and bound.
        if unsafe { ffi::rdma_listen(id.as_ptr(), i32::from(limits.backlog)) } != 0 {
            return Err(VerbsError::call("rdma_listen", std::io::Error::last_os_error()));
        }
        Ok(Self { id, half_open })
    }

    /// Where it listens.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.id.local_address()
    }

    /// Requests and accepted connections that aren't established yet.
    pub fn half_open(&self) -> usize {
        self.half_open.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("address", &self.local_address()).finish()
    }
}

/// Hands a new request to its listener's owner, or refuses it if there are too many.
pub(super) fn deliver(listener: &State, id: Id, private_data: Vec<u8>, peer_reads: (u8, u8)) {
    let Some(shared) = &listener.listener else { return };
    let Some(place) = HalfOpen::take(&shared.half_open, shared.limit) else {
        // Strangers may come as often as they like.
        tracing::debug!(peer = ?id.peer_address(), limit = shared.limit, "too many half-open RDMA connections: refused");
        return;
    };
    *id.state().half_open.lock() = Some(place);
    let (Some(peer), Ok(device)) = (id.peer_address(), Device::of_context(id.context())) else {
        tracing::warn!("RDMA connect request without an address or a known device: refused");
        return;
    };
    (shared.callback)(ConnectRequest {
        id,
        peer,
        device,
        private_data,
        peer_reads,
        received: Instant::now(),
    });
}

/// A peer that wants to connect. Dropping it refuses the peer.
pub struct ConnectRequest {
    id: Id,
    peer: SocketAddr,
    device: Arc<Device>,
    private_data: Vec<u8>,
    peer_reads: (u8, u8),
    received: Instant,
}

impl ConnectRequest {
    /// Who asks. An address a peer can choose: it authenticates nobody.
    pub fn peer_address(&self) -> SocketAddr {
        self.peer
    }

    /// The device it came in by: make the protection domain on it.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// What the peer sent along, at most [`super::MAX_CONNECT_PRIVATE_DATA`] bytes (0 to 255 if it isn't one of ours).
    pub fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    /// When it came in: drop what has waited too long.
    pub fn received(&self) -> Instant {
        self.received
    }

    /// Makes the queue pair, for receives to be posted before the peer is told.
    pub fn connection(
        self,
        domain: &Arc<ProtectionDomain>,
        config: &ConnectionConfig,
    ) -> Result<Incoming, VerbsError> {
        Incoming::new(self.id, self.peer, domain, config, self.private_data, self.peer_reads)
    }
}

impl std::fmt::Debug for ConnectRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectRequest")
            .field("peer", &self.peer)
            .field("device", &self.device.name())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_open_places_are_limited_and_come_back() {
        let count = Arc::new(AtomicUsize::new(0));
        let first = HalfOpen::take(&count, 2);
        let second = HalfOpen::take(&count, 2);
        assert!(first.is_some() && second.is_some());
        assert!(HalfOpen::take(&count, 2).is_none());
        drop(first);
        assert!(HalfOpen::take(&count, 2).is_some());
    }
}
