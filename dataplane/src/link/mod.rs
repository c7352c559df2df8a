//! The link: the data plane's end of the Unix socket to control.
//!
//! ```text
//!            connect       all bindings there are, gathered      Registered{Ok}
//!  (down) ─────────► gathering ─────► registering: Register, Held… ─────► up ──┐
//!    ▲                                   │ refused, no answer                    │ control gone, or breaks the form
//!    └──── pause: none, then 20 ms doubling to 250 ms ◄──────────────────────────┘
//! ```
//!
//! One thread owns the socket. Workers leave messages in a queue and write an event descriptor; nobody else touches
//! the socket. While control is away bindings go on, and binds are refused `Unavailable`. Whoever can be reached next is
//! told every binding there is, with its descriptor; what ended before that is in no message but in its absence, and what
//! ends afterwards is told as always (the contract is in [`holdfast_shared::wire::link`]).

mod packet;
mod queue;

use crate::engine::{ControlPort, Engine, HeldBinding, Redemption, Ticket};
use crate::last_write::last_write_path;
use crossbeam::queue::SegQueue;
use holdfast_shared::types::{IoRule, Status, io_rules_ordered};
use holdfast_shared::wire::link::{
    Fence, Gauges, LinkBinding, Redeem, RedeemResult, Register, Restricted, ToControl, ToDataplane, VERSION,
};
use packet::{Descriptors, Packet, timespec};
use queue::{Outgoing, sort_out};
use rustix::event::{EventfdFlags, PollFd, PollFlags, poll};
use rustix::fs::FlockOperation;
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

const LOCK_FILE: &str = "dataplane.lock";
/// While bindings are gathered: how often to look whether we are to stop.
const GATHER_LOOK: Duration = Duration::from_millis(50);
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// A control that starts may have much to read before it answers.
const REGISTER_DEADLINE: Duration = Duration::from_secs(30);
/// Time control may take to make room for one packet.
const SEND_DEADLINE: Duration = Duration::from_secs(5);

/// The workers' end: a queue.
pub struct LinkPort {
    queue: SegQueue<Outgoing>,
    wake: OwnedFd,
    up: AtomicBool,
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

    fn fenced(&self, fence: Fence) {
        self.push(Outgoing::Fenced(fence));
    }

    fn released(&self, binding: LinkBinding) {
        self.push(Outgoing::Released(binding));
    }

    fn restricted(&self, restricted: Restricted) {
        self.push(Outgoing::Restricted(restricted));
    }

