//! A worker: the loop that serves its channels.
//!
//! ```text
//!    ┌► letters, storage results ─► poll hot channels ─► turns: each channel with work, round robin ─┐
//!    │                                                                                              │
//!    └──────────────────────────────── something was done ◄─────────────────────────────────────────┤
//!    ▲                                                       nothing for as long as it may spin  ▼
//!    └──── wake-up ◄── epoll_wait, until the earliest deadline ◄── all armed and idle ◄── arm hot channels
//! ```
//!
//! A channel is *hot* from a wake-up, or from something submitted on it, until it armed itself in idleness. Channels
//! that lack a buffer wait in one queue, first come first served; it is looked at whenever something came back. A worker
//! that is never idle glances at `epoll` now and then: else a channel that sleeps would wait until it is.
//!
//! Where looking costs a system call (tcp), what a turn came to goes out before the next channel's: its buffers are in the
//! processor's cache still, and then the next one's. And of many hot channels one that had nothing is let go, to be told of
//! by `epoll`.

use super::ConnKey;
use super::channel::{Conn, Cx};
use super::inbox::{Inbox, Letter};
use super::mapper::Withdrawal;
use super::pinned::PinnedFiles;
use super::registry::HeldBinding;
use super::restrict::Restriction;
use crate::engine::bind::Redemption;
use holdfast_shared::types::Status;
use holdfast_shared::wire::link::Fence;
use holdfast_transport::{Armed, Channel, Completion, Spin};
use rustix::event::{Timespec, epoll};
use slab::Slab;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

const INBOX_EVENT: u64 = u64::MAX;
const RING_EVENT: u64 = u64::MAX - 1;
const EVENTS_MAX: usize = 256;
/// Without waiting.
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// Rounds after which the clock is read again: reading it costs as much as all else in a round that finds nothing, where it
/// is a system call. Deadlines are milliseconds.
const CLOCK_ROUNDS: u32 = 16;
/// Turns, or rounds with work without one, after which channels that sleep are asked for too.
const GLANCE_TURNS: usize = 8;
/// So many hot channels are each looked at in every round, whatever that costs. With more, `epoll` is cheaper: one call
/// tells of all that have something, where looking found nothing nine times in ten (64 clients).
const LOOK_AT_EACH: usize = 4;
/// Idle rounds after which others may run on this processor: what is waited for may need it. (Soft-RoCE does its work in
/// kernel threads, which do not interrupt a program that only computes.)
const YIELD_ROUNDS: u32 = 8;
/// While jobs wait for room in the storage queue nobody wakes the worker for it: it looks again after this.
const STORAGE_RETRY: Duration = Duration::from_millis(1);

/// Whether a worker without work still looks for some.
#[derive(Default)]
enum Looking {
    #[default]
    NotYet,
    /// Since then, for so long.
    Since(Instant, Duration),
    /// It sleeps, having looked since then: how long the whole wait took tells how to go on.
    Asleep(Instant),
    /// Not in this wait.
    InVain,
}

pub(crate) struct Worker {
    cx: Cx,
    inbox: Arc<Inbox>,
    epoll: OwnedFd,
    conns: Slab<Conn>,
    generation: u32,
    /// Channels to poll.
    hot: Vec<usize>,
    /// Since the last look at `epoll`: a hot channel was let go, and so many turns were done.
    has_let_go: bool,
    turns_done: usize,
    /// Channels with work to do, and those that wait for a buffer, in the order they came.
    ready: VecDeque<usize>,
    starved: VecDeque<usize>,
    completions: Vec<Completion>,
    /// No deadline is earlier than this.
    deadline: Option<Instant>,
    stop_by: Option<Instant>,
    /// How long to look for work on channels where looking is cheap.
    spin: Spin,
}

