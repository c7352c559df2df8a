//! The sending side: frames in order, header and payload gathered into as few system calls as there can be.
//!
//! ```text
//!   queue: [ header | buffer ] [ header ] [ header | region ] ...  ──sendmsg──► socket
//!            ▲ sent bytes are kept per frame; only the first can be sent in part
//! ```

use super::Ending;
use super::framing::{Frame, HEADER_BYTES, Refusal};
use crate::channel::{Completion, Kind, OperationError};
use crate::region_table::{Live, Target};
use holdfast_verbs::memory::{
    Buffer, MAX_SEGMENTS, SendSegment, send_segments, send_segments_and_descriptor,
};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

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
    /// The answer to a Fetch.
    Answer(Target),
}

impl Payload {
    fn length(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Owned(owned) => owned.length,
            Self::Answer(target) => target.length(),
        }
    }
}

struct Outgoing {
    header: [u8; HEADER_BYTES],
    payload: Payload,
    /// Bytes of header and payload that the socket has taken.
    sent: usize,
    /// The number on the wire, by which a Place can be refused.
    tag: u32,
    /// Goes with the first byte, and is gone then.
    descriptor: Option<OwnedFd>,
}

impl Outgoing {
    fn left(&self) -> usize {
        HEADER_BYTES + self.payload.length() - self.sent
    }
}

/// Frames to be sent.
pub(super) struct Transmit {
    queue: VecDeque<Outgoing>,
    /// Answers to Fetches among them.
    answers: usize,
    /// The socket took less than it was given: it will tell when it takes more.
    blocked: bool,
    places: u32,
}

impl Transmit {
    pub(super) fn with_capacity(count: usize) -> Self {
        Self { queue: VecDeque::with_capacity(count), answers: 0, blocked: false, places: 0 }
    }

    /// True if `push` could get on without waiting for the socket.
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

    pub(super) fn add(&mut self, frame: Frame) {
        self.enqueue(frame, Payload::None, 0);
    }

    pub(super) fn add_message(&mut self, owned: Owned, descriptor: Option<OwnedFd>) {
        // Lengths were held against LENGTH_MAX when the operation was accepted.
        let length = u32::try_from(owned.length).unwrap_or(u32::MAX);
        let frame = Frame::Message { length, descriptor: descriptor.is_some() };
        self.enqueue(frame, Payload::Owned(owned), 0);
        if let Some(last) = self.queue.back_mut() {
            last.descriptor = descriptor;
        }
    }

    pub(super) fn add_place(&mut self, owned: Owned, remote: holdfast_shared::types::RegionDescriptor) {
        self.places = self.places.wrapping_add(1);
        let tag = PLACE_TAG | self.places;
        self.enqueue(Frame::Place { remote, tag }, Payload::Owned(owned), tag);
    }

    pub(super) fn add_answer(&mut self, target: Target, tag: u32) {
        let length = u32::try_from(target.length()).unwrap_or(u32::MAX);
        self.answers += 1;
        self.enqueue(Frame::FetchData { length, tag }, Payload::Answer(target), tag);
    }

    fn enqueue(&mut self, frame: Frame, payload: Payload, tag: u32) {
        self.queue.push_back(Outgoing { header: frame.encode(), payload, sent: 0, tag, descriptor: None });
    }

