//! What is left of a journal after a stop of any kind: which segments count, what they say, and where they break off.
//!
//! ```text
//!  segments      1        2        3        4        5
//!  kind          First    Contin.  Check-   Contin.  Check-       5 is newer, but a crash left it without its
//!                                  point             point        end mark: reading begins at 3.
//!                |-- garbage --|   |------- read --------|
//! ```
//!
//! [`recover`] only reads. [`Recovery::start`] cuts what a crash left half written, and goes on in a new segment.

use super::disk::Disk;
use super::find::{Found, RecoverError, beginning, corrupt, disk, find, judge};
use super::layout::{FrameKind, HEADER_BYTES, Header, SegmentKind, file_name};
use super::read::{Frames, Step};
use super::segment::{Older, Options, Segment};
use super::write::Journal;
use crate::types::ClusterId;

/// One record as read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovered<'b> {
    /// Its number.
    pub sequence: u64,
    /// As it was appended.
    pub payload: &'b [u8],
    /// It stands in a checkpoint before its end mark: it may restate what is known, or speak of what comes later.
    pub in_checkpoint: bool,
}

/// What a crash left half written. It was never durable, so nobody was told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The file's name.
    pub file: String,
    /// Where the last whole record ends.
    pub offset: u64,
    /// Bytes that were written behind it.
    pub bytes: u64,
    /// How they differ from a record.
    pub problem: &'static str,
}

/// What a journal held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// The generation of its newest segment; 0 if there was no journal. Lower than known from elsewhere: an old copy.
    pub generation: u64,
    /// The number of the last record; the next one is one higher. 0 if there was none.
    pub last_sequence: u64,
    /// Records read.
    pub records: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Segments read.
    pub segments: usize,
    /// What was cut, if anything.
    pub cut: Option<Cut>,
}

/// Where the last segment breaks off.
#[derive(Clone, Debug)]
struct Tail {
    name: String,
    header: [u8; HEADER_BYTES],
    number: u64,
    /// Where the last whole write began; the header if there was none.
    batch: u64,
    /// Where its last whole frame ends.
    end: u64,
}

/// A journal that was read, ready to be gone on with.
#[derive(Debug)]
pub struct Recovery<D> {
    disk: D,
    cluster: ClusterId,
    summary: Summary,
    /// Segments that were read, but for the last.
    older: Vec<Older>,
    tail: Option<Tail>,
    checkpoint_bytes: u64,
    /// Files that no longer count.
    garbage: Vec<String>,
}

