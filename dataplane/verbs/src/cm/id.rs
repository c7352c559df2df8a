//! [`Id`]: ownership of one connection manager id, and [`State`]: what its events have told so far.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::connection::Notify;
use super::listener::{HalfOpen, Shared};
use super::{Manager, Registry};
use crate::error::{ConnectFailure, VerbsError};
use crate::ffi;
use crate::gauges::CM_IDS;

/// What an id is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Listener,
    Connection,
}

/// How far a connection has come.
#[derive(Default)]
pub(crate) struct Progress {
    pub(super) address: bool,
    pub(super) route: bool,
    pub(super) established: bool,
    pub(super) failure: Option<ConnectFailure>,
    /// What the peer sent with its acceptance.
    pub(super) private_data: Vec<u8>,
}

/// What the events of an id have told: written by the manager's thread, read by the owner.
pub(crate) struct State {
    pub(super) role: Role,
    pub(super) progress: Mutex<Progress>,
    pub(super) changed: Condvar,
    /// True from the moment the connection has ended or failed: readable without a lock, for the hot path.
    pub(super) disconnected: AtomicBool,
    /// Called after each event.
    pub(super) notify: Mutex<Option<Notify>>,
    /// Held while an accepted connection isn't established yet.
    pub(super) half_open: Mutex<Option<HalfOpen>>,
    /// Of a listener: where its connect requests go.
    pub(super) listener: Option<Arc<Shared>>,
}

impl State {
    fn new(role: Role, listener: Option<Arc<Shared>>) -> Arc<Self> {
        Arc::new(Self {
            role,
            progress: Mutex::default(),
            changed: Condvar::new(),
            disconnected: AtomicBool::new(false),
            notify: Mutex::new(None),
            half_open: Mutex::new(None),
            listener,
        })
    }

    pub(super) fn establish(&self, private_data: Vec<u8>) {
        let mut progress = self.progress.lock();
        progress.established = true;
        progress.private_data = private_data;
        *self.half_open.lock() = None;
    }

    /// The first failure is the one that counts.
    pub(super) fn fail(&self, failure: ConnectFailure) {
        self.progress.lock().failure.get_or_insert(failure);
        self.disconnected.store(true, Ordering::Release);
        *self.half_open.lock() = None;
    }

    /// Waits until `done` says so, the connection fails, or time is up.
    pub(super) fn wait(
        &self,
        deadline: Instant,
        done: impl Fn(&Progress) -> bool,
    ) -> Result<(), ConnectFailure> {
        let mut progress = self.progress.lock();
        loop {
            if let Some(failure) = progress.failure {
                return Err(failure);
            }
            if done(&progress) {
                return Ok(());
            }
            if self.changed.wait_until(&mut progress, deadline).timed_out() && !done(&progress) {
                return Err(progress.failure.unwrap_or(ConnectFailure::TimedOut));
            }
        }
    }
}

/// One connection manager id. Dropping it destroys it: a peer that waits for an answer is refused, one that is
/// connected learns that this end has gone.
pub(crate) struct Id {
    id: *mut ffi::rdma_cm_id,
    state: Arc<State>,
    manager: &'static Manager,
}

// SAFETY: librdmacm is thread-safe. The id is used by its owner, and by the manager's thread under the manager's lock.
unsafe impl Send for Id {}

impl Id {
    /// A new id, for a listener or for connecting.
    pub(super) fn create(role: Role, listener: Option<Arc<Shared>>) -> Result<Self, VerbsError> {
        let manager = Manager::get()?;
        let mut id = std::ptr::null_mut();
        let space = ffi::rdma_port_space::RDMA_PS_TCP;
        // SAFETY: the channel lives as long as the process; `id` outlives the call.
        if unsafe { ffi::rdma_create_id(manager.channel(), &raw mut id, std::ptr::null_mut(), space) } != 0 {
            return Err(VerbsError::call("rdma_create_id", std::io::Error::last_os_error()));
        }
        CM_IDS.add(1);
        let state = State::new(role, listener);
        manager.registry.lock().insert(id as usize, Arc::clone(&state));
        Ok(Self { id, state, manager })
    }

