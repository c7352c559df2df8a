//! The process itself: its socket to a scripted control, its listener, its signals.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // helpers of tests

mod common;

use common::{Client, Msg, eventually};
use holdfast_shared::auth::{BindAnswer, BindSecret, BindTranscript, MacPolicy, Secret};
use holdfast_shared::types::{Access, HandleId, LINK_PACKET_BYTES_MAX, OpenId, Status, VolumeId};
use holdfast_shared::wire::data::Opcode;
use holdfast_shared::wire::link::{
    Fence, Grant, LinkBinding, RedeemResult, Redeemed, Registered, ToControl, ToDataplane, VERSION,
};
use holdfast_shared::wire::service::{ServiceBlob, TransportKind};
use holdfast_shared::wire::{from_cbor, to_cbor};
use holdfast_transport::tcp;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::process::{Resource, Rlimit, getrlimit};
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

struct Process {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Process {
    fn start(directory: &Path, config: &str) -> Self {
        let file = directory.join("dataplane.toml");
        std::fs::write(&file, config).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_holdfast-dataplane"))
            .arg("--config")
            .arg(file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Processor time used so far, in clock ticks.
    fn cpu(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Control's end of the link.
struct Control {
    listener: OwnedFd,
}

impl Control {
    fn listen(path: &Path) -> Self {
        let _ = std::fs::remove_file(path);
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&listener, 4).unwrap();
        Self { listener }
    }

    fn accept(&self) -> OwnedFd {
        rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap()
    }

    fn register(&self) -> (OwnedFd, ServiceBlob) {
        let link = self.accept();
        let ToControl::Register(register) = receive(&link) else { panic!("no registration") };
        assert_eq!(register.version, VERSION);
        send(&link, &ToDataplane::Registered(Registered { status: Status::Ok }), None);
        (link, ServiceBlob::decode(&register.service_blob).unwrap())
    }
}

fn receive(link: &OwnedFd) -> ToControl {
    let mut bytes = vec![0; LINK_PACKET_BYTES_MAX];
    let (n, _) = rustix::net::recv(link, &mut bytes[..], RecvFlags::empty()).unwrap();
    from_cbor(&bytes[..n], LINK_PACKET_BYTES_MAX).unwrap()
}

fn send(link: &OwnedFd, message: &ToDataplane, fd: Option<&std::fs::File>) {
    let packet = to_cbor(message);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    if fd.is_some() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    rustix::net::sendmsg(link, &[IoSlice::new(&packet)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn an_open(content: &[u8]) -> common::Open {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    common::Open {
        key: b"a resume key".to_vec(),
        secret: BindSecret::new(Secret::new([3; 32])),
        challenge: [4; 32],
        volume: VolumeId([1; 16]),
        id: OpenId([2; 16]),
        access: Access::ALL,
        policy: MacPolicy::Header,
        file: Arc::new(file),
    }
}

/// Answers one bind as control does.
fn redeem(link: &OwnedFd, open: &common::Open, binding: u64) {
    let ToControl::Redeem(redeem) = receive(link) else { panic!("no bind") };
    let transcript = BindTranscript {
        channel: &redeem.channel,
        server_nonce: &redeem.server_nonce,
        open_challenge: &open.challenge,
        client_challenge: &redeem.client_challenge,
        resume_key: &redeem.resume_key,
        volume: open.volume,
        access: redeem.access,
        policy: redeem.policy,
    }
    .digest();
    assert!(open.secret.client_proof_is_right(&transcript, &redeem.proof));
    assert_eq!(redeem.channel.transport, TransportKind::Tcp);
    let (handle, epoch) = (HandleId([8; 16]), 1);
    let answer =
        BindAnswer { handle, epoch, access: redeem.access, policy: redeem.policy }.digest(&transcript);
    let grant = Grant {
        binding: LinkBinding(binding),
        open: open.id,
        handle,
        epoch,
        access: redeem.access,
        policy: redeem.policy,
        proof: open.secret.server_proof(&answer),
        keys: open.secret.channel_keys(&answer),
    };
    let result = RedeemResult::Granted(Box::new(grant));
    send(link, &ToDataplane::Redeemed(Redeemed { id: redeem.id, result }), Some(&open.file));
}

fn bind(client: &mut Client, link: &OwnedFd, open: &common::Open, number: u64) -> u32 {
    std::thread::scope(|scope| {
        scope.spawn(|| redeem(link, open, number));
        client.bind(open).unwrap()
    })
}

fn gauge(link: &OwnedFd, name: &str) -> u64 {
    send(link, &ToDataplane::GetGauges(77), None);
    loop {
        match receive(link) {
            ToControl::Gauges(gauges) => {
                assert_eq!(gauges.id, 77);
                return gauges
                    .gauges
                    .iter()
                    .find(|g| g.name == name)
                    .unwrap_or_else(|| panic!("no gauge {name}"))
                    .value;
            }
            ToControl::Released(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn connect(ready: &str) -> Client {
    let ready: serde_json::Value = serde_json::from_str(ready).unwrap();
    assert_eq!(ready["ready"], "dataplane");
    let parts = Client::parts();
    let address = ready["tcp"].as_str().unwrap().parse().unwrap();
    let channel = tcp::connect(address, Duration::from_secs(5), parts.setup()).unwrap();
    let mut client = Client::new(Box::new(channel), parts);
    client.hello();
    client
}

const CONFIG: &str = "link = 'link.sock'\n[tcp]\nlisten = '127.0.0.1:0'\n[verbs]\nenabled = 'off'\n\
                      [engine]\npool_bytes = 4194304\n[limits]\nlinger_ms = 100\n";

#[test]
fn the_process_serves_outlives_control_and_stops_cleanly() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("link.sock");
    // Control comes later than the data plane.
    let mut process = Process::start(directory.path(), CONFIG);
    std::thread::sleep(Duration::from_millis(200));
    let control = Control::listen(&path);
    let (link, blob) = control.register();
    let ready = process.line();
    let port = blob.endpoints[0].port;
    assert!(ready.contains(&format!("127.0.0.1:{port}")), "{ready}");
    assert_eq!(blob.endpoints[0].address.as_deref(), Some("127.0.0.1"));

    let open = an_open(b"the content");
    let fds = gauge(&link, "open_fds");
    let mut client = connect(&ready);
    assert_eq!(client.hello.unwrap().instance, blob.instance);
    let binding = bind(&mut client, &link, &open, 1);
    assert_eq!(client.read(binding, 4, 100), (Status::Ok, b"content".to_vec()));
    assert_eq!(client.write_inline(binding, 0, b"THE"), (Status::Ok, 3));
    assert_eq!(client.flush(binding), Status::Ok);
    let mut three = [0; 3];
    open.file.read_exact_at(&mut three, 0).unwrap();
    assert_eq!(&three, b"THE");
    assert!(gauge(&link, "heap_allocations_total") > 0);
    assert_eq!(gauge(&link, "bytes_read_total"), 7);
    assert!(gauge(&link, "open_fds") >= fds + 2, "a socket and a descriptor");

    // A fence, confirmed on the link and told to the client.
    let fence = Fence { binding: LinkBinding(1), epoch: 1, reason: Status::Fenced };
    send(&link, &ToDataplane::Fence(fence), None);
    assert_eq!(receive(&link), ToControl::Fenced(fence));
    assert_eq!(client.next(), Some(Msg::Notice { binding, status: Status::Fenced }));

    // Control goes: bindings go on, binds are refused.
    let binding = bind(&mut client, &link, &open, 2);
    drop(link);
    drop(control);
    eventually("binds are refused", || client.bind(&open) == Err(Status::Unavailable));
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"THE".to_vec()));
    // A new control does not know them.
    let control = Control::listen(&path);
    let (link, again) = control.register();
    assert_eq!(again, blob);
    assert_eq!(client.next(), Some(Msg::Notice { binding, status: Status::Fenced }));
    // The notice comes before the registration does; until that is through, binds are refused as unavailable. Who answers
    // a question about gauges is through.
    gauge(&link, "channels");
    let binding = bind(&mut client, &link, &open, 1);
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"THE".to_vec()));

    // A client that is gone leaves nothing.
    drop(client);
    assert_eq!(receive(&link), ToControl::Released(LinkBinding(1)));
    eventually("the baseline", || gauge(&link, "channels") == 0 && gauge(&link, "open_fds") == fds);
    assert_eq!(gauge(&link, "buffers_free"), gauge(&link, "buffers_total"));

    // Nothing to do: no processor.
    let before = process.cpu();
    std::thread::sleep(Duration::from_secs(1));
    assert!(process.cpu() - before <= 1, "an idle process uses the processor");

    // A clean stop tells the clients.
    let mut client = connect(&ready);
    bind(&mut client, &link, &open, 3);
    let begun = Instant::now();
    process.terminate();
    client.expect_end(Status::Unavailable);
    assert!(process.child.wait().unwrap().success());
    assert!(begun.elapsed() < Duration::from_secs(3));
}

/// Whether a data plane may live, as control finds out.
fn lock_is_free(directory: &Path) -> bool {
    let file = std::fs::File::open(directory.join("dataplane.lock")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok()
}

#[test]
fn a_registration_says_that_no_earlier_binding_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let control = Control::listen(&directory.path().join("link.sock"));
    let mut process = Process::start(directory.path(), &format!("{CONFIG}fence_ms = 800\n"));
    let (link, _) = control.register();
    let ready = process.line();
    assert!(!lock_is_free(directory.path()), "the process holds its lock");
    let open = an_open(&common::pattern(4 << 20, 1));
    let mut client = connect(&ready);
    let binding = bind(&mut client, &link, &open, 1);
    // Reads whose bytes the client does not take: their Places are under way until the server gives up.
    for _ in 0..32 {
        client.send_io(Opcode::Read, binding, 0, 4 << 20, client.descriptor());
    }
    std::thread::sleep(Duration::from_millis(300));
    drop(link);
    // Control lives and listens: the data plane is at once back, but has first to let go of the binding.
    let link = control.accept();
    let begun = Instant::now();
    let ToControl::Register(_) = receive(&link) else { panic!("no registration") };
    assert!(begun.elapsed() >= Duration::from_millis(500), "registered with a binding under way");
    send(&link, &ToDataplane::Registered(Registered { status: Status::Ok }), None);
    assert_eq!(gauge(&link, "bindings"), 0);
    // A slow one keeps its lock, a dead one does not.
    assert!(!lock_is_free(directory.path()));
    process.child.kill().unwrap();
    process.child.wait().unwrap();
    assert!(lock_is_free(directory.path()));
}

#[test]
fn without_room_for_a_descriptor_only_that_bind_fails() {
    let directory = tempfile::tempdir().unwrap();
    let control = Control::listen(&directory.path().join("link.sock"));
    let mut process = Process::start(directory.path(), CONFIG);
    let (link, _) = control.register();
    let ready = process.line();
    let open = an_open(b"abc");
    let mut client = connect(&ready);
    let binding = bind(&mut client, &link, &open, 1);
    let pid = rustix::process::Pid::from_child(&process.child);
    let limit = |current: Option<u64>| {
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let wanted = Rlimit { current: current.or(maximum), maximum };
        rustix::process::prlimit(Some(pid), Resource::Nofile, wanted).unwrap()
    };
    let before = limit(Some(3));
    assert_eq!(before.current, before.maximum, "it raises its limit itself");
    let refused = std::thread::scope(|scope| {
        scope.spawn(|| redeem(&link, &open, 2));
        client.bind(&open)
    });
    assert_eq!(refused, Err(Status::TooMany));
    assert_eq!(receive(&link), ToControl::Released(LinkBinding(2)), "on the same link");
    assert_eq!(client.read(binding, 0, 3), (Status::Ok, b"abc".to_vec()), "others are served");
    limit(None);
    let again = bind(&mut client, &link, &open, 3);
    assert_eq!(client.read(again, 0, 3), (Status::Ok, b"abc".to_vec()));
}

/// Not a test: what the next one runs in a process of its own.
#[test]
#[ignore = "panics on purpose, for the test below"]
fn child_that_loses_a_thread() {
    holdfast_dataplane::fault::end_on_panic();
    let _ = std::thread::spawn(|| panic!("on purpose")).join();
    std::thread::sleep(Duration::from_secs(20));
}

#[test]
fn a_process_that_loses_a_thread_ends() {
    let begun = Instant::now();
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_loses_a_thread", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(holdfast_dataplane::fault::EXIT_CODE), "{out:?}");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_control_that_talks_nonsense_is_left_and_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let control = Control::listen(&directory.path().join("link.sock"));
    let mut process = Process::start(directory.path(), CONFIG);
    // Refused, garbage before and after the registration, an answer nobody asked for, a second registration.
    let link = control.accept();
    assert!(matches!(receive(&link), ToControl::Register(_)));
    send(&link, &ToDataplane::Registered(Registered { status: Status::TooMany }), None);
    let link = control.accept();
    rustix::net::send(&link, b"\xff\xff garbage", SendFlags::NOSIGNAL).unwrap();
    let (link, _) = control.register();
    let _ready = process.line();
    rustix::net::send(&link, b"garbage", SendFlags::NOSIGNAL).unwrap();
    let (link, _) = control.register();
    let result = RedeemResult::Refused(Status::BadKey);
    send(&link, &ToDataplane::Redeemed(Redeemed { id: 12345, result }), None);
    let (link, _) = control.register();
    send(&link, &ToDataplane::Registered(Registered { status: Status::Ok }), None);
    let (link, _) = control.register();
    // A descriptor with a message that wants none is closed.
    let fds = gauge(&link, "open_fds");
    let file = tempfile::tempfile().unwrap();
    send(&link, &ToDataplane::GetGauges(1), Some(&file));
    assert!(matches!(receive(&link), ToControl::Gauges(_)));
    assert_eq!(gauge(&link, "open_fds"), fds);
    // A fence of what it does not have is confirmed: nothing of it is under way.
    let fence = Fence { binding: LinkBinding(99), epoch: 1, reason: Status::Fenced };
    send(&link, &ToDataplane::Fence(fence), None);
    assert_eq!(receive(&link), ToControl::Fenced(fence));
    process.terminate();
    assert!(process.child.wait().unwrap().success());
}

#[test]
fn a_bad_configuration_says_what_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    for (config, wanted) in [
        ("[tcp]\nlissten = 1", "lissten"),
        ("[engine]\nbuffer_bytes = 1", "buffer_bytes"),
        ("[tcp]\nenabled = false\n[verbs]\nenabled = 'off'", "nowhere to listen"),
    ] {
        let file = directory.path().join("dataplane.toml");
        std::fs::write(&file, config).unwrap();
        let out = Command::new(env!("CARGO_BIN_EXE_holdfast-dataplane"))
            .arg("--config")
            .arg(&file)
            .output()
            .unwrap();
        assert!(!out.status.success());
        assert!(String::from_utf8_lossy(&out.stderr).contains(wanted), "{out:?}");
    }
}
