//! One piece of a request: on one rail after the other, until it is answered.
//!
//! | its rail | a read | a write |
//! |---|---|---|
//! | refused it, or never had it | goes to another | goes to another |
//! | ended before it answered | goes to another | first the old handle is made sure to land nothing any more |

use super::rail::Rail;
use super::{Inner, is_wanted};
use crate::binding::Seat;
use crate::error::{Error, Result};
use crate::recovery::reissue::Piece;
use crate::recovery::{Patience, rebind};
use crate::region::Region;
use std::sync::Arc;

/// Moves a piece, and returns how much of it there was. `prompt`: nothing else is waited for.
pub(super) async fn run(inner: &Arc<Inner>, piece: Piece, prompt: bool) -> Result<usize> {
    let open = &inner.open;
    let begun = open.inner.gate.check()?;
    let mut patience = Patience::new(open.session().config());
    let mut done = 0;
    // It was under way when its channel broke.
    let mut sent = false;
    // Where that was, until it is settled.
    let mut doubtful: Option<Arc<Seat>> = None;
    loop {
        // As for one binding: nothing is written over what somebody else may have written since it was begun.
        let admits = move || {
            let now = open.inner.gate.check();
            let another_time = match &now {
                Ok(count) => *count != begun,
                Err(error) => matches!(error, Error::Changed),
            };
            match now {
                _ if piece.write && sent && another_time => Err(Error::WriteFateUnknown),
                Ok(_) if piece.write && another_time => Err(Error::Changed),
                now => now.map(drop),
            }
        };
        let unknown = |error: Error| match error {
            // Given up, with `recovery = "soft"`.
            Error::TimedOut { .. } if sent => Error::WriteFateUnknown,
            error => error,
        };
        let found = inner.rail(&mut patience).await;
        admits()?;
        let (rail, seat) = found.map_err(unknown)?;
        if let Some(old) = &doubtful {
            if !inner.settle(old, &rail, &seat, &mut patience).await.map_err(unknown)? {
                continue;
            }
            doubtful = None;
        }
        admits()?;
        let wanted = seat.piece_max().min(piece.length - done);
        let part = Piece {
            region: piece.region.clone(),
            start: piece.start + done,
            length: wanted,
            offset: piece.offset + done as u64,
            write: piece.write,
        };
        let load = rail.load(wanted);
        let (outcome, submitted) = match seat.submit(&part, prompt, &admits).await {
            Ok(reply) => (reply.count().await, true),
            Err(error) => (Err(error), false),
        };
        drop(load);
        match outcome {
            Ok(count) => {
                if piece.write {
                    open.inner.durable.wrote();
                }
                rail.moved(count);
                done += count;
                if count < wanted || done >= piece.length {
                    return Ok(done);
                }
            }
            // What it was read by has ended, and the channel has not.
            Err(Error::MappingLost) => {}
            Err(error) if is_wanted(&error) => {
                if piece.write && submitted {
                    sent = true;
                    doubtful = Some(Arc::clone(&seat));
                }
                inner.failed(&rail, seat);
            }
            Err(error) => return Err(error),
        }
    }
}

impl Inner {
    /// Makes sure that no write of `old` lands any more, so that one of them may be made again on another rail. False if that
    /// rail turned out to be dead too: then perhaps the data plane is, and nothing needs to be done.
    async fn settle(
        self: &Arc<Self>,
        old: &Arc<Seat>,
        rail: &Arc<Rail>,
        seat: &Arc<Seat>,
        patience: &mut Patience,
    ) -> Result<bool> {
        let _turn = patience.wait("a write to be settled", self.settling.lock()).await?;
        if !rebind::may_land(&self.open, old) {
            return Ok(true);
        }
        // A data plane that was killed ends all channels, one a moment after the other: only an answer shows that it lives.
        if !patience.wait("a data channel's answer", self.lives(seat)).await?? {
            self.failed(rail, Arc::clone(seat));
            return Ok(false);
        }
        rebind::silence(&self.open, old, patience).await?;
        Ok(true)
    }

    /// True if the seat answers.
    async fn lives(&self, seat: &Arc<Seat>) -> Result<bool> {
        let region = match self.probe.get() {
            Some(region) => region.clone(),
            None => self
                .probe
                .get_or_init({
                    let region = Region::allocate(1)?;
                    move || region
                })
                .clone(),
        };
        // One that may not read is refused, which is an answer too.
        let byte = Piece { region, start: 0, length: 1, offset: 0, write: false };
        let outcome = match seat.ask(&byte, false, &|| Ok(())).await {
            Ok(reply) => reply.count().await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(_) | Err(Error::Refused(_)) if seat.channel.why_ended().is_none() => Ok(true),
            Err(error) if !matches!(error, Error::Refused(_)) && !is_wanted(&error) => Err(error),
            _ => Ok(false),
        }
    }
}
