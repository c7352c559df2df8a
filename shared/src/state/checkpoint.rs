//! The whole state as records, a chunk at a time.

use super::Authority;
use crate::journal::record::{Record, Started};
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
        let max = max.max(1);
        let mut records = Vec::new();
        if after.is_none() {
            records.push(Record::Started(Started { generation: self.generation, wall_ms: 0 }));
        }
        let done = match after {
            None => None,
            Some(Cursor::Opens(id)) => Some(id),
            Some(Cursor::Tombstones(id)) => return self.checkpoint_tombstones(Some(id), max, records),
        };
        let mut last = done;
        for (id, open) in self.opens.after(done) {
            if records.len() >= max && last != done {
                return (records, last.map(Cursor::Opens));
            }
            records.push(Record::Opened(Box::new(self.open_record(*id, open))));
            last = Some(*id);
        }
        self.checkpoint_tombstones(None, max, records)
    }

    fn checkpoint_tombstones(
        &self,
        done: Option<OpenId>,
        max: usize,
        mut records: Vec<Record>,
    ) -> (Vec<Record>, Option<Cursor>) {
        let mut last = done;
        for (id, tombstone) in self.tombstones.after(done) {
            if records.len() >= max && last != done {
                return (records, last.map(Cursor::Tombstones));
            }
            records.push(tombstone.record(*id));
            last = Some(*id);
        }
        (records, None)
    }
}
