//! The life of one request.
//!
//! ```text
//!  frame ─► checks ─┬─ refused ───────────────────────────────────────────────────────────► reply
//!                   ├─ read:   [ buffer ─► page cache or storage ─► Place ]… one after another ─► reply, right behind
//!                   │                                                                           the last Place
//!                   ├─ write:  [ buffer ─► Fetch ─► page cache or storage ]… several at once ───► reply
//!                   ├─ inline: message buffer ─► page cache or storage ────────────────────────► reply
//!                   └─ flush:  storage ────────────────────────────────────────────────────────► reply
//! ```
//!
//! A piece is never larger than a buffer, and a request needs no second buffer to give the first one back: what holds a
//! buffer can always finish. Reads go piece by piece, so that no byte past the count is ever placed.

use super::backend::{Done, Job, Progress, Tag, Work, read_now, write_now};
use super::binding::Drain;
use super::channel::{Conn, Cx, Phase, Token};
use holdfast_shared::types::{Access, ByteRange, INLINE_BYTES_MAX, RegionDescriptor, Status};
use holdfast_shared::wire::data::{Body, Flags, Frame, TAG_BYTES};
use holdfast_transport::Operation;
use holdfast_verbs::memory::Buffer;
use std::ops::Range;
use std::sync::Arc;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Read,
    Write,
    Flush { data_only: bool },
    Unbind,
}

/// One request, from its receipt to its reply.
pub(crate) struct Request {
    ask: Ask,
    /// The client's number, and its frame's sequence.
    number: u32,
    sequence: u64,
    binding: Option<u8>,
    offset: u64,
    length: u32,
    region: RegionDescriptor,
    digest: Option<[u8; TAG_BYTES]>,
    /// Where the inline payload is in the message.
    payload: Range<usize>,
    message: Option<Buffer>,
    /// A piece read and not yet placed: its bytes, and whether the file ends behind it.
    filled: Option<(Buffer, usize)>,
    /// Bytes begun.
    next: u32,
    /// The read met the end of the file.
    at_end: bool,
    fetches: u16,
    storage: u16,
    /// The first byte that certainly was not done, and why.
    failed: Option<(u32, Status)>,
    answer: Option<(Status, u32)>,
    /// With storage for the whole of a flush, or draining for an unbind.
    parked: bool,
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
    pub(super) fn read(frame: &Frame<'_>, binding: Option<u8>) -> Self {
        let flags = frame.header.flags.get();
        let (ask, io) = match frame.body {
            Body::Read(io) => (Ask::Read, Some(io)),
            Body::Write(io) => (Ask::Write, Some(io)),
            Body::Flush(_) => (Ask::Flush { data_only: flags & Flags::DATA_ONLY != 0 }, None),
            // The caller lets nothing else through.
            _ => (Ask::Unbind, None),
        };
        let payload = frame.covered.len() + TAG_BYTES;
        Self {
            ask,
            number: frame.header.request.get(),
            sequence: frame.header.sequence.get(),
            binding,
            offset: io.map_or(0, |io| io.offset.get()),
            length: io.map_or(0, |io| io.length.get()),
            region: io.map_or(RegionDescriptor::NONE, |io| io.region),
            digest: frame.digest.copied(),
            payload: payload..payload + frame.payload.len(),
            message: None,
            filled: None,
            next: 0,
            at_end: false,
            fetches: 0,
            storage: 0,
            failed: None,
            answer: None,
            parked: false,
        }
    }

    fn fail(&mut self, at: u32, status: Status) {
        if self.failed.is_none_or(|(first, _)| at < first) {
            self.failed = Some((at, status));
        }
    }

    /// Leading bytes of a write that certainly took effect.
    fn applied(&self) -> u32 {
        self.failed.map_or(self.next, |(at, _)| at.min(self.next))
    }

