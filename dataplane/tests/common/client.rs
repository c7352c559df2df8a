//! A scripted client. Once warm it allocates nothing, so that allocations of the server can be counted beside it.

use super::Open;
use holdfast_shared::auth::{BindAnswer, BindTranscript, FrameKey, MacPolicy, PayloadKey};
use holdfast_shared::types::{Access, FRAME_BYTES_MAX, HandleId, RegionDescriptor, Status};
use holdfast_shared::wire::data::{Bind, Body, Flush, Frame, Hello, Io, Map, Mapped, Opcode, Unmap, Writer};
use holdfast_shared::wire::service::TransportKind;
use holdfast_transport::verbs::LaneEnd;
use holdfast_transport::{Channel, Completion, Kind, Operation, Registration, RemoteAccess, Setup};
use holdfast_verbs::memory::{Buffer, Pool, Region};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const REGION_BYTES: usize = 4 << 20;
const MESSAGES: usize = 512;

/// What the server said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Msg {
    Hello(Hello),
    BindReply { request: u32, status: Status, binding: u32, body: holdfast_shared::wire::data::BindReply },
    Reply { request: u32, status: Status, count: u32, binding: u32, digest: Option<[u8; 16]>, sequence: u64 },
    Notice { binding: u32, status: Status },
    Mapped { request: u32, body: Mapped },
}

struct Bound {
    number: u32,
    out: FrameKey,
    back: FrameKey,
    payload_out: PayloadKey,
    payload_back: PayloadKey,
}

pub struct Parts {
    pool: Pool,
}

impl Parts {
    pub fn setup(&self) -> Setup {
        let receives = (0..MESSAGES as u64 / 2).map(|n| (n, self.pool.take().unwrap())).collect();
        Setup { depth: MESSAGES / 2, receives_max: MESSAGES / 2, pools: vec![self.pool.clone()], receives }
    }
}

pub struct Client {
    bind_reply: Vec<u8>,
    pub channel: Box<dyn Channel>,
    pool: Pool,
    done: Vec<Completion>,
    frames: VecDeque<(Buffer, usize)>,
    pub hello: Option<Hello>,
    pub nonce: [u8; 32],
    pub credits: u16,
    pub sequence: u64,
    expected: u64,
    bound: Vec<Bound>,
    next_request: u32,
    pub memory: Registration,
    /// Other replies met while waiting for one.
    pub stash: VecDeque<Msg>,
    /// Descriptors that came with messages.
    pub given: Vec<OwnedFd>,
    /// Receives nothing when it sends.
    pub deaf: bool,
}

impl Client {
    pub fn parts() -> Parts {
        Parts { pool: Pool::new(FRAME_BYTES_MAX, MESSAGES).unwrap() }
    }

    pub fn new(channel: Box<dyn Channel>, parts: Parts) -> Self {
        let region = Region::shareable(REGION_BYTES).unwrap();
        let memory = channel.registrar().register(region, RemoteAccess::FetchAndPlace).unwrap();
        Self {
            channel,
            pool: parts.pool,
            done: Vec::with_capacity(MESSAGES * 2),
            frames: VecDeque::with_capacity(MESSAGES),
            hello: None,
            nonce: [0; 32],
            credits: 0,
            sequence: 0,
            expected: 0,
            bind_reply: Vec::new(),
            bound: Vec::new(),
            next_request: 1,
            memory,
            stash: VecDeque::with_capacity(MESSAGES),
            given: Vec::new(),
            deaf: false,
        }
    }

    pub fn hello(&mut self) -> Hello {
        let Some(Msg::Hello(hello)) = self.next() else { panic!("the server did not say hello") };
        self.hello = Some(hello);
        self.nonce = hello.nonce;
        self.credits = hello.credits.get();
        hello
    }

    pub fn region(&self) -> &Arc<Region> {
        self.memory.region()
    }

    pub fn descriptor(&self) -> RegionDescriptor {
        self.memory.descriptor()
    }