    /// Takes over the id that came with a connect request.
    ///
    /// # Safety
    /// `id` is the new id of a connect request event, and nobody else takes it over.
    pub(super) unsafe fn adopt(
        manager: &'static Manager,
        registry: &mut Registry,
        id: *mut ffi::rdma_cm_id,
    ) -> Self {
        CM_IDS.add(1);
        let state = State::new(Role::Connection, None);
        registry.insert(id as usize, Arc::clone(&state));
        Self { id, state, manager }
    }

    pub(crate) fn as_ptr(&self) -> *mut ffi::rdma_cm_id {
        self.id
    }

    pub(crate) fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// The device it is bound to; null before its address is resolved.
    pub(crate) fn context(&self) -> *mut ffi::ibv_context {
        // SAFETY: the id is alive.
        unsafe { (*self.id).verbs }
    }

    /// Number of the device's port.
    pub(crate) fn port(&self) -> u8 {
        // SAFETY: the id is alive.
        unsafe { (*self.id).port_num }
    }

    pub(crate) fn local_address(&self) -> Option<std::net::SocketAddr> {
        // SAFETY: the id is alive; every view of the union is plain bytes, zeroed at creation.
        ffi::socket_address(unsafe { &(*self.id).route.addr.src_addr_union.src_storage })
    }

    pub(crate) fn peer_address(&self) -> Option<std::net::SocketAddr> {
        // SAFETY: as above.
        ffi::socket_address(unsafe { &(*self.id).route.addr.dst_addr_union.dst_storage })
    }

    /// Sets an option whose failure costs nothing but what it is for.
    pub(super) fn set_option<T>(&self, option: i32, mut value: T) {
        // SAFETY: the id is alive; the library reads size_of::<T> bytes of `value` during the call.
        let outcome = unsafe {
            ffi::rdma_set_option(
                self.id,
                ffi::OPTION_LEVEL_ID,
                option,
                (&raw mut value).cast(),
                size_of::<T>(),
            )
        };
        if outcome != 0 {
            tracing::debug!(option, error = %std::io::Error::last_os_error(), "rdma_set_option");
        }
    }

    /// Ends the connection: the queue pair fails, the peer is told.
    pub(super) fn disconnect(&self) -> Result<(), VerbsError> {
        let _order = self.manager.registry.lock();
        // SAFETY: the id is alive, and its queue pair isn't destroyed meanwhile (the lock).
        if unsafe { ffi::rdma_disconnect(self.id) } != 0 {
            return Err(VerbsError::call("rdma_disconnect", std::io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Destroys the queue pair that was made on this id. After success the device doesn't touch its memory any more.
    pub(crate) fn destroy_queue_pair(&self) -> std::io::Result<()> {
        let _order = self.manager.registry.lock();
        // SAFETY: the id is alive. Its queue pair is destroyed once: the pointer is cleared. The manager's thread, which
        // may use it through the id, is kept out by the lock.
        unsafe {
            let qp = (*self.id).qp;
            if qp.is_null() {
                return Ok(());
            }
            // rdma_destroy_qp would hide a failure, and that is the one thing that must be known here.
            ffi::check_errno(ffi::ibv_destroy_qp(qp))?;
            (*self.id).qp = std::ptr::null_mut();
        }
        Ok(())
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        self.manager.registry.lock().remove(&(self.id as usize));
        // Waits until the manager's thread has acknowledged the events it has taken: the lock is free for that.
        // SAFETY: destroyed once, here; its queue pair is gone (or leaked on purpose).
        if unsafe { ffi::rdma_destroy_id(self.id) } != 0 {
            tracing::error!(error = %std::io::Error::last_os_error(), "rdma_destroy_id failed: an id is leaked");
        }
        CM_IDS.sub(1);
    }
}
