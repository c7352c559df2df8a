//! What was promised, and whether it was kept. The oracle sees every request that reaches the server, every reply and
//! record that leaves the authority, and every change of a file; it knows nothing of the authority's tables.
//!
//! ```text
//!  requests, losses ─┐
//!  records, replies ─┼─► facts: one for each open that was told ─► broken promise? the run ends
//!  files' history ───┘
//! ```
//!
//! A fact is *protected* from the reply that told of it until its client wants it closed, its hold time is over, or the
//! operator closes it. Nothing that conflicts with a protected fact may be told; once something that conflicts with an
//! unprotected fact is told, that fact is *given away*, and no resume may bring it back.

mod grants;
mod locks;
mod verdict;

use crate::files::{Files, Node};
use crate::plane::Plane;
use holdfast_shared::journal::record::Record;
use holdfast_shared::state::FileIdentity;
use holdfast_shared::types::{
    Access, CreateId, GoneReason, HandleId, HoldClass, LockItem, LockRange, OpenId, SessionId, ShareMode,
};
use holdfast_shared::wire::control::{Reply, Request};
use holdfast_shared::wire::link::LinkBinding;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Opens that were closed and are remembered.
const CLOSED: usize = 200;
/// Nanoseconds of a millisecond.
pub(crate) const MS: u64 = 1_000_000;

/// A lock that was told.
#[derive(Clone, Debug)]
pub(super) struct ToldLock {
    owner: u64,
    item: LockItem,
    /// An unlock of it has reached the server.
    releasing: bool,
}

/// How an open ended, for its client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ended {
    /// Its close was answered.
    Closed,
    /// Its client was told that it is gone.
    Gone,
}

/// Where the changes begin that a verdict speaks of, as numbers of changes of the file.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Window {
    /// Those made through the server.
    server: usize,
    /// Those made beside it: only once the file's evidence was recorded can they be told from the open's own.
    outside: Option<usize>,
}

/// An open, as the world was told.
#[derive(Clone, Debug)]
pub(super) struct Fact {
    pub(super) principal: String,
    pub(super) node: Option<Node>,
    pub(super) access: Access,
    pub(super) share: ShareMode,
    pub(super) hold_ms: u64,
    pub(super) class: HoldClass,
    /// A reply has told of it.
    pub(super) told: bool,
    pub(super) told_at: u64,
    pub(super) session: Option<SessionId>,
    /// When it was detached; at the latest.
    pub(super) detached: Option<u64>,
    pub(super) window: Window,
    /// Its close has reached the server, or it ends with its session.
    pub(super) closing: bool,
    pub(super) forced: bool,
    pub(super) given_away: bool,
    pub(super) ended: Option<Ended>,
    pub(super) tombstone: Option<GoneReason>,
    /// Control died when a tombstone had been written, perhaps: the restart tells.
    perhaps_gone: Option<GoneReason>,
    pub(super) locks: Vec<ToldLock>,
    /// Lock and unlock requests that were answered.
    pub(super) executed: BTreeSet<u64>,
    pub(super) bindings: BTreeMap<LinkBinding, (HandleId, Option<&'static str>)>,
    pub(super) epoch: u64,
    /// Nobody else could have changed the file since the open was detached, and no crash came between: it must not be
    /// called changed.
    pub(super) untouched: bool,
    /// A resume was decided, and its answer has not left yet.
    pub(super) resuming: bool,
    /// Of resumes whose answers have not left: their epochs, and when the open had been detached that each of them took.
    pub(super) decided: BTreeMap<u64, Option<u64>>,
    /// It was detached anew before such an answer could leave.
    pub(super) lost_again: bool,
    /// An answer said that the hold time was over, and its client has not heard it: the next one must say so too.
    pub(super) lapse_unheard: bool,
    /// The same for what the server can know: it may say so twice.
    pub(super) lapse_unproven: bool,
    /// A resume was answered, and its client has not heard the answer: what changed before concerns it still.
    pub(super) unheard: bool,
    /// A resume was answered, and the server does not know yet that the client has heard it: it may tell a change twice.
    pub(super) unproven: bool,
}

impl Fact {
    /// True if nothing that conflicts may be told at `now`.
    pub(super) fn protected(&self, now: u64) -> bool {
        self.stands()
            && match self.detached {
                None => true,
                Some(since) => {
                    self.class == HoldClass::Hold
                        && now < since.saturating_add(self.hold_ms.saturating_mul(MS))
                }
            }
    }