    /// Polls the channel once.
    pub fn pump(&mut self) {
        self.channel.poll(&mut self.done);
        for completion in self.done.drain(..) {
            if completion.kind == Kind::Recv {
                self.given.extend(completion.descriptor);
                if let Ok(length) = completion.outcome {
                    self.frames.push_back((completion.buffer, length));
                }
            }
        }
    }

    /// The next frame, its sequence and MAC checked. `None` once the channel has ended, or after 10 seconds.
    pub fn next(&mut self) -> Option<Msg> {
        if let Some(msg) = self.stash.pop_front() {
            return Some(msg);
        }
        self.receive()
    }

    fn receive(&mut self) -> Option<Msg> {
        let end = Instant::now() + Duration::from_secs(30);
        let mut rounds = 0u32;
        loop {
            self.pump();
            if let Some((buffer, length)) = self.frames.pop_front() {
                let msg = self.take_apart(&buffer[..length]);
                let _ = self.channel.submit(0, Operation::Recv { buffer });
                return Some(msg);
            }
            if self.channel.ended().is_some() || Instant::now() > end {
                return None;
            }
            rounds += 1;
            if rounds > 20 { std::thread::sleep(Duration::from_micros(50)) } else { std::thread::yield_now() }
        }
    }

    fn take_apart(&mut self, bytes: &[u8]) -> Msg {
        let frame = Frame::parse(bytes).unwrap();
        assert_eq!(frame.header.sequence.get(), self.expected, "the server's sequence has no gap");
        self.expected += 1;
        let (binding, request) = (frame.header.binding.get(), frame.header.request.get());
        let bound = self.bound.iter().find(|b| b.number == binding);
        match (bound, frame.opcode) {
            (Some(bound), Opcode::Reply | Opcode::Notice | Opcode::Mapped) => {
                assert!(bound.back.verify(&frame), "the server's MAC")
            }
            (None, Opcode::Reply | Opcode::Notice) => {
                assert_eq!(binding, 0, "an unknown binding");
                assert!(FrameKey::unkeyed().verify(&frame));
            }
            // The key comes with the answer: `bind` checks it.
            (_, Opcode::BindReply) if binding != 0 => self.bind_reply = bytes.to_vec(),
            _ => assert!(FrameKey::unkeyed().verify(&frame)),
        }
        let status = |n: u16| Status::from_number(n).unwrap();
        match frame.body {
            Body::Hello(hello) => Msg::Hello(*hello),
            Body::BindReply(body) => {
                Msg::BindReply { request, status: status(body.status.get()), binding, body: *body }
            }
            Body::Reply(body) => {
                assert_eq!(body.credits.get(), 1);
                Msg::Reply {
                    request,
                    status: status(body.status.get()),
                    count: body.count.get(),
                    binding,
                    digest: frame.digest.copied(),
                    sequence: frame.header.sequence.get(),
                }
            }
            Body::Notice(body) => Msg::Notice { binding, status: status(body.status.get()) },
            Body::Mapped(body) => Msg::Mapped { request, body: *body },
            other => panic!("a server does not send {other:?}"),
        }
    }

    pub fn message(&self) -> Buffer {
        self.pool.take().expect("the client's message buffers suffice")
    }

    /// Sends bytes as a message, whatever they are.
    pub fn send_raw(&mut self, buffer: Buffer, length: usize) {
        let mut operation = Operation::Send { buffer, length };
        loop {
            match self.channel.submit(1, operation) {
                Ok(()) => break,
                Err(rejected) if rejected.error == holdfast_transport::SubmitError::Full => {
                    operation = rejected.operation;
                    self.pump();
                }
                Err(_) => break,
            }
        }
        if self.deaf {
            self.channel.push();
        } else {
            self.pump();
        }
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let mut buffer = self.message();
        buffer[..bytes.len()].copy_from_slice(bytes);
        self.send_raw(buffer, bytes.len());
    }

    fn request(&mut self) -> u32 {
        self.next_request += 1;
        self.next_request
    }

