//! The connection manager: one event channel and one thread per process, for every listener and connection.
//!
//! ```text
//!   kernel ─► event channel ─► "rdma-cm" thread ─┬─ connect request ─► the listener's callback
//!                (asleep while nothing happens)  ├─ progress ────────► whoever waits in connect or accept
//!                                                └─ disconnected ────► queue pair fails, its receives are flushed,
//!                                                                      the owner's completion channel wakes it
//! ```
//!
//! One lock orders the thread against owners: it is held while an event is taken and handled, and while a queue pair is
//! destroyed. So librdmacm, which changes queue pairs while it hands out events, never meets one being destroyed.
//! Callbacks run outside it.

mod connection;
mod id;
mod listener;

pub use connection::{Connection, ConnectionConfig, Incoming, Notify, Outgoing, Prepared};
pub(crate) use id::Id;
pub use listener::{ConnectRequest, Listener, ListenerLimits};

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::cq::set_nonblocking;
use crate::error::{ConnectFailure, VerbsError};
use crate::ffi;
use id::{Role, State};

/// Bytes of private data a connect request carries (one more holds the length).
pub const MAX_CONNECT_PRIVATE_DATA: usize = 55;
/// Bytes of private data an acceptance carries (one more holds the length).
pub const MAX_ACCEPT_PRIVATE_DATA: usize = 195;

/// The states of all live ids, by the address of the library's structure.
pub(crate) type Registry = HashMap<usize, Arc<State>>;

/// The process's event channel. Lives as long as the process.
pub(crate) struct Manager {
    channel: *mut ffi::rdma_event_channel,
    pub(crate) registry: Mutex<Registry>,
}

// SAFETY: librdmacm is thread-safe; the channel is never destroyed.
unsafe impl Send for Manager {}
// SAFETY: as above.
unsafe impl Sync for Manager {}

static MANAGER: Mutex<Option<&'static Manager>> = Mutex::new(None);

impl Manager {
    /// The manager, started now if it wasn't. After a failure the next call tries again.
    pub(crate) fn get() -> Result<&'static Self, VerbsError> {
        let mut slot = MANAGER.lock();
        if let Some(manager) = *slot {
            return Ok(manager);
        }
        // SAFETY: no arguments; the result is null or a channel.
        let channel = ffi::check_pointer(unsafe { ffi::rdma_create_event_channel() })
            .map_err(|source| VerbsError::call("rdma_create_event_channel", source))?;
        let manager: &'static Self = Box::leak(Box::new(Self { channel, registry: Mutex::default() }));
        set_nonblocking(manager.fd()).map_err(|source| VerbsError::call("fcntl", source))?;
        std::thread::Builder::new()
            .name("rdma-cm".into())
            .spawn(|| manager.run())
            .map_err(|source| VerbsError::call("pthread_create", source))?;
        *slot = Some(manager);
        Ok(manager)
    }

    pub(crate) fn channel(&self) -> *mut ffi::rdma_event_channel {
        self.channel
    }

    fn fd(&self) -> BorrowedFd<'static> {
        // SAFETY: the channel, and with it its descriptor, lives as long as the process.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    fn run(&'static self) {
        loop {
            let fd = self.fd();
            let mut wait = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            if let Err(error) = rustix::event::poll(&mut wait, None) {
                if error != rustix::io::Errno::INTR {
                    tracing::error!(%error, "waiting for RDMA connection events failed");
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
            loop {
                match self.take_event() {
                    Ok(Some(after)) => after.run(),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!(%error, "rdma_get_cm_event failed");
                        // It would fail again at once: don't turn in a tight circle.
                        std::thread::sleep(std::time::Duration::from_millis(100));
                        break;
                    }
                }
            }
        }
    }

    /// Takes one event and does what has to be done under the lock. Returns what has to be done outside it.
    fn take_event(&'static self) -> std::io::Result<Option<After>> {
        let mut registry = self.registry.lock();
        let mut event = std::ptr::null_mut();
        // SAFETY: the channel is alive and non-blocking; `event` outlives the call.
        if unsafe { ffi::rdma_get_cm_event(self.channel, &raw mut event) } != 0 {
            let error = std::io::Error::last_os_error();
            return match error.kind() {
                std::io::ErrorKind::WouldBlock => Ok(None),
                std::io::ErrorKind::Interrupted => Ok(Some(After::Nothing)),
                _ => Err(error),
            };
        }
        // SAFETY: an event that was just handed out stays valid until it is acknowledged, below.
        let after = self.handle(&mut registry, unsafe { &*event });
        // SAFETY: acknowledged once; nothing of it is used from here on.
        unsafe { ffi::rdma_ack_cm_event(event) };
        Ok(Some(after))
    }

    fn handle(&'static self, registry: &mut Registry, event: &ffi::rdma_cm_event) -> After {
        use ffi::rdma_cm_event_type as kind;
        if event.event == kind::RDMA_CM_EVENT_CONNECT_REQUEST {
            // SAFETY: a connect request comes with a new id, which is the receiver's to destroy. The union's
            // connection part is the valid one for connection events.
            let (id, private_data, conn) = unsafe {
                let id = Id::adopt(self, registry, event.id);
                (id, private_data(&event.param.conn), event.param.conn)
            };
            return match registry.get(&(event.listen_id as usize)) {
                Some(listener) => {
                    let peer_reads = (conn.initiator_depth, conn.responder_resources);
                    After::Request(Arc::clone(listener), id, private_data, peer_reads)
                }
                // Its listener is just being dropped.
                None => After::Discard(id),
            };
        }
        // Not registered: being dropped by its owner, who waits for the acknowledgement.
        let Some(state) = registry.get(&(event.id as usize)).map(Arc::clone) else { return After::Nothing };
        match event.event {
            kind::RDMA_CM_EVENT_ADDR_RESOLVED => state.progress.lock().address = true,
            kind::RDMA_CM_EVENT_ROUTE_RESOLVED => state.progress.lock().route = true,
            kind::RDMA_CM_EVENT_ESTABLISHED => {
                // SAFETY: the union's connection part is the valid one for connection events.
                state.establish(unsafe { private_data(&event.param.conn) });
            }
            kind::RDMA_CM_EVENT_ADDR_ERROR => state.fail(ConnectFailure::NoDevice(event.status)),
            kind::RDMA_CM_EVENT_ROUTE_ERROR => state.fail(ConnectFailure::NoRoute(event.status)),
            kind::RDMA_CM_EVENT_CONNECT_ERROR => state.fail(ConnectFailure::Error(event.status)),
            kind::RDMA_CM_EVENT_UNREACHABLE => state.fail(ConnectFailure::Unreachable(event.status)),
            kind::RDMA_CM_EVENT_REJECTED => state.fail(ConnectFailure::Rejected(event.status)),
            kind::RDMA_CM_EVENT_DISCONNECTED | kind::RDMA_CM_EVENT_DEVICE_REMOVAL => {
                let removed = event.event == kind::RDMA_CM_EVENT_DEVICE_REMOVAL;
                state.fail(if removed {
                    ConnectFailure::DeviceRemoved
                } else {
                    ConnectFailure::Disconnected
                });
                if state.role == Role::Connection {
                    // Moves the queue pair to the error state, so that everything posted is flushed and wakes its
                    // owner, and answers the peer.
                    // SAFETY: the id is alive: the event is not acknowledged yet. Its queue pair, if it has one, is
                    // destroyed only under the lock we hold.
                    if unsafe { ffi::rdma_disconnect(event.id) } != 0 {
                        tracing::debug!(error = %std::io::Error::last_os_error(), "rdma_disconnect");
                    }
                }
            }
            // The addresses of a bond moved, or the time-wait state ended: nothing to do.
            _ => return After::Nothing,
        }
        state.changed.notify_all();
        After::Notify(state)
    }
}

