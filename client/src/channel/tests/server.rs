//! The scripted server: it answers as a data plane should, unless its script says otherwise.

use super::*;
use holdfast_shared::auth::{BindAnswer, BindTranscript, ChannelKeys, FrameKey, PayloadKey};
use holdfast_shared::types::{HandleId, RegionDescriptor};
use holdfast_shared::wire::data::{self, Body, Frame, Opcode, Writer};
use holdfast_transport::{Armed, Kind, Operation};
use holdfast_verbs::memory::Buffer;
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::{HashMap, VecDeque};
use zerocopy::IntoBytes;

/// What the server does otherwise than it should, and what it saw.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) policy: MacPolicy,
    pub(crate) credits: u16,
    pub(crate) wrong_proof: bool,
    pub(crate) bad_mac: bool,
    pub(crate) gap: bool,
    pub(crate) wrong_digest: bool,
    pub(crate) fence_after_bind: bool,
    /// All bindings are fenced now.
    pub(crate) fence: bool,
    /// Requests are not answered while this is on.
    pub(crate) hold: bool,
    /// So many are, all the same.
    pub(crate) let_go: usize,
    /// The next request is answered with this status; signed with the binding's key, or not at all.
    pub(crate) refuse: Option<(Status, bool)>,
    /// The hello allows transfers of any length.
    pub(crate) boundless: bool,
    pub(crate) held: usize,
    pub(crate) held_max: usize,
    pub(crate) unbinds: usize,
    pub(crate) stop: bool,
    /// Which run of a data plane this is; 0 for [9; 16].
    pub(crate) instance: u8,
    /// The handle it gives to every bind, sixteen times this; 0 for 7.
    pub(crate) handle: u8,
    /// What it says to binds and flushes; 0 for 5.
    pub(crate) verifier: u64,
    /// Binds made with another secret are refused; `None` for the server's own.
    pub(crate) secret: Option<BindSecret>,
    /// The next bind is refused so.
    pub(crate) refuse_bind: Option<Status>,
    pub(crate) file: Vec<u8>,
    /// Reads (r) and writes (w) carried out, by offset.
    pub(crate) log: Vec<(char, u64)>,
}

impl Script {
    fn verifier(&self) -> u64 {
        if self.verifier == 0 { 5 } else { self.verifier }
    }
}

pub(crate) struct Server {
    channel: Box<dyn Channel>,
    pool: Pool,
    script: Arc<Mutex<Script>>,
    kick: Arc<std::os::fd::OwnedFd>,
    secret: BindSecret,
    nonce: [u8; 32],
    sent: u64,
    received: u64,
    keys: HashMap<u32, ChannelKeys>,
    waiting: VecDeque<(u32, u32, Todo)>,
    fetches: HashMap<u64, Fetching>,
    next_token: u64,
}

/// Binding, request, offset, digest, and the sequence it was made with under a policy that has one.
type Fetching = (u32, u32, u64, [u8; 16], Option<u64>);

enum Todo {
    Read(data::Io),
    Fetch(data::Io, [u8; 16], u64),
    Done(u32),
    Unbind,
}

impl Server {
    pub(crate) fn new(
        channel: Box<dyn Channel>,
        pool: Pool,
        script: Arc<Mutex<Script>>,
        kick: Arc<std::os::fd::OwnedFd>,
        secret: BindSecret,
    ) -> Self {
        Self {
            channel,
            pool,
            script,
            kick,
            secret,
            nonce: [0; 32],
            sent: 0,
            received: 0,
            keys: HashMap::new(),
            waiting: VecDeque::new(),
            fetches: HashMap::new(),
            next_token: 100,
        }
    }

    pub(crate) fn run(mut self) {
        let (boundless, instance) = {
            let script = self.script.lock();
            (script.boundless, script.instance)
        };
        let hello = data::Hello {
            nonce: self.nonce,
            instance: [if instance == 0 { 9 } else { instance }; 16],
            credits: 1.into(),
            bindings_max: 8.into(),
            inline_max: 4096.into(),
            transfer_max: if boundless { u32::MAX } else { PIECE }.into(),
            sealed_transfer_max: if boundless { u32::MAX } else { PIECE / 2 }.into(),
            mappings_max: 0.into(),
            reserved: [0; 12],
        };
        self.send(Opcode::Hello, 0, 0, hello.as_bytes(), None);
        loop {
            let mut done = Vec::new();
            while self.channel.poll(&mut done) > 0 {
                for completion in done.drain(..) {
                    match (completion.kind, completion.outcome) {
                        (Kind::Recv, Ok(length)) => {
                            let mut bytes = completion.buffer[..length].to_vec();
                            let again = Operation::Recv { buffer: completion.buffer };
                            let _ = self.channel.submit(0, again);
                            self.request(&mut bytes);
                        }
                        (Kind::Fetch, Ok(length)) => {
                            self.fetched(completion.token, completion.buffer, length)
                        }
                        _ => {}
                    }
                }
            }
            if std::mem::take(&mut self.script.lock().fence) {
                let all: Vec<u32> = self.keys.keys().copied().collect();
                all.into_iter().for_each(|binding| self.fence(binding));
            }
            if self.script.lock().stop || self.channel.ended().is_some() {
                return;
            }
            if !self.waiting.is_empty() && self.may_answer() {
                self.answer();
                continue;
            }
            if self.channel.arm() == Armed::Idle {
                let mut fds = [
                    PollFd::from_borrowed_fd(self.channel.wake_fd(), PollFlags::IN),
                    PollFd::new(&*self.kick, PollFlags::IN),
                ];
                poll(&mut fds, None).unwrap();
                let _ = rustix::io::read(&*self.kick, &mut [0; 8]);
            }
        }
    }

