//! What a crash of control leaves: every open, under the rules it had, before anybody is let in.

use crate::common::Server;
use crate::common::client::{Client, at, held, lock, open, resume};
use holdfast_shared::types::{Access, GoneReason, ShareMode, Status, Verdict};
use holdfast_shared::wire::control::{Open, Opened, Rename, Reply, Request, Resumed};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a resume says, once the server has noticed that the old session is gone.
async fn resumed(client: &mut Client, opened: &Opened) -> Resumed {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match client.ask(resume(opened)).await {
            Reply::Resumed(resumed) => return resumed,
            Reply::Refused(refusal) if refusal.status == Status::Busy && Instant::now() < end => {}
            other => panic!("not resumed: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Opens a file for oneself and locks a part of it.
async fn guarded(client: &mut Client, path: &str) -> Opened {
    let opened = client.open(Open { share: ShareMode::NONE, ..held(path) }).await;
    assert_eq!(client.ask(lock(opened.open, 1, 0, 100)).await, Reply::Done);
    opened
}

#[tokio::test(flavor = "multi_thread")]
async fn crs_01_nobody_gets_between_a_crash_and_the_resume() {
    let mut server = Server::start();
    server.stays_at_its_port();
    let mut client = Client::connect(&server, "writer").await;
    let opened = guarded(&mut client, "file").await;
    let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    server.kill();
    let starting = server.begin(&[]);
    let rival = {
        let (stop, accepted) = (stop.clone(), accepted.clone());
        let (address, identity) = (server.address, server.ca.client("writer"));
        let connector = crate::common::client::tls(&server.ca, Some(&identity));
        tokio::spawn(async move {
            let mut answers = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let Ok(mut rival) = Client::try_connect(address, &connector).await else { continue };
                accepted.fetch_add(1, Ordering::Relaxed);
                answers.push(rival.refused(Request::Open(open("file"))).await);
            }
            answers
        })
    };
    let ready = starting.ready(&mut server);
    assert_eq!((ready["recovered"].as_u64(), ready["lost"].as_u64()), (Some(1), Some(0)));
    while accepted.load(Ordering::Relaxed) < 5 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut client = Client::connect(&server, "writer").await;
    let back = client.resumed(&opened).await;
    assert_eq!((back.verdict, back.locks_kept), (Verdict::Unchanged, true));
    assert_eq!(back.opened.epoch, opened.epoch + 1);
    assert_eq!(back.opened.open, opened.open);
    let so_far = accepted.load(Ordering::Relaxed);
    while accepted.load(Ordering::Relaxed) < so_far + 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.store(true, Ordering::Relaxed);
    let answers = rival.await.unwrap();
    let first = answers.iter().position(|status| *status != Status::Busy).unwrap();
    assert!(first >= 1, "{answers:?}");
    assert!(answers[first..].iter().all(|status| *status == Status::ShareConflict), "{answers:?}");
    // The resumed open is as good as the first: its lock is held, and its close lets others in.
    client.close(opened.open).await;
    client.open(open("file")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crs_06_what_was_answered_outlives_the_crash_and_what_was_closed_does_not() {
    let mut server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    let kept = guarded(&mut client, "kept").await;
    let closed = client.open(held("closed")).await;
    client.close(closed.open).await;
    for round in 1..4 {
        server.restart();
        assert_eq!(server.gauge("recovered_opens"), 1);
        let mut other = Client::connect(&server, "writer").await;
        assert_eq!(other.refused(resume(&closed)).await, Status::BadKey);
        let back = other.resumed(&kept).await;
        assert_eq!((back.verdict, back.locks_kept, back.lock_sequence), (Verdict::Unchanged, true, 1));
        assert_eq!(back.opened.epoch, kept.epoch + round);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_keeps_opens_as_a_crash_does() {
    let mut server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    let opened = guarded(&mut client, "file").await;
    assert_eq!(server.terminate(), Some(0));
    assert!(client.receive().await.is_none());
    let ready = server.start_again();
    assert_eq!(ready["recovered"], 1);
    let mut client = Client::connect(&server, "writer").await;
    let back = client.resumed(&opened).await;
    assert_eq!((back.verdict, back.locks_kept), (Verdict::Unchanged, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_was_renamed_is_found_and_one_that_was_removed_is_gone() {
    let mut server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    let (moved, removed, replaced) = (
        client.open(held("moved")).await,
        client.open(held("removed")).await,
        client.open(held("replaced")).await,
    );
    server.kill();
    std::fs::rename(server.data("moved"), server.data("elsewhere")).unwrap();
    // Another file stands where it was.
    std::fs::write(server.data("moved"), b"another").unwrap();
    std::fs::remove_file(server.data("removed")).unwrap();
    std::fs::remove_file(server.data("replaced")).unwrap();
    std::fs::write(server.data("replaced"), b"another").unwrap();
    let ready = server.start_again();
    assert_eq!((ready["recovered"].as_u64(), ready["lost"].as_u64()), (Some(1), Some(2)));
    let mut client = Client::connect(&server, "writer").await;
    let back = client.resumed(&moved).await;
    assert_eq!(back.opened.attributes.inode, moved.attributes.inode);
    assert_eq!(back.opened.attributes.size, 0, "not the file that took its name");
    for lost in [&removed, &replaced] {
        match client.ask(resume(lost)).await {
            Reply::Gone(gone) => assert_eq!((gone.reason, gone.changed), (GoneReason::FileLost, true)),
            other => panic!("not gone: {other:?}"),
        }
    }
    // The names are free: nothing is held there.
    client.open(Open { share: ShareMode::NONE, ..open("removed") }).await;
    client.open(Open { share: ShareMode::NONE, ..open("replaced") }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_somebody_else_changed_meanwhile_is_changed() {
    let mut server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    let (same, other) = (client.open(held("same")).await, client.open(held("other")).await);
    drop(client);
    server.kill();
    std::thread::sleep(Duration::from_millis(20));
    std::fs::write(server.data("other"), b"by somebody beside the server").unwrap();
    server.start_again();
    let mut client = Client::connect(&server, "writer").await;
    assert_eq!(client.resumed(&same).await.verdict, Verdict::Unchanged);
    assert_eq!(client.resumed(&other).await.verdict, Verdict::Changed);
}

#[tokio::test(flavor = "multi_thread")]
async fn opens_beyond_the_descriptors_are_kept_by_name_and_opened_for_their_client() {
    let mut server = Server::with_limits("reopened_files = 2");
    let mut client = Client::connect(&server, "writer").await;
    let mut opens = Vec::new();
    for n in 0..5 {
        opens.push(guarded(&mut client, &format!("file{n}")).await);
    }
    server.restart();
    assert_eq!((server.gauge("recovered_opens"), server.gauge("recovered_by_name")), (5, 3));
    assert_eq!(server.gauge("open_files"), 2);
    let mut rival = Client::connect(&server, "writer").await;
    let mut client = Client::connect(&server, "writer").await;
    for (n, opened) in opens.iter().enumerate() {
        let busy = rival.refused(Request::Open(open(&format!("file{n}")))).await;
        assert_eq!(busy, Status::Busy, "protected, whether there is a descriptor or not");
        let back = client.resumed(opened).await;
        assert_eq!((back.verdict, back.locks_kept), (Verdict::Unchanged, true));
        assert_eq!(back.opened.attributes.inode, opened.attributes.inode);
    }
    assert_eq!(server.gauge("open_files"), 5);
    for opened in &opens {
        client.close(opened.open).await;
    }
    assert_eq!(server.gauge("open_files"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_sees_opens_and_sessions_and_ends_opens() {
    let server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(client.open(held(&format!("file{n}"))).await.open.to_string());
    }
    ids.sort();
    let first = server.admin(r#"{"get":"opens","after":null,"max":3}"#);
    let listed = |page: &serde_json::Value| -> Vec<String> {
        let opens = page["opens"].as_array().unwrap();
        opens.iter().map(|open| open["open"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(listed(&first), ids[..3]);
    assert_eq!(first["next"], ids[2].as_str());
    let open = &first["opens"][0];
    assert_eq!((open["state"].as_str(), open["principal"].as_str()), (Some("active"), Some("writer")));
    assert_eq!((open["access"].as_str(), open["share"].as_str()), (Some("rw"), Some("rwd")));
    assert_eq!((open["volume"].as_str(), open["class"].as_str()), (Some("data"), Some("hold")));
    assert_eq!(open["session"], client.session.to_string());
    let second = server.admin(&format!(r#"{{"get":"opens","after":"{}","max":3}}"#, ids[2]));
    assert_eq!(listed(&second), ids[3..]);
    assert!(second["next"].is_null());
    let sessions = server.admin(r#"{"get":"sessions"}"#);
    assert_eq!(sessions["sessions"][0]["session"], client.session.to_string());
    assert_eq!((sessions["sessions"][0]["opens"].as_u64(), sessions["next"].is_null()), (Some(5), true));
    assert!(sessions["sessions"][0]["address"].as_str().unwrap().starts_with("127.0.0.1:"));

    assert_eq!(server.admin(&format!(r#"{{"force_close":"{}"}}"#, ids[0]))["closing"], ids[0].as_str());
    server.await_gauge("opens", 4);
    assert_eq!(server.gauge("force_closes_total"), 1);
    for wrong in [
        format!(r#"{{"force_close":"{}"}}"#, ids[0]),
        r#"{"force_close":"12"}"#.to_owned(),
        format!(r#"{{"force_close":"+{}"}}"#, &ids[0][1..]),
        r#"{"get":"opens","after":"x"}"#.to_owned(),
        r#"{"get":"nothing"}"#.to_owned(),
        r#"{"get":"opens","more":1}"#.to_owned(),
    ] {
        assert!(server.admin(&wrong)["error"].is_string(), "{wrong}");
    }
    drop(client);
    server.await_gauge("detached_opens", 4);
    let page = server.admin(r#"{"get":"opens"}"#);
    assert_eq!(page["opens"][0]["state"], "detached");
    assert!(page["opens"][0]["hold_left_ms"].as_u64().is_some_and(|ms| ms > 30_000 && ms <= 60_000));
}

/// The whole table is written anew, many times over, while clients work; and what is read back is right.
#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_while_serving_lose_nothing() {
    let mut server = Server::with_limits("[journal]\nsync = false\ncheckpoint_mib = 1");
    let mut client = Client::connect(&server, "writer").await;
    let opened = guarded(&mut client, "kept").await;
    let mut sequence = 1;
    let end = Instant::now() + Duration::from_secs(60);
    while server.gauge("journal_checkpoints_total") < 2 {
        assert!(Instant::now() < end, "no checkpoint: {}", server.gauge("journal_bytes"));
        for _ in 0..300 {
            let other = client.open(held("other")).await;
            client.close(other.open).await;
            sequence += 1;
            assert_eq!(client.ask(lock(opened.open, sequence, 1000 + sequence % 100, 1)).await, Reply::Done);
            sequence += 1;
            let item = holdfast_shared::types::LockRange::new(1000 + (sequence - 1) % 100, 1).unwrap();
            let unlock = holdfast_shared::wire::control::Unlock {
                open: opened.open,
                sequence,
                owner: 1,
                ranges: vec![item],
            };
            assert_eq!(client.ask(Request::Unlock(unlock)).await, Reply::Done);
        }
    }
    assert!(server.journal().len() <= 2, "{:?}", server.journal());
    server.restart();
    let mut client = Client::connect(&server, "writer").await;
    let back = client.resumed(&opened).await;
    assert_eq!((back.verdict, back.locks_kept, back.lock_sequence), (Verdict::Unchanged, true, sequence));
    assert_eq!(server.gauge("recovered_opens"), 1);
}

/// Names that change through the server itself do not lose an open either.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_renamed_by_a_client_is_found_again() {
    let mut server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    let access = Access::READ | Access::WRITE | Access::DELETE;
    let opened = client.open(Open { access, ..held("old") }).await;
    let rename = Rename { from: at("old"), to: at("new"), no_replace: true };
    assert_eq!(client.ask(Request::Rename(rename)).await, Reply::Done);
    server.restart();
    let mut client = Client::connect(&server, "writer").await;
    let back = resumed(&mut client, &opened).await;
    assert_eq!(back.opened.attributes.inode, opened.attributes.inode);
}
