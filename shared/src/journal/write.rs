//! Writes: appends gather in memory, a commit makes them durable with one write and one sync.
//!
//! ```text
//!   committed        pending (memory)      allocated, still zeros
//!  |----------------|--------------------|------------------------------------|
//!  0               end                  next                    ^          allocated
//!                                                               |<- reserve ->|
//!  next before the mark: room for everything. Beyond it, and no space to be had: only for records that release.
//! ```
//!
//! After any failure but "no space" nothing may be assumed of what is on the disk, not even that a second sync tells the
//! truth: the journal then refuses everything, and the next start reads what is there.

use super::disk::{Disk, DiskError};
use super::layout::{FrameHead, FrameKind, Header, PAYLOAD_BYTES_MAX, SegmentKind, framed_bytes};
use super::segment::{Older, Options, Segment, allocate};

/// Appended bytes that may wait for a commit.
pub const PENDING_BYTES_MAX: usize = 4 << 20;
/// Space that is taken at once where a whole step is not to be had, bytes.
const SCRAPE_BYTES: u64 = 64 * 1024;
/// More segments than this call for a checkpoint too: each start makes one.
const SEGMENTS_MAX: usize = 64;

/// Whether there is room beyond the reserve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// For every record.
    Free,
    /// Only for records that release something.
    Full,
}

/// Why a journal did not take something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The disk is full and the reserve used up. Nothing has changed; the same call may succeed later.
    #[error("the journal's disk is full")]
    Full,
    /// More than [`PENDING_BYTES_MAX`] wait: commit first.
    #[error("too much waits to be committed")]
    CommitFirst,
    /// A record without its predecessor.
    #[error("record {got} was appended where {expected} should be")]
    Sequence {
        /// The next record's number.
        expected: u64,
        /// The one given.
        got: u64,
    },
    /// More than [`PAYLOAD_BYTES_MAX`].
    #[error("a record of {0} bytes is longer than the limit of {PAYLOAD_BYTES_MAX}")]
    TooLong(usize),
    /// A checkpoint was begun in another, or ended without one.
    #[error("a checkpoint is {0}")]
    Checkpoint(&'static str),
    /// The disk failed, now or before. What was not committed may be lost, and nothing more is taken.
    #[error("the journal's disk failed: {0}")]
    Failed(String),
}

/// What a commit did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Every record up to this number is durable.
    pub through: u64,
    /// A checkpoint was finished, and older segments are gone.
    pub checkpoint_done: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checkpoint {
    None,
    /// The caller feeds it.
    Fed,
    /// Its end mark is pending.
    Ending,
}

/// A journal that is written. See the module for its rules.
#[derive(Debug)]
pub struct Journal<D: Disk> {
    disk: D,
    header: Header,
    options: Options,
    segment: Segment<D::File>,
    older: Vec<Older>,
    pending: Vec<u8>,
    /// The next record's number.
    next: u64,
    committed: u64,
    checkpoint: Checkpoint,
    checkpoint_bytes: u64,
    full: bool,
    failed: Option<String>,
}

impl<D: Disk> Journal<D> {
    pub(super) fn new(
        disk: D,
        header: Header,
        segment: Segment<D::File>,
        older: Vec<Older>,
        checkpoint_bytes: u64,
        options: Options,
    ) -> Self {
        let full = segment.allocated < segment.end + options.reserve();
        let next = header.first_sequence;
        Self {
            disk,
            header,
            options,
            segment,
            older,
            pending: Vec::new(),
            next,
            committed: next.saturating_sub(1),
            checkpoint: Checkpoint::None,
            checkpoint_bytes,
            full,
            failed: None,
        }
    }

    /// The number that the next record must have.
    pub fn next_sequence(&self) -> u64 {
        self.next
    }

    /// Every record up to this number is durable.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Bytes that wait for a commit, at most [`PENDING_BYTES_MAX`].
    pub fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    /// Bytes that a start would read now.
    pub fn live_bytes(&self) -> u64 {
        let older: u64 = self.older.iter().map(|older| older.bytes).sum();
        older.saturating_add(self.segment_end())
    }

