//! Channels over one TCP connection each; what travels on it is [`crate::stream`]'s.
//!
//! A peer that takes no bytes for 20 s, or whose host gives no sign of life for that long, is gone.

mod listener;

pub use crate::stream::framing;
pub use listener::TcpListener;

use crate::channel::{Channel, Setup};
use crate::stream::{SocketWire, StreamChannel};
use holdfast_shared::auth::ChannelIdentity;
use holdfast_shared::wire::service::TransportKind;
use rustix::net::sockopt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Unacknowledged bytes for this long mean that the peer is gone.
const USER_TIMEOUT_MS: u32 = 20_000;
/// A quiet peer is asked for a sign of life after this long, then this often, this many times.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 4;

/// Connects to `address`, waiting at most `timeout`.
///
/// # Errors
/// The kernel's; `InvalidInput` for a setup that contradicts itself.
pub fn connect(address: SocketAddr, timeout: Duration, setup: Setup) -> io::Result<impl Channel + use<>> {
    channel(TcpStream::connect_timeout(&address, timeout)?, setup, true)
}

/// The channel over a connection.
fn channel(stream: TcpStream, setup: Setup, is_client: bool) -> io::Result<StreamChannel<SocketWire>> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(&stream, USER_TIMEOUT_MS)?;
    sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    let (client, server) = if is_client { (local, peer) } else { (peer, local) };
    let identity = ChannelIdentity {
        transport: TransportKind::Tcp,
        client: ChannelIdentity::tcp_end(client),
        server: ChannelIdentity::tcp_end(server),
    };
    StreamChannel::new(SocketWire(stream.into()), peer, identity, setup)
}
