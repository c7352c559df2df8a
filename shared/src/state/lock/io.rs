//! What locks mean for reads and writes.
//!
//! | lock | the holder's I/O | everybody else's |
//! |---|---|---|
//! | exclusive | allowed | neither read nor written |
//! | shared | read, not written | read, not written |
//!
//! So it is on mandatory volumes, per open, whatever the owner number: every handle of an open is equal. Advisory
//! locks restrict nothing.

use super::LockOwner;
use super::file::FileLocks;
use crate::types::{Access, ByteRange, IoRule, LockKind, OpenId};

impl FileLocks {
    pub(super) fn io_rules(&self, of: OpenId, mut counts: impl FnMut(OpenId) -> bool) -> Vec<IoRule> {
        let mut rules: Vec<IoRule> = self
            .held
            .iter()
            .filter_map(|(owner, item)| {
                let LockOwner::Open { open, .. } = owner else { return None };
                let deny = match item.kind {
                    LockKind::Shared => Access::WRITE,
                    LockKind::Exclusive if *open == of => return None,
                    LockKind::Exclusive => Access::READ | Access::WRITE,
                };
                let range = item.range.bytes()?;
                counts(*open).then_some(IoRule { range, deny })
            })
            .collect();
        rules.sort_unstable_by_key(|rule| rule.range.offset());
        // Where rules overlap they are all of shared locks: an exclusive one shares no byte with any.
        rules.dedup_by(|next, last| {
            let end = last.range.end().max(next.range.end());
            let joined = ByteRange::new(last.range.offset(), end - last.range.offset());
            match joined {
                Ok(range) if next.deny == last.deny && next.range.offset() <= last.range.end() => {
                    last.range = range;
                    true
                }
                _ => false,
            }
        });
        rules
    }
}
