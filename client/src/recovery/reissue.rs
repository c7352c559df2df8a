//! Reads and writes whose answer did not come: made again on a new binding.
//!
//! | what | is made again |
//! |---|---|
//! | a read | always, once the open may be read |
//! | a write, never sent | the same |
//! | a write, perhaps carried out | unless the file was found changed since: then [`Error::WriteFateUnknown`] |
//!
//! The file is looked at when the open is resumed. While it stays active no verdict is taken: a write made again may then
//! come after one of another open that shares the file, as of any two writes without a lock either may be the last.
//!
//! The same bytes go to the same place, so a write that was carried out before does no harm, and what is late of it cannot
//! land any more (see [`super::rebind`]).

use super::rebind::{self, Trials};
use crate::binding::{Inner, Seat};
use crate::error::{Error, Result};
use crate::open::Open;
use crate::region::Region;
use std::sync::Arc;

/// A read or write of one piece, as it was asked for.
pub(crate) struct Piece {
    pub(crate) region: Region,
    pub(crate) start: usize,
    pub(crate) length: usize,
    pub(crate) offset: u64,
    pub(crate) write: bool,
}

/// All it takes to make a request again. Kept beside the request while it is under way.
pub(crate) struct Again {
    pub(crate) binding: Arc<Inner>,
    /// Where it was submitted.
    pub(crate) seat: Arc<Seat>,
    pub(crate) piece: Piece,
    /// The open's count of changes then.
    pub(crate) begun: u64,
}

impl Again {
    /// True if the request is to be made again after this error.
    pub(crate) fn is_wanted(&self, error: &Error) -> bool {
        self.binding.open.is_some() && rebind::is_wanted(error)
    }

    /// True if nothing has come between since a read of the file itself was begun.
    pub(crate) fn is_handed_still(&self) -> bool {
        let gate = self.binding.open.as_ref().map_or(Ok(self.begun), |open| open.inner.gate.check());
        gate.is_ok_and(|now| now == self.begun) && self.binding.handed(&self.seat.core).is_some()
    }

    /// The server has acknowledged it.
    pub(crate) fn acknowledged(&self) {
        if let (true, Some(open)) = (self.piece.write, &self.binding.open) {
            open.inner.durable.wrote();
        }
    }

    /// Makes a read again whose seat is as good as it was: what it was read by has ended.
    pub(crate) async fn run_here(self) -> Result<usize> {
        self.run_as(true, false).await
    }

    /// Makes the request again, on another seat, until it is answered. `sent`: it may have been carried out.
    pub(crate) async fn run(self, sent: bool) -> Result<usize> {
        self.run_as(false, sent).await
    }

    async fn run_as(mut self, here: bool, sent: bool) -> Result<usize> {
        let binding = Arc::clone(&self.binding);
        let Some(open) = &binding.open else { return Err(Error::Internal("nothing to bind again to")) };
        let (mut trials, mut done, mut here, mut sent) = (Trials::new(open), 0, here, sent);
        loop {
            let replaced = if here { Ok(()) } else { trials.replace(&binding, open, &self.seat).await };
            self.may_go_on(open, sent)?;
            match replaced {
                // Given up, with `recovery = "soft"`.
                Err(Error::TimedOut { .. }) if self.piece.write && sent => {
                    return Err(Error::WriteFateUnknown);
                }
                replaced => replaced?,
            }
            if !here {
                self.seat = binding.seat.load_full();
            }
            match self.once(&mut done, &|| self.may_go_on(open, sent)).await {
                Ok(count) => {
                    self.acknowledged();
                    return Ok(count);
                }
                // Each time it is another mapping, and they are few.
                Err(Error::MappingLost) => here = true,
                Err(error) if rebind::is_wanted(&error) => (here, sent) = (false, true),
                Err(error) => return Err(error),
            }
        }
    }

    fn may_go_on(&self, open: &Open, sent: bool) -> Result<()> {
        let now = open.inner.gate.check();
        let another_time = match &now {
            Ok(count) => *count != self.begun,
            Err(error) => matches!(error, Error::Changed),
        };
        if self.piece.write && sent && another_time {
            return Err(Error::WriteFateUnknown);
        }
        now.map(drop)
    }

    /// On the seat as it is now, in as many pieces as that needs. `done` counts what is surely done.
    async fn once(&self, done: &mut usize, admits: &(dyn Fn() -> Result<()> + Sync)) -> Result<usize> {
        let piece = &self.piece;
        let max = self.seat.piece_max();
        while *done < piece.length {
            let wanted = max.min(piece.length - *done);
            let part = Piece {
                region: piece.region.clone(),
                start: piece.start + *done,
                length: wanted,
                offset: piece.offset + *done as u64,
                write: piece.write,
            };
            let count = self.seat.submit(&part, false, admits).await?.count().await?;
            *done += count;
            if count < wanted {
                break;
            }
        }
        Ok(*done)
    }
}
