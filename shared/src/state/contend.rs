//! Who is in the way of a request, and what becomes of it.
//!
//! | in the way | the request |
//! |---|---|
//! | a live open, an operation under way, an open being closed by its owner | is refused |
//! | a detached open of class hold, before its deadline | is refused `Busy` with the time left, or waits |
//! | detached opens past their deadline, or of class yield | evicts them, and goes on when they are gone |
//!
//! One live one is enough to be refused, and then nothing is evicted. A request that goes on later is asked again from
//! the start: the world may be another.
//!
//! ```text
//!   request ─► judge ─► Free: granted          changed file ─► contenders of it ─► asked again
//!                 ├───► Live: refused                ▲
//!                 ├───► Held: Busy, or contender     │ closed, resumed, expired
//!                 └───► Evict: contender, opens end ─┘
//! ```

use super::life::left_ms;
use super::open::Opening;
use super::operation::Stage;
use super::table::{Ending, FileId, Life, Step};
use super::timers::Timer;
use super::{Asker, Authority, Effect, FileIdentity, refusal};
use crate::types::{
    Access, ByteRange, GoneReason, HoldClass, LockKind, OpenId, ShareMode, Status, Timestamp, conflicts,
};
use crate::wire::control::{Refusal, Request};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What stands in the way, taken together.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Judged {
    Free,
    Live,
    /// Until when at the longest.
    Held(Timestamp),
    /// These can be evicted, or are on their way out.
    Evict(Vec<OpenId>),
}

/// Names one request that waits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct ContenderId(u64);

/// What is asked again.
#[derive(Debug)]
pub(super) enum Contending {
    Open(Box<Opening>),
    Request(Asker, Box<Request>),
}

#[derive(Debug)]
pub(super) struct Contender {
    file: FileIdentity,
    principal: Arc<str>,
    until: Timestamp,
    pub(super) what: Contending,
}

/// Requests that wait for a file, first come, first served.
#[derive(Debug, Default)]
pub(super) struct Contenders {
    by_id: BTreeMap<ContenderId, Contender>,
    by_file: BTreeSet<(FileIdentity, ContenderId)>,
    last: u64,
}

impl Contenders {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Contender> {
        self.by_id.values()
    }

    pub(super) fn get_mut(&mut self, id: ContenderId) -> Option<&mut Contender> {
        self.by_id.get_mut(&id)
    }

    fn of(&self, file: FileIdentity) -> Vec<ContenderId> {
        let of_file = (file, ContenderId(0))..=(file, ContenderId(u64::MAX));
        self.by_file.range(of_file).map(|(_, id)| *id).collect()
    }

    pub(super) fn is_consistent(&self) -> bool {
        self.by_id.len() == self.by_file.len()
            && self.by_id.iter().all(|(id, contender)| self.by_file.contains(&(contender.file, *id)))
    }
}

impl Authority {
    /// What some opens, which are in a request's way, mean for it.
    pub(super) fn judge(&self, in_the_way: impl IntoIterator<Item = OpenId>) -> Judged {
        let mut held = None;
        let mut evict = Vec::new();
        for id in in_the_way {
            let Some(open) = self.opens.get(id) else { continue };
            match &open.life {
                Life::Closing { ending: Ending::Gone(_), .. } => evict.push(id),
                Life::Detached { resume: None, deadline, .. } => {
                    if open.class() == HoldClass::Yield || self.now >= *deadline {
                        evict.push(id);
                    } else {
                        held = held.max(Some(*deadline));
                    }
                }
                Life::Active | Life::Closing { .. } | Life::Detached { resume: Some(_), .. } => {
                    return Judged::Live;
                }
            }
        }
        match held {
            Some(deadline) => Judged::Held(deadline),
            None if evict.is_empty() => Judged::Free,
            None => Judged::Evict(evict),
        }
    }

