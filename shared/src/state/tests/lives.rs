//! Random lives of opens against a model that knows only what a client, a dataplane and a disk can know.
//!
//! The shell answers in any order, the journal is slow, processes die at any moment. The model checks that
//!
//! * every request of a session that lives is answered once;
//! * nothing that was acknowledged is lost in a crash: opens, locks, closes;
//! * whoever is let in meets no binding in dataplane that its share mode excludes, and no I/O that its lock forbids;
//! * no two acknowledged locks conflict;
//! * a resume never says that a file is unchanged when somebody else changed it.

use super::world::*;
use crate::journal::record::Record;
use crate::state::{Effect, FileId, Input, OpenView};
use crate::types::{
    Access, HandleId, HoldClass, IoRule, LockKind, OpenId, SessionId, ShareMode, Verdict, conflicts,
    io_conflict,
};
use crate::wire::control::{Open, Opened, Reply, Request, Resume};
use crate::wire::link::{Held, LinkBinding, Restricted};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

#[derive(Clone, Debug)]
enum Step {
    Begin { principal: bool },
    Lose { which: usize },
    Open { by: usize, inode: u64, access: u8, share: u8, hold: u8, yields: bool, waits: bool },
    Close { which: usize },
    Bind { which: usize },
    Lock { which: usize, place: u64, waits: bool },
    Unlock { which: usize },
    Resume { which: usize, by: usize, supersede: bool, keep: bool },
    Repeat { which: usize, by: usize },
    Answer { which: usize },
    Sync,
    Write { which: usize },
    Touch { inode: u64 },
    Pass { ms: u64 },
    LinkLost,
    LinkAgain,
    ForceClose { which: usize },
    Remove { by: usize, inode: u64 },
    Crash { both: bool, cut: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let n = any::<usize>;
    prop_oneof![
        3 => any::<bool>().prop_map(|principal| Step::Begin { principal }),
        2 => n().prop_map(|which| Step::Lose { which }),
        8 => (n(), 1u64..3, 1u8..8, 0u8..8, 0u8..3, any::<bool>(), any::<bool>()).prop_map(
            |(by, inode, access, share, hold, yields, waits)| Step::Open {
                by, inode, access, share: share | if hold == 2 { 7 } else { 0 }, hold, yields, waits
            }),
        2 => n().prop_map(|which| Step::Close { which }),
        5 => n().prop_map(|which| Step::Bind { which }),
        5 => (n(), 0u64..3, any::<bool>()).prop_map(|(which, place, waits)| Step::Lock { which, place, waits }),
        2 => n().prop_map(|which| Step::Unlock { which }),
        5 => (n(), n(), any::<bool>(), any::<bool>())
            .prop_map(|(which, by, supersede, keep)| Step::Resume { which, by, supersede, keep }),
        1 => (n(), n()).prop_map(|(which, by)| Step::Repeat { which, by }),
        24 => n().prop_map(|which| Step::Answer { which }),
        10 => Just(Step::Sync),
        4 => n().prop_map(|which| Step::Write { which }),
        1 => (1u64..3).prop_map(|inode| Step::Touch { inode }),
        3 => (1u64..1500).prop_map(|ms| Step::Pass { ms }),
        1 => Just(Step::LinkLost),
        1 => Just(Step::LinkAgain),
        1 => n().prop_map(|which| Step::ForceClose { which }),
        1 => (n(), 1u64..3).prop_map(|(by, inode)| Step::Remove { by, inode }),
        1 => (any::<bool>(), 0usize..5).prop_map(|(both, cut)| Step::Crash { both, cut }),
    ]
}

/// What a client knows of an open.
struct Mine {
    opened: Opened,
    principal: bool,
    session: SessionId,
    key: u8,
    inode: u64,
    request: Open,
    sequence: u64,
}

/// What dataplane has.
#[derive(Clone)]
struct Bound {
    open: OpenId,
    handle: HandleId,
    epoch: u64,
    inode: u64,
    claim: (Access, ShareMode),
    rules: Vec<IoRule>,
    rules_version: u64,
    last_write_ns: u64,
    transcript: [u8; 32],
}

struct Lives {
    world: World,
    sessions: BTreeMap<SessionId, (u8, bool)>,
    begun: u8,
    creates: u8,
    nonces: u8,
    opens: Vec<Mine>,
    asked: BTreeMap<u64, (SessionId, Request)>,
    /// What the shell has not answered yet.
    todo: Vec<Effect>,
    files: BTreeMap<FileId, u64>,
    bound: BTreeMap<LinkBinding, Bound>,
    linked: bool,
    seen_records: usize,
    durable: usize,
    /// The file changed, by somebody else than the detached open.
    changed: BTreeMap<OpenId, bool>,
    /// What a resume must not deny.
    at_resume: BTreeMap<OpenId, bool>,
    /// Acknowledged, and not given up: open, place.
    locks: BTreeSet<(OpenId, u64)>,
    /// Their end was asked for, or has come.
    over: BTreeSet<OpenId>,
    /// Acknowledged as closed.
    closed: BTreeSet<OpenId>,
}

impl Lives {
    fn new() -> Self {
        let mut world = World::new();
        world.holds_journal = true;
        world.give(Input::LinkUp { service_blob: Vec::new(), held: Vec::new() });
        Self {
            world,
            sessions: BTreeMap::new(),
            begun: 0,
            creates: 0,
            nonces: 0,
            opens: Vec::new(),
            asked: BTreeMap::new(),
            todo: Vec::new(),
            files: BTreeMap::new(),
            bound: BTreeMap::new(),
            linked: true,
            seen_records: 0,
            durable: 0,
            changed: BTreeMap::new(),
            at_resume: BTreeMap::new(),
            locks: BTreeSet::new(),
            over: BTreeSet::new(),
            closed: BTreeSet::new(),
        }
    }

