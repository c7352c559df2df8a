//! Packets of the link, each with one descriptor at most, a grant's with two, and the waiting for room and arrival.

use crate::limiter::Limiter;
use holdfast_shared::types::LINK_PACKET_BYTES_MAX;
use holdfast_shared::wire::link::{ToControl, ToDataplane};
use holdfast_shared::wire::{from_cbor, to_cbor};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use zeroize::Zeroize;

/// While the kernel has too many descriptors under way to control: how often to try again.
const IN_FLIGHT_RETRY: Duration = Duration::from_millis(5);

/// What a packet brought.
pub(super) enum Packet {
    Message(Box<ToDataplane>, Descriptors),
    Nothing,
}

/// The open's own, and one for direct I/O.
pub(super) type Descriptors = (Option<OwnedFd>, Option<OwnedFd>);

/// Connects to control.
pub(super) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

/// Sends one packet, until `end` at most.
pub(super) fn send(
    socket: &OwnedFd,
    message: &ToControl,
    fd: Option<BorrowedFd<'_>>,
    end: Instant,
) -> io::Result<()> {
    let packet = to_cbor(message);
    if packet.is_empty() || packet.len() > LINK_PACKET_BYTES_MAX {
        return Err(io::Error::other("a message of ours is longer than a packet"));
    }
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(fd) = &fd {
            // There is room for one.
            control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
        }
        let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&packet)], &mut control, SendFlags::NOSIGNAL);
        let left = end.saturating_duration_since(Instant::now());
        match sent {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::TOOMANYREFS) if left.is_zero() => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "control takes nothing"));
            }
            Err(rustix::io::Errno::AGAIN) => {
                poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&timespec(left)))?;
            }
            // The socket has room, but control has taken few of those that are on their way.
            Err(rustix::io::Errno::TOOMANYREFS) => std::thread::sleep(IN_FLIGHT_RETRY.min(left)),
            Err(error) => return Err(error.into()),
        }
    }
}

pub(super) fn timespec(wait: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: wait.subsec_nanos().into(),
    }
}

/// Takes one packet and its descriptors. An error ends the link.
pub(super) fn receive(socket: &OwnedFd) -> io::Result<Packet> {
    let mut bytes = [0; LINK_PACKET_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    );
    let received = match received {
        Ok(received) => received,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Packet::Nothing),
        Err(error) => return Err(error.into()),
    };
    // Taken out before anything is judged: what came is closed on every path.
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => Some((fds.next(), fds.next())),
        _ => None,
    });
    if received.bytes == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "control has closed the link"));
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::other("a packet of control is too long"));
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        // The message is whole: its bind is refused, or does without direct I/O, and everybody else is served.
        static LOGGED: Limiter = Limiter::new();
        if let Some(suppressed) = LOGGED.pass() {
            tracing::warn!(
                suppressed,
                "no room for a descriptor of control's: raise the limit of open files"
            );
        }
    }
    let message = from_cbor(&bytes[..received.bytes], LINK_PACKET_BYTES_MAX).map_err(io::Error::other);
    // A grant has brought channel keys.
    bytes[..received.bytes].zeroize();
    let message = message?;
    Ok(Packet::Message(Box::new(message), fds.unwrap_or_default()))
}
