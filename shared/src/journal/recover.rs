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

use super::disk::{Disk, DiskError};
use super::layout::{
    FORMAT_VERSION, FrameKind, HEADER_BYTES, Header, HeaderProblem, SegmentKind, file_name, segment_of,
};
use super::read::{Beginning, Frames, Step};
use super::write::{Journal, Older, Options, Segment};
use crate::types::ClusterId;

/// Why a journal cannot be read, or not be gone on with. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoverError {
    /// Something that was durable is damaged or gone.
    #[error(
        "{file} is damaged at byte {offset}: {problem}. Records from there on are missing, so the server must not \
         start from this journal. Restore the journal directory from a copy; or move it away to start with an empty \
         one, and then no open, lock or resume key of before is known"
    )]
    Corrupt {
        /// The file's name in the journal's directory.
        file: String,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        problem: String,
    },
    /// It was written by a newer release.
    #[error(
        "{file} has format version {version}, and this release knows versions up to {FORMAT_VERSION}. Start the newer \
         release that wrote it"
    )]
    Newer {
        /// The file's name.
        file: String,
        /// Its version.
        version: u16,
    },
    /// It was written in an older format that this release cannot bring up to date.
    #[error(
        "{file} has format version {version}, which this release no longer reads. Start a release between the two \
         first, which brings it up to date"
    )]
    Older {
        /// The file's name.
        file: String,
        /// Its version.
        version: u16,
    },
    /// It belongs to another cluster.
    #[error(
        "{file} was written for another cluster. Is this the right state directory, or was its `cluster` file replaced?"
    )]
    Foreign {
        /// The file's name.
        file: String,
    },
    /// The disk failed.
    #[error("{file}: cannot {what}: {source}")]
    Disk {
        /// The file's name; empty for the directory.
        file: String,
        /// What was tried.
        what: &'static str,
        /// How it ended.
        source: DiskError,
    },
}

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

/// A segment that counts.
#[derive(Clone, Debug)]
struct Found {
    number: u64,
    name: String,
    header: Header,
    encoded: [u8; HEADER_BYTES],
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

fn disk(file: &str, what: &'static str) -> impl FnOnce(DiskError) -> RecoverError {
    let file = file.to_owned();
    move |source| RecoverError::Disk { file, what, source }
}

fn corrupt(file: &str, offset: u64, problem: impl Into<String>) -> RecoverError {
    RecoverError::Corrupt { file: file.to_owned(), offset, problem: problem.into() }
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

/// All segments in order, and files that a crash left behind while it made them.
fn find<D: Disk>(from: &D, cluster: ClusterId) -> Result<(Vec<Found>, Vec<String>), RecoverError> {
    let names = from.list().map_err(disk("", "list the journal's directory"))?;
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| segment_of(name)).collect();
    numbers.sort_unstable();
    let mut found: Vec<Found> = Vec::with_capacity(numbers.len());
    let mut unfinished = Vec::new();
    let newest = numbers.last().copied();
    for number in numbers {
        let name = file_name(number);
        let (beginning, mut frames) = Frames::open(from, &name).map_err(disk(&name, "read it"))?;
        let decoded = match &beginning {
            Beginning::Header(bytes) => Header::decode(bytes).map(|header| (header, *bytes)),
            Beginning::Short => Err(HeaderProblem::Damaged("it is shorter than a header")),
        };
        let (header, encoded) = match decoded {
            Ok(decoded) => decoded,
            Err(HeaderProblem::Version(version)) => return Err(migrate(&name, version)),
            Err(HeaderProblem::Damaged(problem)) => {
                // A header is durable before the first frame is written. A newest file without either was being made.
                let header = HEADER_BYTES as u64;
                let written = frames.written_until(header).map_err(disk(&name, "read it"))?;
                if Some(number) == newest && written <= header {
                    unfinished.push(name);
                    continue;
                }
                return Err(corrupt(&name, 0, problem));
            }
        };
        if header.cluster != cluster {
            return Err(RecoverError::Foreign { file: name });
        }
        if header.segment != number {
            return Err(corrupt(
                &name,
                24,
                format!("it is segment {}, under another's name", header.segment),
            ));
        }
        found.push(Found { number, name, header, encoded });
    }
    Ok((found, unfinished))
}

/// Where older formats would be brought up to date. Version 1 is the first, so there is none yet.
fn migrate(name: &str, version: u16) -> RecoverError {
    let file = name.to_owned();
    if version > FORMAT_VERSION {
        RecoverError::Newer { file, version }
    } else {
        RecoverError::Older { file, version }
    }
}

/// The index at which reading begins: the newest finished checkpoint, else the very first segment.
fn beginning<D: Disk>(from: &D, found: &[Found]) -> Result<usize, RecoverError> {
    for (index, segment) in found.iter().enumerate().rev() {
        let begins = match segment.header.kind {
            SegmentKind::First => true,
            SegmentKind::Continues => false,
            SegmentKind::Checkpoint => checkpoint_is_finished(from, segment, index + 1 == found.len())?,
        };
        if begins {
            return Ok(index);
        }
    }
    match found.first() {
        None => Ok(0),
        Some(oldest) => Err(corrupt(
            &oldest.name,
            0,
            "it is the oldest file, but goes on after others or holds an unfinished checkpoint: files before it are \
             missing",
        )),
    }
}

fn checkpoint_is_finished<D: Disk>(from: &D, segment: &Found, last: bool) -> Result<bool, RecoverError> {
    let name = &segment.name;
    let (_, mut frames) = Frames::open(from, name).map_err(disk(name, "read it"))?;
    loop {
        match frames.step().map_err(disk(name, "read it"))? {
            Step::Frame { head, .. } if head.kind == FrameKind::CheckpointEnd => return Ok(true),
            Step::Frame { .. } => {}
            Step::End { .. } => return Ok(false),
            Step::Bad { at, problem } => {
                judge(&mut frames, name, last, at, problem)?;
                return Ok(false);
            }
        }
    }
}

/// Damage, unless a crash can have left it: in the last write of the last segment.
fn judge<D: Disk>(
    frames: &mut Frames<'_, D>,
    name: &str,
    last: bool,
    at: u64,
    problem: &str,
) -> Result<(), RecoverError> {
    if !last {
        return Err(corrupt(name, at, format!("{problem}, and a later file was begun after it was whole")));
    }
    match frames.later_batch(at).map_err(disk(name, "read it"))? {
        Some(later) => Err(corrupt(
            name,
            at,
            format!("{problem}, and the whole frame at byte {later} was written after this one was durable"),
        )),
        None => Ok(()),
    }
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
