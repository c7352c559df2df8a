//! Byte-range locks of an open.
//!
//! ```text
//!   lock ─► a number (at most 31 above the oldest under way) ─► Lock{sequence} ─► granted, refused
//!                                                                  │ answer lost
//!                                                                  └─► resume ─► the same number again: answered,
//!                                                                                not executed twice
//! ```
//!
//! The server remembers the last 32 numbers of an open. A request that waits and would fall out of them is cancelled and
//! asked again under a new number. A cancel may be lost, or come before what it cancels: it is sent again while somebody
//! waits for it, and a request that is to be renumbered is not sent as one that waits.

use super::options::millis;
use super::{Inner, Open};
use crate::error::{Error, Result};
use crate::session::unexpected;
use holdfast_shared::types::{LockItem, LockRange, OpenId, Status};
use holdfast_shared::wire::control::{self, Reply, Request};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::time::timeout;

/// Numbers that the server remembers.
const REMEMBERED: u64 = 32;

/// Between two cancels of the request that is in the way of a new number.
const CANCEL_AGAIN: Duration = Duration::from_millis(500);

/// How to lock.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct LockOptions {
    /// With the open's process it names the lock owner; locks of one owner never stand in each other's way.
    pub owner: u64,
    /// How long to wait for locks in the way; `None` to be refused at once.
    pub wait: Option<Duration>,
}

/// Changes of locks under way.
#[derive(Default)]
pub(crate) struct Locks {
    table: Mutex<Table>,
    /// One less is under way.
    fewer: Notify,
}

#[derive(Default)]
struct Table {
    last: u64,
    under_way: BTreeMap<u64, UnderWay>,
}

struct UnderWay {
    owner: u64,
    waits: bool,
    /// It is being cancelled so that it gets a new number.
    renumber: bool,
}

/// The number of one change, while it is under way.
struct Turn<'a> {
    open: &'a Inner,
    sequence: u64,
    answered: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let known = self.open.locks.table.lock().under_way.remove(&self.sequence);
        self.open.locks.fewer.notify_waiters();
        // The caller has gone, and with it whoever would give the lock back.
        if !self.answered && known.is_some_and(|change| change.waits) {
            self.open.cancel(self.sequence);
        }
    }
}

impl Locks {
    /// The server has executed numbers up to this one.
    pub(super) fn executed(&self, sequence: u64) {
        let mut table = self.table.lock();
        table.last = table.last.max(sequence);
    }
}

impl Inner {
    fn cancel(&self, sequence: u64) {
        if let Some(connection) = self.attached() {
            connection.call_and_forget(Request::CancelLock(control::CancelLock { open: self.id, sequence }));
        }
    }

    async fn turn(&self, owner: u64, waits: bool) -> Turn<'_> {
        loop {
            let fewer = self.locks.fewer.notified();
            tokio::pin!(fewer);
            // From here on nothing is missed.
            fewer.as_mut().enable();
            let in_the_way = {
                let mut table = self.locks.table.lock();
                let next = table.last + 1;
                match table.under_way.first_entry() {
                    Some(mut oldest) if next >= oldest.key() + REMEMBERED => {
                        let change = oldest.get_mut();
                        change.renumber |= change.waits;
                        change.waits.then(|| *oldest.key())
                    }
                    _ => {
                        table.last = next;
                        table.under_way.insert(next, UnderWay { owner, waits, renumber: false });
                        return Turn { open: self, sequence: next, answered: false };
                    }
                }
            };
            if let Some(sequence) = in_the_way {
                self.cancel(sequence);
            }
            // What was cancelled may not have got there, or have gone again on another connection.
            let _ = timeout(CANCEL_AGAIN, fewer).await;
        }
    }

    /// Makes one change, also across a lost connection. `None`: it is to be made again under another number.
    async fn change_locks(
        &self,
        turn: &mut Turn<'_>,
        request: impl FnMut() -> Result<(Request, Duration)>,
    ) -> Result<Option<()>> {
        let reply = self.call(request).await;
        turn.answered = matches!(&reply, Ok(_) | Err(Error::Refused(_)));
        match reply {
            Ok(Reply::Done) => Ok(Some(())),
            Ok(_) => Err(unexpected("lock")),
            Err(error) => match error.status() {
                // Refused only because it was not to wait under this number.
                Some(Status::Cancelled | Status::LockNotGranted | Status::Busy)
                    if self.renumbers(turn.sequence) =>
                {
                    Ok(None)
                }
                _ => Err(error),
            },
        }
    }

    /// True if the change is to get another number.
    fn renumbers(&self, sequence: u64) -> bool {
        self.locks.table.lock().under_way.get(&sequence).is_some_and(|change| change.renumber)
    }
}