    /// Where the next frame goes.
    fn segment_end(&self) -> u64 {
        self.segment.end + self.pending.len() as u64
    }

    /// Adds a record; durable after the next [`Journal::commit`]. It may use the reserve: ask [`Journal::room`] before
    /// appending what does not release anything.
    ///
    /// # Errors
    /// See [`WriteError`]. Nothing was added then.
    pub fn append(&mut self, sequence: u64, payload: &[u8]) -> Result<(), WriteError> {
        self.alive()?;
        if sequence != self.next {
            return Err(WriteError::Sequence { expected: self.next, got: sequence });
        }
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(WriteError::TooLong(payload.len()));
        }
        self.push(FrameKind::Record, sequence, payload)?;
        self.next = sequence.saturating_add(1);
        Ok(())
    }

    fn push(&mut self, kind: FrameKind, sequence: u64, payload: &[u8]) -> Result<(), WriteError> {
        let framed = framed_bytes(payload.len());
        if self.pending.len() + framed > PENDING_BYTES_MAX {
            return Err(WriteError::CommitFirst);
        }
        let needed = self.segment_end() + framed as u64;
        let wanted = needed.saturating_add(self.options.reserve());
        // A full disk is not asked again for each record: that is for `room`, unless this one does not fit.
        if wanted > self.segment.allocated && (!self.full || needed > self.segment.allocated) {
            self.extend(wanted)?;
        }
        if needed > self.segment.allocated {
            self.scrape(needed)?;
        }
        if needed > self.segment.allocated {
            return Err(WriteError::Full);
        }
        let head = FrameHead { kind, length: payload.len(), sequence, batch: self.segment.end };
        head.encode(payload, self.segment.salt, &mut self.pending);
        Ok(())
    }

    /// Tries to have `wanted` bytes allocated, and a step more.
    fn extend(&mut self, wanted: u64) -> Result<(), WriteError> {
        let to = [wanted.saturating_add(self.options.step_bytes), wanted];
        match allocate(&self.disk, &self.segment.file, self.segment.allocated, to) {
            Ok(allocated) => {
                self.segment.allocated = allocated;
                self.full = false;
                Ok(())
            }
            Err(DiskError::NoSpace) => {
                self.full = true;
                Ok(())
            }
            Err(error) => Err(self.fail("allocate space", &error)),
        }
    }

    /// Takes what little there is, where the reserve could not be had and is used up.
    fn scrape(&mut self, needed: u64) -> Result<(), WriteError> {
        let to = [needed.saturating_add(SCRAPE_BYTES), needed];
        match allocate(&self.disk, &self.segment.file, self.segment.allocated, to) {
            Ok(allocated) => self.segment.allocated = allocated,
            Err(DiskError::NoSpace) => {}
            Err(error) => return Err(self.fail("allocate space", &error)),
        }
        Ok(())
    }

    /// How much space is to be kept allocated from now on, bytes; at least [`super::RELEASE_RESERVE_BYTES`]. It is asked for with the
    /// next append or [`Journal::room`].
    pub fn set_reserve(&mut self, bytes: u64) {
        self.options.reserve_bytes = bytes;
    }

    /// Whether there is room beyond the reserve; a full disk is asked again each time.
    ///
    /// # Errors
    /// [`WriteError::Failed`].
    pub fn room(&mut self) -> Result<Room, WriteError> {
        self.alive()?;
        let wanted = self.segment_end().saturating_add(self.options.reserve());
        if wanted > self.segment.allocated {
            self.extend(wanted)?;
        } else {
            self.full = false;
        }
        Ok(if self.full { Room::Full } else { Room::Free })
    }

    /// Makes everything appended so far durable: one write, one sync.
    ///
    /// # Errors
    /// [`WriteError::Full`]: nothing is durable yet, everything still waits, and the call may be made again.
    /// [`WriteError::Failed`]: see the module.
    pub fn commit(&mut self) -> Result<Committed, WriteError> {
        self.alive()?;
        if !self.pending.is_empty() {
            let written = self
                .disk
                .write_at(&self.segment.file, self.segment.end, &self.pending)
                .and_then(|()| self.disk.sync_data(&self.segment.file));
            match written {
                Ok(()) => {}
                // The whole batch is written again next time, so what the failed sync dropped does not matter.
                Err(DiskError::NoSpace) => {
                    self.full = true;
                    return Err(WriteError::Full);
                }
                Err(error) => return Err(self.fail("write", &error)),
            }
            self.segment.end = self.segment_end();
            self.segment.allocated = self.segment.allocated.max(self.segment.end);
            self.pending.clear();
            self.committed = self.next.saturating_sub(1);
        }
        let checkpoint_done = self.checkpoint == Checkpoint::Ending;
        if checkpoint_done {
            self.checkpoint = Checkpoint::None;
            self.checkpoint_bytes = self.segment.end;
            self.remove_older()?;
        }
        Ok(Committed { through: self.committed, checkpoint_done })
    }

    fn remove_older(&mut self) -> Result<(), WriteError> {
        for older in std::mem::take(&mut self.older) {
            if let Err(error) = self.disk.remove(&older.name) {
                return Err(self.fail("remove an old segment", &error));
            }
        }
        self.disk.sync_directory().map_err(|error| self.fail("sync its directory", &error))
    }

    /// Whether it is time for a checkpoint.
    pub fn should_checkpoint(&self) -> bool {
        let due = self.options.checkpoint_bytes.max(self.checkpoint_bytes.saturating_mul(2));
        self.checkpoint == Checkpoint::None && (self.live_bytes() > due || self.older.len() >= SEGMENTS_MAX)
    }

    /// Commits, and begins a new segment. From now on the caller appends the whole state, in records of its own making,
    /// in between whatever else happens, and then calls [`Journal::end_checkpoint`].
    ///
    /// # Errors
    /// [`WriteError::Full`] if there is no space for another segment: the old one is gone on with. See [`WriteError`].
    pub fn begin_checkpoint(&mut self) -> Result<(), WriteError> {
        self.alive()?;
        if self.checkpoint != Checkpoint::None {
            return Err(WriteError::Checkpoint("under way already"));
        }
        self.commit()?;
        let header = Header {
            kind: SegmentKind::Checkpoint,
            segment: self.header.segment.saturating_add(1),
            first_sequence: self.next,
            ..self.header
        };
        let segment = match Segment::create(&self.disk, header, &self.options, false) {
            Ok(segment) => segment,
            Err(DiskError::NoSpace) => return Err(WriteError::Full),
            Err(error) => return Err(self.fail("make a new segment", &error)),
        };
        let old = std::mem::replace(&mut self.segment, segment);
        self.header = header;
        // Its space ahead is given back. If a crash undoes that, the zeros are no records.
        match self.disk.truncate(&old.file, old.end) {
            Ok(()) | Err(DiskError::NoSpace) => {}
            Err(error) => return Err(self.fail("cut the old segment", &error)),
        }
        self.older.push(Older { name: old.name, bytes: old.end });
        self.checkpoint = Checkpoint::Fed;
        self.full = false;
        Ok(())
    }

    /// Appends the end mark: the whole state was appended since [`Journal::begin_checkpoint`]. The commit that follows
    /// removes the older segments.
    ///
    /// # Errors
    /// See [`WriteError`]; after [`WriteError::Full`] and [`WriteError::CommitFirst`] the call may be made again.
    pub fn end_checkpoint(&mut self) -> Result<(), WriteError> {
        self.alive()?;
        if self.checkpoint != Checkpoint::Fed {
            return Err(WriteError::Checkpoint("not under way"));
        }
        self.push(FrameKind::CheckpointEnd, self.next.saturating_sub(1), &[])?;
        self.checkpoint = Checkpoint::Ending;
        Ok(())
    }

    fn alive(&self) -> Result<(), WriteError> {
        match &self.failed {
            Some(failure) => Err(WriteError::Failed(failure.clone())),
            None => Ok(()),
        }
    }

    fn fail(&mut self, what: &str, error: &DiskError) -> WriteError {
        let failure = format!("cannot {what} ({}): {error}", self.segment.name);
        self.failed = Some(failure.clone());
        WriteError::Failed(failure)
    }
}
