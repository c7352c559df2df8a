//! POSIX locks: one owner's locks on one file are disjoint pieces that a new lock cuts, replaces and joins.
//!
//! ```text
//!   held             [SSSSSSSSSSSSSSSS)
//!   lock exclusive        [XXXX)                 cut:   [SSSS)[XXXX)[SSSSSS)
//!   lock shared           [SSSS)                 join:  [SSSSSSSSSSSSSSSS)
//!   unlock                [----)                 split: [SSSS)      [SSSSSS)
//! ```
//!
//! Pieces of one kind that touch are one piece, unless different opens took them: each goes with its own open.

use super::file::{Step, Steps};
use super::{LockError, LockOwner, Process};
use crate::types::{LockItem, LockKind, LockRange, OpenId};
use std::collections::BTreeMap;

/// A piece, without its offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) end: u64,
    pub(super) kind: LockKind,
    pub(super) open: OpenId,
}

impl Piece {
    fn joins(self, kind: LockKind, open: OpenId) -> bool {
        self.kind == kind && self.open == open
    }
}

/// One owner's pieces by offset.
pub(super) type Pieces = BTreeMap<u64, Piece>;

/// The ends of a range as a POSIX lock has them. The byte at 2^64 - 1 is out of reach (POSIX itself ends at 2^63),
/// so that a piece's length is always a number of 64 bits, however pieces join.
///
/// # Errors
/// [`LockError::BadRange`] for a zero length or that byte.
pub(super) fn ends(range: LockRange) -> Result<(u64, u64), LockError> {
    match u64::try_from(range.end()) {
        Ok(end) if !range.is_empty() => Ok((range.offset(), end)),
        _ => Err(LockError::BadRange),
    }
}

/// Changes to one owner's pieces, worked out beside the table: nothing has happened until it takes the steps.
pub(super) struct Edit<'a> {
    process: &'a Process,
    pieces: Pieces,
    steps: Steps,
}

impl<'a> Edit<'a> {
    pub(super) fn new(process: &'a Process, pieces: Option<&Pieces>) -> Self {
        Self { process, pieces: pieces.cloned().unwrap_or_default(), steps: Steps::new() }
    }

    fn step(&mut self, offset: u64, piece: Piece, step: fn(LockOwner, LockItem) -> Step) {
        let owner = LockOwner::Process { open: piece.open, process: self.process.clone() };
        // A piece has a byte and ends within 64 bits: its range is always one.
        if let Ok(range) = LockRange::new(offset, piece.end.saturating_sub(offset)) {
            self.steps.push(step(owner, LockItem { range, kind: piece.kind }));
        }
    }

    fn insert(&mut self, offset: u64, piece: Piece) {
        if offset < piece.end {
            self.pieces.insert(offset, piece);
            self.step(offset, piece, Step::Add);
        }
    }

    fn remove(&mut self, offset: u64, piece: Piece) {
        self.pieces.remove(&offset);
        self.step(offset, piece, Step::Take);
    }

    /// Makes `[offset, end)` what `with` says, or unlocked.
    pub(super) fn set(&mut self, (offset, end): (u64, u64), with: Option<(LockKind, OpenId)>) {
        let before = self.pieces.range(..offset).next_back();
        let near: Vec<_> = before
            .into_iter()
            .chain(self.pieces.range(offset..=end))
            .filter(|(_, piece)| offset <= piece.end)
            .map(|(from, piece)| (*from, *piece))
            .collect();
        let (mut new_offset, mut new_end) = (offset, end);
        for (from, piece) in near {
            if with.is_some_and(|(kind, open)| piece.joins(kind, open)) {
                self.remove(from, piece);
                (new_offset, new_end) = (new_offset.min(from), new_end.max(piece.end));
            } else if from < end && offset < piece.end {
                self.remove(from, piece);
                self.insert(from, Piece { end: piece.end.min(offset), ..piece });
                self.insert(from.max(end), piece);
            }
        }
        if let Some((kind, open)) = with {
            self.insert(new_offset, Piece { end: new_end, kind, open });
        }
    }

    /// What the owner will have, and the steps there.
    pub(super) fn finish(self) -> (Pieces, Steps) {
        (self.pieces, self.steps)
    }
}
