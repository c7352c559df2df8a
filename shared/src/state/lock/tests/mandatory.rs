//! Locks of opens: exact ranges, stacks, zero length, the edges, batches, limits.

use super::*;

#[test]
fn lck_04_zero_length_locks_conflict_where_they_lie_inside() {
    let rows = [
        (0, 10, true),
        (1, 9, true),
        (1, 10, true),
        (1, 11, true),
        (2, 9, false),
        (2, 10, true),
        (3, 9, false),
    ];
    for (length, offset, granted) in rows {
        let (zero, other) = (item(Exclusive, 0, 10), item(Exclusive, length, offset));
        for (first, second) in [(zero, other), (other, zero)] {
            for (open_of_second, number) in [(1, 1), (1, 2), (2, 1)] {
                let mut table = Table::new();
                table.lock(&open(1, 1), &[first]).unwrap();
                let result = table.lock(&open(open_of_second, number), &[second]);
                let wanted = if granted { Ok(ids(&[open_of_second])) } else { conflict(&[1]) };
                assert_eq!(result, wanted, "{first:?}, then {second:?} by open {open_of_second}");
            }
            let kinds = Table::new().lock(&open(1, 1), &[first, second]);
            assert_eq!(kinds.is_ok(), granted, "in one batch");
        }
        let (zero, other) = (item(Shared, 0, 10), item(Shared, length, offset));
        assert!(Table::new().lock(&open(1, 1), &[zero, other]).is_ok(), "shared locks never conflict");
    }
}

#[test]
fn lck_04_zero_length_locks_are_unlocked_as_others_are_the_exclusive_one_first() {
    let mut table = Table::new();
    let both = [item(Shared, 0, 10), item(Exclusive, 0, 10), item(Shared, 0, 10)];
    table.lock(&open(1, 1), &both).unwrap();
    assert_eq!(table.unlock(&open(1, 1), &[range(0, 11)]), Err(LockError::NotLocked));
    table.unlock(&open(1, 1), &[range(0, 10)]).unwrap();
    assert_eq!(table.held(1), [item(Shared, 0, 10); 2]);
    assert_eq!(table.unlock(&open(1, 1), &[range(0, 10); 3]), Err(LockError::NotLocked));
    table.unlock(&open(1, 1), &[range(0, 10); 2]).unwrap();
    assert_eq!(table.0.counts(), LockCounts::default());
}

#[test]
fn lck_05_the_edges_of_what_can_be_locked() {
    let last = u64::MAX;
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Exclusive, 1, 1 << 63), item(Exclusive, 1, last)]).unwrap();
    table.lock(&open(1, 1), &[item(Exclusive, 0, last)]).unwrap();
    let whole = item(Shared, last, 0);
    assert_eq!(table.lock(&open(2, 1), &[whole]), conflict(&[1]));
    table.unlock(&open(1, 1), &[range(1, 1 << 63)]).unwrap();
    table.lock(&open(2, 1), &[whole]).unwrap();
    assert_eq!(table.lock(&open(3, 1), &[item(Exclusive, 1, last)]), conflict(&[1]), "not [0, 2^64 - 1)");
    assert_eq!(table.lock(&open(3, 1), &[item(Exclusive, last, 1)]), conflict(&[1, 2]));
    assert_eq!(table.lock(&open(3, 1), &[item(Exclusive, 0, last)]), Ok(ids(&[3])), "at its very end");
    assert_eq!(table.lock(&open(3, 1), &[item(Exclusive, 0, last - 1)]), conflict(&[2]));
    table.release(1);
    table.lock(&open(3, 1), &[item(Exclusive, 1, last)]).unwrap();
}

/// A short lock is found from everywhere inside a long one and the other way round, whatever their lengths.
#[test]
fn lck_05_every_length_finds_every_other() {
    const FROM: u64 = 1 << 40;
    let lengths: Vec<u64> = (0..62).flat_map(|bits| [1 << bits, (2 << bits) - 1]).collect();
    for (n, long) in lengths.iter().enumerate() {
        for short in &lengths[..=n] {
            for (offset, meets) in [(FROM, true), (FROM + long - short, true), (FROM + long, false)] {
                let (a, b) = (item(Exclusive, *long, FROM), item(Exclusive, *short, offset));
                for (first, second) in [(a, b), (b, a)] {
                    let mut table = LockTable::new(LockLimits::default());
                    table.lock(FILE, &open(1, 1), &[first]).unwrap();
                    let result = table.lock(FILE, &open(2, 1), &[second]);
                    assert_eq!(result.is_err(), meets, "{first:?} and {second:?}");
                }
            }
        }
    }
}

#[test]
fn an_unlock_names_exactly_what_was_locked() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Exclusive, 10, 0)]).unwrap();
    for (owner, range) in [
        (open(2, 1), range(10, 0)),
        (open(1, 2), range(10, 0)),
        (open(1, 1), range(9, 0)),
        (open(1, 1), range(11, 0)),
        (open(1, 1), range(9, 1)),
    ] {
        assert_eq!(table.unlock(&owner, &[range]), Err(LockError::NotLocked));
    }
    assert_eq!(table.unlock(&open(1, 1), &[range(10, 0)]), Ok(ids(&[1])));
    assert_eq!(table.unlock(&open(1, 1), &[range(10, 0)]), Err(LockError::NotLocked));
    assert_eq!(table.0.counts(), LockCounts::default());
}

