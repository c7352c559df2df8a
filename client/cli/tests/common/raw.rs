//! A client that says whatever a test wants it to: frames by hand over the real transports.

use super::DEADLINE;
use holdfast_client::KeyGrant;
use holdfast_shared::auth::{
    BindAnswer, BindSecret, BindTranscript, ChannelIdentity, ChannelKeys, FrameKey, MacPolicy,
};
use holdfast_shared::types::{Access, FRAME_BYTES_MAX, HandleId, RegionDescriptor, Status};
use holdfast_shared::wire::data::{Bind, Body, Frame, Hello, Io, Opcode, Reply, Writer};
use holdfast_shared::wire::service::{ServiceBlob, TransportKind};
use holdfast_transport::{Channel, Kind, Operation, Registration, RemoteAccess, Setup, local, tcp, verbs};
use holdfast_verbs::memory::{Pool, Region};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use zerocopy::{FromZeros, Immutable, IntoBytes};

/// One data channel, driven by hand.
pub struct Raw {
    channel: Box<dyn Channel>,
    pool: Pool,
    inbox: std::collections::VecDeque<Vec<u8>>,
    registration: Registration,
    /// The next frame's sequence.
    pub sequence: u64,
    /// As the server said it.
    pub hello: Hello,
    /// The nonce for the next bind.
    pub nonce: [u8; 32],
}

/// A binding made by hand.
pub struct Bound {
    /// Its number in frames.
    pub binding: u32,
    /// Its keys.
    pub keys: ChannelKeys,
    /// What signs its frames.
    pub key: FrameKey,
}

/// What can be wrong with a bind.
pub struct Claim<'a> {
    pub resume_key: &'a [u8],
    pub secret: &'a BindSecret,
    pub grant: &'a KeyGrant,
    /// Whose channel the proof is made for; `None` for this one.
    pub identity: Option<&'a ChannelIdentity>,
    pub nonce: [u8; 32],
    pub policy: MacPolicy,
    pub access: Access,
}

impl Raw {
    /// Connects to the data plane of a grant.
    pub fn connect(kind: &str, grant: &KeyGrant) -> Self {
        let blob = ServiceBlob::decode(&grant.service_blob).unwrap();
        let endpoint = blob.endpoints.iter().find(|e| e.transport.name() == kind).unwrap();
        let at = endpoint.address.as_ref().unwrap();
        let address = || SocketAddr::new(at.parse().unwrap(), endpoint.port);
        let pool = Pool::new(2 * FRAME_BYTES_MAX, 256).unwrap();
        let setup = Setup {
            depth: 128,
            receives_max: 100,
            pools: vec![pool.clone()],
            receives: (0..100).map(|t| (t, pool.take().unwrap())).collect(),
        };
        let channel: Box<dyn Channel> = match endpoint.transport {
            TransportKind::Local => Box::new(local::connect(at.as_ref(), DEADLINE, setup).unwrap()),
            TransportKind::Verbs => Box::new(verbs::connect(address(), DEADLINE, setup).unwrap()),
            _ => Box::new(tcp::connect(address(), DEADLINE, setup).unwrap()),
        };
        let region = Region::shareable(1 << 20).unwrap();
        let registration = channel.registrar().register(region, RemoteAccess::FetchAndPlace).unwrap();
        let nothing = Hello::new_zeroed();
        let mut raw = Self {
            channel,
            pool,
            inbox: Default::default(),
            registration,
            sequence: 0,
            hello: nothing,
            nonce: [0; 32],
        };
        let first = raw.receive().expect("the server speaks first");
        let frame = Frame::parse(&first).unwrap();
        let Body::Hello(hello) = frame.body else { panic!("{:?}", frame.body) };
        (raw.hello, raw.nonce) = (*hello, hello.nonce);
        raw
    }

    pub fn identity(&self) -> ChannelIdentity {
        self.channel.identity().clone()
    }

    /// The registered megabyte.
    pub fn region(&self) -> RegionDescriptor {
        self.registration.descriptor()
    }

    /// Sends bytes as one message.
    pub fn send(&mut self, bytes: &[u8]) {
        let mut buffer = self.pool.take().unwrap();
        buffer[..bytes.len()].copy_from_slice(bytes);
        let _ = self.channel.submit(0, Operation::Send { buffer, length: bytes.len() });
        self.pump();
    }

    /// Builds a frame with the next sequence and sends it.
    pub fn frame<T: IntoBytes + Immutable>(
        &mut self,
        opcode: Opcode,
        binding: u32,
        body: &T,
        payload: &[u8],
        key: &FrameKey,
    ) {
        let mut bytes = [0; FRAME_BYTES_MAX];
        let mut w = Writer::new(&mut bytes, opcode, 0, binding, 77, self.sequence).unwrap();
        w.body(body).unwrap();
        w.payload(payload.len()).unwrap().copy_from_slice(payload);
        let length = w.finish(|covered, mac| key.sign(covered, mac));
        self.sequence += 1;
        self.send(&bytes[..length]);
    }