    fn withdrawn(&self, id: u64) {
        self.push(Outgoing::Withdrawn(id));
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
        let begun = Instant::now();
        match link.serve() {
            Ok(()) => break,
            Err(Lost { was_up, why }) => {
                link.down();
                if was_up {
                    tracing::warn!(%why, "control is away: bindings go on, binds are refused");
                    quiet = true;
                    // At once; unless it is one that comes and goes.
                    if begun.elapsed() > PAUSE_MAX {
                        pause = PAUSE_MIN;
                        continue;
                    }
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

impl<F: FnOnce()> Link<'_, F> {
    /// One connection, from its beginning to its end. `Ok` when stopped.
    fn serve(&mut self) -> Result<(), Lost> {
        let before = |why: io::Error| Lost { was_up: false, why };
        let socket = packet::connect(&self.path).map_err(before)?;
        self.lock().map_err(before)?;
        self.engine.last_write().keep_in(&last_write_path(&self.path)).map_err(before)?;
        let untold = self.register(&socket).map_err(before)?;
        self.port.up.store(true, Ordering::SeqCst);
        if let Some(registered) = self.registered.take() {
            registered();
        }
        self.exchange(&socket, untold).map_err(|why| Lost { was_up: true, why })
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

    /// Every binding there is, and what was said of them since.
    fn gather(&mut self) -> io::Result<(Vec<HeldBinding>, Vec<Outgoing>)> {
        let mut snapshot = self.engine.snapshot();
        while !snapshot.gather(GATHER_LOOK) {
            if self.port.stopped() {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        let held = snapshot.into_bindings();
        let names: HashSet<LinkBinding> = held.iter().map(|binding| binding.held.binding).collect();
        let (untold, tickets) = sort_out(&self.port.queue, &names);
        self.refuse(tickets);
        Ok((held, untold))
    }

    /// Registers with all bindings there are. Returns what is to be told first.
    fn register(&mut self, socket: &OwnedFd) -> io::Result<Vec<Outgoing>> {
        let (held, untold) = self.gather()?;
        let end = Instant::now() + REGISTER_DEADLINE;
        let n = u32::try_from(held.len()).map_err(io::Error::other)?;
        let service_blob = self.service_blob.clone();
        let first = self.registered.is_some();
        // After the bindings: what ends from now on is told of as held.
        let wrote = self.engine.wrote();
        let maps = self.engine.settings().map.enabled;
        let register = Register { version: VERSION, service_blob, held: n, first, wrote, maps };
        let register = ToControl::Register(register);
        packet::send(socket, &register, None, end)?;
        for binding in &held {
            packet::send(socket, &ToControl::Held(binding.held), Some(binding.descriptor()), end)?;
        }
        // What ends from now on closes its descriptor here.
        drop(held);
        self.await_registered(socket, end)?;
        self.engine.gauges().held_back_total.add(n.into());
        tracing::info!(bindings = n, "registered with control");
        Ok(untold)
    }

    fn await_registered(&self, socket: &OwnedFd, end: Instant) -> io::Result<()> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.port.stopped() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.wait(Some((socket, PollFlags::IN)), Some(left))?;
            match packet::receive(socket)? {
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

    fn exchange(&mut self, socket: &OwnedFd, untold: Vec<Outgoing>) -> io::Result<()> {
        for message in untold {
            self.tell(socket, message)?;
        }
        loop {
            while let Some(message) = self.port.queue.pop() {
                self.tell(socket, message)?;
            }
            if self.port.stopped() {
                return Ok(());
            }
            self.wait(Some((socket, PollFlags::IN)), None)?;
            // Everything that came, before going back to waiting.
            while let Packet::Message(message, fds) = packet::receive(socket)? {
                self.handle(socket, *message, fds)?;
            }
        }
    }

    fn tell(&mut self, socket: &OwnedFd, message: Outgoing) -> io::Result<()> {
        let message = match message {
            Outgoing::Redeem(ticket, mut redeem) => {
                redeem.id = self.next;
                self.next += 1;
                self.pending.insert(redeem.id, ticket);
                ToControl::Redeem(redeem)
            }
            Outgoing::Fenced(fence) => ToControl::Fenced(fence),
            Outgoing::Released(binding) => ToControl::Released(binding),
            Outgoing::Restricted(restricted) => ToControl::Restricted(restricted),
            Outgoing::Withdrawn(id) => ToControl::Withdrawn(id),
        };
        packet::send(socket, &message, None, Instant::now() + SEND_DEADLINE)
    }

    fn handle(
        &mut self,
        socket: &OwnedFd,
        message: ToDataplane,
        (fd, direct): Descriptors,
    ) -> io::Result<()> {
        match message {
            ToDataplane::Redeemed(redeemed) => {
                if let RedeemResult::Granted(grant) = &redeemed.result {
                    ordered(&grant.rules)?;
                }
                match self.pending.remove(&redeemed.id) {
                    Some(ticket) => {
                        self.engine.redeemed(Redemption { ticket, result: redeemed.result, fd, direct })
                    }
                    None => return Err(io::Error::other("control answers a bind nobody asked for")),
                }
            }
            ToDataplane::Fence(fence) => self.engine.fence(fence),
            ToDataplane::Restrict(restrict) => {
                ordered(&restrict.rules)?;
                self.engine.restrict(restrict);
            }
            ToDataplane::Withdraw(withdraw) => self.engine.withdraw(withdraw),
            ToDataplane::Mappable(id) => self.engine.mappable(id),
            ToDataplane::GetGauges(id) => {
                let gauges = self.engine.gauges().collect();
                let gauges = ToControl::Gauges(Gauges { id, gauges });
                packet::send(socket, &gauges, None, Instant::now() + SEND_DEADLINE)?;
            }
            ToDataplane::Registered(_) => return Err(io::Error::other("control registers us twice")),
        }
        Ok(())
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

    /// Control is away: every bind that is with it, or on its way, is answered. What else waits to be told is covered by the
    /// next registration.
    fn down(&mut self) {
        self.port.up.store(false, Ordering::SeqCst);
        let mut tickets: Vec<Ticket> = self.pending.drain().map(|(_, ticket)| ticket).collect();
        while let Some(message) = self.port.queue.pop() {
            if let Outgoing::Redeem(ticket, _) = message {
                tickets.push(ticket);
            }
        }
        self.refuse(tickets);
    }

    fn refuse(&self, tickets: Vec<Ticket>) {
        for ticket in tickets {
            let result = RedeemResult::Refused(Status::Unavailable);
            self.engine.redeemed(Redemption { ticket, result, fd: None, direct: None });
        }
    }

    /// Waits before the next attempt. A bind that slipped in as the link went down is answered meanwhile.
    fn pause(&mut self, pause: Duration) {
        let end = Instant::now() + pause;
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

/// Rules out of order would be judged wrongly.
fn ordered(rules: &[IoRule]) -> io::Result<()> {
    if io_rules_ordered(rules) { Ok(()) } else { Err(io::Error::other("control sends rules out of order")) }
}
