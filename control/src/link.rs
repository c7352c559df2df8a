//! The link: a Unix socket on which one dataplane registers, redeems resume keys and confirms fences.
//!
//! A link that closes says nothing about the bindings behind it: dataplane may live, and its bindings go on until it
//! registers anew (then they are drained) or is proven dead, which its process descriptor tells ([`Peer`]).
//!
//! Whoever connects must run under our own user. Each packet is one message; a descriptor travels with a grant
//! (SCM_RIGHTS makes the duplicate: the receiver gets the same open file description).

use crate::driver::Event;
use holdfast_shared::types::{LINK_PACKET_BYTES_MAX, SERVICE_BLOB_BYTES_MAX};
use holdfast_shared::wire::link::{Register, ToControl, ToDataplane};
use holdfast_shared::wire::{from_cbor, to_cbor};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, listen, recvmsg, sendmsg,
    socket_with, sockopt,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, mpsc};

/// Time for a new connection to register.
const REGISTER_WAIT: Duration = Duration::from_secs(5);
/// Connections at once; only one of them can be registered.
const CONNECTIONS_MAX: usize = 8;

/// A packet for dataplane.
pub struct LinkPacket {
    /// The message.
    pub message: ToDataplane,
    /// The descriptor that goes with it.
    pub descriptor: Option<Arc<OwnedFd>>,
}

/// The process at the other end.
#[derive(Debug)]
pub struct Peer(Option<AsyncFd<OwnedFd>>);

