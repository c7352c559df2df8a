//! Byte-range locks from the outside: which stand beside which, what they keep away, and who is granted when.

use crate::common::probe::*;
use crate::common::{Deployment, Wish};
use holdfast_client::{
    Changes, Disposition, Error, HoldClass, LockOptions, LockRange, Open, OpenOptions, ProcessId, Session,
    Status,
};
use std::time::Duration;

const CONFLICT: Option<Status> = Some(Status::LockConflict);
const NOT_GRANTED: Option<Status> = Some(Status::LockNotGranted);
const LONG: Duration = Duration::from_secs(50);

/// Two opens of one file, in sessions of their own.
async fn two(server: &Deployment) -> (Session, Open, Session, Open) {
    let (mine, theirs) = (connect(server).await, connect(server).await);
    let (one, two) = (open(&mine, "file", &rw()).await, open(&theirs, "file", &rw()).await);
    (mine, one, theirs, two)
}

/// The table of the case, each pair in both orders, from the same open (two owner numbers) and from another.
#[test]
fn lck_04_zero_length_locks_against_their_neighbours() {
    let server = Deployment::start();
    run(async {
        let (_mine, one, _theirs, other) = two(&server).await;
        let point = exclusive(10, 0);
        for (offset, length, conflict) in [
            (10, 0, false),
            (9, 1, false),
            (10, 1, false),
            (11, 1, false),
            (9, 2, true),
            (10, 2, false),
            (9, 3, true),
        ] {
            for (first, second) in [(point, exclusive(offset, length)), (exclusive(offset, length), point)] {
                for (holder, owner) in [(&other, 0), (&one, 1)] {
                    let words = format!("{first:?} against {second:?}, owner {owner}");
                    assert_eq!(lock(&one, first).await, None, "{words}");
                    let got = lock_by(holder, owner, second).await;
                    assert_eq!(got, if conflict { NOT_GRANTED } else { None }, "{words}");
                    if !conflict {
                        holder.unlock(owner, &[second.range]).await.unwrap();
                    }
                    assert_eq!(unlock(&one, first).await, None, "{words}");
                }
            }
        }
        // Shared ones are in nobody's way, and it is the exclusive range that counts.
        assert_eq!(lock(&one, shared(9, 3)).await, None);
        assert_eq!(lock(&other, shared(10, 0)).await, None);
        assert_eq!(lock(&other, exclusive(10, 0)).await, NOT_GRANTED);
        assert_eq!(server.gauges()["control.locks"], 2);
    });
}

#[test]
fn lck_05_ranges_that_touch_and_ranges_up_to_the_end() {
    let server = Deployment::start();
    run(async {
        let (_mine, one, _theirs, other) = two(&server).await;
        assert_eq!(lock(&one, exclusive(100, 50)).await, None);
        for (offset, length, wanted) in [
            (50, 50, None),
            (150, 50, None),
            (99, 2, NOT_GRANTED),
            (149, 1, NOT_GRANTED),
            (0, u64::MAX, NOT_GRANTED),
            (100, 50, NOT_GRANTED),
            (120, 1, NOT_GRANTED),
            (1 << 63, 1 << 63, None),
            (u64::MAX, 1, NOT_GRANTED), // the range before ends there
            (u64::MAX, 0, NOT_GRANTED), // a point strictly inside it
        ] {
            assert_eq!(lock(&other, exclusive(offset, length)).await, wanted, "{length}@{offset}");
        }
        for (offset, length) in [(u64::MAX, 2), (2, u64::MAX), (1 << 63, (1 << 63) + 1)] {
            assert!(LockRange::new(offset, length).is_err(), "{length}@{offset}");
        }
        one.close().await.unwrap();
        assert_eq!(lock(&other, exclusive(100, 50)).await, None, "a close gives up");
        server.until("its locks are gone", |g| g["control.locks"] == 4);
        other.close().await.unwrap();
        let (_mine, one, _theirs, other) = two(&server).await;
        assert_eq!(lock(&one, exclusive(0, u64::MAX)).await, None);
        assert_eq!(lock(&other, exclusive(u64::MAX, 1)).await, None, "the very last byte is beside it");
        assert_eq!(lock(&other, exclusive(u64::MAX - 1, 1)).await, NOT_GRANTED);
    });
}