    fn mac(&self, binding: u32) -> FrameKey {
        let bound = self.bound.iter().find(|b| b.number == binding);
        bound.map_or(FrameKey::unkeyed(), |b| b.out.clone())
    }

    /// Binds with everything right.
    pub fn bind(&mut self, open: &Open) -> Result<u32, Status> {
        self.bind_as(open, open.access, open.policy, |_| {})
    }

    /// Binds; `spoil` may change the body before it is sent.
    pub fn bind_as(
        &mut self,
        open: &Open,
        access: Access,
        policy: MacPolicy,
        spoil: impl FnOnce(&mut Bind),
    ) -> Result<u32, Status> {
        let digest = self.send_bind(open, access, policy, spoil);
        let Some(Msg::BindReply { status, binding, body, .. }) = self.next() else {
            panic!("no answer to the bind")
        };
        self.nonce = body.nonce;
        if status != Status::Ok {
            return Err(status);
        }
        // On this host what was shared before anything was proven is not mapped.
        if self.channel.identity().transport == TransportKind::Local && self.bound.is_empty() {
            let region = Arc::clone(self.region());
            self.memory = self.channel.registrar().register(region, RemoteAccess::FetchAndPlace).unwrap();
        }
        let answer = BindAnswer {
            handle: HandleId(body.handle),
            epoch: body.epoch.get(),
            access: Access::from_bits(body.access).unwrap(),
            policy: MacPolicy::from_number(body.policy).unwrap(),
        }
        .digest(&digest);
        assert!(open.secret.server_proof_is_right(&answer, &body.proof), "the server's proof");
        self.credits = body.credits.get();
        let keys = open.secret.channel_keys(&answer);
        let key = FrameKey::new(&keys.to_client, policy);
        assert!(key.verify(&Frame::parse(&self.bind_reply).unwrap()), "the bind reply's MAC");
        self.bound.push(Bound {
            number: binding,
            out: FrameKey::new(&keys.to_server, policy),
            back: key,
            payload_out: PayloadKey::new(&keys.to_server, policy),
            payload_back: PayloadKey::new(&keys.to_client, policy),
        });
        Ok(binding)
    }

    pub fn send_bind(
        &mut self,
        open: &Open,
        access: Access,
        policy: MacPolicy,
        spoil: impl FnOnce(&mut Bind),
    ) -> [u8; 32] {
        let digest = BindTranscript {
            channel: self.channel.identity(),
            server_nonce: &self.nonce,
            open_challenge: &open.challenge,
            client_challenge: &[0xC; 32],
            resume_key: &open.key,
            volume: open.volume,
            access,
            policy,
        }
        .digest();
        let mut body = Bind {
            challenge: [0xC; 32],
            proof: open.secret.client_proof(&digest),
            access: access.bits(),
            policy: policy.number(),
            reserved: [0; 6],
        };
        spoil(&mut body);
        let request = self.request();
        let mut buffer = self.message();
        let mut w = Writer::new(&mut buffer, Opcode::Bind, 0, 0, request, self.sequence).unwrap();
        w.body(&body).unwrap();
        w.payload(open.key.len()).unwrap().copy_from_slice(&open.key);
        let length = w.finish(|_, mac| *mac = [0; 16]);
        self.sequence += 1;
        self.send_raw(buffer, length);
        digest
    }

    /// Sends a read or write and returns its number.
    pub fn send_io(
        &mut self,
        opcode: Opcode,
        binding: u32,
        at: u64,
        length: u32,
        region: RegionDescriptor,
    ) -> u32 {
        self.send_request(opcode, binding, at, length, region, &[], None)
    }

    pub fn send_inline(&mut self, binding: u32, at: u64, length: u32, payload: &[u8]) -> u32 {
        self.send_request(Opcode::Write, binding, at, length, RegionDescriptor::NONE, payload, None)
    }

