//! [`Connection`]: a connected queue pair, and the two ways there.
//!
//! ```text
//!   Outgoing::resolve(peer) ─► prepare(domain) ─► post_receive... ─► connect() ─┐
//!                                                                               ├─► Connection
//!   ConnectRequest::connection(domain) ─► Incoming ─► post_receive... ─► accept() ─┘
//! ```
//!
//! Receives are posted before the peer can send: a message never meets an empty queue.
//!
//! A connection is driven by one thread at a time: poll until nothing comes, arm, sleep until [`Connection::wake_fd`] has
//! an edge. When the peer goes, everything posted is flushed, which wakes the sleeper: keep a receive posted, always.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::id::{Id, Role};
use super::{MAX_ACCEPT_PRIVATE_DATA, MAX_CONNECT_PRIVATE_DATA, frame};
use crate::device::Device;
use crate::error::{ConnectFailure, VerbsError};
use crate::ffi;
use crate::pd::ProtectionDomain;
use crate::qp::{ConnectionIdentity, QueueDepths, QueuePair};
use crate::work::{Completion, Local, WorkRequest};

/// Called on the connection manager's thread when a connection is established, fails or ends. Must not block.
pub type Notify = Arc<dyn Fn() + Send + Sync>;

/// How a connection is to be made.
#[derive(Clone)]
pub struct ConnectionConfig {
    /// Sizes of the queues.
    pub depths: QueueDepths,
    /// RDMA READs in flight each way; the device and the peer may allow fewer.
    pub reads: u8,
    /// Times the device sends again when the peer doesn't acknowledge; then the connection fails. 7 is "for ever" on
    /// some devices, and so never to be used where a dead peer must be noticed.
    pub retry_count: u8,
    /// Times the device sends again when the peer has no receive posted. With credits that never happens.
    pub rnr_retry_count: u8,
    /// The device waits 4.096 us * 2^this for an acknowledgement. With 16 and 6 retries a dead peer is noticed after about two
    /// seconds, and a peer that is starved of processor time (a virtual machine) isn't taken for dead.
    pub ack_timeout: u8,
    /// Called when the state changes.
    pub notify: Option<Notify>,
}

impl Default for ConnectionConfig {
    fn default() -> Self {
        Self {
            depths: QueueDepths { send: 128, receive: 128, inline: 128 },
            reads: 16,
            retry_count: 6,
            rnr_retry_count: 6,
            ack_timeout: 16,
            notify: None,
        }
    }
}

impl std::fmt::Debug for ConnectionConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectionConfig").field("depths", &self.depths).field("reads", &self.reads).finish()
    }
}

/// A queue pair that isn't connected yet.
struct Unconnected {
    qp: QueuePair,
    peer: SocketAddr,
    param: ffi::rdma_conn_param,
}

// SAFETY: the parameters' only pointer, to private data, is null until the call that uses it.
unsafe impl Send for Unconnected {}

impl Unconnected {
    fn new(
        id: Id,
        peer: SocketAddr,
        domain: &Arc<ProtectionDomain>,
        config: &ConnectionConfig,
    ) -> Result<Self, VerbsError> {
        id.state().notify.lock().clone_from(&config.notify);
        id.set_option(ffi::OPTION_ACK_TIMEOUT, config.ack_timeout);
        let state = Arc::clone(id.state());
        let qp = QueuePair::new(id, domain, config.depths).map_err(|error| {
            // A peer that has given up in the meantime makes the call fail with a meaningless "invalid argument".
            let failure = state.progress.lock().failure;
            failure.map_or(error, |reason| VerbsError::NotConnected { peer, reason })
        })?;
        let limits = domain.device().limits();
        let param = ffi::rdma_conn_param {
            private_data: std::ptr::null(),
            private_data_len: 0,
            // Zero of either would mean that RDMA READs never complete.
            responder_resources: config.reads.min(limits.reads_answered).max(1),
            initiator_depth: config.reads.min(limits.reads_issued).max(1),
            flow_control: 1,
            retry_count: config.retry_count.min(7),
            rnr_retry_count: config.rnr_retry_count.min(7),
            srq: 0,
            qp_num: 0,
        };
        Ok(Self { qp, peer, param })
    }

    /// The parameters with private data in them; `framed` must outlive their use.
    fn with_private_data(&self, framed: &[u8]) -> ffi::rdma_conn_param {
        let mut param = self.param;
        param.private_data = framed.as_ptr().cast();
        // At most 256 bytes were framed, each limit being less.
        param.private_data_len = u8::try_from(framed.len()).unwrap_or(u8::MAX);
        param
    }

    fn post_receive(&mut self, token: u64, local: Local) -> Result<(), VerbsError> {
        self.qp.post_receive(token, local).map_err(|(error, _)| error)
    }
}

/// A connection this host is making.
pub struct Outgoing {
    id: Id,
    peer: SocketAddr,
    device: Arc<Device>,
    deadline: Instant,
}