/// Unlocking names exactly what was locked, by whom, and how often; a batch is given back whole or not at all.
#[test]
fn lck_unlock_names_what_was_locked() {
    let server = Deployment::start();
    run(async {
        let (_mine, one, _theirs, other) = two(&server).await;
        let wrong = Some(Status::NotLocked);
        one.lock(&[exclusive(0, 10), exclusive(10, 10), shared(50, 10)], LockOptions::default())
            .await
            .unwrap();
        for range in [range(0, 5), range(5, 5), range(0, 20), range(0, 11), range(0, 0), range(100, 1)] {
            assert_eq!(status(one.unlock(0, &[range]).await), wrong, "{range:?}");
        }
        assert_eq!(status(other.unlock(0, &[range(0, 10)]).await), wrong, "another open");
        assert_eq!(status(one.unlock(1, &[range(0, 10)]).await), wrong, "another owner");
        let batch = [range(0, 10), range(10, 10), range(20, 10)];
        assert_eq!(status(one.unlock(0, &batch).await), wrong, "one of a batch");
        let twice = [range(0, 10), range(0, 10)];
        assert_eq!(status(one.unlock(0, &twice).await), wrong, "once locked, twice named");
        assert_eq!(lock(&other, exclusive(0, 1)).await, NOT_GRANTED, "nothing was given back");
        assert_eq!(status(one.unlock(0, &[]).await), Some(Status::Invalid));
        // Shared locks of one owner stack.
        assert_eq!(lock(&one, shared(50, 10)).await, None);
        assert_eq!(unlock(&one, shared(50, 10)).await, None);
        assert_eq!(lock(&other, exclusive(50, 10)).await, NOT_GRANTED, "one of two is left");
        assert_eq!(unlock(&one, shared(50, 10)).await, None);
        assert_eq!(unlock(&one, shared(50, 10)).await, wrong);
        assert_eq!(status(one.unlock(0, &[range(10, 10), range(0, 10)]).await), None);
        assert_eq!(lock(&other, exclusive(0, 100)).await, None);
    });
}

/// There is no upgrade and no downgrade: what overlaps is in the way, one's own as well.
#[test]
fn lck_one_owners_own_locks_are_in_its_way() {
    let server = Deployment::start();
    run(async {
        let (_mine, one, _theirs, other) = two(&server).await;
        assert_eq!(lock(&one, exclusive(0, 10)).await, None);
        assert_eq!(lock(&one, exclusive(0, 10)).await, NOT_GRANTED, "the same twice");
        assert_eq!(lock(&one, shared(0, 10)).await, NOT_GRANTED, "weaker");
        assert_eq!(unlock(&one, exclusive(0, 10)).await, None);
        assert_eq!(lock(&one, shared(0, 10)).await, None);
        assert_eq!(lock(&one, exclusive(0, 10)).await, NOT_GRANTED, "stronger");
        assert_eq!(lock(&one, exclusive(5, 1)).await, NOT_GRANTED, "stronger, a part");
        assert_eq!(lock_by(&one, 9, exclusive(0, 10)).await, NOT_GRANTED, "another owner of this open");
        assert_eq!(lock(&other, shared(5, 10)).await, None);
        // A batch that contradicts itself is never granted, waiting or not.
        let wait = LockOptions { owner: 0, wait: Some(LONG) };
        let itself = other.lock(&[exclusive(100, 10), shared(109, 1)], wait).await;
        assert_eq!(status(itself), NOT_GRANTED);
        let many: Vec<_> = (0..65).map(|n| exclusive(1000 + n, 1)).collect();
        assert_eq!(status(one.lock(&many, LockOptions::default()).await), Some(Status::TooMany));
        assert_eq!(status(one.lock(&many[..64], LockOptions::default()).await), None);
        assert_eq!(status(one.lock(&[], LockOptions::default()).await), Some(Status::Invalid));
        // One conflict among many: none of them is held.
        let batch = [exclusive(200, 10), exclusive(5, 1), exclusive(300, 10)];
        assert_eq!(status(other.lock(&batch, LockOptions::default()).await), NOT_GRANTED);
        assert_eq!(lock(&one, exclusive(200, 200)).await, None);
        assert_eq!(server.gauges()["control.locks"], 1 + 1 + 64 + 1);
    });
}

