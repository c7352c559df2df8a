//! The sending side: frames in order, header and payload gathered into as few calls as there can be.
//!
//! ```text
//!   queue: [ header | buffer ] [ header ] [ header | region ] ...  ──► wire
//!            ▲ sent bytes are kept per frame; only the first can be sent in part
//! ```
//!
//! A Place or Fetch whose turn has come is first tried on the peer's memory itself, where the wire may get at it. If that does not
//! do, for whatever reason, its frame is sent: the peer knows whether to answer or to refuse it.

use super::fetches::Fetches;
use super::framing::{Frame, HEADER_BYTES, Refusal};
use super::{Ending, PIECES_MAX, Piece, Wire};
use crate::channel::{Completion, FilePart, Kind, OperationError, ViewPlaced};
use crate::region_table::{Live, Target, Wanted};
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::{Buffer, FileMapping};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Bytes moved to and from the peer's memory after which others have their turn.
const DIRECT_BYTES_MAX: usize = 2 << 20;
/// Set in the numbers of Places, and not in those of Fetches: a refusal names one or the other.
const PLACE_TAG: u32 = 1 << 31;

/// A buffer whose operation is done when the frame has been sent.
pub(super) struct Owned {
    pub(super) token: u64,
    pub(super) kind: Kind,
    pub(super) buffer: Buffer,
    pub(super) length: usize,
}

impl Owned {
    pub(super) fn complete(self, outcome: Result<usize, OperationError>) -> Completion {
        Completion::new(self.token, self.kind, self.buffer, outcome)
    }
}

enum Payload {
    None,
    Owned(Owned),
    /// Part of a file, there only while [`Transmit::push_file`] runs.
    File(Arc<FileMapping>, Range<usize>),
    /// The answer to a Fetch.
    Answer(Target),
}

impl Payload {
    fn length(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Owned(owned) => owned.length,
            Self::File(_, range) => range.len(),
            Self::Answer(target) => target.length(),
        }
    }
}

struct Outgoing {
    header: [u8; HEADER_BYTES],
    payload: Payload,
    /// Bytes of header and payload that the wire has taken.
    sent: usize,
    /// The number on the wire, by which a Place can be refused.
    tag: u32,
    /// A Place or Fetch that has not been tried on the peer's memory.
    untried: Option<RegionDescriptor>,
}

impl Outgoing {
    fn left(&self) -> usize {
        HEADER_BYTES + self.payload.length() - self.sent
    }

    fn is_unbegun_file(&self) -> bool {
        self.sent == 0 && matches!(self.payload, Payload::File(..))
    }

    fn is_begun_file(&self) -> bool {
        self.sent > 0 && matches!(self.payload, Payload::File(..))
    }
}

/// True if it is a mapped file that has ended it, which was cut short: nothing was sent then.
fn has_lost_its_pages(ending: &Ending) -> bool {
    let errno = if let Ending::Io(error) = ending { rustix::io::Errno::from_io_error(error) } else { None };
    errno == Some(rustix::io::Errno::FAULT)
}

/// Frames to be sent.
pub(super) struct Transmit {
    queue: VecDeque<Outgoing>,
    /// Answers to Fetches among them.
    answers: usize,
    /// The wire took less than it was given: it will tell when it takes more.
    blocked: bool,
    places: u32,
    /// Places and Fetches are tried on the peer's memory.
    is_direct: bool,
}

impl Transmit {
    pub(super) fn with_capacity(count: usize, is_direct: bool) -> Self {
        Self { queue: VecDeque::with_capacity(count), answers: 0, blocked: false, places: 0, is_direct }
    }

