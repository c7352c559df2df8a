//! Channels for clients on the server's host: shared memory, and a Unix socket for what that can't do.
//!
//! ```text
//!   client                                        server
//!   socket named by 128 random bits ──connect──► path ──accept──► both know both names: the channel's two ends
//!
//!   frames    ─────────────────────── rings ───────────────────► as over tcp: [`crate::stream`]
//!   regions   ── their memory files, by the socket ────────────► mapped: Place and Fetch copy to and from them, without a frame
//!   bell, end ─────────────────────── socket ──────────────────► system calls only for who sleeps
//! ```
//!
//! | file | holds |
//! |---|---|
//! | `listener` | the socket at a path |
//! | `note` | what travels on the socket |
//! | `foreign` | descriptors that came on it |
//! | `area` | what lies where in the shared memory; who sleeps |
//! | `ring` | bytes from one process to the other |
//! | `share` | the client's regions, and how they are taken back |
//! | `reach` | the server's mappings of them, and their limits |
//! | `wire` | all of that as what carries a stream |
//!
//! A client gives its end a name of its own, in the abstract namespace, so that no two channels have the same ends. The
//! peer is of this host: it cannot vanish without the kernel's saying so, and nothing watches it. What it stores in shared memory is read
//! once, and checked before it is believed; docs/ARCHITECTURE.md says why it can't end this process either.

mod area;
mod foreign;
mod listener;
mod note;
mod reach;
mod ring;
mod share;
mod wire;

pub use listener::LocalListener;

use crate::channel::{Channel, Setup};
use crate::stream::StreamChannel;
use holdfast_shared::auth::ChannelIdentity;
use holdfast_shared::wire::service::TransportKind;
use reach::Budget;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect as reach, socket_with,
};
use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as Name, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use wire::LocalWire;

/// This process has connected so.
static IN_USE: AtomicBool = AtomicBool::new(false);

/// Who is at the other end, for people and limits: this host.
const PEER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// True if this process has a local channel, or had one: regions made from then on should be
/// [shareable](holdfast_verbs::memory::Region::shareable), so that the server gets at them without frames.
pub fn in_use() -> bool {
    IN_USE.load(Ordering::Relaxed)
}

/// Connects to the socket at `path`, waiting at most `timeout`.
///
/// # Errors
/// `ConnectionRefused` if nobody listens there; the kernel's; `InvalidInput` for a path longer than 107 bytes and for a setup
/// that contradicts itself.
pub fn connect(path: &Path, timeout: Duration, setup: Setup) -> io::Result<impl Channel + use<>> {
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
    let channel = channel(socket.into(), setup, None)?;
    IN_USE.store(true, Ordering::Relaxed);
    Ok(channel)
}

/// What a server lets its clients share.
struct Sharing {
    budget: Arc<Budget>,
    /// Of it one channel may have so many bytes.
    channel_bytes_max: u64,
}

/// The channel over a connection: the server's end if it says what may be shared.
fn channel(
    stream: UnixStream,
    setup: Setup,
    sharing: Option<&Sharing>,
) -> io::Result<StreamChannel<LocalWire>> {
    stream.set_nonblocking(true)?;
    let (local, peer) = (end(&stream.local_addr()?), end(&stream.peer_addr()?));
    let (client, server) = if sharing.is_none() { (local, peer) } else { (peer, local) };
    let identity = ChannelIdentity { transport: TransportKind::Local, client, server };
    let wire = match sharing {
        None => LocalWire::client(stream.into())?,
        Some(sharing) => LocalWire::server(stream.into(), &sharing.budget, sharing.channel_bytes_max)?,
    };
    StreamChannel::new(wire, PEER, identity, setup)
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
