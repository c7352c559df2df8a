//! [`Lane`] and [`Lanes`]: a queue pair of its own for each mapping that a client reads one-sided.
//!
//! ```text
//!   client                                                       server
//!   Registrar::lane ── connect, private data "lane" ──► VerbsListener ──► Lanes: waiting, by the client's end
//!   Lane::end ── said in a Map, on the authenticated channel ──► Lanes::claim ─► Claimed ── expose(file) ─► Exposed
//!   Lane::read ─────────────── RDMA READ, no processor of the server's ──────────────────────────────────────┘ │
//!        └─► refused, and the lane is at its end  ◄──────────────────────────────────────────────── withdraw() ┘
//! ```
//!
//! A read that is refused takes its queue pair with it, at both ends. So a lane carries one mapping and nothing else: what
//! ends with it is only what could not go on anyway. And it has a protection domain of its own at the server: the mapping's
//! key is worth nothing to anybody but the client that the lane leads to, whatever the device makes of ranges.
//!
//! A lane says nothing about who is at its end. Until a binding claims it nothing can be read over it; the client proves
//! that it is its own by naming its end under a binding's MAC, and the two ends name a queue pair like those of the bind
//! transcript do. Lanes that nobody claims are few, and go after some seconds.

use super::wake::{Note, Wake, ring};
use super::{INLINE_BYTES, io_error};
use crate::channel::{Armed, OperationError, Registration, SubmitError};
use holdfast_shared::auth::ChannelIdentity;
use holdfast_verbs::memory::FileMapping;
use holdfast_verbs::{
    ConnectRequest, Connection, ConnectionConfig, FileRegistration, Local, MemoryRegistration, Operation,
    Outgoing, ProtectionDomain, QueueDepths, Remote, Status, WorkRequest,
};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a client that wants a lane says when it connects. One that wants a channel says nothing.
const GREETING: &[u8] = b"holdfast lane 1";
/// How long a lane waits for its mapping.
const WAITING_TIME: Duration = Duration::from_secs(5);
/// How long [`Lanes::try_claim`] waits for others.
const CLAIM_TIME: Duration = Duration::from_millis(1);
/// Lanes that wait. For one more, the oldest of the address that has the most of them goes.
const WAITING_MAX: usize = 64;

/// The client's end of a lane, as both sides know it.
pub type LaneEnd = [u8; 20];

/// Lanes that clients have made, until a mapping claims them.
#[derive(Default)]
pub struct Lanes {
    waiting: Mutex<HashMap<LaneEnd, Waiting>>,
}

struct Waiting {
    connection: Connection,
    peer: IpAddr,
    since: Instant,
}

/// True if the peer asks for a lane, and not for a channel.
pub(super) fn is_wanted(request: &ConnectRequest) -> bool {
    request.private_data() == GREETING
}

impl Lanes {
    /// Answers a connect request. `event` is rung when the state of the lane changes.
    pub(super) fn answer(&self, request: ConnectRequest, event: &Arc<OwnedFd>) -> io::Result<()> {
        let event = Arc::clone(event);
        let config = ConnectionConfig {
            depths: QueueDepths { send: 1, receive: 1, inline: 0 },
            notify: Some(Arc::new(move || ring(&event))),
            ..ConnectionConfig::default()
        };
        let domain = ProtectionDomain::new(request.device()).map_err(io_error)?;
        let peer = request.peer_address().ip();
        let incoming = request.connection(&domain, &config).map_err(io_error)?;
        // Locked from before the client can know that it is connected: its Map finds the lane.
        let mut waiting = self.waiting.lock();
        let connection = incoming.accept(&[]).map_err(io_error)?;
        let names = connection.identity();
        let end = ChannelIdentity::verbs_end(names.remote_qpn, names.remote_gid.0);
        let evicted = (waiting.len() >= WAITING_MAX).then(|| crowded(&waiting)).flatten();
        let evicted = evicted.and_then(|end| waiting.remove(&end));
        let replaced = waiting.insert(end, Waiting { connection, peer, since: Instant::now() });
        drop(waiting);
        drop((evicted, replaced));
        Ok(())
    }

