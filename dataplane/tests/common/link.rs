//! The process, and a scripted control at the other end of its link.

use super::{Client, Open};
use holdfast_shared::auth::{BindSecret, MacPolicy, Secret};
use holdfast_shared::types::{Access, HandleId, LINK_PACKET_BYTES_MAX, OpenId, Status, VolumeId};
use holdfast_shared::wire::link::{
    Held, LinkBinding, RedeemResult, Redeemed, Registered, ToControl, ToDataplane, VERSION,
};
use holdfast_shared::wire::service::{ServiceBlob, TransportKind};
use holdfast_shared::wire::{from_cbor, to_cbor};
use holdfast_transport::tcp;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// A running `holdfast-dataplane`.
pub struct Process {
    pub child: Child,
    out: BufReader<ChildStdout>,
}

impl Process {
    pub fn start(directory: &Path, config: &str) -> Self {
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

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Processor time used so far, in clock ticks.
    pub fn cpu(&self) -> u64 {
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
pub struct Control {
    listener: OwnedFd,
}

impl Control {
    pub fn listen(path: &Path) -> Self {
        let _ = std::fs::remove_file(path);
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&listener, 4).unwrap();
        Self { listener }
    }

    pub fn accept(&self) -> OwnedFd {
        rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap()
    }

    /// A registration that tells of no binding.
    pub fn register(&self) -> (OwnedFd, ServiceBlob) {
        let (link, blob, held) = self.register_held();
        assert!(held.is_empty(), "{held:?}");
        (link, blob)
    }

    /// A registration, and what it tells.
    pub fn register_held(&self) -> (OwnedFd, ServiceBlob, Vec<(Held, File)>) {
        let link = self.accept();
        let (blob, held) = take_registration(&link);
        answer_registration(&link);
        (link, blob, held)
    }
}

/// All that a data plane tells before it is answered.
pub fn take_registration(link: &OwnedFd) -> (ServiceBlob, Vec<(Held, File)>) {
    let ToControl::Register(register) = receive(link) else { panic!("no registration") };
    assert_eq!(register.version, VERSION);
    let held = (0..register.held)
        .map(|_| {
            let (ToControl::Held(held), Some(fd)) = receive_with_fd(link) else { panic!("fewer than told") };
            (held, File::from(fd))
        })
        .collect();
    (ServiceBlob::decode(&register.service_blob).unwrap(), held)
}

pub fn answer_registration(link: &OwnedFd) {
    send(link, &ToDataplane::Registered(Registered { status: Status::Ok }), None);
}

pub fn receive(link: &OwnedFd) -> ToControl {
    let (message, fd) = receive_with_fd(link);
    assert!(fd.is_none(), "a descriptor with {message:?}");
    message
}

pub fn receive_with_fd(link: &OwnedFd) -> (ToControl, Option<OwnedFd>) {
    let mut bytes = vec![0; LINK_PACKET_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let n = rustix::net::recvmsg(link, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (from_cbor(&bytes[..n], LINK_PACKET_BYTES_MAX).unwrap(), fd)
}

pub fn send(link: &OwnedFd, message: &ToDataplane, fd: Option<&File>) {
    let packet = to_cbor(message);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    if fd.is_some() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    rustix::net::sendmsg(link, &[IoSlice::new(&packet)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

pub fn an_open(content: &[u8]) -> Open {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    Open {
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
pub fn redeem(link: &OwnedFd, open: &Open, binding: u64) {
    let ToControl::Redeem(redeem) = receive(link) else { panic!("no bind") };
    let transcript = open.proven(&redeem).expect("a right proof");
    assert_eq!(redeem.channel.transport, TransportKind::Tcp);
    let grant = open.grant(&redeem, transcript, LinkBinding(binding), HandleId([8; 16]), 1);
    let result = RedeemResult::Granted(Box::new(grant));
    send(link, &ToDataplane::Redeemed(Redeemed { id: redeem.id, result }), Some(&open.file));
}

pub fn bind(client: &mut Client, link: &OwnedFd, open: &Open, number: u64) -> u32 {
    std::thread::scope(|scope| {
        scope.spawn(|| redeem(link, open, number));
        client.bind(open).unwrap()
    })
}

pub fn gauge(link: &OwnedFd, name: &str) -> u64 {
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
            ToControl::Released(_) | ToControl::Restricted(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

pub fn connect(ready: &str) -> Client {
    let ready: serde_json::Value = serde_json::from_str(ready).unwrap();
    assert_eq!(ready["ready"], "dataplane");
    let parts = Client::parts();
    let address = ready["tcp"].as_str().unwrap().parse().unwrap();
    let channel = tcp::connect(address, Duration::from_secs(5), parts.setup()).unwrap();
    let mut client = Client::new(Box::new(channel), parts);
    client.hello();
    client
}

pub const CONFIG: &str = "link = 'link.sock'\n[tcp]\nlisten = '127.0.0.1:0'\n[verbs]\nenabled = 'off'\n\
                      [engine]\npool_bytes = 4194304\n[limits]\nlinger_ms = 100\n";

/// Whether a data plane may live, as control finds out.
pub fn lock_is_free(directory: &Path) -> bool {
    let file = File::open(directory.join("dataplane.lock")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok()
}
