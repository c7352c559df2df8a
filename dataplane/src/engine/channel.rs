//! One channel: sequence, credits, receives, and its end.
//!
//! ```text
//!           adopt            misbehaviour, stop        notice sent and peer gone, or linger over
//!  (none) ────────► Open ────────────────────► Ending ─────────────────────────────────────────► Closed ─► released
//!                    └──────── peer gone, transport failed, stuck, fence overdue ─────────────────► ▲
//! ```
//!
//! Closed means: the device is cut off. The channel is released when every operation, receive and storage job came back.
//!
//! Message buffers are the channel's own, taken when it is adopted and when it is first bound: answering never waits for
//! another channel. Each request is counted against the credits from its receipt until its reply is submitted.

use super::backend::Opener;
use super::bind::PendingBind;
use super::binding::{BindingRef, Bindings};
use super::door::Door;
use super::latch::Latches;
use super::map::ChannelMaps;
use super::mapper::Maps;
use super::pinned::PinnedFiles;
use super::ready::Ready;
use super::registry::Registry;
use super::reply::Rare;
use super::request::{Request, Step};
use super::restrict::Restricting;
use super::storage::StorageSender;
use super::views::Views;
use super::written::Written;
use super::{CREDITS_UNBOUND, ConnKey, ControlPort, RESERVE, SPARE, Settings};
use crate::gauges::Gauges;
use crate::last_write::LastWrite;
use crate::limiter::Limiter;
use holdfast_shared::types::Status;
use holdfast_shared::wire::service::TransportKind;
use holdfast_transport::verbs::Pinner;
use holdfast_transport::{Armed, Channel, Completion, Kind, Operation, OperationError, Placed, Rejected};
use holdfast_verbs::memory::{Buffer, Pool};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the channels of a worker share.
pub(crate) struct Cx {
    pub(crate) worker: usize,
    pub(crate) settings: Arc<Settings>,
    pub(crate) bulk: Pool,
    pub(crate) messages: Pool,
    pub(crate) storage: StorageSender,
    pub(crate) port: Arc<dyn ControlPort>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) latches: Arc<Latches>,
    pub(crate) last_write: Arc<LastWrite>,
    pub(crate) door: Arc<Door>,
    pub(crate) opener: Opener,
    pub(crate) gauges: Arc<Gauges>,
    /// `None`: there are no one-sided reads.
    pub(crate) maps: Option<Arc<Maps>>,
    /// `None`: nothing is pinned to be read.
    pub(crate) pinned: Option<PinnedFiles>,
    pub(crate) views: Option<Views>,
    /// The time at the beginning of this round.
    pub(crate) now: Instant,
}

impl Cx {
    pub(crate) fn after(&self, ms: u64) -> Instant {
        self.now + Duration::from_millis(ms)
    }
}

/// What an operation is for; travels through the transport as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Receive,
    Send,
    /// The notice that ends the channel.
    End,
    /// Of a binding.
    Place {
        binding: BindingRef,
    },
    /// Of a request, by its slot; where the piece begins.
    Fetch {
        slot: u16,
        piece: u32,
    },
}

