//! Which worker has which binding, which rules hold for which open; and what a new control is told of all that.
//!
//! ```text
//!   link ── fence, restrict ──► Registry: binding ─► worker, open ─► workers, newest rules
//!    │                             ▲ granted      ▲ gone
//!    │                             └── link       └── workers
//!    └──── snapshot ──► a letter to each worker ──► Snapshot: every binding that is not gone
//! ```
//!
//! What a binding wrote outlives it here: a control that comes after a crash is told, else it would take an open's own last
//! writes for somebody else's.
//!
//! Rules are judged by version, as a grant and a `Restrict` may overtake each other on their way to a worker. Versions are
//! compared within one link only: the next control may count anew.

use super::ControlPort;
use super::backend::FileIo;
use super::restrict::{Restriction, Rules};
use holdfast_shared::types::{OpenId, Status};
use holdfast_shared::wire::link::{Grant, Held, LinkBinding, Restrict, WROTE_MAX, Wrote};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// See the module's text.
#[derive(Default)]
pub(crate) struct Registry(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    bindings: HashMap<LinkBinding, (usize, OpenId)>,
    opens: HashMap<OpenId, Open>,
    /// Of bindings that are gone, the oldest first; at most [`WROTE_MAX`].
    wrote: VecDeque<Wrote>,
}

/// An open that has bindings, or grants on their way to a worker.
#[derive(Default)]
struct Open {
    bindings: Vec<(LinkBinding, usize)>,
    /// The newest that came over this link.
    rules: Option<Rules>,
}

impl Registry {
    /// A grant is about to be left for the worker.
    pub(crate) fn add(&self, grant: &Grant, worker: usize) {
        let inner = &mut *self.0.lock();
        inner.bindings.insert(grant.binding, (worker, grant.open));
        let open = inner.opens.entry(grant.open).or_default();
        open.bindings.push((grant.binding, worker));
        if open.rules.as_ref().is_none_or(|rules| rules.version < grant.rules_version) {
            open.rules = Some(Rules::new(grant.rules_version, &grant.rules));
        }
    }

    /// The rules for a binding that begins: the grant's, or newer ones.
    pub(crate) fn rules(&self, grant: &Grant) -> Rules {
        let newer = self.0.lock().opens.get(&grant.open).and_then(|open| open.rules.clone());
        newer
            .filter(|rules| rules.version >= grant.rules_version)
            .unwrap_or_else(|| Rules::new(grant.rules_version, &grant.rules))
    }

    /// The binding is gone. When it last wrote (0 if never), and what it was fenced for.
    pub(crate) fn remove(&self, binding: LinkBinding, last_write_ns: u64, fenced: Option<Status>) {
        let inner = &mut *self.0.lock();
        let Some((_, id)) = inner.bindings.remove(&binding) else { return };
        if matches!(fenced, Some(Status::Closed | Status::ForceClosed)) {
            inner.wrote.retain(|wrote| wrote.open != id);
        } else if last_write_ns > 0 {
            inner.note(Wrote { open: id, last_write_ns });
        }
        if let Some(open) = inner.opens.get_mut(&id) {
            open.bindings.retain(|(other, _)| *other != binding);
            if open.bindings.is_empty() {
                inner.opens.remove(&id);
            }
        }
    }

    /// What bindings that are gone wrote.
    pub(crate) fn wrote(&self) -> Vec<Wrote> {
        self.0.lock().wrote.iter().copied().collect()
    }

    /// Which worker has it; `None` if it is gone.
    pub(crate) fn worker(&self, binding: LinkBinding) -> Option<usize> {
        self.0.lock().bindings.get(&binding).map(|(worker, _)| *worker)
    }

