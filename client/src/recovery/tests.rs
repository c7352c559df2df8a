//! Recovery against scripted servers: what is asked after a loss, in which order, and what the application is told.

mod data;
mod locks;
mod stripes;

use crate::scripted::{Control, Peer, SOON, file};
use crate::{Config, Error, Event, GoneReason, Open, OpenId, OpenOptions, Recovery, ResumeOptions, Session};
use crate::{Status, Verdict};
use holdfast_shared::wire::control::{Gone, Reply, Request};
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

const OPEN: OpenId = OpenId([8; 16]);

/// A session with one open, and the server's end of it.
async fn opened(config: impl FnOnce(&mut Config)) -> (Control, Peer, Session, Open) {
    let mut control = Control::start().await;
    let mut wanted = control.config();
    config(&mut wanted);
    let (session, mut peer) = tokio::join!(Session::connect(&wanted), control.accept());
    let session = session.unwrap();
    let options = OpenOptions::read_write();
    let place = file();
    let (open, _) = tokio::join!(session.open(&place, &options), peer.open(OPEN));
    (control, peer, session, open.unwrap())
}

/// Loses the connection; the open is resumed on the next with this verdict.
async fn lose(control: &mut Control, peer: Peer, verdict: Verdict) -> Peer {
    drop(peer);
    let mut peer = control.accept().await;
    let (id, _) = peer.resume().await;
    peer.resumed(id, OPEN, verdict, &[]).await;
    peer
}

#[tokio::test]
async fn rsm_01_a_lost_session_comes_back_with_its_opens() {
    let (mut control, mut peer, session, open) = opened(|_| ()).await;
    let (mut events, first, key) = (open.events(), session.id(), open.bind_secret());
    let asking = tokio::spawn({
        let open = open.clone();
        async move { open.query_key().await }
    });
    let asked = peer.next().await.unwrap();
    assert!(matches!(asked.request, Request::QueryKey(id) if id == OPEN));
    drop(peer);
    let mut peer = control.accept().await;
    let (id, resume) = peer.resume().await;
    assert_eq!((resume.resume_key, resume.supersede), (vec![1], Some(first)), "its own last session");
    assert!(!asking.is_finished(), "nothing is asked of an open before it is resumed");
    peer.resumed(id, OPEN, Verdict::Unchanged, &[]).await;
    // What was under way goes again.
    let again = peer.keys(None);
    tokio::select! { _ = again => panic!("something else was asked"), key = asking => drop(key.unwrap().unwrap()) };
    assert_eq!(events.next().await, Some(Event::Resumed { verdict: Verdict::Unchanged, locks_kept: true }));
    assert_eq!((session.id(), open.epoch(), open.resume_key()), (peer.session, 2, vec![2]));
    assert_eq!(open.bind_secret(), peer.key.bind_secret(OPEN), "the secret is the new session's");
    assert_ne!(open.bind_secret(), key);
}

#[tokio::test]
async fn rsm_06_changed_stops_everything_until_it_is_accepted() {
    let (mut control, peer, _session, open) = opened(|_| ()).await;
    let mut events = open.events();
    let mut peer = lose(&mut control, peer, Verdict::Changed).await;
    let event = timeout(SOON, events.next()).await.unwrap();
    assert_eq!(event, Some(Event::Resumed { verdict: Verdict::Changed, locks_kept: true }));
    assert!(matches!(open.lock(&[], crate::LockOptions::default()).await, Err(Error::Changed)));
    let cut = crate::Changes { size: Some(0), ..Default::default() };
    assert!(matches!(open.set_attributes(&cut).await, Err(Error::Changed)));
    assert!(open.accept_change() && !open.accept_change());
    let (locked, ()) = tokio::join!(open.lock(&[], crate::LockOptions::default()), async {
        let asked = peer.next().await.unwrap();
        assert!(matches!(asked.request, Request::Lock(_)), "the first since: {:?}", asked.request);
        peer.give(asked.id, Reply::Done).await;
    });
    locked.unwrap();
}

#[tokio::test]
async fn a_gone_open_says_why_and_stays_gone() {
    let (mut control, peer, session, open) = opened(|_| ()).await;
    let mut events = open.events();
    drop(peer);
    let mut peer = control.accept().await;
    let (id, _) = peer.resume().await;
    peer.give(id, Reply::Gone(Gone { reason: GoneReason::Evicted, changed: true })).await;
    let event = timeout(SOON, events.next()).await.unwrap();
    assert_eq!(event, Some(Event::Gone { reason: GoneReason::Evicted, changed: true }));
    for _ in 0..2 {
        let error = open.query_key().await.unwrap_err();
        assert!(matches!(error, Error::Gone { reason: GoneReason::Evicted, changed: true }), "{error}");
    }
    assert!(matches!(open.close().await, Err(Error::Gone { .. })));
    drop(open);
    // The session is well, and does not ask for the open any more.
    let (ping, ()) = tokio::join!(session.ping(), async {
        let asked = peer.next().await.unwrap();
        assert!(matches!(asked.request, Request::Ping), "{:?}", asked.request);
        peer.give(asked.id, Reply::Done).await;
    });
    ping.unwrap();
}