    /// Sends a read or write with all its parts.
    #[allow(clippy::too_many_arguments)]
    pub fn send_request(
        &mut self,
        opcode: Opcode,
        binding: u32,
        at: u64,
        length: u32,
        region: RegionDescriptor,
        payload: &[u8],
        digest: Option<[u8; 16]>,
    ) -> u32 {
        let request = self.request();
        let key = self.mac(binding);
        let mut buffer = self.message();
        let mut inline = [0; 4096];
        let inline = &mut inline[..payload.len()];
        inline.copy_from_slice(payload);
        let bound = self.bound.iter().find(|b| b.number == binding);
        let digest = match (digest, bound) {
            (None, Some(bound)) if !payload.is_empty() => {
                bound.payload_out.protect(self.sequence, inline).unwrap()
            }
            (digest, _) => digest,
        };
        let mut w = Writer::new(&mut buffer, opcode, 0, binding, request, self.sequence).unwrap();
        w.body(&Io { offset: at.into(), length: length.into(), reserved: 0.into(), region }).unwrap();
        if let Some(digest) = &digest {
            w.digest(digest).unwrap();
        }
        w.payload(payload.len()).unwrap().copy_from_slice(inline);
        let n = w.finish(|covered, mac| key.sign(covered, mac));
        self.sequence += 1;
        self.send_raw(buffer, n);
        request
    }

    pub fn send_flush(&mut self, binding: u32) -> u32 {
        let request = self.request();
        let key = self.mac(binding);
        let mut buffer = self.message();
        let mut w = Writer::new(&mut buffer, Opcode::Flush, 0, binding, request, self.sequence).unwrap();
        w.body(&Flush { reserved: 0.into() }).unwrap();
        let n = w.finish(|covered, mac| key.sign(covered, mac));
        self.sequence += 1;
        self.send_raw(buffer, n);
        request
    }

    pub fn send_map(&mut self, binding: u32, offset: u64, length: u64, lane: LaneEnd) -> u32 {
        let body = Map { offset: offset.into(), length: length.into(), lane, reserved: [0; 4] };
        self.send_plain(Opcode::Map, binding, |w| w.body(&body).map(drop).unwrap())
    }

    /// Maps; or why not.
    pub fn map(&mut self, binding: u32, offset: u64, length: u64, lane: LaneEnd) -> Result<Mapped, Status> {
        let wanted = self.send_map(binding, offset, length, lane);
        self.mapped(wanted)
    }

    /// The answer to a map.
    pub fn mapped(&mut self, wanted: u32) -> Result<Mapped, Status> {
        let is_it = |msg: &Msg| matches!(msg, Msg::Mapped { request, .. } | Msg::Reply { request, .. } if *request == wanted);
        loop {
            // Another's answer may have come first.
            let kept = self.stash.iter().position(is_it).and_then(|at| self.stash.remove(at));
            match kept.or_else(|| self.receive()) {
                Some(Msg::Mapped { request, body }) if request == wanted => return Ok(body),
                Some(Msg::Reply { request, status, .. }) if request == wanted => return Err(status),
                Some(other) => self.stash.push_back(other),
                None => panic!("no answer to the map"),
            }
        }
    }

    pub fn send_unmap(&mut self, binding: u32, mapping: u32) -> u32 {
        let body = Unmap { mapping: mapping.into(), reserved: 0.into() };
        self.send_plain(Opcode::Unmap, binding, |w| w.body(&body).map(drop).unwrap())
    }

    pub fn unmap(&mut self, binding: u32, mapping: u32) -> Status {
        let request = self.send_unmap(binding, mapping);
        self.answer(request).0
    }

    /// Asks for the descriptor of the open; see [`Client::given`].
    pub fn ask_descriptor(&mut self, binding: u32) -> Status {
        let request = self.send_plain(Opcode::Descriptor, binding, |_| ());
        self.answer(request).0
    }

