//! The link: a Unix socket on which one dataplane registers, redeems resume keys and confirms fences.
//!
//! ```text
//!   Register(n), n × Held + descriptor ──► collected here, bounded ──► one Event::LinkBegin ──► driver
//!   everything else                    ──► one Event::LinkMessage each
//! ```
//!
//! A link that closes says nothing about the bindings behind it: dataplane may live, and its bindings go on. What it
//! still has it tells at its next registration; what it had is gone when it is proven dead, which its process descriptor
//! tells ([`Peer`]). A registration that is broken off leaves nothing behind: what had come of it is closed.
//!
//! Whoever connects must run under our own user. Each packet is one message; a descriptor travels with a grant
//! (SCM_RIGHTS makes the duplicate: the receiver gets the same open file description), and with one of a volume with direct I/O
//! a second one (`direct`).

use crate::direct;
use crate::driver::Event;
use holdfast_shared::types::{LINK_PACKET_BYTES_MAX, OpenId, SERVICE_BLOB_BYTES_MAX, Status};
use holdfast_shared::wire::link::{
    Held, Register, Registered, ToControl, ToDataplane, VERSION, WROTE_MAX, Wrote,
};
use holdfast_shared::wire::{from_cbor, to_cbor};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, listen,
    recvmsg, sendmsg, socket_with, sockopt,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, mpsc};

/// Time for a new connection to register, and for each packet of its registration.
const REGISTER_WAIT: Duration = Duration::from_secs(5);
/// Bindings that a registration may tell of.
const HELD_MAX: u32 = 1 << 20;
/// Connections at once; only one of them can be registered.
const CONNECTIONS_MAX: usize = 8;

/// What a dataplane registered.
#[derive(Debug, Default)]
pub struct Registration {
    /// Handed on unread.
    pub service_blob: Vec<u8>,
    /// The bindings that live.
    pub held: Vec<Held>,
    /// The process is new: every earlier dataplane is dead.
    pub first: bool,
    /// What bindings that are gone wrote.
    pub wrote: Vec<Wrote>,
    /// It maps ranges of files for one-sided reads.
    pub maps: bool,
    /// Descriptors of their opens: one of each, as many as are still wanted.
    pub descriptors: HashMap<OpenId, OwnedFd>,
}

