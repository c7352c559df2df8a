//! [`Durable`]: which writes of an open were acknowledged and not flushed, and whether they may be lost.
//!
//! ```text
//!   write acknowledged ─► written = the flush that would cover it        flush n begins: the next one is n + 1
//!                                                                        flush n succeeds: covered = n
//!   bound to a server whose page cache is another ─► lost, if written > covered
//! ```
//!
//! The verifier stands for the server's page cache: it changes when the server's host is started again, and not when a
//! process is. So a flush through a new data plane covers what was written through the one before.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed};

pub(crate) struct Durable {
    /// Number of the next flush, from 1.
    next: AtomicU64,
    /// The flush that will cover the last write.
    written: AtomicU64,
    /// The last flush that succeeded.
    covered: AtomicU64,
    /// What the last binding was told; none yet if `known` is false.
    verifier: AtomicU64,
    known: AtomicBool,
    lost: AtomicBool,
}

impl Default for Durable {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            next: AtomicU64::new(1),
            written: zero(),
            covered: zero(),
            verifier: zero(),
            known: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        }
    }
}

impl Durable {
    /// A write was acknowledged. Two loads, unless it is the first since a flush.
    pub(crate) fn wrote(&self) {
        let next = self.next.load(Acquire);
        if self.written.load(Relaxed) < next {
            self.written.fetch_max(next, AcqRel);
        }
    }

    /// A flush begins.
    ///
    /// # Errors
    /// [`Error::WritesLost`] if what it should cover may be lost.
    pub(crate) fn begin(&self) -> Result<u64> {
        self.check()?;
        Ok(self.next.fetch_add(1, AcqRel))
    }

    /// A flush succeeded.
    ///
    /// # Errors
    /// As [`Durable::begin`]: the loss may have been noticed meanwhile.
    pub(crate) fn done(&self, flush: u64) -> Result<()> {
        self.check()?;
        self.covered.fetch_max(flush, AcqRel);
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.lost.load(Acquire) { Err(Error::WritesLost) } else { Ok(()) }
    }

    /// A binding was made, with this verifier. Binds of one open may come in any order; a verifier does not come back.
    pub(crate) fn bound(&self, verifier: u64) {
        let before = self.verifier.swap(verifier, AcqRel);
        let known = self.known.swap(true, AcqRel);
        if known && before != verifier && self.written.load(Acquire) > self.covered.load(Acquire) {
            self.lost.store(true, std::sync::atomic::Ordering::Release);
        }
    }

    /// The application repeats its writes.
    pub(crate) fn accept(&self) {
        self.lost.store(false, std::sync::atomic::Ordering::Release);
    }

    /// The server itself said that writes are lost.
    pub(crate) fn lose(&self) {
        self.lost.store(true, std::sync::atomic::Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(durable: &Durable) -> bool {
        matches!(durable.begin(), Err(Error::WritesLost))
    }

    #[test]
    fn only_unflushed_writes_are_lost_with_a_page_cache() {
        let durable = Durable::default();
        durable.bound(7);
        durable.bound(7);
        durable.bound(8);
        assert!(!lost(&durable), "nothing was written");
        durable.wrote();
        durable.bound(8);
        let flush = durable.begin().unwrap();
        // Acknowledged while the flush is under way: that may not cover it.
        durable.done(flush).unwrap();
        durable.bound(9);
        assert!(!lost(&durable), "all was flushed");
        let flush = durable.begin().unwrap();
        durable.wrote();
        durable.done(flush).unwrap();
        durable.bound(10);
        assert!(lost(&durable) && lost(&durable), "and it stays lost");
        durable.accept();
        assert!(!lost(&durable));
    }

    #[test]
    fn a_flush_on_the_way_through_a_loss_does_not_succeed() {
        let durable = Durable::default();
        durable.bound(7);
        durable.wrote();
        let flush = durable.begin().unwrap();
        durable.bound(8);
        assert!(matches!(durable.done(flush), Err(Error::WritesLost)));
    }
}