    /// Sends a request that is a body and nothing else.
    fn send_plain(&mut self, opcode: Opcode, binding: u32, body: impl FnOnce(&mut Writer<'_>)) -> u32 {
        let (request, key) = (self.request(), self.mac(binding));
        let mut buffer = self.message();
        let mut w = Writer::new(&mut buffer, opcode, 0, binding, request, self.sequence).unwrap();
        body(&mut w);
        let length = w.finish(|covered, mac| key.sign(covered, mac));
        self.sequence += 1;
        self.send_raw(buffer, length);
        request
    }

    pub fn send_unbind(&mut self, binding: u32) -> u32 {
        let request = self.request();
        let key = self.mac(binding);
        let mut buffer = self.message();
        let w = Writer::new(&mut buffer, Opcode::Unbind, 0, binding, request, self.sequence).unwrap();
        let n = w.finish(|covered, mac| key.sign(covered, mac));
        self.sequence += 1;
        self.send_raw(buffer, n);
        request
    }

    /// Waits for the answer to a request; what else comes is kept.
    pub fn answer(&mut self, wanted: u32) -> (Status, u32) {
        let full = self.full_answer(wanted);
        (full.0, full.1)
    }

    pub fn full_answer(&mut self, wanted: u32) -> (Status, u32, Option<[u8; 16]>, u64) {
        loop {
            let kept =
                self.stash.iter().position(|m| matches!(m, Msg::Reply { request, .. } if *request == wanted));
            let msg = kept.and_then(|at| self.stash.remove(at));
            match msg.or_else(|| self.receive()) {
                Some(Msg::Reply { request, status, count, digest, sequence, .. }) if request == wanted => {
                    return (status, count, digest, sequence);
                }
                Some(other) => self.stash.push_back(other),
                None => panic!(
                    "no answer to request {wanted}; kept {:?}, ended {:?}",
                    self.stash,
                    self.channel.ended()
                ),
            }
        }
    }

    /// Reads into the region's beginning, and checks the payload as the policy wants it.
    pub fn read(&mut self, binding: u32, at: u64, length: u32) -> (Status, Vec<u8>) {
        let request = self.send_io(Opcode::Read, binding, at, length, self.descriptor());
        let (status, count, digest, sequence) = self.full_answer(request);
        let mut data = vec![0; count as usize];
        self.region().copy_out(0, &mut data).unwrap();
        if count > 0 && status == Status::Ok {
            let bound = self.bound.iter().find(|b| b.number == binding).unwrap();
            bound.payload_back.check(sequence, &mut data, digest.as_ref()).unwrap();
        } else {
            assert_eq!(digest, None);
        }
        (status, data)
    }

    /// Writes from the region's beginning, protected as the policy wants it.
    pub fn write(&mut self, binding: u32, at: u64, data: &[u8]) -> (Status, u32) {
        let mut copy = data.to_vec();
        let bound = self.bound.iter().find(|b| b.number == binding).unwrap();
        let digest =
            if data.is_empty() { None } else { bound.payload_out.protect(self.sequence, &mut copy).unwrap() };
        self.region().copy_in(0, &copy).unwrap();
        let length = u32::try_from(data.len()).unwrap();
        let request = self.send_request(Opcode::Write, binding, at, length, self.descriptor(), &[], digest);
        self.answer(request)
    }

    pub fn write_inline(&mut self, binding: u32, at: u64, data: &[u8]) -> (Status, u32) {
        let request = self.send_inline(binding, at, u32::try_from(data.len()).unwrap(), data);
        self.answer(request)
    }

    pub fn flush(&mut self, binding: u32) -> Status {
        let request = self.send_flush(binding);
        self.answer(request).0
    }

    /// The notice that ends the channel, and its end.
    pub fn expect_end(&mut self, wanted: Status) {
        loop {
            match self.next() {
                Some(Msg::Notice { binding: 0, status }) => {
                    assert_eq!(status, wanted);
                    break;
                }
                Some(_) => {}
                None => panic!("no notice before the end {:?}", self.channel.ended()),
            }
        }
        assert_eq!(self.next(), None, "something after the last frame");
        assert!(self.channel.ended().is_some(), "the channel was not closed");
    }
}
