//! Which requests of a channel have something to do.
//!
//! ```text
//!              add, resume                       no buffer
//!  (waiting) ─────────────► ready ──next──► step ─────────► hungry ──fed──┐
//!                             ▲                                           │
//!                             └────────────── revive, or next once fed ◄──┘
//! ```
//!
//! A request that lacked a buffer waits among the *hungry*, so that what needs no buffer (answers, flushes, inline
//! writes through the page cache) goes on meanwhile. The channel is *starved* from the first miss until it is fed. Each slot is in at most
//! one of the two lists.

use std::collections::VecDeque;

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    ready: VecDeque<u16>,
    hungry: VecDeque<u16>,
    starved: bool,
}

impl Ready {
    /// Makes room for so many requests in all; nothing allocates after that.
    pub(crate) fn reserve(&mut self, slots: usize) {
        self.ready.reserve(slots.saturating_sub(self.ready.len()));
        self.hungry.reserve(slots.saturating_sub(self.hungry.len()));
    }

    /// A new request.
    pub(crate) fn add(&mut self, slot: u16) {
        self.ready.push_back(slot);
    }

    /// A request that waited for something else goes on, once; before those that have not begun, as it may hold a buffer
    /// which they wait for.
    pub(crate) fn resume(&mut self, slot: u16) {
        self.hungry.retain(|other| *other != slot);
        if !self.ready.contains(&slot) {
            self.ready.push_front(slot);
        }
    }

    /// The next to have its turn: the hungry first, if there may be a buffer.
    pub(crate) fn next(&mut self) -> Option<u16> {
        let hungry = if self.starved { None } else { self.hungry.pop_front() };
        hungry.or_else(|| self.ready.pop_front())
    }

    /// It is not done: it is the next again.
    pub(crate) fn again(&mut self, slot: u16) {
        self.ready.push_front(slot);
    }

    /// It lacked a buffer. The first to miss one was the oldest.
    pub(crate) fn hunger(&mut self, slot: u16) {
        if self.starved {
            self.hungry.push_back(slot)
        } else {
            self.hungry.push_front(slot)
        }
        self.starved = true;
    }

    /// There may be a buffer.
    pub(crate) fn feed(&mut self) {
        self.starved = false;
    }

    /// Those of the hungry that need no buffer any more are ready.
    pub(crate) fn revive(&mut self, which: impl Fn(u16) -> bool) {
        for _ in 0..self.hungry.len() {
            let Some(slot) = self.hungry.pop_front() else { break };
            if which(slot) { self.ready.push_back(slot) } else { self.hungry.push_back(slot) }
        }
    }

    pub(crate) fn clear(&mut self) {
        self.ready.clear();
        self.hungry.clear();
    }

    /// True if [`Ready::next`] has one.
    pub(crate) fn has_next(&self) -> bool {
        !self.ready.is_empty() || (!self.starved && !self.hungry.is_empty())
    }

    /// True from a miss until fed.
    pub(crate) fn is_starved(&self) -> bool {
        self.starved
    }

    pub(crate) fn first(&self) -> Option<u16> {
        self.ready.front().copied()
    }

    pub(crate) fn remove_first(&mut self) {
        self.ready.pop_front();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(ready: &mut Ready) -> Vec<u16> {
        std::iter::from_fn(|| ready.next()).collect()
    }

    #[test]
    fn the_hungry_hold_up_nobody_and_keep_their_order() {
        let mut ready = Ready::default();
        (1..=4).for_each(|slot| ready.add(slot));
        for slot in [1, 2] {
            assert_eq!(ready.next(), Some(slot));
            ready.hunger(slot);
        }
        assert!(ready.is_starved());
        assert_eq!(all(&mut ready), [3, 4]);
        assert!(!ready.has_next());
        ready.feed();
        assert!(ready.has_next());
        assert_eq!(ready.next(), Some(1));
        ready.hunger(1);
        ready.add(5);
        ready.feed();
        assert_eq!(all(&mut ready), [1, 2, 5]);
    }

    #[test]
    fn what_needs_no_buffer_any_more_is_ready_and_nothing_is_there_twice() {
        let mut ready = Ready::default();
        (1..=4).for_each(|slot| ready.add(slot));
        while let Some(slot) = ready.next() {
            ready.hunger(slot);
        }
        ready.revive(|slot| slot % 2 == 0);
        ready.resume(2);
        ready.resume(3);
        assert_eq!(all(&mut ready), [3, 2, 4]);
        ready.feed();
        assert_eq!(all(&mut ready), [1]);
    }
}