    fn may_answer(&self) -> bool {
        let mut script = self.script.lock();
        if !script.hold {
            return true;
        }
        let may = script.let_go > 0;
        script.let_go = script.let_go.saturating_sub(1);
        may
    }

    fn policy(&self) -> MacPolicy {
        self.script.lock().policy
    }

    fn send(&mut self, opcode: Opcode, binding: u32, request: u32, body: &[u8], digest: Option<[u8; 16]>) {
        let mut buffer = self.pool.take().unwrap();
        let mut w = Writer::new(&mut buffer, opcode, 0, binding, request, self.sent).unwrap();
        // The one way to write a body of any type.
        match opcode {
            Opcode::Hello => drop(w.body(&<[u8; 80]>::try_from(body).unwrap()).unwrap()),
            Opcode::BindReply => drop(w.body(&<[u8; 112]>::try_from(body).unwrap()).unwrap()),
            Opcode::Reply => drop(w.body(&<[u8; 16]>::try_from(body).unwrap()).unwrap()),
            _ => drop(w.body(&<[u8; 8]>::try_from(body).unwrap()).unwrap()),
        }
        if let Some(digest) = digest {
            w.digest(&digest).unwrap();
        }
        let key = match self.keys.get(&binding) {
            Some(keys) => FrameKey::new(&keys.to_client, self.policy()),
            _ => FrameKey::unkeyed(),
        };
        let bad = self.script.lock().bad_mac && opcode == Opcode::Reply;
        let length = w.finish(|covered, mac| {
            key.sign(covered, mac);
            mac[0] ^= u8::from(bad);
        });
        self.sent += 1;
        self.channel.submit(1, Operation::Send { buffer, length }).unwrap();
    }

    fn reply(&mut self, binding: u32, request: u32, count: u32, digest: Option<[u8; 16]>) {
        if std::mem::take(&mut self.script.lock().gap) {
            self.sent += 1;
        }
        let reply = data::Reply {
            status: 0.into(),
            credits: 1.into(),
            count: count.into(),
            verifier: self.script.lock().verifier().into(),
        };
        self.send(Opcode::Reply, binding, request, reply.as_bytes(), digest);
    }

    fn request(&mut self, bytes: &mut [u8]) {
        let copy = bytes.to_vec();
        let frame = Frame::parse(&copy).unwrap();
        assert_eq!(frame.header.sequence.get(), self.received);
        self.received += 1;
        let (binding, request) = (frame.header.binding.get(), frame.header.request.get());
        if let Body::Bind(body) = frame.body {
            return self.bind(request, body, frame.payload);
        }
        let keys = self.keys[&binding].clone();
        assert!(FrameKey::new(&keys.to_server, self.policy()).verify(&frame), "the client's MAC");
        let todo = match frame.body {
            Body::Read(io) => Todo::Read(*io),
            Body::Write(io) if io.region == RegionDescriptor::NONE => {
                let mut payload = frame.payload.to_vec();
                let key = PayloadKey::new(&keys.to_server, self.policy());
                key.check(frame.header.sequence.get(), &mut payload, frame.digest).unwrap();
                self.store(io.offset.get(), &payload);
                Todo::Done(io.length.get())
            }
            Body::Write(io) => {
                Todo::Fetch(*io, frame.digest.copied().unwrap_or_default(), frame.header.sequence.get())
            }
            Body::Unbind => Todo::Unbind,
            _ => Todo::Done(0),
        };
        self.waiting.push_back((binding, request, todo));
        let mut script = self.script.lock();
        script.held = self.waiting.len();
        script.held_max = script.held_max.max(script.held);
    }

