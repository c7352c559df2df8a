//! Moving the bytes of a request: reads, writes and inline writes, piece by piece.
//!
//! ```text
//!  read:   [ buffer ─► page cache or storage ─► Place ]… placed one after another ─► reply, right behind the last Place
//!  long read of pinned pages: see `place`; of mapped ones: see `views`; client on this host: see `straight`
//!  write:  [ buffer ─► Fetch ─► page cache or storage ]… several at once ───► reply
//!  inline: message buffer ─► page cache or storage ─────────────────────────► reply
//! ```
//!
//! A piece is never larger than a buffer, and a request needs no second buffer to give the first one back: what holds a
//! buffer can always finish. Reads go piece by piece, so that no byte past the count is ever placed.

use super::backend::{Progress, read_now, write_now};
use super::channel::{Conn, Cx, Phase, Token};
use super::filled::{AHEAD, Piece};
use super::request::{Request, Step};
use super::storage::{Done, Job, Tag, Work};
use holdfast_shared::types::Status;
use holdfast_transport::Operation;
use holdfast_verbs::memory::Buffer;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of one channel that are being fetched at once, at most: enough for any wire, and what has just come is still in the processor's
/// cache when it is written, as is the buffer that the next one goes to.
const FETCHING_BYTES_MAX: u32 = 2 << 20;