    /// Sessions of both principals.
    fn begin(&mut self) {
        for principal in [true, false, true] {
            self.step(Step::Begin { principal });
        }
    }

    fn session(&self, by: usize) -> Option<(SessionId, u8, bool)> {
        let count = self.sessions.len();
        let (id, (key, principal)) = self.sessions.iter().nth(by.checked_rem(count)?)?;
        Some((*id, *key, *principal))
    }

    fn ask(&mut self, session: SessionId, request: Request) {
        let effects = self.world.ask(session, request.clone());
        self.asked.insert(self.world.last_request, (session, request));
        self.absorb(effects);
    }

    fn give(&mut self, input: Input) {
        let effects = self.world.give(input);
        self.absorb(effects);
    }

    fn absorb(&mut self, effects: Vec<Effect>) {
        let records: Vec<Record> = self.world.journal.iter().skip(self.seen_records).cloned().collect();
        for record in records {
            match record {
                Record::Detached(id) => drop(self.changed.insert(id, false)),
                Record::Resumed(resumed) => {
                    let changed = self.changed.remove(&resumed.open).unwrap_or(false);
                    self.at_resume.insert(resumed.open, changed);
                }
                Record::Closed(id) => self.is_over(id),
                Record::Tombstone(tombstone) => self.is_over(tombstone.open),
                _ => {}
            }
        }
        self.seen_records = self.world.journal.len();
        for effect in effects {
            match effect {
                Effect::Reply { session, id, reply } => self.answered(session, id, reply),
                Effect::Disconnect(session) => drop(self.sessions.remove(&session)),
                Effect::Grant { grant, .. } => {
                    let Some(mine) = self.opens.iter().find(|mine| mine.opened.open == grant.open) else {
                        panic!("a grant for nobody's open")
                    };
                    let bound = Bound {
                        open: grant.open,
                        handle: grant.handle,
                        epoch: grant.epoch,
                        inode: mine.inode,
                        claim: (mine.request.access, mine.request.share),
                        rules: grant.rules,
                        rules_version: grant.rules_version,
                        last_write_ns: 0,
                        transcript: grant.transcript,
                    };
                    self.bound.insert(grant.binding, bound);
                }
                Effect::CloseFile(_) | Effect::RefuseBind { .. } | Effect::FenceOverdue(_) => {}
                Effect::Fence(_) | Effect::Restrict(_) if !self.linked => {}
                other => self.todo.push(other),
            }
        }
    }

    fn is_over(&mut self, open: OpenId) {
        self.over.insert(open);
        self.locks.retain(|(of, _)| *of != open);
    }