/// A request that waits is granted by whatever ends the lock in its way.
#[test]
fn lck_07_who_waits_is_granted_when_the_lock_ends_however_it_ends() {
    let server = Deployment::start();
    run(async {
        let theirs = connect(&server).await;
        let other = open(&theirs, "file", &rw()).await;
        for end in ["unlock", "close", "drop", "logoff", "force", "no hold", "yield", "expiry"] {
            let mine = connect(&server).await;
            let options = match end {
                "no hold" => rw().hold(Duration::ZERO),
                "yield" => rw().class(HoldClass::Yield),
                "expiry" => rw().hold(Duration::from_millis(200)),
                _ => rw(),
            };
            let one = open(&mine, "file", &options).await;
            assert_eq!(lock(&one, exclusive(0, 10)).await, None, "{end}");
            let waits = wait_for_lock(&other, exclusive(5, 1), LONG);
            until_waiting(&server, 1);
            match end {
                "unlock" => assert_eq!(unlock(&one, exclusive(0, 10)).await, None),
                "close" => one.close().await.unwrap(),
                "drop" => drop(one),
                "logoff" => mine.logoff().await.unwrap(),
                "force" => drop(server.ok(&["opens", "--close", &one.id().to_string()])),
                _ => mine.detach().await,
            }
            assert_eq!(waits.await.unwrap(), None, "{end}");
            assert_eq!(unlock(&other, exclusive(5, 1)).await, None, "{end}");
        }
    });
}

/// The answers that end a wait without a lock; nothing of them is held afterwards, and the next in line is not held up.
#[test]
fn lck_07_who_waits_no_more_holds_nothing() {
    let server = Deployment::start();
    run(async {
        let (_mine, one, theirs, other) = two(&server).await;
        let third = open(&theirs, "file", &rw()).await;
        assert_eq!(lock(&one, exclusive(0, 10)).await, None);
        let waits = wait_for_lock(&other, exclusive(0, 10), Duration::from_millis(100));
        assert_eq!(waits.await.unwrap(), NOT_GRANTED, "its time is over");
        let waits = wait_for_lock(&other, exclusive(0, 10), LONG);
        until_waiting(&server, 1);
        other.cancel_locks(1);
        // What it does not want, nobody has to wait for.
        assert_eq!(lock(&third, exclusive(10, 5)).await, None);
        other.cancel_locks(0);
        assert_eq!(waits.await.unwrap(), Some(Status::Cancelled));
        let waits = wait_for_lock(&other, exclusive(0, 10), LONG);
        until_waiting(&server, 1);
        waits.abort();
        until_waiting(&server, 0);
        let waits = wait_for_lock(&other, exclusive(0, 10), LONG);
        until_waiting(&server, 1);
        other.close().await.unwrap();
        let ended = waits.await.unwrap();
        assert!(matches!(ended, Some(Status::Closed | Status::NotFound)), "{ended:?}");
        let last = open(&theirs, "file", &rw()).await;
        assert_eq!(unlock(&one, exclusive(0, 10)).await, None);
        assert_eq!(lock(&last, exclusive(0, 10)).await, None, "nobody else has it");
        // A cancel and an unlock at once: granted or cancelled, and what was told is true.
        last.close().await.unwrap();
        for round in 0..20 {
            let late = open(&theirs, "file", &rw()).await;
            assert_eq!(lock(&one, exclusive(0, 10)).await, None, "{round}");
            let waits = wait_for_lock(&late, exclusive(0, 10), LONG);
            until_waiting(&server, 1);
            late.cancel_locks(0);
            assert_eq!(unlock(&one, exclusive(0, 10)).await, None, "{round}");
            let free = match waits.await.unwrap() {
                None => NOT_GRANTED,
                Some(Status::Cancelled) => None,
                other => panic!("{round}: {other:?}"),
            };
            assert_eq!(lock(&one, exclusive(0, 10)).await, free, "{round}");
            late.close().await.unwrap();
            if free.is_none() {
                assert_eq!(unlock(&one, exclusive(0, 10)).await, None, "{round}");
            }
        }
    });
}

/// Two who wait for each other are not found out: their waits are bounded, and one that gives up lets the other in.
#[test]
fn lck_13_who_wait_for_each_other_are_let_go_by_their_time_or_a_cancel() {
    let server = Deployment::start();
    run(async {
        let (_mine, one, _theirs, other) = two(&server).await;
        assert_eq!((lock(&one, exclusive(0, 1)).await, lock(&other, exclusive(1, 1)).await), (None, None));
        let short = Duration::from_millis(300);
        let both =
            (wait_for_lock(&one, exclusive(1, 1), short), wait_for_lock(&other, exclusive(0, 1), short));
        assert_eq!((both.0.await.unwrap(), both.1.await.unwrap()), (NOT_GRANTED, NOT_GRANTED));
        let both = (wait_for_lock(&one, exclusive(1, 1), LONG), wait_for_lock(&other, exclusive(0, 1), LONG));
        until_waiting(&server, 2);
        one.cancel_locks(0);
        assert_eq!(both.0.await.unwrap(), Some(Status::Cancelled));
        assert_eq!(unlock(&one, exclusive(0, 1)).await, None);
        assert_eq!(both.1.await.unwrap(), None);
        // One that waits for itself.
        let wait = LockOptions { owner: 0, wait: Some(short) };
        assert_eq!(status(other.lock(&[exclusive(0, 1)], wait).await), NOT_GRANTED);
    });
}

