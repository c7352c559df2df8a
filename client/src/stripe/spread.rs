//! Cutting a request into pieces, and putting together what they came to.
//!
//! ```text
//!   range: │ piece 0 │ piece 1 │ piece 2 │ piece 3 │     several under way at once, answered in any order
//!          │  whole  │  whole  │  short ─┼─ whole ─┤
//!          └────────── counts ──────┘    └ does not: the file ended before it
//! ```

use super::{Inner, piece};
use crate::error::{Error, Result};
use crate::recovery::reissue::Piece;
use crate::region::Region;
use holdfast_shared::types::ByteRange;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

/// Pieces of one request under way on each rail.
const PIECES_EACH: usize = 8;
/// Pieces of one request under way at once.
const PIECES_MAX: usize = 64;

type UnderWay = Pin<Box<dyn Future<Output = (usize, Result<usize>)> + Send>>;

/// Reads or writes `range`, and returns how many leading bytes of it.
pub(super) async fn spread(
    inner: &Arc<Inner>,
    region: &Region,
    range: Range<usize>,
    at: u64,
    write: bool,
) -> Result<usize> {
    let length = region.check(&range)?;
    ByteRange::new(at, length as u64).map_err(|error| Error::Usage(error.to_string()))?;
    if length == 0 {
        return inner.open.inner.gate.check().map(|_| 0);
    }
    let cut = |start: usize| Piece {
        region: region.clone(),
        start,
        length: inner.unit.min(range.end - start),
        offset: at + (start - range.start) as u64,
        write,
    };
    if length <= inner.unit {
        return piece::run(inner, cut(range.start), true).await;
    }
    let (mut next, mut prefix) = (range.start, Prefix::default());
    let mut under_way: Vec<UnderWay> = Vec::new();
    loop {
        let max = (PIECES_EACH * inner.living()).clamp(PIECES_EACH, PIECES_MAX);
        while next < range.end && under_way.len() < max && prefix.is_whole() {
            let piece = cut(next);
            next += piece.length;
            let (number, inner) = (prefix.expect(piece.length), Arc::clone(inner));
            under_way.push(Box::pin(async move { (number, piece::run(&inner, piece, false).await) }));
        }
        if under_way.is_empty() {
            return prefix.result();
        }
        let (number, outcome) = std::future::poll_fn(|cx| {
            for nth in 0..under_way.len() {
                if let Poll::Ready(done) = under_way[nth].as_mut().poll(cx) {
                    drop(under_way.swap_remove(nth));
                    return Poll::Ready(done);
                }
            }
            Poll::Pending
        })
        .await;
        prefix.put(number, outcome);
    }
}

/// What the pieces of one request came to, in whatever order.
#[derive(Default)]
struct Prefix {
    /// Bytes wanted, and what became of them.
    pieces: Vec<(usize, Option<Result<usize>>)>,
    broken: bool,
}

impl Prefix {
    /// One more piece, behind the others; returns its number.
    fn expect(&mut self, wanted: usize) -> usize {
        self.pieces.push((wanted, None));
        self.pieces.len() - 1
    }

    fn put(&mut self, number: usize, outcome: Result<usize>) {
        let Some((wanted, place)) = self.pieces.get_mut(number) else { return };
        self.broken |= !matches!(&outcome, Ok(count) if count == wanted);
        *place = Some(outcome);
    }

    /// False if a piece is short or failed: then more of them would not count.
    fn is_whole(&self) -> bool {
        !self.broken
    }

    /// Bytes up to the first that is missing; the error, if a piece failed before anything was missing.
    fn result(mut self) -> Result<usize> {
        // Whoever writes the rest again must know that an old piece of it may yet land.
        let unknown = |outcome: &Option<_>| matches!(outcome, Some(Err(Error::WriteFateUnknown)));
        if let Some(nth) = self.pieces.iter().position(|(_, outcome)| unknown(outcome)) {
            return self.pieces.swap_remove(nth).1.unwrap_or(Ok(0));
        }
        let mut total = 0;
        for (wanted, outcome) in self.pieces {
            let count = outcome.unwrap_or(Ok(0))?;
            total += count;
            if count < wanted {
                break;
            }
        }
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn came(outcomes: [Result<usize>; 4], order: [usize; 4]) -> Result<usize> {
        let mut prefix = Prefix::default();
        let numbers = outcomes.each_ref().map(|_| prefix.expect(10));
        let mut outcomes = outcomes.map(Some);
        for nth in order {
            prefix.put(numbers[nth], outcomes[nth].take().unwrap());
        }
        prefix.result()
    }

    #[test]
    fn a_short_piece_makes_all_behind_it_not_count_whatever_comes_first() {
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [3, 1, 0, 2]] {
            let read = |counts: [usize; 4]| came(counts.map(Ok), order).unwrap();
            assert_eq!(read([10, 10, 10, 10]), 40);
            assert_eq!(read([10, 3, 10, 10]), 13, "the file grew while it was read");
            assert_eq!(read([10, 10, 0, 0]), 20);
            assert_eq!(read([0, 10, 10, 10]), 0);
        }
    }

    #[test]
    fn an_error_counts_unless_the_file_ended_before_it() {
        let failed = || Err(Error::WritesLost);
        for order in [[0, 1, 2, 3], [3, 2, 1, 0]] {
            assert!(matches!(came([Ok(10), failed(), Ok(10), Ok(3)], order), Err(Error::WritesLost)));
            assert!(matches!(came([Ok(10), Ok(4), failed(), Ok(10)], order), Ok(14)));
            let unknown = came([Ok(10), Ok(4), Err(Error::WriteFateUnknown), Ok(10)], order);
            assert!(
                matches!(unknown, Err(Error::WriteFateUnknown)),
                "it may yet land on what is written next"
            );
        }
    }

    #[test]
    fn after_a_short_or_failed_piece_no_more_are_begun() {
        let mut prefix = Prefix::default();
        let (first, second) = (prefix.expect(10), prefix.expect(10));
        prefix.put(second, Ok(10));
        assert!(prefix.is_whole());
        prefix.put(first, Ok(9));
        assert!(!prefix.is_whole());
    }
}