    /// Drops lanes that have waited too long, or whose client has gone. Returns when the next one is due.
    pub(super) fn sweep(&self) -> Option<Duration> {
        let mut waiting = self.waiting.lock();
        let now = Instant::now();
        let is_over = |lane: &Waiting| {
            now.duration_since(lane.since) >= WAITING_TIME || lane.connection.is_disconnected()
        };
        let over: Vec<LaneEnd> =
            waiting.iter().filter(|(_, lane)| is_over(lane)).map(|(end, _)| *end).collect();
        let gone: Vec<Waiting> = over.iter().filter_map(|end| waiting.remove(end)).collect();
        let next =
            waiting.values().map(|lane| (lane.since + WAITING_TIME).saturating_duration_since(now)).min();
        drop(waiting);
        for lane in gone {
            tracing::debug!(peer = %lane.peer, "a lane that no mapping claimed: dropped");
        }
        next
    }

    /// Takes the lane with that client's end, for one mapping.
    pub fn claim(&self, end: &LaneEnd) -> Option<Claimed> {
        self.waiting.lock().remove(end).map(|lane| Claimed { connection: lane.connection })
    }

    /// As [`Lanes::claim`], for who may not wait long: `None` as well while other lanes are being made.
    pub fn try_claim(&self, end: &LaneEnd) -> Option<Claimed> {
        self.waiting.try_lock_for(CLAIM_TIME)?.remove(end).map(|lane| Claimed { connection: lane.connection })
    }

    /// Lanes that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.lock().len()
    }
}

impl std::fmt::Debug for Lanes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lanes").field("waiting", &self.waiting()).finish()
    }
}

/// The oldest lane of the address that has the most.
fn crowded(waiting: &HashMap<LaneEnd, Waiting>) -> Option<LaneEnd> {
    let mut counts: HashMap<IpAddr, usize> = HashMap::new();
    for lane in waiting.values() {
        *counts.entry(lane.peer).or_default() += 1;
    }
    let most = counts.into_iter().max_by_key(|(_, count)| *count).map(|(peer, _)| peer)?;
    let of_it = waiting.iter().filter(|(_, lane)| lane.peer == most);
    of_it.min_by_key(|(_, lane)| lane.since).map(|(end, _)| *end)
}

/// A lane that a mapping has claimed.
#[derive(Debug)]
pub struct Claimed {
    connection: Connection,
}

impl Claimed {
    /// Pins `length` bytes of the file from `offset` on, and lets the lane's client read them. Blocks while they are read
    /// from the disk.
    ///
    /// # Errors
    /// `EFAULT` if the file ends before, or this kernel does not pin a file's pages for reading alone; the kernel's and the
    /// device's others.
    pub fn expose(self, file: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<Exposed> {
        let mapping = FileMapping::new(file, offset, length)?;
        let registration =
            FileRegistration::new(self.connection.domain(), mapping).map_err(|error| match error {
                // The kind alone would not tell what the kernel said.
                holdfast_verbs::VerbsError::Call { source, .. } => source,
                other => io_error(other),
            })?;
        Ok(Exposed { registration, connection: self.connection })
    }
}

/// A range of a file that one client may read. Dropping it withdraws it too, but tells nobody if that fails.
#[derive(Debug)]
pub struct Exposed {
    registration: FileRegistration,
    connection: Connection,
}

/// What is left of a lane whose mapping was withdrawn: dropping it tells the client.
#[derive(Debug)]
pub struct Spent {
    _connection: Connection,
}

impl Exposed {
    /// The address by which the client names the first byte.
    pub fn address(&self) -> u64 {
        self.registration.addr()
    }

    /// The key by which it names the bytes.
    pub fn rkey(&self) -> u32 {
        self.registration.rkey()
    }

    /// Withdraws it: when this returns, the device reads not one byte more of the file.
    ///
    /// # Errors
    /// The device's: it may go on.
    pub fn withdraw(self) -> io::Result<Spent> {
        self.registration.withdraw().map_err(io_error)?;
        Ok(Spent { _connection: self.connection })
    }
}

/// The end of a one-sided read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneRead {
    /// As given to [`Lane::read`].
    pub token: u64,
    /// Bytes read, or why not. An error is the end of the lane.
    pub outcome: Result<usize, OperationError>,
}

/// A client's lane. Driven by one thread at a time, as a [`crate::Channel`] is: poll until it yields nothing, arm, sleep.
pub struct Lane {
    connection: Connection,
    wake: Wake,
    end: LaneEnd,
    ended: bool,
    batch: Vec<holdfast_verbs::Completion>,
}

