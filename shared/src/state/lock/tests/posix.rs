//! Locks of processes: cut, joined, replaced.

use super::*;

#[test]
fn an_owners_locks_are_cut_joined_and_replaced() {
    let mut table = Table::new();
    let owner = process(1, 1);
    table.lock(&owner, &[item(Shared, 10, 0)]).unwrap();
    table.lock(&owner, &[item(Exclusive, 2, 4)]).unwrap();
    let cut = [item(Shared, 4, 0), item(Exclusive, 2, 4), item(Shared, 4, 6)];
    assert_eq!(table.held(1), cut);
    table.lock(&owner, &[item(Shared, 2, 4)]).unwrap();
    assert_eq!(table.held(1), [item(Shared, 10, 0)], "downgraded and one again");
    table.unlock(&owner, &[range(2, 4)]).unwrap();
    assert_eq!(table.held(1), [item(Shared, 4, 0), item(Shared, 4, 6)]);
    table.lock(&owner, &[item(Shared, 5, 10)]).unwrap();
    assert_eq!(table.held(1), [item(Shared, 4, 0), item(Shared, 9, 6)], "neighbours join");
    table.lock(&owner, &[item(Exclusive, 100, 0)]).unwrap();
    assert_eq!(table.held(1), [item(Exclusive, 100, 0)], "upgraded, all of them");
    table.unlock(&owner, &[range(u64::MAX, 0)]).unwrap();
    assert_eq!(table.0.counts(), LockCounts::default());
    assert_eq!(table.unlock(&owner, &[range(1, 0)]), Ok(Vec::new()), "nothing was locked, and that is fine");
}

#[test]
fn only_other_owners_are_in_the_way() {
    let mut table = Table::new();
    table.lock(&process(1, 1), &[item(Shared, 10, 0)]).unwrap();
    table.lock(&process(2, 2), &[item(Shared, 10, 5)]).unwrap();
    assert_eq!(
        table.lock(&process(1, 1), &[item(Exclusive, 6, 0)]),
        conflict(&[2]),
        "no upgrade where both are"
    );
    assert_eq!(table.held(1), [item(Shared, 10, 0)], "and the old lock stays");
    table.lock(&process(1, 1), &[item(Exclusive, 5, 0)]).unwrap();
    assert_eq!(table.held(1), [item(Exclusive, 5, 0), item(Shared, 5, 5)]);

    let LockOwner::Process { open, process: first } = process(3, 1) else { unreachable!() };
    for other in [
        Process { principal: Arc::from("u2"), ..first.clone() },
        Process { process: ProcessId(9), ..first.clone() },
        Process { number: 8, ..first },
    ] {
        let other = LockOwner::Process { open, process: other };
        assert_eq!(table.lock(&other, &[item(Shared, 1, 0)]), conflict(&[1]));
    }
}

#[test]
fn two_opens_of_one_owner_are_one_owner_and_each_takes_its_own_along() {
    let mut table = Table::new();
    table.lock(&process(1, 1), &[item(Exclusive, 10, 0)]).unwrap();
    assert_eq!(table.lock(&process(2, 1), &[item(Exclusive, 4, 6)]), Ok(ids(&[1, 2])), "both changed");
    assert_eq!(table.held(1), [item(Exclusive, 6, 0)]);
    assert_eq!(table.held(2), [item(Exclusive, 4, 6)]);
    table.release(1);
    assert_eq!((table.held(1), table.held(2)), (vec![], vec![item(Exclusive, 4, 6)]));
    assert_eq!(table.unlock(&process(1, 1), &[range(2, 6)]), Ok(ids(&[2])), "through either open");
    assert_eq!(table.held(2), [item(Exclusive, 2, 8)]);
}

#[test]
fn lck_05_ranges_without_a_byte_or_beyond_the_end_are_refused() {
    let mut table = Table::new();
    let owner = process(1, 1);
    for bad in [range(0, 10), range(1, u64::MAX), range(u64::MAX, 1)] {
        let batch = [item(Shared, 1, 0), LockItem { range: bad, kind: Shared }];
        assert_eq!(table.lock(&owner, &batch), Err(LockError::BadRange));
        assert_eq!(table.unlock(&owner, &[bad]), Err(LockError::BadRange));
        assert_eq!(table.wait(1, &owner, &batch), Err(LockError::BadRange));
        assert_eq!(table.restore(&owner, batch[1]), Err(LockError::BadRange));
    }
    assert_eq!(table.0.counts(), LockCounts::default());
    table.lock(&owner, &[item(Shared, 1 << 63, 0), item(Shared, (1 << 63) - 1, 1 << 63)]).unwrap();
    assert_eq!(table.held(1), [item(Shared, u64::MAX, 0)], "all there is, in one piece");
    assert_eq!(table.lock(&process(2, 2), &[item(Exclusive, 1, u64::MAX - 1)]), conflict(&[1]));
}