/// An outgoing connection with its queue pair: post receives, then connect.
pub struct Prepared {
    inner: Unconnected,
    deadline: Instant,
}

impl Outgoing {
    /// Finds the device and the route that lead to `peer`. Blocks, at most for `timeout`, which counts for all steps up to
    /// the connection.
    pub fn resolve(peer: SocketAddr, timeout: Duration) -> Result<Self, VerbsError> {
        let deadline = Instant::now() + timeout;
        let failed = |reason| VerbsError::NotConnected { peer, reason };
        let id = Id::create(Role::Connection, None)?;
        let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX).max(1);
        let mut raw = ffi::RawAddress::new(peer);
        // SAFETY: the id is alive, and the address outlives the call.
        if unsafe {
            ffi::rdma_resolve_addr(id.as_ptr(), std::ptr::null_mut(), raw.as_mut_ptr(), milliseconds)
        } != 0
        {
            return Err(resolve_error(peer, "rdma_resolve_addr"));
        }
        id.state().wait(deadline, |progress| progress.address).map_err(failed)?;
        // SAFETY: the id is alive, and its address is resolved.
        if unsafe { ffi::rdma_resolve_route(id.as_ptr(), milliseconds) } != 0 {
            return Err(resolve_error(peer, "rdma_resolve_route"));
        }
        id.state().wait(deadline, |progress| progress.route).map_err(failed)?;
        let device = Device::of_context(id.context())?;
        Ok(Self { id, peer, device, deadline })
    }

    /// The device that leads to the peer: make the protection domain on it.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Makes the queue pair.
    pub fn prepare(
        self,
        domain: &Arc<ProtectionDomain>,
        config: &ConnectionConfig,
    ) -> Result<Prepared, VerbsError> {
        Ok(Prepared { inner: Unconnected::new(self.id, self.peer, domain, config)?, deadline: self.deadline })
    }
}

/// Addresses that no RDMA device leads to fail at once, with one of these.
fn resolve_error(peer: SocketAddr, verb: &'static str) -> VerbsError {
    let source = std::io::Error::last_os_error();
    match source.raw_os_error() {
        Some(code @ (libc::ENODEV | libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EHOSTUNREACH)) => {
            VerbsError::NotConnected { peer, reason: ConnectFailure::NoDevice(-code) }
        }
        _ => VerbsError::call(verb, source),
    }
}

impl Prepared {
    /// Posts a receive, before the peer can send.
    pub fn post_receive(&mut self, token: u64, local: Local) -> Result<(), VerbsError> {
        self.inner.post_receive(token, local)
    }

    /// Connects, with at most [`MAX_CONNECT_PRIVATE_DATA`] bytes for the peer to see. Blocks until it is established,
    /// refused, or the time given to [`Outgoing::resolve`] is up.
    pub fn connect(self, private_data: &[u8]) -> Result<Connection, VerbsError> {
        let Self { inner, deadline } = self;
        let peer = inner.peer;
        let framed = frame(private_data, MAX_CONNECT_PRIVATE_DATA)?;
        let mut param = inner.with_private_data(&framed);
        // SAFETY: the id is alive and resolved, with a queue pair; `param` and `framed` outlive the call.
        if unsafe { ffi::rdma_connect(inner.qp.id().as_ptr(), &raw mut param) } != 0 {
            return Err(VerbsError::call("rdma_connect", std::io::Error::last_os_error()));
        }
        let state = Arc::clone(inner.qp.id().state());
        state
            .wait(deadline, |progress| progress.established)
            .map_err(|reason| VerbsError::NotConnected { peer, reason })?;
        let private_data = std::mem::take(&mut state.progress.lock().private_data);
        Connection::new(inner.qp, peer, private_data)
    }
}

/// A connection a peer has asked for, with its queue pair: post receives, then accept. Dropping it refuses the peer.
pub struct Incoming {
    inner: Unconnected,
    private_data: Vec<u8>,
}

impl Incoming {
    pub(super) fn new(
        id: Id,
        peer: SocketAddr,
        domain: &Arc<ProtectionDomain>,
        config: &ConnectionConfig,
        private_data: Vec<u8>,
        (peer_allows, peer_wants): (u8, u8),
    ) -> Result<Self, VerbsError> {
        let mut inner = Unconnected::new(id, peer, domain, config)?;
        inner.param.initiator_depth = inner.param.initiator_depth.min(peer_allows);
        inner.param.responder_resources = inner.param.responder_resources.min(peer_wants);
        Ok(Self { inner, private_data })
    }

    /// Posts a receive, before the peer can send.
    pub fn post_receive(&mut self, token: u64, local: Local) -> Result<(), VerbsError> {
        self.inner.post_receive(token, local)
    }

