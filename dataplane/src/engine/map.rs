//! One-sided reads: ranges of files that clients read without this process.
//!
//! ```text
//!  Map ─► checks, limits, claims the lane ─► mapper thread: pins the pages ─► rules still allow it? ─► Mapped
//!                                                                               │ no
//!  Fence, Unbind, Restrict, Unmap, the channel's end ───────────────────────────┴─► withdrawer thread
//!                                                                                      │ the device has let go
//!            confirmed to control, answered to the client ◄── counted as storage work ◄┘
//! ```
//!
//! A mapping belongs to a binding, and is work of it that is under way: what waits for the binding's storage work waits
//! for its mappings' withdrawal. So no fence, restriction or unbind is confirmed while a byte can still be read.
//!
//! Mapping may have to read the disk, withdrawing unpins page after page: each has a thread, and neither holds up a worker
//! or the other. This process never touches a byte of a mapping: a file that shrinks can't harm it.

use super::binding::BindingRef;
use super::channel::{Conn, Cx, Phase, Token};
use super::mapper::{Expose, ExposeDone, Reserved, Withdraw, WithdrawDone};
use super::pinned::FileId;
use super::request::{Ask, Request, Step};
use holdfast_shared::types::{Access, ByteRange, OpenId, Status};
use holdfast_shared::wire::data::{Map, Mapped, Opcode, Writer};
use holdfast_shared::wire::service::TransportKind;
use holdfast_transport::verbs::{Exposed, LaneEnd};
use std::sync::Arc;

/// Mappings pin whole pages.
const PAGE: u64 = 4096;

/// What a Map asks, and what it is granted.
pub(crate) struct Wanted {
    length: u64,
    lane: LaneEnd,
    pub(super) granted: Option<Mapped>,
}

impl Wanted {
    pub(super) fn read(map: &Map) -> Box<Self> {
        Box::new(Self { length: map.length.get(), lane: map.lane, granted: None })
    }
}

struct Mapping {
    number: u32,
    binding: BindingRef,
    range: ByteRange,
    file: FileId,
    exposed: Exposed,
    reserved: Reserved,
}

/// The mappings of one channel.
#[derive(Default)]
pub(crate) struct ChannelMaps {
    live: Vec<Mapping>,
    /// Bindings of mappings that are being withdrawn, one entry for each.
    withdrawing: Vec<BindingRef>,
    /// All of them, those being made and being withdrawn included.
    count: usize,
    bytes: u64,
    last: u32,
}

