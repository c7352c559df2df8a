//! Opens bound by a dataplane: what is granted, what is refused, and when an open is over.

use crate::common::Server;
use crate::common::client::{Client, open};
use crate::common::dataplane::{Dataplane, right};
use holdfast_shared::auth::{BindAnswer, BindTranscript, MacPolicy, Secret, SessionKey};
use holdfast_shared::types::{Access, ShareMode, Status};
use holdfast_shared::wire::control::{Open, Reply, Request};
use holdfast_shared::wire::link::{Fence, Redeem, ToControl, ToDataplane};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::Duration;

const RW: Access = Access::READ.union(Access::WRITE);

/// The offset of whatever descriptor control has of a file.
fn offset_in_control(server: &Server, name: &str) -> Option<u64> {
    let file = std::fs::canonicalize(server.data(name)).unwrap();
    let fds = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    let fd = fds.flatten().find(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == file))?;
    let info = format!("/proc/{}/fdinfo/{}", server.pid(), fd.file_name().to_str().unwrap());
    let info = std::fs::read_to_string(info).unwrap();
    info.lines().find_map(|line| line.strip_prefix("pos:")?.trim().parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bind_hands_over_the_same_open_file_description() {
    let server = Server::start();
    let mut dataplane = Dataplane::register(&server);
    let mut client = Client::connect(&server, "writer").await;
    let opened = client.open(open("file")).await;
    assert_eq!(opened.key.service_blob, b"blob");
    let redeem = right(&client, &opened, [3; 32], RW);
    let (grant, descriptor) = dataplane.redeem(redeem.clone()).unwrap();
    assert_eq!((grant.open, grant.access, grant.policy), (opened.open, RW, MacPolicy::Header));

    // The offset belongs to the open file description: moved here, it is moved there.
    assert_eq!(offset_in_control(&server, "file"), Some(0));
    rustix::fs::seek(&descriptor, rustix::fs::SeekFrom::Start(12_345)).unwrap();
    assert_eq!(offset_in_control(&server, "file"), Some(12_345));
    assert_eq!(rustix::io::write(&descriptor, b"data").unwrap(), 4);

    // Mutual: the client can check control's proof and has the same channel keys.
    let transcript = BindTranscript {
        channel: &redeem.channel,
        server_nonce: &redeem.server_nonce,
        open_challenge: &opened.key.challenge,
        client_challenge: &redeem.client_challenge,
        resume_key: &redeem.resume_key,
        volume: opened.key.volume,
        access: RW,
        policy: MacPolicy::Header,
    }
    .digest();
    let answer = BindAnswer { handle: grant.handle, epoch: grant.epoch, access: RW, policy: grant.policy };
    let secret = client.key.bind_secret(opened.open);
    assert!(secret.server_proof_is_right(&answer.digest(&transcript), &grant.proof));
    assert!(secret.channel_keys(&answer.digest(&transcript)) == grant.keys);

    // A second handle of the same open, for reading only.
    let (second, _) = dataplane.redeem(right(&client, &opened, [4; 32], Access::READ)).unwrap();
    assert_ne!((second.handle, second.binding), (grant.handle, grant.binding));
    server.await_gauge("bindings", 2);
    dataplane.say(&ToControl::Released(second.binding));
    server.await_gauge("bindings", 1);

    drop(client);
    match dataplane.hear().unwrap() {
        (ToDataplane::Fence(fence), None) => {
            assert_eq!((fence.binding, fence.reason), (grant.binding, Status::SessionGone));
            dataplane.say(&ToControl::Fenced(fence));
        }
        other => panic!("not a fence: {other:?}"),
    }
    server.is_at_baseline();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_key_and_proof_gets_the_same_answer() {
    let server = Server::start();
    let other = Server::start();
    let mut dataplane = Dataplane::register(&server);
    let mut client = Client::connect(&server, "writer").await;
    let mut foreigner = Client::connect(&other, "writer").await;
    let opened = client.open(open("file")).await;
    let foreign = foreigner.open(open("file")).await;
    let good = right(&client, &opened, [3; 32], RW);

    let mut wrong: Vec<(String, Redeem)> = Vec::new();
    for length in [0, 1, 10, 22, 86, 101] {
        let resume_key = good.resume_key[..length].to_vec();
        wrong.push((format!("cut to {length}"), Redeem { resume_key, ..good.clone() }));
    }
    for bit in 0..good.resume_key.len() * 8 {
        let mut redeem = good.clone();
        redeem.resume_key[bit / 8] ^= 1 << (bit % 8);
        wrong.push((format!("bit {bit}"), redeem));
    }
    let named = |what: &str, redeem| (what.to_owned(), redeem);
    wrong.push(named(
        "too long",
        Redeem { resume_key: [&good.resume_key[..], &[0]].concat(), ..good.clone() },
    ));
    wrong.push(named("huge", Redeem { resume_key: vec![0x48; 60_000], ..good.clone() }));
    wrong.push(named("another server's", right(&foreigner, &foreign, [3; 32], RW)));
    let mut stranger = Client::connect(&server, "writer").await;
    stranger.key = SessionKey::new(Secret::new([5; 32]));
    wrong.push(named("wrong secret", right(&stranger, &opened, [3; 32], RW)));
    let mut channel = good.channel.clone();
    channel.client[0] ^= 1;
    wrong.push(named("another channel", Redeem { channel, ..good.clone() }));
    let (client_end, server_end) = (good.channel.server, good.channel.client);
    let turned = holdfast_shared::auth::ChannelIdentity {
        client: client_end,
        server: server_end,
        ..good.channel.clone()
    };
    wrong.push(named("ends swapped", Redeem { channel: turned, ..good.clone() }));
    wrong.push(named("another nonce", Redeem { server_nonce: [4; 32], ..good.clone() }));
    wrong.push(named("another challenge", Redeem { client_challenge: [4; 32], ..good.clone() }));
    wrong.push(named("policy lowered", Redeem { policy: MacPolicy::None, ..good.clone() }));
    wrong.push(named("more access than proven", Redeem { access: Access::READ, ..good.clone() }));
    wrong.push(named("proof of zeros", Redeem { proof: [0; 32], ..good.clone() }));
    for (what, redeem) in wrong {
        assert_eq!(dataplane.redeem(redeem).map(|_| ()), Err(Status::BadKey), "{what}");
    }

    // Proven, but not possible: told plainly.
    let mut read_only = open("file");
    read_only.access = Access::READ;
    let read_only = client.open(read_only).await;
    let too_much = dataplane.redeem(right(&client, &read_only, [3; 32], RW));
    assert_eq!(too_much.map(|_| ()), Err(Status::AccessDenied));

    // And the right one works, once.
    dataplane.redeem(good.clone()).unwrap();
    assert_eq!(dataplane.redeem(good).map(|_| ()), Err(Status::BadKey), "replayed");
    assert_eq!(server.gauge("bindings"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn close_is_answered_after_the_fence() {
    let server = Server::start();
    let mut dataplane = Dataplane::register(&server);
    let mut client = Client::connect(&server, "writer").await;
    let mut exclusive = open("file");
    exclusive.share = ShareMode::NONE;
    let opened = client.open(exclusive).await;
    let (grant, descriptor) = dataplane.redeem(right(&client, &opened, [3; 32], RW)).unwrap();

    let close = client.send(Request::Close(opened.open)).await;
    let Some((ToDataplane::Fence(fence), None)) = dataplane.hear() else { panic!("no fence") };
    assert_eq!((fence.binding, fence.reason), (grant.binding, Status::Closed));
    assert!(tokio::time::timeout(Duration::from_millis(200), client.receive()).await.is_err(), "too early");

    // Until then the file is still claimed, and the key is dead already.
    let mut rival = Client::connect(&server, "writer").await;
    assert_eq!(rival.refused(Request::Open(open("file"))).await, Status::ShareConflict);
    let late = dataplane.redeem(right(&client, &opened, [4; 32], RW));
    assert_eq!(late.map(|_| ()), Err(Status::BadKey));
    // A confirmation of another epoch confirms nothing.
    dataplane.say(&ToControl::Fenced(Fence { epoch: fence.epoch + 1, ..fence }));
    assert_eq!(rival.refused(Request::Open(open("file"))).await, Status::ShareConflict);

    drop(descriptor);
    dataplane.say(&ToControl::Fenced(fence));
    let reply = client.receive().await.unwrap();
    assert_eq!((reply.id, reply.reply), (close, Reply::Done));
    rival.open(open("file")).await;
    drop((client, rival));
    server.is_at_baseline();
}

/// The link's contract: a link that closes ends no binding; a new registration says that all are drained.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_link_ends_no_binding_before_dataplane_registers_anew() {
    let server = Server::start();
    let mut dataplane = Dataplane::register(&server);
    let second = Dataplane::connect(&server);
    assert_eq!(second.try_register(), Some(Status::TooMany), "one at a time");
    assert!(second.hear().is_none());

    let mut client = Client::connect(&server, "writer").await;
    let opened = client.open(open("file")).await;
    let exclusive = client.open(Open { share: ShareMode::NONE, ..open("exclusive") }).await;
    dataplane.redeem(right(&client, &opened, [3; 32], RW)).unwrap();
    dataplane.redeem(right(&client, &exclusive, [3; 32], RW)).unwrap();
    // This process, which stands for dataplane's, lives on.
    drop(dataplane);
    server.await_gauge("link_up", 0);
    let close = client.send(Request::Close(exclusive.open)).await;
    let early = tokio::time::timeout(Duration::from_millis(1200), client.receive()).await;
    assert!(early.is_err(), "closed before anything was proven: {early:?}");
    assert_eq!((server.gauge("opens"), server.gauge("bindings")), (2, 2));
    let mut rival = Client::connect(&server, "writer").await;
    assert_eq!(rival.refused(Request::Open(open("exclusive"))).await, Status::ShareConflict);
    let Reply::Key(key) = client.ask(Request::QueryKey(opened.open)).await else { panic!("no key") };
    assert!(key.service_blob.is_empty());

    let mut dataplane = Dataplane::register(&server);
    let reply = client.receive().await.unwrap();
    assert_eq!((reply.id, reply.reply), (close, Reply::Done));
    rival.open(open("exclusive")).await;
    server.await_gauge("bindings", 0);
    let (grant, _) = dataplane.redeem(right(&client, &opened, [5; 32], RW)).unwrap();
    dataplane.say(&ToControl::Released(grant.binding));
    client.close(opened.open).await;
}

/// Stands for a dataplane's process in the test below, which starts it; alone it does nothing.
#[test]
#[ignore = "a process of another test"]
fn connects_and_waits() {
    let Ok(path) = std::env::var("HOLDFAST_TEST_LINK") else { return };
    let dataplane = Dataplane::connect_to(std::path::Path::new(&path));
    println!("\nconnected {}", dataplane.socket.as_raw_fd());
    std::thread::sleep(Duration::from_secs(60));
}

/// A dataplane that is dead holds nothing: control knows it from the process, not from the link.
#[tokio::test(flavor = "multi_thread")]
async fn a_dataplanes_death_ends_its_bindings_and_leaves_the_opens() {
    let server = Server::start();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "binds::connects_and_waits", "--ignored", "--nocapture"])
        .env("HOLDFAST_TEST_LINK", server.link())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let number = lines
        .map(|line| line.unwrap())
        .find_map(|line| line.strip_prefix("connected ").map(|number| number.parse::<i32>().unwrap()));
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    let socket = pidfd_getfd(&process, number.unwrap(), PidfdGetfdFlags::empty()).unwrap();
    let mut dataplane = Dataplane::of(socket);
    assert_eq!(dataplane.try_register(), Some(Status::Ok));

    let mut client = Client::connect(&server, "writer").await;
    let opened = client.open(open("file")).await;
    dataplane.redeem(right(&client, &opened, [3; 32], RW)).unwrap();
    // The socket is closed, the process lives: nothing is proven.
    rustix::net::shutdown(&dataplane.socket, rustix::net::Shutdown::Both).unwrap();
    server.await_gauge("link_up", 0);
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert_eq!((server.gauge("bindings"), server.gauge("opens")), (1, 1));
    child.kill().unwrap();
    child.wait().unwrap();
    server.await_gauge("bindings", 0);
    assert_eq!(server.gauge("opens"), 1);
    client.close(opened.open).await;
}

/// After a crash of control, the dataplane that lives on holds bindings that the new control does not know.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_control_lets_nobody_in_while_an_earlier_dataplane_may_serve() {
    let mut server = Server::start();
    for dies in [false, true] {
        let lock = std::fs::File::create(server.link().with_file_name("dataplane.lock")).unwrap();
        // Control itself takes it for a moment, to see that an earlier one has died.
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        server.kill();
        let starting = server.begin(&[]);
        let admin = server.state("admin.sock");
        let end = std::time::Instant::now() + Duration::from_secs(10);
        let health = loop {
            assert!(std::time::Instant::now() < end, "no admin socket");
            if std::os::unix::net::UnixStream::connect(&admin).is_ok() {
                break server.admin(r#"{"get":"health"}"#);
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(health["control"], "recovering");
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(server.admin(r#"{"get":"health"}"#)["control"], "recovering");
        let dataplane = if dies {
            drop(lock);
            None
        } else {
            Some((Dataplane::register(&server), lock))
        };
        starting.ready(&mut server);
        Client::connect(&server, "writer").await.open(open("file")).await;
        drop(dataplane);
    }
    // Nobody holds the lock: nothing to wait for.
    server.restart();
    Client::connect(&server, "writer").await.open(open("file")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dataplane_that_talks_nonsense_is_dropped() {
    let server = Server::start();
    let dataplane = Dataplane::connect(&server);
    dataplane.say_bytes(b"nonsense");
    assert!(dataplane.hear().is_none());
    let dataplane = Dataplane::connect(&server);
    dataplane.say_bytes(&vec![0; 70_000]);
    assert!(dataplane.hear().is_none());
    let dataplane = Dataplane::register(&server);
    dataplane.say_bytes(&[0xff; 100]);
    assert!(dataplane.hear().is_none());
    server.await_gauge("link_up", 0);
    let gauges = std::thread::scope(|scope| {
        let dataplane = Dataplane::register(&server);
        scope.spawn(move || dataplane.answer_gauges());
        server.admin(r#"{"get":"gauges"}"#)
    });
    assert_eq!(gauges["dataplane"]["channels"], 3);
    server.await_gauge("link_up", 0);
    assert!(server.admin(r#"{"get":"gauges"}"#)["dataplane"].is_null());
    assert_eq!(server.admin(r#"{"get":"health"}"#)["dataplane"], "down");
    assert!(server.admin("rubbish")["error"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn bindings_of_one_open_are_limited() {
    let server = Server::with_limits("bindings_per_open = 2");
    let mut dataplane = Dataplane::register(&server);
    let mut client = Client::connect(&server, "writer").await;
    let opened = client.open(open("file")).await;
    for nonce in [1, 2] {
        dataplane.redeem(right(&client, &opened, [nonce; 32], RW)).unwrap();
    }
    let third = dataplane.redeem(right(&client, &opened, [3; 32], RW));
    assert_eq!(third.map(|_| ()), Err(Status::TooMany));
}