    /// Accepts, with at most [`MAX_ACCEPT_PRIVATE_DATA`] bytes for the peer to see. Doesn't block: the connection may
    /// be used at once, but is half-open until [`Connection::is_established`]; drop it if that takes too long.
    pub fn accept(self, private_data: &[u8]) -> Result<Connection, VerbsError> {
        let framed = frame(private_data, MAX_ACCEPT_PRIVATE_DATA)?;
        let mut param = self.inner.with_private_data(&framed);
        // SAFETY: the id is alive, came with a connect request and has a queue pair; `param` and `framed` outlive the call.
        if unsafe { ffi::rdma_accept(self.inner.qp.id().as_ptr(), &raw mut param) } != 0 {
            return Err(VerbsError::call("rdma_accept", std::io::Error::last_os_error()));
        }
        Connection::new(self.inner.qp, self.inner.peer, self.private_data)
    }
}

/// A connected, reliable queue pair. Dropping it tells the peer, and releases what was in flight only once the device
/// can't touch it any more.
pub struct Connection {
    qp: QueuePair,
    peer: SocketAddr,
    private_data: Vec<u8>,
    identity: ConnectionIdentity,
}

impl Connection {
    fn new(mut qp: QueuePair, peer: SocketAddr, private_data: Vec<u8>) -> Result<Self, VerbsError> {
        if let Err(error) = qp.shorten_rnr_timer() {
            // Costs time where the peer runs out of receives, which credits prevent. A device that has failed since
            // says so with the first completion.
            tracing::debug!(%error, "min_rnr_timer not set");
        }
        let identity = qp.identity()?;
        Ok(Self { qp, peer, private_data, identity })
    }

    /// Posts requests from the front of `queue` for as long as there is room, a number of them with one doorbell. Those
    /// accepted are taken out and will each have exactly one completion; those that remain are still the caller's, to be
    /// posted after completions have made room. Returns how many were accepted.
    ///
    /// On an error the request at the front is the one that was refused.
    pub fn post(&mut self, queue: &mut VecDeque<WorkRequest>) -> Result<usize, VerbsError> {
        self.qp.post(queue)
    }

    /// Posts a receive. If it can't, gives the memory back.
    pub fn post_receive(&mut self, token: u64, local: Local) -> Result<(), (VerbsError, Local)> {
        self.qp.post_receive(token, local)
    }

    /// Adds finished work to `completions`. Returns how many there were; 0: nothing more now.
    pub fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, VerbsError> {
        self.qp.poll(completions)
    }

    /// Asks to be woken by [`Connection::wake_fd`]. True: sleep; false: completions have come meanwhile, poll first.
    pub fn arm(&mut self) -> Result<bool, VerbsError> {
        self.qp.arm()
    }

    /// Has an edge when something completes after [`Connection::arm`]; watch for edges only: it stays readable.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.qp.wake_fd()
    }

    /// Requests the send queue has room for.
    pub fn send_room(&self) -> usize {
        self.qp.send_room()
    }

    /// Receives that can still be posted.
    pub fn receive_room(&self) -> usize {
        self.qp.receive_room()
    }

    /// Work requests posted and not yet completed.
    pub fn in_flight(&self) -> usize {
        self.qp.in_flight()
    }

    /// Longest message, write or read, in bytes.
    pub fn max_message(&self) -> usize {
        self.qp.max_message()
    }

    /// Longest message that is copied when posted.
    pub fn max_inline(&self) -> usize {
        self.qp.max_inline()
    }

    /// The peer's address.
    pub fn peer_address(&self) -> SocketAddr {
        self.peer
    }

    /// This end's address.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.qp.id().local_address()
    }

    /// What the peer sent along when it connected or accepted.
    pub fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    /// Both ends' names, for binding keys to this connection. The peer has the mirrored one.
    pub fn identity(&self) -> ConnectionIdentity {
        self.identity
    }

    /// The domain registrations have to be of.
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        self.qp.domain()
    }

    /// True once both ends know of each other.
    pub fn is_established(&self) -> bool {
        self.qp.id().state().progress.lock().established
    }

    /// Waits until both ends know of each other.
    pub fn wait_established(&self, timeout: Duration) -> Result<(), VerbsError> {
        let deadline = Instant::now() + timeout;
        let waited = self.qp.id().state().wait(deadline, |progress| progress.established);
        waited.map_err(|reason| VerbsError::NotConnected { peer: self.peer, reason })
    }

    /// True once the peer has gone, or the device. What was posted is being flushed.
    pub fn is_disconnected(&self) -> bool {
        self.qp.id().state().disconnected.load(Ordering::Acquire)
    }

    /// Ends the connection and tells the peer. Everything in flight completes as flushed; poll for it.
    pub fn disconnect(&mut self) -> Result<(), VerbsError> {
        // Failing first: nothing lands after this returns, whatever becomes of the message to the peer.
        self.qp.fail()?;
        self.qp.id().disconnect()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake_fd()
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer)
            .field("local_qpn", &self.identity.local_qpn)
            .field("remote_qpn", &self.identity.remote_qpn)
            .field("in_flight", &self.in_flight())
            .finish()
    }
}
