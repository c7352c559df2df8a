//! Resume, keys and fences against the real server: who gets in, who does not, and that nothing old lands afterwards.

use crate::common::load::{Load, Plan};
use crate::common::raw::{Claim, Raw};
use crate::common::{Deployment, Wish, cut, transport_of, transports};
use holdfast_client::{
    Access, Config, Disposition, Error, Event, KeyGrant, LockItem, LockKind, LockOptions, LockRange, Open,
    OpenId, OpenOptions, Place, Region, ResumeOptions, Session, SessionId, ShareMode, Status, Verdict,
};
use holdfast_shared::auth::BindSecret;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

fn place(path: &str) -> Place {
    Place { volume: "data".into(), path: path.into() }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn connect(server: &Deployment) -> Session {
    Session::connect(&Config::load(&server.config()).unwrap()).await.unwrap()
}

async fn new_file(session: &Session, name: &str, share: ShareMode) -> Open {
    let options = OpenOptions::read_write().disposition(Disposition::OpenOrCreate, 0o644).share(share);
    session.open(&place(name), &options).await.unwrap()
}

fn exclusive(offset: u64, length: u64) -> [LockItem; 1] {
    [LockItem { range: LockRange::new(offset, length).unwrap(), kind: LockKind::Exclusive }]
}

fn status<T>(result: Result<T, Error>) -> Option<Status> {
    result.err().map(|error| error.status().unwrap_or_else(|| panic!("{error:?}")))
}

/// An open as the operator sees it.
fn seen(server: &Deployment, open: OpenId) -> serde_json::Value {
    serde_json::from_str(&server.ok(&["opens", "--json", &open.to_string()])).unwrap()
}

fn until_detached(server: &Deployment, open: OpenId) {
    let start = Instant::now();
    while seen(server, open)["state"] != "detached" {
        assert!(start.elapsed() < crate::common::DEADLINE, "never detached");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A bind by hand; `None` if it was taken.
fn refusal(kind: &str, grant: &KeyGrant, secret: &BindSecret) -> Option<Status> {
    let mut raw = Raw::connect(kind, grant);
    let claim = raw.claim(grant, secret);
    raw.bind(&claim).0.err()
}

/// A write of the lost incarnation is under way, its client still has its channel and its memory, and still nothing of it
/// lands once the open was resumed elsewhere.
#[test]
fn rsm_17_nothing_of_the_lost_incarnation_lands_after_the_resume() {
    for kind in transports() {
        let server = Deployment::start();
        let plan = Plan { lockers: 0, readers: 0, writers: 6, rest_us: 0, ..Plan::new(&server, kind, 1, 5) };
        let mut load = Load::start(plan);
        load.goes_on(500);
        load.freeze();
        let key = load.key(&load.plan.file());
        let opens: Vec<serde_json::Value> =
            serde_json::from_str(&server.ok(&["opens", "--json", "--state", "active"])).unwrap();
        let had = opens.iter().find(|open| open["path"] == load.plan.file()).unwrap();
        let session = u128::from_str_radix(had["session"].as_str().unwrap(), 16).unwrap();
        let session = SessionId(session.to_be_bytes());
        runtime().block_on(async {
            let mine = connect(&server).await;
            let busy = mine.resume(&key, &ResumeOptions::default()).await;
            assert_eq!(status(busy), Some(Status::Busy), "{kind}: the other session is live");
            let resumed = mine.resume(&key, &ResumeOptions::default().supersede(session)).await.unwrap();
            assert!(resumed.locks_kept && resumed.kept.is_empty());
            // What the old client had under way has landed, or never will.
            let file = || std::fs::read(server.volume().join(load.plan.file())).unwrap();
            let before = file();
            load.check_file(&server);
            load.thaw();
            for _ in 0..30 {
                tokio::time::sleep(Duration::from_millis(50)).await;
                assert!(file() == before, "{kind}: a write of the old incarnation landed");
            }
            let binding =
                resumed.open.bind(&resumed.open.connect(transport_of(kind)).await.unwrap()).await.unwrap();
            assert_eq!(binding.read_vec(0, before.len()).await.unwrap(), before);
            load.kill();
            resumed.open.close().await.unwrap();
        });
    }
}

/// The control connection is lost, and nobody resumes: bindings go on for the linger time, and no longer.
#[test]
fn rsm_18_a_bindings_outlive_their_session_for_the_linger_time_alone() {
    const LINGER: Duration = Duration::from_secs(3);
    let server = Deployment::with(&Wish { settings: &[("linger_ms", "3000")], ..Wish::default() });
    for kind in transports() {
        runtime().block_on(async {
            // A machine that was busy for all of that time has seen nothing.
            while !lingers(&server, kind, LINGER).await {}
        });
    }
}

/// One round; false if nobody looked in time.
async fn lingers(server: &Deployment, kind: &str, linger: Duration) -> bool {
    let session = connect(server).await;
    let open = new_file(&session, "lingers", ShareMode::ALL).await;
    let (grant, secret, key) = (open.grant(), open.bind_secret(), open.resume_key());
    let mut raw = Raw::connect(kind, &grant);
    let claim = raw.claim(&grant, &secret);
    let bound = raw.bind(&Claim { access: open.access(), ..claim }).0.unwrap();
    let region = raw.region();
    let lost = Instant::now();
    session.detach().await;
    server.until("the session is lost", |g| g["control.sessions"] == 0);
    let mut served = 0;
    let fenced = loop {
        raw.read(&bound, 0, 10, region);
        let reply = raw.outcome();
        if reply != Status::Ok {
            break reply;
        }
        served += 1;
        assert!(lost.elapsed() < crate::common::DEADLINE, "{kind}: never fenced");
        std::thread::sleep(Duration::from_millis(20));
    };
    let after = lost.elapsed();
    assert!(matches!(fenced, Status::Fenced | Status::SessionGone), "{kind}: {fenced:?}");
    assert!(after >= linger, "{kind}: fenced too early, after {after:?}");
    server.until("no binding is left", |g| g["control.bindings"] == 0);
    let session = connect(server).await;
    let resumed = session.resume(&key, &ResumeOptions::default()).await.unwrap();
    assert_eq!(resumed.verdict, Verdict::Unchanged);
    resumed.open.close().await.unwrap();
    session.close().await;
    served > 0
}

/// The data connection alone is lost: the open never leaves its session, and the client binds again.
#[test]
fn rsm_18_b_a_lost_channel_detaches_nothing() {
    let server = Deployment::start();
    runtime().block_on(async {
        let session = connect(&server).await;
        let open = new_file(&session, "stays", ShareMode::NONE).await;
        let channel = open.connect(transport_of("tcp")).await.unwrap();
        let region = Region::allocate(4096).unwrap();
        let writer = open.bind(&channel).await.unwrap();
        writer.write_all(&region, 0..4096, 0).await.unwrap();
        writer.unbind().await.unwrap();
        let binding = open.bind_with_access(&channel, Access::READ).await.unwrap();
        let (epoch, before) = (open.epoch(), session.id());
        for _ in 0..5 {
            assert_eq!(cut(std::process::id(), server.port() + 1), 1);
            assert_eq!(binding.read_at(&region, 0..4096, 0).await.unwrap(), 4096);
            assert_eq!(seen(&server, open.id())["state"], "active");
        }
        assert_eq!((open.epoch(), session.id()), (epoch, before));
        // With a write under way that is not answered, the client has its channel fenced, by a resume.
        let mut events = open.events();
        let writer = open.bind(&open.connect(transport_of("tcp")).await.unwrap()).await.unwrap();
        crate::common::freeze(server.dataplane_pid);
        let flying = writer.submit_write(&region, 0..4096, 0).await.unwrap();
        cut(std::process::id(), server.port() + 1);
        crate::common::thaw(server.dataplane_pid);
        assert_eq!(flying.await.unwrap(), 4096);
        let told = tokio::time::timeout(crate::common::DEADLINE, events.next()).await.unwrap();
        let expected = Some(Event::Resumed { verdict: Verdict::Unchanged, locks_kept: true });
        assert_eq!(told, expected);
        open.close().await.unwrap();
    });
}

/// The data plane is started again: nothing that was good there is any more, and a new bind with a new proof is.
#[test]
fn rsm_18_c_and_key_02_binds_are_good_once_and_nowhere_else() {
    for kind in transports() {
        let mut server = Deployment::start();
        runtime().block_on(async {
            let session = connect(&server).await;
            let open = new_file(&session, "file", ShareMode::ALL).await;
            let (old, secret) = (open.grant(), open.bind_secret());
            let mut first = Raw::connect(kind, &old);
            let claim = first.claim(&old, &secret);
            let bound = first.bind(&claim).0.unwrap();
            let (identity, region) = (first.identity(), first.region());
            let replayed = Claim { identity: Some(&identity), ..claim };
            let refused = |raw: &mut Raw, when: &str| {
                assert_eq!(raw.bind(&replayed).0.err(), Some(Status::BadKey), "{kind}: {when}");
            };
            refused(&mut first, "on the same channel");
            refused(&mut Raw::connect(kind, &old), "on another channel, perhaps of another worker");
            server.kill_control();
            server.await_planes();
            refused(&mut Raw::connect(kind, &old), "after control was started again");
            first.read(&bound, 0, 10, region);
            // The session resumes its opens meanwhile, and this binding is none of those that it knows.
            let outcome = first.outcome();
            assert!(
                matches!(outcome, Status::Ok | Status::Fenced),
                "{kind}: control alone was killed: {outcome:?}"
            );
            server.kill_dataplane();
            server.await_planes();
            first.end();
            let now = open.query_key().await.unwrap();
            refused(&mut Raw::connect(kind, &now), "after the data plane was started again");
            assert_eq!(refusal(kind, &now, &open.bind_secret()), None, "{kind}: an honest bind");
            open.close().await.unwrap();
        });
    }
}

/// From the answer to a close on, its key opens nothing: not on any channel, not by a resume, not after restarts.
#[test]
fn key_07_a_closed_opens_key_is_dead_at_once() {
    for kind in transports() {
        let mut server = Deployment::start();
        runtime().block_on(async {
            let session = connect(&server).await;
            let open = new_file(&session, "file", ShareMode::ALL).await;
            let (grant, secret, key) = (open.grant(), open.bind_secret(), open.resume_key());
            let mut live = Raw::connect(kind, &grant);
            let claim = live.claim(&grant, &secret);
            let bound = live.bind(&claim).0.unwrap();
            let region = live.region();
            open.close().await.unwrap();
            live.read(&bound, 0, 10, region);
            assert_ne!(live.outcome(), Status::Ok, "{kind}: a handle outlived its open");
            // More channels than workers: whichever has one, it does not know the key any more.
            for _ in 0..6 {
                assert_eq!(refusal(kind, &grant, &secret), Some(Status::BadKey), "{kind}");
            }
            let dead = session.resume(&key, &ResumeOptions::default()).await;
            assert_eq!(status(dead), Some(Status::BadKey), "{kind}");
            server.kill_both();
            server.await_planes();
            let dead = session.resume(&key, &ResumeOptions::default()).await;
            assert_eq!(status(dead), Some(Status::BadKey), "{kind}: after both planes were started again");
            session.close().await;
        });
    }
}

/// Both planes die while a client that has a file and a lock for itself is away. Another one asks for both all the time,
/// from the first moment that anybody is let in, and gets neither.
#[test]
fn crs_01_after_a_crash_of_both_nobody_gets_in_before_the_owner() {
    let mut server = Deployment::start();
    runtime().block_on(async {
        let owner = connect(&server).await;
        let alone = new_file(&owner, "alone", ShareMode::NONE).await;
        let shared = new_file(&owner, "shared", ShareMode::ALL).await;
        let (range, once) = (exclusive(100, 50), LockOptions::default());
        shared.lock(&range, once).await.unwrap();
        let keys = [alone.resume_key(), shared.resume_key()];
        let ids = [alone.id(), shared.id()];
        owner.detach().await;
        ids.iter().for_each(|id| until_detached(&server, *id));

        let config = Config::load(&server.config()).unwrap();
        let (stop, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let intruder = tokio::spawn({
            let (stop, refused) = (Arc::clone(&stop), Arc::clone(&refused));
            async move {
                let mut granted = Vec::new();
                let session = Session::connect(&config).await.unwrap();
                while !stop.load(SeqCst) {
                    match session.open(&place("alone"), &OpenOptions::read()).await {
                        Ok(_) => granted.push("the open".to_owned()),
                        Err(error)
                            if matches!(error.status(), Some(Status::Busy | Status::ShareConflict)) =>
                        {
                            refused.fetch_add(1, SeqCst);
                        }
                        Err(error) => granted.push(format!("neither a file nor a refusal: {error:?}")),
                    }
                    let other = session.open(&place("shared"), &OpenOptions::read_write()).await.unwrap();
                    match other.lock(&range, once).await {
                        Ok(()) => granted.push("the lock".to_owned()),
                        Err(error)
                            if matches!(error.status(), Some(Status::Busy | Status::LockNotGranted)) =>
                        {
                            refused.fetch_add(1, SeqCst);
                        }
                        Err(error) => granted.push(format!("neither a lock nor a refusal: {error:?}")),
                    }
                    other.close().await.unwrap();
                }
                session.close().await;
                granted
            }
        });
        let more = async |refusals: u64| {
            let (start, enough) = (Instant::now(), refused.load(SeqCst) + refusals);
            while refused.load(SeqCst) < enough && !intruder.is_finished() {
                assert!(start.elapsed() < crate::common::DEADLINE, "the other client is refused no more");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        more(10).await;
        for _ in 0..2 {
            server.kill_both();
            server.await_planes();
            more(20).await;
        }
        let owner = connect(&server).await;
        let resumed = owner.resume(&keys[0], &ResumeOptions::default()).await.unwrap();
        assert_eq!((resumed.verdict, resumed.locks_kept), (Verdict::Unchanged, true));
        // Others had the shared file open for writing meanwhile: nothing better can be said of it.
        let shared = owner.resume(&keys[1], &ResumeOptions::default()).await.unwrap();
        assert!(shared.locks_kept);
        shared.open.accept_change();
        more(10).await;
        stop.store(true, SeqCst);
        let granted = intruder.await.unwrap();
        assert!(granted.is_empty(), "{granted:?}");
        shared.open.unlock(0, &[LockRange::new(100, 50).unwrap()]).await.unwrap();
        resumed.open.close().await.unwrap();
        shared.open.close().await.unwrap();
    });
}

/// The operator's last word: the open ends, others get in, and its client is told who did it.
#[test]
fn an_open_closed_by_force_is_gone_and_its_client_is_told() {
    let server = Deployment::start();
    runtime().block_on(async {
        let session = connect(&server).await;
        let open = new_file(&session, "mine", ShareMode::NONE).await;
        let binding = open.bind(&open.connect(transport_of("tcp")).await.unwrap()).await.unwrap();
        let id = open.id().to_string();
        let listed = server.ok(&["opens"]);
        assert!(listed.contains(&id[..8]) && listed.contains("data:/mine"), "{listed}");
        assert!(server.ok(&["sessions"]).contains("client"));
        assert!(server.ok(&["opens", "--principal", "nobody", "--json"]).trim() == "[]");
        assert!(server.fails(&["opens", "--close", &"0".repeat(32)]).contains("there is no open"));
        let said = server.ok(&["opens", "--close", &id[..12]]);
        assert!(said.contains(&id) && said.contains("data:/mine"), "{said}");
        let error = binding.read_vec(0, 10).await.err();
        assert!(
            matches!(error, Some(Error::Gone { reason: holdfast_client::GoneReason::ForceClosed, .. })),
            "{error:?}"
        );
        let other = connect(&server).await;
        new_file(&other, "mine", ShareMode::NONE).await.close().await.unwrap();
        assert!(server.fails(&["opens", &id]).contains("there is no open"));
    });
}
