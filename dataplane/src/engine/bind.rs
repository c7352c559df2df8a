//! The bind handshake, carried unread between client and control.
//!
//! ```text
//!  client            dataplane              control
//!    │ ◄── Hello{nonce} │                      │
//!    │ Bind ───────────►│ Redeem{nonce, what   │
//!    │                  │  it sees itself} ───►│
//!    │                  │ ◄── Redeemed + fd    │
//!    │ ◄── BindReply    │                      │
//! ```
//!
//! Each attempt uses its nonce up; the reply carries the next. One bind at a time on a channel.

use super::Ticket;
use super::binding::Binding;
use super::channel::{Conn, Cx, Phase};
use super::reply::{BindAnswered, Rare};
use holdfast_shared::auth::{FrameKey, MacPolicy};
use holdfast_shared::types::{Access, RESUME_KEY_BYTES_MAX, Status};
use holdfast_shared::wire::data::Bind;
use holdfast_shared::wire::link::{Grant, Redeem, RedeemResult};
use std::os::fd::OwnedFd;

/// Control's answer to a bind.
#[derive(Debug)]
pub struct Redemption {
    /// Where it goes.
    pub ticket: Ticket,
    /// What control said.
    pub result: RedeemResult,
    /// The descriptor that came with it.
    pub fd: Option<OwnedFd>,
    /// And another description of the file, for direct I/O.
    pub direct: Option<OwnedFd>,
}

impl Redemption {
    pub(crate) fn granted(&self) -> Option<&Grant> {
        match &self.result {
            RedeemResult::Granted(grant) => Some(grant),
            RedeemResult::Refused(_) => None,
        }
    }

    /// The channel is gone: the descriptor is closed, and control is told.
    pub(crate) fn abandon(self, cx: &Cx) {
        let granted = self.granted().map(|grant| grant.binding);
        drop(self.fd);
        if let Some(binding) = granted {
            cx.registry.remove(binding, 0, None);
            cx.port.released(binding);
        }
    }
}

/// A bind that is with control.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingBind {
    request: u32,
}

impl Conn {
    /// A fresh nonce for the next bind.
    pub(super) fn fresh_nonce(&mut self, cx: &mut Cx) {
        if aws_lc_rs::rand::fill(&mut self.nonce).is_err() {
            // Without randomness no bind can be safe.
            self.abort(cx, "no randomness");
        }
    }

    /// Takes a bind request to control.
    pub(super) fn start_bind(&mut self, cx: &mut Cx, request: u32, body: &Bind, resume_key: &[u8]) {
        let (Some(access), Some(policy)) =
            (Access::from_bits(body.access), MacPolicy::from_number(body.policy))
        else {
            return self.refuse_bind(cx, request, Status::Invalid);
        };
        if resume_key.is_empty() || resume_key.len() > RESUME_KEY_BYTES_MAX {
            return self.refuse_bind(cx, request, Status::BadKey);
        }
        if self.bindings.live() >= usize::from(cx.settings.limits.bindings_max) {
            return self.refuse_bind(cx, request, Status::TooMany);
        }
        let redeem = Redeem {
            id: 0,
            resume_key: resume_key.to_vec(),
            client_challenge: body.challenge,
            server_nonce: self.nonce,
            proof: body.proof,
            channel: self.transport.identity().clone(),
            access,
            policy,
            peer: self.peer.to_string(),
        };
        match cx.port.redeem(Ticket { worker: cx.worker, conn: self.key }, redeem) {
            Ok(()) => self.bind = Some(PendingBind { request }),
            Err(status) => self.refuse_bind(cx, request, status),
        }
    }

    /// Control has answered.
    pub(crate) fn redeemed(&mut self, cx: &mut Cx, redemption: Redemption) {
        let pending = self.bind.take();
        let (Some(pending), Phase::Open) = (pending, self.phase) else {
            return redemption.abandon(cx);
        };
        match redemption {
            Redemption { result: RedeemResult::Granted(grant), fd: Some(fd), direct, .. } => {
                self.granted(cx, pending.request, &grant, fd, direct);
            }
            Redemption { result: RedeemResult::Refused(status), .. } => {
                self.refuse_bind(cx, pending.request, status);
            }
            redemption => {
                // The kernel drops a descriptor for which the process has no room.
                redemption.abandon(cx);
                self.refuse_bind(cx, pending.request, Status::TooMany);
            }
        }
    }

    fn granted(&mut self, cx: &mut Cx, request: u32, grant: &Grant, fd: OwnedFd, direct: Option<OwnedFd>) {
        let max = usize::from(cx.settings.limits.bindings_max);
        let (requests, rare) = (&self.requests, &self.rare);
        let vacancy = self.bindings.vacancy(max, |name| {
            requests.iter().flatten().any(|request| request.binding == Some(name))
                || rare.iter().any(|rare| matches!(rare, Rare::Notice { binding, .. } if *binding == name))
        });
        let Some(name) = vacancy else {
            drop(fd);
            cx.registry.remove(grant.binding, 0, None);
            cx.port.released(grant.binding);
            return self.refuse_bind(cx, request, Status::TooMany);
        };
        let latch = cx.latches.of(grant.open);
        // A `Restrict` may have overtaken the grant.
        let rules = cx.registry.rules(grant);
        self.bindings.put(Binding::new(name, grant, (cx.opener)(fd, direct), latch, rules));
        cx.gauges.bindings.add(1);
        if !self.ever_bound {
            self.ever_bound = true;
            self.transport.bound(true);
            cx.gauges.half_open_channels.sub(1);
            cx.door.leave(self.door);
            let credits = self.grow_buffers(cx, cx.settings.engine.credits.max(self.credits));
            self.grow_slots(credits);
            self.credits = credits;
        }
        self.bind_by = None;
        self.failed_binds = 0;
        self.fresh_nonce(cx);
        tracing::debug!(peer = %self.peer, open = %grant.open, number = name.0, access = ?grant.access, "bound");
        let answer = BindAnswered::Granted {
            number: name.0,
            handle: grant.handle,
            epoch: grant.epoch,
            access: grant.access,
            policy: grant.policy.number(),
            proof: grant.proof,
            key: FrameKey::new(&grant.keys.to_client, grant.policy),
        };
        self.rare.push_back(Rare::BindReply { request, answer });
    }

    fn refuse_bind(&mut self, cx: &mut Cx, request: u32, status: Status) {
        self.fresh_nonce(cx);
        self.rare.push_back(Rare::BindReply { request, answer: BindAnswered::Refused(status) });
        tracing::debug!(peer = %self.peer, ?status, "bind refused");
        // Control being away is nobody's attempt at a key.
        if status != Status::Unavailable {
            cx.gauges.refused_total.add(1);
            self.count_failure(cx);
        }
    }

    /// Counts an attempt without right; too many end the channel, after what is to be said has been said.
    pub(super) fn count_failure(&mut self, cx: &mut Cx) {
        self.failed_binds += 1;
        if self.failed_binds >= cx.settings.limits.failed_binds_max {
            while let Some(rare) = self.rare.pop_front() {
                if !self.send_rare(cx, &rare) {
                    break;
                }
            }
            self.end(cx, Status::TooMany, "too many failed binds");
        }
    }
}
