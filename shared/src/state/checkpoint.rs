//! The whole state as records, a chunk at a time.

use super::Authority;
use crate::journal::record::Record;
use crate::types::OpenId;

/// How far a checkpoint has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cursor {
    /// Opens up to and including this one are done.
    Opens(OpenId),
    /// All opens are done, and tombstones up to and including this one.
    Tombstones(OpenId),
}

impl Authority {
    /// The next chunk of the whole state: at most `max` records (at least one), and where the next chunk begins; `None`
    /// after the last. Records of changes in between belong behind the chunk that was given before them.
    pub fn checkpoint(&self, after: Option<Cursor>, max: usize) -> (Vec<Record>, Option<Cursor>) {
        let _ = (after, max);
        (Vec::new(), None)
    }
}
