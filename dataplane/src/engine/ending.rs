//! The end of a channel: why, when, and what is left to do.
//!
//! A peer that breaks a rule is told so once (Notice on binding 0), gets a moment to read it, and is cut off. A peer that
//! is gone, stuck, or holds up a fence is cut off at once. Either way the channel is released only when every
//! operation, receive and storage job came back.

use super::channel::{Conn, Cx, Phase};
use super::reply::Rare;
use crate::limiter::Limiter;
use holdfast_shared::types::Status;
use std::time::Instant;

static LOGGED: Limiter = Limiter::new();

impl Conn {
    /// Ends the channel for a reason the peer is told, once.
    pub(crate) fn end(&mut self, cx: &mut Cx, reason: Status, why: &'static str) {
        if self.phase != Phase::Open {
            return;
        }
        if reason == Status::Unavailable {
            tracing::debug!(peer = %self.peer, why, "channel ends");
        } else {
            cx.gauges.refused_total.add(1);
            if !self.ever_bound {
                // Strangers may come as often as they like: they are counted.
                tracing::debug!(peer = %self.peer, status = ?reason, why, "channel ends");
            } else if let Some(suppressed) = LOGGED.pass() {
                tracing::warn!(peer = %self.peer, status = ?reason, why, suppressed, "channel ends");
            }
        }
        self.phase = Phase::Ending { by: cx.after(cx.settings.limits.linger_ms) };
        self.bind_by = None;
        // What is about bindings may still be said; binds are not answered any more.
        self.rare.retain(|rare| matches!(rare, Rare::Hello | Rare::Notice { .. }));
        self.rare.push_back(Rare::End(reason));
        self.cancel_requests(cx);
    }

    /// Ends the channel without a word.
    pub(crate) fn abort(&mut self, cx: &mut Cx, why: &'static str) {
        if self.phase != Phase::Closed {
            cx.gauges.refused_total.add(1);
            if !self.ever_bound {
                tracing::debug!(peer = %self.peer, why, "channel cut off");
            } else if let Some(suppressed) = LOGGED.pass() {
                tracing::warn!(peer = %self.peer, why, suppressed, "channel cut off");
            }
            self.close(cx);
        }
    }

    /// Another peer needs its place, and it has not been bound.
    pub(crate) fn evict(&mut self, cx: &mut Cx) {
        if !self.ever_bound {
            self.abort(cx, "its place is needed");
        }
    }

    /// Cuts the peer and the device off from every buffer.
    pub(super) fn close(&mut self, cx: &mut Cx) {
        if self.phase == Phase::Closed {
            return;
        }
        self.phase = Phase::Closed;
        self.transport.close();
        self.unpolled = true;
        self.bind_by = None;
        self.rare.clear();
        self.cancel_requests(cx);
        self.withdraw_every(cx);
    }

    /// The earliest moment at which [`Conn::on_deadline`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let ending = match self.phase {
            Phase::Open => self.bind_by,
            Phase::Ending { by } => Some(by),
            Phase::Closed => None,
        };
        let stuck = if self.phase == Phase::Closed { None } else { self.stuck_by };
        // Once closed nothing is left to be done about a drain: its operations come back flushed.
        let drains = self.draining > 0 && self.phase != Phase::Closed;
        let drain = if drains { self.drain_deadline() } else { None };
        [ending, stuck, drain, self.restrict_deadline()].into_iter().flatten().min()
    }

    pub(crate) fn on_deadline(&mut self, cx: &mut Cx) {
        let over = |at: Option<Instant>| at.is_some_and(|at| at <= cx.now);
        match self.phase {
            Phase::Ending { by } if by <= cx.now => self.close(cx),
            Phase::Closed => {}
            _ if over(self.stuck_by) && (self.ops > 0 || !self.awaits_wire.is_empty()) => {
                self.abort(cx, "the peer makes no progress")
            }
            _ if over(self.drain_deadline()) => self.abort(cx, "operations of a fenced binding do not end"),
            _ if over(self.restrict_deadline()) => {
                self.abort(cx, "requests begun before a restriction do not end");
            }
            Phase::Open if over(self.bind_by) && self.bind.is_none() => {
                self.end(cx, Status::TimedOut, "no bind in time");
            }
            // A bind is with control: its answer decides.
            Phase::Open if over(self.bind_by) => {
                self.bind_by = Some(cx.after(cx.settings.limits.bind_deadline_ms));
            }
            _ => {}
        }
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.phase == Phase::Closed
            && !self.unpolled
            && self.ops == 0
            && self.receives == 0
            && self.storage_ops == 0
    }

    /// The end: descriptors are closed, control is told of each binding.
    pub(crate) fn release(mut self, cx: &mut Cx) {
        self.release_bindings(cx);
        let in_flight = self.requests.iter().filter(|request| request.is_some()).count();
        cx.gauges.requests_in_flight.sub(in_flight as u64);
        if !self.ever_bound {
            cx.gauges.half_open_channels.sub(1);
            cx.door.leave(self.door);
        }
        cx.gauges.channels.sub(1);
    }
}
