//! The locks of one file: taking and giving back, each batch as a whole or not at all.
//!
//! ```text
//!   batch ─► allowed? ─► against itself? ─► against others? ─► steps ─► within limits? ─► taken
//!              BadRange     Contradicts        Conflict                    Full
//! ```

use super::index::Locks;
use super::pieces::{self, Edit, Pieces};
use super::waiting::Waiter;
use super::{LockError, LockLimits, LockOwner, Process};
use crate::types::{LockItem, LockKind, LockRange, OpenId};
use std::collections::{BTreeMap, BTreeSet};

/// One lock more or less.
pub(super) enum Step {
    Add(LockOwner, LockItem),
    Take(LockOwner, LockItem),
}

pub(super) type Steps = Vec<Step>;

#[derive(Debug, Default)]
pub(super) struct FileLocks {
    /// Every lock by place, POSIX pieces included.
    pub(super) held: Locks,
    /// The pieces once more, by owner.
    pub(super) processes: BTreeMap<Process, Pieces>,
    /// How many locks each open has, and all together.
    pub(super) opens: BTreeMap<OpenId, usize>,
    pub(super) total: usize,
    /// First come, first served.
    pub(super) queue: Vec<Waiter>,
}

impl FileLocks {
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty() && self.queue.is_empty()
    }

    /// The opens that hold what stands in the way of a batch.
    pub(super) fn in_the_way(&self, owner: &LockOwner, items: &[LockItem]) -> Vec<OpenId> {
        let against = items.iter().flat_map(|item| self.held.against(owner, *item));
        against.map(LockOwner::open).collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn free_for(&self, owner: &LockOwner, items: &[LockItem]) -> Result<(), LockError> {
        let opens = self.in_the_way(owner, items);
        if opens.is_empty() { Ok(()) } else { Err(LockError::Conflict(opens)) }
    }

    /// Takes a whole batch; answers which opens hold other locks now than before.
    pub(super) fn lock(
        &mut self,
        limits: &LockLimits,
        owner: &LockOwner,
        items: &[LockItem],
    ) -> Result<Vec<OpenId>, LockError> {
        check_batch(limits, owner, items)?;
        self.free_for(owner, items)?;
        match owner {
            LockOwner::Open { .. } => {
                let steps: Steps = items.iter().map(|item| Step::Add(owner.clone(), *item)).collect();
                self.within(limits, &steps)?;
                Ok(self.take_steps(steps))
            }
            LockOwner::Process { open, process } => {
                let mut edit = Edit::new(process, self.processes.get(process));
                for item in items {
                    edit.set(pieces::ends(item.range)?, Some((item.kind, *open)));
                }
                self.take_edit(limits, process, edit)
            }
        }
    }

    /// Gives a whole batch back; answers which opens hold other locks now than before.
    pub(super) fn unlock(
        &mut self,
        limits: &LockLimits,
        owner: &LockOwner,
        ranges: &[LockRange],
    ) -> Result<Vec<OpenId>, LockError> {
        if ranges.len() > limits.batch {
            return Err(LockError::Full);
        }
        match owner {
            LockOwner::Open { .. } => {
                let steps = self.exact(owner, ranges)?;
                Ok(self.take_steps(steps))
            }
            LockOwner::Process { process, .. } => {
                let mut edit = Edit::new(process, self.processes.get(process));
                for range in ranges {
                    edit.set(pieces::ends(*range)?, None);
                }
                // Here too a limit can be reached: a piece that is cut in the middle becomes two.
                self.take_edit(limits, process, edit)
            }
        }
    }

    /// The locks on exactly these ranges, one of a stack for each time that the range is named.
    fn exact(&self, owner: &LockOwner, ranges: &[LockRange]) -> Result<Steps, LockError> {
        let mut taken: BTreeMap<LockItem, usize> = BTreeMap::new();
        let mut steps = Steps::new();
        for range in ranges {
            // Only zero-length locks can be there in both kinds; the stronger goes first.
            let kinds = [LockKind::Exclusive, LockKind::Shared];
            let items = kinds.map(|kind| LockItem { range: *range, kind });
            let left =
                |item: &LockItem| self.held.count(owner, *item) > taken.get(item).copied().unwrap_or(0);
            let item = items.into_iter().find(left).ok_or(LockError::NotLocked)?;
            *taken.entry(item).or_default() += 1;
            steps.push(Step::Take(owner.clone(), item));
        }
        Ok(steps)
    }

    /// Enters a lock that the journal says was held. Limits do not count: it was promised.
    pub(super) fn restore(&mut self, owner: &LockOwner, item: LockItem) -> Result<(), LockError> {
        self.free_for(owner, &[item])?;
        match owner {
            LockOwner::Open { .. } => {
                self.take_steps(vec![Step::Add(owner.clone(), item)]);
            }
            LockOwner::Process { open, process } => {
                let (offset, end) = pieces::ends(item.range)?;
                let there = self.processes.get(process);
                // Pieces are disjoint: what overlaps one of the same owner was never held beside it.
                let before = there.and_then(|pieces| pieces.range(..end).next_back());
                if let Some((_, piece)) = before.filter(|(_, piece)| offset < piece.end) {
                    return Err(LockError::Conflict(vec![piece.open]));
                }
                let mut edit = Edit::new(process, there);
                edit.set((offset, end), Some((item.kind, *open)));
                let (pieces, steps) = edit.finish();
                self.put(process, pieces);
                self.take_steps(steps);
            }
        }
        Ok(())
    }

    /// Takes out what an open holds.
    pub(super) fn release(&mut self, open: OpenId) {
        let of_open = self.held.iter().filter(|(owner, _)| owner.open() == open);
        let steps: Steps = of_open.map(|(owner, item)| Step::Take(owner.clone(), item)).collect();
        self.take_steps(steps);
        self.processes.retain(|_, pieces| {
            pieces.retain(|_, piece| piece.open != open);
            !pieces.is_empty()
        });
    }

    fn put(&mut self, process: &Process, pieces: Pieces) {
        if pieces.is_empty() {
            self.processes.remove(process);
        } else {
            self.processes.insert(process.clone(), pieces);
        }
    }

    fn take_edit(
        &mut self,
        limits: &LockLimits,
        process: &Process,
        edit: Edit<'_>,
    ) -> Result<Vec<OpenId>, LockError> {
        let (pieces, steps) = edit.finish();
        self.within(limits, &steps)?;
        self.put(process, pieces);
        Ok(self.take_steps(steps))
    }

    /// Refuses steps after which an open, or the file, has more locks than before and than it may have.
    fn within(&self, limits: &LockLimits, steps: &[Step]) -> Result<(), LockError> {
        let mut opens: BTreeMap<OpenId, (usize, usize)> = BTreeMap::new();
        let mut file = (0, 0);
        for step in steps {
            match step {
                Step::Add(owner, _) => {
                    opens.entry(owner.open()).or_default().0 += 1;
                    file.0 += 1;
                }
                Step::Take(owner, _) => {
                    opens.entry(owner.open()).or_default().1 += 1;
                    file.1 += 1;
                }
            }
        }
        let too_many =
            |there: usize, (more, less): (usize, usize), max| more > less && there + more - less > max;
        let open_too_many = opens.into_iter().any(|(open, change)| {
            too_many(self.opens.get(&open).copied().unwrap_or(0), change, limits.per_open)
        });
        if open_too_many || too_many(self.total, file, limits.per_file) {
            return Err(LockError::Full);
        }
        Ok(())
    }

    /// Takes steps that were found good. Answers whose locks differ in the end: steps may undo one another.
    fn take_steps(&mut self, steps: Steps) -> Vec<OpenId> {
        let mut changes: BTreeMap<(LockOwner, LockItem), (usize, usize)> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Add(owner, item) => changes.entry((owner, item)).or_default().0 += 1,
                Step::Take(owner, item) => changes.entry((owner, item)).or_default().1 += 1,
            }
        }
        let mut changed = BTreeSet::new();
        for ((owner, item), (more, less)) in changes {
            for _ in less..more {
                self.held.add(&owner, item);
                self.count(owner.open(), |count| count.saturating_add(1));
            }
            for _ in more..less {
                let taken = self.held.take(&owner, item);
                debug_assert!(taken, "what is taken was there");
                self.count(owner.open(), |count| count.saturating_sub(1));
            }
            if more != less {
                changed.insert(owner.open());
            }
        }
        changed.into_iter().collect()
    }

    fn count(&mut self, open: OpenId, step: fn(usize) -> usize) {
        self.total = step(self.total);
        let count = self.opens.entry(open).or_default();
        *count = step(*count);
        if *count == 0 {
            self.opens.remove(&open);
        }
    }
}

/// Refuses a batch that could never be taken, whatever is held.
pub(super) fn check_batch(
    limits: &LockLimits,
    owner: &LockOwner,
    items: &[LockItem],
) -> Result<(), LockError> {
    if items.len() > limits.batch {
        return Err(LockError::Full);
    }
    if let LockOwner::Process { .. } = owner {
        // Its elements replace one another in their order: one owner is never in its own way.
        return items.iter().try_for_each(|item| pieces::ends(item.range).map(drop));
    }
    let mut earlier = Locks::default();
    for item in items {
        if earlier.against(owner, *item).next().is_some() {
            return Err(LockError::Contradicts);
        }
        earlier.add(owner, *item);
    }
    Ok(())
}
