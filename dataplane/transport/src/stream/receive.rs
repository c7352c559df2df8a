//! The receiving side: headers through a small staging buffer, payload straight to where it belongs.
//!
//! ```text
//!   wire ──► [ rest of the payload's destination | staging ]
//!              message: posted Recv buffer          │ next headers, and the payload bytes that
//!              Place:   registered region           │ came with them: copied once
//!              FetchData: the Fetch's buffer        ▼
//! ```
//!
//! The staging buffer is small, so that of a long transfer hardly anything is copied. Over a socket a short frame comes with one
//! call; where calls cost nothing it has room for a header alone.

use super::fetches::{Fetches, Pending};
use super::framing::{FETCHES_MAX, Frame, HEADER_BYTES, Refusal};
use super::send::Transmit;
use super::{Ending, Room, Wire};
use crate::channel::{Completion, Kind, OperationError};
use crate::region_table::{RegionTable, Target, Wanted};
use holdfast_verbs::memory::Buffer;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// Bytes after which one call of `pull` returns, so that a fast peer does not keep its owner from other channels.
const PULL_BYTES_MAX: usize = 8 << 20;

/// Where the payload of the current frame goes.
enum State {
    /// A header comes next.
    Header,
    /// A message that has no buffer yet.
    Unplaced {
        length: usize,
        descriptor: Option<OwnedFd>,
    },
    Message {
        token: u64,
        buffer: Buffer,
        length: usize,
        filled: usize,
        descriptor: Option<OwnedFd>,
    },
    Place {
        target: Target,
        tag: u32,
        filled: usize,
    },
    Data {
        pending: Pending,
        filled: usize,
    },
}

/// What is known of the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Known {
    /// Nothing: there may be bytes.
    Unknown,
    /// The last call did not fill what it was given.
    Short,
    /// The last call found nothing.
    Empty,
}

/// What a frame may act upon.
pub(super) struct Context<'a> {
    pub(super) table: &'a RegionTable,
    pub(super) fetches: &'a mut Fetches,
    pub(super) transmit: &'a mut Transmit,
    pub(super) ready: &'a mut VecDeque<Completion>,
}

/// Bytes and frames on their way in.
pub(super) struct Receive {
    staging: Box<[u8]>,
    /// Bytes of `staging` that are not used up.
    start: usize,
    end: usize,
    state: State,
    posted: VecDeque<(u64, Buffer)>,
    known: Known,
}

impl Receive {
    pub(super) fn new(receives: usize, staging_bytes: usize) -> Self {
        Self {
            staging: vec![0; staging_bytes].into_boxed_slice(),
            start: 0,
            end: 0,
            state: State::Header,
            posted: VecDeque::with_capacity(receives),
            known: Known::Unknown,
        }
    }

    pub(super) fn post(&mut self, token: u64, buffer: Buffer) {
        self.posted.push_back((token, buffer));
    }

    pub(super) fn known(&self) -> Known {
        self.known
    }

    /// The wire has something after all.
    pub(super) fn mark_readable(&mut self) {
        self.known = Known::Unknown;
    }

    /// True if a message waits for a Recv, and nothing is read until one is posted.
    pub(super) fn is_stalled(&self) -> bool {
        matches!(self.state, State::Unplaced { .. }) && self.posted.is_empty()
    }

    /// True if a message that waited has a Recv now.
    pub(super) fn can_resume(&self) -> bool {
        matches!(self.state, State::Unplaced { .. }) && !self.posted.is_empty()
    }

    /// Reads and acts on frames until nothing more has come, a message has no Recv, or enough came for one turn.
    pub(super) fn pull(&mut self, wire: &mut impl Wire, context: &mut Context<'_>) -> Result<(), Ending> {
        self.digest(wire, context)?;
        let mut total = 0;
        while total < PULL_BYTES_MAX && !self.is_stalled() {
            let (room, outcome) = self.read_once(wire)?;
            let Some(count) = outcome else {
                self.known = Known::Empty;
                break;
            };
            total += count;
            self.known = if count < room { Known::Short } else { Known::Unknown };
            self.digest(wire, context)?;
            if count < room {
                break;
            }
        }
        Ok(())
    }

