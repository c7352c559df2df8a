//! [`Claim`]: who does a thing that is done once, and may be interrupted before it is.

use std::sync::atomic::{AtomicBool, Ordering};

/// The right to set a flag for good. Dropped without [`Claim::keep`], as when its owner is cancelled, it is as if it had
/// not been taken.
pub(crate) struct Claim<'a> {
    flag: &'a AtomicBool,
    kept: bool,
}

impl<'a> Claim<'a> {
    /// `None` if the thing is done, or somebody is at it.
    pub(crate) fn take(flag: &'a AtomicBool) -> Option<Self> {
        (!flag.swap(true, Ordering::AcqRel)).then_some(Self { flag, kept: false })
    }

    /// It is done.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.flag.store(false, Ordering::Release);
        }
    }
}
