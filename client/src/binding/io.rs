//! Reads and writes of a [`Binding`].
//!
//! ```text
//!   read_at ─┬─ the file itself is here, and its bytes in memory: read at once     (`handed`)
//!            └─ in_pieces ─► submit: one piece ─► Seat ─► InFlight ─► count
//!   write_at ── in_pieces ──────┘  gate, range and length are checked; again when its turn has come
//! ```

use super::Binding;
use crate::channel::InFlight;
use crate::error::{Error, Result};
use crate::handed::Now;
use crate::recovery::reissue::{Again, Piece};
use crate::region::Region;
use holdfast_shared::types::{ByteRange, Status};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Pieces of one long read or write in flight at once.
const PIECES_MAX: usize = 16;

impl Binding {
    /// Puts one read in flight: the server places file bytes from `file_offset` on into `range` of the region.
    /// Returns when it is submitted; the bytes are there when the returned future resolves, to how many.
    ///
    /// # Errors
    /// [`Error::Usage`] for a range outside of the region or longer than [`Binding::piece_max`].
    pub async fn submit_read(
        &self,
        region: &Region,
        range: Range<usize>,
        file_offset: u64,
    ) -> Result<InFlight> {
        self.submit(region, range, file_offset, false, false).await
    }

    /// Puts one write in flight: the bytes of `range` go to the file from `file_offset` on. The server fetches them, and
    /// they may be needed again: they must stay as they are until the future resolves.
    ///
    /// # Errors
    /// As [`Binding::submit_read`].
    pub async fn submit_write(
        &self,
        region: &Region,
        range: Range<usize>,
        file_offset: u64,
    ) -> Result<InFlight> {
        self.submit(region, range, file_offset, true, false).await
    }

    async fn submit(
        &self,
        region: &Region,
        range: Range<usize>,
        file_offset: u64,
        write: bool,
        prompt: bool,
    ) -> Result<InFlight> {
        let inner = &self.inner;
        // Shut while the file is found changed, or the open is over.
        let begun = inner.open.as_ref().map_or(Ok(0), |open| open.inner.gate.check())?;
        let seat = inner.seat.load_full();
        let length = region.check(&range)?;
        ByteRange::new(file_offset, length as u64).map_err(|error| Error::Usage(error.to_string()))?;
        if length == 0 {
            return Ok(InFlight::done(0));
        }
        if length > seat.piece_max() {
            let max = seat.piece_max();
            return Err(Error::Usage(format!("{length} bytes are more than one request moves ({max})")));
        }
        if let (false, Some(file)) = (write, inner.handed(&seat.core)) {
            match file.read_now(region, range.clone(), file_offset) {
                Now::Done(count) => {
                    if file.is_others_turn(count) {
                        tokio::task::yield_now().await;
                    }
                    return Ok(InFlight::done(count));
                }
                Now::Rest(done) => {
                    let piece = Piece {
                        region: region.clone(),
                        start: range.start,
                        length,
                        offset: file_offset,
                        write,
                    };
                    let waiting = file.read_rest(region, range, file_offset, done);
                    let again = Again { binding: Arc::clone(inner), seat, piece, begun };
                    return Ok(InFlight::handed(waiting, again));
                }
                Now::Failed => {}
            }
        }
        let piece = Piece { region: region.clone(), start: range.start, length, offset: file_offset, write };
        // Again when its turn has come: it may have waited long.
        let admits = || match inner.open.as_ref().map(|open| open.inner.gate.check()) {
            Some(Ok(now)) if now != begun => Err(Error::Changed),
            Some(Err(error)) => Err(error),
            _ => Ok(()),
        };
        let submitted = seat.submit(&piece, prompt, &admits).await;
        let again = Again { binding: Arc::clone(inner), seat, piece, begun };
        match submitted {
            Ok(piece) => Ok(InFlight::new(piece, again)),
            Err(error) if again.is_wanted(&error) => Ok(InFlight::unsent(again)),
            Err(error) => Err(error),
        }
    }