    /// Sends until the queue is empty or the socket full. Returns true if the socket took anything.
    pub(super) fn push(
        &mut self,
        socket: BorrowedFd<'_>,
        ready: &mut VecDeque<Completion>,
    ) -> Result<bool, Ending> {
        let mut moved = false;
        while !self.queue.is_empty() {
            let (given, outcome) = self.send_once(socket)?;
            match outcome {
                Ok(taken) => {
                    moved |= taken > 0;
                    if let Some(first) = self.queue.front_mut().filter(|_| taken > 0) {
                        first.descriptor = None;
                    }
                    self.advance(taken, ready);
                    self.blocked = taken < given;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.blocked = true,
                // Too many descriptors of this process are on their way, perhaps to somebody who does not read: it goes without,
                // and the peer is told as much by finding none.
                Err(error)
                    if rustix::io::Errno::from_io_error(&error) == Some(rustix::io::Errno::TOOMANYREFS) =>
                {
                    let lost = self.queue.front_mut().and_then(|first| first.descriptor.take());
                    if lost.is_none() {
                        return Err(Ending::Io(error));
                    }
                }
                Err(error) => return Err(Ending::Io(error)),
            }
            if self.blocked {
                break;
            }
        }
        Ok(moved)
    }

    /// One system call: how many bytes were given, and what came of it.
    fn send_once(&self, socket: BorrowedFd<'_>) -> Result<(usize, io::Result<usize>), Ending> {
        // No registration named here is withdrawn while these are held.
        let mut live: [Option<Live<'_>>; MAX_SEGMENTS] = std::array::from_fn(|_| None);
        let mut segments: [SendSegment<'_>; MAX_SEGMENTS] = std::array::from_fn(|_| SendSegment::slice(&[]));
        let (mut used, mut given, mut descriptor) = (0, 0, None);
        for frame in &self.queue {
            // A descriptor goes with the first byte of a call: it has a call of its own.
            if used + 2 > MAX_SEGMENTS || descriptor.is_some() || (frame.descriptor.is_some() && used > 0) {
                break;
            }
            descriptor = frame.descriptor.as_ref();
            if let Some(header) = frame.header.get(frame.sent..).filter(|rest| !rest.is_empty()) {
                segments[used] = SendSegment::slice(header);
                used += 1;
            }
            let done = frame.sent.saturating_sub(HEADER_BYTES);
            let payload = match &frame.payload {
                Payload::None => None,
                Payload::Owned(owned) => owned.buffer.get(done..owned.length).map(SendSegment::slice),
                Payload::Answer(target) => {
                    live[used] = target.lock();
                    if live[used].is_none() {
                        return Err(withdrawn(frame));
                    }
                    SendSegment::region(target.region(), target.rest(done)).ok()
                }
            };
            if let Some(payload) = payload.filter(|payload| !payload.is_empty()) {
                segments[used] = payload;
                used += 1;
            }
            given += frame.left();
        }
        let segments = &segments[..used];
        Ok((
            given,
            match descriptor {
                Some(descriptor) => send_segments_and_descriptor(socket, segments, descriptor.as_fd()),
                None => send_segments(socket, segments),
            },
        ))
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
                Payload::None => {}
            }
        }
    }

    /// Tells the peer why the connection ends, if what is being sent and this still go into the socket. Everything
    /// else is dropped from the queue; buffers complete as failed.
    pub(super) fn refuse(
        &mut self,
        socket: BorrowedFd<'_>,
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
        let _ = self.push(socket, ready);
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
    use crate::region_table::{RegionTable, TableRegistrar, Wanted};
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
        let (mut transmit, mut ready) = (Transmit::with_capacity(4), VecDeque::new());
        transmit.add_answer(target(), 1);
        transmit.add_answer(target(), 2);
        assert!(transmit.push(ours.as_fd(), &mut ready).is_ok());
        assert!(transmit.queue.front().is_some_and(|first| first.sent > 0), "the socket took a part");
        assert_eq!(transmit.answers(), 2);
        // The peer makes room, for the rest of the first.
        theirs.set_nonblocking(true).unwrap();
        let (mut seen, mut bytes) = (0, vec![0; 64 << 10]);
        while let Ok(count) = theirs.read(&mut bytes) {
            seen += count;
        }
        transmit.refuse(ours.as_fd(), Refusal::Access, 9, &mut ready);
        assert_eq!((transmit.answers(), transmit.queue.len()), (0, 0));
        drop(ours);
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
