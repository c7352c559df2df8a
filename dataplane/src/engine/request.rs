//! The life of one request.
//!
//! ```text
//!  frame ─► checks ─┬─ refused ───────────────────────────────────────────────────────────► reply
//!                   ├─ nothing to move ───────────────────────────────────────────────────► reply
//!                   ├─ read, write: pieces, see `transfer` ───────────────────────────────► reply
//!                   ├─ map, unmap: see `map` ──────────────────────────────────────────────► reply
//!                   ├─ descriptor: see `descriptor` ───────────────────────────────────────► reply, with it
//!                   ├─ flush:  storage ───────────────────────────────────────────────────► reply
//!                   └─ unbind: the binding drains, see `fence` ───────────────────────────► reply
//! ```

use super::binding::{BindingRef, Drain};
use super::channel::{Conn, Cx, Phase};
use super::filled::Filled;
use super::map::Wanted;
use super::storage::Work;
use holdfast_shared::types::{Access, ByteRange, INLINE_BYTES_MAX, RegionDescriptor, Status};
use holdfast_shared::wire::data::{Body, Flags, Frame, TAG_BYTES};
use holdfast_verbs::memory::Buffer;
use std::ops::Range;
use std::os::fd::OwnedFd;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Read,
    Write,
    Flush { data_only: bool },
    Unbind,
    Map,
    Unmap { mapping: u32 },
    Descriptor,
}

/// One request, from its receipt to its reply.
pub(crate) struct Request {
    pub(super) ask: Ask,
    /// The client's number, and its frame's sequence.
    pub(super) number: u32,
    pub(super) sequence: u64,
    /// Which it was of those admitted on its channel; set when it is.
    pub(super) order: u64,
    pub(super) binding: Option<BindingRef>,
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) region: RegionDescriptor,
    pub(super) digest: Option<[u8; TAG_BYTES]>,
    /// Where the inline payload is in the message.
    pub(super) payload: Range<usize>,
    /// Of a Map.
    pub(super) map: Option<Box<Wanted>>,
    pub(super) message: Option<Buffer>,
    /// Pieces read and not yet placed.
    pub(super) filled: Filled,
    /// Bytes that storage was asked for ahead, beyond those begun.
    pub(super) asked: u32,
    /// Bytes begun.
    pub(super) next: u32,
    /// Whether its bytes are pinned was looked at.
    pub(super) looked: bool,
    /// Its bytes go through a buffer: going without was tried in vain.
    pub(super) roundabout: bool,
    /// The read met the end of the file.
    pub(super) at_end: bool,
    pub(super) fetches: u16,
    pub(super) storage: u16,
    /// The first byte that certainly was not done, and why.
    pub(super) failed: Option<(u32, Status)>,
    pub(super) answer: Option<(Status, u32)>,
    /// With storage for the whole of a flush, or draining for an unbind.
    pub(super) parked: bool,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing more to do for it now.
    Next,
    /// There is more to do at once.
    Again,
    /// The transport is full.
    NoRoom,
    /// No buffer.
    NoBuffer,
}

impl Request {
    /// Takes a request out of its frame.
    pub(super) fn read(frame: &Frame<'_>, binding: Option<BindingRef>) -> Self {
        let flags = frame.header.flags.get();
        let (ask, io) = match frame.body {
            Body::Read(io) => (Ask::Read, Some(io)),
            Body::Write(io) => (Ask::Write, Some(io)),
            Body::Map(_) => (Ask::Map, None),
            Body::Unmap(unmap) => (Ask::Unmap { mapping: unmap.mapping.get() }, None),
            Body::Flush(_) => (Ask::Flush { data_only: flags & Flags::DATA_ONLY != 0 }, None),
            Body::Descriptor => (Ask::Descriptor, None),
            // The caller lets nothing else through.
            _ => (Ask::Unbind, None),
        };
        let payload = frame.covered.len() + TAG_BYTES;
        Self {
            ask,
            number: frame.header.request.get(),
            sequence: frame.header.sequence.get(),
            order: 0,
            binding,
            offset: match frame.body {
                Body::Map(map) => map.offset.get(),
                _ => io.map_or(0, |io| io.offset.get()),
            },
            length: io.map_or(0, |io| io.length.get()),
            region: io.map_or(RegionDescriptor::NONE, |io| io.region),
            digest: frame.digest.copied(),
            payload: payload..payload + frame.payload.len(),
            map: if let Body::Map(map) = frame.body { Some(Wanted::read(map)) } else { None },
            message: None,
            filled: Filled::default(),
            asked: 0,
            next: 0,
            looked: false,
            roundabout: false,
            at_end: false,
            fetches: 0,
            storage: 0,
            failed: None,
            answer: None,
            parked: false,
        }
    }

