//! What is true after every input. On in tests and in simulation.

use super::Authority;
use super::open::Created;
use super::operation::Stage;
use super::session::Share;
use super::share::ShareTable;
use super::table::Life;
use std::collections::BTreeMap;

impl Authority {
    /// Checks everything that must hold between inputs.
    ///
    /// # Panics
    /// If something does not: that is our bug.
    pub fn check_invariants(&self) {
        self.check_claims();
        self.check_opens();
        self.check_counts();
    }

    /// The share table says what opens and operations say, and no two opens of one file conflict.
    fn check_claims(&self) {
        let mut shares = ShareTable::default();
        let opens = self.opens.iter().map(|(_, open)| (open.identity, open.access, open.share));
        let operations = self.operations.iter().flat_map(|operation| match &operation.stage {
            Stage::Truncating(opening, _, file) => {
                vec![(*file, opening.request.access, opening.request.share)]
            }
            Stage::Changing(_, claim) => vec![*claim],
            Stage::ChangingNames(claims) => claims.clone(),
            _ => Vec::new(),
        });
        for (file, access, share) in opens.chain(operations) {
            assert!(shares.admits(file, access, share), "conflicting claims on {file:?}");
            shares.enter(file, access, share);
        }
        assert_eq!(shares, self.shares, "the share table differs from what is claimed");
    }

    fn check_opens(&self) {
        let mut bindings = 0;
        let mut fencing = 0;
        for (id, open) in self.opens.iter() {
            for (number, binding) in &open.bindings {
                assert_eq!(self.opens.open_of(*number), Some(*id));
                assert_eq!(binding.fencing, self.fences.contains(*number));
                assert!(binding.epoch <= open.epoch);
            }
            bindings += open.bindings.len();
            fencing += open.bindings.values().filter(|binding| binding.fencing).count();
            let works = self.operations.iter().filter(|operation| {
                matches!(&operation.stage, Stage::OnOpen(on) | Stage::Replaying(on, _) if on == id)
            });
            assert_eq!(works.count(), open.works, "work on {id}");
            match &open.life {
                Life::Active => {
                    let session = self.sessions.get(open.session);
                    assert!(session.is_some_and(|s| s.opens.contains(id)), "an active open has a session");
                }
                Life::Closing { .. } => {
                    assert!(!open.bindings.is_empty() || open.works > 0, "{id} waits for nothing");
                    assert!(open.bindings.values().all(|b| b.fencing), "unfenced binding");
                }
            }
            let fenced = !open.bindings.values().any(|b| b.fencing);
            assert!(open.replays.is_empty() || !fenced, "{id} holds replays back for nothing");
            let created = self.create_ids.0.get(&(open.principal.clone(), open.create_id));
            assert!(matches!(created, Some(Created::Open(open, _)) if open == id));
        }
        assert_eq!(bindings, self.opens.bindings());
        assert_eq!(fencing, self.fences.len());
        for (id, session) in self.sessions.iter() {
            for open in &session.opens {
                assert!(self.opens.get(*open).is_some_and(|open| open.session == *id));
            }
        }
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
        for operation in self.operations.iter() {
            if let Stage::Opening(open) | Stage::Truncating(open, ..) = &operation.stage {
                principals.entry(open.principal.clone()).or_default().opens += 1;
                *opening.entry(open.session).or_default() += 1;
            }
        }
        assert_eq!(principals, self.sessions.principals);
        for (id, session) in self.sessions.iter() {
            assert_eq!(session.opening, opening.get(id).copied().unwrap_or(0));
        }
        let mut operations: BTreeMap<_, usize> = BTreeMap::new();
        for operation in self.operations.iter() {
            *operations.entry(operation.principal.clone()).or_default() += 1;
        }
        assert_eq!(operations, self.operations.principals);
        assert!(operations.values().all(|count| *count <= self.limits.operations_per_principal));
        let being_made: usize = opening.values().sum();
        assert_eq!(self.create_ids.0.len(), self.opens.len() + being_made);
        assert!(self.create_ids.0.len() <= self.limits.opens);
        assert!(self.operations.len() <= self.limits.operations);
    }
}
