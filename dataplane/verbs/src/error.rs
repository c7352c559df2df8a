//! What can go wrong with a verb, and what to do about it.

use std::io;

use crate::memory::OutOfRange;

/// A call to libibverbs or librdmacm that failed, or was refused before it was made.
#[derive(Debug, thiserror::Error)]
pub enum VerbsError {
    /// The call failed.
    #[error("{verb} failed: {source}{hint}")]
    Call {
        /// The C function.
        verb: &'static str,
        /// What the system said.
        source: io::Error,
        /// What the operator can do, starting with ": ", or nothing.
        hint: &'static str,
    },
    /// Memory could not be registered for the device.
    #[error(
        "registering {bytes} bytes for RDMA failed: {source}; the memory lock limit is {}: raise it \
         (`ulimit -l`, or LimitMEMLOCK= in the service unit), or use fewer or smaller buffers",
        limit.map_or_else(|| "unlimited".to_owned(), |bytes| format!("{bytes} bytes"))
    )]
    Register {
        /// Bytes that were to be registered.
        bytes: usize,
        /// RLIMIT_MEMLOCK, or `None` if unlimited.
        limit: Option<u64>,
        /// What the system said.
        source: io::Error,
    },
    /// Memory of which slices are handed out was to be exposed to a peer.
    #[error("memory of a pool can't be registered with remote access")]
    Exclusive,
    /// A buffer or region was named together with a registration that doesn't cover it, or belongs to another domain.
    #[error("the registration doesn't belong to this memory or protection domain")]
    WrongRegistration,
    /// A range lies outside the memory.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// A message is longer than the device can carry in one work request.
    #[error("{bytes} bytes exceed the device's {limit} bytes for one message: split it")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The device's limit.
        limit: usize,
    },
    /// Every entry of the queue is in use: wait for completions.
    #[error("the queue is full: all {0} entries are in flight")]
    Full(usize),
    /// Private data that doesn't fit.
    #[error("{bytes} bytes of private data, at most {limit} fit")]
    PrivateData {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// A connection was not made.
    #[error("no RDMA connection with {peer}: {reason}")]
    NotConnected {
        /// The other end.
        peer: std::net::SocketAddr,
        /// Why.
        reason: ConnectFailure,
    },
}

/// Why a connection was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectFailure {
    /// No RDMA device leads to the address.
    #[error("no RDMA device leads there ({0})")]
    NoDevice(i32),
    /// No route.
    #[error("no route ({0})")]
    NoRoute(i32),
    /// The peer refused, or nobody listens there. The number is the CM's reason (28: the peer's program refused).
    #[error("refused by the peer (reason {0})")]
    Rejected(i32),
    /// The peer doesn't answer.
    #[error("the peer doesn't answer ({0})")]
    Unreachable(i32),
    /// Setting up the queue pair for the peer's answer failed.
    #[error("connecting failed ({0})")]
    Error(i32),
    /// The device was removed.
    #[error("the RDMA device was removed")]
    DeviceRemoved,
    /// It took longer than the caller allowed.
    #[error("timed out")]
    TimedOut,
    /// The peer was gone again at once.
    #[error("disconnected")]
    Disconnected,
}

impl VerbsError {
    pub(crate) fn call(verb: &'static str, source: io::Error) -> Self {
        let hint = match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV) => {
                ": is there an RDMA device (`rdma link`), is rdma_ucm loaded?"
            }
            Some(libc::EACCES | libc::EPERM) => ": may this user open /dev/infiniband/*?",
            Some(libc::ENOMEM) => ": memory, or the memory lock limit (`ulimit -l`), is exhausted",
            _ => "",
        };
        Self::Call { verb, source, hint }
    }
}

/// The largest number of bytes this process may lock (and so register), or `None` if there is no limit.
/// Processes with CAP_IPC_LOCK, such as root's, aren't held to it.
pub fn memlock_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_registration_says_what_to_do() {
        let source = io::Error::from_raw_os_error(libc::ENOMEM);
        let text = VerbsError::Register { bytes: 4096, limit: Some(8192), source }.to_string();
        assert!(text.contains("4096 bytes") && text.contains("limit is 8192 bytes"), "{text}");
        assert!(text.contains("LimitMEMLOCK"), "{text}");
    }
}
