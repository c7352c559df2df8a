//! The link: the data plane's end of the Unix socket to control.
//!
//! ```text
//!            connect, drain, Register     Registered{Ok}
//!  (down) ───────────────────► registering ─────────────► up ──┐
//!    ▲                            │ refused, no answer          │ control gone, or breaks the form
//!    └──── pause: 50 ms doubling to 2 s, ± a quarter ◄──────────┘
//! ```
//!
//! One thread owns the socket. Workers leave messages in a queue and write an event descriptor; nobody else touches
//! the socket. While control is away bindings go on, and binds are refused `Unavailable`. Once control can be reached
//! again, all earlier bindings are drained before we register: a registration says that none is left (the contract
//! is in [`holdfast_shared::wire::link`]). Their clients get a Notice `Fenced` and bind again. Each registration has a number, and what is said of a binding made under an earlier one is
//! dropped: its number means nothing, or another binding, to this control.

use crate::engine::{ControlPort, Engine, Redemption, Ticket};
use crate::limiter::Limiter;
use crossbeam::queue::SegQueue;
use holdfast_shared::types::{LINK_PACKET_BYTES_MAX, Status};
use holdfast_shared::wire::link::{
    Fence, Gauges, LinkBinding, Redeem, RedeemResult, Register, ToControl, ToDataplane, VERSION,
};
use holdfast_shared::wire::{from_cbor, to_cbor};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use zeroize::Zeroize;

const LOCK_FILE: &str = "dataplane.lock";
/// While old bindings are drained: how often to look whether we are to stop; a drain after which control is connected
/// to anew; and how often a long one is told.
const DRAIN_LOOK: Duration = Duration::from_millis(50);
const DRAIN_FAST: Duration = Duration::from_secs(1);
const DRAIN_TELL: Duration = Duration::from_secs(10);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
const REGISTER_DEADLINE: Duration = Duration::from_secs(5);
/// Time control may take to make room for one packet.
const SEND_DEADLINE: Duration = Duration::from_secs(5);

enum Outgoing {
    Redeem(Ticket, Redeem),
    Fenced(u64, Fence),
    Released(u64, LinkBinding),
}

/// The workers' end: a queue.
pub struct LinkPort {
    queue: SegQueue<Outgoing>,
    wake: OwnedFd,
    up: AtomicBool,
    registration: AtomicU64,
    stop: AtomicBool,
    /// Locked while this process may have bindings: as long as it lives. See [`lock_path`].
    lock: OnceLock<File>,
}

/// The file beside the link socket that a data plane keeps locked (flock) from before its first registration until its
/// process has ended.
pub fn lock_path(link: &Path) -> PathBuf {
    link.with_file_name(LOCK_FILE)
}