    fn answer(&mut self) {
        let Some((binding, request, todo)) = self.waiting.pop_front() else { return };
        let refuse = self.script.lock().refuse.take();
        if let Some((status, signed)) = refuse {
            let reply = data::Reply {
                status: status.number().into(),
                credits: 1.into(),
                count: 0.into(),
                verifier: self.script.lock().verifier().into(),
            };
            let binding = if signed { binding } else { 0 };
            return self.send(Opcode::Reply, binding, request, reply.as_bytes(), None);
        }
        match todo {
            Todo::Read(io) => {
                let mut bytes = {
                    let mut script = self.script.lock();
                    script.log.push(('r', io.offset.get()));
                    let start = usize::try_from(io.offset.get()).unwrap().min(script.file.len());
                    let end = (start + io.length.get() as usize).min(script.file.len());
                    script.file[start..end].to_vec()
                };
                let key = PayloadKey::new(&self.keys[&binding].to_client, self.policy());
                // The reply's sequence: the Place carries no frame.
                let mut digest = key.protect(self.sent, &mut bytes).unwrap();
                if let (Some(digest), true) = (&mut digest, self.script.lock().wrong_digest) {
                    digest[3] ^= 1;
                }
                let count = u32::try_from(bytes.len()).unwrap();
                if count > 0 {
                    let mut buffer = self.pool.take().unwrap();
                    buffer[..bytes.len()].copy_from_slice(&bytes);
                    let remote = io.region.part(0, count).unwrap();
                    self.channel.submit(2, Operation::Place { buffer, remote }).unwrap();
                }
                self.reply(binding, request, count, digest);
            }
            Todo::Fetch(io, digest, sequence) => {
                let buffer = self.pool.take().unwrap();
                self.next_token += 1;
                let covered = self.policy().covers_payload().then_some(sequence);
                self.fetches.insert(self.next_token, (binding, request, io.offset.get(), digest, covered));
                self.channel.submit(self.next_token, Operation::Fetch { buffer, remote: io.region }).unwrap();
            }
            Todo::Done(count) => self.reply(binding, request, count, None),
            Todo::Unbind => {
                self.script.lock().unbinds += 1;
                self.reply(binding, request, 0, None);
            }
        }
    }

    fn fetched(&mut self, token: u64, mut buffer: Buffer, length: usize) {
        let (binding, request, offset, digest, covered) = self.fetches.remove(&token).unwrap();
        let mut bytes = buffer[..length].to_vec();
        buffer.fill(0);
        drop(buffer);
        if let Some(sequence) = covered {
            let key = PayloadKey::new(&self.keys[&binding].to_server, self.policy());
            key.check(sequence, &mut bytes, Some(&digest)).unwrap();
        }
        self.store(offset, &bytes);
        self.reply(binding, request, u32::try_from(length).unwrap(), None);
    }

    fn store(&self, offset: u64, bytes: &[u8]) {
        let mut script = self.script.lock();
        script.log.push(('w', offset));
        let (start, file) = (usize::try_from(offset).unwrap(), &mut script.file);
        file.resize(file.len().max(start + bytes.len()), 0);
        file[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn bind(&mut self, request: u32, body: &data::Bind, key: &[u8]) {
        let (policy, access) = (self.policy(), Access::from_bits(body.access).unwrap());
        let identity = self.channel.identity().clone();
        let transcript = BindTranscript {
            channel: &identity,
            server_nonce: &self.nonce,
            open_challenge: &[4; 32],
            client_challenge: &body.challenge,
            resume_key: key,
            volume: VolumeId([6; 16]),
            access,
            policy,
        }
        .digest();
        self.nonce[0] += 1;
        let mut reply = data::BindReply {
            status: Status::BadKey.number().into(),
            credits: 0.into(),
            access: 0,
            policy: 0,
            reserved: [0; 2],
            handle: [0; 16],
            epoch: 0.into(),
            proof: [0; 32],
            nonce: self.nonce,
            verifier: 0.into(),
            reserved2: [0; 8],
        };
        let (secret, refuse, verifier) = {
            let mut script = self.script.lock();
            let secret = script.secret.clone().unwrap_or_else(|| self.secret.clone());
            (secret, script.refuse_bind.take(), script.verifier())
        };
        if let Some(status) = refuse {
            reply.status = status.number().into();
            return self.send(Opcode::BindReply, 0, request, reply.as_bytes(), None);
        }
        if !secret.client_proof_is_right(&transcript, &body.proof) {
            return self.send(Opcode::BindReply, 0, request, reply.as_bytes(), None);
        }
        let number = 256 * u32::from(self.nonce[0]) + 1;
        let handle = match self.script.lock().handle {
            0 => [7; 16],
            other => [other; 16],
        };
        let answer = BindAnswer { handle: HandleId(handle), epoch: 3, access, policy };
        let answered = answer.digest(&transcript);
        reply.status = 0.into();
        reply.credits = self.script.lock().credits.into();
        (reply.access, reply.policy) = (access.bits(), policy.number());
        (reply.handle, reply.epoch, reply.verifier) = (handle, 3.into(), verifier.into());
        reply.proof = secret.server_proof(&answered);
        reply.proof[31] ^= u8::from(self.script.lock().wrong_proof);
        self.keys.insert(number, secret.channel_keys(&answered));
        self.send(Opcode::BindReply, number, request, reply.as_bytes(), None);
        if self.script.lock().fence_after_bind {
            self.fence(number);
        }
    }

    fn fence(&mut self, binding: u32) {
        let notice = data::Notice { status: Status::Fenced.number().into(), reserved: [0; 6] };
        self.send(Opcode::Notice, binding, 0, notice.as_bytes(), None);
    }
}