    /// True if `push` could get on without waiting for the wire.
    pub(super) fn is_pending(&self) -> bool {
        !self.queue.is_empty() && !self.blocked
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Answers that are not sent yet.
    pub(super) fn answers(&self) -> usize {
        self.answers
    }

    fn add(&mut self, frame: Frame) {
        self.enqueue(frame, Payload::None, 0, None);
    }

    pub(super) fn add_message(&mut self, owned: Owned, descriptor: bool) {
        // Lengths were held against LENGTH_MAX when the operation was accepted.
        let length = u32::try_from(owned.length).unwrap_or(u32::MAX);
        self.enqueue(Frame::Message { length, descriptor }, Payload::Owned(owned), 0, None);
    }

    pub(super) fn add_fetch(&mut self, remote: RegionDescriptor, tag: u32) {
        self.enqueue(Frame::Fetch { remote, tag }, Payload::None, tag, Some(remote));
    }

    pub(super) fn add_place(&mut self, owned: Owned, remote: RegionDescriptor) {
        let tag = self.place_tag();
        self.enqueue(Frame::Place { remote, tag }, Payload::Owned(owned), tag, Some(remote));
    }

    fn place_tag(&mut self) -> u32 {
        self.places = self.places.wrapping_add(1);
        PLACE_TAG | self.places
    }

    pub(super) fn add_answer(&mut self, target: Target, tag: u32) {
        let length = u32::try_from(target.length()).unwrap_or(u32::MAX);
        self.answers += 1;
        self.enqueue(Frame::FetchData { length, tag }, Payload::Answer(target), tag, None);
    }

    fn enqueue(&mut self, frame: Frame, payload: Payload, tag: u32, remote: Option<RegionDescriptor>) {
        let untried = remote.filter(|_| self.is_direct);
        self.queue.push_back(Outgoing { header: frame.encode(), payload, sent: 0, tag, untried });
    }

    /// Sends until the queue is empty, the wire full, or enough was moved for one turn. Returns true if anything went.
    pub(super) fn push<W: Wire>(
        &mut self,
        wire: &mut W,
        fetches: &mut Fetches,
        ready: &mut VecDeque<Completion>,
    ) -> Result<bool, Ending> {
        let (mut moved, mut direct) = (false, 0);
        while !self.queue.is_empty() {
            if let Some(count) = self.reach(wire, fetches, ready)? {
                (moved, self.blocked) = (true, false);
                direct += count;
                if direct >= DIRECT_BYTES_MAX {
                    break;
                }
                continue;
            }
            let (given, outcome) = self.send_once(wire)?;
            let taken = outcome.unwrap_or(0);
            moved |= taken > 0;
            self.advance(taken, ready);
            // Only a call that took nothing promises an edge; where it costs a system call, one that took less does too.
            self.blocked = outcome.is_none() || (!W::IS_CHEAP && taken < given);
            if self.blocked {
                break;
            }
        }
        Ok(moved)
    }

    /// Tries the first operation on the peer's memory, if it is to be tried. If that did, it is done: so many bytes.
    fn reach(
        &mut self,
        wire: &mut impl Wire,
        fetches: &mut Fetches,
        ready: &mut VecDeque<Completion>,
    ) -> Result<Option<usize>, Ending> {
        let Some(first) = self.queue.front_mut() else { return Ok(None) };
        let Some(remote) = first.untried.take() else { return Ok(None) };
        let mut moved = false;
        let reached = match &first.payload {
            Payload::Owned(owned) => {
                let bytes = owned.buffer.get(..owned.length).unwrap_or_default();
                wire.reach(remote, Wanted::Place, &mut |there| moved = there.store(bytes).is_ok())?
            }
            Payload::None => match fetches.room(first.tag) {
                Some(room) => {
                    wire.reach(remote, Wanted::Fetch, &mut |there| moved = there.load(room).is_ok())?
                }
                None => false,
            },
            Payload::File(..) | Payload::Answer(_) => false,
        };
        if !reached || !moved {
            return Ok(None);
        }
        let length = remote.length() as usize;
        if let Some(Outgoing { payload, tag, .. }) = self.queue.pop_front() {
            match payload {
                Payload::Owned(owned) => ready.push_back(owned.complete(Ok(length))),
                Payload::None | Payload::File(..) | Payload::Answer(_) => {
                    fetches.arrived();
                    ready.extend(fetches.answered(tag).map(|pending| pending.complete(Ok(length))));
                }
            }
        }
        Ok(Some(length))
    }

    /// One call: how many bytes were given, and how many were taken.
    fn send_once(&self, wire: &mut impl Wire) -> Result<(usize, Option<usize>), Ending> {
        // No registration named here is withdrawn while these are held.
        let mut live: [Option<Live<'_>>; PIECES_MAX] = std::array::from_fn(|_| None);
        let mut pieces: [Piece<'_>; PIECES_MAX] = std::array::from_fn(|_| Piece::Slice(&[]));
        let (mut used, mut given) = (0, 0);
        for frame in &self.queue {
            if used + 2 > PIECES_MAX || frame.untried.is_some() {
                break;
            }
            if let Some(header) = frame.header.get(frame.sent..).filter(|rest| !rest.is_empty()) {
                pieces[used] = Piece::Slice(header);
                used += 1;
            }
            let done = frame.sent.saturating_sub(HEADER_BYTES);
            let payload = match &frame.payload {
                Payload::None => None,
                Payload::Owned(owned) => owned.buffer.get(done..owned.length).map(Piece::Slice),
                Payload::File(view, range) => Some(Piece::File(view, range.start + done..range.end)),
                Payload::Answer(target) => {
                    live[used] = target.lock();
                    if live[used].is_none() {
                        return Err(withdrawn(frame));
                    }
                    Some(Piece::Region(target.region(), target.rest(done)))
                }
            };
            if let Some(payload) = payload.filter(|payload| payload.len() > 0) {
                pieces[used] = payload;
                used += 1;
            }
            given += frame.left();
        }
        Ok((given, wire.send(&pieces[..used])?))
    }

    /// Counts bytes as sent; operations whose last byte is among them are done.
    fn advance(&mut self, mut taken: usize, ready: &mut VecDeque<Completion>) {
        while let Some(frame) = self.queue.front_mut() {
            let step = taken.min(frame.left());
            frame.sent += step;
            taken -= step;
            if frame.left() > 0 {
                break;
            }
            let Some(frame) = self.queue.pop_front() else { break };
            match frame.payload {
                Payload::Owned(owned) => {
                    let length = owned.length;
                    ready.push_back(owned.complete(Ok(length)));
                }
                Payload::Answer(_) => self.answers -= 1,
                Payload::None | Payload::File(..) => {}
            }
        }
    }

    /// Sends a part of a file, and what is in front of it, now: nothing of the file is looked at later. Of the frame in which the wire
    /// stops, the rest is filled into the buffer, and goes from there; those behind it are not begun.
    pub(super) fn push_file<W: Wire>(
        &mut self,
        wire: &mut W,
        fetches: &mut Fetches,
        ready: &mut VecDeque<Completion>,
        part: FilePart<'_>,
    ) -> ViewPlaced {
        let FilePart { token, view, range, remote, mut buffer, fill } = part;
        let (mut queued, piece_max) = (0, u32::try_from(buffer.len()).unwrap_or(u32::MAX));
        while let Some(remote) = remote.part(queued, piece_max.min(remote.length() - queued)) {
            if remote.length() == 0 {
                break;
            }
            let start = range.start + queued as usize;
            let payload = Payload::File(Arc::clone(view), start..start + remote.length() as usize);
            let tag = self.place_tag();
            self.enqueue(Frame::Place { remote, tag }, payload, tag, None);
            queued += remote.length();
        }
        let mut outcome = self.push(wire, fetches, ready);
        // The wire has taken some of what was in front and stopped: whether for want of room, or as the file has lost its pages, the next
        // call tells.
        while matches!(outcome, Ok(true))
            && self.queue.back().is_some_and(Outgoing::is_unbegun_file)
            && !self.queue.front().is_some_and(Outgoing::is_begun_file)
        {
            outcome = self.push(wire, fetches, ready);
        }
        let mut placed = queued as usize;
        while let Some(unbegun) = self.queue.back().filter(|frame| frame.is_unbegun_file()) {
            placed -= unbegun.payload.length();
            self.queue.pop_back();
        }
        let begun = self.queue.back_mut().filter(|frame| matches!(frame.payload, Payload::File(..)));
        if let Some(frame) = begun {
            let (done, length) = (frame.sent.saturating_sub(HEADER_BYTES), frame.payload.length());
            if let Some(rest) = buffer.get_mut(done..length) {
                fill(rest, placed - length + done);
            }
            frame.payload = Payload::Owned(Owned { token, kind: Kind::Place, buffer, length });
            // It may be for lost pages that the wire stopped: then it makes no edge.
            self.blocked = false;
            return ViewPlaced::Begun(placed);
        }
        match outcome {
            _ if placed > 0 => ViewPlaced::Done(buffer, placed),
            Err(ending) if has_lost_its_pages(&ending) => ViewPlaced::Unable(buffer),
            // If it is an error, the next call has it too.
            _ => ViewPlaced::Full(buffer),
        }
    }

    /// Tells the peer why the connection ends, if what is being sent and this still go into the wire. Everything
    /// else is dropped from the queue; buffers complete as failed.
    pub(super) fn refuse(
        &mut self,
        wire: &mut impl Wire,
        refusal: Refusal,
        tag: u32,
        ready: &mut VecDeque<Completion>,
    ) {
        let begun = self.queue.front().is_some_and(|frame| frame.sent > 0);
        let first = begun.then(|| self.queue.pop_front()).flatten();
        self.flush(None, ready);
        self.answers = first.iter().filter(|frame| matches!(frame.payload, Payload::Answer(_))).count();
        self.queue.extend(first);
        self.add(Frame::Refused { refusal, tag });
        // Best effort: a peer that does not read is not told.
        while let Ok((given, Some(taken))) = self.send_once(wire) {
            self.advance(taken, ready);
            if taken < given || self.queue.is_empty() {
                break;
            }
        }
        self.flush(None, ready);
    }

    /// Completes everything as flushed, but a Place that the peer refused as such.
    pub(super) fn flush(&mut self, refused: Option<u32>, ready: &mut VecDeque<Completion>) {
        for frame in self.queue.drain(..) {
            if let Payload::Owned(owned) = frame.payload {
                let is_refused = owned.kind == Kind::Place && refused == Some(frame.tag);
                let error = if is_refused { OperationError::RemoteAccess } else { OperationError::Flushed };
                ready.push_back(owned.complete(Err(error)));
            }
        }
        self.answers = 0;
    }
}

/// The registration went away under an answer.
fn withdrawn(frame: &Outgoing) -> Ending {
    Ending::Refuse {
        why: "it fetches from memory that was withdrawn",
        refusal: Refusal::Access,
        tag: frame.tag,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{Registrar, RemoteAccess};
    use crate::region_table::{RegionTable, TableRegistrar};
    use holdfast_verbs::memory::Region;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_refusal_follows_an_answer_that_is_half_sent() {
        const LENGTH: usize = 160 << 10;
        let registrar = TableRegistrar(RegionTable::new());
        let registration = registrar.register(Region::new(LENGTH).unwrap(), RemoteAccess::Fetch).unwrap();
        let target = || registrar.0.find(registration.descriptor(), Wanted::Fetch).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&ours, 64 << 10).unwrap();
        let mut wire = crate::stream::SocketWire(ours.into());
        let (mut transmit, mut ready) = (Transmit::with_capacity(4, false), VecDeque::new());
        transmit.add_answer(target(), 1);
        transmit.add_answer(target(), 2);
        assert!(transmit.push(&mut wire, &mut Fetches::with_capacity(0), &mut ready).is_ok());
        assert!(transmit.queue.front().is_some_and(|first| first.sent > 0), "the wire took a part");
        assert_eq!(transmit.answers(), 2);
        // The peer makes room, for the rest of the first.
        theirs.set_nonblocking(true).unwrap();
        let (mut seen, mut bytes) = (0, vec![0; 64 << 10]);
        while let Ok(count) = theirs.read(&mut bytes) {
            seen += count;
        }
        transmit.refuse(&mut wire, Refusal::Access, 9, &mut ready);
        assert_eq!((transmit.answers(), transmit.queue.len()), (0, 0));
        drop(wire);
        let mut rest = Vec::new();
        theirs.set_nonblocking(false).unwrap();
        theirs.read_to_end(&mut rest).unwrap();
        let answer = HEADER_BYTES + LENGTH - seen;
        assert_eq!(
            rest.len(),
            answer + HEADER_BYTES,
            "the rest of the first answer, and nothing of the second"
        );
        assert_eq!(rest[answer..], Frame::Refused { refusal: Refusal::Access, tag: 9 }.encode());
    }
}