    /// Judges a claim against the share modes of a file's opens and of what is under way.
    pub(super) fn judge_claim(&self, file: FileIdentity, access: Access, share: ShareMode) -> Judged {
        if self.is_being_removed(file) && conflicts((access, share), (Access::DELETE, ShareMode::ALL)) {
            return Judged::Live;
        }
        if self.shares.admits(file, access, share) {
            return Judged::Free;
        }
        let claimed = self.operations.iter().flat_map(|(_, operation)| operation.stage.claims());
        let mut claimed = claimed.filter(|(claimed, ..)| *claimed == file);
        if claimed.any(|(_, a, s)| conflicts((access, share), (*a, *s))) {
            return Judged::Live;
        }
        let opens =
            self.opens.on(file).filter(|(_, open)| conflicts((access, share), (open.access(), open.share())));
        self.judge(opens.map(|(id, _)| id))
    }

    /// True while the name goes with the last open of the file. That one may itself have no right to delete, if an earlier one
    /// asked for it.
    fn is_being_removed(&self, file: FileIdentity) -> bool {
        self.opens.of_file(file).is_some_and(|of_file| of_file.remove.is_some())
            && self.opens.on(file).any(|(_, open)| open.removal == Step::UnderWay)
    }

    /// Judges a change of a file's size through control against mandatory locks: it would write all of `range`.
    pub(super) fn judge_size(&self, file: FileIdentity, me: Option<OpenId>, range: ByteRange) -> Judged {
        let against = |id| self.lock_counts(id);
        if range.length() == 0 || self.locks.io_rules(file, me.unwrap_or(OpenId::NONE), against).is_empty() {
            return Judged::Free;
        }
        let holders = self.opens.on(file).filter(|(id, open)| {
            open.lock_mode == super::LockMode::Mandatory
                && self.lock_counts(*id)
                && self.locks.locks_of(file, *id).iter().any(|(_, lock)| {
                    let mine = Some(*id) == me && lock.kind == LockKind::Exclusive;
                    !mine && lock.range.bytes().is_some_and(|bytes| bytes.overlaps(range))
                })
        });
        self.judge(holders.map(|(id, _)| id))
    }

    /// True if an open's locks restrict others: not once its hold time is over, nor while it is evicted then.
    pub(super) fn lock_counts(&self, id: OpenId) -> bool {
        let Some(open) = self.opens.get(id) else { return false };
        !open.is_expired(self.now) && !matches!(open.life, Life::Closing { expired: true, .. })
    }

    /// Ends opens that are in the way and may be.
    pub(super) fn evict(&mut self, opens: Vec<OpenId>, effects: &mut Vec<Effect>) {
        for id in opens {
            let evictable = self.opens.get(id).is_some_and(|open| open.is_away());
            if evictable {
                self.end(id, None, Ending::Gone(GoneReason::Evicted), Status::Evicted, effects);
            }
        }
    }

    /// What is told to a request that may not wait for a detached open.
    pub(super) fn busy(&self, deadline: Timestamp) -> Refusal {
        Refusal { retry_ms: Some(left_ms(self.now, deadline).max(1)), ..refusal(Status::Busy, "") }
    }

    /// Has a request wait for what is in its way; evicts what may be. `wait_until` is how long it wants to wait for opens
    /// that are held. Whatever it took of the file is given back already.
    pub(super) fn contend(
        &mut self,
        judged: Judged,
        file: FileIdentity,
        wait_until: Option<Timestamp>,
        mut what: Contending,
        live: Status,
        effects: &mut Vec<Effect>,
    ) {
        let (until, evict) = match judged {
            Judged::Free => (self.now, Vec::new()),
            Judged::Live => return self.give_up_contending(what, &refusal(live, ""), effects),
            Judged::Held(deadline) => match wait_until.filter(|until| *until > self.now) {
                Some(until) => (until, Vec::new()),
                None => {
                    let busy = self.busy(deadline);
                    return self.give_up_contending(what, &busy, effects);
                }
            },
            // It is let in as soon as the fences are confirmed: it waits for those whether it asked to wait or not.
            Judged::Evict(opens) => {
                let fenced = self.now.saturating_add(self.limits.fence_wait);
                let fenced = match &mut what {
                    Contending::Open(opening) => *opening.evicts_until.get_or_insert(fenced),
                    Contending::Request(..) => fenced,
                };
                (wait_until.map_or(fenced, |until| until.max(fenced)), opens)
            }
        };
        let principal = match &what {
            Contending::Open(opening) => Some(opening.principal.clone()),
            Contending::Request(asker, _) => {
                self.sessions.get(asker.session).map(|session| session.principal.clone())
            }
        };
        let principal = principal.unwrap_or_else(|| "".into());
        let of_principal = self.contenders.iter().filter(|there| there.principal == principal).count();
        if self.contenders.len() >= self.limits.contenders
            || of_principal >= self.limits.contenders_per_principal
        {
            let full = Refusal { retry_ms: Some(1000), ..refusal(Status::TooMany, "too many requests wait") };
            return self.give_up_contending(what, &full, effects);
        }
        self.contenders.last += 1;
        let id = ContenderId(self.contenders.last);
        if let Contending::Open(opening) = &what {
            self.opening_waits(opening, id);
        }
        self.contenders.by_id.insert(id, Contender { file, principal, until, what });
        self.contenders.by_file.insert((file, id));
        self.timers.set(until, Timer::Contender(id));
        self.evict(evict, effects);
    }