    pub(super) fn fail(&mut self, at: u32, status: Status) {
        if self.failed.is_none_or(|(first, _)| at < first) {
            self.failed = Some((at, status));
        }
    }

    /// Leading bytes of a write that certainly took effect.
    pub(super) fn applied(&self) -> u32 {
        self.failed.map_or(self.next, |(at, _)| at.min(self.next))
    }

    pub(super) fn in_progress(&self) -> bool {
        self.fetches > 0 || self.storage > 0
    }
}

impl Conn {
    /// A request that was counted: checks it, and lets it begin.
    pub(super) fn admit(&mut self, cx: &mut Cx, mut request: Request, buffer: Buffer) {
        let counts = &cx.gauges;
        match request.ask {
            Ask::Read => counts.requests_read_total.add(1),
            Ask::Write => counts.requests_write_total.add(1),
            Ask::Flush { .. } => counts.requests_flush_total.add(1),
            Ask::Unbind => counts.requests_unbind_total.add(1),
            Ask::Map => counts.requests_map_total.add(1),
            Ask::Unmap { .. } | Ask::Descriptor => {}
        }
        counts.requests_in_flight.add(1);
        request.order = self.admitted;
        self.admitted += 1;
        match self.check(cx, &request) {
            Ok(()) if request.ask != Ask::Unbind && request.ask_is_empty() => {
                request.answer = Some((Status::Ok, 0))
            }
            Ok(()) => {}
            Err(status) => request.answer = Some((status, 0)),
        }
        if request.answer.is_none() && !request.payload.is_empty() {
            request.message = Some(buffer);
        } else {
            self.post_receive(cx, buffer);
        }
        let unbind =
            (request.ask == Ask::Unbind && request.answer.is_none()).then_some(request.binding).flatten();
        request.parked = unbind.is_some();
        let Some(slot) = self.free_slots.pop() else {
            // One slot a credit, and the credit was checked.
            return self.abort(cx, "no request slot: our own fault");
        };
        let (parked, unknown) = (request.parked, request.binding.is_none());
        self.requests[usize::from(slot)] = Some(request);
        if !parked {
            self.ready.add(slot);
        }
        if let Some(binding) = unbind {
            self.drain(cx, binding, Drain::Unbind { request: u32::from(slot) });
        }
        if unknown && !self.ever_bound {
            self.answer_now(cx, slot);
            self.count_failure(cx);
        }
    }

    /// Without a binding a peer gets its answer before it may be sent away.
    fn answer_now(&mut self, cx: &mut Cx, slot: u16) {
        if self.rare.is_empty()
            && self.ready.first() == Some(slot)
            && self.step(cx, slot, &mut 0) == Step::Next
        {
            self.ready.remove_first();
        }
    }