impl Token {
    pub(super) fn number(self) -> u64 {
        match self {
            Self::Receive => 0,
            Self::Send => 1,
            Self::End => 2,
            Self::Place { binding } => u64::from(binding.0),
            Self::Fetch { slot, piece } => u64::from(slot) << 32 | u64::from(piece),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Open,
    Ending { by: Instant },
    Closed,
}

/// Message buffers a channel begins with, both directions.
const FIRST_BUFFERS: usize = 2 * (CREDITS_UNBOUND as usize + SPARE);
/// A channel takes at most one part in so many of the spare message buffers.
const SHARE: usize = 16;

/// Steps and bytes of one turn: enough to fill a doorbell, too few to make others wait.
const STEPS_PER_TURN: usize = 16;
const BYTES_PER_TURN: usize = 512 << 10;

pub(crate) struct Conn {
    pub(crate) key: ConnKey,
    pub(super) transport: Box<dyn Channel>,
    pub(super) peer: SocketAddr,
    /// Its id at the door, until it is bound.
    pub(crate) door: u64,
    pub(super) phase: Phase,
    pub(super) recv_sequence: u64,
    pub(super) send_sequence: u64,
    pub(super) nonce: [u8; 32],
    pub(super) credits: u16,
    pub(super) in_flight: u16,
    pub(super) bind: Option<PendingBind>,
    pub(super) ever_bound: bool,
    pub(super) bind_by: Option<Instant>,
    pub(super) failed_binds: u32,
    pub(super) bindings: Bindings,
    pub(super) draining: usize,
    /// New rules that wait for requests begun before.
    pub(super) restricting: Vec<Restricting>,
    /// Requests admitted ever.
    pub(super) admitted: u64,
    /// Sends, Places and Fetches completed ever.
    pub(super) completed: u64,
    pub(super) requests: Vec<Option<Request>>,
    pub(super) free_slots: Vec<u16>,
    pub(super) ready: Ready,
    pub(super) rare: VecDeque<Rare>,
    pub(super) send_buffers: Vec<Buffer>,
    pub(super) receives: usize,
    /// Sends, Places and Fetches in flight, and how many may be.
    pub(super) ops: usize,
    pub(super) depth: usize,
    /// Longest Place or Fetch the transport does.
    pub(super) transfer_max: usize,
    /// The peer's memory may be reached without operations.
    pub(super) straight: bool,
    cheap: bool,
    gives_way: bool,
    /// Of its device, where that can place from files.
    pub(super) pinner: Option<Pinner>,
    /// Its transport can place from mapped files.
    pub(super) views: bool,
    /// Reads that wait until the wire takes more.
    pub(super) awaits_wire: Vec<u16>,
    /// Places from files done.
    placed: Vec<Placed>,
    /// Places from files submitted and completed ever: the device reads the pages in between.
    pub(super) pinned_begun: u64,
    pub(super) pinned_ended: u64,
    pub(super) written: Written,
    pub(super) storage_ops: usize,
    pub(super) maps: ChannelMaps,
    /// Bulk buffers it has.
    pub(super) held: usize,
    /// Bytes of the fetches in flight.
    pub(super) fetching: u32,
    pub(super) stuck_by: Option<Instant>,
    /// Since the last completion: no room at the transport.
    pub(super) blocked: bool,
    pub(super) unpolled: bool,
    // For the worker's lists.
    pub(crate) hot: bool,
    pub(crate) listed: bool,
    /// A bulk buffer came back: others may have waited for it.
    pub(crate) freed: bool,
}

impl Conn {
    pub(crate) fn new(cx: &mut Cx, key: ConnKey, mut transport: Box<dyn Channel>, door: u64) -> Self {
        transport.bound(false);
        let credits = usize::from(cx.settings.engine.credits);
        let capabilities = transport.capabilities();
        let peer = transport.peer();
        let pinner = if cx.pinned.is_some() { transport.pinner() } else { None };
        let views = cx.views.is_some() && transport.places_views();
        let straight = transport.identity().transport == TransportKind::Local;
        let mut conn = Self {
            key,
            transport,
            peer,
            door,
            phase: Phase::Open,
            recv_sequence: 0,
            send_sequence: 0,
            nonce: [0; 32],
            credits: CREDITS_UNBOUND,
            in_flight: 0,
            bind: None,
            ever_bound: false,
            bind_by: Some(cx.after(cx.settings.limits.bind_deadline_ms)),
            failed_binds: 0,
            bindings: Bindings::new(),
            draining: 0,
            restricting: Vec::new(),
            admitted: 0,
            completed: 0,
            requests: Vec::new(),
            free_slots: Vec::new(),
            ready: Ready::default(),
            rare: VecDeque::with_capacity(4),
            send_buffers: Vec::new(),
            receives: usize::from(CREDITS_UNBOUND) + SPARE,
            ops: 0,
            depth: capabilities.depth.min(2 * credits + RESERVE),
            transfer_max: capabilities.transfer_bytes_max,
            cheap: capabilities.cheap_poll,
            gives_way: capabilities.gives_way,
            straight,
            pinner,
            views,
            awaits_wire: Vec::new(),
            placed: Vec::new(),
            pinned_begun: 0,
            pinned_ended: 0,
            written: Written::default(),
            storage_ops: 0,
            maps: ChannelMaps::default(),
            held: 0,
            fetching: 0,
            stuck_by: None,
            blocked: false,
            unpolled: true,
            hot: false,
            listed: false,
            freed: false,
        };
        conn.grow_slots(CREDITS_UNBOUND);
        let sends = usize::from(CREDITS_UNBOUND) + SPARE;
        conn.send_buffers.extend((0..sends).map_while(|_| cx.messages.take()));
        if conn.send_buffers.len() < sends || conn.depth < RESERVE + 2 {
            conn.abort(cx, "no message buffers left");
            return conn;
        }
        conn.fresh_nonce(cx);
        conn.rare.push_back(Rare::Hello);
        tracing::debug!(peer = %conn.peer, "channel");
        conn
    }

    /// Makes room for as many requests as there are credits. The last allocation a channel makes for requests.
    pub(super) fn grow_slots(&mut self, credits: u16) {
        let have = self.requests.len();
        let want = usize::from(credits);
        self.requests.resize_with(want.max(have), || None);
        self.free_slots.reserve(want);
        for slot in (have..want).rev() {
            self.free_slots.push(u16::try_from(slot).unwrap_or(u16::MAX));
        }
        self.ready.reserve(want.max(have));
        self.written.reserve(STEPS_PER_TURN, want);
        self.awaits_wire.reserve(want);
    }

    /// Takes the message buffers that go with more credits; returns how many credits they are enough for. What channels
    /// that may still come need to begin with is left alone, and of the rest no channel takes more than a share.
    pub(super) fn grow_buffers(&mut self, cx: &mut Cx, credits: u16) -> u16 {
        let limits = &cx.settings.limits;
        let channels = usize::try_from(cx.gauges.channels.read()).unwrap_or(usize::MAX);
        let kept = limits.channels_max.saturating_sub(channels) * FIRST_BUFFERS;
        let spare = cx.messages.available().saturating_sub(kept);
        let more = u16::try_from(spare / SHARE / 2).unwrap_or(u16::MAX);
        let credits = credits.min(self.credits.saturating_add(more));
        let mut granted = self.credits;
        while granted < credits {
            let (Some(send), Some(receive)) = (cx.messages.take(), cx.messages.take()) else { break };
            self.send_buffers.push(send);
            self.post_receive(cx, receive);
            granted += 1;
        }
        granted
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.transport.wake_fd()
    }

    /// Who looks for its work is to give way now and then.
    pub(crate) fn gives_way(&self) -> bool {
        self.gives_way
    }

    /// True if polling it in vain makes no system call.
    pub(crate) fn polls_cheaply(&self) -> bool {
        self.cheap
    }

    /// Polls the transport once and takes what came. True if something did.
    pub(crate) fn poll(&mut self, cx: &mut Cx, done: &mut Vec<Completion>) -> bool {
        self.unpolled = false;
        let busy = self.transport.poll(done) > 0;
        if self.pinner.is_some() {
            self.transport.take_placed(&mut self.placed);
        }
        if busy {
            self.blocked = false;
            // A peer that only talks is no progress of what is under way to it.
            if !self.placed.is_empty() || done.iter().any(|completion| completion.kind != Kind::Recv) {
                self.stuck_by = Some(cx.after(cx.settings.limits.stuck_ms));
            }
        }
        // First: the reply that follows one frees nothing that a Place still holds.
        for at in 0..self.placed.len() {
            self.ops = self.ops.saturating_sub(1);
            self.completed += 1;
            self.pinned_ended += 1;
            self.placed_for(cx, self.placed[at].token, self.placed[at].outcome.err());
        }
        self.placed.clear();
        for completion in done.drain(..) {
            self.complete(cx, completion);
        }
        self.settle_writes(cx);
        if self.phase != Phase::Closed {
            if let Some(why) = self.transport.ended() {
                tracing::debug!(peer = %self.peer, %why, "channel ended");
                self.close(cx);
            }
        }
        if self.ops == 0 && self.awaits_wire.is_empty() {
            self.stuck_by = None;
        }
        if self.draining > 0 {
            self.finish_drains(cx);
        }
        busy
    }

    fn complete(&mut self, cx: &mut Cx, completion: Completion) {
        let Completion { token, kind, buffer, outcome, .. } = completion;
        if kind != Kind::Recv {
            self.ops = self.ops.saturating_sub(1);
            self.completed += 1;
        }
        match kind {
            Kind::Recv => {
                self.receives = self.receives.saturating_sub(1);
                match outcome {
                    Ok(length) if self.phase == Phase::Open => self.receive(cx, buffer, length),
                    Err(OperationError::Length) => self.end(cx, Status::Protocol, "a frame is too long"),
                    _ => {}
                }
            }
            Kind::Send => {
                self.send_buffers.push(buffer);
                if token == Token::End.number() && outcome.is_ok() {
                    tracing::trace!(peer = %self.peer, "told why the channel ends");
                }
            }
            Kind::Place => {
                self.give(buffer);
                self.placed_for(cx, token, outcome.err());
            }
            Kind::Fetch => {
                let slot = ((token >> 32) & 0xffff) as u16;
                let piece = (token & 0xffff_ffff) as u32;
                self.fetched(cx, slot, piece, buffer, outcome.is_ok());
                self.check_remote(cx, outcome.err());
            }
        }
    }

    /// A Place has completed.
    fn placed_for(&mut self, cx: &mut Cx, token: u64, error: Option<OperationError>) {
        let name = BindingRef((token & 0xffff_ffff) as u32);
        if let Some(binding) = self.bindings.get_mut(name) {
            binding.transport_ops = binding.transport_ops.saturating_sub(1);
        }
        self.check_remote(cx, error);
    }

    /// A failed Place or Fetch has ended the channel already; the peer's part in it is logged.
    fn check_remote(&mut self, cx: &mut Cx, error: Option<OperationError>) {
        if error == Some(OperationError::RemoteAccess) && self.phase == Phase::Open {
            cx.gauges.refused_total.add(1);
            static LOGGED: Limiter = Limiter::new();
            if let Some(suppressed) = LOGGED.pass() {
                tracing::warn!(peer = %self.peer, suppressed, "channel ended: a region descriptor does not allow the access");
            }
            self.close(cx);
        }
    }

    /// Posts a receive.
    pub(super) fn post_receive(&mut self, cx: &mut Cx, buffer: Buffer) {
        if self.phase == Phase::Open {
            self.submit(cx, Token::Receive, Operation::Recv { buffer });
        }
    }

    /// Submits an operation for which there is room.
    pub(super) fn submit(&mut self, cx: &mut Cx, token: Token, operation: Operation) -> bool {
        let receive = matches!(operation, Operation::Recv { .. });
        let outcome = self.transport.submit(token.number(), operation);
        self.submitted(cx, receive, outcome)
    }

    /// Submits a message with a descriptor, for which there is room.
    pub(super) fn submit_descriptor(
        &mut self,
        cx: &mut Cx,
        token: Token,
        buffer: Buffer,
        length: usize,
        descriptor: OwnedFd,
    ) -> bool {
        let outcome = self.transport.send_descriptor(token.number(), buffer, length, descriptor);
        self.submitted(cx, false, outcome)
    }

    fn submitted(&mut self, cx: &mut Cx, receive: bool, outcome: Result<(), Rejected>) -> bool {
        match outcome {
            Ok(()) => {
                if receive {
                    self.unpolled = true;
                    self.receives += 1;
                } else {
                    self.begun(cx.now, cx.settings.limits.stuck_ms);
                }
                true
            }
            Err(rejected) => {
                match rejected.operation {
                    Operation::Place { buffer, .. } | Operation::Fetch { buffer, .. } => self.give(buffer),
                    Operation::Send { buffer, .. } => self.send_buffers.push(buffer),
                    Operation::Recv { buffer } => drop(buffer),
                }
                if self.transport.ended().is_none() {
                    tracing::error!(peer = %self.peer, error = %rejected.error, "the transport refused an operation");
                }
                self.close(cx);
                false
            }
        }
    }

    /// A Send, Place or Fetch was submitted.
    pub(super) fn begun(&mut self, now: Instant, stuck_ms: u64) {
        self.unpolled = true;
        if self.ops == 0 {
            self.stuck_by = Some(now + Duration::from_millis(stuck_ms));
        }
        self.ops += 1;
    }

    /// True if `n` more operations and a reply fit.
    pub(super) fn room(&self, n: usize) -> bool {
        self.ops + n + RESERVE <= self.depth
    }

    pub(super) fn can_reply(&self) -> bool {
        self.send_buffers.len() >= SPARE
    }

    /// Takes a bulk buffer, if the channel may have one more: never more than there are free for all others.
    pub(super) fn take(&mut self, cx: &Cx) -> Option<Buffer> {
        if self.held >= cx.bulk.available() {
            return None;
        }
        let buffer = cx.bulk.take()?;
        self.held += 1;
        Some(buffer)
    }

    /// Gives a bulk buffer back.
    pub(super) fn give(&mut self, buffer: Buffer) {
        drop(buffer);
        self.held = self.held.saturating_sub(1);
        self.freed = true;
    }

    /// Does some of what there is to do. If it lacks a buffer then, it is [starved](Ready::is_starved).
    pub(crate) fn turn(&mut self, cx: &mut Cx) {
        while let Some(rare) = self.rare.pop_front() {
            if !self.send_rare(cx, &rare) {
                self.rare.push_front(rare);
                self.blocked = true;
                return;
            }
        }
        if self.phase == Phase::Open {
            self.steps(cx);
            self.answer_writes(cx);
        }
    }

    fn steps(&mut self, cx: &mut Cx) {
        let mut bytes = 0;
        for _ in 0..STEPS_PER_TURN {
            let Some(slot) = self.ready.next() else { return };
            match self.step(cx, slot, &mut bytes) {
                Step::Next => {}
                Step::Again => self.ready.again(slot),
                Step::NoRoom => {
                    self.ready.again(slot);
                    self.blocked = true;
                    return;
                }
                Step::NoBuffer => self.ready.hunger(slot),
            }
            if self.phase != Phase::Open || bytes >= BYTES_PER_TURN {
                break;
            }
        }
    }

    pub(crate) fn wants_turn(&self) -> bool {
        !self.blocked
            && match self.phase {
                Phase::Open => self.ready.has_next() || !self.rare.is_empty(),
                Phase::Ending { .. } => !self.rare.is_empty(),
                Phase::Closed => false,
            }
    }

    /// True if something was submitted since the last poll, or the channel was closed.
    pub(crate) fn wants_poll(&self) -> bool {
        self.unpolled
    }

    pub(crate) fn arm(&mut self) -> Armed {
        if self.unpolled { Armed::Pending } else { self.transport.arm() }
    }
}