    fn answered(&mut self, session: SessionId, id: u64, reply: Reply) {
        if id == 0 || !self.sessions.contains_key(&session) {
            return;
        }
        let (asker, request) = self.asked.remove(&id).expect("answered once");
        assert_eq!(asker, session);
        match (request, reply) {
            (Request::Open(request), Reply::Opened(opened)) => self.let_in(session, opened, Some(request)),
            (Request::Resume(resume), Reply::Resumed(resumed)) => {
                let open = resumed.opened.open;
                if let Some(true) = self.at_resume.remove(&open) {
                    assert_eq!(resumed.verdict, Verdict::Changed, "somebody changed the file");
                }
                for bound in self.bound.values().filter(|bound| bound.open == open) {
                    assert!(resume.keep.contains(&bound.handle), "not fenced before the answer");
                }
                self.let_in(session, resumed.opened, None);
            }
            (Request::Lock(lock), Reply::Done) if !self.over.contains(&lock.open) => {
                // An answer can reach a session that a later one has superseded already: it says what was.
                let views = self.world.authority.list_opens(self.world.now, None, 1000);
                let owns = |view: &OpenView| view.open == lock.open && view.session == Some(session);
                if !views.iter().any(owns) {
                    return;
                }
                let place = lock.locks[0].range.offset();
                let inode =
                    self.opens.iter().find(|mine| mine.opened.open == lock.open).map(|mine| mine.inode);
                let on_file = |open: &OpenId| {
                    self.opens.iter().any(|mine| mine.opened.open == *open && Some(mine.inode) == inode)
                };
                let clash =
                    self.locks.iter().any(|(open, at)| *open != lock.open && *at == place && on_file(open));
                assert!(!clash, "two hold one lock");
                let range = lock.locks[0].range.bytes().unwrap();
                for bound in self.bound.values().filter(|b| Some(b.inode) == inode && b.open != lock.open) {
                    assert!(io_conflict(&bound.rules, range, Access::WRITE), "I/O goes on in a locked range");
                }
                assert_eq!(lock.locks[0].kind, LockKind::Exclusive);
                self.locks.insert((lock.open, place));
            }
            (Request::Close(open), Reply::Done) => {
                assert!(!self.bound.values().any(|bound| bound.open == open), "closed and still bound");
                self.closed.insert(open);
            }
            _ => {}
        }
    }

    fn let_in(&mut self, session: SessionId, opened: Opened, request: Option<Open>) {
        let Some((key, principal)) = self.sessions.get(&session).copied() else { return };
        let index = self.opens.iter().position(|mine| mine.opened.open == opened.open);
        let index = index.unwrap_or_else(|| {
            let request = request.expect("a resume is of a known open");
            let inode = request.place.path.parse().unwrap();
            let open = opened.clone();
            self.opens.push(Mine { opened: open, principal, session, key, inode, request, sequence: 0 });
            self.opens.len() - 1
        });
        let mine = &mut self.opens[index];
        (mine.session, mine.key) = (session, key);
        mine.opened = opened;
        let claim = (mine.request.access, mine.request.share);
        for bound in self.bound.values() {
            let other = bound.inode == mine.inode && bound.open != mine.opened.open;
            assert!(!other || !conflicts(claim, bound.claim), "let in beside a binding that it excludes");
        }
    }

    fn answer(&mut self, which: usize) {
        if self.todo.is_empty() {
            return;
        }
        match self.todo.remove(which % self.todo.len()) {
            Effect::OpenFile { operation, file, at, .. } => {
                let inode = at.path.as_str().parse().unwrap();
                self.files.insert(file, inode);
                let opened = self.world.opened(inode, false);
                self.give(Input::FileOpened { operation, result: Ok(opened) });
            }
            Effect::Inspect { operation, file } => {
                let inode = self.files[&file];
                self.seen(operation, inode);
            }
            Effect::InspectLost { operation, identity, .. } => self.seen(operation, identity.inode),
            Effect::Resolve { operation, names } => {
                let found = names.iter().map(|at| at.path.as_str().parse().ok().map(identity)).collect();
                self.give(Input::Resolved { operation, result: Ok(found) });
            }
            Effect::Perform { operation, .. } => {
                let result = Ok(Reply::Attributes(attributes(1)));
                self.give(Input::Performed { operation, result });
            }
            Effect::Fence(fence) => {
                self.bound.remove(&fence.binding);
                self.give(Input::Fenced(fence));
            }
            Effect::Restrict(restrict) => {
                for bound in self.bound.values_mut().filter(|bound| bound.open == restrict.open) {
                    if restrict.version >= bound.rules_version {
                        bound.rules = restrict.rules.clone();
                        bound.rules_version = restrict.version;
                    }
                }
                let restricted = Restricted { open: restrict.open, version: restrict.version };
                self.give(Input::Restricted(restricted));
            }
            other => panic!("{other:?}"),
        }
    }