impl ChannelMaps {
    fn forget(&mut self, bytes: u64) {
        self.count = self.count.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// Bytes of the pages that a range touches.
fn pinned(range: ByteRange) -> u64 {
    let start = range.offset() / PAGE * PAGE;
    range.end().next_multiple_of(PAGE) - start
}

impl Conn {
    /// Mappings a client of this channel may have; 0 if there are none here.
    pub(super) fn mappings_max(&self, cx: &Cx) -> u32 {
        let verbs = self.transport.identity().transport == TransportKind::Verbs;
        let max = cx.maps.as_ref().filter(|_| verbs).map_or(0, |maps| maps.limits.channel_mappings_max);
        u32::try_from(max).unwrap_or(u32::MAX)
    }

    /// Everything that can be said of a Map or Unmap before anything is done.
    pub(super) fn check_map(&self, cx: &Cx, request: &Request) -> Result<(), Status> {
        let Some(binding) = request.binding.and_then(|name| self.bindings.get(name)) else {
            return Err(Status::NotBound);
        };
        if !request.payload.is_empty() || request.digest.is_some() {
            return Err(Status::Invalid);
        }
        // What the device serves has no digest, and is not sealed; and its pages must stay the file's.
        if self.mappings_max(cx) == 0 || binding.policy.covers_payload() || binding.direct {
            return Err(Status::Unsupported);
        }
        let Some(wanted) = &request.map else { return binding.serves() };
        let range = ByteRange::new(request.offset, wanted.length).map_err(|_| Status::BadRange)?;
        if range.length() == 0 {
            return Err(Status::BadRange);
        }
        // The lane is of the client's own port: its queue pair is then its own affair.
        if wanted.lane[4..] != self.transport.identity().client[4..] {
            return Err(Status::Invalid);
        }
        if !binding.access.contains(Access::READ) {
            return Err(Status::AccessDenied);
        }
        binding.serves()
    }

    /// Hands a Map to the mapper.
    pub(super) fn step_map(&mut self, cx: &mut Cx, slot: u16, request: &mut Request) -> Step {
        match self.begin_map(cx, slot, request) {
            Ok(()) => Step::Next,
            Err(status) => {
                request.answer = Some((status, 0));
                Step::Again
            }
        }
    }

    fn begin_map(&mut self, cx: &mut Cx, slot: u16, request: &mut Request) -> Result<(), Status> {
        let (Some(maps), Some(wanted)) = (&cx.maps, &request.map) else { return Err(Status::Unsupported) };
        let binding = request.binding.and_then(|name| self.bindings.get_mut(name)).ok_or(Status::NotBound)?;
        let file = binding.file.as_ref().map(Arc::clone).ok_or(Status::Fenced)?;
        let id = FileId::of(file.descriptor()).map_err(|_| Status::Io)?;
        // Before its size is asked: what it loses from now on is noticed.
        let making = maps.begin(id).ok_or(Status::Unavailable)?;
        let size = rustix::fs::fstat(file.descriptor()).map_err(|_| Status::Io)?.st_size;
        let size = u64::try_from(size).unwrap_or(0);
        let length = wanted.length.min(size.saturating_sub(request.offset));
        let range = ByteRange::new(request.offset, length).map_err(|_| Status::BadRange)?;
        if length == 0 {
            // Beyond the end there is nothing to map.
            return Err(Status::BadRange);
        }
        if binding.rules.refuse(range, Access::READ) {
            cx.gauges.lock_conflicts_total.add(1);
            return Err(Status::LockConflict);
        }
        let (bytes, mine) = (pinned(range), &mut self.maps);
        if mine.count >= maps.limits.channel_mappings_max
            || mine.bytes + bytes > maps.limits.channel_bytes_max
            || mine.last == u32::MAX
        {
            return Err(Status::TooMany);
        }
        let reserved = maps.reserve(bytes).ok_or(Status::TooMany)?;
        let (lane, claimed) = (wanted.lane, maps.lanes().try_claim(&wanted.lane));
        let job =
            Expose { worker: cx.worker, conn: self.key, slot, file, lane, claimed, range, making, reserved };
        maps.expose.send(job).map_err(|_| Status::Internal)?;
        mine.count += 1;
        mine.bytes += bytes;
        binding.storage_ops += 1;
        self.storage_ops += 1;
        request.storage += 1;
        request.parked = true;
        Ok(())
    }

    /// The mapper is done with a Map.
    pub(crate) fn exposed(&mut self, cx: &mut Cx, done: ExposeDone) {
        let ExposeDone { slot, range, bytes, making, outcome, .. } = done;
        self.storage_ops = self.storage_ops.saturating_sub(1);
        let taken = self.requests.get_mut(usize::from(slot)).and_then(Option::take);
        let Some(mut request) = taken else {
            self.maps.forget(bytes);
            // What was exposed is withdrawn as it is dropped.
            return tracing::error!("a mapping for a request that is gone");
        };
        request.storage = request.storage.saturating_sub(1);
        request.parked = false;
        let allowed = match request.binding.and_then(|name| self.bindings.get_mut(name)) {
            None => Err(Status::NotBound),
            Some(binding) => {
                binding.storage_ops = binding.storage_ops.saturating_sub(1);
                binding.serves().and_then(|()| {
                    // They may have changed meanwhile.
                    let refused = binding.rules.refuse(range, Access::READ);
                    if refused { Err(Status::LockConflict) } else { Ok(()) }
                })
            }
        };
        let allowed = if self.phase == Phase::Open { allowed } else { Err(Status::Closed) };
        let status = match (outcome, allowed, request.binding) {
            (Ok((exposed, reserved)), allowed, Some(binding)) => {
                self.maps.last += 1;
                let (number, file) = (self.maps.last, making.file);
                let mapping = Mapping { number, binding, range, file, exposed, reserved };
                // Barred from now on it is withdrawn like any other: that letter comes later.
                match if making.is_spoiled() { Err(Status::Unavailable) } else { allowed } {
                    Ok(()) => {
                        let granted = Mapped {
                            credits: 1.into(),
                            reserved: [0; 2],
                            mapping: mapping.number.into(),
                            address: mapping.exposed.address().into(),
                            length: range.length().into(),
                            rkey: mapping.exposed.rkey().into(),
                            reserved2: [0; 4],
                        };
                        if let Some(wanted) = &mut request.map {
                            wanted.granted = Some(granted);
                        }
                        self.maps.live.push(mapping);
                        Status::Ok
                    }
                    Err(status) => {
                        self.withdraw(cx, mapping, None);
                        status
                    }
                }
            }
            // Bytes were taken away meanwhile: that is over soon, whatever it made of the mapping.
            (_, Ok(()), _) if making.is_spoiled() => {
                self.maps.forget(bytes);
                Status::Unavailable
            }
            (outcome, _, _) => {
                self.maps.forget(bytes);
                outcome.err().unwrap_or(Status::NotBound)
            }
        };
        request.answer = Some((status, 0));
        self.resume(cx, slot, request);
    }

    /// Withdraws the mapping a client names; one that is gone already is answered at once.
    pub(super) fn step_unmap(&mut self, cx: &mut Cx, slot: u16, request: &mut Request, mapping: u32) -> Step {
        let found = self
            .maps
            .live
            .iter()
            .position(|live| live.number == mapping && Some(live.binding) == request.binding);
        match found {
            Some(index) => {
                let mapping = self.maps.live.swap_remove(index);
                request.storage += 1;
                request.parked = true;
                self.withdraw(cx, mapping, Some(slot));
                Step::Next
            }
            None => {
                let was = (1..=self.maps.last).contains(&mapping);
                request.answer = Some((if was { Status::Ok } else { Status::Invalid }, 0));
                Step::Again
            }
        }
    }

    /// A mapping was withdrawn.
    pub(crate) fn withdrawn(&mut self, cx: &mut Cx, done: WithdrawDone) {
        self.storage_ops = self.storage_ops.saturating_sub(1);
        self.maps.forget(done.bytes);
        if let Some(index) = self.maps.withdrawing.iter().position(|name| *name == done.binding) {
            self.maps.withdrawing.swap_remove(index);
        }
        if let Some(binding) = self.bindings.get_mut(done.binding) {
            binding.storage_ops = binding.storage_ops.saturating_sub(1);
        }
        let request = done.unmap.and_then(|slot| self.requests.get_mut(usize::from(slot))?.take());
        match (done.unmap, request) {
            (Some(slot), Some(mut request)) => {
                request.storage = request.storage.saturating_sub(1);
                request.parked = false;
                request.answer = Some((Status::Ok, 0));
                self.resume(cx, slot, request);
            }
            _ if self.draining > 0 => self.finish_drains(cx),
            _ => {}
        }
    }

    /// A request of ours is to be answered.
    fn resume(&mut self, cx: &mut Cx, slot: u16, request: Request) {
        self.requests[usize::from(slot)] = Some(request);
        if self.phase == Phase::Open {
            self.requeue(slot);
        }
        if self.draining > 0 {
            self.finish_drains(cx);
        }
    }

    /// Withdraws all mappings of a binding. They are among its storage work until that is done.
    pub(super) fn withdraw_of(&mut self, cx: &Cx, name: BindingRef) {
        self.withdraw_those(cx, |mapping| mapping.binding == name);
    }

    /// Withdraws all mappings of a file.
    pub(super) fn withdraw_file(&mut self, cx: &Cx, file: FileId) {
        self.withdraw_those(cx, |mapping| mapping.file == file);
    }

    /// Withdraws all mappings.
    pub(super) fn withdraw_every(&mut self, cx: &Cx) {
        self.withdraw_those(cx, |_| true);
    }

    /// Withdraws those mappings of an open that its rules no longer allow.
    pub(super) fn withdraw_restricted(&mut self, cx: &Cx, open: OpenId) {
        let mut at = 0;
        while let Some(mapping) = self.maps.live.get(at) {
            let refused = self
                .bindings
                .get(mapping.binding)
                .is_some_and(|b| b.open == open && b.rules.refuse(mapping.range, Access::READ));
            if refused {
                let mapping = self.maps.live.swap_remove(at);
                self.withdraw(cx, mapping, None);
            } else {
                at += 1;
            }
        }
    }

    fn withdraw_those(&mut self, cx: &Cx, which: impl Fn(&Mapping) -> bool) {
        let mut at = 0;
        while let Some(mapping) = self.maps.live.get(at) {
            if which(mapping) {
                let mapping = self.maps.live.swap_remove(at);
                self.withdraw(cx, mapping, None);
            } else {
                at += 1;
            }
        }
    }

    fn withdraw(&mut self, cx: &Cx, mapping: Mapping, unmap: Option<u16>) {
        let Mapping { binding, exposed, reserved, .. } = mapping;
        let done = WithdrawDone { conn: self.key, binding, unmap, bytes: reserved.bytes };
        if let Some(binding) = self.bindings.get_mut(binding) {
            binding.storage_ops += 1;
        }
        self.storage_ops += 1;
        self.maps.withdrawing.push(binding);
        let Some(maps) = &cx.maps else { return };
        maps.withdraw(Withdraw { worker: cx.worker, done, exposed, reserved });
    }

    /// Mappings of an open that are being withdrawn.
    pub(super) fn withdrawing(&self, open: OpenId) -> usize {
        let of_it = |name: &&BindingRef| self.bindings.get(**name).is_some_and(|b| b.open == open);
        self.maps.withdrawing.iter().filter(of_it).count()
    }

    /// Answers a granted Map. There must be room.
    pub(super) fn send_mapped(
        &mut self,
        cx: &mut Cx,
        binding: Option<BindingRef>,
        request: u32,
        mapped: &Mapped,
    ) {
        let (Some(mut buffer), Some(binding)) =
            (self.send_buffers.pop(), binding.and_then(|name| self.bindings.get(name)))
        else {
            self.abort(cx, "no send buffer, or no binding: our own fault");
            return;
        };
        let built = (|| {
            let sequence = self.send_sequence;
            let mut w = Writer::new(&mut buffer, Opcode::Mapped, 0, binding.number, request, sequence)?;
            w.body(mapped)?;
            Ok(w.finish(|covered, mac| binding.to_client.sign(covered, mac)))
        })();
        self.submit_frame(cx, Token::Send, buffer, built);
    }
}

impl Ask {
    /// True for what exposes or reads bytes, or writes them: what rules can forbid.
    pub(super) fn is_restricted(self) -> bool {
        matches!(self, Self::Read | Self::Write | Self::Map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_count() {
        let range = |offset, length| ByteRange::new(offset, length).unwrap();
        assert_eq!(pinned(range(0, 1)), 4096);
        assert_eq!(pinned(range(4095, 2)), 8192);
        assert_eq!(pinned(range(4096, 4096)), 4096);
        assert_eq!(pinned(range(ByteRange::END_MAX - 1, 1)), 4096);
    }
}