#[tokio::test]
async fn a_force_closed_open_asks_its_tombstone() {
    let (_control, mut peer, _session, open) = opened(|_| ()).await;
    let (error, ()) = tokio::join!(open.query_key(), async {
        let asked = peer.next().await.unwrap();
        peer.refuse(asked.id, Status::ForceClosed).await;
        let (id, _) = peer.resume().await;
        peer.give(id, Reply::Gone(Gone { reason: GoneReason::ForceClosed, changed: false })).await;
    });
    assert!(matches!(error, Err(Error::Gone { reason: GoneReason::ForceClosed, changed: false })));
}

#[tokio::test]
async fn opn_06_an_open_whose_answer_was_lost_is_the_same_open() {
    let mut control = Control::start().await;
    let config = control.config();
    let (session, mut peer) = tokio::join!(Session::connect(&config), control.accept());
    let session = session.unwrap();
    let opening = tokio::spawn({
        let session = session.clone();
        async move { session.open(&file(), &OpenOptions::create_new(0o600)).await }
    });
    let asked = peer.next().await.unwrap();
    drop(peer);
    let mut peer = control.accept().await;
    let again = peer.open(OPEN).await;
    assert!(matches!(asked.request, Request::Open(first) if first == again), "the create id and all else");
    let open = opening.await.unwrap().unwrap();
    assert_eq!(open.bind_secret(), peer.key.bind_secret(OPEN));
}

#[tokio::test]
async fn what_must_not_be_done_twice_has_an_unknown_fate() {
    let (mut control, mut peer, session, _open) = opened(|_| ()).await;
    let place = file();
    let (removed, ()) = tokio::join!(session.remove(&place), async {
        peer.next().await.unwrap();
        lose(&mut control, peer, Verdict::Unchanged).await;
    });
    assert!(matches!(removed, Err(Error::FateUnknown { what: "remove" })), "{removed:?}");
}

#[tokio::test]
async fn soft_gives_up_and_goes_on_when_the_server_is_back() {
    let soft = |config: &mut Config| (config.recovery, config.soft_ms) = (Recovery::Soft, 150);
    let (mut control, peer, session, open) = opened(soft).await;
    control.away();
    drop(peer);
    let start = Instant::now();
    let (a, b) = tokio::join!(session.ping(), open.query_key());
    assert!(matches!(a, Err(Error::TimedOut { .. })) && matches!(b, Err(Error::TimedOut { .. })));
    assert!(start.elapsed() >= Duration::from_millis(150), "{:?}", start.elapsed());
    control.back().await;
    let mut peer = control.accept().await;
    let (id, _) = peer.resume().await;
    peer.resumed(id, OPEN, Verdict::ExpiredUnchanged, &[]).await;
    let answering = peer.keys(None);
    tokio::select! { _ = answering => panic!("something else was asked"), key = open.query_key() => drop(key.unwrap()) };
}

