//! Locks across a loss.

use super::*;
use crate::{LockItem, LockKind, LockOptions, LockRange};
use holdfast_shared::wire::control::RequestMessage;

fn item() -> LockItem {
    LockItem { range: LockRange::new(0, 10).unwrap(), kind: LockKind::Exclusive }
}

fn sequence(asked: &RequestMessage) -> u64 {
    match &asked.request {
        Request::Lock(lock) => lock.sequence,
        Request::Unlock(unlock) => unlock.sequence,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_lock_whose_answer_was_lost_is_asked_by_the_same_number() {
    let (mut control, mut peer, _session, open) = opened(|_| ()).await;
    let locks = [item()];
    let (locked, mut peer) = tokio::join!(open.lock(&locks, LockOptions { owner: 7, wait: None }), async {
        let first = peer.next().await.unwrap();
        let mut peer = lose(&mut control, peer, Verdict::Unchanged).await;
        let again = peer.next().await.unwrap();
        assert_eq!((first.request, sequence(&again)), (again.request.clone(), 1));
        peer.give(again.id, Reply::Done).await;
        peer
    });
    locked.unwrap();
    let ranges = [locks[0].range];
    let (unlocked, ()) = tokio::join!(open.unlock(7, &ranges), async {
        let asked = peer.next().await.unwrap();
        assert_eq!(sequence(&asked), 2);
        peer.give(asked.id, Reply::Done).await;
    });
    unlocked.unwrap();
}

#[tokio::test]
async fn a_lock_under_way_is_settled_by_its_number_though_the_file_was_changed() {
    let (mut control, mut peer, _session, open) = opened(|_| ()).await;
    let locks = [item()];
    let (locked, _) = tokio::join!(open.lock(&locks, LockOptions::default()), async {
        peer.next().await.unwrap();
        let mut peer = lose(&mut control, peer, Verdict::Changed).await;
        let again = peer.next().await.unwrap();
        assert!(
            matches!(&again.request, Request::Lock(lock) if lock.sequence == 1 && lock.wait_ms.is_none())
        );
        let refused = holdfast_shared::wire::control::Refusal {
            status: Status::LockNotGranted,
            detail: String::new(),
            retry_ms: None,
        };
        peer.give(again.id, Reply::Refused(refused)).await;
        peer
    });
    assert!(matches!(locked, Err(Error::Changed)), "{locked:?}");
}

#[tokio::test]
async fn a_lock_that_was_granted_is_held_though_the_file_was_changed() {
    let (mut control, mut peer, _session, open) = opened(|_| ()).await;
    let locks = [item()];
    let (locked, _peer) = tokio::join!(open.lock(&locks, LockOptions::default()), async {
        peer.next().await.unwrap();
        let mut peer = lose(&mut control, peer, Verdict::Changed).await;
        let again = peer.next().await.unwrap();
        assert_eq!(sequence(&again), 1);
        peer.give(again.id, Reply::Done).await;
        peer
    });
    locked.unwrap();
    assert!(
        matches!(open.lock(&locks, LockOptions::default()).await, Err(Error::Changed)),
        "no other is asked"
    );
}

#[tokio::test]
async fn a_lock_refused_after_a_change_that_was_accepted_is_asked_anew() {
    let (mut control, mut peer, _session, open) = opened(|_| ()).await;
    let locks = [item()];
    let options = LockOptions { owner: 7, wait: Some(SOON) };
    let (locked, _peer) = tokio::join!(open.lock(&locks, options), async {
        peer.next().await.unwrap();
        let mut peer = lose(&mut control, peer, Verdict::Changed).await;
        let again = peer.next().await.unwrap();
        assert!(open.accept_change());
        peer.refuse(again.id, Status::LockNotGranted).await;
        let anew = peer.next().await.unwrap();
        assert!(
            matches!(&anew.request, Request::Lock(lock) if lock.sequence == 2 && lock.wait_ms.is_some()),
            "{anew:?}"
        );
        peer.give(anew.id, Reply::Done).await;
        peer
    });
    locked.unwrap();
}

#[tokio::test]
async fn lck_07_a_waiting_lock_is_taken_back_by_dropping_or_by_name() {
    let (_control, mut peer, _session, open) = opened(|_| ()).await;
    let options = LockOptions { owner: 7, wait: Some(SOON) };
    let waiting = tokio::spawn({
        let open = open.clone();
        async move { open.lock(&[item()], options).await }
    });
    let lock = peer.next().await.unwrap();
    assert!(matches!(&lock.request, Request::Lock(lock) if lock.wait_ms.is_some_and(|ms| ms > 5_000)));
    open.cancel_locks(8);
    open.cancel_locks(7);
    let asked = peer.next().await.unwrap();
    assert!(
        matches!(asked.request, Request::CancelLock(cancel) if cancel.sequence == 1),
        "{:?}",
        asked.request
    );
    peer.refuse(lock.id, Status::Cancelled).await;
    assert_eq!(waiting.await.unwrap().unwrap_err().status(), Some(Status::Cancelled));
    let dropped = timeout(Duration::from_millis(50), open.lock(&[item()], options)).await;
    assert!(dropped.is_err());
    assert_eq!(sequence(&peer.next().await.unwrap()), 2);
    let asked = peer.next().await.unwrap();
    assert!(
        matches!(asked.request, Request::CancelLock(cancel) if cancel.sequence == 2),
        "{:?}",
        asked.request
    );
}

#[tokio::test]
async fn a_lock_that_waits_long_gets_a_number_that_is_remembered() {
    let (_control, mut peer, _session, open) = opened(|_| ()).await;
    let waiting = tokio::spawn({
        let open = open.clone();
        async move { open.lock(&[item()], LockOptions { owner: 7, wait: Some(SOON) }).await }
    });
    let first = peer.next().await.unwrap();
    assert_eq!(sequence(&first), 1);
    let busy = tokio::spawn(async move {
        for _ in 0..40 {
            open.unlock(9, &[]).await?;
        }
        Ok::<_, Error>(())
    });
    let (mut highest, mut waits) = (1, first);
    let mut unlocks = 0;
    while unlocks < 40 || sequence(&waits) == 1 {
        let asked = peer.next().await.unwrap();
        match &asked.request {
            Request::CancelLock(cancel) => {
                assert_eq!(cancel.sequence, sequence(&waits));
                peer.refuse(waits.id, Status::Cancelled).await;
            }
            Request::Lock(_) => waits = asked,
            _ => {
                unlocks += 1;
                highest = highest.max(sequence(&asked));
                assert!(
                    sequence(&waits) + 32 > highest,
                    "{} is not remembered at {highest}",
                    sequence(&waits)
                );
                peer.give(asked.id, Reply::Done).await;
            }
        }
    }
    peer.give(waits.id, Reply::Done).await;
    busy.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
    assert!(sequence(&waits) > 1 && highest > 40);
}
