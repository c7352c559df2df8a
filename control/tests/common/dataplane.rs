//! The link's other end.

use super::Server;
use super::client::Client;
use holdfast_shared::auth::{BindTranscript, ChannelIdentity};
use holdfast_shared::types::{Access, Status};
use holdfast_shared::wire::control::Opened;
use holdfast_shared::wire::link::{
    Gauge, Gauges, Grant, Held, Redeem, RedeemResult, Register, Registered, ToControl, ToDataplane, VERSION,
};
use holdfast_shared::wire::service::TransportKind;
use holdfast_shared::wire::{from_cbor, to_cbor};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, send,
    sendmsg, socket_with, sockopt,
};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

pub struct Dataplane {
    pub socket: OwnedFd,
    last: u64,
}

impl Dataplane {
    /// Connected, not registered.
    pub fn connect(server: &Server) -> Self {
        Self::connect_to(&server.link())
    }

    pub fn connect_to(link: &std::path::Path) -> Self {
        Self::try_connect_to(link).expect("a link")
    }

    /// `None` if nobody listens there.
    pub fn try_connect_to(link: &std::path::Path) -> Option<Self> {
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(link).unwrap()).ok()?;
        Some(Self::of(socket))
    }

    /// On a socket that is connected.
    pub fn of(socket: OwnedFd) -> Self {
        let wait = std::time::Duration::from_secs(20);
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(wait)).unwrap();
        Self { socket, last: 0 }
    }

    pub fn register(server: &Server) -> Self {
        let this = Self::connect(server);
        assert_eq!(this.try_register(), Some(Status::Ok));
        this
    }

    pub fn try_register(&self) -> Option<Status> {
        self.try_register_as(true, false)
    }

    /// `first`: of its process. `maps`: it maps files for one-sided reads.
    pub fn try_register_as(&self, first: bool, maps: bool) -> Option<Status> {
        self.say(&ToControl::Register(Register {
            version: VERSION,
            service_blob: b"blob".to_vec(),
            held: 0,
            first,
            wrote: Vec::new(),
            maps,
        }));
        self.registered()
    }

    /// Registers with what it holds, each with its descriptor.
    pub fn register_with(&self, held: &[(Held, &OwnedFd)]) {
        let count = u32::try_from(held.len()).unwrap();
        let register = Register {
            version: VERSION,
            service_blob: b"blob".to_vec(),
            held: count,
            first: false,
            wrote: Vec::new(),
            maps: false,
        };
        self.say(&ToControl::Register(register));
        held.iter().for_each(|(held, descriptor)| self.say_with(&ToControl::Held(*held), descriptor));
    }

    /// The answer to a registration.
    pub fn registered(&self) -> Option<Status> {
        match self.hear()? {
            (ToDataplane::Registered(Registered { status }), None) => Some(status),
            other => panic!("not registered: {other:?}"),
        }
    }

    pub fn say_with(&self, message: &ToControl, descriptor: &OwnedFd) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let bytes = to_cbor(message);
        sendmsg(&self.socket, &[std::io::IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    pub fn say(&self, message: &ToControl) {
        self.say_bytes(&to_cbor(message));
    }

    pub fn say_bytes(&self, bytes: &[u8]) {
        let _ = send(&self.socket, bytes, SendFlags::NOSIGNAL);
    }

    /// The next message and the descriptor that came with it; `None` at the end.
    pub fn hear(&self) -> Option<(ToDataplane, Option<OwnedFd>)> {
        let mut bytes = vec![0; 65_536];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
        let got = recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?.bytes;
        if got == 0 {
            return None;
        }
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Some((from_cbor(&bytes[..got], got).unwrap(), descriptor))
    }

    pub fn redeem(&mut self, redeem: Redeem) -> Result<(Box<Grant>, OwnedFd), Status> {
        self.last += 1;
        let id = self.last;
        self.say(&ToControl::Redeem(Redeem { id, ..redeem }));
        match self.hear().expect("an answer") {
            (ToDataplane::Redeemed(redeemed), descriptor) => {
                assert_eq!(redeemed.id, id);
                match redeemed.result {
                    RedeemResult::Granted(grant) => Ok((grant, descriptor.expect("a descriptor"))),
                    RedeemResult::Refused(status) => {
                        assert!(descriptor.is_none());
                        Err(status)
                    }
                }
            }
            other => panic!("not an answer to redeem: {other:?}"),
        }
    }

    pub fn answer_gauges(&self) {
        match self.hear() {
            Some((ToDataplane::GetGauges(id), None)) => {
                let gauges = vec![Gauge { name: "channels".into(), value: 3 }];
                self.say(&ToControl::Gauges(Gauges { id, gauges }));
            }
            other => panic!("not a question for gauges: {other:?}"),
        }
    }
}

/// What dataplane tells of a binding when it registers again.
pub fn still_held(grant: &Grant) -> Held {
    Held {
        binding: grant.binding,
        open: grant.open,
        handle: grant.handle,
        epoch: grant.epoch,
        access: grant.access,
        ending: false,
        last_write_ns: 0,
        rules_version: grant.rules_version,
        transcript: grant.transcript,
    }
}

pub fn channel() -> ChannelIdentity {
    ChannelIdentity { transport: TransportKind::Memory, client: [1; 20], server: [2; 20] }
}

/// What dataplane would forward for a client that does everything right, on the channel and nonce given.
pub fn right(client: &Client, opened: &Opened, nonce: [u8; 32], access: Access) -> Redeem {
    let channel = channel();
    let client_challenge = [9; 32];
    let digest = BindTranscript {
        channel: &channel,
        server_nonce: &nonce,
        open_challenge: &opened.key.challenge,
        client_challenge: &client_challenge,
        resume_key: &opened.key.resume_key,
        volume: opened.key.volume,
        access,
        policy: opened.key.policy,
    }
    .digest();
    Redeem {
        id: 0,
        resume_key: opened.key.resume_key.clone(),
        client_challenge,
        server_nonce: nonce,
        proof: client.key.bind_secret(opened.open).client_proof(&digest),
        channel,
        access,
        policy: opened.key.policy,
        peer: "test".into(),
    }
}