impl Lane {
    /// Connects to the listener at `address`, with `depth` reads in flight at most. What is registered in `domain` can be
    /// read into.
    pub(super) fn connect(
        domain: &Arc<ProtectionDomain>,
        address: SocketAddr,
        timeout: Duration,
        depth: usize,
    ) -> io::Result<Self> {
        let outgoing = Outgoing::resolve(address, timeout).map_err(io_error)?;
        let note = Note::new(None)?;
        let rung = Arc::clone(&note);
        let send = u32::try_from(depth).unwrap_or(u32::MAX).max(1);
        let config = ConnectionConfig {
            depths: QueueDepths { send, receive: 1, inline: INLINE_BYTES },
            notify: Some(Arc::new(move || rung.ring())),
            ..ConnectionConfig::default()
        };
        let prepared = outgoing.prepare(domain, &config).map_err(io_error)?;
        let connection = prepared.connect(GREETING).map_err(io_error)?;
        let names = connection.identity();
        Ok(Self {
            end: ChannelIdentity::verbs_end(names.local_qpn, names.local_gid.0),
            wake: Wake::new(connection.wake_fd(), note)?,
            batch: Vec::with_capacity(depth),
            ended: false,
            connection,
        })
    }

    /// This end, as the server knows it.
    pub fn end(&self) -> LaneEnd {
        self.end
    }

    /// Longest read, bytes.
    pub fn read_bytes_max(&self) -> usize {
        self.connection.max_message()
    }

    /// Begins to read from the server's memory at `address` into `range` of a region that is registered with the channel
    /// which the lane belongs to.
    ///
    /// # Errors
    /// [`SubmitError::Full`] with as many reads in flight as may be; [`SubmitError::Closed`] once the lane has ended;
    /// [`SubmitError::Invalid`] for a registration of another channel, or a range outside of it.
    pub fn read(
        &mut self,
        token: u64,
        into: &Registration,
        range: Range<usize>,
        address: u64,
        rkey: u32,
    ) -> Result<(), SubmitError> {
        if self.ended {
            return Err(SubmitError::Closed);
        }
        if self.connection.send_room() == 0 {
            return Err(SubmitError::Full);
        }
        let registration = into.held::<Arc<MemoryRegistration>>().ok_or(SubmitError::Invalid)?;
        let local = Local::region(registration, range).map_err(|_| SubmitError::Invalid)?;
        if !Arc::ptr_eq(registration.domain(), self.connection.domain())
            || local.len() > self.connection.max_message()
        {
            return Err(SubmitError::Invalid);
        }
        let operation = Operation::Read(Remote { addr: address, rkey });
        let mut queue = VecDeque::from([WorkRequest { token, operation, local, signaled: true }]);
        self.connection.post(&mut queue).map(drop).map_err(|_| SubmitError::Closed)
    }

    /// Appends the reads that have ended. Returns how many.
    pub fn poll(&mut self, done: &mut Vec<LaneRead>) -> usize {
        let before = done.len();
        let mut batch = std::mem::take(&mut self.batch);
        let failed = loop {
            match self.connection.poll(&mut batch) {
                Ok(0) => break false,
                Ok(_) => {}
                Err(_) => break true,
            }
        };
        done.extend(batch.drain(..).map(|read| LaneRead {
            token: read.token,
            outcome: match read.status {
                Status::Success => Ok(read.bytes),
                Status::Flushed => Err(OperationError::Flushed),
                Status::RemoteAccessError | Status::RemoteInvalidRequest => Err(OperationError::RemoteAccess),
                Status::RetryExceeded => Err(OperationError::Unreachable),
                _ => Err(OperationError::Transport),
            },
        }));
        self.batch = batch;
        let refused = done.iter().skip(before).any(|read| read.outcome.is_err());
        if failed || refused || self.connection.is_disconnected() {
            self.close();
        }
        done.len() - before
    }

    /// Asks for a wake-up, as [`crate::Channel::arm`].
    pub fn arm(&mut self) -> Armed {
        self.wake.clear_note();
        if !self.ended && self.connection.is_disconnected() {
            return Armed::Pending;
        }
        match self.connection.arm() {
            Ok(true) => Armed::Idle,
            Ok(false) => Armed::Pending,
            Err(_) if self.ended => Armed::Idle,
            Err(_) => {
                self.close();
                Armed::Pending
            }
        }
    }

    /// The wake descriptor: edge triggered, for reading and writing.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.fd()
    }

    /// True once no read can succeed any more. Those in flight still come back.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads in flight.
    pub fn in_flight(&self) -> usize {
        self.connection.in_flight()
    }

    /// Ends it: the device is cut off from every region before this returns.
    pub fn close(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            if let Err(error) = self.connection.disconnect() {
                tracing::debug!(%error, "disconnecting a lane");
            }
        }
    }
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("connection", &self.connection).field("ended", &self.ended).finish()
    }
}
