//! [`Score`]: how much an extent was read lately.

use super::EXTENT_BYTES;

/// What a read scores at least, unless it goes on where the one before it ended.
pub(super) const READ_SCORE: u64 = 64 << 10;
/// From this score on an extent is hot: read twice over.
pub(super) const HOT_SCORE: u64 = 2 * EXTENT_BYTES;
/// The score halves in this time; and what is mapped is reviewed so often.
pub(super) const HALF_LIFE_MS: u64 = 1_000;
/// What the reads of an extent score together.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Score {
    bytes: u64,
    since_ms: u64,
    /// Where a read would go on.
    next: u64,
}

impl Score {
    /// Counts a read.
    pub(super) fn add(&mut self, now_ms: u64, offset: u64, length: u64) {
        let halvings = now_ms.saturating_sub(self.since_ms) / HALF_LIFE_MS;
        self.bytes = u32::try_from(halvings).ok().and_then(|n| self.bytes.checked_shr(n)).unwrap_or(0);
        self.since_ms += halvings * HALF_LIFE_MS;
        let goes_on = offset == self.next && offset % EXTENT_BYTES != 0;
        self.bytes += if goes_on { length } else { length.max(READ_SCORE) };
        self.next = offset.saturating_add(length);
    }

    /// True if it was read several times over.
    pub(super) fn is_hot(&self) -> bool {
        self.bytes >= HOT_SCORE
    }
}
