//! Whether a flush of an open has failed.
//!
//! The kernel tells of a failed write-back once for each open file description, and forgets the pages. All bindings of an
//! open share one description: whoever asks second would hear that all is well. So a failure is kept as long as a
//! binding of the open is there, and every later flush of it fails too.
//!
//! ```text
//!   binding ─┐
//!   binding ─┴─► Latch (one an open) ◄─ Weak ─ Latches (of the engine)
//! ```

use super::backend::FileIo;
use holdfast_shared::types::OpenId;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Weak};

/// Of one open. Flushes take turns: one that begins after a failure can't miss it.
#[derive(Default)]
pub(crate) struct Latch(Mutex<bool>);

impl Latch {
    /// Flushes; fails for ever once it has failed.
    pub(crate) fn sync(&self, file: &dyn FileIo, data_only: bool) -> io::Result<()> {
        let mut failed = self.0.lock();
        if *failed {
            return Err(rustix::io::Errno::IO.into());
        }
        let result = file.sync(data_only);
        *failed = result.is_err();
        result
    }
}

/// Entries before those without a binding are first looked for.
const PRUNE_MIN: usize = 64;

/// Of all opens that have bindings here.
#[derive(Default)]
pub(crate) struct Latches(Mutex<(HashMap<OpenId, Weak<Latch>>, usize)>);

impl Latches {
    /// The open's latch; made with its first binding.
    pub(crate) fn of(&self, open: OpenId) -> Arc<Latch> {
        let (all, prune_at) = &mut *self.0.lock();
        if let Some(latch) = all.get(&open).and_then(Weak::upgrade) {
            return latch;
        }
        if all.len() >= (*prune_at).max(PRUNE_MIN) {
            all.retain(|_, latch| latch.strong_count() > 0);
            *prune_at = 2 * all.len();
        }
        let latch = Arc::new(Latch::default());
        all.insert(open, Arc::downgrade(&latch));
        latch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_without_bindings_are_forgotten() {
        let latches = Latches::default();
        let open = |n: u64| OpenId(u128::from(n).to_le_bytes());
        let kept = latches.of(open(0));
        for n in 1..10_000 {
            latches.of(open(n));
        }
        assert!(latches.0.lock().0.len() <= 2 * PRUNE_MIN);
        assert!(Arc::ptr_eq(&kept, &latches.of(open(0))));
    }
}