    /// Everything that can be said before a byte moves.
    fn check(&self, cx: &Cx, request: &Request) -> Result<(), Status> {
        let Some(binding) = request.binding.and_then(|name| self.bindings.get(name)) else {
            return Err(Status::NotBound);
        };
        if matches!(request.ask, Ask::Flush { .. } | Ask::Unbind | Ask::Descriptor) {
            if !request.payload.is_empty() || request.digest.is_some() {
                return Err(Status::Invalid);
            }
            if request.ask == Ask::Descriptor {
                binding.serves()?;
                return self.may_have_descriptor(binding);
            }
            return binding.serves();
        }
        if matches!(request.ask, Ask::Map | Ask::Unmap { .. }) {
            return self.check_map(cx, request);
        }
        let piecewise = !binding.policy.covers_payload();
        let max = cx.settings.limits.transfer_bytes_max as usize;
        let max = if piecewise { max } else { max.min(self.piece_max(cx)) };
        let length = request.length as usize;
        if length > max || request.payload.len() > INLINE_BYTES_MAX {
            return Err(Status::TooLong);
        }
        let range =
            ByteRange::new(request.offset, u64::from(request.length)).map_err(|_| Status::BadRange)?;
        let inline = !request.payload.is_empty();
        let ends = request.region.address().checked_add(u64::from(request.length)).is_some();
        if !inline && (!ends || request.region.part(0, request.length).is_none()) {
            return Err(Status::BadRegion);
        }
        let wanted = if request.ask == Ask::Read { Access::READ } else { Access::WRITE };
        if !binding.access.contains(wanted) {
            return Err(Status::AccessDenied);
        }
        if inline
            && (request.ask == Ask::Read
                || request.payload.len() != length
                || request.region != RegionDescriptor::NONE)
        {
            return Err(Status::Invalid);
        }
        match request.ask {
            Ask::Read if request.digest.is_some() => return Err(Status::Invalid),
            Ask::Write if length > 0 && request.digest.is_some() != binding.payload_in.is_on() => {
                return Err(Status::Integrity);
            }
            _ => {}
        }
        binding.serves()?;
        if binding.rules.refuse(range, wanted) {
            cx.gauges.lock_conflicts_total.add(1);
            return Err(Status::LockConflict);
        }
        Ok(())
    }

    /// The largest piece: a buffer, or what the transport does at once.
    pub(super) fn piece_max(&self, cx: &Cx) -> usize {
        cx.settings.engine.buffer_bytes.min(self.transfer_max)
    }

    /// Does the next thing for a request.
    pub(super) fn step(&mut self, cx: &mut Cx, slot: u16, bytes: &mut usize) -> Step {
        let Some(mut request) = self.requests.get_mut(usize::from(slot)).and_then(Option::take) else {
            return Step::Next;
        };
        if request.answer.is_none() {
            let serves = match request.binding.and_then(|name| self.bindings.get(name)) {
                Some(binding) => binding.serves(),
                None => Err(Status::NotBound),
            };
            if let Err(status) = serves {
                if request.ask != Ask::Unbind {
                    self.stop_request(cx, &mut request, status);
                }
            }
        }
        let step = match request.answer {
            Some(_) if request.ask == Ask::Write && self.written.is_open() => {
                self.written.answer_later(slot);
                Step::Next
            }
            Some((status, count)) => {
                if self.room(1) && self.can_reply() {
                    self.reply(cx, slot, &request, status, count, None);
                    return Step::Next;
                }
                Step::NoRoom
            }
            None if request.parked => Step::Next,
            None => match request.ask {
                Ask::Read => match self.step_read(cx, slot, &mut request, bytes) {
                    Some(step) => step,
                    None => return Step::Next,
                },
                Ask::Write if !request.payload.is_empty() => self.step_inline(cx, slot, &mut request, bytes),
                Ask::Write => self.step_write(cx, slot, &mut request, bytes),
                Ask::Flush { data_only } => {
                    request.parked = true;
                    self.hand_over(cx, slot, &mut request, Work::Flush { data_only }, None, 0..0, 0, 0);
                    Step::Next
                }
                Ask::Descriptor => match self.step_descriptor(cx, slot, &mut request) {
                    Some(step) => step,
                    None => return Step::Next,
                },
                Ask::Map => self.step_map(cx, slot, &mut request),
                Ask::Unmap { mapping } => self.step_unmap(cx, slot, &mut request, mapping),
                Ask::Unbind => Step::Next,
            },
        };
        if self.phase != Phase::Open {
            // It was not there when the others gave back what they had.
            while let Some(piece) = request.filled.pop() {
                self.give(piece.buffer);
            }
        }
        self.requests[usize::from(slot)] = Some(request);
        step
    }