/// What the thread does with an event once the lock is released.
enum After {
    Nothing,
    Notify(Arc<State>),
    /// Listener, new id, private data, and the peer's (initiator depth, responder resources) as seen from here.
    Request(Arc<State>, Id, Vec<u8>, (u8, u8)),
    Discard(Id),
}

impl After {
    fn run(self) {
        let callback = AssertUnwindSafe(|| match self {
            Self::Nothing => {}
            Self::Notify(state) => {
                let notify = state.notify.lock().clone();
                if let Some(notify) = notify {
                    notify();
                }
            }
            Self::Request(listener, id, private_data, peer_reads) => {
                listener::deliver(&listener, id, private_data, peer_reads);
            }
            Self::Discard(id) => drop(id),
        });
        if catch_unwind(callback).is_err() {
            tracing::error!("a callback of the RDMA connection manager panicked");
        }
    }
}

/// The private data of an event, without the length in front and the padding behind it. Empty if malformed.
///
/// # Safety
/// `param` is the connection part of an event not yet acknowledged.
unsafe fn private_data(param: &ffi::rdma_conn_param) -> Vec<u8> {
    if param.private_data.is_null() || param.private_data_len == 0 {
        return Vec::new();
    }
    // SAFETY: the library's event holds that many bytes, until it is acknowledged.
    let raw =
        unsafe { std::slice::from_raw_parts(param.private_data.cast::<u8>(), param.private_data_len.into()) };
    unframe(raw).to_vec()
}

fn unframe(raw: &[u8]) -> &[u8] {
    raw.split_first().and_then(|(len, rest)| rest.get(..usize::from(*len))).unwrap_or_default()
}

/// Private data with its length in front, as the CM pads it.
fn frame(data: &[u8], limit: usize) -> Result<Vec<u8>, VerbsError> {
    let too_long = VerbsError::PrivateData { bytes: data.len(), limit };
    let len = u8::try_from(data.len()).ok().filter(|_| data.len() <= limit).ok_or(too_long)?;
    Ok([&[len], data].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_data_survives_padding_and_malformed_data_is_empty() {
        let mut framed = frame(b"hello", MAX_CONNECT_PRIVATE_DATA).unwrap();
        framed.resize(56, 0);
        assert_eq!(unframe(&framed), b"hello");
        assert_eq!(unframe(&[]), b"");
        assert_eq!(unframe(&[9, 1, 2]), b"");
        assert_eq!(frame(&[1; MAX_CONNECT_PRIVATE_DATA], MAX_CONNECT_PRIVATE_DATA).unwrap().len(), 56);
        assert!(frame(&[1; MAX_CONNECT_PRIVATE_DATA + 1], MAX_CONNECT_PRIVATE_DATA).is_err());
        assert!(frame(&[1; 256], 300).is_err());
    }
}
