//! What the I/O of an open may not touch, because others have locked it.
//!
//! ```text
//!   Restrict ─► every worker with bindings of the open: their rules are replaced ─► what comes now is checked against them
//!                  │
//!                  ├─ mappings that they forbid: withdrawn                                    │
//!                  └─ reads and writes taken before: waited for, channel by channel ─► all have ended ─► Restricted
//!                         nothing moves for `fence_ms`, or not done after `stuck_ms`: the channel is cut off
//! ```
//!
//! Only what hangs on the peer is cut off; storage is waited for. A read counts as ended when its reply is submitted: its
//! last bytes may still be on their way to the client's region, but they were read before. Not so one that is placed straight from the
//! file's pages: the device reads them later, and so the Place is waited for.

use super::ControlPort;
use super::channel::{Conn, Cx, Phase};
use super::registry::HeldBinding;
use super::request::Request;
use holdfast_shared::types::{Access, ByteRange, IoRule, OpenId, io_conflict};
use holdfast_shared::wire::link::Restricted;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// The rules of an open, and their version. Shared by all who hold them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) version: u64,
    rules: Arc<[IoRule]>,
}

impl Rules {
    /// `rules` are sorted and disjoint.
    pub(crate) fn new(version: u64, rules: &[IoRule]) -> Self {
        Self { version, rules: rules.into() }
    }

    /// True if they forbid this access to a byte of the range.
    pub(crate) fn refuse(&self, range: ByteRange, access: Access) -> bool {
        io_conflict(&self.rules, range, access)
    }

    /// True if they forbid this access to any byte there is.
    pub(crate) fn refuse_some(&self, access: Access) -> bool {
        self.rules.iter().any(|rule| !rule.deny.intersection(access).is_empty())
    }
}

/// One `Restrict` on its way through the workers; the last to be done answers it.
pub(crate) struct Restriction {
    told: Restricted,
    rules: Rules,
    /// Workers that have not installed it, and channels that wait.
    left: AtomicUsize,
    port: Arc<dyn ControlPort>,
}

impl Restriction {
    /// Control is told of `version`, whatever version the rules have.
    pub(crate) fn new(
        open: OpenId,
        version: u64,
        rules: Rules,
        workers: usize,
        port: Arc<dyn ControlPort>,
    ) -> Self {
        Self { told: Restricted { open, version }, rules, left: AtomicUsize::new(workers), port }
    }

    pub(crate) fn open(&self) -> OpenId {
        self.told.open
    }

    /// A worker has told all of its channels, or a channel waits no more.
    pub(crate) fn done(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.port.restricted(self.told);
        }
    }
}

/// A restriction that a channel's requests hold up.
pub(crate) struct Restricting {
    restriction: Arc<Restriction>,
    /// Requests admitted before this one are waited for.
    before: u64,
    /// And this many Places from files.
    pinned: u64,
    progress: Progress,
    /// When the peer is cut off: if nothing moved, and in any case.
    by: Instant,
    latest: Instant,
}

/// How far the requests waited for are: whatever of this changes, something moved.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    requests: usize,
    begun: u64,
    fetches: u64,
    storage: u64,
    pinned: u64,
    /// What the channel as a whole completed: for those that wait for room only.
    completed: u64,
}

impl Conn {
    /// True if a binding of the open is here.
    pub(crate) fn has_open(&self, open: OpenId) -> bool {
        self.bindings.iter().any(|b| b.open == open && !b.is_gone())
    }

    /// New rules for an open's bindings. They hold from now on; what began before is waited for.
    pub(crate) fn restrict(&mut self, cx: &mut Cx, restriction: &Arc<Restriction>) {
        for slot in 0..=u8::MAX {
            let Some(binding) = self.bindings.at_mut(slot) else { break };
            if binding.open == restriction.open() && !binding.is_gone() {
                binding.rules = restriction.rules.clone();
            }
        }
        self.withdraw_restricted(cx, restriction.open());
        // Those that these rules wait for need not wait for the wire: they go through buffers now.
        self.resume_awaiting();
        let before = self.admitted;
        let pinned = self.pinned_begun;
        let progress = self.restrict_progress(restriction.open(), before, pinned);
        if progress.requests > 0 {
            restriction.left.fetch_add(1, Ordering::AcqRel);
            cx.gauges.restricts_pending.add(1);
            self.restricting.push(Restricting {
                restriction: Arc::clone(restriction),
                before,
                pinned,
                progress,
                by: cx.after(cx.settings.limits.fence_ms),
                latest: cx.after(cx.settings.limits.stuck_ms.max(cx.settings.limits.fence_ms)),
            });
        }
    }

