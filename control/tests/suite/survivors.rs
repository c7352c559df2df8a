//! Descriptors that outlive control: with a dataplane that lives on, and with the supervisor.

use crate::common::Server;
use crate::common::client::{Client, held, resume};
use crate::common::dataplane::{Dataplane, right, still_held};
use holdfast_shared::types::{Access, Status, Verdict};
use holdfast_shared::wire::control::{Reply, Request, Resume};
use holdfast_shared::wire::link::{ToControl, ToDataplane};
use rustix::fs::{FlockOperation, flock};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags,
    SocketType, bind, recvmsg, socket_with, sockopt,
};
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Stdio;
use std::time::{Duration, Instant};

const RW: Access = Access::READ.union(Access::WRITE);

/// Connects as soon as the new control listens.
fn reconnect(server: &Server) -> Dataplane {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(dataplane) = Dataplane::try_connect_to(&server.link()) {
            return dataplane;
        }
        assert!(Instant::now() < end, "no link");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rsm_18_a_living_dataplane_brings_back_descriptors_and_bindings() {
    let mut server = Server::start();
    let lock = std::fs::File::create(server.state("dataplane.lock")).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    let mut dataplane = Dataplane::register(&server);
    let mut client = Client::connect(&server, "writer").await;
    let opened = client.open(held("file")).await;
    let (grant, descriptor) = dataplane.redeem(right(&client, &opened, [3; 32], RW)).unwrap();
    // One that nobody knows any more.
    let closed = client.open(held("closed")).await;
    let (stray, stray_descriptor) = dataplane.redeem(right(&client, &closed, [4; 32], RW)).unwrap();
    let close = client.send(Request::Close(closed.open)).await;
    let Some((ToDataplane::Fence(fence), None)) = dataplane.hear() else { panic!("no fence") };
    dataplane.say(&ToControl::Fenced(fence));
    assert_eq!(client.receive().await.unwrap().id, close);
    server.kill();
    // Only the descriptor leads to it now.
    std::fs::remove_file(server.data("file")).unwrap();

    let starting = server.begin(&[]);
    // A registration that breaks off leaves nothing behind.
    let half = reconnect(&server);
    let held = [(still_held(&grant), &descriptor), (still_held(&stray), &stray_descriptor)];
    half.say(&ToControl::Register(holdfast_shared::wire::link::Register {
        version: holdfast_shared::wire::link::VERSION,
        service_blob: b"blob".to_vec(),
        held: 2,
        first: false,
        wrote: Vec::new(),
        maps: false,
    }));
    half.say_with(&ToControl::Held(held[0].0), &descriptor);
    drop(half);
    let dataplane = reconnect(&server);
    dataplane.register_with(&held);
    assert_eq!(dataplane.registered(), Some(Status::Ok));
    let ready = starting.ready(&mut server);
    assert_eq!((ready["recovered"].as_u64(), ready["lost"].as_u64()), (Some(1), Some(0)));
    assert_eq!(server.gauge("open_files"), 1);
    match dataplane.hear().unwrap() {
        (ToDataplane::Fence(fence), None) => {
            assert_eq!(fence.binding, stray.binding, "what nobody knows is fenced");
            dataplane.say(&ToControl::Fenced(fence));
        }
        other => panic!("not a fence: {other:?}"),
    }
    let mut client = Client::connect(&server, "writer").await;
    let request =
        Resume { resume_key: opened.key.resume_key.clone(), supersede: None, keep: vec![grant.handle] };
    let back = match client.ask(Request::Resume(request)).await {
        Reply::Resumed(resumed) => resumed,
        other => panic!("not resumed: {other:?}"),
    };
    assert_eq!(back.kept, [grant.handle], "its I/O was never stopped");
    assert_eq!(back.opened.attributes.inode, opened.attributes.inode);
    assert_eq!(server.gauge("bindings"), 1);
    // A link that breaks while control lives: told again, and nothing is lost or kept twice.
    drop(dataplane);
    server.await_gauge("link_up", 0);
    let dataplane = Dataplane::connect(&server);
    dataplane.register_with(&[(still_held(&grant), &descriptor)]);
    assert_eq!(dataplane.registered(), Some(Status::Ok));
    assert_eq!((server.gauge("bindings"), server.gauge("open_files")), (1, 1));
    drop(lock);
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_of_another_version_or_beyond_all_bounds_are_refused() {
    use holdfast_shared::wire::link::{Register, VERSION};
    let server = Server::start();
    for (version, held, status) in
        [(VERSION + 1, 0, Status::Version), (VERSION, u32::MAX, Status::TooMany), (VERSION, 0, Status::Ok)]
    {
        let dataplane = Dataplane::connect(&server);
        dataplane.say(&ToControl::Register(Register {
            version,
            service_blob: Vec::new(),
            held,
            first: false,
            wrote: Vec::new(),
            maps: false,
        }));
        assert_eq!(dataplane.registered(), Some(status));
        assert!(status == Status::Ok || dataplane.hear().is_none(), "the link ends");
    }
}

/// What a supervisor keeps: it does as it is told on its notify socket.
struct Supervisor {
    socket: OwnedFd,
    ready: bool,
    kept: BTreeMap<String, OwnedFd>,
}

impl Supervisor {
    fn listen(path: &std::path::Path) -> Self {
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        let wait = Some(Duration::from_millis(300));
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, wait).unwrap();
        Self { socket, ready: false, kept: BTreeMap::new() }
    }

    /// Does all that it was told so far.
    fn obey(&mut self) {
        loop {
            let mut bytes = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
            let got = recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC);
            let Ok(got) = got.map(|got| got.bytes) else { return };
            let descriptor = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                _ => None,
            });
            let text = std::str::from_utf8(&bytes[..got]).unwrap();
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or_default();
            if text.starts_with("FDSTORE=1") {
                assert!(!name.is_empty() && !name.contains(':'));
                self.kept.insert(name.to_owned(), descriptor.expect("a descriptor"));
            } else if text.starts_with("FDSTOREREMOVE=1") {
                assert!(self.kept.remove(name).is_some(), "{name} was not kept");
            } else if text.starts_with("READY=1") {
                self.ready = true;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_supervisor_keeps_files_over_a_restart_of_both_planes() {
    let mut server = Server::start();
    server.kill();
    let path = server.state("notify.sock");
    let mut supervisor = Supervisor::listen(&path);
    let config = server.dir.path().join("control.toml");
    let child =
        crate::common::command(&config).env("NOTIFY_SOCKET", &path).stderr(Stdio::piped()).spawn().unwrap();
    crate::common::Starting(child).ready(&mut server);
    let mut client = Client::connect(&server, "writer").await;
    let removed = client.open(held("removed")).await;
    let closed = client.open(held("closed")).await;
    supervisor.obey();
    assert_eq!((supervisor.ready, supervisor.kept.len()), (true, 2));
    client.close(closed.open).await;
    supervisor.obey();
    assert_eq!(supervisor.kept.len(), 1);
    // A clean stop: what is kept stays kept.
    assert_eq!(server.terminate(), Some(0));
    supervisor.obey();
    assert_eq!(supervisor.kept.len(), 1);
    std::fs::remove_file(server.data("removed")).unwrap();

    // As systemd passes them on: from number 3, with their names, one of them not ours any more.
    let other = std::fs::File::open(&config).unwrap();
    supervisor.kept.insert("other".into(), other.into());
    let mut script = String::from("export LISTEN_PID=$$\n");
    for (number, kept) in supervisor.kept.values().enumerate() {
        rustix::io::fcntl_setfd(kept, rustix::io::FdFlags::empty()).unwrap();
        // By way of high numbers, so that none is overwritten before its turn.
        script += &format!("exec {}<&{}\n", number + 150, kept.as_raw_fd());
    }
    for number in 0..supervisor.kept.len() {
        script += &format!("exec {}<&{}\n", number + 3, number + 150);
    }
    script += "exec \"$@\"";
    let names: Vec<&str> = supervisor.kept.keys().map(String::as_str).collect();
    let child = std::process::Command::new("bash")
        .args(["-c", &script, "bash", env!("CARGO_BIN_EXE_holdfast-control"), "--config"])
        .arg(&config)
        .env("NOTIFY_SOCKET", &path)
        .env("LISTEN_FDS", names.len().to_string())
        .env("LISTEN_FDNAMES", names.join(":"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ready = crate::common::Starting(child).ready(&mut server);
    assert_eq!((ready["recovered"].as_u64(), ready["lost"].as_u64()), (Some(1), Some(0)));
    supervisor.obey();
    assert_eq!(supervisor.kept.len(), 1, "what belongs to no open is let go of");
    let mut client = Client::connect(&server, "writer").await;
    let Reply::Resumed(back) = client.ask(resume(&removed)).await else { panic!("not resumed") };
    assert_eq!(back.opened.attributes.inode, removed.attributes.inode);
    assert_eq!(back.verdict, Verdict::Changed, "its name was taken away by somebody beside the server");
    client.close(removed.open).await;
    supervisor.obey();
    assert!(supervisor.kept.is_empty());
}