    fn in_progress(&self) -> bool {
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
        }
        counts.requests_in_flight.add(1);
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
            self.ready.push_back(slot);
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
            && self.ready.front() == Some(&slot)
            && self.step(cx, slot, &mut 0) == Step::Next
        {
            self.ready.pop_front();
        }
    }

    /// Everything that can be said before a byte moves.
    fn check(&self, cx: &Cx, request: &Request) -> Result<(), Status> {
        let Some(binding) = request.binding.and_then(|slot| self.bindings.at(slot)) else {
            return Err(Status::NotBound);
        };
        if matches!(request.ask, Ask::Flush { .. } | Ask::Unbind) {
            if !request.payload.is_empty() || request.digest.is_some() {
                return Err(Status::Invalid);
            }
            return binding.serves();
        }
        let piecewise = !binding.policy.covers_payload();
        let max = cx.settings.limits.transfer_bytes_max as usize;
        let max = if piecewise { max } else { max.min(self.piece_max(cx)) };
        let length = request.length as usize;
        if length > max || request.payload.len() > INLINE_BYTES_MAX {
            return Err(Status::TooLong);
        }
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
        binding.serves()
    }

    /// The largest piece: a buffer, or what the transport does at once.
    fn piece_max(&self, cx: &Cx) -> usize {
        cx.settings.engine.buffer_bytes.min(self.transfer_max)
    }

    /// Does the next thing for a request.
    pub(super) fn step(&mut self, cx: &mut Cx, slot: u16, bytes: &mut usize) -> Step {
        let Some(mut request) = self.requests.get_mut(usize::from(slot)).and_then(Option::take) else {
            return Step::Next;
        };
        if request.answer.is_none() {
            let serves = match request.binding.and_then(|slot| self.bindings.at(slot)) {
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
                Ask::Write => self.step_write(cx, slot, &mut request),
                Ask::Flush { data_only } => {
                    request.parked = true;
                    self.hand_over(cx, slot, &mut request, Work::Flush { data_only }, None, 0..0, 0, 0);
                    Step::Next
                }
                Ask::Unbind => Step::Next,
            },
        };
        self.requests[usize::from(slot)] = Some(request);
        step
    }

    /// A request of a binding that serves no more: nothing new of it begins; it is answered once nothing is under way.
    fn stop_request(&mut self, cx: &mut Cx, request: &mut Request, status: Status) {
        if let Some((buffer, _)) = request.filled.take() {
            self.give(buffer);
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
    fn reply(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &Request,
        status: Status,
        count: u32,
        digest: Option<&[u8; TAG_BYTES]>,
    ) {
        match request.ask {
            Ask::Read => cx.gauges.bytes_read_total.add(u64::from(count)),
            Ask::Write => cx.gauges.bytes_written_total.add(u64::from(count)),
            _ => {}
        }
        self.send_reply(cx, request.binding, request.number, status, count, digest);
        self.free_slots.push(slot);
        self.in_flight = self.in_flight.saturating_sub(1);
        cx.gauges.requests_in_flight.sub(1);
    }

    /// One piece of a read. `None`: it was answered.
    fn step_read(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &mut Request,
        bytes: &mut usize,
    ) -> Option<Step> {
        if request.storage > 0 {
            return Some(Step::Next);
        }
        if let Some((at, status)) = request.failed {
            debug_assert!(at <= request.length);
            request.answer = Some((status, 0));
            return Some(Step::Again);
        }
        // A piece is read only when it can be placed and the reply sent right behind it.
        if !self.room(2) || !self.can_reply() {
            return Some(Step::NoRoom);
        }
        let (buffer, count) = match request.filled.take() {
            Some(filled) => filled,
            None => {
                let Some(mut buffer) = self.take(cx) else { return Some(Step::NoBuffer) };
                let length = self.piece_max(cx).min((request.length - request.next) as usize);
                let at = request.offset + u64::from(request.next);
                let Some(file) = request.binding.and_then(|b| self.bindings.at(b)?.file.clone()) else {
                    self.give(buffer);
                    request.answer = Some((Status::Fenced, 0));
                    return Some(Step::Again);
                };
                match read_now(&*file, &mut buffer[..length], at) {
                    Progress::Complete(count) => {
                        request.at_end = count < length;
                        (buffer, count)
                    }
                    Progress::Partial(done) => {
                        self.hand_over(
                            cx,
                            slot,
                            request,
                            Work::Read,
                            Some(buffer),
                            0..length,
                            request.next,
                            done,
                        );
                        return Some(Step::Next);
                    }
                    Progress::Failed(_, status) => {
                        self.give(buffer);
                        request.answer = Some((status, 0));
                        return Some(Step::Again);
                    }
                }
            }
        };
        *bytes += count;
        self.place(cx, slot, request, buffer, count)
    }

    /// Places a piece, and the reply behind it if it is the last.
    fn place(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &mut Request,
        mut buffer: Buffer,
        count: usize,
    ) -> Option<Step> {
        let length = u32::try_from(count).unwrap_or(u32::MAX);
        let (Some(remote), Some(at)) = (request.region.part(request.next, length), request.binding) else {
            // Checked at admission.
            self.give(buffer);
            request.answer = Some((Status::Internal, 0));
            return Some(Step::Again);
        };
        let sequence = self.send_sequence;
        let Some(binding) = self.bindings.at_mut(at) else {
            self.give(buffer);
            request.answer = Some((Status::NotBound, 0));
            return Some(Step::Again);
        };
        let mut digest = None;
        if count == 0 {
            self.give(buffer);
        } else {
            match binding.payload_out.protect(sequence, &mut buffer[..count]) {
                Ok(tag) => digest = tag,
                Err(_) => {
                    self.give(buffer);
                    request.answer = Some((Status::Internal, 0));
                    return Some(Step::Again);
                }
            }
            binding.transport_ops += 1;
            if !self.submit(cx, Token::Place { slot: at }, Operation::Place { buffer, remote }) {
                if let Some(binding) = self.bindings.at_mut(at) {
                    binding.transport_ops -= 1;
                }
                return Some(Step::Next);
            }
        }
        request.next += length;
        if request.at_end || request.next == request.length {
            self.reply(cx, slot, request, Status::Ok, request.next, digest.as_ref());
            return None;
        }
        Some(Step::Again)
    }

    /// A write whose bytes came with the frame.
    fn step_inline(&mut self, cx: &mut Cx, slot: u16, request: &mut Request, bytes: &mut usize) -> Step {
        if request.storage > 0 {
            return Step::Next;
        }
        let Some(mut message) = request.message.take() else {
            request.answer = Some(match request.failed {
                Some((at, status)) => (status, at),
                None => (Status::Ok, request.length),
            });
            return Step::Again;
        };
        let Some(binding) = request.binding.and_then(|slot| self.bindings.at(slot)) else {
            request.answer = Some((Status::NotBound, 0));
            return Step::Again;
        };
        let payload = request.payload.clone();
        *bytes += payload.len();
        let checked = binding.payload_in.check(
            request.sequence,
            &mut message[payload.clone()],
            request.digest.as_ref(),
        );
        let file = binding.file.clone();
        request.next = request.length;
        let progress = match (checked, &file) {
            (Err(_), _) => Progress::Failed(0, Status::Integrity),
            (Ok(()), None) => Progress::Failed(0, Status::Fenced),
            (Ok(()), Some(file)) => write_now(&**file, &message[payload.clone()], request.offset),
        };
        match progress {
            Progress::Partial(done) => {
                self.hand_over(cx, slot, request, Work::Write, Some(message), payload, 0, done);
                return Step::Next;
            }
            Progress::Complete(_) => {}
            Progress::Failed(done, status) => request.fail(u32::try_from(done).unwrap_or(0), status),
        }
        self.post_receive(cx, message);
        Step::Again
    }

    /// A write whose bytes are in the client's region: begins fetches, and answers when all is done.
    fn step_write(&mut self, cx: &mut Cx, slot: u16, request: &mut Request) -> Step {
        while request.failed.is_none()
            && request.next < request.length
            && request.fetches + request.storage < cx.settings.engine.fetches
        {
            let waits = request.in_progress();
            if !self.room(1) {
                return if waits { Step::Next } else { Step::NoRoom };
            }
            let Some(buffer) = self.take(cx) else {
                return if waits { Step::Next } else { Step::NoBuffer };
            };
            let piece = request.next;
            let length = self.piece(cx, request, piece);
            let (Some(remote), Some(at)) = (request.region.part(piece, length), request.binding) else {
                // Checked at admission.
                self.give(buffer);
                request.fail(piece, Status::Internal);
                break;
            };
            if !self.submit(cx, Token::Fetch { slot, piece }, Operation::Fetch { buffer, remote }) {
                return Step::Next;
            }
            if let Some(binding) = self.bindings.at_mut(at) {
                binding.transport_ops += 1;
            }
            request.fetches += 1;
            request.next += length;
        }
        if request.in_progress() {
            return Step::Next;
        }
        let status = request.failed.map_or(Status::Ok, |(_, status)| status);
        request.answer = Some((status, request.applied()));
        Step::Again
    }

    /// Bytes of the piece that begins at `piece`.
    fn piece(&self, cx: &Cx, request: &Request, piece: u32) -> u32 {
        let max = u32::try_from(self.piece_max(cx)).unwrap_or(u32::MAX);
        max.min(request.length.saturating_sub(piece))
    }

    /// A piece of a write came from the client.
    pub(super) fn fetched(&mut self, cx: &mut Cx, slot: u16, piece: u32, mut buffer: Buffer, came: bool) {
        let Some(mut request) = self.requests.get_mut(usize::from(slot)).and_then(Option::take) else {
            return self.give(buffer);
        };
        request.fetches = request.fetches.saturating_sub(1);
        let length = self.piece(cx, &request, piece) as usize;
        let open = self.phase == Phase::Open;
        let Some(binding) = request.binding.and_then(|slot| self.bindings.at_mut(slot)) else {
            return self.give(buffer);
        };
        binding.transport_ops = binding.transport_ops.saturating_sub(1);
        let progress = match (binding.serves(), &binding.file) {
            _ if !came || !open => Progress::Failed(0, Status::Io),
            (Err(status), _) => Progress::Failed(0, status),
            (Ok(()), None) => Progress::Failed(0, Status::Fenced),
            // After a failure before it, nothing more is written.
            _ if request.failed.is_some_and(|(at, _)| at < piece) => Progress::Failed(0, Status::Io),
            (Ok(()), Some(file)) => {
                let data = &mut buffer[..length];
                match binding.payload_in.check(request.sequence, data, request.digest.as_ref()) {
                    Err(_) => Progress::Failed(0, Status::Integrity),
                    Ok(()) => write_now(&**file, data, request.offset + u64::from(piece)),
                }
            }
        };
        match progress {
            Progress::Complete(_) => self.give(buffer),
            Progress::Partial(done) => {
                self.hand_over(cx, slot, &mut request, Work::Write, Some(buffer), 0..length, piece, done);
            }
            Progress::Failed(done, status) => {
                self.give(buffer);
                request.fail(piece + u32::try_from(done).unwrap_or(0), status);
            }
        }
        self.requests[usize::from(slot)] = Some(request);
        if open {
            self.requeue(slot);
        }
    }

    /// Gives work to a storage thread.
    #[allow(clippy::too_many_arguments)] // each is one field of the job
    fn hand_over(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &mut Request,
        work: Work,
        buffer: Option<Buffer>,
        range: Range<usize>,
        piece: u32,
        done: usize,
    ) {
        let Some(binding) = request.binding.and_then(|slot| self.bindings.at_mut(slot)) else { return };
        let Some(file) = binding.file.as_ref().map(Arc::clone) else { return };
        binding.storage_ops += 1;
        self.storage_ops += 1;
        request.storage += 1;
        cx.storage.submit(Job {
            tag: Tag { worker: cx.worker, conn: self.key, slot, piece },
            work,
            file,
            buffer,
            range,
            at: request.offset + u64::from(piece),
            done,
        });
    }

    /// A storage thread has done its work.
    pub(crate) fn storage_done(&mut self, cx: &mut Cx, done: Done) {
        let Done { tag, work, buffer, length, progress } = done;
        self.storage_ops = self.storage_ops.saturating_sub(1);
        let taken = self.requests.get_mut(usize::from(tag.slot)).and_then(Option::take);
        let Some(mut request) = taken else {
            tracing::error!("a storage result for a request that is gone");
            return;
        };
        request.storage = request.storage.saturating_sub(1);
        if let Some(binding) = request.binding.and_then(|slot| self.bindings.at_mut(slot)) {
            binding.storage_ops = binding.storage_ops.saturating_sub(1);
        }
        let inline = !request.payload.is_empty();
        match (work, progress, buffer) {
            (Work::Read, Progress::Complete(count), Some(buffer)) if self.phase == Phase::Open => {
                request.at_end = count < length;
                request.filled = Some((buffer, count));
            }
            (Work::Flush { .. }, progress, _) => {
                let status = if let Progress::Failed(_, status) = progress { status } else { Status::Ok };
                request.answer = Some((status, 0));
            }
            (work, progress, buffer) => {
                if let Progress::Failed(count, status) = progress {
                    let count = if work == Work::Read { 0 } else { u32::try_from(count).unwrap_or(0) };
                    request.fail(tag.piece + count, status);
                }
                match buffer {
                    Some(message) if inline => self.post_receive(cx, message),
                    Some(buffer) => self.give(buffer),
                    None => {}
                }
            }
        }
        request.parked = false;
        self.requests[usize::from(tag.slot)] = Some(request);
        if self.phase == Phase::Open {
            self.requeue(tag.slot);
        }
        if self.draining > 0 {
            self.finish_drains(cx);
        }
    }

    /// Puts a request back among those with something to do, once; before those that have not begun, as it may hold a
    /// buffer which they wait for.
    fn requeue(&mut self, slot: u16) {
        if let Some(Some(request)) = self.requests.get_mut(usize::from(slot)) {
            request.parked = false;
        }
        if !self.ready.contains(&slot) {
            self.ready.push_front(slot);
        }
        self.urgent = true;
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
        for slot in 0..self.requests.len() {
            let Some(request) = &mut self.requests[slot] else { continue };
            request.message = None;
            if let Some((buffer, _)) = request.filled.take() {
                self.give(buffer);
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
