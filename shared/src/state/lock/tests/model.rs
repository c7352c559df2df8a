//! The lock table against a model so plain that it can be seen to be right: a list of exact ranges, and for each
//! process what it holds byte by byte.
//!
//! Whether two ranges meet is asked of a ruler with a mark for each byte and one for each place between two bytes:
//!
//! ```text
//!   marks      0 1 2 3 4 5 6 7 8        odd: bytes 0, 1, 2, 3; even: the places between them
//!   2@1              x x x
//!   0@2                x                a lock without a byte has one mark
//! ```

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// Bytes of the model's file.
const BYTES: usize = 16;
const LIMITS: LockLimits = LockLimits { batch: 3, per_open: 5, per_file: 9, waiters_per_file: 3 };

/// Who asks: opens 1 to 3 are on a mandatory volume, 4 to 6 on an advisory one, where 4 and 5 are one process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Asker {
    open: u8,
    number: u64,
}

impl Asker {
    fn process(self) -> Option<u64> {
        (self.open > 3).then_some(if self.open == 6 { 2 } else { 1 })
    }

    fn owner(self) -> LockOwner {
        match self.process() {
            Some(of) => process(self.open, of),
            None => open(self.open, self.number),
        }
    }

    fn conflicts(self, item: Item, other: Self, others: Item) -> bool {
        let apart = match (self.process(), other.process()) {
            (None, None) => true,
            (Some(a), Some(b)) => a != b,
            _ => item.0.length > 0 && others.0.length > 0,
        };
        apart && conflicts(item, others)
    }
}

/// A range at a small offset; the table sees it `base` bytes further on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Small {
    offset: usize,
    length: usize,
}

impl Small {
    fn marks(self) -> u64 {
        if self.length == 0 {
            return 1 << (2 * self.offset);
        }
        (2 * self.offset + 1..2 * (self.offset + self.length)).map(|mark| 1 << mark).sum()
    }

    fn meets(self, other: Self) -> bool {
        self.length + other.length > 0 && self.marks() & other.marks() != 0
    }

    fn range(self, base: u64) -> LockRange {
        range(self.length as u64, base + self.offset as u64)
    }
}

type Item = (Small, LockKind);

fn conflicts(a: Item, b: Item) -> bool {
    (a.1 == Exclusive || b.1 == Exclusive) && a.0.meets(b.0)
}

#[derive(Clone, Debug)]
enum Step {
    Lock(Asker, Vec<Item>),
    Unlock(Asker, Vec<Small>),
    /// Something that is held, as often as said.
    UnlockHeld(usize, usize),
    Wait(u64, Asker, Vec<Item>),
    Cancel(u64),
    CancelWaits(u8),
    Release(u8),
    Grant,
}

#[derive(Clone, Default)]
struct Held {
    exact: Vec<(Asker, Item)>,
    bytes: [[Option<(LockKind, u8)>; BYTES]; 3],
}

impl Held {
    /// Every lock; of a process the longest runs of bytes that are alike.
    fn all(&self) -> Vec<(Asker, Item)> {
        let mut all = self.exact.clone();
        for bytes in &self.bytes {
            let mut last = None;
            for (offset, byte) in bytes.iter().enumerate() {
                if let Some((kind, open)) = byte {
                    if last == Some((*kind, *open)) {
                        all.last_mut().unwrap().1.0.length += 1;
                    } else {
                        all.push((Asker { open: *open, number: 7 }, (Small { offset, length: 1 }, *kind)));
                    }
                }
                last = *byte;
            }
        }
        all
    }

    fn count(&self, open: u8) -> usize {
        self.all().iter().filter(|(asker, _)| asker.open == open).count()
    }

    fn in_the_way(&self, asker: Asker, items: &[Item]) -> BTreeSet<u8> {
        let all = self.all().into_iter();
        all.filter(|(other, lock)| items.iter().any(|item| asker.conflicts(*item, *other, *lock)))
            .map(|(other, _)| other.open)
            .collect()
    }

    fn set(&mut self, process: u64, range: Small, to: Option<(LockKind, u8)>) {
        let bytes = &mut self.bytes[usize::try_from(process).unwrap()];
        bytes[range.offset..range.offset + range.length].fill(to);
    }

    fn of(&self, open: u8, base: u64) -> Vec<(u64, LockItem)> {
        let all = self.all().into_iter().filter(|(asker, _)| asker.open == open);
        let mut listed: Vec<_> = all
            .map(|(asker, (range, kind))| (asker.number, LockItem { range: range.range(base), kind }))
            .collect();
        listed.sort();
        listed
    }
}

struct Model {
    table: Table,
    base: u64,
    held: Held,
    queue: Vec<(u64, Asker, Vec<Item>)>,
}

impl Model {
    fn items(&self, items: &[Item]) -> Vec<LockItem> {
        items.iter().map(|(range, kind)| LockItem { range: range.range(self.base), kind: *kind }).collect()
    }

