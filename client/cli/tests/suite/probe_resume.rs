//! Resume from the outside: who may, once and how often, and what the verdict says of whatever was done meanwhile.

use crate::common::probe::*;
use crate::common::raw::Raw;
use crate::common::{Deployment, Wish};
use holdfast_client::{
    Changes, Error, Event, FileTime, GoneReason, HoldClass, OpenOptions, ResumeOptions, Session, SessionId,
    ShareMode, Status, Verdict,
};
use std::path::Path;
use std::time::Duration;

const BAD_KEY: Option<Status> = Some(Status::BadKey);

fn file(server: &Deployment, name: &str) -> std::path::PathBuf {
    std::fs::write(server.volume().join(name), vec![1; 10_000]).unwrap();
    server.volume().join(name)
}

/// What a resume says; the open is closed again.
async fn verdict(session: &Session, key: &[u8]) -> Verdict {
    let resumed = resume(session, key).await.unwrap();
    resumed.open.close().await.unwrap();
    resumed.verdict
}

/// Something done to a file beside the server, and whether that is a change.
type Deed = (&'static str, fn(&Path), bool);

const DEEDS: &[Deed] = &[
    ("nothing", |_| (), false),
    ("read", |path| drop(std::fs::read(path).unwrap()), false),
    (
        "opened for writing, and not written",
        |path| drop(std::fs::File::options().write(true).open(path).unwrap()),
        false,
    ),
    ("other bytes", |path| std::fs::write(path, vec![2; 10_000]).unwrap(), true),
    ("the same bytes", |path| std::fs::write(path, vec![1; 10_000]).unwrap(), true),
    (
        "longer",
        |path| std::fs::File::options().write(true).open(path).unwrap().set_len(10_001).unwrap(),
        true,
    ),
    (
        "shorter",
        |path| std::fs::File::options().write(true).open(path).unwrap().set_len(9_999).unwrap(),
        true,
    ),
    ("touched", |path| touch(path, std::time::SystemTime::now()), true),
    (
        "written, and the time set back",
        |path| {
            let before = std::fs::metadata(path).unwrap().modified().unwrap();
            std::fs::write(path, vec![2; 10_000]).unwrap();
            touch(path, before);
        },
        true,
    ),
    (
        "mode",
        |path| {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
        },
        true,
    ),
    ("another name", |path| std::fs::rename(path, path.with_extension("away")).unwrap(), true),
    ("removed", |path| std::fs::remove_file(path).unwrap(), true),
    (
        "replaced",
        |path| {
            let new = path.with_extension("new");
            std::fs::write(&new, vec![1; 10_000]).unwrap();
            std::fs::rename(&new, path).unwrap();
        },
        true,
    ),
    (
        "removed and made again",
        |path| {
            std::fs::remove_file(path).unwrap();
            std::fs::write(path, vec![1; 10_000]).unwrap();
        },
        true,
    ),
];

fn touch(path: &Path, modified: std::time::SystemTime) {
    std::fs::File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
}

/// Beside the server, while it runs and while it is down. Who has the file open keeps it, whatever its name means now.
#[test]
fn rsm_06_whatever_is_done_beside_the_server_is_told() {
    let mut server = Deployment::start();
    run(async {
        for (down, class) in [(false, HoldClass::Hold), (false, HoldClass::Yield), (true, HoldClass::Hold)] {
            let mut opens = Vec::new();
            for (n, (words, deed, changes)) in DEEDS.iter().enumerate() {
                let path = file(&server, &format!("{n}-{down}-{class:?}"));
                let name = path.file_name().unwrap().to_str().unwrap();
                let (key, _) = detached(&server, name, &rw().class(class)).await;
                opens.push((*words, *deed, *changes, path, key));
            }
            if down {
                server.kill_both();
            }
            opens.iter().for_each(|(_, deed, _, path, _)| deed(path));
            if down {
                server.await_planes();
            }
            let session = connect(&server).await;
            for (words, _, changes, _, key) in &opens {
                let wanted = if *changes { Verdict::Changed } else { Verdict::Unchanged };
                match resume(&session, key).await {
                    Ok(resumed) => {
                        assert_eq!(resumed.verdict, wanted, "{words}, {down} {class:?}");
                        // It is the file that it was: nothing is lost with the name.
                        resumed.open.accept_change();
                        let length = read(&bound(&resumed.open).await, 0, 20_000).await.unwrap();
                        assert!((9_999..=10_001).contains(&length), "{words}: {length}");
                        resumed.open.close().await.unwrap();
                    }
                    // Nobody had it open while the server was down, so it may be gone for good.
                    Err(Error::Gone { reason: GoneReason::FileLost, changed: true }) => {
                        assert!(down && *changes, "{words}, {down} {class:?}");
                    }
                    Err(error) => panic!("{words}, {down} {class:?}: {error:?}"),
                }
            }
            session.close().await;
        }
    });
}

/// Through the server, within the rights of others: only what changes the file is a change.
#[test]
fn rsm_06_what_others_do_through_the_server_is_told() {
    let server = Deployment::start();
    run(async {
        let other = connect(&server).await;
        for deed in [
            "reads",
            "locks",
            "may write",
            "writes",
            "writes nothing",
            "mode by open",
            "times by open",
            "size by open",
            "mode by name",
            "size by name",
            "same size by name",
            "overwrites",
            "renames",
            "removes",
            "looks",
        ] {
            let path = file(&server, "file");
            let (key, _) = detached(&server, "file", &rw()).await;
            let options = if deed == "reads" { OpenOptions::read() } else { rw() };
            let open = open(&other, "file", &options).await;
            let size = Changes { size: Some(5), ..Changes::default() };
            let mode = Changes { mode: Some(0o600), ..Changes::default() };
            let time = Some(FileTime { seconds: 1, nanos: 0 });
            let times = Changes { modified: time, accessed: time, ..Changes::default() };
            let at = place("file");
            let changes = match deed {
                "reads" => read(&bound(&open).await, 0, 100).await.unwrap() == 0,
                "locks" => lock(&open, exclusive(0, 100)).await.is_some(),
                "may write" => bound(&open).await.flush().await.is_err(),
                "writes" => write(&bound(&open).await, 0, 1).await.is_ok(),
                "writes nothing" => write(&bound(&open).await, 0, 0).await.unwrap() > 0,
                "mode by open" => open.set_attributes(&mode).await.is_ok(),
                "times by open" => open.set_attributes(&times).await.is_ok(),
                "size by open" => open.set_attributes(&size).await.is_ok(),
                "mode by name" => other.set_attributes(&at, &mode).await.is_ok(),
                "size by name" => other.set_attributes(&at, &size).await.is_ok(),
                // Told or not, as the file system has it: it is a change of the modification time on Linux.
                "same size by name" => {
                    let before = std::fs::metadata(&path).unwrap();
                    let same = Changes { size: Some(10_000), ..Changes::default() };
                    other.set_attributes(&at, &same).await.unwrap();
                    use std::os::unix::fs::MetadataExt;
                    let after = std::fs::metadata(&path).unwrap();
                    (before.ctime(), before.ctime_nsec()) != (after.ctime(), after.ctime_nsec())
                }
                "overwrites" => {
                    tried(&other, "file", &rw().disposition(holdfast_client::Disposition::Overwrite, 0))
                        .await
                        .is_none()
                }
                "renames" => other.rename(&at, &place("moved"), false).await.is_ok(),
                "removes" => other.remove(&at).await.is_ok(),
                _ => other.attributes(&at).await.is_err(),
            };
            open.close().await.unwrap();
            let wanted = if changes { Verdict::Changed } else { Verdict::Unchanged };
            assert_eq!(verdict(&other, &key).await, wanted, "{deed}");
        }
    });
}

/// While a lost client's binding lives on there is nothing to compare with yet; others' doings are told all the same.
#[test]
fn rsm_06_what_others_do_while_bindings_live_on_is_told() {
    let server = Deployment::with(&Wish { settings: &[("linger_ms", "600000")], ..Wish::default() });
    run(async {
        let other = connect(&server).await;
        for deed in ["reads", "mode by open", "times by open", "mode by name", "size by name", "may write"] {
            file(&server, "file");
            let mine = connect(&server).await;
            let one = open(&mine, "file", &rw()).await;
            let (key, id) = (one.resume_key(), one.id());
            let (grant, secret) = (one.grant(), one.bind_secret());
            let mut raw = Raw::connect("tcp", &grant);
            let claim = crate::common::raw::Claim { access: RW, ..raw.claim(&grant, &secret) };
            raw.bind(&claim).0.unwrap();
            mine.detach().await;
            until_state(&server, id, &["detached"]);
            let looks = open(&other, "file", &OpenOptions::read()).await;
            let mode = Changes { mode: Some(0o600), ..Changes::default() };
            let times = Changes { modified: Some(FileTime { seconds: 1, nanos: 0 }), ..Changes::default() };
            let size = Changes { size: Some(5), ..Changes::default() };
            let at = place("file");
            let wanted = match deed {
                "reads" => {
                    read(&bound(&looks).await, 0, 10).await.unwrap();
                    Verdict::Unchanged
                }
                "mode by open" => looks.set_attributes(&mode).await.map(|_| Verdict::Changed).unwrap(),
                "times by open" => looks.set_attributes(&times).await.map(|_| Verdict::Changed).unwrap(),
                "mode by name" => other.set_attributes(&at, &mode).await.map(|_| Verdict::Changed).unwrap(),
                "size by name" => other.set_attributes(&at, &size).await.map(|_| Verdict::Changed).unwrap(),
                // It might have written, and nobody could tell that from what the lost client's binding still writes.
                _ => {
                    assert_eq!(tried(&other, "file", &rw()).await, None);
                    Verdict::Changed
                }
            };
            looks.close().await.unwrap();
            assert_eq!(verdict(&other, &key).await, wanted, "{deed}");
        }
    });
}

#[test]
fn rsm_14_only_who_names_the_session_takes_a_live_open() {
    let server = Deployment::with(&Wish { principals: &[("other", "read-write")], ..Wish::default() });
    run(async {
        let (mine, later) = (connect(&server).await, connect(&server).await);
        let theirs = connect_as(&server, "other").await;
        let one = open(&mine, "file", &rw().share(ShareMode::NONE)).await;
        let io = bound(&one).await;
        write(&io, 0, 10).await.unwrap();
        let (key, first, before) = (one.resume_key(), mine.id(), io.handle());
        let naming = |session| ResumeOptions::default().supersede(session);
        for (session, options, wanted) in [
            (&mine, ResumeOptions::default(), Status::Busy),
            (&mine, naming(first), Status::Busy), // it would end itself
            (&later, ResumeOptions::default(), Status::Busy),
            (&later, naming(later.id()), Status::Busy),
            (&later, naming(theirs.id()), Status::Busy),
            (&later, naming(SessionId([7; 16])), Status::Busy),
            (&theirs, naming(first), Status::BadKey),
            (&theirs, ResumeOptions::default(), Status::BadKey),
        ] {
            assert_eq!(status(session.resume(&key, &options).await), Some(wanted), "{options:?}");
            assert_eq!(read(&io, 0, 10).await.unwrap(), 10, "undisturbed");
        }
        assert_eq!((one.epoch(), io.handle()), (1, before));
        // The client would fight for its open: it goes away as it is told that the session is gone.
        let resumed = later.resume(&key, &naming(first)).await.unwrap();
        assert_eq!(
            (resumed.verdict, resumed.open.id(), resumed.open.epoch()),
            (Verdict::Unchanged, one.id(), 2)
        );
        assert_eq!((resumed.open.access(), resumed.open.share()), (RW, Some(ShareMode::NONE)));
        let new = bound(&resumed.open).await;
        assert_ne!(new.handle(), before);
        assert_eq!(read(&new, 0, 20).await.unwrap(), 10);
        assert_eq!(tried(&theirs, "file", &OpenOptions::read()).await, Some(Status::ShareConflict));
    });
}

/// Two sessions at once, again and again; and from the answer to a close on, nobody.
#[test]
fn rsm_13_of_two_at_once_one_has_it_and_the_other_knows() {
    let server = Deployment::start();
    run(async {
        let (a, b) = (connect(&server).await, connect(&server).await);
        for round in 0..10 {
            let (key, id) = detached(&server, "file", &rw()).await;
            let (x, y) = tokio::join!(resume(&a, &key), resume(&b, &key));
            let (winner, loser) = match x {
                Ok(winner) => (winner, status(y)),
                lost => (y.unwrap(), status(lost)),
            };
            assert_eq!(loser, Some(Status::Busy), "{round}");
            assert_eq!((winner.open.id(), winner.open.epoch()), (id, 2), "{round}: once");
            let newest = winner.open.resume_key();
            winner.open.close().await.unwrap();
            for key in [&key, &newest] {
                assert_eq!(status(resume(&b, key).await), BAD_KEY, "{round}: closed");
            }
        }
    });
}

/// A key goes on to name its open after a resume: the older one and the newer one alike; what proves it is new each time.
#[test]
fn rsm_01_a_resume_gives_new_handles_and_secrets_and_keeps_the_rest() {
    let server = Deployment::start();
    run(async {
        let options =
            rw().access(RWD).share(ShareMode::READ).hold(Duration::from_secs(33)).delete_on_close(true);
        let locks = [exclusive(0, 10), shared(20, 10)];
        let session = connect(&server).await;
        let one = open(&session, "file", &options).await;
        one.lock(&locks, Default::default()).await.unwrap();
        let io = bound(&one).await;
        write(&io, 0, 10).await.unwrap();
        let (key, grant, secret, id) = (one.resume_key(), one.grant(), one.bind_secret(), one.id());
        let mut handles = vec![io.handle()];
        session.detach().await;
        until_state(&server, id, &["detached"]);
        for round in 2..5 {
            let session = connect(&server).await;
            let resumed = resume(&session, &key).await.unwrap();
            assert_eq!((resumed.verdict, resumed.locks_kept), (Verdict::Unchanged, true));
            let open = resumed.open;
            assert_eq!((open.id(), open.epoch(), open.hold()), (id, round, Duration::from_secs(33)));
            assert_eq!((open.access(), open.share(), open.created()), (RWD, Some(ShareMode::READ), true));
            let mut raw = Raw::connect("tcp", &open.grant());
            let claim = raw.claim(&grant, &secret);
            assert_eq!(raw.bind(&claim).0.err(), BAD_KEY, "the old secret");
            let io = bound(&open).await;
            assert!(!handles.contains(&io.handle()));
            handles.push(io.handle());
            assert_eq!(read(&io, 0, 100).await.unwrap(), 10);
            // Its locks are the same ones, and go on being numbered.
            assert_eq!(lock(&open, shared(9, 1)).await, Some(Status::LockNotGranted));
            assert_eq!(unlock(&open, shared(20, 10)).await, None);
            assert_eq!(lock(&open, shared(20, 10)).await, None);
            session.detach().await;
            until_state(&server, id, &["detached"]);
        }
        let session = connect(&server).await;
        resume(&session, &key).await.unwrap().open.close().await.unwrap();
        assert!(!server.volume().join("file").exists(), "still to be deleted on close");
    });
}

/// A change shuts the open until the application has accepted it, and is behind it then.
#[test]
fn rsm_06_a_change_is_told_until_it_is_accepted() {
    let server = Deployment::start();
    run(async {
        let path = file(&server, "file");
        let (key, id) = detached(&server, "file", &rw()).await;
        std::fs::write(&path, "changed").unwrap();
        let session = connect(&server).await;
        let resumed = resume(&session, &key).await.unwrap();
        assert_eq!(resumed.verdict, Verdict::Changed);
        let refused = resumed.open.lock(&[exclusive(0, 1)], Default::default()).await;
        assert!(matches!(refused, Err(Error::Changed)), "shut until it is accepted: {refused:?}");
        assert!(resumed.open.accept_change() && !resumed.open.accept_change());
        assert_eq!(read(&bound(&resumed.open).await, 0, 100).await.unwrap(), 7);
        session.detach().await;
        until_state(&server, id, &["detached"]);
        let session = connect(&server).await;
        assert_eq!(verdict(&session, &key).await, Verdict::Unchanged, "since then nothing was changed");
    });
}

/// After the hold time: kept while nobody wants it, with locks that did not protect; then gone, and it is said why.
#[test]
fn rsm_03_after_the_hold_time_it_is_kept_until_somebody_comes() {
    let mut server = Deployment::start();
    run(async {
        let (mine, theirs) = (connect(&server).await, connect(&server).await);
        let short = || rw().share(ShareMode::READ).hold(Duration::from_millis(1));
        let expired = async |locks: &[_]| {
            let (key, id) = detached_with(&server, "file", &short(), locks).await;
            until_state(&server, id, &["expired"]);
            key
        };
        let key = expired(&[]).await;
        let back = resume(&mine, &key).await.unwrap();
        assert_eq!((back.verdict, back.locks_kept), (Verdict::ExpiredUnchanged, true), "it had no locks");
        back.open.close().await.unwrap();
        let key = expired(&[exclusive(0, 10)]).await;
        // Who does not conflict by share mode may read where it had locked, and ends nothing.
        let reader = open(&theirs, "file", &OpenOptions::read()).await;
        let io = bound(&reader).await;
        assert_eq!(read(&io, 0, 5).await.unwrap(), 0);
        let back = resume(&mine, &key).await.unwrap();
        assert_eq!((back.verdict, back.locks_kept), (Verdict::ExpiredUnchanged, false));
        assert!(!back.open.locks_held_throughout());
        assert_eq!(status(read(&io, 0, 5).await), Some(Status::LockConflict), "in force again");
        back.open.close().await.unwrap();
        let key = expired(&[exclusive(0, 10)]).await;
        assert_eq!(lock(&reader, shared(5, 1)).await, None, "a lock wants what it had");
        let gone = |result: Result<_, Error>| match result {
            Err(Error::Gone { reason, changed }) => (reason, changed),
            other => panic!("{other:?}"),
        };
        assert_eq!(gone(resume(&mine, &key).await.map(drop)), (GoneReason::Evicted, false));
        reader.close().await.unwrap();
        let mut keys = Vec::new();
        for wrote in [false, true] {
            let key = expired(&[]).await;
            let open = open(&theirs, "file", &rw()).await;
            if wrote {
                write(&bound(&open).await, 0, 1).await.unwrap();
            }
            open.close().await.unwrap();
            for _ in 0..2 {
                assert_eq!(gone(resume(&mine, &key).await.map(drop)), (GoneReason::Evicted, wrote));
            }
            keys.push(key);
        }
        server.kill_both();
        server.await_planes();
        for key in keys {
            // The second one's writer has changed it for the first as well.
            assert_eq!(
                gone(resume(&mine, &key).await.map(drop)),
                (GoneReason::Evicted, true),
                "after a restart"
            );
        }
    });
}

/// One's own other open is another; and what a lost client did itself is no change.
#[test]
fn rsm_10_ones_own_other_open_and_ones_own_writes() {
    let server = Deployment::with(&Wish { settings: &[("linger_ms", "50")], ..Wish::default() });
    run(async {
        for (other_writes, wanted) in [(false, Verdict::Unchanged), (true, Verdict::Changed)] {
            let (lost, mine) = (connect(&server).await, connect(&server).await);
            let one = open(&lost, "file", &rw()).await;
            let (key, id, io) = (one.resume_key(), one.id(), bound(&one).await);
            write(&io, 0, 10).await.unwrap();
            one.set_attributes(&Changes { size: Some(5), mode: Some(0o600), ..Changes::default() })
                .await
                .unwrap();
            let mut events = one.events();
            lost.detach().await;
            assert!(io.flush().await.is_err(), "over for this side");
            let told = tokio::time::timeout(Duration::from_millis(1), events.next()).await;
            assert!(!matches!(told, Ok(Some(Event::Resumed { .. }))));
            until_state(&server, id, &["detached"]);
            server.until("its binding is fenced", |gauges| gauges["control.bindings"] == 0);
            settled(&server);
            let other = if other_writes { rw() } else { OpenOptions::read() };
            let other = open(&mine, "file", &other).await;
            let io = bound(&other).await;
            if other_writes {
                write(&io, 0, 1).await.unwrap();
            } else {
                read(&io, 0, 1).await.unwrap();
            }
            assert_eq!(verdict(&mine, &key).await, wanted);
        }
    });
}