impl LinkPort {
    /// A port; the link is down until [`run`] has registered.
    ///
    /// # Errors
    /// The kernel's, when no descriptor can be had.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            queue: SegQueue::new(),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            up: AtomicBool::new(false),
            registration: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            lock: OnceLock::new(),
        }))
    }

    /// Ends [`run`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether control is there.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }

    fn push(&self, message: Outgoing) {
        self.queue.push(message);
        self.wake();
    }

    fn wake(&self) {
        // Fails only if the counter is full: then the thread is being woken already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

impl ControlPort for LinkPort {
    fn redeem(&self, ticket: Ticket, redeem: Redeem) -> Result<(), Status> {
        if !self.is_up() {
            return Err(Status::Unavailable);
        }
        self.push(Outgoing::Redeem(ticket, redeem));
        Ok(())
    }

    fn fenced(&self, registration: u64, fence: Fence) {
        self.push(Outgoing::Fenced(registration, fence));
    }

    fn released(&self, registration: u64, binding: LinkBinding) {
        self.push(Outgoing::Released(registration, binding));
    }
}

/// Serves the link until stopped. `registered` is called once, after the first registration.
pub fn run(
    port: &LinkPort,
    engine: &Engine,
    path: PathBuf,
    service_blob: Vec<u8>,
    registered: impl FnOnce(),
) {
    let mut link = Link {
        port,
        engine,
        path,
        service_blob,
        registered: Some(registered),
        pending: HashMap::new(),
        next: 1,
    };
    let mut pause = PAUSE_MIN;
    let mut quiet = false;
    while !port.stopped() {
        match link.serve() {
            Ok(()) => break,
            Err(Lost { was_up, why }) => {
                link.down();
                if was_up {
                    tracing::warn!(%why, "control is away: bindings go on, binds are refused");
                    (pause, quiet) = (PAUSE_MIN, true);
                } else if !quiet {
                    tracing::info!(path = %link.path.display(), %why, "control is not there yet");
                    quiet = true;
                }
            }
        }
        link.pause(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
    link.down();
}

struct Lost {
    was_up: bool,
    why: io::Error,
}

struct Link<'a, F> {
    port: &'a LinkPort,
    engine: &'a Engine,
    path: PathBuf,
    service_blob: Vec<u8>,
    registered: Option<F>,
    /// Binds that are with control.
    pending: HashMap<u64, Ticket>,
    next: u64,
}

/// What a packet brought.
enum Packet {
    Message(Box<ToDataplane>, Option<OwnedFd>),
    Nothing,
}

impl<F: FnOnce()> Link<'_, F> {
    /// One connection, from its beginning to its end. `Ok` when stopped.
    fn serve(&mut self) -> Result<(), Lost> {
        let before = |why: io::Error| Lost { was_up: false, why };
        let mut socket = self.connect().map_err(before)?;
        self.lock().map_err(before)?;
        let registration = self.port.registration.load(Ordering::SeqCst) + 1;
        let begun = Instant::now();
        self.drain(registration);
        if begun.elapsed() > DRAIN_FAST {
            // Control does not wait long for a registration.
            socket = self.connect().map_err(before)?;
        }
        self.register(&socket).map_err(before)?;
        self.port.registration.store(registration, Ordering::SeqCst);
        self.port.up.store(true, Ordering::SeqCst);
        tracing::info!(registration, "registered with control");
        if let Some(registered) = self.registered.take() {
            registered();
        }
        self.exchange(&socket, registration).map_err(|why| Lost { was_up: true, why })
    }

    /// Takes the lock that says a data plane lives; kept from then on.
    fn lock(&self) -> io::Result<()> {
        if self.port.lock.get().is_some() {
            return Ok(());
        }
        let path = lock_path(&self.path);
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            io::Error::other(format!("another data plane holds {}: {error}", path.display()))
        })?;
        let _ = self.port.lock.set(file);
        Ok(())
    }

    /// Ends the bindings of earlier registrations, and waits until nothing of them is under way: a peer that holds that up
    /// is cut off after `fence_ms`; storage is waited for.
    fn drain(&mut self, registration: u64) {
        if self.engine.drained(Duration::ZERO) {
            return;
        }
        self.engine.new_control(registration);
        let mut told = Instant::now();
        while !self.engine.drained(DRAIN_LOOK) && !self.port.stopped() {
            // Binds are answered meanwhile.
            self.down();
            if told.elapsed() > DRAIN_TELL {
                told = Instant::now();
                tracing::warn!("storage holds up old bindings: control can't be told yet that they are gone");
            }
        }
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let address = SocketAddrUnix::new(&self.path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        Ok(socket)
    }

    fn register(&mut self, socket: &OwnedFd) -> io::Result<()> {
        let register = Register { version: VERSION, service_blob: self.service_blob.clone() };
        self.send(socket, &ToControl::Register(register))?;
        let end = Instant::now() + REGISTER_DEADLINE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.port.stopped() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.wait(Some((socket, PollFlags::IN)), Some(left))?;
            match receive(socket)? {
                Packet::Nothing => {}
                Packet::Message(message, _) => match *message {
                    ToDataplane::Registered(answer) if answer.status == Status::Ok => return Ok(()),
                    ToDataplane::Registered(answer) => {
                        return Err(io::Error::other(format!("control refuses: {}", answer.status)));
                    }
                    _ => return Err(io::Error::other("control speaks before it has registered us")),
                },
            }
        }
    }

    fn exchange(&mut self, socket: &OwnedFd, registration: u64) -> io::Result<()> {
        loop {
            self.send_queued(socket, registration)?;
            if self.port.stopped() {
                return Ok(());
            }
            self.wait(Some((socket, PollFlags::IN)), None)?;
            // Everything that came, before going back to waiting.
            while let Packet::Message(message, fd) = receive(socket)? {
                self.handle(socket, registration, *message, fd)?;
            }
        }
    }

    fn send_queued(&mut self, socket: &OwnedFd, registration: u64) -> io::Result<()> {
        while let Some(message) = self.port.queue.pop() {
            let message = match message {
                Outgoing::Redeem(ticket, mut redeem) => {
                    redeem.id = self.next;
                    self.next += 1;
                    self.pending.insert(redeem.id, ticket);
                    ToControl::Redeem(redeem)
                }
                Outgoing::Fenced(under, fence) if under == registration => ToControl::Fenced(fence),
                Outgoing::Released(under, binding) if under == registration => ToControl::Released(binding),
                // Of a control that is no more.
                Outgoing::Fenced(..) | Outgoing::Released(..) => continue,
            };
            self.send(socket, &message)?;
        }
        Ok(())
    }

    fn handle(
        &mut self,
        socket: &OwnedFd,
        registration: u64,
        message: ToDataplane,
        fd: Option<OwnedFd>,
    ) -> io::Result<()> {
        match message {
            ToDataplane::Redeemed(redeemed) => match self.pending.remove(&redeemed.id) {
                Some(ticket) => {
                    self.engine.redeemed(Redemption { ticket, registration, result: redeemed.result, fd });
                }
                None => return Err(io::Error::other("control answers a bind nobody asked for")),
            },
            ToDataplane::Fence(fence) => self.engine.fence(registration, fence),
            ToDataplane::GetGauges(id) => {
                let gauges = self.engine.gauges().collect();
                self.send(socket, &ToControl::Gauges(Gauges { id, gauges }))?;
            }
            ToDataplane::Registered(_) => return Err(io::Error::other("control registers us twice")),
        }
        Ok(())
    }

    fn send(&self, socket: &OwnedFd, message: &ToControl) -> io::Result<()> {
        let packet = to_cbor(message);
        if packet.is_empty() || packet.len() > LINK_PACKET_BYTES_MAX {
            return Err(io::Error::other("a message of ours is longer than a packet"));
        }
        let end = Instant::now() + SEND_DEADLINE;
        loop {
            match rustix::net::send(socket, &packet, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::AGAIN) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "control takes nothing"));
                    }
                    let timeout = timespec(left);
                    poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&timeout))?;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the socket or for workers.
    fn wait(&self, socket: Option<(&OwnedFd, PollFlags)>, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = timeout.map(timespec);
        let wake = PollFd::new(&self.port.wake, PollFlags::IN);
        let polled = match socket {
            Some((socket, flags)) => poll(&mut [wake, PollFd::new(socket, flags)], timeout.as_ref()),
            None => poll(&mut [wake], timeout.as_ref()),
        };
        match polled {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let _ = rustix::io::read(self.port.wake.as_fd(), &mut [0u8; 8]);
        Ok(())
    }

    /// Control is away: every bind that is with it, or on its way, is answered.
    fn down(&mut self) {
        self.port.up.store(false, Ordering::SeqCst);
        let registration = self.port.registration.load(Ordering::SeqCst);
        let mut tickets: Vec<Ticket> = self.pending.drain().map(|(_, ticket)| ticket).collect();
        self.drop_queued(&mut tickets);
        for ticket in tickets {
            let result = RedeemResult::Refused(Status::Unavailable);
            self.engine.redeemed(Redemption { ticket, registration, result, fd: None });
        }
    }

    fn drop_queued(&self, tickets: &mut Vec<Ticket>) {
        while let Some(message) = self.port.queue.pop() {
            if let Outgoing::Redeem(ticket, _) = message {
                tickets.push(ticket);
            }
        }
    }

    /// Waits before the next attempt, a quarter more or less, so that many servers don't come back in step. A bind that
    /// slipped in as the link went down is answered meanwhile.
    fn pause(&mut self, pause: Duration) {
        let mut random = [0];
        // Without randomness the pause is as it is.
        let _ = aws_lc_rs::rand::fill(&mut random);
        let end = Instant::now() + pause * (192 + u32::from(random[0]) / 2) / 256;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.port.stopped() {
                return;
            }
            if self.wait(None, Some(left)).is_err() {
                std::thread::sleep(left);
            }
            self.down();
        }
    }
}

fn timespec(wait: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: wait.subsec_nanos().into(),
    }
}

/// Takes one packet and its descriptor. An error ends the link.
fn receive(socket: &OwnedFd) -> io::Result<Packet> {
    let mut bytes = [0; LINK_PACKET_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
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
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let fd = fds.next();
    if received.bytes == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "control has closed the link"));
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::other("a packet of control is too long"));
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        // The message is whole: its bind is refused, and everybody else is served.
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
    Ok(Packet::Message(Box::new(message), fd))
}
