//! Locks by place: which of them does a range overlap?
//!
//! Locks may overlap one another as they like (shared ones stack), so an order by offset alone does not say where to
//! stop. They are sorted into classes by the bit length of their length: in a class no lock is more than twice as
//! long as another, so what can reach a range begins at most one such length before it.
//!
//! ```text
//!   class 0   length 0         |            |
//!   class 1   length 1          []    []
//!   class 2   length 2..3       [-)        [--)
//!   class 3   length 4..7      [----)   [-----)
//!   ...64                 ◄ 7 ►
//!   asked for                  [============)     class 3 is looked through from 7 bytes before
//! ```

use super::LockOwner;
use crate::types::{LockItem, LockKind, LockRange};
use std::collections::BTreeMap;

/// At one range: how many locks each owner has there.
type Owners = BTreeMap<LockOwner, usize>;

/// Locks of one kind.
#[derive(Debug, Default, PartialEq, Eq)]
struct ByLength(BTreeMap<u32, BTreeMap<LockRange, Owners>>);

impl ByLength {
    fn class(range: LockRange) -> u32 {
        u64::BITS - range.length().leading_zeros()
    }

    /// The longest length of a class.
    fn longest(class: u32) -> u64 {
        u64::MAX.checked_shr(u64::BITS.saturating_sub(class)).unwrap_or(0)
    }

    fn at(&self, range: LockRange) -> Option<&Owners> {
        self.0.get(&Self::class(range))?.get(&range)
    }

    fn add(&mut self, owner: &LockOwner, range: LockRange) {
        let ranges = self.0.entry(Self::class(range)).or_default();
        *ranges.entry(range).or_default().entry(owner.clone()).or_default() += 1;
    }

    fn take(&mut self, owner: &LockOwner, range: LockRange) -> bool {
        let Some(ranges) = self.0.get_mut(&Self::class(range)) else { return false };
        let Some(owners) = ranges.get_mut(&range) else { return false };
        let Some(count) = owners.get_mut(owner) else { return false };
        *count -= 1;
        // Nothing empty stays: a table that was emptied costs nothing.
        if *count == 0 {
            owners.remove(owner);
        }
        if owners.is_empty() {
            ranges.remove(&range);
        }
        if ranges.is_empty() {
            self.0.remove(&Self::class(range));
        }
        true
    }

    /// The locks that `range` overlaps, a stack as one.
    fn over(&self, range: LockRange) -> impl Iterator<Item = (&LockOwner, LockRange)> {
        let end = u64::try_from(range.end()).unwrap_or(u64::MAX);
        self.0.iter().flat_map(move |(class, ranges)| {
            let reach = range.offset().saturating_sub(Self::longest(*class));
            ranges
                // The least of those that begin there, as ranges are ordered by offset, then length.
                .range(LockRange::before(reach)..)
                .take_while(move |(there, _)| there.offset() <= end)
                .filter(move |(there, _)| there.overlaps(range))
                .flat_map(|(there, owners)| owners.keys().map(move |owner| (owner, *there)))
        })
    }
}

/// A set of locks, or of locks wished for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Locks {
    shared: ByLength,
    exclusive: ByLength,
}

impl Locks {
    fn of(&self, kind: LockKind) -> &ByLength {
        match kind {
            LockKind::Shared => &self.shared,
            LockKind::Exclusive => &self.exclusive,
        }
    }

    fn of_mut(&mut self, kind: LockKind) -> &mut ByLength {
        match kind {
            LockKind::Shared => &mut self.shared,
            LockKind::Exclusive => &mut self.exclusive,
        }
    }

    pub(super) fn add(&mut self, owner: &LockOwner, item: LockItem) {
        self.of_mut(item.kind).add(owner, item.range);
    }

    /// Takes one lock out; false if there is none like it.
    pub(super) fn take(&mut self, owner: &LockOwner, item: LockItem) -> bool {
        self.of_mut(item.kind).take(owner, item.range)
    }

    /// How many locks the owner has on exactly this range.
    pub(super) fn count(&self, owner: &LockOwner, item: LockItem) -> usize {
        self.of(item.kind).at(item.range).and_then(|owners| owners.get(owner)).copied().unwrap_or(0)
    }

    /// The owners of what stands in the way of `item`; one may come more than once.
    pub(super) fn against(&self, owner: &LockOwner, item: LockItem) -> impl Iterator<Item = &LockOwner> {
        let shared = (item.kind == LockKind::Exclusive).then(|| self.shared.over(item.range));
        self.exclusive
            .over(item.range)
            .chain(shared.into_iter().flatten())
            .filter(move |(other, range)| !owner.goes_with(item.range, other, *range))
            .map(|(other, _)| other)
    }

    /// Every lock, those of one stack one by one.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&LockOwner, LockItem)> {
        [LockKind::Shared, LockKind::Exclusive].into_iter().flat_map(|kind| {
            let ranges = self.of(kind).0.values().flatten();
            ranges.flat_map(move |(range, owners)| {
                let item = LockItem { range: *range, kind };
                owners.iter().flat_map(move |(owner, count)| (0..*count).map(move |_| (owner, item)))
            })
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.shared.0.is_empty() && self.exclusive.0.is_empty()
    }
}
