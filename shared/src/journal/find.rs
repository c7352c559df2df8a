//! Which segment files there are, which of them count, and what damage is.

use super::disk::{Disk, DiskError};
use super::layout::{
    FORMAT_VERSION, FrameKind, HEADER_BYTES, Header, HeaderProblem, SegmentKind, file_name, segment_of,
};
use super::read::{Beginning, Frames, Step};
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

/// A segment that counts.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) number: u64,
    pub(super) name: String,
    pub(super) header: Header,
    pub(super) encoded: [u8; HEADER_BYTES],
}

pub(super) fn disk(file: &str, what: &'static str) -> impl FnOnce(DiskError) -> RecoverError {
    let file = file.to_owned();
    move |source| RecoverError::Disk { file, what, source }
}

pub(super) fn corrupt(file: &str, offset: u64, problem: impl Into<String>) -> RecoverError {
    RecoverError::Corrupt { file: file.to_owned(), offset, problem: problem.into() }
}

/// All segments in order, and files that a crash left behind while it made them.
pub(super) fn find<D: Disk>(from: &D, cluster: ClusterId) -> Result<(Vec<Found>, Vec<String>), RecoverError> {
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
pub(super) fn beginning<D: Disk>(from: &D, found: &[Found]) -> Result<usize, RecoverError> {
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
pub(super) fn judge<D: Disk>(
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
