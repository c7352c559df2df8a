//! Whose turn it is.

use super::*;

fn queued(result: Result<Wait, LockError>) -> Vec<OpenId> {
    match result {
        Ok(Wait::Queued { holders }) => holders,
        other => panic!("not queued: {other:?}"),
    }
}

#[test]
fn a_free_range_is_granted_at_once() {
    let mut table = Table::new();
    let granted = table.wait(1, &open(1, 1), &[item(Exclusive, 1, 0)]);
    assert_eq!(granted, Ok(Wait::Granted { changed: ids(&[1]) }));
    assert_eq!(table.0.counts(), LockCounts { files: 1, locks: 1, waiters: 0 });
}

/// Readers that keep coming do not starve the writer that waits.
#[test]
fn nobody_is_passed_by_who_would_make_it_wait_longer() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Shared, 10, 0)]).unwrap();
    assert_eq!(queued(table.wait(1, &open(2, 1), &[item(Exclusive, 10, 5)])), ids(&[1]));
    assert_eq!(queued(table.wait(2, &open(3, 1), &[item(Shared, 10, 0)])), [], "the writer is before it");
    assert_eq!(table.wait(3, &open(3, 1), &[item(Shared, 5, 0)]), Ok(Wait::Granted { changed: ids(&[3]) }));
    assert_eq!(table.grant(), []);
    table.unlock(&open(1, 1), &[range(10, 0)]).unwrap();
    assert_eq!(table.grant(), [1], "the writer, and not the reader behind it");
    assert_eq!(table.0.in_the_way(WaiterId(2)), ids(&[2]));
    table.unlock(&open(2, 1), &[range(10, 5)]).unwrap();
    assert_eq!(table.grant(), [2]);
    assert_eq!(table.held(3), [item(Shared, 5, 0), item(Shared, 10, 0)]);
}

#[test]
fn all_that_can_be_granted_are_in_their_order() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Exclusive, 100, 0)]).unwrap();
    for waiter in 1..=4u8 {
        let items = [item(if waiter == 3 { Exclusive } else { Shared }, 10, u64::from(waiter / 4) * 50)];
        assert_eq!(queued(table.wait(waiter.into(), &open(waiter + 1, 1), &items)), ids(&[1]));
    }
    assert_eq!(table.waiting(), [1, 2, 3, 4]);
    table.release(1);
    assert_eq!(table.grant(), [1, 2, 4]);
    assert_eq!(table.waiting(), [3]);
    table.release(2);
    assert_eq!(table.grant(), []);
    table.release(3);
    assert_eq!(table.grant(), [3]);
}

#[test]
fn a_batch_waits_as_a_whole_and_holds_nothing_meanwhile() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Exclusive, 1, 0)]).unwrap();
    table.lock(&open(2, 1), &[item(Exclusive, 1, 9)]).unwrap();
    let batch = [item(Exclusive, 1, 0), item(Exclusive, 1, 5), item(Exclusive, 1, 9)];
    assert_eq!(queued(table.wait(1, &open(3, 1), &batch)), ids(&[1, 2]));
    table.release(1);
    assert_eq!(table.grant(), []);
    assert_eq!(table.held(3), []);
    table.lock(&open(4, 1), &[item(Exclusive, 1, 5)]).unwrap();
    table.release(2);
    assert_eq!(
        (table.grant(), table.0.in_the_way(WaiterId(1))),
        (vec![], ids(&[4])),
        "one that did not wait"
    );
    table.release(4);
    assert_eq!(table.grant(), [1]);
    assert_eq!(table.held(3), batch);
}

#[test]
fn lck_07_who_is_gone_is_never_granted() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Exclusive, 1, 0)]).unwrap();
    let wanted = [item(Exclusive, 1, 0)];
    for waiter in 1..=4u8 {
        queued(table.wait(waiter.into(), &open(waiter + 1, 1), &wanted));
    }
    table.lock(&open(4, 1), &[item(Shared, 1, 7)]).unwrap();
    assert_eq!(table.checked(|table| table.cancel(WaiterId(1))), Some(FILE));
    assert_eq!(table.checked(|table| table.cancel(WaiterId(1))), None);
    assert_eq!(table.release(3), [WaiterId(2)]);
    assert_eq!(table.checked(|table| table.cancel_waits(FILE, id(4))), [WaiterId(3)]);
    assert_eq!(table.held(4), [item(Shared, 1, 7)], "its locks stay");
    table.release(1);
    assert_eq!(table.grant(), [4]);
    assert_eq!(table.waiting(), Vec::<u64>::new());
    table.release(5);
    table.release(4);
    assert_eq!(table.0.counts(), LockCounts::default());
}

#[test]
fn a_cancelled_waiter_lets_those_behind_it_pass() {
    let mut table = Table::new();
    table.lock(&open(1, 1), &[item(Shared, 10, 0)]).unwrap();
    queued(table.wait(1, &open(2, 1), &[item(Exclusive, 10, 0)]));
    queued(table.wait(2, &open(3, 1), &[item(Shared, 10, 0)]));
    table.checked(|table| table.cancel(WaiterId(1)));
    assert_eq!(table.grant(), [2]);
}

#[test]
fn a_process_that_downgrades_lets_readers_in() {
    let mut table = Table::new();
    table.lock(&process(1, 1), &[item(Exclusive, 10, 0)]).unwrap();
    queued(table.wait(1, &process(2, 2), &[item(Shared, 10, 0)]));
    table.lock(&process(1, 1), &[item(Shared, 10, 0)]).unwrap();
    assert_eq!(table.grant(), [1]);
    queued(table.wait(2, &process(1, 1), &[item(Exclusive, 10, 0)]));
    table.release(2);
    let granted = table.checked(|table| table.grant_waiters(FILE));
    assert_eq!(
        granted,
        [Granted { waiter: WaiterId(2), open: id(1), changed: ids(&[1]) }],
        "an upgrade waits too"
    );
    assert_eq!(table.held(1), [item(Exclusive, 10, 0)]);
}

#[test]
fn full_queues_say_so() {
    let limits = LockLimits { batch: 9, per_open: 4, per_file: 6, waiters_per_file: 2 };
    let mut table = Table::limited(limits);
    let whole = [item(Exclusive, 100, 0)];
    table.lock(&open(1, 1), &whole).unwrap();
    let many = |n: u64| (0..n).map(|at| item(Exclusive, 1, at)).collect::<Vec<_>>();
    assert_eq!(table.wait(1, &open(2, 1), &many(5)), Err(LockError::Full), "more than an open may have");
    assert_eq!(table.wait(1, &open(2, 1), &[whole[0], whole[0]]), Err(LockError::Contradicts));
    queued(table.wait(1, &open(2, 1), &many(4)));
    assert_eq!(table.wait(1, &open(2, 1), &whole), Err(LockError::WaiterExists));
    assert_eq!(table.wait(2, &open(3, 1), &many(3)), Err(LockError::Full), "too many locks waited for");
    queued(table.wait(2, &open(3, 1), &many(2)));
    assert_eq!(table.wait(3, &open(4, 1), &[]), Ok(Wait::Granted { changed: vec![] }));
    assert_eq!(table.wait(3, &open(4, 1), &[]), Ok(Wait::Granted { changed: vec![] }), "its id was not used");
    table.checked(|table| table.cancel(WaiterId(2)));
    queued(table.wait(2, &open(3, 1), &many(1)));
    assert_eq!(table.wait(3, &open(4, 1), &many(1)), Err(LockError::Full), "too many that wait");
}