/// Locks keep reads and writes away wherever the file ends, and restart of either plane lets nobody slip through.
#[test]
fn lck_01_locks_at_and_beyond_the_end_of_the_file() {
    let mut server = Deployment::start();
    std::fs::write(server.volume().join("file"), vec![1; 100]).unwrap();
    run(async {
        let (_mine, one, _theirs, other) = two(&server).await;
        let (a, b) = (bound(&one).await, bound(&other).await);
        assert_eq!(lock(&one, exclusive(90, 110)).await, None);
        for at in [90, 99, 100, 150, 199] {
            assert_eq!(status(read(&b, at, 10).await), CONFLICT, "read at {at}");
            assert_eq!(status(write(&b, at, 10).await), CONFLICT, "write at {at}");
        }
        assert_eq!(status(read(&b, 0, 91).await), CONFLICT, "one byte is enough");
        assert_eq!(status(read(&b, 0, 90).await), None);
        assert_eq!(read(&b, 200, 10).await.unwrap(), 0, "behind it: the end of the file");
        assert_eq!(read(&b, 95, 0).await.unwrap(), 0, "no byte, no conflict");
        assert_eq!(write(&b, 95, 0).await.unwrap(), 0);
        assert_eq!(std::fs::metadata(server.volume().join("file")).unwrap().len(), 100);
        assert_eq!(write(&b, 200, 10).await.unwrap(), 10, "behind it, and the file grows over it");
        assert_eq!(write(&a, 90, 110).await.unwrap(), 110, "the owner");
        b.flush().await.unwrap();
        for planes in [[true, false], [false, true], [true, true]] {
            server.kill(planes);
            server.await_planes();
            // Each has another beside it that may write: after a restart of control nobody knows what that did.
            for (binding, wanted) in [(&b, CONFLICT), (&a, None)] {
                let got = loop {
                    match write(binding, 95, 1).await {
                        Err(Error::Changed) => drop((one.accept_change(), other.accept_change())),
                        settled => break status(settled),
                    }
                };
                assert_eq!(got, wanted, "{planes:?}");
            }
        }
        assert_eq!(unlock(&one, exclusive(90, 110)).await, None);
        // To the very end, and shared: all may read, nobody may write.
        assert_eq!(lock(&one, shared(50, u64::MAX - 50)).await, None);
        assert_eq!(read(&b, 0, 500).await.unwrap(), 210);
        for binding in [&a, &b] {
            assert_eq!(status(write(binding, 49, 2).await), CONFLICT);
            assert_eq!(status(write(binding, 1 << 40, 1).await), CONFLICT);
            assert_eq!(write(binding, 0, 50).await.unwrap(), 50);
        }
    });
}

/// A change of size is a write of all between the old end and the new one.
#[test]
fn lck_11_a_change_of_size_obeys_locks() {
    let server = Deployment::start();
    let file = server.volume().join("file");
    let size = |size| Changes { size: Some(size), ..Changes::default() };
    run(async {
        let (mine, one, theirs, other) = two(&server).await;
        std::fs::write(&file, vec![1; 100]).unwrap();
        assert_eq!(lock(&one, exclusive(40, 10)).await, None);
        for to in [0, 45, 49] {
            assert_eq!(status(other.set_attributes(&size(to)).await), CONFLICT, "by an open, to {to}");
            assert_eq!(
                status(theirs.set_attributes(&place("file"), &size(to)).await),
                CONFLICT,
                "by name, to {to}"
            );
        }
        for disposition in [Disposition::Overwrite, Disposition::OverwriteOrCreate] {
            let overwrite = rw().disposition(disposition, 0o644);
            assert_eq!(tried(&theirs, "file", &overwrite).await, CONFLICT);
            assert_eq!(tried(&mine, "file", &overwrite).await, CONFLICT, "one's own other open");
        }
        assert_eq!(std::fs::read(&file).unwrap(), vec![1; 100]);
        // What touches no locked byte.
        for to in [200, 60, 50] {
            assert_eq!(
                status(theirs.set_attributes(&place("file"), &size(to)).await),
                None,
                "by name, to {to}"
            );
        }
        // By an open it is not known where the file ends: others' locks are in its way wherever they are.
        assert_eq!(status(other.set_attributes(&size(60)).await), CONFLICT);
        assert_eq!(status(one.set_attributes(&size(45)).await), None, "the owner");
        assert_eq!(unlock(&one, exclusive(40, 10)).await, None);
        // Beyond the end.
        assert_eq!(lock(&one, exclusive(1000, 10)).await, None);
        assert_eq!(status(other.set_attributes(&size(2000)).await), CONFLICT);
        assert_eq!(status(theirs.set_attributes(&place("file"), &size(1001)).await), CONFLICT);
        assert_eq!(std::fs::metadata(&file).unwrap().len(), 45);
        one.close().await.unwrap();
        // Its owner is away.
        let (key, _) = detached_with(&server, "file", &rw(), &[exclusive(0, 1000)]).await;
        let busy = Some(Status::Busy);
        assert_eq!(status(other.set_attributes(&size(0)).await), busy);
        assert_eq!(status(theirs.set_attributes(&place("file"), &size(0)).await), busy);
        assert_eq!(tried(&theirs, "file", &rw().disposition(Disposition::Overwrite, 0)).await, busy);
        assert_eq!(lock(&other, shared(0, 1)).await, busy);
        resume(&mine, &key).await.unwrap().open.close().await.unwrap();
        assert_eq!(status(other.set_attributes(&size(0)).await), None);
    });
}

