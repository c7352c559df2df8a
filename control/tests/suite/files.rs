//! Opens and names, as a client sees them.

use crate::common::Server;
use crate::common::client::{Client, at, open};
use holdfast_shared::types::{
    Access, Disposition, FileTime, LockItem, LockKind, LockRange, OpenId, ShareMode, Status,
};
use holdfast_shared::wire::control::{
    Attributes, FileKind, List, Lock, MakeDirectory, MakeSymlink, Open, Place, Rename, Reply, Request,
    SetAttributes, Target, Unlock, VolumeName,
};

fn set(target: Target) -> SetAttributes {
    SetAttributes { target, size: None, mode: None, accessed: None, modified: None }
}

async fn attributes(client: &mut Client, request: Request) -> Attributes {
    match client.ask(request).await {
        Reply::Attributes(attributes) => attributes,
        other => panic!("no attributes: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn opn_06_a_repeated_request_gets_the_same_open() {
    let server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    let request = Open { disposition: Disposition::CreateNew, ..open("file") };
    let first = client.open(request.clone()).await;
    assert!(first.created && first.attributes.mode == 0o640);
    // On the same connection, and on a later one of the same principal.
    let mut later = Client::connect(&server, "writer").await;
    for client in [&mut client, &mut later] {
        let again = client.open(request.clone()).await;
        assert_eq!((again.open, again.created), (first.open, true));
    }
    let other = Open { access: Access::READ, ..request.clone() };
    assert_eq!(later.refused(Request::Open(other)).await, Status::DuplicateCreate);
    assert_eq!(server.gauge("opens"), 1);
    // The open lives with the later connection.
    drop(client);
    server.await_gauge("sessions", 1);
    let Reply::Key(key) = later.ask(Request::QueryKey(first.open)).await else { panic!("no key") };
    assert_eq!(key.challenge, first.key.challenge);
    later.close(first.open).await;
    assert_eq!(later.refused(Request::QueryKey(first.open)).await, Status::Closed);
    drop(later);
    server.is_at_baseline();
}

#[tokio::test(flavor = "multi_thread")]
async fn share_modes_exclude_before_anything_is_truncated() {
    let server = Server::start();
    std::fs::write(server.data("file"), b"content").unwrap();
    let mut one = Client::connect(&server, "writer").await;
    let mut two = Client::connect(&server, "writer").await;
    let denies_writing = Open { access: Access::READ, share: ShareMode::READ, ..open("file") };
    let held = one.open(denies_writing).await;
    for disposition in [Disposition::OverwriteOrCreate, Disposition::Overwrite, Disposition::Open] {
        let request = Open { disposition, ..open("file") };
        assert_eq!(two.refused(Request::Open(request)).await, Status::ShareConflict);
    }
    let size = SetAttributes { size: Some(1), ..set(Target::Path(at("file"))) };
    assert_eq!(two.refused(Request::SetAttributes(size.clone())).await, Status::ShareConflict);
    assert_eq!(two.refused(Request::Remove(at("file"))).await, Status::ShareConflict);
    let rename = Rename { from: at("file"), to: at("moved"), no_replace: false };
    assert_eq!(two.refused(Request::Rename(rename)).await, Status::ShareConflict);
    std::fs::write(server.data("another"), b"x").unwrap();
    let over = Rename { from: at("another"), to: at("file"), no_replace: false };
    assert_eq!(two.refused(Request::Rename(over)).await, Status::ShareConflict);
    // The same file by another name.
    std::fs::hard_link(server.data("file"), server.data("alias")).unwrap();
    assert_eq!(two.refused(Request::Open(open("alias"))).await, Status::ShareConflict);
    assert_eq!(std::fs::read(server.data("file")).unwrap(), b"content");

    one.close(held.open).await;
    assert_eq!(attributes(&mut two, Request::SetAttributes(size)).await.size, 1);
    let emptied = two.open(Open { disposition: Disposition::Overwrite, ..open("file") }).await;
    assert_eq!((emptied.attributes.size, emptied.created), (0, false));
    let not_writing = Open { access: Access::READ, disposition: Disposition::Overwrite, ..open("file") };
    assert_eq!(two.refused(Request::Open(not_writing)).await, Status::AccessDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_end_where_the_grants_end() {
    let server = Server::start();
    std::fs::write(server.data("file"), b"content").unwrap();
    let mut reader = Client::connect(&server, "reader").await;
    let reading = Open { access: Access::READ, disposition: Disposition::Open, ..open("file") };
    reader.open(reading.clone()).await;
    for request in [
        Request::Open(open("file")),
        Request::Open(Open { disposition: Disposition::OpenOrCreate, ..reading.clone() }),
        Request::Remove(at("file")),
        Request::MakeDirectory(MakeDirectory { place: at("d"), mode: 0o755 }),
        Request::MakeSymlink(MakeSymlink { place: at("l"), text: "file".into() }),
        Request::SetAttributes(SetAttributes { mode: Some(0), ..set(Target::Path(at("file"))) }),
        Request::Rename(Rename { from: at("file"), to: at("f"), no_replace: false }),
    ] {
        assert_eq!(reader.refused(request.clone()).await, Status::ReadOnly, "{request:?}");
    }
    let elsewhere = |volume: &str| Place { volume: volume.into(), path: "file".into() };
    for (volume, status) in [("other", Status::AccessDenied), ("nothing", Status::NotFound)] {
        let request = Open { place: elsewhere(volume), ..reading.clone() };
        assert_eq!(reader.refused(Request::Open(request)).await, status);
    }
    let mut nobody = Client::connect(&server, "nobody").await;
    assert_eq!(nobody.refused(Request::Open(reading)).await, Status::AccessDenied);
    assert_eq!(nobody.refused(Request::GetAttributes(Target::Path(at("file")))).await, Status::AccessDenied);
    assert_eq!(nobody.ask(Request::Volumes).await, Reply::Volumes(Vec::new()));
    match reader.ask(Request::Volumes).await {
        Reply::Volumes(volumes) => {
            assert_eq!(volumes.len(), 1);
            assert!(volumes[0].name == "data" && !volumes[0].writable);
        }
        other => panic!("no volumes: {other:?}"),
    }
    // Another session's open is no open.
    let mut writer = Client::connect(&server, "writer").await;
    let theirs = writer.open(open("file")).await.open;
    for open in [theirs, OpenId([7; 16])] {
        assert_eq!(reader.refused(Request::Close(open)).await, Status::Closed);
        assert_eq!(reader.refused(Request::QueryKey(open)).await, Status::Closed);
        assert_eq!(reader.refused(Request::GetAttributes(Target::Open(open))).await, Status::Closed);
    }
    // An open without write access changes no size, whoever has it.
    let held = writer.open(Open { access: Access::READ, ..open("file") }).await;
    let size = SetAttributes { size: Some(0), ..set(Target::Open(held.open)) };
    assert_eq!(writer.refused(Request::SetAttributes(size)).await, Status::AccessDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_stay_in_the_volume() {
    let server = Server::start();
    let outside = server.dir.path().join("pki/server.key");
    std::os::unix::fs::symlink(&outside, server.data("absolute")).unwrap();
    std::os::unix::fs::symlink("../pki", server.data("up")).unwrap();
    let mut client = Client::connect(&server, "writer").await;
    let absolute = outside.to_str().unwrap();
    for path in ["../pki/server.key", "a/../../pki", absolute, "/", "absolute", "up/server.key", ".."] {
        for request in [
            Request::Open(open(path)),
            Request::Open(Open { access: Access::READ, disposition: Disposition::Open, ..open(path) }),
        ] {
            assert_eq!(client.refused(request).await, Status::PathEscape, "{path}");
        }
    }
    for request in [
        Request::List(List { place: at("up"), after: String::new() }),
        Request::GetAttributes(Target::Path(at("up/server.key"))),
        Request::Remove(at("up/server.key")),
        Request::MakeDirectory(MakeDirectory { place: at("up/new"), mode: 0o755 }),
        Request::MakeSymlink(MakeSymlink { place: at("up/new"), text: "x".into() }),
        Request::ReadSymlink(at("up/server.key")),
        Request::Rename(Rename { from: at("absolute"), to: at("up/new"), no_replace: false }),
        Request::SetAttributes(SetAttributes { size: Some(0), ..set(Target::Path(at("up/server.key"))) }),
        Request::SetAttributes(SetAttributes { mode: Some(0), ..set(Target::Path(at("up/server.key"))) }),
    ] {
        assert_eq!(client.refused(request.clone()).await, Status::PathEscape, "{request:?}");
    }
    let size = SetAttributes { size: Some(0), ..set(Target::Path(at("absolute"))) };
    assert_eq!(client.refused(Request::SetAttributes(size)).await, Status::SymlinkLoop);
    assert_eq!(client.refused(Request::Open(open("a\0b"))).await, Status::Invalid);
    assert_eq!(client.refused(Request::Open(open(&"x".repeat(300)))).await, Status::NameTooLong);
    assert!(std::fs::read_to_string(&outside).unwrap().contains("PRIVATE KEY"));
    assert_eq!(std::fs::read_dir(server.dir.path().join("pki")).unwrap().count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_attributes() {
    let server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    let done = |reply: Reply| assert_eq!(reply, Reply::Done);
    done(client.ask(Request::MakeDirectory(MakeDirectory { place: at("d"), mode: 0o750 })).await);
    let opened = client.open(open("d/file")).await;
    let grown = SetAttributes {
        size: Some(1 << 20),
        mode: Some(0o4711),
        modified: Some(FileTime { seconds: 1_000_000, nanos: 5 }),
        ..set(Target::Open(opened.open))
    };
    let after = attributes(&mut client, Request::SetAttributes(grown)).await;
    assert_eq!((after.size, after.mode, after.modified.seconds), (1 << 20, 0o711, 1_000_000));
    let by_name = Request::GetAttributes(Target::Path(at("d/file")));
    assert_eq!(attributes(&mut client, by_name).await, after);
    let too_big = SetAttributes { size: Some(u64::MAX), ..set(Target::Open(opened.open)) };
    assert_eq!(client.refused(Request::SetAttributes(too_big)).await, Status::FileTooBig);
    let no_time = FileTime { seconds: 0, nanos: 1_000_000_000 };
    let no_time = SetAttributes { accessed: Some(no_time), ..set(Target::Open(opened.open)) };
    assert_eq!(client.refused(Request::SetAttributes(no_time)).await, Status::Invalid);

    // An open that lets others delete lets its name go, and stays open.
    done(client.ask(Request::Rename(Rename { from: at("d/file"), to: at("file"), no_replace: true })).await);
    let there = Rename { from: at("file"), to: at("d"), no_replace: true };
    assert_eq!(client.refused(Request::Rename(there)).await, Status::Exists);
    done(client.ask(Request::Remove(at("file"))).await);
    let links = attributes(&mut client, Request::GetAttributes(Target::Open(opened.open))).await.links;
    assert_eq!(links, 0);

    let link = MakeSymlink { place: at("link"), text: "../anywhere".into() };
    done(client.ask(Request::MakeSymlink(link)).await);
    assert_eq!(client.ask(Request::ReadSymlink(at("link"))).await, Reply::Symlink("../anywhere".into()));
    let kind = attributes(&mut client, Request::GetAttributes(Target::Path(at("link")))).await.kind;
    assert_eq!(kind, FileKind::Symlink);
    let listed = client.ask(Request::List(List { place: at(""), after: String::new() })).await;
    let Reply::Entries(entries) = listed else { panic!("no entries") };
    let names: Vec<&str> = entries.entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!((names, entries.next), (vec!["d", "link"], None));
    done(client.ask(Request::Remove(at("d"))).await);
    assert_eq!(client.refused(Request::Remove(at("d"))).await, Status::NotFound);
    assert_eq!(client.refused(Request::Remove(at(""))).await, Status::Invalid);
    let status = client.ask(Request::VolumeStatus(VolumeName { volume: "data".into() })).await;
    assert!(matches!(status, Reply::VolumeStatus(status) if status.bytes_total > status.bytes_available));
    client.close(opened.open).await;
    drop(client);
    server.is_at_baseline();
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_have_an_answer() {
    let server =
        Server::with_limits("opens_per_session = 3\nopens_per_principal = 5\nsessions_per_principal = 3");
    let mut one = Client::connect(&server, "writer").await;
    let mut two = Client::connect(&server, "writer").await;
    for n in 0..3 {
        one.open(open(&format!("f{n}"))).await;
    }
    assert_eq!(one.refused(Request::Open(open("x"))).await, Status::TooMany);
    two.open(open("f3")).await;
    let last = two.open(open("f4")).await;
    assert_eq!(two.refused(Request::Open(open("x"))).await, Status::TooMany);
    assert!(!server.data("x").exists());
    two.close(last.open).await;
    two.open(open("f5")).await;
    let _three = Client::connect(&server, "writer").await;
    let mut four =
        crate::common::client::Client::handshake(&server, Some(&server.ca.client("writer"))).await.unwrap();
    let hello =
        holdfast_shared::wire::control::RequestMessage { id: 1, request: crate::common::client::hello() };
    crate::common::client::send_frame(&mut four, &holdfast_shared::wire::to_cbor(&hello)).await;
    let reply = crate::common::client::receive(&mut four).await.unwrap();
    assert!(matches!(reply.reply, Reply::Refused(refusal) if refusal.status == Status::TooMany));
    assert!(crate::common::client::receive(&mut four).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_are_all_answered() {
    let server = Server::start();
    let mut client = Client::connect(&server, "writer").await;
    // Far more than may be under way: the rest waits in the connection.
    let mut asked: Vec<u64> = Vec::new();
    for n in 0..500 {
        asked.push(client.send(Request::Open(open(&format!("f{}", n % 50)))).await);
    }
    let mut answered = Vec::new();
    for _ in 0..asked.len() {
        let reply = client.receive().await.unwrap();
        assert!(matches!(reply.reply, Reply::Opened(_)), "{reply:?}");
        answered.push(reply.id);
    }
    answered.sort_unstable();
    assert_eq!(answered, asked);
    assert_eq!((server.gauge("opens"), server.gauge("open_files")), (500, 500));
    drop(client);
    server.is_at_baseline();
}

#[tokio::test(flavor = "multi_thread")]
async fn lck_07_locks_that_wait_do_not_keep_back_the_unlock_that_they_wait_for() {
    const WAITERS: usize = 40;
    let server = Server::start();
    std::fs::write(server.data("file"), b"").unwrap();
    let mut client = Client::connect(&server, "writer").await;
    let mut opens = Vec::new();
    for _ in 0..=WAITERS {
        opens.push(client.open(open("file")).await.open);
    }
    let item = LockItem { range: LockRange::new(0, 1).unwrap(), kind: LockKind::Exclusive };
    let lock =
        |open, wait_ms| Request::Lock(Lock { open, sequence: 1, owner: 1, locks: vec![item], wait_ms });
    let holder = opens.pop().unwrap();
    assert_eq!(client.ask(lock(holder, None)).await, Reply::Done);
    for open in &opens {
        client.send(lock(*open, Some(60_000))).await;
    }
    let unlock = Unlock { open: holder, sequence: 2, owner: 1, ranges: vec![item.range] };
    let unlock = client.send(Request::Unlock(unlock)).await;
    let mut done = Vec::new();
    while done.len() < 2 {
        let answer = tokio::time::timeout(std::time::Duration::from_secs(10), client.receive()).await;
        let answer = answer.expect("the unlock is not read").unwrap();
        assert_eq!(answer.reply, Reply::Done);
        done.push(answer.id);
    }
    assert!(done.contains(&unlock), "the unlock, and the lock that it let in: {done:?}");
}
