//! The service blob: what dataplane registers with control, and control hands to clients with each resume key.

use super::{WireError, from_cbor, to_cbor};
use crate::types::SERVICE_BLOB_BYTES_MAX;
use minicbor::{Decode, Encode};

/// How a data channel is carried.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum TransportKind {
    /// RDMA verbs, reliable connection.
    #[n(1)]
    Verbs,
    /// TCP.
    #[n(2)]
    Tcp,
    /// In memory; tests only, never in a service blob.
    #[n(3)]
    Memory,
    /// A Unix socket, for clients on the server's host.
    #[n(4)]
    Local,
}

impl TransportKind {
    /// The word a person types and reads.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Verbs => "verbs",
            Self::Tcp => "tcp",
            Self::Memory => "memory",
            Self::Local => "local",
        }
    }
}

/// Where a data plane listens.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Endpoint {
    /// By which transport.
    #[n(0)]
    pub transport: TransportKind,
    /// An IP address as text; `None` means the address at which the client reached control. Of local endpoints, the
    /// socket's absolute path.
    #[n(1)]
    pub address: Option<String>,
    /// TCP port, or rdmacm port in the TCP port space; of local endpoints 0.
    #[n(2)]
    pub port: u16,
    /// Of local endpoints, the boot id of the server's kernel: a client that runs on another cannot see that path, whatever
    /// it has there. Absent otherwise.
    #[n(3)]
    pub boot_id: Option<String>,
}

/// What a client learns of a data plane.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct ServiceBlob {
    /// Identifies this run of the dataplane process.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub instance: [u8; 16],
    /// When it started, milliseconds since 1970.
    #[n(1)]
    pub boot_ms: u64,
    /// Lowest and highest version of data frames it speaks.
    #[n(2)]
    pub version_min: u8,
    /// See `version_min`.
    #[n(3)]
    pub version_max: u8,
    /// Where it listens, best first.
    #[n(4)]
    pub endpoints: Vec<Endpoint>,
    /// Longest single read or write, bytes.
    #[n(5)]
    pub transfer_max: u32,
}

impl ServiceBlob {
    /// The bytes to register.
    pub fn encode(&self) -> Vec<u8> {
        to_cbor(self)
    }

    /// Reads a blob.
    ///
    /// # Errors
    /// [`WireError`] if it is too long or not a blob.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        from_cbor(bytes, SERVICE_BLOB_BYTES_MAX)
    }
}
