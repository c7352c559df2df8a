//! The loop of listeners on sockets: what concerns one peer is passed over, what will pass is waited for.

use crate::channel::Channel;
use crate::stopper::Stopper;
use rustix::event::PollFlags;
use rustix::io::Errno;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

/// How long to wait when the process or the host has run out of something.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// Waits for a peer and makes its channel. `take` accepts one connection: its error is the listening socket's; `None` says
/// that the peer was turned away.
pub(crate) fn accept<C: Channel + 'static>(
    stopper: &Stopper,
    listener: &impl AsFd,
    mut take: impl FnMut() -> io::Result<Option<io::Result<C>>>,
) -> io::Result<Box<dyn Channel>> {
    let mut short = false;
    loop {
        stopper.wait(listener, PollFlags::IN, None)?;
        match take() {
            Ok(taken) => {
                short = false;
                match taken {
                    None => {}
                    Some(Ok(channel)) => return Ok(Box::new(channel)),
                    // A peer that is gone already, most likely; its buffers went back to their pool.
                    Some(Err(error)) => tracing::debug!(%error, "connection not taken"),
                }
            }
            Err(error) if concerns_one_peer(&error) => {}
            Err(error) if is_shortage(&error) => {
                if !short {
                    tracing::warn!(%error, "connections wait until there is room again");
                    short = true;
                }
                stopper.sleep(SHORTAGE_PAUSE)?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The connection failed before it was taken; the listener is well.
fn concerns_one_peer(error: &io::Error) -> bool {
    matches!(
        errno(error),
        Some(
            Errno::AGAIN
                | Errno::INTR
                | Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::PROTO
                | Errno::PERM
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::TIMEDOUT
        )
    )
}

fn is_shortage(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}