    /// A read of `length` bytes into the region named.
    pub fn read(&mut self, bound: &Bound, offset: u64, length: u32, region: RegionDescriptor) {
        let io = Io { offset: offset.into(), length: length.into(), reserved: 0.into(), region };
        self.frame(Opcode::Read, bound.binding, &io, b"", &bound.key);
    }

    fn pump(&mut self) {
        let mut done = Vec::new();
        self.channel.poll(&mut done);
        for completion in done {
            if let (Kind::Recv, Ok(length)) = (completion.kind, completion.outcome) {
                self.inbox.push_back(completion.buffer[..length].to_vec());
                let _ = self.channel.submit(0, Operation::Recv { buffer: completion.buffer });
            }
        }
    }

    /// The next message; `None` when the channel has ended.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let start = Instant::now();
        loop {
            self.pump();
            if let Some(message) = self.inbox.pop_front() {
                return Some(message);
            }
            if self.channel.ended().is_some() {
                return None;
            }
            assert!(start.elapsed() < DEADLINE, "neither a message nor the end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The status of the next reply.
    pub fn reply(&mut self) -> Reply {
        let message = self.receive().expect("a reply");
        let frame = Frame::parse(&message).unwrap();
        match frame.body {
            Body::Reply(reply) => *reply,
            other => panic!("{other:?}"),
        }
    }

    /// The status of the next reply, or of the notice that comes in its place: of a fence, for one.
    pub fn outcome(&mut self) -> Status {
        let message = self.receive().expect("a reply or a notice");
        let number = match Frame::parse(&message).unwrap().body {
            Body::Reply(reply) => reply.status.get(),
            Body::Notice(notice) => notice.status.get(),
            other => panic!("{other:?}"),
        };
        Status::from_number(number).unwrap()
    }

    /// Expects the channel to end, and gives the status of the notice that came first, if one did.
    pub fn end(&mut self) -> Option<Status> {
        let mut status = None;
        while let Some(message) = self.receive() {
            if let Body::Notice(notice) = Frame::parse(&message).unwrap().body {
                status = Status::from_number(notice.status.get());
            }
        }
        status
    }

    /// The honest claim for an open.
    pub fn claim<'a>(&self, grant: &'a KeyGrant, secret: &'a BindSecret) -> Claim<'a> {
        Claim {
            resume_key: &grant.resume_key,
            secret,
            grant,
            identity: None,
            nonce: self.nonce,
            policy: grant.policy,
            access: Access::READ,
        }
    }

    /// Binds; gives the binding or the status, and the raw answer.
    pub fn bind(&mut self, claim: &Claim<'_>) -> (Result<Bound, Status>, Vec<u8>) {
        let challenge = [42; 32];
        let mine = self.identity();
        let transcript = BindTranscript {
            channel: claim.identity.unwrap_or(&mine),
            server_nonce: &claim.nonce,
            open_challenge: &claim.grant.challenge,
            client_challenge: &challenge,
            resume_key: claim.resume_key,
            volume: claim.grant.volume,
            access: claim.access,
            policy: claim.policy,
        }
        .digest();
        let proof = claim.secret.client_proof(&transcript);
        let body = Bind {
            challenge,
            proof,
            access: claim.access.bits(),
            policy: claim.policy.number(),
            reserved: [0; 6],
        };
        self.frame(Opcode::Bind, 0, &body, claim.resume_key, &FrameKey::unkeyed());
        let Some(answer) = self.receive() else { return (Err(Status::Protocol), Vec::new()) };
        let frame = Frame::parse(&answer).unwrap();
        let Body::BindReply(reply) = frame.body else {
            let Body::Notice(notice) = frame.body else { panic!("{:?}", frame.body) };
            return (Err(Status::from_number(notice.status.get()).unwrap()), Vec::new());
        };
        self.nonce = reply.nonce;
        let status = Status::from_number(reply.status.get()).unwrap();
        // What differs between two refusals must be nonce and sequence alone.
        let mut rest = answer.clone();
        let at = answer.windows(32).position(|w| w == reply.nonce).unwrap();
        rest[at..at + 32].fill(0);
        rest[16..24].fill(0);
        if status != Status::Ok {
            return (Err(status), rest);
        }
        let bind_answer = BindAnswer {
            handle: HandleId(reply.handle),
            epoch: reply.epoch.get(),
            access: Access::from_bits(reply.access).unwrap(),
            policy: MacPolicy::from_number(reply.policy).unwrap(),
        };
        let answered = bind_answer.digest(&transcript);
        assert!(claim.secret.server_proof_is_right(&answered, &reply.proof), "the server proves itself too");
        let keys = claim.secret.channel_keys(&answered);
        let theirs = FrameKey::new(&keys.to_client, bind_answer.policy);
        assert!(theirs.verify(&frame), "the new key vouches for the whole answer");
        let key = FrameKey::new(&keys.to_server, bind_answer.policy);
        (Ok(Bound { binding: frame.header.binding.get(), keys, key }), rest)
    }
}