    /// Reads file bytes from `file_offset` on into `range`; long ranges are split, and the pieces pipelined.
    /// Returns how many bytes were read: fewer than asked for at the end of the file, 0 beyond it. When it returns, also
    /// with an error, nothing of it is under way; a call that is dropped may leave requests behind that still do.
    ///
    /// # Errors
    /// As [`Binding::submit_read`]; and what the server refuses.
    pub async fn read_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        if let Some((count, others_turn)) = self.read_cached(region, &range, file_offset) {
            if others_turn {
                tokio::task::yield_now().await;
            }
            return Ok(count);
        }
        // In a place of its own: what is moved about for a read of the file itself is this function's state, and short.
        Box::pin(self.in_pieces(region, range, file_offset, false)).await
    }

    /// The shortest way: all of a range that is in the page cache, read from the file itself. Anything unusual is not for it.
    /// Says how many bytes, and whether others should run now.
    #[inline]
    fn read_cached(&self, region: &Region, range: &Range<usize>, file_offset: u64) -> Option<(usize, bool)> {
        let inner = &*self.inner;
        let seat;
        let file = match inner.handed(&inner.first) {
            Some(file) => file,
            None => {
                seat = inner.seat.load();
                inner.handed(&seat.core)?
            }
        };
        inner.open.as_ref().map_or(Ok(0), |open| open.inner.gate.check()).ok()?;
        let length = region.check(range).ok()?;
        ByteRange::new(file_offset, length as u64).ok()?;
        match file.read_now(region, range.clone(), file_offset) {
            Now::Done(count) => Some((count, file.is_others_turn(count))),
            Now::Rest(_) | Now::Failed => None,
        }
    }

    /// Writes the bytes of `range` to the file from `file_offset` on; long ranges are split, and the pieces pipelined.
    /// Returns how many leading bytes were written.
    ///
    /// # Errors
    /// As [`Binding::submit_write`]; and what the server refuses.
    pub async fn write_at(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<usize> {
        self.in_pieces(region, range, file_offset, true).await
    }

    async fn in_pieces(&self, region: &Region, range: Range<usize>, at: u64, write: bool) -> Result<usize> {
        let length = region.check(&range)?;
        ByteRange::new(at, length as u64).map_err(|error| Error::Usage(error.to_string()))?;
        if length <= self.piece_max() {
            let (wanted, request) = self.part(region, &range, range.start, at, write, true).await?;
            if wanted == length {
                return request.await;
            }
            let _ = request.await;
        }
        // Seldom, and then for long: short ones do without its state.
        Box::pin(self.in_many_pieces(region, range, at, write)).await
    }

    async fn in_many_pieces(
        &self,
        region: &Region,
        range: Range<usize>,
        at: u64,
        write: bool,
    ) -> Result<usize> {
        let mut in_flight = VecDeque::with_capacity(PIECES_MAX);
        let moved = async {
            let (mut next, mut total) = (range.start, 0);
            loop {
                while next < range.end && in_flight.len() < PIECES_MAX {
                    let (wanted, request) = self.part(region, &range, next, at, write, false).await?;
                    in_flight.push_back((wanted, request));
                    next += wanted;
                }
                let Some((wanted, request)) = in_flight.pop_front() else { return Ok(total) };
                let count = request.await?;
                total += count;
                if count < wanted {
                    return Ok(total);
                }
            }
        }
        .await;
        // Nothing behind a short or failed piece counts; but the region is the caller's again only when all is answered.
        for (_, request) in in_flight {
            let _ = request.await;
        }
        moved
    }

    /// Puts one piece of `range`, from `start` on, in flight: as much as goes in one request. Says how much that is.
    async fn part(
        &self,
        region: &Region,
        range: &Range<usize>,
        start: usize,
        at: u64,
        write: bool,
        prompt: bool,
    ) -> Result<(usize, InFlight)> {
        loop {
            let part = start..range.end.min(start + self.piece_max());
            let (wanted, offset) = (part.len(), at + (start - range.start) as u64);
            match self.submit(region, part, offset, write, prompt).await {
                // Bound again this very moment, to a server that takes less at once.
                Err(Error::Usage(_)) if wanted > self.piece_max() => {}
                submitted => return Ok((wanted, submitted?)),
            }
        }
    }

    /// Writes all of `range`, or fails.
    ///
    /// # Errors
    /// As [`Binding::write_at`]; [`Status::NoSpace`] if the server takes no more.
    pub async fn write_all(&self, region: &Region, range: Range<usize>, file_offset: u64) -> Result<()> {
        let (wanted, write) = (range.len(), |part, at| self.write_at(region, part, at));
        if whole(range, file_offset, write).await? < wanted {
            return Err(Error::refused(Status::NoSpace));
        }
        Ok(())
    }

    /// Reads up to `length` bytes from `file_offset` on into a vector of their own. For small reads: it makes a region
    /// each time, and copies.
    ///
    /// # Errors
    /// As [`Binding::read_at`].
    pub async fn read_vec(&self, file_offset: u64, length: usize) -> Result<Vec<u8>> {
        if length == 0 {
            return Ok(Vec::new());
        }
        let region = Region::private(length)?;
        let count = self.read_at(&region, 0..length, file_offset).await?;
        let mut bytes = vec![0; count];
        region.copy_out(0, &mut bytes)?;
        Ok(bytes)
    }
}

/// Moves `range`, whose bytes are the file's from `file_offset` on, with as many requests as that takes. Returns how many
/// bytes: fewer only where a request moved nothing more.
pub(crate) async fn whole<F: Future<Output = Result<usize>>>(
    range: Range<usize>,
    file_offset: u64,
    request: impl Fn(Range<usize>, u64) -> F,
) -> Result<usize> {
    let mut done = 0;
    while done < range.len() {
        match request(range.start + done..range.end, file_offset + done as u64).await? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}