    /// When its time is over, if it was detached at `since`.
    pub(super) fn deadline(&self, since: Option<u64>) -> Option<u64> {
        Some(since?.saturating_add(self.hold_ms.saturating_mul(MS)))
    }

    /// True if it was told and nothing has ended it, though its time may be over.
    pub(super) fn stands(&self) -> bool {
        self.told && !self.closing && !self.forced && !self.given_away && self.ended.is_none()
    }

    fn bury_bindings(&mut self, why: &'static str, keep: &[HandleId]) {
        for (handle, dead) in self.bindings.values_mut() {
            if !keep.contains(handle) {
                dead.get_or_insert(why);
            }
        }
    }
}

/// A request that has reached the server.
#[derive(Clone, Debug)]
struct Asked {
    at: u64,
    request: Request,
    /// How many changes each file had seen.
    changes: BTreeMap<Node, usize>,
}

/// What an open is as the authority lists it after a restart.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) open: OpenId,
    pub(crate) locks: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Oracle {
    pub(super) facts: BTreeMap<OpenId, Fact>,
    nodes: BTreeMap<FileIdentity, Node>,
    pub(super) creates: BTreeMap<(String, CreateId), OpenId>,
    asked: BTreeMap<(SessionId, u64), Asked>,
    answered: BTreeSet<(SessionId, u64)>,
    principals: BTreeMap<SessionId, String>,
    /// Resume keys that were told, and of which open.
    keys: BTreeMap<Vec<u8>, OpenId>,
    forced: BTreeSet<OpenId>,
    lost: BTreeSet<OpenId>,
    /// Opens whose close was answered, the oldest first: so many are remembered.
    closed: VecDeque<OpenId>,
    /// Sessions that have asked to end.
    leaving: BTreeSet<SessionId>,
    /// Until then somebody may be changing names or sizes.
    meddled_until: u64,
    /// Control has died, and nobody is let in yet.
    recovering: bool,
    /// Of the records of this life of control: those not known to be durable.
    volatile: BTreeMap<u64, Volatile>,
    /// The control that lives has restarted with what the journal told; no open untouched by a crash is told changed.
    broken: Option<String>,
    /// Resumes that were told, for tests.
    pub(crate) resumed: u64,
    /// Verdicts that were told: unchanged, expired unchanged, changed, gone.
    pub(crate) verdicts: [u64; 4],
}

#[derive(Debug)]
enum Volatile {
    Baseline(OpenId),
    Tombstone(OpenId),
    /// The client of an open knows that its time was over.
    Lapse(OpenId),
    /// Baselines after a restart.
    Settled(Vec<OpenId>),
}

/// What the oracle may look at besides.
pub(crate) struct Sight<'a> {
    pub(crate) now: u64,
    pub(crate) files: &'a Files,
    pub(crate) plane: Option<&'a Plane>,
}