#[test]
fn shared_locks_stack_and_are_taken_off_one_by_one() {
    let mut table = Table::new();
    let shared = item(Shared, 10, 0);
    table.lock(&open(1, 1), &[shared, shared]).unwrap();
    table.lock(&open(1, 1), &[shared]).unwrap();
    table.lock(&open(2, 1), &[shared]).unwrap();
    assert_eq!(table.held(1), [shared; 3]);
    table.unlock(&open(1, 1), &[range(10, 0); 2]).unwrap();
    table.unlock(&open(2, 1), &[range(10, 0)]).unwrap();
    assert_eq!(table.lock(&open(2, 1), &[item(Exclusive, 1, 9)]), conflict(&[1]), "one of three is left");
    assert_eq!(table.unlock(&open(1, 1), &[range(10, 0); 2]), Err(LockError::NotLocked));
    table.unlock(&open(1, 1), &[range(10, 0)]).unwrap();
    table.lock(&open(2, 1), &[item(Exclusive, 1, 9)]).unwrap();
}

#[test]
fn no_lock_is_upgraded_in_place() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Shared, 10, 0)]).unwrap();
    assert_eq!(table.lock(&open(1, 1), &[item(Exclusive, 10, 0)]), conflict(&[1]));
    table.lock(&open(2, 1), &[item(Shared, 5, 5)]).unwrap();
    table.unlock(&open(1, 1), &[range(10, 0)]).unwrap();
    table.lock(&open(1, 1), &[item(Exclusive, 5, 0)]).unwrap();
    assert_eq!(table.lock(&open(1, 2), &[item(Shared, 5, 0)]), conflict(&[1]));
    assert_eq!(
        table.lock(&open(3, 1), &[item(Exclusive, 10, 0)]),
        conflict(&[1, 2]),
        "all that are in the way"
    );
}

#[test]
fn a_batch_is_taken_and_given_back_as_a_whole() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Exclusive, 1, 5)]).unwrap();
    let batch = [item(Exclusive, 1, 0), item(Shared, 1, 1), item(Exclusive, 1, 5)];
    assert_eq!(table.lock(&open(2, 1), &batch), conflict(&[1]));
    assert_eq!(table.held(2), []);
    let itself = [item(Exclusive, 2, 0), item(Shared, 2, 1)];
    assert_eq!(table.lock(&open(2, 1), &itself), Err(LockError::Contradicts));
    assert_eq!(table.held(2), []);
    table.lock(&open(2, 1), &batch[..2]).unwrap();
    assert_eq!(table.unlock(&open(2, 1), &[range(1, 0), range(1, 5)]), Err(LockError::NotLocked));
    assert_eq!(table.held(2), batch[..2]);
    assert_eq!(table.unlock(&open(2, 1), &[range(1, 0), range(1, 1)]), Ok(ids(&[2])));
    assert_eq!(table.lock(&open(2, 1), &[]), Ok(Vec::new()));
}

#[test]
fn full_tables_say_so() {
    let limits = LockLimits { batch: 3, per_open: 4, per_file: 6, waiters_per_file: 1 };
    let mut table = Table::limited(limits);
    let one = |n: u64| item(Exclusive, 1, n);
    assert_eq!(table.lock(&open(1, 1), &[0, 1, 2, 3].map(one)), Err(LockError::Full), "the batch");
    table.lock(&open(1, 1), &[0, 1, 2].map(one)).unwrap();
    assert_eq!(table.lock(&open(1, 1), &[3, 4].map(one)), Err(LockError::Full), "the open");
    table.lock(&open(1, 1), &[one(3)]).unwrap();
    assert_eq!(table.lock(&open(2, 1), &[4, 5, 6].map(one)), Err(LockError::Full), "the file");
    table.lock(&open(2, 1), &[4, 5].map(one)).unwrap();
    assert_eq!(table.lock(&open(3, 1), &[one(6)]), Err(LockError::Full));
    assert_eq!(table.unlock(&open(1, 1), &[0, 1, 2, 3].map(|n| range(1, n))), Err(LockError::Full));
    table.unlock(&open(1, 1), &[range(1, 0)]).unwrap();
    table.lock(&open(3, 1), &[one(6)]).unwrap();
    assert_eq!(table.0.counts(), LockCounts { files: 1, locks: 6, waiters: 0 });
}

#[test]
fn files_are_apart() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Exclusive, 1, 0)]).unwrap();
    let other = FileIdentity { generation: 4, ..FILE };
    table.checked(|table| table.lock(other, &open(2, 1), &[item(Exclusive, 1, 0)])).unwrap();
    assert_eq!(table.0.counts(), LockCounts { files: 2, locks: 2, waiters: 0 });
    table.release(2);
    assert_eq!(table.0.counts().locks, 2, "its lock is on the other file");
    table.release(1);
    assert_eq!(table.0.counts(), LockCounts { files: 1, locks: 1, waiters: 0 });
}

#[test]
fn what_the_journal_lists_is_restored_and_a_conflict_is_noticed() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Shared, 10, 0), item(Shared, 10, 0), item(Exclusive, 0, 10)]).unwrap();
    table.lock(&open(1, 2), &[item(Exclusive, 5, 20)]).unwrap();
    let listed = table.0.locks_of(FILE, id(1));
    assert_eq!(listed.len(), 4);

    let few = LockLimits { batch: 1, per_open: 1, per_file: 1, waiters_per_file: 0 };
    let mut restored = Table::limited(few);
    for (number, item) in &listed {
        restored.restore(&open(1, *number), *item).unwrap();
    }
    assert_eq!(restored.0.locks_of(FILE, id(1)), listed);
    assert_eq!(restored.restore(&open(2, 1), item(Exclusive, 1, 0)), conflict(&[1]));
    assert_eq!(restored.restore(&open(1, 2), item(Exclusive, 5, 20)), conflict(&[1]), "the same again");
    assert_eq!(restored.0.locks_of(FILE, id(1)), listed);
    restored.unlock(&open(1, 1), &[range(10, 0)]).unwrap();
}
