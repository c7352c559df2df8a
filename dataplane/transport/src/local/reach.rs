//! The server's hands on its peer's regions: what was shared, mapped here, within limits.
//!
//! ```text
//!   Note::Region + descriptor ──checked──► Mapped{word, base, access, PeerRegion} ◄── find(what a Place or Fetch names)
//!   Note::Withdrawn, or the channel's end ──► unmapped
//! ```
//!
//! The descriptor, the note and the word are the client's: the mapping is as long as was checked here, and what lies outside of it is
//! not reached whatever they say.

use super::area::slot_word;
use super::share::{Allowed, enter};
use crate::channel::RemoteAccess;
use crate::region_table::Wanted;
use crate::stream::Ending;
use holdfast_shared::types::RegionDescriptor;
use holdfast_verbs::memory::{PeerBytes, PeerRegion, Region, SharedWord};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Mappings of all channels of a listener together: the kernel has a limit for each process (65530, unless it was changed), and other uses
/// for them.
const MAPPINGS_MAX: u64 = 16_384;

/// What all channels of a listener may have mapped at once.
pub(super) struct Budget {
    bytes_max: u64,
    bytes: AtomicU64,
    mappings: AtomicU64,
}

impl Budget {
    pub(super) fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self { bytes_max, bytes: AtomicU64::new(0), mappings: AtomicU64::new(0) })
    }

    /// Room for one mapping more.
    fn take(self: &Arc<Self>, bytes: u64) -> Option<Taken> {
        let add = |count: &AtomicU64, more: u64, max: u64| {
            let grown = |old: u64| old.checked_add(more).filter(|new| *new <= max);
            count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown).is_ok()
        };
        if !add(&self.mappings, 1, MAPPINGS_MAX) {
            return None;
        }
        if !add(&self.bytes, bytes, self.bytes_max) {
            self.mappings.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Taken { budget: Arc::clone(self), bytes })
    }
}

/// Part of a budget, given back when dropped.
struct Taken {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budget.mappings.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A region of the peer.
struct Mapped {
    slot: u16,
    word: SharedWord,
    descriptor: RegionDescriptor,
    access: RemoteAccess,
    memory: PeerRegion,
    _taken: Taken,
}

/// All of one channel.
pub(super) struct Reach {
    area: Arc<Region>,
    budget: Arc<Budget>,
    allowed: Allowed,
    mapped: HashMap<u32, Mapped>,
    bytes: u64,
}

impl Reach {
    pub(super) fn new(area: Arc<Region>, budget: Arc<Budget>, allowed: Allowed) -> Self {
        Self { area, budget, allowed, mapped: HashMap::new(), bytes: 0 }
    }

    /// Maps what the client shares.
    pub(super) fn add(
        &mut self,
        slot: u16,
        access: RemoteAccess,
        descriptor: RegionDescriptor,
        file: Option<OwnedFd>,
    ) -> Result<(), Ending> {
        let bytes = self.bytes.saturating_add(descriptor.length().into());
        if self.mapped.len() >= self.allowed.regions_max as usize || bytes > self.allowed.bytes_max {
            return Err(Ending::Misbehaved("it shares more memory than it may"));
        }
        if self.mapped.contains_key(&descriptor.rkey()) {
            return Err(Ending::Misbehaved("it shares two regions under one key"));
        }
        let word = slot_word(&self.area, slot)
            .map_err(|_| Ending::Misbehaved("it shares a region without a word"))?;
        // This process had no room for the descriptor, or all channels together have too much: frames do as well.
        let Some(file) = file else { return Ok(()) };
        let Some(taken) = self.budget.take(descriptor.length().into()) else {
            tracing::debug!("a client's region is not mapped: too much is");
            return Ok(());
        };
        let memory = match PeerRegion::map(file.as_fd(), descriptor.length() as usize) {
            Ok(memory) => memory,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                return Err(Ending::Misbehaved("it shares what is no sealed memory file, or a shorter one"));
            }
            Err(error) => {
                tracing::debug!(%error, "a client's region is not mapped");
                return Ok(());
            }
        };
        self.bytes = bytes;
        self.mapped
            .insert(descriptor.rkey(), Mapped { slot, word, descriptor, access, memory, _taken: taken });
        Ok(())
    }

    /// Unmaps what the client shares no more.
    pub(super) fn remove(&mut self, slot: u16, rkey: u32) {
        if self.mapped.get(&rkey).is_some_and(|mapped| mapped.slot == slot) {
            if let Some(gone) = self.mapped.remove(&rkey) {
                self.bytes = self.bytes.saturating_sub(gone.descriptor.length().into());
            }
        }
    }

    /// True if a region has this key.
    pub(super) fn knows(&self, rkey: u32) -> bool {
        self.mapped.contains_key(&rkey)
    }

    /// Unmaps everything.
    pub(super) fn clear(&mut self) {
        self.mapped.clear();
        self.bytes = 0;
    }

    /// Gives `act` what `remote` names, if it may be reached so, and keeps it from being withdrawn meanwhile. False if it may not.
    pub(super) fn reach(
        &self,
        remote: RegionDescriptor,
        wanted: Wanted,
        act: &mut dyn FnMut(PeerBytes<'_>),
    ) -> bool {
        let Some(mapped) = self.mapped.get(&remote.rkey()).filter(|mapped| mapped.access.allows(wanted))
        else {
            return false;
        };
        let start = remote.address().checked_sub(mapped.descriptor.address());
        let Some(start) = start.and_then(|start| usize::try_from(start).ok()) else { return false };
        let Ok(bytes) = mapped.memory.bytes(start, remote.length() as usize) else { return false };
        let Some(_user) = enter(&mapped.word, remote.rkey()) else { return false };
        act(bytes);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_of_bytes_and_of_mappings_is_kept_and_given_back() {
        let budget = Budget::new(100_000);
        let half = budget.take(50_000).unwrap();
        assert!(budget.take(50_001).is_none());
        let rest = budget.take(50_000).unwrap();
        assert!(budget.take(1).is_none());
        drop((half, rest));
        let all: Vec<Taken> = std::iter::from_fn(|| budget.take(1)).collect();
        assert_eq!(all.len() as u64, MAPPINGS_MAX);
        drop(all);
        assert!(budget.take(u64::MAX).is_none() && budget.take(100_000).is_some());
    }
}