fn lock_request(
    open: OpenId,
    sequence: u64,
    owner: u64,
    locks: &[LockItem],
    wait: Option<Duration>,
) -> Result<(Request, Duration)> {
    let lock = control::Lock { open, sequence, owner, locks: locks.to_vec(), wait_ms: wait.map(millis) };
    Ok((Request::Lock(lock), wait.unwrap_or_default()))
}

impl Open {
    /// Locks byte ranges: all of them, or none. The locks are the open's, whatever session or binding it has; they stay
    /// while it is detached, and protect it until its hold time is over.
    ///
    /// A future that is dropped while it waits takes the request back; it may have been granted just before.
    ///
    /// # Errors
    /// [`Status::LockNotGranted`] if another open's lock is in the way (for longer than `wait`); [`Status::Busy`] if
    /// that open is detached, with the time it is still kept; [`Status::Cancelled`] after [`Open::cancel_locks`];
    /// [`Error::Changed`], [`Error::Gone`]. After [`Error::TimedOut`] (a connected server that does not answer) the locks may be
    /// granted yet: who does not ask again unlocks them.
    ///
    /// ```no_run
    /// # async fn example(open: holdfast_client::Open) -> holdfast_client::Result<()> {
    /// use holdfast_client::{LockItem, LockKind, LockOptions, LockRange};
    /// let range = LockRange::new(0, 4096).unwrap();
    /// let wait = Some(std::time::Duration::from_secs(10));
    /// open.lock(&[LockItem { range, kind: LockKind::Exclusive }], LockOptions { owner: 1, wait }).await?;
    /// open.unlock(1, &[range]).await?;
    /// # Ok(()) }
    /// ```
    pub async fn lock(&self, locks: &[LockItem], options: LockOptions) -> Result<()> {
        let inner = &*self.inner;
        let until = options.wait.and_then(|wait| Instant::now().checked_add(wait));
        let rest =
            || until.map_or(options.wait, |until| Some(until.saturating_duration_since(Instant::now())));
        loop {
            inner.gate.check()?;
            let mut turn = inner.turn(options.owner, options.wait.is_some()).await;
            let sequence = turn.sequence;
            let (mut sent, mut settled) = (false, false);
            let request = || {
                // Once sent it may have been granted, so it is asked by its number all the same, a changed file or not: else
                // the server would hold a lock of which nobody knows. But there it waits no more.
                let gate = inner.gate.check();
                if !std::mem::replace(&mut sent, true) {
                    gate?;
                } else if gate.is_err() {
                    settled = true;
                    return lock_request(inner.id, sequence, options.owner, locks, None);
                }
                let wait = if inner.renumbers(sequence) { None } else { rest() };
                lock_request(inner.id, sequence, options.owner, locks, wait)
            };
            match inner.change_locks(&mut turn, request).await {
                Ok(Some(())) => return Ok(()),
                Ok(None) => {}
                // It is not held. If the application has accepted the change meanwhile, it is asked for anew.
                Err(Error::Refused(_)) if settled => inner.gate.check().map(drop)?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Unlocks byte ranges of an owner: all of them, or none. When it returns, no write of this open that was begun before
    /// is still under way.
    ///
    /// # Errors
    /// [`Status::NotLocked`] if the owner does not hold them so.
    pub async fn unlock(&self, owner: u64, ranges: &[LockRange]) -> Result<()> {
        let inner = &*self.inner;
        let mut turn = inner.turn(owner, false).await;
        let sequence = turn.sequence;
        let request = || {
            let unlock = control::Unlock { open: inner.id, sequence, owner, ranges: ranges.to_vec() };
            Ok((Request::Unlock(unlock), Duration::ZERO))
        };
        inner.change_locks(&mut turn, request).await.map(drop)
    }

    /// Takes back the lock requests of an owner that wait; each ends as [`Status::Cancelled`], or was granted just before.
    pub fn cancel_locks(&self, owner: u64) {
        let table = self.inner.locks.table.lock();
        let waiting = table.under_way.iter().filter(|(_, change)| change.waits && change.owner == owner);
        let waiting: Vec<u64> = waiting.map(|(sequence, _)| *sequence).collect();
        drop(table);
        waiting.into_iter().for_each(|sequence| self.inner.cancel(sequence));
    }
}