impl Peer {
    /// Should the number have passed to another process by now, ours is dead, and the other one's death, later, proves
    /// no less.
    ///
    /// # Errors
    /// If its death could not be seen.
    fn watch(process: Pid) -> Result<Self, LinkError> {
        match pidfd_open(process, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => Ok(Self(Some(watch(pidfd, Interest::READABLE)?))),
            Err(Errno::SRCH) => Ok(Self(None)),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process is gone, and everything it held with it. However long that takes: no time-out turns
    /// silence into death. False if the kernel does not tell.
    pub async fn died(self) -> bool {
        let Some(pidfd) = self.0 else { return true };
        let dead = |fd: &OwnedFd| {
            let mut poll = [PollFd::new(fd, PollFlags::IN)];
            let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            match rustix::event::poll(&mut poll, Some(&zero))? {
                0 => Err(std::io::ErrorKind::WouldBlock.into()),
                _ => Ok(()),
            }
        };
        pidfd.async_io(Interest::READABLE, dead).await.is_ok()
    }
}

/// Why a link connection ends.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("socket: {0}")]
    Socket(#[from] std::io::Error),
    #[error("a process of user {0}, not ours")]
    User(u32),
    #[error("it did not register within {REGISTER_WAIT:?}")]
    Silent,
    #[error("its first message was not a registration")]
    NotRegistered,
    #[error("its service blob has {0} bytes; at most {SERVICE_BLOB_BYTES_MAX} are allowed")]
    Blob(usize),
    #[error("{0}")]
    Message(#[from] holdfast_shared::wire::WireError),
    #[error("a packet longer than {LINK_PACKET_BYTES_MAX} bytes")]
    Long,
}

impl From<Errno> for LinkError {
    fn from(error: Errno) -> Self {
        Self::Socket(error.into())
    }
}

/// Listens for dataplane.
///
/// # Errors
/// If the socket cannot be made; a path longer than 107 bytes does not fit a socket's address.
pub fn listener(path: &Path) -> std::io::Result<AsyncFd<OwnedFd>> {
    // The state directory is locked by us, so a socket that is there is nobody's.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    listen(&socket, 8)?;
    watch(socket, Interest::READABLE)
}

/// Watches a descriptor that it owns from now on.
#[expect(
    deprecated,
    reason = "unsound only for types whose descriptor changes or closes early; OwnedFd's does not"
)]
fn watch(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}

/// Takes connections for ever.
pub async fn serve(listener: AsyncFd<OwnedFd>, events: mpsc::Sender<Event>, binds: usize) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut number = 0;
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = listener.async_io(Interest::READABLE, |fd| Ok(acceptfrom_with(fd, flags)?.0)).await;
        match accepted {
            Ok(socket) => {
                number += 1;
                let events = events.clone();
                tokio::spawn(async move {
                    let _place = place;
                    if let Err(error) = connection(socket, number, &events, binds).await {
                        tracing::warn!(%error, "link connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "cannot accept on the link");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(
    socket: OwnedFd,
    number: u64,
    events: &mpsc::Sender<Event>,
    binds: usize,
) -> Result<(), LinkError> {
    let peer = sockopt::socket_peercred(&socket)?;
    if peer.uid != rustix::process::geteuid() {
        return Err(LinkError::User(peer.uid.as_raw()));
    }
    let peer = Peer::watch(peer.pid)?;
    let socket = watch(socket, Interest::READABLE | Interest::WRITABLE)?;
    let mut buffer = vec![0; LINK_PACKET_BYTES_MAX];
    let first = tokio::time::timeout(REGISTER_WAIT, receive(&socket, &mut buffer)).await;
    let register = match first.map_err(|_| LinkError::Silent)?? {
        None => return Ok(()),
        Some(ToControl::Register(register)) => checked(register)?,
        Some(_) => return Err(LinkError::NotRegistered),
    };
    let (packets, mut queue) = mpsc::unbounded_channel::<LinkPacket>();
    if events.send(Event::LinkBegin(number, register, packets)).await.is_err() {
        return Ok(());
    }
    // Bind requests under way: the next is read when one is answered.
    let permits = Semaphore::new(binds);
    let read = async {
        while let Some(message) = receive(&socket, &mut buffer).await? {
            if matches!(message, ToControl::Redeem(_)) {
                match permits.acquire().await {
                    Ok(permit) => permit.forget(),
                    Err(_) => break,
                }
            }
            if events.send(Event::LinkMessage(number, message)).await.is_err() {
                break;
            }
        }
        Ok::<(), LinkError>(())
    };
    let write = async {
        while let Some(packet) = queue.recv().await {
            send(&socket, &packet).await?;
            if matches!(packet.message, ToDataplane::Redeemed(_)) {
                permits.add_permits(1);
            }
        }
        // The driver has let go of this connection: it was refused.
        Ok::<(), LinkError>(())
    };
    let result = tokio::select! { result = read => result, result = write => result };
    drop(socket);
    let _ = events.send(Event::LinkEnd(number, peer)).await;
    result
}

fn checked(register: Register) -> Result<Register, LinkError> {
    let length = register.service_blob.len();
    if length > SERVICE_BLOB_BYTES_MAX { Err(LinkError::Blob(length)) } else { Ok(register) }
}

/// The next message; `None` at the end.
async fn receive(socket: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> Result<Option<ToControl>, LinkError> {
    let read = |fd: &OwnedFd| {
        // There is no room for descriptors: the kernel drops any that come.
        let mut control = RecvAncillaryBuffer::default();
        let mut parts = [IoSliceMut::new(&mut *buffer)];
        Ok(recvmsg(fd, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?)
    };
    // Written out, because the closure borrows the buffer anew for each try.
    let received = socket.async_io(Interest::READABLE, read).await?;
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(LinkError::Long);
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    let bytes = buffer.get(..received.bytes).unwrap_or_default();
    Ok(Some(from_cbor(bytes, LINK_PACKET_BYTES_MAX)?))
}

async fn send(socket: &AsyncFd<OwnedFd>, packet: &LinkPacket) -> Result<(), LinkError> {
    let mut bytes = to_cbor(&packet.message);
    let write = |fd: &OwnedFd| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = packet.descriptor.as_ref().map(|descriptor| [descriptor.as_fd()]);
        if let Some(descriptors) = &descriptors {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        Ok(sendmsg(fd, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?)
    };
    let sent = socket.async_io(Interest::WRITABLE, write).await;
    // A grant holds channel keys.
    zeroize::Zeroize::zeroize(&mut bytes);
    sent?;
    Ok(())
}
