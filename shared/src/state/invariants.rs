//! What is true after every input. On in tests and in simulation.

use super::Authority;
use super::contend::Contending;
use super::lock::WaiterId;
use super::locking::Change;
use super::open::Created;
use super::operation::Stage;
use super::resume::Progress;
use super::session::Share;
use super::share::ShareTable;
use super::table::{Life, Step};
use super::timers::Timer;
use std::collections::{BTreeMap, BTreeSet};

impl Authority {
    /// Checks everything that must hold between inputs.
    ///
    /// # Panics
    /// If something does not: that is our bug.
    pub fn check_invariants(&self) {
        self.check_claims();
        if !self.settling {
            self.check_opens();
            self.check_lives();
        }
        self.check_locks();
        self.check_counts();
        assert!(self.journal.is_consistent(), "effects are held for nothing");
        assert!(self.contenders.is_consistent() && self.tombstones.is_consistent());
        assert!(self.barriers.is_consistent(), "a barrier waits for nothing");
        assert!(self.changed.is_empty());
    }

    /// I1: the share table says what opens and operations say, and no two opens of one file conflict.
    fn check_claims(&self) {
        let mut shares = ShareTable::default();
        let opens = self.opens.iter().map(|(_, open)| (open.identity, open.access(), open.share()));
        let operations = self.operations.iter().flat_map(|(_, operation)| operation.stage.claims());
        for (file, access, share) in opens.chain(operations.copied()) {
            assert!(shares.admits(file, access, share), "conflicting claims on {file:?}");
            shares.enter(file, access, share);
        }
        assert_eq!(shares, self.shares, "the share table differs from what is claimed");
    }

    fn check_opens(&self) {
        let mut bindings = 0;
        let mut fencing = 0;
        let mut works: BTreeMap<_, usize> = BTreeMap::new();
        for (_, operation) in self.operations.iter() {
            if let Some(open) = operation.stage.works_on() {
                *works.entry(open).or_default() += 1;
            }
        }
        for (id, open) in self.opens.iter() {
            for (number, binding) in &open.bindings {
                assert_eq!(self.opens.open_of(*number), Some(*id));
                assert_eq!(binding.fencing, self.fences.contains(*number));
                let kept = open.kept.contains(&binding.handle);
                assert!(binding.fencing || kept || binding.epoch == open.epoch, "a binding of a lost epoch");
            }
            bindings += open.bindings.len();
            fencing += open.bindings.values().filter(|binding| binding.fencing).count();
            assert_eq!(works.get(id).copied().unwrap_or(0), open.works, "work on {id}");
            let of_file = self.opens.of_file(open.identity);
            assert!(of_file.is_some_and(|of_file| of_file.all.contains(*id)));
            let created = self.create_ids.0.get(&(open.principal.clone(), open.request.create_id));
            assert!(matches!(created, Some(Created::Open(open)) if open == id));
            assert!(self.tombstones.get(*id).is_none(), "an open has a tombstone");
            assert!(open.rules.confirmed <= open.rules.version);
        }
        assert_eq!(bindings, self.opens.bindings());
        assert_eq!(fencing, self.fences.len());
        for (id, session) in self.sessions.iter() {
            for open in &session.opens {
                assert!(self.opens.get(*open).is_some_and(|open| open.session == Some(*id)));
            }
            for open in &session.resuming {
                let resume = self.opens.get(*open).and_then(|open| open.resuming());
                assert!(resume.is_some_and(|resume| resume.asker.session == *id));
            }
        }
    }