impl Oracle {
    /// The first broken promise.
    pub(crate) fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    pub(crate) fn fail(&mut self, words: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some(words());
        }
    }

    fn session_facts(&mut self, session: SessionId) -> impl Iterator<Item = (&OpenId, &mut Fact)> {
        self.facts.iter_mut().filter(move |(_, fact)| fact.session == Some(session))
    }

    pub(crate) fn knows_file(&mut self, identity: FileIdentity, node: Node) {
        self.nodes.insert(identity, node);
    }

    pub(crate) fn session_began(&mut self, session: SessionId, principal: &str) {
        self.principals.insert(session, principal.to_owned());
    }

    /// The authority is told that a session is lost, or ends it.
    pub(crate) fn session_lost(&mut self, sight: &Sight<'_>, session: SessionId) {
        let opens: Vec<OpenId> = self.session_facts(session).map(|(open, _)| *open).collect();
        for open in opens {
            self.detach(sight, open);
        }
    }

    fn detach(&mut self, sight: &Sight<'_>, open: OpenId) {
        let meddled = self.meddled_until;
        let (writers, recovering) = (self.other_writers(open), self.recovering);
        let Some(fact) = self.facts.get_mut(&open) else { return };
        if fact.detached.is_some() {
            if std::mem::take(&mut fact.resuming) {
                // It was live again, though nobody heard of it: the time counts anew, what may have changed does not.
                fact.detached = Some(sight.now);
            }
            return;
        }
        fact.detached = Some(sight.now);
        fact.closing |= fact.hold_ms == 0;
        if std::mem::take(&mut fact.unheard) {
            // For its client it has been away all the while.
            fact.untouched = false;
            return;
        }
        let server = fact.node.map_or(0, |node| sight.files.changes(node));
        fact.window = Window { server, outside: None };
        fact.untouched = !writers && !recovering && !fact.unproven && sight.now > meddled;
    }

    /// A client hears that its open was resumed.
    pub(crate) fn heard(&mut self, session: SessionId, open: OpenId) {
        if let Some(fact) = self.facts.get_mut(&open).filter(|fact| fact.session == Some(session)) {
            fact.unheard &= fact.detached.is_some();
            fact.lapse_unheard &= fact.detached.is_some();
        }
    }

    /// True if another open of the file may write.
    fn other_writers(&self, open: OpenId) -> bool {
        let node = self.facts.get(&open).and_then(|fact| fact.node);
        self.facts.iter().any(|(other, fact)| {
            *other != open
                && fact.node == node
                && fact.access.contains(Access::WRITE)
                && !matches!(fact.ended, Some(Ended::Closed))
        })
    }

    /// Somebody may be changing the file by other means: whatever is detached on it may be called changed.
    pub(crate) fn touched(&mut self, node: Node) {
        for fact in self.facts.values_mut().filter(|fact| fact.node == Some(node)) {
            fact.untouched = false;
        }
    }

    /// A request reaches the authority.
    pub(crate) fn request(&mut self, sight: &Sight<'_>, session: SessionId, id: u64, request: &Request) {
        let changes = match request {
            Request::Resume(_) => {
                self.nodes.values().map(|node| (*node, sight.files.changes(*node))).collect()
            }
            _ => BTreeMap::new(),
        };
        self.asked.insert((session, id), Asked { at: sight.now, request: request.clone(), changes });
        match request {
            Request::Close(open) => {
                if let Some(fact) = self.facts.get_mut(open).filter(|fact| fact.session == Some(session)) {
                    fact.closing |= fact.detached.is_none();
                }
            }
            Request::Logoff => {
                self.leaving.insert(session);
                for (_, fact) in self.session_facts(session).filter(|(_, fact)| fact.detached.is_none()) {
                    fact.closing = true;
                }
            }
            Request::Unlock(unlock) => {
                if let Some(fact) =
                    self.facts.get_mut(&unlock.open).filter(|fact| fact.session == Some(session))
                {
                    if !fact.executed.contains(&unlock.sequence) {
                        releasing(&mut fact.locks, unlock.owner, &unlock.ranges, true);
                    }
                }
            }
            Request::Remove(_) | Request::Rename(_) | Request::SetAttributes(_) => {
                self.meddled_until = sight.now + 5000 * MS;
                for fact in self.facts.values_mut() {
                    fact.untouched = false;
                }
            }
            _ => {}
        }
    }

    pub(crate) fn force_close(&mut self, open: OpenId) {
        self.forced.insert(open);
        if let Some(fact) = self.facts.get_mut(&open) {
            fact.forced = true;
        }
    }

    /// True if the operator has closed it already.
    pub(crate) fn was_forced(&self, open: OpenId) -> bool {
        self.forced.contains(&open)
    }

    pub(crate) fn file_lost(&mut self, open: OpenId) {
        self.lost.insert(open);
        if let Some(fact) = self.facts.get_mut(&open) {
            fact.forced = true;
        }
    }

    /// A record leaves the authority.
    pub(crate) fn persist(&mut self, sight: &Sight<'_>, sequence: u64, record: &Record) {
        match record {
            Record::Opened(opened) => {
                let key = (opened.principal.clone(), opened.request.create_id);
                self.creates.insert(key, opened.open);
                let fact = Fact {
                    principal: opened.principal.clone(),
                    node: self.nodes.get(&opened.identity).copied(),
                    access: opened.request.access,
                    share: opened.request.share,
                    hold_ms: opened.hold_ms,
                    class: opened.class,
                    told: false,
                    told_at: 0,
                    session: None,
                    detached: None,
                    window: Window::default(),
                    closing: false,
                    forced: false,
                    given_away: false,
                    ended: None,
                    tombstone: None,
                    perhaps_gone: None,
                    locks: Vec::new(),
                    executed: BTreeSet::new(),
                    bindings: BTreeMap::new(),
                    epoch: 0,
                    untouched: false,
                    resuming: false,
                    decided: BTreeMap::new(),
                    lost_again: false,
                    lapse_unheard: false,
                    lapse_unproven: false,
                    unheard: false,
                    unproven: false,
                };
                let (node, writes) = (fact.node, fact.access.contains(Access::WRITE));
                self.facts.entry(opened.open).or_insert(fact);
                if let (Some(node), true) = (node, writes) {
                    self.touched(node);
                }
            }
            Record::Detached(open) => {
                if let Some(fact) = self.facts.get_mut(open) {
                    fact.lost_again = !fact.decided.is_empty();
                }
                self.detach(sight, *open);
            }
            // Its session is ended by a resume that supersedes it, or has ended by itself; that is told later.
            Record::Closed(open) => {
                if let Some(fact) = self.facts.get_mut(open).filter(|fact| fact.hold_ms == 0 || fact.resuming)
                {
                    fact.closing = true;
                }
            }
            Record::Locked(locked) => {
                let over = |fact: &&Fact| fact.tombstone.is_some() || fact.ended.is_some();
                if let Some(fact) = self.facts.get(&locked.open).filter(over).cloned() {
                    self.fail(|| format!("{} is locked after it ended: {fact:?}", locked.open));
                }
            }
            Record::Resumed(resumed) => {
                let Some(fact) = self.facts.get_mut(&resumed.open) else { return };
                fact.resuming = true;
                fact.lost_again = false;
                fact.decided.insert(resumed.epoch, fact.detached);
                let over = fact.deadline(fact.detached).is_some_and(|deadline| sight.now >= deadline);
                if resumed.lapsed && !over && !fact.lapse_unproven {
                    let fact = fact.clone();
                    return self
                        .fail(|| format!("{} is taken for expired before its time: {fact:?}", resumed.open));
                }
                fact.lapse_unproven |= resumed.lapsed;
            }
            Record::Heard(open) => {
                if let Some(fact) = self.facts.get_mut(open) {
                    fact.unproven = false;
                    if std::mem::take(&mut fact.lapse_unproven) {
                        self.volatile.insert(sequence, Volatile::Lapse(*open));
                    }
                }
            }
            Record::Baseline(open, _) => {
                self.volatile.insert(sequence, Volatile::Baseline(*open));
                if let Some(fact) = self.facts.get_mut(open) {
                    fact.window.outside = fact.node.map(|node| sight.files.changes(node));
                }
            }
            // A baseline of each open that was found again, unless its own bindings may still write.
            Record::Settled => {
                let quiet = |fact: &Fact| {
                    let dead = fact.bindings.values().all(|(_, dead)| dead.is_some());
                    dead || !fact.access.contains(Access::WRITE)
                };
                let facts = self.facts.iter_mut().filter(|(_, fact)| fact.detached.is_some() && quiet(fact));
                let mut settled = Vec::new();
                for (open, fact) in facts.filter(|(_, fact)| fact.window.outside.is_none()) {
                    fact.window.outside = fact.node.map(|node| sight.files.changes(node));
                    settled.push(*open);
                }
                self.volatile.insert(sequence, Volatile::Settled(settled));
            }
            Record::Tombstone(tombstone) => {
                self.volatile.insert(sequence, Volatile::Tombstone(tombstone.open));
                self.evicted(sight, tombstone.open, tombstone.reason);
            }
            _ => {}
        }
    }

    /// The authority ends an open that its client did not want ended.
    fn evicted(&mut self, sight: &Sight<'_>, open: OpenId, reason: GoneReason) {
        let (forced, lost) = (self.forced.contains(&open), self.lost.contains(&open));
        let Some(fact) = self.facts.get_mut(&open) else { return };
        fact.tombstone = Some(reason);
        let right = match reason {
            GoneReason::Evicted => !fact.protected(sight.now),
            GoneReason::ForceClosed => forced,
            GoneReason::FileLost => lost,
        };
        if !right {
            let fact = fact.clone();
            self.fail(|| format!("{open} is ended ({reason:?}) while it is protected: {fact:?}"));
        }
    }

    pub(crate) fn persisted(&mut self, through: u64) {
        self.volatile = self.volatile.split_off(&(through + 1));
    }

    /// Control has died.
    pub(crate) fn control_died(&mut self) {
        self.recovering = true;
        for volatile in std::mem::take(&mut self.volatile).into_values() {
            match volatile {
                Volatile::Baseline(open) => {
                    if let Some(fact) = self.facts.get_mut(&open) {
                        fact.window.outside = None;
                    }
                }
                Volatile::Settled(opens) => {
                    for open in opens {
                        if let Some(fact) = self.facts.get_mut(&open) {
                            fact.window.outside = None;
                        }
                    }
                }
                Volatile::Lapse(open) => {
                    if let Some(fact) = self.facts.get_mut(&open) {
                        fact.lapse_unproven = true;
                    }
                }
                Volatile::Tombstone(open) => {
                    if let Some(fact) = self.facts.get_mut(&open).filter(|fact| fact.ended.is_none()) {
                        fact.perhaps_gone = fact.tombstone.take();
                    }
                }
            }
        }
        for fact in self.facts.values_mut() {
            fact.untouched = false;
            fact.decided.clear();
            fact.lost_again = false;
        }
    }

    /// Control has started again, and these opens are there.
    pub(crate) fn recovered(&mut self, sight: &Sight<'_>, listed: &[Listed]) {
        self.recovering = false;
        let there: BTreeMap<OpenId, &Listed> = listed.iter().map(|listed| (listed.open, listed)).collect();
        let mut failed = None;
        for (open, fact) in &mut self.facts {
            let perhaps_gone = fact.perhaps_gone.take();
            match there.get(open) {
                None => {
                    fact.tombstone = fact.tombstone.or(perhaps_gone);
                    if fact.protected(sight.now) {
                        failed.get_or_insert(format!(
                            "{open} was told, and is not there after a restart: {fact:?}"
                        ));
                    }
                    fact.closing = true;
                }
                Some(listed) => {
                    if fact.ended == Some(Ended::Closed) {
                        failed.get_or_insert(format!(
                            "{open} was closed, and is there after a restart: {fact:?}"
                        ));
                    }
                    let firm = fact.locks.iter().filter(|lock| !lock.releasing).count();
                    if fact.told && listed.locks < firm {
                        let locks = listed.locks;
                        failed.get_or_insert(format!("{open} has {locks} locks after a restart: {fact:?}"));
                    }
                    fact.resuming = false;
                    fact.closing &= fact.hold_ms == 0;
                    fact.forced &= fact.tombstone.is_some();
                    self.forced.remove(open);
                    let server = fact.node.map_or(0, |node| sight.files.changes(node));
                    if fact.detached.is_none() && !std::mem::take(&mut fact.unheard) {
                        fact.window = Window { server, outside: None };
                    }
                    fact.detached = Some(sight.now);
                }
            }
        }
        if let Some(words) = failed {
            self.fail(|| words);
        }
    }

    /// A reply leaves the authority.
    pub(crate) fn reply(&mut self, sight: &Sight<'_>, session: SessionId, id: u64, reply: &Reply) {
        if !self.answered.insert((session, id)) {
            return self.fail(|| format!("request {id} of {session} is answered twice, now with {reply:?}"));
        }
        let Some(asked) = self.asked.remove(&(session, id)) else { return };
        match (&asked.request, reply) {
            (Request::Open(_), Reply::Opened(opened)) => self.opened(sight, session, opened),
            (Request::Close(open), Reply::Done) => self.closed(sight, *open),
            (Request::Logoff, Reply::Done) => {
                let opens: Vec<OpenId> = self
                    .session_facts(session)
                    .filter(|(_, fact)| fact.detached.is_none() && fact.told)
                    .map(|(open, _)| *open)
                    .collect();
                for open in opens {
                    self.closed(sight, open);
                }
            }
            (Request::Resume(resume), Reply::Resumed(resumed)) => {
                self.resumed(sight, session, asked.at, &asked.changes, &resume.keep, resumed);
            }
            (Request::Resume(resume), Reply::Gone(gone)) => {
                self.gone(sight, &asked.changes, &resume.resume_key, *gone);
            }
            (Request::Resume(resume), Reply::Refused(refusal)) => {
                self.resume_refused(sight, session, &resume.resume_key, refusal);
            }
            (Request::Lock(lock), Reply::Done) => self.locked(sight, lock),
            (Request::Unlock(unlock), Reply::Done) => self.unlocked(unlock),
            (Request::Unlock(unlock), Reply::Refused(_)) => {
                // One that is refused because its open is over may have been executed.
                let fact = self.facts.get_mut(&unlock.open).filter(|fact| !fact.closing && !fact.forced);
                if let Some(fact) = fact {
                    releasing(&mut fact.locks, unlock.owner, &unlock.ranges, false);
                }
            }
            _ => {}
        }
    }
}

/// Marks locks that an unlock names, or takes the mark back.
fn releasing(locks: &mut [ToldLock], owner: u64, ranges: &[LockRange], to: bool) {
    for range in ranges {
        let found = locks
            .iter_mut()
            .find(|lock| lock.owner == owner && lock.item.range == *range && lock.releasing != to);
        if let Some(lock) = found {
            lock.releasing = to;
        }
    }
}
