//! The writes that a worker makes for a channel in one turn or poll, taken for one by [`LastWrite`].
//!
//! ```text
//!   turn ─► write ─► write ─► write ─► … ─► settle ─► the time, for each binding that wrote ─► their replies
//!          └ begins                        └ has returned
//! ```
//!
//! Nobody is told of a write before its time is known: a reply to one waits until the turn is settled.

use super::binding::BindingRef;
use super::channel::{Conn, Cx, Phase};
use super::request::Step;
use crate::last_write::{LastWrite, Writing};

/// Of one channel. Empty between turns.
#[derive(Debug, Default)]
pub(crate) struct Written {
    writing: Option<Writing>,
    by: Vec<BindingRef>,
    /// Requests that are to be answered then.
    unanswered: Vec<u16>,
}

impl Written {
    /// Makes room for so many requests in a turn, and bindings that write in one or in a poll.
    pub(super) fn reserve(&mut self, requests: usize, bindings: usize) {
        self.unanswered.reserve(requests);
        self.by.reserve(bindings);
    }

    /// A write of that binding is about to be made.
    pub(super) fn begin(&mut self, last_write: &LastWrite, by: BindingRef) {
        self.writing.get_or_insert_with(|| last_write.begin());
        if !self.by.contains(&by) {
            self.by.push(by);
        }
    }

    /// True if nobody may be told of a write yet.
    pub(super) fn is_open(&self) -> bool {
        self.writing.is_some()
    }

    /// The request in that slot is to be answered as soon as that is so no more.
    pub(super) fn answer_later(&mut self, slot: u16) {
        self.unanswered.push(slot);
    }
}

impl Conn {
    /// All writes since the last time have returned.
    pub(super) fn settle_writes(&mut self, cx: &Cx) {
        let Some(writing) = self.written.writing.take() else { return };
        let ns = cx.last_write.returned(writing);
        for name in self.written.by.drain(..) {
            if let Some(binding) = self.bindings.get_mut(name) {
                binding.last_write_ns = ns;
            }
        }
    }

    /// The turn is over: its writes are answered. Those for which there is no room are next when there is.
    pub(super) fn answer_writes(&mut self, cx: &mut Cx) {
        self.settle_writes(cx);
        let mut slots = std::mem::take(&mut self.written.unanswered);
        let answered = slots
            .iter()
            .take_while(|slot| self.phase == Phase::Open && self.step(cx, **slot, &mut 0) != Step::NoRoom);
        let answered = answered.count();
        if self.phase == Phase::Open && answered < slots.len() {
            slots.drain(answered..).rev().for_each(|slot| self.ready.again(slot));
            self.blocked = true;
        }
        slots.clear();
        debug_assert!(self.written.unanswered.is_empty(), "nothing is written by an answer");
        self.written.unanswered = slots;
    }
}