    fn check_batch(asker: Asker, items: &[Item]) -> Result<(), LockError> {
        if items.len() > LIMITS.batch {
            return Err(LockError::Full);
        }
        if asker.process().is_some() {
            let empty = items.iter().any(|(range, _)| range.length == 0);
            return if empty { Err(LockError::BadRange) } else { Ok(()) };
        }
        let pairs = items.iter().enumerate().flat_map(|(n, a)| items[..n].iter().map(move |b| (*a, *b)));
        let contradicts = pairs.into_iter().any(|(a, b)| conflicts(a, b));
        if contradicts { Err(LockError::Contradicts) } else { Ok(()) }
    }

    /// Goes over to other locks, if they are within the limits or fewer than before.
    fn go_over(&mut self, held: Held) -> Result<Vec<OpenId>, LockError> {
        let more = |before: usize, after: usize, max: usize| after > before && after > max;
        let too_many = (1..7).any(|open| more(self.held.count(open), held.count(open), LIMITS.per_open));
        if too_many || more(self.held.all().len(), held.all().len(), LIMITS.per_file) {
            return Err(LockError::Full);
        }
        let changed = (1..7).filter(|open| self.held.of(*open, 0) != held.of(*open, 0)).collect::<Vec<_>>();
        self.held = held;
        Ok(ids(&changed))
    }

    fn lock(&mut self, asker: Asker, items: &[Item]) -> Result<Vec<OpenId>, LockError> {
        Self::check_batch(asker, items)?;
        let opens = self.held.in_the_way(asker, items);
        if !opens.is_empty() {
            return conflict(&opens.into_iter().collect::<Vec<_>>());
        }
        let mut held = self.held.clone();
        for (range, kind) in items {
            match asker.process() {
                Some(process) => held.set(process, *range, Some((*kind, asker.open))),
                None => held.exact.push((asker, (*range, *kind))),
            }
        }
        self.go_over(held)
    }

    fn unlock(&mut self, asker: Asker, ranges: &[Small]) -> Result<Vec<OpenId>, LockError> {
        if ranges.len() > LIMITS.batch {
            return Err(LockError::Full);
        }
        let mut held = self.held.clone();
        for range in ranges {
            if let Some(process) = asker.process() {
                if range.length == 0 {
                    return Err(LockError::BadRange);
                }
                held.set(process, *range, None);
            } else {
                let find = |kind| held.exact.iter().position(|lock| *lock == (asker, (*range, kind)));
                let Some(at) = find(Exclusive).or_else(|| find(Shared)) else {
                    return Err(LockError::NotLocked);
                };
                held.exact.remove(at);
            }
        }
        self.go_over(held)
    }

    fn passes(&self, earlier: &[(u64, Asker, Vec<Item>)], asker: Asker, items: &[Item]) -> bool {
        earlier.iter().all(|(_, other, wanted)| {
            wanted.iter().all(|wanted| items.iter().all(|item| !asker.conflicts(*item, *other, *wanted)))
        })
    }