    /// The reads and writes of an open that were taken before and have not ended.
    fn restricted_requests(&self, open: OpenId, before: u64) -> impl Iterator<Item = &Request> {
        let serving = self.phase == Phase::Open;
        self.requests.iter().flatten().filter(move |request| {
            request.order < before
                && request.ask.is_restricted()
                && request.binding.and_then(|name| self.bindings.get(name)).is_some_and(|b| b.open == open)
                // At a channel's end nothing more begins: what is under way is all there is.
                && (request.in_progress() || (serving && request.answer.is_none()))
        })
    }

    /// Places from files that are under way, of the first so many; whosever they are.
    fn pinned_left(&self, until: u64) -> u64 {
        // At the end, those that were never posted come back before those that were.
        let until = if self.phase == Phase::Open { until } else { self.pinned_begun };
        until.saturating_sub(self.pinned_ended)
    }

    fn restrict_progress(&self, open: OpenId, before: u64, pinned: u64) -> Progress {
        let mut progress = Progress::default();
        for request in self.restricted_requests(open, before) {
            progress.requests += 1;
            progress.begun += u64::from(request.next);
            progress.fetches += u64::from(request.fetches);
            progress.storage += u64::from(request.storage);
        }
        let withdrawing = self.withdrawing(open);
        progress.requests += withdrawing;
        progress.storage += withdrawing as u64;
        progress.pinned = self.pinned_left(pinned);
        progress.requests += usize::try_from(progress.pinned).unwrap_or(usize::MAX);
        if progress.fetches == 0 {
            progress.completed = self.completed;
        }
        progress
    }

    /// Answers the restrictions that need wait no more. Cheap while there are none.
    pub(crate) fn finish_restrictions(&mut self, cx: &Cx) {
        let mut at = 0;
        while let Some(waiting) = self.restricting.get(at) {
            let progress = self.restrict_progress(waiting.restriction.open(), waiting.before, waiting.pinned);
            if progress.requests == 0 {
                self.restricting.swap_remove(at).restriction.done();
                cx.gauges.restricts_pending.sub(1);
                continue;
            }
            if let Some(waiting) = self.restricting.get_mut(at).filter(|w| w.progress != progress) {
                waiting.progress = progress;
                waiting.by = cx.after(cx.settings.limits.fence_ms);
            }
            at += 1;
        }
    }

    /// When the peer is cut off for holding up a restriction.
    pub(super) fn restrict_deadline(&self) -> Option<Instant> {
        if self.restricting.is_empty() || self.phase == Phase::Closed {
            return None;
        }
        let hangs_on_peer = |request: &Request| request.fetches > 0 || (request.storage == 0 && self.ops > 0);
        self.restricting
            .iter()
            .filter(|w| {
                self.pinned_left(w.pinned) > 0
                    || self.restricted_requests(w.restriction.open(), w.before).any(hangs_on_peer)
            })
            .map(|w| w.by.min(w.latest))
            .min()
    }

    /// Nobody waits for these restrictions any more; their rules stay.
    pub(crate) fn forget_restrictions(&mut self, cx: &Cx) {
        cx.gauges.restricts_pending.sub(self.restricting.len() as u64);
        self.restricting.clear();
    }

    /// Adds what a control that comes after another is told of this channel.
    pub(crate) fn held_bindings(&self, all: &mut Vec<HeldBinding>) {
        let cut = self.phase != Phase::Open;
        for binding in self.bindings.iter().filter(|binding| !binding.is_gone()) {
            if let Some(file) = &binding.file {
                all.push(HeldBinding { held: binding.held(cut), file: Arc::clone(file) });
            }
        }
    }
}