    /// A request of a binding that serves no more: nothing new of it begins; it is answered once nothing is under way.
    fn stop_request(&mut self, cx: &mut Cx, request: &mut Request, status: Status) {
        while let Some(piece) = request.filled.pop() {
            self.give(piece.buffer);
        }
        if !request.in_progress() {
            let count = if request.ask == Ask::Write { request.applied() } else { 0 };
            request.answer = Some((status, count));
            request.parked = false;
            if let Some(message) = request.message.take() {
                self.post_receive(cx, message);
            }
        } else {
            request.parked = true;
        }
    }

    /// Submits the reply and forgets the request. There is room.
    pub(super) fn reply(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &Request,
        status: Status,
        count: u32,
        digest: Option<&[u8; TAG_BYTES]>,
    ) {
        debug_assert!(request.storage == 0 && request.filled.is_empty(), "its slot is given away");
        match request.ask {
            Ask::Read => cx.gauges.bytes_read_total.add(u64::from(count)),
            Ask::Write => cx.gauges.bytes_written_total.add(u64::from(count)),
            _ => {}
        }
        match request.map.as_ref().and_then(|map| map.granted) {
            Some(mapped) => self.send_mapped(cx, request.binding, request.number, &mapped),
            None => self.send_reply(cx, request.binding, request.number, status, count, digest),
        }
        self.answered(cx, slot);
    }

    /// As [`Conn::reply`] with `Ok`, and the peer gets the descriptor.
    pub(super) fn reply_with_descriptor(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &Request,
        descriptor: OwnedFd,
    ) {
        let (binding, number) = (request.binding, request.number);
        self.send_reply_with(cx, binding, number, Status::Ok, 0, None, Some(descriptor));
        self.answered(cx, slot);
    }

    /// The reply is on its way: the slot and the credit are free.
    fn answered(&mut self, cx: &Cx, slot: u16) {
        self.free_slots.push(slot);
        self.in_flight = self.in_flight.saturating_sub(1);
        cx.gauges.requests_in_flight.sub(1);
    }

    /// Puts a request back among those with something to do, once; before those that have not begun, as it may hold a
    /// buffer which they wait for.
    pub(super) fn requeue(&mut self, slot: u16) {
        if let Some(Some(request)) = self.requests.get_mut(usize::from(slot)) {
            request.parked = false;
        }
        self.ready.resume(slot);
    }

    /// An unbind is answered when its binding has drained.
    pub(super) fn answer_unbind(&mut self, _cx: &mut Cx, slot: u32) {
        let Ok(slot) = u16::try_from(slot) else { return };
        if let Some(Some(request)) = self.requests.get_mut(usize::from(slot)) {
            request.answer = Some((Status::Ok, 0));
            if self.phase == Phase::Open {
                self.requeue(slot);
            }
        }
    }

    /// The channel ends: buffers nothing uses go back. What is with the transport or storage comes back by itself.
    pub(super) fn cancel_requests(&mut self, _cx: &mut Cx) {
        self.ready.clear();
        self.awaits_wire.clear();
        for slot in 0..self.requests.len() {
            let Some(request) = &mut self.requests[slot] else { continue };
            request.message = None;
            let mut filled = std::mem::take(&mut request.filled);
            while let Some(piece) = filled.pop() {
                self.give(piece.buffer);
            }
        }
    }
}

impl Request {
    /// Nothing to move: answered without touching region or file.
    fn ask_is_empty(&self) -> bool {
        matches!(self.ask, Ask::Read | Ask::Write) && self.length == 0
    }
}
