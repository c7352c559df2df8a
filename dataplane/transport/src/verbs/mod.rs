//! Channels over one reliable RDMA connection each.
//!
//! ```text
//!   submit ──► outgoing ──poll: one doorbell──► device ──► completion queue ──poll──► Completion
//!                                                 │
//!              wake descriptor ◄── epoll ◄────────┴── completion channel
//!                                    ▲
//!                                    └── connection manager: the peer has gone, with nothing in flight here
//! ```
//!
//! * A client's channel has a protection domain of its own: what it registers can be named on this connection only.
//! * A listener has one protection domain per device, in which the pools are registered once, for local use. Its
//!   channels export no memory: their registrar refuses.
//! * A server's channel also places straight from pinned pages of files: see `pinned`.
//! * A *lane* is a queue pair beside the channels, over which a client reads one range of a file by itself: see `lane`.
//! * The device reports in order, and of a batch only what matters: the last request, Fetches and long transfers ask
//!   for a completion, the others complete together with the next that does.
//! * The device that answers a forbidden Place or Fetch tells its owner only that the channel has ended.
//! * A process that dies may lose its memory before its connection: a Place under way is then refused, as if it had been
//!   forbidden, and that is what the channel ends with.
//! * A Send that finds no Recv at the peer for a few milliseconds ends the channel: users count credits.

mod channel;
mod home;
mod lane;
mod listener;
mod pinned;
mod wake;

pub use channel::{VerbsChannel, connect};
pub use lane::{Claimed, Exposed, Lane, LaneEnd, LaneRead, Lanes, Spent};
pub use listener::VerbsListener;
pub use pinned::{PinnedFile, Pinner};

use holdfast_verbs::{ConnectFailure, ConnectionConfig, Device, QueueDepths, VerbsError};
use std::io;
use std::sync::Arc;

/// Messages up to this long are copied into the request: the device need not fetch them.
const INLINE_BYTES: u32 = 192;

/// As the rest of the program takes errors: the kind tells what to do, the text why.
fn io_error(error: VerbsError) -> io::Error {
    let kind = match &error {
        VerbsError::Call { source, .. } | VerbsError::Register { source, .. } => source.kind(),
        VerbsError::NotConnected { reason, .. } => match reason {
            ConnectFailure::NoDevice(_) | ConnectFailure::DeviceRemoved => io::ErrorKind::NotFound,
            ConnectFailure::NoRoute(_) | ConnectFailure::Unreachable(_) => io::ErrorKind::HostUnreachable,
            ConnectFailure::Rejected(_) => io::ErrorKind::ConnectionRefused,
            ConnectFailure::TimedOut => io::ErrorKind::TimedOut,
            ConnectFailure::Disconnected => io::ErrorKind::ConnectionReset,
            ConnectFailure::Error(_) => io::ErrorKind::Other,
        },
        _ => io::ErrorKind::InvalidInput,
    };
    io::Error::new(kind, error)
}

/// # Errors
/// `NotFound` if this host has no RDMA device.
fn require_device() -> io::Result<()> {
    if Device::list().map_err(io_error)?.is_empty() {
        let text = "this host has no RDMA device (`rdma link` shows them; rdma_rxe makes one of any network interface)";
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    Ok(())
}

fn config(depth: usize, receives: usize, note: &Arc<wake::Note>) -> ConnectionConfig {
    let entries = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).max(1);
    let note = Arc::clone(note);
    ConnectionConfig {
        depths: QueueDepths { send: entries(depth), receive: entries(receives), inline: INLINE_BYTES },
        notify: Some(Arc::new(move || note.ring())),
        ..ConnectionConfig::default()
    }
}