    /// Each open is where its life says.
    fn check_lives(&self) {
        let mut detached = 0;
        for (id, open) in self.opens.iter() {
            let fencing = open.bindings.values().any(|binding| binding.fencing);
            let of_file = self.opens.of_file(open.identity);
            let listed = of_file.is_some_and(|of_file| of_file.detached.contains(*id));
            assert_eq!(listed, matches!(open.life, Life::Detached { .. }));
            assert!(!open.unheard || !listed, "a detached open is heard of no more");
            let listed = of_file.is_some_and(|of_file| of_file.unheard.contains(*id));
            assert_eq!(listed, open.unheard);
            match &open.life {
                Life::Active => {
                    let session = open.session.and_then(|session| self.sessions.get(session));
                    assert!(session.is_some_and(|s| s.opens.contains(id)), "an active open has a session");
                    let judged = open.baseline || open.marked;
                    assert!(!judged || open.unheard, "{id} is judged before it is detached");
                    assert!(!open.lapsed || open.unheard, "{id} owes what was heard already");
                }
                Life::Detached { deadline, resume, .. } => {
                    detached += 1;
                    assert!(!open.untold, "the journal takes {id} for a live one");
                    assert!(open.session.is_none());
                    let waits = self.timers.0.contains(&(*deadline, Timer::Expiry(*id)));
                    assert!(waits || *deadline <= self.now, "{id} never expires");
                    if let Some(resume) = resume {
                        let session = self.sessions.get(resume.asker.session);
                        assert!(session.is_some_and(|session| session.resuming.contains(id)));
                        let fences = resume.progress == Progress::Fencing && (fencing || open.works > 0);
                        let looks = matches!(resume.progress, Progress::Looking(_)) && open.works > 0;
                        let restricts = resume.progress == Progress::Restricting;
                        assert!(fences || looks || restricts, "the resume of {id} waits for nothing");
                    } else {
                        let judged = open.baseline || open.marked || open.looking;
                        assert!(judged || open.may_write() || open.works > 0 || !open.bindings.is_empty());
                    }
                }
                Life::Closing { .. } => {
                    assert!(!open.bindings.is_empty() || open.works > 0, "{id} waits for nothing");
                    assert!(open.bindings.values().all(|b| b.fencing), "unfenced binding");
                    assert!(open.removal != Step::UnderWay || open.works > 0);
                    let session = open.session.map(|session| self.sessions.get(session));
                    assert!(session.is_none_or(|s| s.is_some_and(|s| s.opens.contains(id))));
                }
            }
        }
        assert_eq!(detached, self.opens.detached());
    }

    /// I2: every lock belongs to an open, and every wait to a live one.
    fn check_locks(&self) {
        self.locks.check_invariants();
        let held: usize =
            self.opens.iter().map(|(id, open)| self.locks.locks_of(open.identity, *id).len()).sum();
        assert_eq!(held, self.locks.counts().locks, "a lock without an open");
        let mut waiters: BTreeSet<WaiterId> = BTreeSet::new();
        for ((id, sequence), pending) in &self.locking.pending {
            let open = self.opens.get(*id);
            assert!(open.is_some_and(|open| open.is_active()), "a lock request of an open that is not live");
            assert!(!pending.askers.is_empty());
            if let Change::Waiting { waiter, until, .. } = &pending.change {
                waiters.insert(*waiter);
                assert_eq!(self.locking.waiters.get(waiter), Some(&(*id, *sequence)));
                assert!(self.timers.0.contains(&(*until, Timer::LockWait(*id, *sequence))));
            }
        }
        assert_eq!(waiters.len(), self.locking.waiters.len());
        assert_eq!(waiters.len(), self.locks.counts().waiters);
    }

    fn check_counts(&self) {
        let mut principals: BTreeMap<_, Share> = BTreeMap::new();
        let mut opening: BTreeMap<_, usize> = BTreeMap::new();
        for (_, session) in self.sessions.iter() {
            principals.entry(session.principal.clone()).or_default().sessions += 1;
        }
        for (_, open) in self.opens.iter() {
            principals.entry(open.principal.clone()).or_default().opens += 1;
        }
        let under_way = self.operations.iter().filter_map(|(_, operation)| match &operation.stage {
            Stage::Opening(opening) => Some(opening),
            _ => None,
        });
        let waiting = self.contenders.iter().filter_map(|contender| match &contender.what {
            Contending::Open(opening) => Some(opening),
            Contending::Request(..) => None,
        });
        for open in under_way.chain(waiting) {
            principals.entry(open.principal.clone()).or_default().opens += 1;
            *opening.entry(open.session).or_default() += 1;
        }
        assert_eq!(principals, self.sessions.principals);
        for (id, session) in self.sessions.iter() {
            assert_eq!(session.opening, opening.get(id).copied().unwrap_or(0));
            let gone = session.logoff.is_some() && session.opens.is_empty() && session.opening == 0;
            assert!(!gone, "a session that has logged off stays");
        }
        let mut operations: BTreeMap<_, usize> = BTreeMap::new();
        for principal in self.operations.iter().filter_map(|(_, operation)| operation.principal.clone()) {
            *operations.entry(principal).or_default() += 1;
        }
        assert_eq!(operations, self.operations.principals);
        assert_eq!(operations.values().sum::<usize>(), self.operations.asked);
        assert!(operations.values().all(|count| *count <= self.limits.operations_per_principal));
        let being_made: usize = opening.values().sum();
        assert_eq!(self.create_ids.0.len(), self.opens.len() + being_made);
        assert!(self.operations.asked <= self.limits.operations);
        assert!(self.contenders.len() <= self.limits.contenders);
        assert!(self.tombstones.len() <= self.limits.tombstones);
    }
}