    fn wait(&mut self, id: u64, asker: Asker, items: &[Item]) -> Result<Wait, LockError> {
        if self.queue.iter().any(|(there, ..)| *there == id) {
            return Err(LockError::WaiterExists);
        }
        Self::check_batch(asker, items)?;
        if self.passes(&self.queue, asker, items) {
            match self.lock(asker, items) {
                Ok(changed) => return Ok(Wait::Granted { changed }),
                Err(LockError::Conflict(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let wanted: usize = self.queue.iter().map(|(_, _, items)| items.len()).sum();
        let full = items.len() > LIMITS.per_open || wanted + items.len() > LIMITS.per_file;
        if full || self.queue.len() == LIMITS.waiters_per_file {
            return Err(LockError::Full);
        }
        self.queue.push((id, asker, items.to_vec()));
        let holders = self.held.in_the_way(asker, items).into_iter().collect::<Vec<_>>();
        Ok(Wait::Queued { holders: ids(&holders) })
    }

    fn grant(&mut self) -> Vec<u64> {
        let mut granted = Vec::new();
        let mut waiting = Vec::new();
        for (id, asker, items) in std::mem::take(&mut self.queue) {
            if self.passes(&waiting, asker, &items) && self.lock(asker, &items).is_ok() {
                granted.push(id);
            } else {
                waiting.push((id, asker, items));
            }
        }
        self.queue = waiting;
        granted
    }

    fn drop_waits(&mut self, open: u8) -> Vec<WaiterId> {
        let (gone, stay) =
            std::mem::take(&mut self.queue).into_iter().partition(|(_, of, _)| of.open == open);
        self.queue = stay;
        let gone: Vec<(u64, Asker, Vec<Item>)> = gone;
        gone.into_iter().map(|(id, ..)| WaiterId(id)).collect()
    }

    fn release(&mut self, open: u8) {
        self.held.exact.retain(|(asker, _)| asker.open != open);
        for byte in self.held.bytes.iter_mut().flatten() {
            *byte = byte.filter(|(_, of)| *of != open);
        }
    }

    fn unlock_both(&mut self, asker: Asker, small: &[Small]) {
        let ranges: Vec<_> = small.iter().map(|range| range.range(self.base)).collect();
        assert_eq!(self.table.unlock(&asker.owner(), &ranges), self.unlock(asker, small));
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Lock(asker, items) => {
                let result = self.table.lock(&asker.owner(), &self.items(&items));
                assert_eq!(result, self.lock(asker, &items));
            }
            Step::Unlock(asker, ranges) => self.unlock_both(asker, &ranges),
            Step::UnlockHeld(which, times) => {
                let all = self.held.all();
                if let Some((asker, (range, _))) = all.get(which % all.len().max(1)) {
                    self.unlock_both(*asker, &vec![*range; times]);
                }
            }
            Step::Wait(id, asker, items) => {
                let result = self.table.wait(id, &asker.owner(), &self.items(&items));
                assert_eq!(result, self.wait(id, asker, &items));
            }
            Step::Cancel(id) => {
                let before = self.queue.len();
                self.queue.retain(|(there, ..)| *there != id);
                let there = self.table.checked(|table| table.cancel(WaiterId(id)));
                assert_eq!(there, (self.queue.len() < before).then_some(FILE));
            }
            Step::CancelWaits(open) => {
                let gone = self.table.checked(|table| table.cancel_waits(FILE, id(open)));
                assert_eq!(gone, self.drop_waits(open));
            }
            Step::Release(open) => {
                self.release(open);
                assert_eq!(self.table.release(open), self.drop_waits(open));
            }
            Step::Grant => assert_eq!(self.table.grant(), self.grant()),
        }
    }

    fn agrees(&self) {
        for open in 1..7 {
            assert_eq!(
                self.table.0.locks_of(FILE, id(open)),
                self.held.of(open, self.base),
                "of open {open}"
            );
        }
        let waiting: Vec<_> = self.queue.iter().map(|(id, ..)| *id).collect();
        assert_eq!(self.table.waiting(), waiting);
        for (id, asker, items) in &self.queue {
            let opens: Vec<_> = self.held.in_the_way(*asker, items).into_iter().collect();
            assert_eq!(self.table.0.in_the_way(WaiterId(*id)), ids(&opens));
        }
        let locks = self.held.all().len();
        let files = usize::from(locks + waiting.len() > 0);
        assert_eq!(self.table.0.counts(), LockCounts { files, locks, waiters: waiting.len() });
    }
}

fn asker(opens: std::ops::Range<u8>) -> impl Strategy<Value = Asker> {
    (opens, 0u64..2).prop_map(|(open, number)| Asker { open, number: if open > 3 { 7 } else { number } })
}

fn small() -> impl Strategy<Value = Small> {
    (0usize..10, 0usize..7).prop_map(|(offset, length)| Small { offset, length })
}

fn batch() -> impl Strategy<Value = Vec<Item>> {
    let kind = prop_oneof![2 => Just(Shared), 1 => Just(Exclusive)];
    let items = || proptest::collection::vec((small(), kind.clone()), 0..5);
    prop_oneof![3 => (small(), kind.clone()).prop_map(|item| vec![item]), 1 => items()]
}

fn steps(opens: std::ops::Range<u8>) -> impl Strategy<Value = Vec<Step>> {
    let by = move || asker(opens.clone());
    let step = prop_oneof![
        8 => (by(), batch()).prop_map(|(asker, items)| Step::Lock(asker, items)),
        2 => (by(), proptest::collection::vec(small(), 0..4)).prop_map(|(asker, of)| Step::Unlock(asker, of)),
        6 => (any::<usize>(), 1usize..3).prop_map(|(which, times)| Step::UnlockHeld(which, times)),
        6 => (0u64..5, by(), batch()).prop_map(|(id, asker, items)| Step::Wait(id, asker, items)),
        1 => (0u64..5).prop_map(Step::Cancel),
        1 => by().prop_map(|asker| Step::CancelWaits(asker.open)),
        2 => by().prop_map(|asker| Step::Release(asker.open)),
        5 => Just(Step::Grant),
    ];
    proptest::collection::vec(step, 1..100)
}

fn compare(steps: Vec<Step>, base: u64) {
    let mut model = Model { table: Table::limited(LIMITS), base, held: Held::default(), queue: Vec::new() };
    for step in steps {
        model.step(step);
        model.agrees();
    }
}

/// Where the model's byte 0 lies: at the start, across the sign bit, and as far on as POSIX locks go.
fn base() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just((1 << 63) - 8), Just(u64::MAX - BYTES as u64)]
}

proptest! {
    // 50 steps on average: about 100,000 in all.
    #![proptest_config(ProptestConfig::with_cases(700))]
    #[test]
    fn lck_12_opens_lock_as_the_model_does(steps in steps(1..4), base in base()) {
        compare(steps, base);
    }

    #[test]
    fn lck_12_processes_lock_as_the_model_does(steps in steps(4..7), base in base()) {
        compare(steps, base);
    }

    #[test]
    fn lck_12_both_together_lock_as_the_model_does(steps in steps(1..7), base in base()) {
        compare(steps, base);
    }
}