impl Worker {
    pub(crate) fn new(cx: Cx, inbox: Arc<Inbox>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, inbox.fd(), epoll::EventData::new_u64(INBOX_EVENT), flags)?;
        if let Some(ring) = cx.storage.ring_fd() {
            // Level triggered: it is readable until all has been taken, so nothing that is done can be slept over.
            epoll::add(&epoll, ring, epoll::EventData::new_u64(RING_EVENT), epoll::EventFlags::IN)?;
        }
        let room = cx.settings.limits.channels_max.min(4096);
        let spin = Spin::new(Duration::from_micros(cx.settings.engine.spin_us_max));
        Ok(Self {
            cx,
            inbox,
            epoll,
            conns: Slab::with_capacity(room),
            generation: 0,
            hot: Vec::with_capacity(room),
            has_let_go: false,
            turns_done: 0,
            ready: VecDeque::with_capacity(room),
            starved: VecDeque::with_capacity(room),
            completions: Vec::with_capacity(1024),
            deadline: None,
            stop_by: None,
            spin,
        })
    }

    /// Serves until told to stop and all channels have ended.
    pub(crate) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut idle = 0;
        let mut looking = Looking::NotYet;
        // Counted here and told now and then: all workers share that cache line.
        let mut polls = 0;
        loop {
            polls += 1;
            if polls == 64 {
                self.cx.gauges.polls_total.add(std::mem::take(&mut polls));
            }
            if polls % u64::from(CLOCK_ROUNDS) == 0 {
                self.cx.now = Instant::now();
            }
            let mut busy = self.letters();
            busy |= self.storage();
            busy |= self.poll();
            let turns = self.turns();
            busy |= turns > 0;
            self.timers();
            self.cx.storage.begin();
            if self.stop_by.is_some() && self.conns.is_empty() {
                return;
            }
            if busy {
                if let Looking::Since(since, _) | Looking::Asleep(since) = looking {
                    self.cx.now = Instant::now();
                    let took = self.cx.now - since;
                    let looked = matches!(looking, Looking::Since(..));
                    if !(looked && self.spin.has_stalled(took)) {
                        self.spin.ended(took);
                    }
                }
                looking = Looking::NotYet;
                idle = 0;
                self.turns_done += turns.max(1);
                if self.turns_done >= GLANCE_TURNS {
                    // Others have armed, and would wait until there is nothing more to do here: that may be never.
                    self.watch(&mut events, Some(&NOW));
                }
                continue;
            }
            if self.has_let_go {
                // They are as good as hot: looked at before anything else is tried.
                self.watch(&mut events, Some(&NOW));
                continue;
            }
            idle += 1;
            if idle <= self.cx.settings.engine.spin_rounds || self.may_look(idle, &mut looking) {
                if idle % YIELD_ROUNDS == 0 && self.gives_way() {
                    std::thread::yield_now();
                }
                std::hint::spin_loop();
                continue;
            }
            if self.arm() && self.inbox.may_sleep() {
                self.cx.gauges.polls_total.add(std::mem::take(&mut polls));
                if let Looking::Since(since, _) = looking {
                    looking = Looking::Asleep(since);
                }
                self.sleep(&mut events);
                self.inbox.woke();
                idle = 0;
            }
        }
    }

    /// True if others may have to run on this processor for there to be work.
    fn gives_way(&self) -> bool {
        self.hot.is_empty()
            || self.hot.iter().any(|index| self.conns.get(*index).is_some_and(Conn::gives_way))
    }

    /// True as long as looking for work is worth more than sleeping.
    fn may_look(&mut self, round: u32, looking: &mut Looking) -> bool {
        match looking {
            Looking::Since(since, budget) => {
                if round % CLOCK_ROUNDS != 0 {
                    return true;
                }
                let took = since.elapsed();
                let over = took >= *budget;
                if over && self.spin.has_stalled(took) {
                    *looking = Looking::InVain;
                }
                !over
            }
            Looking::Asleep(_) | Looking::InVain => false,
            Looking::NotYet => {
                let conns = &self.conns;
                let cheap = |index: &usize| conns.get(*index).is_some_and(Conn::polls_cheaply);
                let budget = self.hot.iter().any(cheap).then(|| self.spin.begin()).flatten();
                *looking = budget.map_or(Looking::InVain, |budget| Looking::Since(Instant::now(), budget));
                budget.is_some()
            }
        }
    }

    fn letters(&mut self) -> bool {
        let mut busy = false;
        while let Some(letter) = self.inbox.letter() {
            if !busy {
                // The deadlines that letters set are exact.
                self.cx.now = Instant::now();
            }
            busy = true;
            match letter {
                Letter::Channel { channel, id } => self.adopt(channel, id),
                Letter::Evict { id } => self.evict(id),
                Letter::Redeemed(redemption) => self.redeemed(redemption),
                Letter::Fence(fence) => self.fence(fence),
                Letter::Restrict(restriction) => self.restrict(&restriction),
                Letter::Exposed(done) => self.with_conn(done.conn, |conn, cx| conn.exposed(cx, *done)),
                Letter::Withdrawn(done) => self.with_conn(done.conn, |conn, cx| conn.withdrawn(cx, done)),
                Letter::Unmapped(bytes) => {
                    if let Some(views) = &mut self.cx.views {
                        views.unmapped(bytes);
                    }
                }
                Letter::Withdraw(withdrawal) => self.withdraw_file(withdrawal),
                Letter::Pinned(done) => self.pinned(|pinned, now| pinned.pinned(*done, now)),
                Letter::Unpinned(bytes) => self.pinned(|pinned, _| pinned.unpinned(bytes)),
                Letter::Snapshot(to) => self.snapshot(&to),
                Letter::Stop => self.stop(),
            }
        }
        busy
    }

    fn pinned(&mut self, act: impl FnOnce(&mut PinnedFiles, Instant)) {
        let now = self.cx.now;
        if let Some(pinned) = &mut self.cx.pinned {
            act(pinned, now);
        }
    }

    fn indexes(&self) -> Vec<usize> {
        self.conns.iter().map(|(index, _)| index).collect()
    }

    fn evict(&mut self, id: u64) {
        let found = self.conns.iter().find_map(|(index, conn)| (conn.door == id).then_some(index));
        if let Some(index) = found {
            self.with(index, Conn::evict);
        }
    }

    fn adopt(&mut self, channel: Box<dyn Channel>, id: u64) {
        self.generation = self.generation.wrapping_add(1);
        let entry = self.conns.vacant_entry();
        let index = entry.key();
        let key = ConnKey { index: u32::try_from(index).unwrap_or(u32::MAX), generation: self.generation };
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        let added =
            epoll::add(&self.epoll, channel.wake_fd(), epoll::EventData::new_u64(index as u64), flags);
        entry.insert(Conn::new(&mut self.cx, key, channel, id));
        let stopping = self.stop_by.is_some();
        self.with(index, |conn, cx| {
            if let Err(error) = added {
                tracing::error!(%error, "a channel's wake descriptor cannot be watched");
                conn.abort(cx, "its wake descriptor cannot be watched");
            } else if stopping {
                conn.end(cx, Status::Unavailable, "the server stops");
            }
        });
    }

    fn redeemed(&mut self, redemption: Redemption) {
        let ConnKey { index, generation } = redemption.ticket.conn;
        let index = index as usize;
        match self.conns.get(index) {
            Some(conn) if conn.key.generation == generation => {
                self.with(index, |conn, cx| conn.redeemed(cx, redemption));
            }
            _ => redemption.abandon(&self.cx),
        }
    }

    fn fence(&mut self, fence: Fence) {
        let found =
            self.conns.iter().find_map(|(index, conn)| conn.has_binding(fence.binding).then_some(index));
        match found {
            Some(index) => self.with(index, |conn, cx| conn.fence(cx, fence)),
            // It ended by itself meanwhile.
            None => self.cx.port.fenced(fence),
        }
    }

    fn restrict(&mut self, restriction: &Arc<Restriction>) {
        for index in self.indexes() {
            if self.conns.get(index).is_some_and(|conn| conn.has_open(restriction.open())) {
                self.with(index, |conn, cx| conn.restrict(cx, restriction));
            }
        }
        restriction.done();
    }

    fn withdraw_file(&mut self, withdrawal: Arc<Withdrawal>) {
        for index in self.indexes() {
            self.with(index, |conn, cx| conn.withdraw_file(cx, withdrawal.file));
        }
        if let Some(maps) = &self.cx.maps {
            maps.behind_all(withdrawal);
        }
    }

    /// Tells which bindings there are. Nobody waits for rules of an earlier control any more: the one that is told asks
    /// for its own.
    fn snapshot(&mut self, to: &Sender<Vec<HeldBinding>>) {
        let mut all = Vec::new();
        for (_, conn) in &mut self.conns {
            conn.forget_restrictions(&self.cx);
            conn.held_bindings(&mut all);
        }
        // Who asked may have given up.
        let _ = to.send(all);
    }

    fn stop(&mut self) {
        let linger = Duration::from_millis(self.cx.settings.limits.linger_ms);
        self.stop_by = Some(self.cx.now + 2 * linger);
        self.note_deadline(self.stop_by);
        for index in self.indexes() {
            self.with(index, |conn, cx| conn.end(cx, Status::Unavailable, "the server stops"));
        }
    }

    fn storage(&mut self) -> bool {
        let mut busy = false;
        while let Some(done) = self.inbox.done().or_else(|| self.cx.storage.done()) {
            busy = true;
            let ConnKey { index, generation } = done.tag.conn;
            let index = index as usize;
            if self.conns.get(index).is_some_and(|conn| conn.key.generation == generation) {
                self.with(index, |conn, cx| conn.storage_done(cx, done));
            } else {
                tracing::error!("a storage result for a channel that is gone");
            }
        }
        // Other workers fill the queue too: what found it full can't wait for an answer of its own.
        if self.cx.storage.is_waiting() {
            self.cx.storage.push();
        }
        busy
    }

    fn poll(&mut self) -> bool {
        let mut busy = false;
        let many = self.hot.len() > LOOK_AT_EACH;
        let mut at = 0;
        while at < self.hot.len() {
            let index = self.hot[at];
            let came = self.poll_one(index);
            busy |= came;
            if !(many && !came && self.let_go(at, index)) {
                at += 1;
            }
        }
        if self.cx.pinned.as_ref().is_some_and(PinnedFiles::wants_sweep) {
            self.pinned(|pinned, _| pinned.sweep());
        }
        busy
    }

    fn poll_one(&mut self, index: usize) -> bool {
        let mut busy = false;
        let mut completions = std::mem::take(&mut self.completions);
        self.with(index, |conn, cx| busy = conn.poll(cx, &mut completions));
        completions.clear();
        self.completions = completions;
        busy
    }

    /// Lets a hot channel sleep that had nothing, if it costs a system call to look at. False if it stays.
    fn let_go(&mut self, at: usize, index: usize) -> bool {
        let Some(conn) = self.conns.get_mut(index) else { return false };
        // Not if another has taken its place in the list: it has ended.
        let is_idle = self.hot.get(at) == Some(&index) && !conn.polls_cheaply() && conn.arm() == Armed::Idle;
        if is_idle {
            conn.hot = false;
            self.hot.swap_remove(at);
            self.has_let_go = true;
        }
        is_idle
    }

    /// A turn for each channel that has work. Returns how many.
    fn turns(&mut self) -> usize {
        let mut turns = 0;
        // One alone loses nothing by going on first.
        let several = self.ready.len() > 1;
        for _ in 0..self.ready.len() {
            let Some(index) = self.ready.pop_front() else { break };
            let Some(conn) = self.conns.get_mut(index) else { continue };
            conn.listed = false;
            turns += 1;
            // One that starved before keeps its place in the queue.
            let starved = conn.ready.is_starved();
            conn.turn(&mut self.cx);
            if conn.ready.is_starved() && !starved {
                self.starved.push_back(index);
            }
            self.settle(index);
            // A peer with which looking is cheap is awake, and better given all at once.
            if several && self.conns.get(index).is_some_and(|conn| conn.wants_poll() && !conn.polls_cheaply())
            {
                self.poll_one(index);
            }
        }
        turns
    }

    /// Lets channels that lacked a buffer try again, in their order.
    fn feed(&mut self) {
        while let Some(index) = self.starved.pop_front() {
            if let Some(conn) = self.conns.get_mut(index) {
                conn.ready.feed();
                if conn.wants_turn() && !conn.listed {
                    conn.listed = true;
                    self.ready.push_back(index);
                }
            }
        }
    }

    /// Does something with a channel, then puts it into the lists it belongs to now.
    fn with(&mut self, index: usize, act: impl FnOnce(&mut Conn, &mut Cx)) {
        if let Some(conn) = self.conns.get_mut(index) {
            act(conn, &mut self.cx);
            self.settle(index);
        }
    }

    /// As `with`, if the channel is still the one that is meant.
    fn with_conn(&mut self, key: ConnKey, act: impl FnOnce(&mut Conn, &mut Cx)) {
        let index = key.index as usize;
        if self.conns.get(index).is_some_and(|conn| conn.key.generation == key.generation) {
            self.with(index, act);
        }
    }

    fn settle(&mut self, index: usize) {
        let Some(conn) = self.conns.get_mut(index) else { return };
        conn.finish_restrictions(&self.cx);
        if conn.is_finished() {
            self.remove(index);
            return;
        }
        if conn.wants_poll() && !conn.hot {
            conn.hot = true;
            self.hot.push(index);
        }
        if conn.wants_turn() && !conn.listed {
            conn.listed = true;
            self.ready.push_back(index);
        }
        let deadline = conn.deadline();
        let freed = std::mem::take(&mut conn.freed);
        self.note_deadline(deadline);
        if freed && !self.starved.is_empty() {
            self.feed();
        }
    }

    fn remove(&mut self, index: usize) {
        let conn = self.conns.remove(index);
        let _ = epoll::delete(&self.epoll, conn.wake_fd());
        self.hot.retain(|other| *other != index);
        self.ready.retain(|other| *other != index);
        self.starved.retain(|other| *other != index);
        conn.release(&mut self.cx);
        self.feed();
    }

    fn note_deadline(&mut self, deadline: Option<Instant>) {
        if let Some(new) = deadline {
            self.deadline = Some(self.deadline.map_or(new, |old| old.min(new)));
        }
    }

    fn timers(&mut self) {
        if self.deadline.is_none_or(|at| at > self.cx.now) {
            return;
        }
        self.deadline = None;
        for index in self.indexes() {
            self.with(index, |conn, cx| conn.on_deadline(cx));
        }
        match self.stop_by {
            Some(by) if by <= self.cx.now => {
                for index in self.indexes() {
                    self.with(index, |conn, cx| conn.abort(cx, "the server stops"));
                }
            }
            other => self.note_deadline(other),
        }
    }

    /// Arms all hot channels. False if one has something to do.
    fn arm(&mut self) -> bool {
        let mut idle = true;
        let conns = &mut self.conns;
        self.hot.retain(|index| {
            let Some(conn) = conns.get_mut(*index) else { return false };
            conn.hot = conn.arm() == Armed::Pending;
            idle &= !conn.hot;
            conn.hot
        });
        idle
    }

    fn sleep(&mut self, events: &mut Vec<epoll::Event>) {
        let retry = self.cx.storage.is_waiting().then(|| Instant::now() + STORAGE_RETRY);
        let timeout = [self.deadline, retry].into_iter().flatten().min().map(|at| {
            let wait = at.saturating_duration_since(Instant::now());
            // Rounded up: waking a moment early would only mean another round.
            let wait = wait + Duration::from_micros(1);
            Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            }
        });
        self.watch(events, timeout.as_ref());
        self.cx.gauges.wakeups_total.add(1);
    }

    /// Waits for events, at most for so long, and puts the channels that have some among the hot ones.
    fn watch(&mut self, events: &mut Vec<epoll::Event>, timeout: Option<&Timespec>) {
        (self.has_let_go, self.turns_done) = (false, 0);
        events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // The descriptors are ours and valid: this cannot go on, and silence would be worse.
            Err(error) => crate::fault::fatal("a worker cannot wait for events", &error),
        }
        // Who may go on is given time from now, not from when the worker fell asleep.
        self.cx.now = Instant::now();
        for event in events.iter() {
            let data = event.data.u64();
            if data == INBOX_EVENT {
                self.inbox.clear();
            } else if data == RING_EVENT {
                // What is done is looked for in every round.
            } else if let Some(conn) = usize::try_from(data).ok().and_then(|index| self.conns.get_mut(index))
            {
                let flags = event.flags;
                if flags.contains(epoll::EventFlags::OUT) {
                    conn.wire_takes_more(&self.cx);
                }
                if !conn.hot {
                    conn.hot = true;
                    self.hot.push(conn.key.index as usize);
                }
            }
        }
    }
}
