//! The Fetches of this side: which wait for their turn, which are asked, and where their answers go.
//!
//! ```text
//!   submit ──► waiting ──(fewer than FETCHES_MAX asked)──► asked ──FetchData{tag}──► answered ──last byte──► completion
//! ```
//!
//! The peer counts an answer until its last byte is in the socket. So a Fetch counts as asked here until that byte has
//! come: the next one asked for never finds more than FETCHES_MAX unanswered there.

use super::framing::FETCHES_MAX;
use crate::channel::{Completion, Kind, OperationError};
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::Buffer;
use slab::Slab;
use std::collections::VecDeque;

/// A Fetch that was accepted.
pub(super) struct Pending {
    pub(super) token: u64,
    pub(super) buffer: Buffer,
    pub(super) length: usize,
    asked: bool,
}

impl Pending {
    pub(super) fn complete(self, outcome: Result<usize, OperationError>) -> Completion {
        Completion::new(self.token, Kind::Fetch, self.buffer, outcome)
    }
}

/// All Fetches that were accepted and are not answered.
pub(super) struct Fetches {
    /// The key is the tag on the wire.
    pending: Slab<Pending>,
    waiting: VecDeque<(usize, RegionDescriptor)>,
    /// Asked for, with an answer that is not here to its last byte.
    asked: usize,
}

impl Fetches {
    pub(super) fn with_capacity(count: usize) -> Self {
        Self { pending: Slab::with_capacity(count), waiting: VecDeque::with_capacity(count), asked: 0 }
    }

    pub(super) fn submit(&mut self, token: u64, buffer: Buffer, remote: RegionDescriptor) {
        let length = remote.length() as usize;
        let key = self.pending.insert(Pending { token, buffer, length, asked: false });
        self.waiting.push_back((key, remote));
    }

    /// The next to ask for, if the peer may be asked for one more.
    pub(super) fn ask(&mut self) -> Option<(RegionDescriptor, u32)> {
        if self.asked >= FETCHES_MAX {
            return None;
        }
        let (key, remote) = self.waiting.pop_front()?;
        if let Some(pending) = self.pending.get_mut(key) {
            pending.asked = true;
            self.asked += 1;
        }
        // Fewer keys are in use than the depth of a channel, which is far below the 2^31 of a Place's tag.
        Some((remote, u32::try_from(key).ok()?))
    }

    /// Where the bytes go that were asked for under this number.
    pub(super) fn room(&mut self, tag: u32) -> Option<&mut [u8]> {
        let pending = self.pending.get_mut(usize::try_from(tag).ok()?)?;
        pending.buffer.get_mut(..pending.length)
    }

    /// True if `ask` would give one.
    pub(super) fn can_ask(&self) -> bool {
        self.asked < FETCHES_MAX && !self.waiting.is_empty()
    }

    /// Takes the Fetch an answer is for, if it was asked. It counts as asked until [`Fetches::arrived`].
    pub(super) fn answered(&mut self, tag: u32) -> Option<Pending> {
        let key = usize::try_from(tag).ok()?;
        self.pending.get(key).filter(|pending| pending.asked)?;
        self.pending.try_remove(key)
    }

    /// The last byte of an answer has come.
    pub(super) fn arrived(&mut self) {
        self.asked = self.asked.saturating_sub(1);
    }

    /// Takes all of them.
    pub(super) fn flush(&mut self) -> impl Iterator<Item = Pending> + '_ {
        self.waiting.clear();
        self.asked = 0;
        self.pending.drain()
    }
}