    fn seen(&mut self, operation: crate::state::OperationId, inode: u64) {
        let evidence = self.world.evidence_of(inode);
        let seen = crate::state::Inspected { attributes: attributes(inode), evidence };
        self.give(Input::Inspected { operation, result: Ok(Some(seen)) });
    }

    fn file_changes(&mut self, inode: u64, by: Option<OpenId>) {
        self.world.touch(inode);
        let detached: Vec<OpenId> = self.changed.keys().copied().collect();
        for id in detached {
            let on_file = self.opens.iter().any(|mine| mine.opened.open == id && mine.inode == inode);
            // A writer beside the server is seen only once there is a baseline.
            let baseline = || {
                let of_open = self.world.journal.iter().rev().find_map(|record| match record {
                    Record::Baseline(open, _) if *open == id => Some(true),
                    Record::Detached(open) if *open == id => Some(false),
                    _ => None,
                });
                of_open == Some(true)
            };
            if on_file && by != Some(id) && (by.is_some() || baseline()) {
                self.changed.insert(id, true);
            }
        }
    }

    fn sync(&mut self) {
        self.durable = self.world.journal.len();
        let effects = self.world.sync();
        self.absorb(effects);
    }

    fn held(&self) -> Vec<Held> {
        let held = self.bound.iter().map(|(binding, bound)| Held {
            binding: *binding,
            open: bound.open,
            handle: bound.handle,
            epoch: bound.epoch,
            access: bound.claim.0,
            ending: false,
            last_write_ns: bound.last_write_ns,
            rules_version: bound.rules_version,
            transcript: bound.transcript,
        });
        held.collect()
    }

    fn crash(&mut self, both: bool, cut: usize) {
        let written = self.world.journal.len();
        let left = written.saturating_sub(cut).max(self.durable);
        let records = self.world.journal[..left].to_vec();
        let (sessions, todo) = (&mut self.sessions, &mut self.todo);
        sessions.clear();
        todo.clear();
        self.asked.clear();
        let (world, reopens) = self.world.restart_from(&records);
        self.world = world;
        self.world.holds_journal = true;
        (self.seen_records, self.durable) = (left, left);
        self.files = reopens.iter().map(|reopen| (reopen.file, reopen.identity.inode)).collect();
        // What was promised is there.
        let views = self.world.authority.list_opens(self.world.now, None, 1000);
        let there: BTreeSet<OpenId> = views.iter().map(|view| view.open).collect();
        for id in &self.closed {
            assert!(!there.contains(id), "a closed open is back");
        }
        for (open, place) in &self.locks {
            let view = views.iter().find(|view| view.open == *open);
            let held = view.is_some_and(|view| view.locks.iter().any(|(_, l)| l.range.offset() == *place));
            let over = records.iter().any(|record| match record {
                Record::Closed(id) => id == open,
                Record::Tombstone(tombstone) => tombstone.open == *open,
                _ => false,
            });
            assert!(held || over, "an acknowledged lock is lost");
        }
        for mine in &self.opens {
            let over = records.iter().any(|record| match record {
                Record::Closed(id) => *id == mine.opened.open,
                Record::Tombstone(tombstone) => tombstone.open == mine.opened.open,
                _ => false,
            });
            assert!(over || there.contains(&mine.opened.open), "an acknowledged open is lost");
        }
        let detached: BTreeMap<OpenId, bool> =
            there.iter().map(|id| (*id, self.changed.get(id).copied().unwrap_or(false))).collect();
        self.at_resume.clear();
        // An end that was not durable has not come.
        self.over = self.opens.iter().map(|mine| mine.opened.open).filter(|id| !there.contains(id)).collect();
        for reopen in reopens {
            let evidence = self.world.evidence_of(reopen.identity.inode);
            let seen = crate::state::Inspected { attributes: attributes(reopen.identity.inode), evidence };
            self.give(Input::Reopened { open: reopen.open, result: Ok(seen) });
        }
        if both {
            let last = self.bound.values().map(|bound| bound.last_write_ns).max().unwrap_or(0);
            self.world.authority.set_last_write(last);
            self.bound.clear();
            self.linked = false;
            self.give(Input::LinkLost);
        } else {
            self.linked = true;
            self.give(Input::DataplaneMayLive);
            let held = self.held();
            self.give(Input::LinkUp { service_blob: Vec::new(), held });
        }
        self.changed = detached;
        self.begin();
    }