impl Conn {
    /// One piece of a read. `None`: it was answered.
    pub(super) fn step_read(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &mut Request,
        bytes: &mut usize,
    ) -> Option<Step> {
        if let Some((at, status)) = request.failed {
            debug_assert!(at <= request.length);
            if request.storage > 0 {
                return Some(Step::Next);
            }
            while let Some(piece) = request.filled.pop() {
                self.give(piece.buffer);
            }
            request.answer = Some((status, 0));
            return Some(Step::Again);
        }
        let lacks_buffer = self.ask_ahead(cx, slot, request);
        if request.storage > 0 && request.filled.at(request.next).is_none_or(|piece| piece.is_last) {
            // The next piece is on its way; or it is the last, and others are that nobody needs.
            return Some(Step::Next);
        }
        if lacks_buffer && request.filled.is_empty() {
            return Some(Step::NoBuffer);
        }
        if request.next == 0 && request.filled.is_empty() {
            if let Some(step) = self.step_pinned(cx, slot, request, bytes) {
                return step;
            }
        }
        // A piece is read only when it can be placed and the reply sent right behind it.
        if !self.room(2) || !self.can_reply() {
            return Some(Step::NoRoom);
        }
        if request.filled.is_empty() {
            let step = self.read_straight(cx, slot, request, bytes);
            if let Some(step) = step.or_else(|| self.read_viewed(cx, slot, request, bytes)) {
                return step;
            }
        }
        let (buffer, count) = match request.filled.take(request.next) {
            Some(Piece { buffer, count, is_last, .. }) => {
                request.at_end = is_last;
                if is_last {
                    // Read in vain: the file ends before them.
                    while let Some(piece) = request.filled.pop() {
                        self.give(piece.buffer);
                    }
                }
                (buffer, count)
            }
            None => {
                let Some(mut buffer) = self.take(cx) else { return Some(Step::NoBuffer) };
                let length = self.piece_max(cx).min((request.length - request.next) as usize);
                let at = request.offset + u64::from(request.next);
                let Some(file) = request.binding.and_then(|b| self.bindings.get(b)?.file.clone()) else {
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

    /// Asks storage for the next pieces of a read that goes past the page cache, several at once: each is a way to the disk. True if
    /// there was no buffer for the first of them.
    fn ask_ahead(&mut self, cx: &mut Cx, slot: u16, request: &mut Request) -> bool {
        let file = request.binding.and_then(|name| self.bindings.get(name)?.file.as_ref());
        let ahead =
            file.and_then(|file| file.direct()).is_some_and(|direct| direct.begins(0, request.offset));
        // Behind the end of the file there is nothing to be had.
        if !ahead || request.filled.has_last() {
            return false;
        }
        let max = AHEAD.min(cx.settings.engine.fetches.into());
        while request.asked < request.length && request.filled.len() + usize::from(request.storage) < max {
            let Some(buffer) = self.take(cx) else {
                return request.storage == 0 && request.filled.is_empty();
            };
            let at = request.asked;
            let length = self.piece(cx, request, at);
            request.asked += length;
            self.hand_over(cx, slot, request, Work::Read, Some(buffer), 0..length as usize, at, 0);
        }
        false
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
        let Some(binding) = self.bindings.get_mut(at) else {
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
            if !self.submit(cx, Token::Place { binding: at }, Operation::Place { buffer, remote }) {
                if let Some(binding) = self.bindings.get_mut(at) {
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
    pub(super) fn step_inline(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &mut Request,
        bytes: &mut usize,
    ) -> Step {
        if request.storage > 0 {
            return Step::Next;
        }
        if request.message.is_none() {
            request.answer = Some(match request.failed {
                Some((at, status)) => (status, at),
                None => (Status::Ok, request.length),
            });
            return Step::Again;
        }
        // Past the page cache bytes must be aligned: those of a message are not, those of a buffer are.
        let file = request.binding.and_then(|name| self.bindings.get(name)?.file.as_ref());
        let direct = file.and_then(|file| file.direct());
        let aligned = if direct.is_some_and(|direct| direct.fits(0, request.payload.len(), request.offset)) {
            let Some(buffer) = self.take(cx) else { return Step::NoBuffer };
            Some(buffer)
        } else {
            None
        };
        let Some(mut message) = request.message.take() else { return Step::Again };
        let Some(binding) = request.binding.and_then(|name| self.bindings.get(name)) else {
            request.answer = Some((Status::NotBound, 0));
            return Step::Again;
        };
        let by = binding.name();
        let payload = request.payload.clone();
        *bytes += payload.len();
        let checked = binding.payload_in.check(
            request.sequence,
            &mut message[payload.clone()],
            request.digest.as_ref(),
        );
        let file = binding.file.clone();
        request.next = request.length;
        if let Some(mut buffer) = aligned {
            if checked.is_ok() && file.is_some() {
                buffer[..payload.len()].copy_from_slice(&message[payload.clone()]);
                self.post_receive(cx, message);
                // From here on it is a write like those whose bytes were fetched.
                request.payload = 0..0;
                self.hand_over(cx, slot, request, Work::Write, Some(buffer), 0..payload.len(), 0, 0);
                return Step::Next;
            }
            self.give(buffer);
        }
        let progress = match (checked, &file) {
            (Err(_), _) => Progress::Failed(0, Status::Integrity),
            (Ok(()), None) => Progress::Failed(0, Status::Fenced),
            (Ok(()), Some(file)) => {
                self.written.begin(&cx.last_write, by);
                write_now(&**file, &message[payload.clone()], request.offset)
            }
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
    pub(super) fn step_write(
        &mut self,
        cx: &mut Cx,
        slot: u16,
        request: &mut Request,
        bytes: &mut usize,
    ) -> Step {
        while request.failed.is_none()
            && request.next < request.length
            && request.fetches + request.storage < cx.settings.engine.fetches
        {
            if self.write_straight(cx, request, bytes) {
                return Step::Again;
            }
            let waits = request.in_progress();
            let piece = request.next;
            let length = self.piece(cx, request, piece);
            if !self.room(1) {
                return if waits { Step::Next } else { Step::NoRoom };
            }
            // Each of those gives a buffer back: then it goes on, and others are not held up meanwhile.
            if self.fetching > 0 && self.fetching.saturating_add(length) > FETCHING_BYTES_MAX {
                return if waits { Step::Next } else { Step::NoBuffer };
            }
            let Some(buffer) = self.take(cx) else {
                return if waits { Step::Next } else { Step::NoBuffer };
            };
            let (Some(remote), Some(at)) = (request.region.part(piece, length), request.binding) else {
                // Checked at admission.
                self.give(buffer);
                request.fail(piece, Status::Internal);
                break;
            };
            if !self.submit(cx, Token::Fetch { slot, piece }, Operation::Fetch { buffer, remote }) {
                return Step::Next;
            }
            self.fetching += length;
            if let Some(binding) = self.bindings.get_mut(at) {
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
    pub(super) fn piece(&self, cx: &Cx, request: &Request, piece: u32) -> u32 {
        let max = u32::try_from(self.piece_max(cx)).unwrap_or(u32::MAX);
        max.min(request.length.saturating_sub(piece))
    }

    /// A piece of a write came from the client.
    pub(super) fn fetched(&mut self, cx: &mut Cx, slot: u16, piece: u32, mut buffer: Buffer, came: bool) {
        let Some(mut request) = self.requests.get_mut(usize::from(slot)).and_then(Option::take) else {
            // None goes before its fetches have come back; a count that is too low does no harm.
            self.fetching = 0;
            return self.give(buffer);
        };
        let length = self.piece(cx, &request, piece);
        self.fetching = self.fetching.saturating_sub(length);
        let length = length as usize;
        request.fetches = request.fetches.saturating_sub(1);
        let open = self.phase == Phase::Open;
        let Some(binding) = request.binding.and_then(|name| self.bindings.get_mut(name)) else {
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
                    Ok(()) => {
                        self.written.begin(&cx.last_write, binding.name());
                        write_now(&**file, data, request.offset + u64::from(piece))
                    }
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
    pub(super) fn hand_over(
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
        let Some(binding) = request.binding.and_then(|name| self.bindings.get_mut(name)) else { return };
        let Some(file) = binding.file.as_ref().map(Arc::clone) else { return };
        let latch = matches!(work, Work::Flush { .. }).then(|| Arc::clone(&binding.latch));
        binding.storage_ops += 1;
        self.storage_ops += 1;
        request.storage += 1;
        cx.storage.submit(Job {
            tag: Tag { worker: cx.worker, conn: self.key, slot, piece },
            work,
            file,
            latch,
            buffer,
            range,
            at: request.offset + u64::from(piece),
            done,
        });
    }

    /// A storage thread has done its work.
    pub(crate) fn storage_done(&mut self, cx: &mut Cx, done: Done) {
        let Done { tag, work, buffer, length, progress, written_ns } = done;
        self.storage_ops = self.storage_ops.saturating_sub(1);
        let taken = self.requests.get_mut(usize::from(tag.slot)).and_then(Option::take);
        let Some(mut request) = taken else {
            tracing::error!("a storage result for a request that is gone");
            return;
        };
        request.storage = request.storage.saturating_sub(1);
        if let Some(binding) = request.binding.and_then(|name| self.bindings.get_mut(name)) {
            binding.storage_ops = binding.storage_ops.saturating_sub(1);
            binding.last_write_ns = binding.last_write_ns.max(written_ns);
        }
        let inline = !request.payload.is_empty();
        match (work, progress, buffer) {
            (Work::Read, Progress::Complete(count), Some(buffer)) if self.phase == Phase::Open => {
                let piece = Piece { at: tag.piece, buffer, count, is_last: count < length };
                if let Err(piece) = request.filled.put(piece) {
                    tracing::error!("more pieces of a read than were asked for: our own fault");
                    self.give(piece.buffer);
                    request.fail(tag.piece, Status::Internal);
                }
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
}