    /// One call: how much room it had, and how much came.
    fn read_once(&mut self, wire: &mut impl Wire) -> Result<(usize, Option<usize>), Ending> {
        // What is staged is less than a header, or `digest` would have used it.
        self.staging.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let staging = self.staging.get_mut(self.end..).unwrap_or_default();
        let staging_room = staging.len();
        let staging = Room::Slice(staging);
        let (direct_room, outcome) = match &mut self.state {
            State::Header | State::Unplaced { .. } => (0, wire.recv(&mut [staging])?),
            State::Message { buffer, length, filled, .. } => {
                let rest = buffer.get_mut(*filled..*length).unwrap_or_default();
                (rest.len(), wire.recv(&mut [Room::Slice(rest), staging])?)
            }
            State::Data { pending, filled } => {
                let rest = pending.buffer.get_mut(*filled..pending.length).unwrap_or_default();
                (rest.len(), wire.recv(&mut [Room::Slice(rest), staging])?)
            }
            State::Place { target, tag, filled } => {
                let Some(_live) = target.lock() else { return Err(place_refused(*tag)) };
                let range = target.rest(*filled);
                (range.len(), wire.recv(&mut [Room::Region(target.region(), range), staging])?)
            }
        };
        if let Some(count) = outcome {
            let direct = count.min(direct_room);
            if let Some(filled) = self.filled() {
                *filled += direct;
            }
            self.end += count - direct;
        }
        Ok((direct_room + staging_room, outcome))
    }

    fn filled(&mut self) -> Option<&mut usize> {
        match &mut self.state {
            State::Header | State::Unplaced { .. } => None,
            State::Message { filled, .. } | State::Place { filled, .. } | State::Data { filled, .. } => {
                Some(filled)
            }
        }
    }