    fn take_contender(&mut self, id: ContenderId) -> Option<Contender> {
        let contender = self.contenders.by_id.remove(&id)?;
        self.contenders.by_file.remove(&(contender.file, id));
        self.timers.clear(contender.until, Timer::Contender(id));
        Some(contender)
    }

    fn give_up_contending(&mut self, what: Contending, refused: &Refusal, effects: &mut Vec<Effect>) {
        match what {
            Contending::Open(opening) => self.give_up(*opening, refused, effects),
            Contending::Request(asker, _) => asker.refuse(refused.clone(), effects),
        }
    }

    pub(super) fn contender_timed_out(&mut self, id: ContenderId, effects: &mut Vec<Effect>) {
        let Some(contender) = self.take_contender(id) else { return };
        let busy = Refusal { retry_ms: Some(1000), ..refusal(Status::Busy, "it was not given up in time") };
        self.give_up_contending(contender.what, &busy, effects);
    }

    /// Something about a file has changed: those who wait for it are asked again.
    pub(super) fn ask_contenders_again(&mut self, file: FileIdentity, effects: &mut Vec<Effect>) {
        for id in self.contenders.of(file) {
            let Some(contender) = self.take_contender(id) else { continue };
            match contender.what {
                Contending::Open(opening) => self.open_again(opening, effects),
                Contending::Request(asker, request) => self.request_again(asker, *request, effects),
            }
        }
    }

    /// A session is gone: what waits for it alone does not wait any longer.
    pub(super) fn drop_contenders(&mut self, effects: &mut Vec<Effect>) {
        let there = |asker: &Asker| self.is_there(*asker);
        let gone = self.contenders.by_id.iter().filter(|(_, contender)| match &contender.what {
            Contending::Open(opening) => !opening.waiters.iter().any(there),
            Contending::Request(asker, _) => !there(asker),
        });
        let gone: Vec<ContenderId> = gone.map(|(id, _)| *id).collect();
        for id in gone {
            if let Some(contender) = self.take_contender(id) {
                self.give_up_contending(contender.what, &refusal(Status::SessionGone, ""), effects);
            }
        }
    }

    /// An open request goes on from the start.
    fn open_again(&mut self, opening: Box<Opening>, effects: &mut Vec<Effect>) {
        let Some(asker) = opening.waiters.iter().copied().find(|waiter| self.is_there(*waiter)) else {
            return self.give_up(*opening, &refusal(Status::SessionGone, ""), effects);
        };
        let (at, request) = (opening.at.clone(), opening.request.clone());
        let key = (opening.principal.clone(), request.create_id);
        // The operation is made with a stage that costs nothing, so that the request is not lost if there is no room.
        match self.start(asker, Stage::Plain) {
            Err(refused) => self.give_up(*opening, &refused, effects),
            Ok(operation) => {
                if let Some(under_way) = self.operations.get_mut(operation) {
                    under_way.stage = Stage::Opening(opening);
                }
                self.create_ids.0.insert(key, super::open::Created::Opening(operation));
                effects.push(super::open::open_file(operation, FileId(operation.0), at, &request));
            }
        }
    }
}