    fn step(&mut self, step: Step) {
        let pick = |which: usize, count: usize| which.checked_rem(count);
        match step {
            Step::Begin { principal } => {
                self.begun += 1;
                let name = if principal { "u1" } else { "u2" };
                let id = self.world.begin(self.begun, name);
                self.sessions.insert(id, (self.begun, principal));
            }
            Step::Lose { which } => {
                let Some((id, ..)) = self.session(which) else { return };
                self.sessions.remove(&id);
                self.asked.retain(|_, (session, _)| *session != id);
                self.give(Input::SessionLost(id));
            }
            Step::Open { by, inode, access, share, hold, yields, waits } => {
                let Some((session, ..)) = self.session(by) else { return };
                self.creates = self.creates.wrapping_add(1);
                let (access, share) = (Access::from_bits(access), ShareMode::from_bits(share));
                let request = Open {
                    place: place(&inode.to_string()),
                    hold_ms: Some([0, 1000, 10_000][usize::from(hold)]),
                    class: if yields { HoldClass::Yield } else { HoldClass::Hold },
                    wait_ms: waits.then_some(700),
                    ..open(self.creates, access.unwrap(), share.unwrap())
                };
                self.ask(session, Request::Open(request));
            }
            Step::Close { which } => {
                let Some(which) = pick(which, self.opens.len()) else { return };
                let (session, open) = (self.opens[which].session, self.opens[which].opened.open);
                if self.sessions.contains_key(&session) {
                    self.is_over(open);
                    self.ask(session, close(open));
                }
            }
            Step::Bind { which } => {
                let Some(which) = pick(which, self.opens.len()).filter(|_| self.linked) else { return };
                self.nonces = self.nonces.wrapping_add(1);
                let mine = &self.opens[which];
                let wanted = mine.request.access.intersection(RW);
                let redeem = right(&session_key(mine.key), &mine.opened, self.nonces, wanted);
                let fresh = self.world.fresh();
                self.give(Input::Redeem { redeem: Box::new(redeem), fresh });
            }
            Step::Lock { which, place, waits } => {
                let Some(which) = pick(which, self.opens.len()) else { return };
                let mine = &mut self.opens[which];
                mine.sequence += 1;
                let (session, open, sequence) = (mine.session, mine.opened.open, mine.sequence);
                let Request::Lock(mut request) = lock(open, sequence, place * 10, 10) else { return };
                request.wait_ms = waits.then_some(800);
                if self.sessions.contains_key(&session) {
                    self.ask(session, Request::Lock(request));
                }
            }
            Step::Unlock { which } => {
                let Some(which) = pick(which, self.locks.len()) else { return };
                let Some((open, place)) = self.locks.iter().nth(which).copied() else { return };
                let Some(mine) = self.opens.iter_mut().find(|mine| mine.opened.open == open) else { return };
                mine.sequence += 1;
                let (session, sequence) = (mine.session, mine.sequence);
                if self.sessions.contains_key(&session) {
                    self.locks.remove(&(open, place));
                    self.ask(session, unlock(open, sequence, place, 10));
                }
            }
            Step::Resume { which, by, supersede, keep } => {
                let Some(which) = pick(which, self.opens.len()) else { return };
                let Some((session, _, principal)) = self.session(by) else { return };
                let mine = &self.opens[which];
                let handles = self.bound.values().filter(|bound| bound.open == mine.opened.open && keep);
                let resume = Resume {
                    resume_key: mine.opened.key.resume_key.clone(),
                    supersede: supersede.then_some(mine.session),
                    keep: handles.map(|bound| bound.handle).collect(),
                };
                let (before, mut asked) = (self.sessions.len(), self.asked.clone());
                let stranger = principal != mine.principal;
                self.ask(session, Request::Resume(resume));
                assert!(!stranger || self.sessions.len() == before, "a stranger ended a session");
                asked.retain(|_, (session, _)| !self.sessions.contains_key(session));
                self.asked.retain(|id, _| !asked.contains_key(id));
            }
            Step::Repeat { which, by } => {
                let Some(which) = pick(which, self.opens.len()) else { return };
                let Some((session, _, principal)) = self.session(by) else { return };
                if principal == self.opens[which].principal {
                    let request = self.opens[which].request.clone();
                    self.ask(session, Request::Open(request));
                }
            }
            Step::Answer { which } => self.answer(which),
            Step::Sync => self.sync(),
            Step::Write { which } => {
                let Some(which) = pick(which, self.bound.len()) else { return };
                let Some(bound) = self.bound.values_mut().nth(which) else { return };
                if bound.claim.0.contains(Access::WRITE) {
                    let (inode, open) = (bound.inode, bound.open);
                    bound.last_write_ns =
                        u64::try_from(self.world.evidence_of(inode).changed_ns).unwrap() + 1;
                    self.file_changes(inode, Some(open));
                }
            }
            Step::Touch { inode } => self.file_changes(inode, None),
            Step::Pass { ms } => {
                let effects = self.world.pass(Duration::from_millis(ms));
                self.absorb(effects);
            }
            Step::LinkLost => {
                self.bound.clear();
                self.linked = false;
                self.todo.retain(|effect| !matches!(effect, Effect::Fence(_) | Effect::Restrict(_)));
                self.give(Input::LinkLost);
            }
            Step::LinkAgain => {
                self.todo.retain(|effect| !matches!(effect, Effect::Fence(_) | Effect::Restrict(_)));
                self.linked = true;
                let held = self.held();
                self.give(Input::LinkUp { service_blob: Vec::new(), held });
            }
            Step::ForceClose { which } => {
                let Some(which) = pick(which, self.opens.len()) else { return };
                self.is_over(self.opens[which].opened.open);
                self.give(Input::ForceClose(self.opens[which].opened.open));
            }
            Step::Remove { by, inode } => {
                let Some((session, ..)) = self.session(by) else { return };
                self.ask(session, Request::Remove(place(&inode.to_string())));
            }
            Step::Crash { both, cut } => self.crash(both, cut),
        }
        // Who superseded whom: nobody waits for those answers.
        let there: BTreeSet<SessionId> = self.sessions.keys().copied().collect();
        self.asked.retain(|_, (session, _)| there.contains(session));
    }

    /// Everything is answered and every clock runs out: then nobody waits.
    fn end(&mut self) {
        for _ in 0..3 {
            for _ in 0..500 {
                self.sync();
                if self.todo.is_empty() {
                    break;
                }
                self.answer(0);
            }
            assert!(self.todo.is_empty(), "it never comes to an end");
            let effects = self.world.pass(Duration::from_secs(20));
            self.absorb(effects);
        }
        let there: BTreeSet<SessionId> = self.sessions.keys().copied().collect();
        self.asked.retain(|_, (session, _)| there.contains(session));
        assert!(self.asked.is_empty(), "not answered: {:?}", self.asked);
        let counts = self.world.authority.counts();
        assert_eq!((counts.barriers, counts.contenders, counts.lock_waiters), (0, 0, 0));
        assert_eq!((counts.fences, counts.operations, counts.held_effects), (0, 0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn rsm_11_rsm_13_crs_06_lives_in_any_order_keep_every_promise(
        steps in proptest::collection::vec(step(), 1..250)
    ) {
        let mut lives = Lives::new();
        lives.begin();
        for step in steps {
            lives.step(step);
        }
        lives.end();
    }
}
