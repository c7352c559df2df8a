//! Channels over a Unix socket, for clients on the server's host; what travels on it is [`crate::stream`]'s.
//!
//! ```text
//!   client                                        server
//!   socket named by 128 random bits ──connect──► path ──accept──► both know both names: the channel's two ends
//! ```
//!
//! A client gives its end a name of its own, in the abstract namespace, so that no two channels have the same ends. The
//! peer is of this host: it cannot vanish without the kernel's saying so, and nothing watches it.

mod listener;

pub use listener::LocalListener;

use crate::channel::Setup;
use crate::stream::StreamChannel;
use holdfast_shared::auth::ChannelIdentity;
use holdfast_shared::wire::service::TransportKind;
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect as reach, socket_with,
};
use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as Name, UnixStream};
use std::path::Path;
use std::time::Duration;

/// Bytes that may be on their way in one direction; the kernel gives less where `net.core.wmem_max` says so.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// Who is at the other end, for people and limits: this host.
const PEER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Connects to the socket at `path`, waiting at most `timeout`.
///
/// # Errors
/// `ConnectionRefused` if nobody listens there; the kernel's; `InvalidInput` for a path longer than 107 bytes and for a setup
/// that contradicts itself.
pub fn connect(path: &Path, timeout: Duration, setup: Setup) -> io::Result<StreamChannel> {
    let address = SocketAddrUnix::new(path).map_err(|_| invalid_path())?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new_abstract_name(random_name()?.as_bytes())?)?;
    // A connect that finds the queue full waits for so long, as a send would.
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    reach(&socket, &address).map_err(|error| match error {
        rustix::io::Errno::NOENT => {
            io::Error::new(io::ErrorKind::ConnectionRefused, "there is no such socket")
        }
        rustix::io::Errno::AGAIN => io::Error::new(io::ErrorKind::TimedOut, "nobody takes the connection"),
        error => error.into(),
    })?;
    channel(socket.into(), setup, true)
}

/// The channel over a connection.
fn channel(stream: UnixStream, setup: Setup, is_client: bool) -> io::Result<StreamChannel> {
    stream.set_nonblocking(true)?;
    // Less is slower, and works.
    let _ = set_socket_send_buffer_size(&stream, SEND_BUFFER_BYTES);
    let (local, peer) = (end(&stream.local_addr()?), end(&stream.peer_addr()?));
    let (client, server) = if is_client { (local, peer) } else { (peer, local) };
    let identity = ChannelIdentity { transport: TransportKind::Local, client, server };
    StreamChannel::new(stream.into(), PEER, identity, setup, is_client)
}

/// A socket's name as the transcript has it.
fn end(name: &Name) -> [u8; 20] {
    use std::os::unix::ffi::OsStrExt;
    let path = name.as_pathname().map(|path| path.as_os_str().as_bytes());
    ChannelIdentity::local_end(path.or_else(|| name.as_abstract_name()).unwrap_or_default())
}

/// A name that nobody else has.
fn random_name() -> io::Result<String> {
    let mut bytes = [0u8; 16];
    // Requests of up to 256 bytes are answered whole.
    if rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())? != bytes.len() {
        return Err(io::Error::new(io::ErrorKind::Interrupted, "random numbers came short"));
    }
    let mut name = String::from("holdfast-");
    bytes.iter().for_each(|byte| {
        let _ = write!(name, "{byte:02x}");
    });
    Ok(name)
}

fn invalid_path() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "a path of more than 107 bytes does not fit a socket's address",
    )
}