/// Reads a journal and gives every record that counts to `visit`, in order, one at a time. An error from `visit`, in
/// words, ends it as damage at that record. Nothing is written.
///
/// # Errors
/// See [`RecoverError`].
pub fn recover<D: Disk>(
    from: D,
    cluster: ClusterId,
    visit: &mut dyn FnMut(Recovered<'_>) -> Result<(), String>,
) -> Result<Recovery<D>, RecoverError> {
    let (found, mut garbage) = find(&from, cluster)?;
    let start = beginning(&from, &found)?;
    garbage.extend(found[..start].iter().map(|segment| segment.name.clone()));
    let mut recovery = Recovery {
        disk: from,
        cluster,
        summary: Summary::default(),
        older: Vec::new(),
        tail: None,
        checkpoint_bytes: 0,
        garbage,
    };
    recovery.summary.generation = found.iter().map(|segment| segment.header.generation).max().unwrap_or(0);
    for (index, segment) in found.iter().enumerate().skip(start) {
        let last = index + 1 == found.len();
        recovery.read(segment, index == start, last, visit)?;
    }
    Ok(recovery)
}

impl<D: Disk> Recovery<D> {
    /// What was found.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    fn read(
        &mut self,
        segment: &Found,
        first: bool,
        last: bool,
        visit: &mut dyn FnMut(Recovered<'_>) -> Result<(), String>,
    ) -> Result<(), RecoverError> {
        let name = &segment.name;
        let summary = &mut self.summary;
        if let Some(before) = self.tail.take() {
            if before.number.checked_add(1) != Some(segment.number) {
                let missing = file_name(before.number.saturating_add(1));
                return Err(corrupt(name, 0, format!("the file before it, {missing}, is missing")));
            }
            self.older.push(Older { name: before.name, bytes: before.end });
        }
        if first {
            summary.last_sequence = segment.header.first_sequence.saturating_sub(1);
        } else if segment.header.first_sequence != summary.last_sequence.saturating_add(1) {
            let (begins, ended) = (segment.header.first_sequence, summary.last_sequence);
            return Err(corrupt(
                name,
                40,
                format!("it begins with record {begins}, the file before it ends with {ended}"),
            ));
        }
        let (_, mut frames) = Frames::open(&self.disk, name).map_err(disk(name, "read it"))?;
        let mut in_checkpoint = segment.header.kind == SegmentKind::Checkpoint;
        let mut batch = 0;
        let end = loop {
            match frames.step().map_err(disk(name, "read it"))? {
                Step::Frame { at, head, payload } => {
                    if head.batch != at && (batch == 0 || head.batch != batch) {
                        return Err(corrupt(name, at, "the frame is whole, but belongs to another write"));
                    }
                    batch = head.batch;
                    if head.kind == FrameKind::CheckpointEnd {
                        in_checkpoint = false;
                        if first {
                            self.checkpoint_bytes = at;
                        }
                        continue;
                    }
                    let expected = summary.last_sequence.saturating_add(1);
                    if head.sequence != expected {
                        let got = head.sequence;
                        return Err(corrupt(
                            name,
                            at,
                            format!("record {got} stands where {expected} should"),
                        ));
                    }
                    summary.last_sequence = expected;
                    summary.records += 1;
                    visit(Recovered { sequence: expected, payload, in_checkpoint }).map_err(|problem| {
                        corrupt(
                            name,
                            at,
                            format!("record {expected} is whole, but is not understood: {problem}"),
                        )
                    })?;
                }
                Step::End { at } => break at,
                Step::Bad { at, problem } => {
                    judge(&mut frames, name, last, at, problem)?;
                    let bytes = frames.written_until(at).map_err(disk(name, "read it"))?.saturating_sub(at);
                    summary.cut = Some(Cut { file: name.clone(), offset: at, bytes, problem });
                    break at;
                }
            }
        };
        summary.segments += 1;
        summary.bytes += end;
        let (header, number) = (segment.encoded, segment.number);
        self.tail = Some(Tail { name: name.clone(), header, number, batch, end });
        Ok(())
    }

    /// Cuts what was half written, makes the rest durable, and goes on in a new segment of this `generation`.
    ///
    /// # Errors
    /// [`RecoverError::Disk`]; also when there is no space for the new segment's header.
    pub fn start(mut self, generation: u64, options: Options) -> Result<Journal<D>, RecoverError> {
        let mut number = 1;
        if let Some(tail) = self.tail.take() {
            self.mend(&tail)?;
            number = tail.number.saturating_add(1);
            self.older.push(Older { name: tail.name, bytes: tail.end });
        }
        for name in &self.garbage {
            self.disk.remove(name).map_err(disk(name, "remove it"))?;
        }
        if !self.garbage.is_empty() {
            self.disk.sync_directory().map_err(disk("", "sync the journal's directory"))?;
        }
        let kind = if self.older.is_empty() { SegmentKind::First } else { SegmentKind::Continues };
        let first_sequence = self.summary.last_sequence.saturating_add(1);
        let header = Header { kind, cluster: self.cluster, segment: number, generation, first_sequence };
        let segment = Segment::create(&self.disk, header, &options, true)
            .map_err(disk(&file_name(number), "make a new segment"))?;
        Ok(Journal::new(self.disk, header, segment, self.older, self.checkpoint_bytes, options))
    }

    /// What was read may be in the system's cache alone: the server was killed before its sync, or that failed. Only the
    /// last write can be, so it is written and synced once more before anybody relies on it.
    fn mend(&self, tail: &Tail) -> Result<(), RecoverError> {
        let name = &tail.name;
        let file = self.disk.open(name).map_err(disk(name, "open it"))?;
        if self.disk.length(&file).map_err(disk(name, "open it"))? > tail.end {
            self.disk.truncate(&file, tail.end).map_err(disk(name, "cut it"))?;
        }
        let last = usize::try_from(tail.end.saturating_sub(tail.batch)).unwrap_or(usize::MAX);
        if tail.batch == 0 {
            self.disk.write_at(&file, 0, &tail.header).map_err(disk(name, "write its header again"))?;
        } else {
            let mut bytes = vec![0; last];
            let mut filled = 0;
            while filled < last {
                let from = tail.batch + filled as u64;
                match self.disk.read_at(&file, from, &mut bytes[filled..]).map_err(disk(name, "read it"))? {
                    0 => return Err(corrupt(name, from, "the file became shorter while it was read")),
                    got => filled += got,
                }
            }
            self.disk.write_at(&file, tail.batch, &bytes).map_err(disk(name, "write its end again"))?;
        }
        self.disk.sync_data(&file).map_err(disk(name, "sync it"))
    }
}
