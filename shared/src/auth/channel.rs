//! What a proof is bound to, and the keys that come of it.

use super::Secret;
use super::schedule::sha256;
use crate::wire::service::TransportKind;
use minicbor::{Decode, Encode};

/// What both ends of a channel see of it, the client's side first. Part of the transcript: a proof made for
/// one channel is worth nothing on another.
///
/// | transport | `client` and `server` hold |
/// |---|---|
/// | verbs | queue pair number (u32 LE) and GID (16 bytes) of that side |
/// | tcp | IP address as 16 bytes (IPv4 mapped) and port (u16 LE) of that side |
/// | local | the first 20 bytes of SHA-256 over the name of that side's Unix socket |
/// | memory | what the test says |
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct ChannelIdentity {
    /// The transport.
    #[n(0)]
    pub transport: TransportKind,
    /// The client's end.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub client: [u8; 20],
    /// The server's end.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub server: [u8; 20],
}

impl ChannelIdentity {
    /// One end of a verbs channel.
    pub fn verbs_end(queue_pair: u32, gid: [u8; 16]) -> [u8; 20] {
        let mut end = [0; 20];
        end[..4].copy_from_slice(&queue_pair.to_le_bytes());
        end[4..].copy_from_slice(&gid);
        end
    }

    /// One end of a tcp channel.
    pub fn tcp_end(address: std::net::SocketAddr) -> [u8; 20] {
        let ip = match address.ip() {
            std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            std::net::IpAddr::V6(v6) => v6.octets(),
        };
        let mut end = [0; 20];
        end[..16].copy_from_slice(&ip);
        end[16..18].copy_from_slice(&address.port().to_le_bytes());
        end
    }

    /// One end of a local channel, by its socket's name: the path at which the server bound it, or the abstract name the
    /// client did, without the leading zero.
    pub fn local_end(name: &[u8]) -> [u8; 20] {
        let mut end = [0; 20];
        sha256(&[name]).into_iter().zip(&mut end).for_each(|(from, to)| *to = from);
        end
    }

    /// The bytes that enter the transcript: one byte of transport, 20 of the client's end, 20 of the server's.
    pub(super) fn transcript_bytes(&self) -> [u8; 41] {
        let mut bytes = [0; 41];
        bytes[0] = match self.transport {
            TransportKind::Verbs => 1,
            TransportKind::Tcp => 2,
            TransportKind::Memory => 3,
            TransportKind::Local => 4,
        };
        bytes[1..21].copy_from_slice(&self.client);
        bytes[21..].copy_from_slice(&self.server);
        bytes
    }
}

/// The keys of one direction of one binding.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct DirectionKeys {
    /// For frame MACs.
    #[n(0)]
    pub frame: Secret,
    /// For payload digests or sealing.
    #[n(1)]
    pub payload: Secret,
}

/// The keys of one binding on one channel. Never shown by Debug.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct ChannelKeys {
    /// Frames the client sends.
    #[n(0)]
    pub to_server: DirectionKeys,
    /// Frames the server sends.
    #[n(1)]
    pub to_client: DirectionKeys,
}