    /// Acts on what is staged, as far as it goes.
    fn digest(&mut self, wire: &mut impl Wire, context: &mut Context<'_>) -> Result<(), Ending> {
        loop {
            match &mut self.state {
                State::Header => {
                    let staged = self.staging.get(self.start..self.end).unwrap_or_default();
                    let Some(header) = staged.first_chunk::<HEADER_BYTES>() else { return Ok(()) };
                    let frame = Frame::decode(header).map_err(Ending::Misbehaved)?;
                    self.start += HEADER_BYTES;
                    self.begin(frame, wire, context)?;
                }
                State::Unplaced { length, descriptor } => {
                    let length = *length;
                    let Some((token, buffer)) = self.posted.pop_front() else { return Ok(()) };
                    let descriptor = descriptor.take();
                    if length > buffer.len() {
                        let outcome = Err(OperationError::Length);
                        context.ready.push_back(Completion::new(token, Kind::Recv, buffer, outcome));
                        return Err(Ending::Refuse {
                            why: "its message is longer than the buffer for it",
                            refusal: Refusal::Length,
                            tag: 0,
                        });
                    }
                    self.state = State::Message { token, buffer, length, filled: 0, descriptor };
                }
                _ => {
                    self.copy_staged()?;
                    if !self.finish(context) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Checks a frame against what is known here, and says where its payload goes.
    fn begin(&mut self, frame: Frame, wire: &mut impl Wire, context: &mut Context<'_>) -> Result<(), Ending> {
        self.state = match frame {
            Frame::Message { length, descriptor } => {
                let descriptor = if descriptor { wire.take_descriptor()? } else { None };
                State::Unplaced { length: length as usize, descriptor }
            }
            Frame::Place { remote, tag } => {
                let target = context.table.find(remote, Wanted::Place).ok_or_else(|| place_refused(tag))?;
                State::Place { target, tag, filled: 0 }
            }
            Frame::Fetch { remote, tag } => {
                if context.transmit.answers() >= FETCHES_MAX {
                    return Err(Ending::Misbehaved("it has more Fetches unanswered than are allowed"));
                }
                let target = context.table.find(remote, Wanted::Fetch).ok_or(Ending::Refuse {
                    why: "it fetches from memory that it may not",
                    refusal: Refusal::Access,
                    tag,
                })?;
                context.transmit.add_answer(target, tag);
                State::Header
            }
            Frame::FetchData { length, tag } => {
                let unasked = Ending::Misbehaved("it answers a Fetch that was not asked");
                let pending = context.fetches.answered(tag).ok_or(unasked)?;
                if pending.length != length as usize {
                    context.ready.push_back(pending.complete(Err(OperationError::Flushed)));
                    return Err(Ending::Misbehaved("it answers a Fetch with another length"));
                }
                State::Data { pending, filled: 0 }
            }
            Frame::Refused { refusal, tag } => return Err(Ending::Refused { refusal, tag }),
        };
        Ok(())
    }

    /// Copies payload that came with the header.
    fn copy_staged(&mut self) -> Result<(), Ending> {
        let staged = self.staging.get(self.start..self.end).unwrap_or_default();
        let count = match &mut self.state {
            State::Header | State::Unplaced { .. } => 0,
            State::Message { buffer, length, filled, .. } => copy(staged, buffer, filled, *length),
            State::Data { pending, filled } => copy(staged, &mut pending.buffer, filled, pending.length),
            State::Place { target, tag, filled } => {
                let range = target.rest(*filled);
                let count = staged.len().min(range.len());
                if count > 0 {
                    let Some(_live) = target.lock() else { return Err(place_refused(*tag)) };
                    let bytes = staged.get(..count).unwrap_or_default();
                    target.region().copy_in(range.start, bytes).map_err(|_| place_refused(*tag))?;
                    *filled += count;
                }
                count
            }
        };
        self.start += count;
        Ok(())
    }

    /// Ends the current frame if its payload is complete.
    fn finish(&mut self, context: &mut Context<'_>) -> bool {
        let complete = match &self.state {
            State::Header | State::Unplaced { .. } => true,
            State::Message { length, filled, .. } => filled == length,
            State::Place { target, filled, .. } => *filled == target.length(),
            State::Data { pending, filled } => *filled == pending.length,
        };
        if !complete {
            return false;
        }
        match std::mem::replace(&mut self.state, State::Header) {
            State::Header | State::Unplaced { .. } | State::Place { .. } => {}
            State::Message { token, buffer, length, descriptor, .. } => {
                let received = Completion::new(token, Kind::Recv, buffer, Ok(length));
                context.ready.push_back(Completion { descriptor, ..received });
            }
            State::Data { pending, .. } => {
                context.fetches.arrived();
                let length = pending.length;
                context.ready.push_back(pending.complete(Ok(length)));
            }
        }
        true
    }

    /// Completes every Recv, and a Fetch whose data was coming, as flushed.
    pub(super) fn flush(&mut self, ready: &mut VecDeque<Completion>) {
        let recv = |token, buffer| Completion::new(token, Kind::Recv, buffer, Err(OperationError::Flushed));
        match std::mem::replace(&mut self.state, State::Header) {
            State::Header | State::Unplaced { .. } | State::Place { .. } => {}
            State::Message { token, buffer, .. } => ready.push_back(recv(token, buffer)),
            State::Data { pending, .. } => ready.push_back(pending.complete(Err(OperationError::Flushed))),
        }
        ready.extend(self.posted.drain(..).map(|(token, buffer)| recv(token, buffer)));
    }
}

/// Copies as much of `staged` as is still missing. Returns how much that was.
fn copy(staged: &[u8], buffer: &mut Buffer, filled: &mut usize, length: usize) -> usize {
    let to = buffer.get_mut(*filled..length).unwrap_or_default();
    let count = staged.len().min(to.len());
    if let (Some(to), Some(from)) = (to.get_mut(..count), staged.get(..count)) {
        to.copy_from_slice(from);
    }
    *filled += count;
    count
}

fn place_refused(tag: u32) -> Ending {
    Ending::Refuse { why: "it places into memory that it may not", refusal: Refusal::Access, tag }
}