#[tokio::test]
async fn hard_waits_for_as_long_as_it_takes() {
    let (mut control, peer, session, _open) = opened(|config| config.connect_ms_max = 100).await;
    control.away();
    drop(peer);
    let ping = tokio::spawn(async move { session.ping().await });
    sleep(Duration::from_millis(700)).await;
    assert!(!ping.is_finished(), "longer than a connection may take");
    control.back().await;
    let mut peer = control.accept().await;
    loop {
        let asked = peer.next().await.unwrap();
        match asked.request {
            Request::Resume(_) => peer.resumed(asked.id, OPEN, Verdict::Unchanged, &[]).await,
            Request::Ping => break peer.give(asked.id, Reply::Done).await,
            other => panic!("{other:?}"),
        }
    }
    ping.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_refusal_that_time_does_not_heal_ends_the_open_at_once() {
    let (mut control, peer, session, open) = opened(|_| ()).await;
    let mut events = open.events();
    drop(peer);
    let mut peer = control.accept().await;
    // First one that time does heal.
    let (id, _) = peer.resume().await;
    peer.refuse(id, Status::Unavailable).await;
    let (id, _) = peer.resume().await;
    peer.refuse(id, Status::BadKey).await;
    assert!(
        matches!(timeout(SOON, events.next()).await.unwrap(), Some(Event::Refused(r)) if r.status == Status::BadKey)
    );
    assert_eq!(open.query_key().await.unwrap_err().status(), Some(Status::BadKey));
    drop(session);
}

#[tokio::test]
async fn rsm_14_only_sessions_that_may_have_it_are_superseded() {
    let (mut control, peer, session, open) = opened(|_| ()).await;
    let first = session.id();
    drop(peer);
    // The second session asks, and is lost before the answer: now either may have the open.
    let mut second = control.accept().await;
    second.resume().await;
    let lost = second.session;
    drop(second);
    let mut third = control.accept().await;
    let (id, resume) = third.resume().await;
    assert_eq!(resume.supersede, Some(lost), "the last that asked");
    third.refuse(id, Status::Busy).await;
    let (id, resume) = third.resume().await;
    assert_eq!(resume.supersede, Some(first));
    third.resumed(id, OPEN, Verdict::Unchanged, &[]).await;
    let answering = third.keys(None);
    tokio::select! { _ = answering => panic!("something else was asked"), key = open.query_key() => drop(key.unwrap()) };
}

#[tokio::test]
async fn an_application_resumes_with_a_key_it_kept() {
    let mut control = Control::start().await;
    let config = control.config();
    let (session, mut peer) = tokio::join!(Session::connect(&config), control.accept());
    let session = session.unwrap();
    let (old, kept) = (crate::SessionId([77; 16]), crate::HandleId([66; 16]));
    let options = ResumeOptions::default().supersede(old).keep([kept]);
    let (resumed, ()) = tokio::join!(session.resume(b"key", &options), async {
        let (id, resume) = peer.resume().await;
        assert_eq!(
            (resume.resume_key, resume.supersede, resume.keep),
            (b"key".to_vec(), Some(old), vec![kept])
        );
        peer.resumed(id, OPEN, Verdict::Changed, &[kept]).await;
    });
    let resumed = resumed.unwrap();
    assert_eq!((resumed.verdict, resumed.kept, resumed.open.id()), (Verdict::Changed, vec![kept], OPEN));
    assert!(matches!(resumed.open.lock(&[], crate::LockOptions::default()).await, Err(Error::Changed)));
    let options = ResumeOptions::default();
    let (gone, ()) = tokio::join!(session.resume(b"other", &options), async {
        let (id, _) = peer.resume().await;
        peer.give(id, Reply::Gone(Gone { reason: GoneReason::FileLost, changed: true })).await;
    });
    assert!(matches!(gone, Err(Error::Gone { reason: GoneReason::FileLost, changed: true })));
}

#[tokio::test]
async fn an_open_dropped_while_the_server_is_away_is_closed_when_it_is_back() {
    let (mut control, peer, session, open) = opened(|_| ()).await;
    control.away();
    drop(peer);
    while session.inner.phase.borrow().is_up() {
        sleep(Duration::from_millis(1)).await;
    }
    drop(open);
    control.back().await;
    let mut peer = control.accept().await;
    let asked = peer.next().await.unwrap();
    assert!(matches!(asked.request, Request::Close(OPEN)), "{:?}", asked.request);
    peer.refuse(asked.id, Status::NotFound).await;
    let (id, resume) = peer.resume().await;
    assert_eq!(resume.resume_key, [1]);
    peer.resumed_unheard(id, OPEN, Verdict::Unchanged, &[]).await;
    let asked = peer.next().await.unwrap();
    assert!(matches!(asked.request, Request::Close(OPEN)), "{:?}", asked.request);
}

#[tokio::test]
async fn a_close_whose_answer_was_lost_is_done() {
    let (mut control, mut peer, _session, open) = opened(|_| ()).await;
    let (closed, ()) = tokio::join!(open.close(), async {
        assert!(matches!(peer.next().await.unwrap().request, Request::Close(OPEN)));
        drop(peer);
        let mut peer = control.accept().await;
        let (id, _) = peer.resume().await;
        peer.refuse(id, Status::BadKey).await;
    });
    closed.unwrap();
}

#[tokio::test]
async fn dropping_everything_ends_every_task() {
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let (mut control, peer, session, open) = opened(|_| ()).await;
    control.away();
    drop(peer);
    let waiting = tokio::spawn({
        let open = open.clone();
        async move { open.query_key().await }
    });
    sleep(Duration::from_millis(100)).await;
    assert!(tasks() > before, "it tries to connect");
    waiting.abort();
    drop((session, open));
    let none = async {
        while tasks() > before {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, none).await.expect("a task is left");
}

#[tokio::test]
async fn a_session_left_on_purpose_closes_nothing_and_comes_back_never() {
    let (mut control, mut peer, session, open) = opened(|_| ()).await;
    let key = open.resume_key();
    let (_, asked) = tokio::join!(session.detach(), peer.next());
    assert!(asked.is_none(), "{asked:?}");
    assert!(matches!(open.query_key().await, Err(Error::Ended { .. })));
    drop(open);
    assert_eq!(key, [1]);
    assert!(timeout(Duration::from_millis(200), control.accept()).await.is_err());
}

#[tokio::test]
async fn logging_off_says_so() {
    let (_control, mut peer, session, open) = opened(|_| ()).await;
    let (done, ()) = tokio::join!(session.logoff(), async {
        let asked = peer.next().await.unwrap();
        assert!(matches!(asked.request, Request::Logoff), "{:?}", asked.request);
        peer.give(asked.id, Reply::Done).await;
        assert!(peer.next().await.is_none());
    });
    done.unwrap();
    assert!(matches!(open.query_key().await, Err(Error::Ended { .. })));
}