/// How many descriptors a registration may leave with us. A control that has its opens needs none of them.
pub type DescriptorsWanted = Arc<AtomicUsize>;

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
    #[error("it speaks version {0} of the link and not {VERSION}: both processes must come from one build")]
    Version(u8),
    #[error("it tells of {0} bindings; at most {HELD_MAX} are allowed")]
    Held(u32),
    #[error("it tells of {0} opens that were written; at most {WROTE_MAX} are allowed")]
    Wrote(usize),
    #[error("its registration was broken off after {0} of {1} bindings")]
    Half(usize, u32),
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
pub async fn serve(
    listener: AsyncFd<OwnedFd>,
    events: mpsc::Sender<Event>,
    binds: usize,
    wanted: DescriptorsWanted,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut number = 0;
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = listener.async_io(Interest::READABLE, |fd| Ok(acceptfrom_with(fd, flags)?.0)).await;
        match accepted {
            Ok(socket) => {
                number += 1;
                let (events, wanted) = (events.clone(), wanted.clone());
                tokio::spawn(async move {
                    let _place = place;
                    if let Err(error) = connection(socket, number, &events, binds, &wanted).await {
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
    wanted: &DescriptorsWanted,
) -> Result<(), LinkError> {
    let peer = sockopt::socket_peercred(&socket)?;
    if peer.uid != rustix::process::geteuid() {
        return Err(LinkError::User(peer.uid.as_raw()));
    }
    let peer = Peer::watch(peer.pid)?;
    let socket = watch(socket, Interest::READABLE | Interest::WRITABLE)?;
    let mut buffer = vec![0; LINK_PACKET_BYTES_MAX];
    let Some((first, _)) = receive_in_time(&socket, &mut buffer).await? else { return Ok(()) };
    let ToControl::Register(register) = first else { return Err(LinkError::NotRegistered) };
    if let Err((status, error)) = checked(&register) {
        let message = ToDataplane::Registered(Registered { status });
        send(&socket, &LinkPacket { message, descriptor: None }).await?;
        return Err(error);
    }
    let registration = collect(&socket, &mut buffer, register, wanted).await?;
    let (packets, mut queue) = mpsc::unbounded_channel::<LinkPacket>();
    if events.send(Event::LinkBegin(number, Box::new(registration), packets)).await.is_err() {
        return Ok(());
    }
    // Bind requests under way: the next is read when one is answered.
    let permits = Semaphore::new(binds);
    let read = async {
        while let Some((message, _)) = receive(&socket, &mut buffer).await? {
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

/// What the answer to a registration is that can't be taken, whatever follows it.
fn checked(register: &Register) -> Result<(), (Status, LinkError)> {
    let length = register.service_blob.len();
    if register.version != VERSION {
        Err((Status::Version, LinkError::Version(register.version)))
    } else if length > SERVICE_BLOB_BYTES_MAX {
        Err((Status::Invalid, LinkError::Blob(length)))
    } else if register.held > HELD_MAX {
        Err((Status::TooMany, LinkError::Held(register.held)))
    } else if register.wrote.len() > WROTE_MAX {
        Err((Status::TooMany, LinkError::Wrote(register.wrote.len())))
    } else {
        Ok(())
    }
}

/// The rest of a registration. Of each open one descriptor is kept, of as many opens as `wanted` says.
async fn collect(
    socket: &AsyncFd<OwnedFd>,
    buffer: &mut [u8],
    register: Register,
    wanted: &DescriptorsWanted,
) -> Result<Registration, LinkError> {
    let mut registration = Registration {
        service_blob: register.service_blob,
        first: register.first,
        wrote: register.wrote,
        maps: register.maps,
        ..Registration::default()
    };
    for got in 0..register.held {
        let half = || LinkError::Half(registration.held.len(), register.held);
        let Some((ToControl::Held(held), descriptor)) = receive_in_time(socket, buffer).await? else {
            return Err(half());
        };
        tracing::trace!(got, binding = held.binding.0, "a held binding");
        registration.held.push(held);
        if let Some(descriptor) = descriptor
            && registration.descriptors.len() < wanted.load(Ordering::Relaxed)
        {
            registration.descriptors.entry(held.open).or_insert(descriptor);
        }
    }
    Ok(registration)
}

async fn receive_in_time(
    socket: &AsyncFd<OwnedFd>,
    buffer: &mut [u8],
) -> Result<Option<(ToControl, Option<OwnedFd>)>, LinkError> {
    let message = tokio::time::timeout(REGISTER_WAIT, receive(socket, buffer)).await;
    message.map_err(|_| LinkError::Silent)?
}

/// The next message, and a descriptor that came with it; `None` at the end.
async fn receive(
    socket: &AsyncFd<OwnedFd>,
    buffer: &mut [u8],
) -> Result<Option<(ToControl, Option<OwnedFd>)>, LinkError> {
    let mut descriptor = None;
    let read = |fd: &OwnedFd| {
        // Room for one: the kernel drops any more, and this one too if the process has no room for it.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut *buffer)];
        let received = recvmsg(fd, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Ok(received)
    };
    let received = socket.async_io(Interest::READABLE, read).await?;
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(LinkError::Long);
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    let bytes = buffer.get(..received.bytes).unwrap_or_default();
    Ok(Some((from_cbor(bytes, LINK_PACKET_BYTES_MAX)?, descriptor)))
}

/// Another description of the file for direct I/O, if it can be had; its volume's files are served all the same.
async fn second(file: Arc<OwnedFd>) -> Option<OwnedFd> {
    // A disk that hangs must not hold up those who run beside it.
    match tokio::task::spawn_blocking(move || direct::reopen(&*file)).await {
        Ok(Ok(direct)) => Some(direct),
        Ok(Err(error)) => {
            static LOGGED: std::sync::Once = std::sync::Once::new();
            LOGGED.call_once(|| {
                tracing::warn!(%error, "a file can't be opened for direct I/O, and is served through the page cache (said once)");
            });
            None
        }
        Err(_) => None,
    }
}

async fn send(socket: &AsyncFd<OwnedFd>, packet: &LinkPacket) -> Result<(), LinkError> {
    let mut bytes = to_cbor(&packet.message);
    let direct = match packet.descriptor.as_ref().filter(|_| direct::is_wanted(&packet.message)) {
        Some(file) => second(Arc::clone(file)).await,
        None => None,
    };
    let write = |fd: &OwnedFd| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let own = packet.descriptor.iter().map(|descriptor| descriptor.as_fd());
        let descriptors: Vec<_> = own.chain(direct.as_ref().map(AsFd::as_fd)).collect();
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        Ok(sendmsg(fd, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?)
    };
    let sent = socket.async_io(Interest::WRITABLE, write).await;
    // A grant holds channel keys.
    zeroize::Zeroize::zeroize(&mut bytes);
    sent?;
    Ok(())
}
