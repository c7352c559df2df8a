//! [`Filled`]: pieces of a read that storage has brought and that are not placed yet.
//!
//! ```text
//!   file     │ piece 0 │ piece 1 │ piece 2 │ piece 3 │     all asked for at once, where each is a way to the disk
//!   storage      done       ...      done       ...         they come in any order
//!   placed      now        waits for piece 1                and are placed in theirs: no byte past the count ever is
//! ```

use holdfast_verbs::memory::Buffer;

/// Pieces of one read that may be with storage, or wait to be placed.
pub(super) const AHEAD: usize = 4;

/// One piece.
pub(super) struct Piece {
    /// Where it begins within the request.
    pub(super) at: u32,
    pub(super) buffer: Buffer,
    pub(super) count: usize,
    /// The file ends behind it.
    pub(super) is_last: bool,
}

/// Those of one request. No allocation.
#[derive(Default)]
pub(super) struct Filled([Option<Piece>; AHEAD]);

impl Filled {
    /// Keeps a piece. There is room: no more are asked for.
    pub(super) fn put(&mut self, piece: Piece) -> Result<(), Piece> {
        match self.0.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = Some(piece),
            None => return Err(piece),
        }
        Ok(())
    }

    /// The piece that begins there.
    pub(super) fn take(&mut self, at: u32) -> Option<Piece> {
        self.0.iter_mut().find(|place| place.as_ref().is_some_and(|piece| piece.at == at))?.take()
    }

    /// The piece that begins there, left where it is.
    pub(super) fn at(&self, at: u32) -> Option<&Piece> {
        self.0.iter().flatten().find(|piece| piece.at == at)
    }

    /// True if the file ends behind one of them.
    pub(super) fn has_last(&self) -> bool {
        self.0.iter().flatten().any(|piece| piece.is_last)
    }

    /// Any piece.
    pub(super) fn pop(&mut self) -> Option<Piece> {
        self.0.iter_mut().find_map(Option::take)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.iter().flatten().count()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }
}
