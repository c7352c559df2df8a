//! Draining a binding: for a fence or an unbind.
//!
//! ```text
//!  Active ──► Draining: requests are answered at once (Fenced, Closed), nothing new begins
//!                │  no Place or Fetch in flight, no storage job,         overdue: the channel is cut off from the device,
//!                ▼  every mapping withdrawn                              its operations come back flushed
//!              descriptor closed ─► Notice or Reply to the client, Fenced or Released to control ─► Gone
//! ```

use super::binding::{Binding, BindingRef, Drain, State};
use super::channel::{Conn, Cx, Phase};
use super::reply::Rare;
use holdfast_shared::types::Status;
use holdfast_shared::wire::link::{Fence, LinkBinding};
use std::time::Instant;

impl Conn {
    /// True if control knows this binding here.
    pub(crate) fn has_binding(&self, link: LinkBinding) -> bool {
        self.bindings.iter().any(|b| b.link == link && !b.is_gone())
    }

    /// Control wants a binding fenced.
    pub(crate) fn fence(&mut self, cx: &mut Cx, fence: Fence) {
        let found = self.bindings.iter().find(|b| b.link == fence.binding && !b.is_gone());
        match found {
            Some(binding) if binding.epoch == fence.epoch => {
                let name = binding.name();
                self.drain(cx, name, Drain::Fence(fence))
            }
            Some(binding) => {
                tracing::warn!(
                    asked = fence.epoch,
                    has = binding.epoch,
                    "a fence of another epoch is ignored"
                );
            }
            None => cx.port.fenced(fence),
        }
    }

    /// Begins to drain a binding. What is draining already takes the new reason, so that a fence is always confirmed.
    pub(super) fn drain(&mut self, cx: &mut Cx, name: BindingRef, drain: Drain) {
        let by = cx.after(cx.settings.limits.fence_ms);
        let Some(binding) = self.bindings.get_mut(name) else { return };
        match binding.state {
            State::Gone(_) => return,
            State::Draining { drain: ref mut old, .. } => {
                if let Drain::Unbind { request } = *old {
                    // The client wished the same: its unbind is answered now, the drain goes on for control.
                    *old = drain;
                    self.answer_unbind(cx, request);
                } else {
                    *old = drain;
                }
            }
            State::Active => {
                binding.state = State::Draining { drain, by };
                self.draining += 1;
                self.withdraw_of(cx, name);
                self.resume_awaiting();
                // Those of its requests that wait for a buffer need none to be answered.
                let requests = &self.requests;
                self.ready.revive(|slot| {
                    let request = requests.get(usize::from(slot)).and_then(Option::as_ref);
                    request.is_none_or(|request| request.binding == Some(name))
                });
            }
        }
        self.finish_drains(cx);
    }

    /// The earliest deadline of a drain.
    pub(super) fn drain_deadline(&self) -> Option<Instant> {
        let by = |binding: &Binding| match binding.state {
            // Storage can't be cut off, and will answer; only the transport is bounded.
            State::Draining { by, .. } if binding.transport_ops > 0 => Some(by),
            _ => None,
        };
        self.bindings.iter().filter_map(by).min()
    }

    /// Completes the drains of bindings of which nothing is under way any more.
    pub(super) fn finish_drains(&mut self, cx: &mut Cx) {
        self.settle_writes(cx);
        for slot in 0..=u8::MAX {
            let Some(binding) = self.bindings.at_mut(slot) else { break };
            let State::Draining { drain, .. } = binding.state else { continue };
            if !binding.is_idle() {
                continue;
            }
            let (name, link, wrote) = (binding.name(), binding.link, binding.last_write_ns);
            binding.let_file_go(self.key, cx);
            binding.state = State::Gone(drain.status());
            tracing::debug!(peer = %self.peer, open = %binding.open, ?drain, "unbound");
            self.draining -= 1;
            let open = self.phase == Phase::Open;
            match drain {
                Drain::Fence(Fence { reason, .. }) if open => {
                    self.rare.push_back(Rare::Notice { binding: name, reason })
                }
                Drain::Unbind { request } => self.answer_unbind(cx, request),
                Drain::Fence(_) => {}
            }
            tell(cx, link, wrote, Some(drain));
            if open && self.bindings.live() == 0 {
                self.bind_by = Some(cx.after(cx.settings.limits.unbound_ms));
            }
        }
    }

    /// At the channel's end: nothing is under way, so every binding is gone.
    pub(super) fn release_bindings(&mut self, cx: &mut Cx) {
        for slot in 0..=u8::MAX {
            let Some(binding) = self.bindings.at_mut(slot) else { break };
            let drain = match binding.state {
                State::Gone(_) => continue,
                State::Draining { drain, .. } => Some(drain),
                State::Active => None,
            };
            let (link, wrote) = (binding.link, binding.last_write_ns);
            binding.let_file_go(self.key, cx);
            binding.state = State::Gone(Status::Closed);
            tell(cx, link, wrote, drain);
        }
    }
}

/// Tells control that a binding is gone, which last wrote at that time.
fn tell(cx: &mut Cx, link: LinkBinding, wrote: u64, drain: Option<Drain>) {
    let fenced = if let Some(Drain::Fence(fence)) = &drain { Some(fence.reason) } else { None };
    cx.gauges.bindings.sub(1);
    cx.registry.remove(link, wrote, fenced);
    match drain {
        Some(Drain::Fence(fence)) => cx.port.fenced(fence),
        Some(Drain::Unbind { .. }) | None => cx.port.released(link),
    }
}