    /// What the workers that have bindings of the open are to be told; `None` if none has.
    pub(crate) fn restrict(
        &self,
        restrict: Restrict,
        port: &Arc<dyn ControlPort>,
    ) -> Option<(Arc<Restriction>, Vec<usize>)> {
        let inner = &mut *self.0.lock();
        let open = inner.opens.get_mut(&restrict.open)?;
        let Restrict { open: id, version, rules } = restrict;
        let rules = match &open.rules {
            Some(newer) if newer.version > version => newer.clone(),
            _ => Rules::new(version, &rules),
        };
        open.rules = Some(rules.clone());
        let mut workers: Vec<usize> = open.bindings.iter().map(|(_, worker)| *worker).collect();
        workers.sort_unstable();
        workers.dedup();
        let restriction = Restriction::new(id, version, rules, workers.len(), Arc::clone(port));
        Some((Arc::new(restriction), workers))
    }

    /// Another control is about to come, and may count versions anew.
    pub(crate) fn forget_versions(&self) {
        self.0.lock().opens.values_mut().for_each(|open| open.rules = None);
    }
}

impl Inner {
    /// The oldest is forgotten when there are too many: that errs towards telling of a change.
    fn note(&mut self, new: Wrote) {
        let before = self.wrote.iter().position(|wrote| wrote.open == new.open);
        let before = before.and_then(|at| self.wrote.remove(at)).map_or(0, |wrote| wrote.last_write_ns);
        if self.wrote.len() == WROTE_MAX {
            self.wrote.pop_front();
        }
        self.wrote.push_back(Wrote { last_write_ns: new.last_write_ns.max(before), ..new });
    }
}

/// A binding that lives, for a control that did not grant it.
pub struct HeldBinding {
    /// What is told of it.
    pub held: Held,
    pub(crate) file: Arc<dyn FileIo>,
}

impl HeldBinding {
    /// Its descriptor. Open as long as this is kept, so keep it no longer than needed.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.descriptor()
    }
}

impl std::fmt::Debug for HeldBinding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("HeldBinding").field(&self.held).finish()
    }
}

/// All bindings there are, being gathered. Each worker answers at its own moment: a binding that ends afterwards is told of
/// through [`ControlPort`] as always.
#[derive(Debug)]
pub struct Snapshot {
    from: Receiver<Vec<HeldBinding>>,
    /// Workers that have not answered yet.
    left: usize,
    bindings: Vec<HeldBinding>,
}

impl Snapshot {
    pub(crate) fn new(from: Receiver<Vec<HeldBinding>>, workers: usize) -> Self {
        Self { from, left: workers, bindings: Vec::new() }
    }

    /// Waits until all workers have answered, `wait` at most. True if so.
    pub fn gather(&mut self, wait: Duration) -> bool {
        let end = Instant::now() + wait;
        while self.left > 0 {
            match self.from.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(more) => {
                    self.left -= 1;
                    self.bindings.extend(more);
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// What was gathered.
    pub fn into_bindings(self) -> Vec<HeldBinding> {
        self.bindings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> OpenId {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        OpenId(bytes)
    }

    fn bind(registry: &Registry, binding: u64, open: OpenId) -> LinkBinding {
        let inner = &mut *registry.0.lock();
        let binding = LinkBinding(binding);
        inner.bindings.insert(binding, (0, open));
        inner.opens.entry(open).or_default().bindings.push((binding, 0));
        binding
    }

    #[test]
    fn what_a_binding_wrote_outlives_it_until_its_open_is_closed() {
        let registry = Registry::default();
        for (n, last_write_ns, fenced) in [
            (1, 70, None),
            (1, 50, Some(Status::Fenced)),
            (2, 60, None),
            (3, 0, None),
            (2, 90, Some(Status::Closed)),
        ] {
            let binding = bind(&registry, last_write_ns, id(n));
            registry.remove(binding, last_write_ns, fenced);
            // Only once.
            registry.remove(binding, 1000, None);
        }
        assert_eq!(registry.wrote(), [Wrote { open: id(1), last_write_ns: 70 }]);
    }

    #[test]
    fn as_many_are_kept_as_a_registration_may_tell_of() {
        let registry = Registry::default();
        for n in 0..WROTE_MAX + 10 {
            let binding = bind(&registry, n as u64, id(n));
            registry.remove(binding, 1, None);
        }
        let wrote = registry.wrote();
        assert_eq!((wrote.len(), wrote[0].open), (WROTE_MAX, id(10)));
    }
}