/// An advisory volume: owners are processes, ranges are set, split and merged, and I/O is free.
#[test]
fn lck_posix_owners_set_split_and_merge() {
    let server = Deployment::with(&Wish {
        settings: &[("locks", "\"advisory\"")],
        principals: &[("other", "read-write")],
        ..Wish::default()
    });
    std::fs::write(server.volume().join("file"), vec![1; 100]).unwrap();
    run(async {
        let (mine, again, theirs) =
            (connect(&server).await, connect(&server).await, connect_as(&server, "other").await);
        let of = |process: u64| rw().process(ProcessId(process));
        let one = open(&mine, "file", &of(1)).await;
        let same = open(&again, "file", &of(1)).await;
        let two = open(&mine, "file", &of(2)).await;
        let foreign = open(&theirs, "file", &of(1)).await;
        assert_eq!(lock(&one, exclusive(0, 100)).await, None);
        assert_eq!(lock(&same, exclusive(0, 100)).await, None, "the same process through another open");
        assert_eq!(lock_by(&one, 1, exclusive(0, 1)).await, NOT_GRANTED, "another owner number");
        assert_eq!(lock(&two, shared(0, 1)).await, NOT_GRANTED, "another process");
        assert_eq!(
            lock(&foreign, shared(0, 1)).await,
            NOT_GRANTED,
            "another principal's process of that number"
        );
        assert_eq!(unlock(&same, exclusive(40, 20)).await, None, "a part");
        assert_eq!(lock(&two, exclusive(40, 20)).await, None);
        assert_eq!(lock(&two, exclusive(39, 1)).await, NOT_GRANTED);
        assert_eq!(lock(&two, exclusive(60, 1)).await, NOT_GRANTED);
        assert_eq!(lock(&one, shared(0, 40)).await, None, "downgraded");
        assert_eq!(lock(&two, shared(0, 10)).await, None);
        assert_eq!(lock(&one, exclusive(0, 40)).await, NOT_GRANTED, "no upgrade past another's");
        assert_eq!(lock(&one, exclusive(10, 30)).await, None, "where nobody else is");
        assert_eq!(unlock(&two, shared(0, 100)).await, None, "what is not locked can be unlocked");
        assert_eq!(unlock(&two, exclusive(0, 100)).await, None);
        for item in [exclusive(10, 0), shared(0, 0)] {
            assert_eq!(lock(&one, item).await, Some(Status::BadRange));
        }
        // Locks count against locks only.
        let io = bound(&two).await;
        assert_eq!(write(&io, 0, 100).await.unwrap(), 100);
        let shorter = Changes { size: Some(10), ..Changes::default() };
        assert_eq!(status(two.set_attributes(&shorter).await), None);
        assert_eq!(
            tried(&mine, "file", &OpenOptions::read_write().disposition(Disposition::Overwrite, 0)).await,
            None
        );
        // With the last open of a process go its locks.
        one.close().await.unwrap();
        same.close().await.unwrap();
        assert_eq!(lock(&foreign, exclusive(0, u64::MAX)).await, None);
        assert_eq!(unlock(&foreign, exclusive(50, 1)).await, None);
        assert_eq!(server.gauges()["control.locks"], 2, "split in two");
        assert_eq!(lock(&foreign, exclusive(50, 1)).await, None);
        assert_eq!(server.gauges()["control.locks"], 1, "and one again");
    });
}
