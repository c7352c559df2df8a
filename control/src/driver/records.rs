//! The driver's side of the journal: the authority's records get numbers of the journal's own, and wait their turn.
//!
//! ```text
//!   authority  Persist a5   a6            a7     its own numbers, one after the other
//!                  │        │             │
//!   journal        12   13  14   15  16   17     numbers of the journal: records of a checkpoint stand in between
//!                       └ checkpoint ┘
//!   Persisted(14) ──► the authority hears 6
//! ```

use crate::gauges::Gauges;
use crate::journal::{AppendError, Journal, Kind};
use holdfast_shared::journal::framed_bytes;
use holdfast_shared::journal::record::Record;
use holdfast_shared::state::{Authority, Cursor};
use holdfast_shared::wire::to_cbor;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// Records of a checkpoint that are made at once.
const CHUNK: usize = 64;

/// How far the checkpoint has come that is being written.
enum Checkpoint {
    None,
    /// To be gone on with behind this place.
    Under(Option<Cursor>),
    /// The last chunk is made, and not yet taken as a whole.
    Made,
}

/// See the module.
pub(super) struct Records {
    journal: Journal,
    /// The journal's number for the next record.
    next: u64,
    /// Records that the journal has not taken yet, in order.
    waiting: VecDeque<(u64, Vec<u8>, Kind)>,
    /// Numbers that are not durable yet: the journal's, the authority's, since when.
    under_way: VecDeque<(u64, u64, Instant)>,
    checkpoint: Checkpoint,
    /// Bytes since the checkpoint began.
    since_checkpoint: u64,
}

impl Records {
    /// `last` is the number of the last record that the journal has.
    pub(super) fn new(journal: Journal, last: u64) -> Self {
        Self {
            journal,
            next: last.saturating_add(1),
            waiting: VecDeque::new(),
            under_way: VecDeque::new(),
            checkpoint: Checkpoint::None,
            since_checkpoint: 0,
        }
    }

    /// Hands over a record of the authority's.
    pub(super) fn persist(&mut self, sequence: u64, record: &Record, kind: Kind, gauges: &Gauges) {
        self.under_way.push_back((self.next, sequence, Instant::now()));
        self.append(record, kind, gauges);
    }

    fn append(&mut self, record: &Record, kind: Kind, gauges: &Gauges) {
        let bytes = to_cbor(record);
        let framed = framed_bytes(bytes.len()) as u64;
        self.since_checkpoint = self.since_checkpoint.saturating_add(framed);
        gauges.journal_records_total.fetch_add(1, Relaxed);
        gauges.journal_bytes.fetch_add(framed, Relaxed);
        self.waiting.push_back((self.next, bytes, kind));
        self.next = self.next.saturating_add(1);
        self.hand_over();
    }

    /// Gives the journal what it takes now. The rest waits for its next event: numbers must not be missing.
    fn hand_over(&mut self) {
        self.offer();
        if self.waiting.is_empty() && matches!(self.checkpoint, Checkpoint::Made) {
            self.checkpoint = Checkpoint::None;
            self.journal.end_checkpoint();
        }
    }

    fn offer(&mut self) {
        while let Some((sequence, bytes, kind)) = self.waiting.pop_front() {
            match self.journal.append(sequence, bytes.clone(), kind) {
                Ok(()) => {}
                // The disk was full before the authority heard of it. There is room in the reserve for what was on its way.
                Err(AppendError::Full) => self.waiting.push_front((sequence, bytes, Kind::Releasing)),
                Err(AppendError::Busy) => {
                    self.waiting.push_front((sequence, bytes, kind));
                    return;
                }
                // The journal's own event ends the process.
                Err(AppendError::Failed) => return,
                Err(AppendError::TooLong) => {
                    tracing::error!(
                        sequence,
                        bytes = bytes.len(),
                        "a record is longer than the journal takes"
                    );
                    std::process::exit(super::EXIT_JOURNAL);
                }
            }
        }
    }

    /// Everything up to this number of the journal is durable. The authority's number for it, if it moved on.
    pub(super) fn persisted(&mut self, through: u64, gauges: &Gauges) -> Option<u64> {
        gauges.journal_commits_total.fetch_add(1, Relaxed);
        if let Some((_, _, since)) = self.under_way.front().filter(|(own, ..)| *own <= through) {
            add(&gauges.journal_wait_us_total, since.elapsed().as_micros());
        }
        let mut reached = None;
        while let Some((_, sequence, _)) = self.under_way.front().filter(|(own, ..)| *own <= through) {
            reached = Some(*sequence);
            self.under_way.pop_front();
        }
        self.hand_over();
        reached
    }

    /// The journal has begun a new file: the whole state goes into it, a chunk at a time.
    pub(super) fn checkpoint_begun(&mut self) {
        self.checkpoint = Checkpoint::Under(None);
        self.since_checkpoint = 0;
    }

    /// The journal has finished it.
    pub(super) fn checkpoint_done(&self, gauges: &Gauges) {
        gauges.journal_checkpoints_total.fetch_add(1, Relaxed);
        gauges.journal_segments.store(1, Relaxed);
        gauges.journal_bytes.store(self.since_checkpoint, Relaxed);
    }

    /// True if the next chunk of a checkpoint may be made now.
    pub(super) fn wants_chunk(&self) -> bool {
        matches!(self.checkpoint, Checkpoint::Under(_)) && self.waiting.is_empty()
    }

    /// Makes the next chunk.
    pub(super) fn chunk(&mut self, authority: &Authority, gauges: &Gauges) {
        let Checkpoint::Under(after) = self.checkpoint else { return };
        let (records, next) = authority.checkpoint(after, CHUNK);
        for record in &records {
            // What is known stays known, whether the disk is full or not; a checkpoint is what makes room again.
            self.append(record, Kind::Releasing, gauges);
        }
        self.checkpoint = next.map_or(Checkpoint::Made, |cursor| Checkpoint::Under(Some(cursor)));
        self.hand_over();
    }

    /// So many opens there are: space is kept for the end of each.
    pub(super) fn reserve_for(&self, opens: usize) {
        self.journal.reserve_for(opens);
    }

    /// Records that the journal has not taken yet.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// True if nothing waits for the disk any more.
    pub(super) fn idle(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_empty()
    }
}

fn add(to: &AtomicU64, what: u128) {
    to.fetch_add(u64::try_from(what).unwrap_or(u64::MAX), Relaxed);
}