#[test]
fn a_batch_is_taken_in_its_order_or_not_at_all() {
    let mut table = Table::new();
    let owner = process(1, 1);
    table.lock(&process(2, 2), &[item(Exclusive, 1, 20)]).unwrap();
    let batch = [item(Exclusive, 10, 0), item(Shared, 2, 4), item(Shared, 1, 20)];
    assert_eq!(table.lock(&owner, &batch), conflict(&[2]));
    assert_eq!(table.held(1), []);
    table.lock(&owner, &batch[..2]).unwrap();
    assert_eq!(table.held(1), [item(Exclusive, 4, 0), item(Shared, 2, 4), item(Exclusive, 4, 6)]);
    table.unlock(&owner, &[range(4, 0), range(9, 6)]).unwrap();
    assert_eq!(table.held(1), [item(Shared, 2, 4)]);
}

#[test]
fn a_cut_that_would_be_one_piece_too_many_is_refused() {
    let mut table = Table::limited(LockLimits { per_open: 2, ..LockLimits::default() });
    let owner = process(1, 1);
    table.lock(&owner, &[item(Exclusive, 10, 0), item(Exclusive, 10, 20)]).unwrap();
    assert_eq!(table.unlock(&owner, &[range(1, 5)]), Err(LockError::Full));
    assert_eq!(
        table.lock(&process(2, 1), &[item(Shared, 1, 5)]),
        Err(LockError::Full),
        "of the other open too"
    );
    assert_eq!(table.held(1), [item(Exclusive, 10, 0), item(Exclusive, 10, 20)]);
    table.unlock(&owner, &[range(1, 5), range(10, 20)]).unwrap();
    table.lock(&owner, &[item(Exclusive, 1, 5)]).unwrap();
    assert_eq!(table.held(1), [item(Exclusive, 10, 0)]);
}

#[test]
fn both_kinds_of_owners_in_one_file_respect_each_other() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Exclusive, 10, 0)]).unwrap();
    assert_eq!(table.lock(&process(1, 1), &[item(Shared, 1, 0)]), conflict(&[1]), "even of one open");
    table.lock(&process(2, 2), &[item(Shared, 10, 10)]).unwrap();
    assert_eq!(table.lock(&open(3, 1), &[item(Exclusive, 1, 15)]), conflict(&[2]));
    table.lock(&open(3, 1), &[item(Shared, 5, 12)]).unwrap();
}

/// Two shared pieces that join over an exclusive zero-length lock never conflicted with it, and do not now.
#[test]
fn a_zero_length_lock_is_not_in_the_way_of_pieces() {
    let mut table = Table::new();
    table.lock(&process(1, 1), &[item(Shared, 5, 0)]).unwrap();
    table.lock(&open(2, 1), &[item(Exclusive, 0, 5), item(Exclusive, 0, 3)]).unwrap();
    table.lock(&process(1, 1), &[item(Shared, 5, 5)]).unwrap();
    assert_eq!(table.held(1), [item(Shared, 10, 0)]);
    table.lock(&process(1, 1), &[item(Exclusive, 10, 0)]).unwrap();
}

#[test]
fn pieces_are_restored_and_what_overlaps_is_noticed() {
    let mut table = Table::new();
    table.lock(&process(1, 1), &[item(Exclusive, 10, 0), item(Shared, 2, 4)]).unwrap();
    let listed = table.held(1);
    let mut restored = Table::new();
    for item in &listed {
        restored.restore(&process(1, 1), *item).unwrap();
    }
    assert_eq!(restored.held(1), listed);
    for wrong in [item(Shared, 1, 9), item(Exclusive, 10, 0), item(Shared, 100, 3)] {
        assert_eq!(restored.restore(&process(1, 1), wrong), conflict(&[1]));
        assert_eq!(restored.restore(&process(2, 1), wrong), conflict(&[1]), "another open of the same owner");
    }
    assert_eq!(restored.restore(&process(2, 2), item(Shared, 1, 0)), conflict(&[1]));
    restored.restore(&process(2, 2), item(Shared, 2, 4)).unwrap();
    assert_eq!(restored.held(1), listed);
}
