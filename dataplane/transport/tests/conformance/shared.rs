//! What only local channels have: memory of the client that the server gets at by itself, and peers that spoil what is shared.
//!
//! The raw peers here know the area's layout as docs/PROTOCOL.md has it.

use crate::fabrics::Local;
use crate::kit::*;
use holdfast_shared::types::RegionDescriptor;
use holdfast_transport::local::{LocalListener, connect};
use holdfast_transport::{ChannelError, Kind, Listener, Operation, Registration, RemoteAccess, Setup};
use holdfast_verbs::memory::{
    Pool, RecvSegment, Region, SendSegment, recv_segments_and_descriptor, send_segments,
    send_segments_and_descriptor,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const AREA_BYTES: usize = 8192 + 2 * RING;
const RING: usize = 128 << 10;
const TO_SERVER_TAIL: usize = 0;
const TO_SERVER_HEAD: usize = 64;
const TO_CLIENT_TAIL: usize = 128;
const TO_CLIENT_HEAD: usize = 192;
const WORDS: usize = 4096;
const LENGTH: usize = 100_000;

/// Both ends, with the area in place, and a region of the client.
fn shared() -> (End, End, Registration) {
    let sizes = Sizes { buffer_len: LENGTH, buffers: 24, ..Sizes::default() };
    let (mut client, mut server) = ends::<Local>(sizes, 4);
    client.send(0, b"ready");
    drive(&mut [&mut client, &mut server], |ends| ends[1].count(Kind::Recv) == 1);
    server.done.clear();
    let registration = client.register(LENGTH, RemoteAccess::FetchAndPlace);
    (client, server, registration)
}

/// Polls this end only, and takes its completion.
fn alone(end: &mut End) -> holdfast_transport::Completion {
    end.pump();
    end.done.pop_front().expect("it needs nobody else")
}

#[test]
fn bytes_move_while_the_client_does_nothing() {
    let (mut client, mut server, registration) = shared();
    let bytes = pattern(1, LENGTH);
    server.place(1, &bytes, registration.descriptor());
    assert_eq!(ok(&alone(&mut server), Kind::Place), LENGTH);
    assert!(bytes_of(registration.region(), 0, LENGTH) == bytes);
    let (start, length) = (4097, 70_001);
    server.fetch(2, registration.descriptor().part(start, length).unwrap());
    let fetched = alone(&mut server);
    assert_eq!(ok(&fetched, Kind::Fetch), length as usize);
    assert!(fetched.buffer[..length as usize] == bytes[start as usize..(start + length) as usize]);
    // Straight at it, for who asks: within, and as it was allowed.
    let remote = registration.descriptor().part(10, 5).unwrap();
    let mut seen = 0;
    assert!(server.channel.reach(remote, Kind::Place, &mut |there| {
        there.store(b"hello").unwrap();
        seen = there.len();
    }));
    assert_eq!((seen, &bytes_of(registration.region(), 9, 7)[1..6]), (5, &b"hello"[..]));
    let beyond = RegionDescriptor::new(remote.address() + LENGTH as u64, remote.rkey(), 5);
    assert!(!server.channel.reach(beyond, Kind::Place, &mut |_| panic!("outside")));
    let read_only = client.register(64, RemoteAccess::Fetch);
    assert!(!server.channel.reach(read_only.descriptor(), Kind::Place, &mut |_| panic!("not allowed")));
    assert!(server.channel.reach(read_only.descriptor(), Kind::Fetch, &mut |_| ()));
    // And not once it is withdrawn, nor when the client has closed.
    drop(read_only);
    assert!(!server.channel.reach(remote.part(0, 1).unwrap(), Kind::Recv, &mut |_| panic!("nonsense")));
    client.channel.close();
    assert!(!server.channel.reach(remote, Kind::Place, &mut |_| panic!("the client has closed")));
    drop(registration);
}

#[test]
fn a_withdrawal_waits_for_the_server_that_is_at_it() {
    let (_client, mut server, registration) = shared();
    let (remote, region) = (registration.descriptor(), registration.region().clone());
    let mut registration = Some(registration);
    std::thread::scope(|scope| {
        let mut withdrawal = None;
        assert!(server.channel.reach(remote, Kind::Place, &mut |there| {
            let taken = registration.take();
            let thread = scope.spawn(move || drop(taken));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!thread.is_finished(), "bytes may still move");
            there.store(b"the last").unwrap();
            withdrawal = Some(thread);
        }));
        withdrawal.unwrap().join().unwrap();
    });
    assert_eq!(bytes_of(&region, 0, 8), b"the last");
    assert!(!server.channel.reach(remote, Kind::Place, &mut |_| panic!("withdrawn")));
}

#[test]
fn regions_come_and_go_and_words_are_used_again() {
    let (mut client, mut server, registration) = shared();
    for round in 0..600u64 {
        let one = client.register(4096, RemoteAccess::Place);
        let other = client.register(8192, RemoteAccess::Place);
        server.place(round, &pattern(round, 4096), one.descriptor());
        assert_eq!(ok(&alone(&mut server), Kind::Place), 4096, "round {round}");
        assert!(bytes_of(one.region(), 0, 4096) == pattern(round, 4096));
        let gone = one.descriptor();
        drop(one);
        assert!(!server.channel.reach(gone, Kind::Place, &mut |_| panic!("round {round}: withdrawn")));
        assert!(server.channel.reach(other.descriptor(), Kind::Place, &mut |_| ()));
        drop(other);
    }
    client.pump();
    drop(registration);
    assert!(!client.has_ended() && !server.has_ended());
}

#[test]
fn what_cannot_be_shared_is_reached_by_frames() {
    let (mut client, mut server, _registration) = shared();
    let registrar = client.channel.registrar();
    // Not a memory file; and more regions than there are words.
    let private = registrar.register(Region::new(5000).unwrap(), RemoteAccess::FetchAndPlace).unwrap();
    let _many: Vec<_> = (0..300).map(|_| client.register(64, RemoteAccess::Place)).collect();
    let late = client.register(5000, RemoteAccess::FetchAndPlace);
    for registration in [private, late] {
        let remote = registration.descriptor();
        assert!(!server.channel.reach(remote, Kind::Place, &mut |_| panic!("it is not shared")));
        server.place(1, &pattern(7, 5000), remote);
        server.send(2, b"placed");
        server.fetch(3, remote);
        drive(&mut [&mut client, &mut server], |ends| ends[1].done.len() == 3);
        let fetched = server.done.drain(..).find(|done| done.kind == Kind::Fetch).unwrap();
        assert!(fetched.buffer[..5000] == pattern(7, 5000));
        assert!(bytes_of(registration.region(), 0, 5000) == pattern(7, 5000));
        client.done.clear();
        client.recv(9);
    }
}

#[test]
fn all_clients_together_share_no_more_than_was_said() {
    let at = Place::new();
    let mut listener = LocalListener::bind(&at.socket(), 0o600).unwrap().with_shared_bytes_max(400 << 10);
    let mut pairs: Vec<_> = (0..6).map(|_| pair(&mut listener, &at)).collect();
    let mut held = Vec::new();
    for (client, server) in &mut pairs {
        // A quarter for each: the second does not fit.
        for _ in 0..2 {
            let registration = client.register(80 << 10, RemoteAccess::FetchAndPlace);
            let reached = server.channel.reach(registration.descriptor(), Kind::Place, &mut |_| ());
            held.push((registration, reached));
        }
    }
    let reached: Vec<bool> = held.iter().map(|(_, reached)| *reached).collect();
    assert_eq!(reached.iter().filter(|reached| **reached).count(), 5, "{reached:?}");
    assert!(reached.chunks(2).take(5).all(|of_one| of_one == [true, false]), "{reached:?}");
    // What was not is served; what goes makes room.
    let (last, _) = held.pop().unwrap();
    let (client, server) = pairs.last_mut().unwrap();
    server.place(1, &[5; 1000], last.descriptor().part(0, 1000).unwrap());
    server.send(2, b"placed");
    drive(&mut [client, server], |ends| ends[0].count(Kind::Recv) == 1);
    assert!(bytes_of(last.region(), 0, 1000) == [5; 1000]);
    drop((held, last));
    pairs.drain(..5).for_each(drop);
    let (client, server) = &mut pairs[0];
    let again = client.register(80 << 10, RemoteAccess::Place);
    assert!(server.channel.reach(again.descriptor(), Kind::Place, &mut |_| ()));
}

#[test]
fn a_client_that_makes_holes_in_its_memory_is_served_zeroes() {
    let (_client, mut server, registration) = shared();
    server.place(1, &[9; LENGTH], registration.descriptor());
    ok(&alone(&mut server), Kind::Place);
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(registration.region().file().unwrap(), punch, 0, 1 << 20).unwrap();
    server.fetch(2, registration.descriptor());
    assert!(alone(&mut server).buffer[..LENGTH] == [0; LENGTH]);
    server.place(3, &[1; 5000], registration.descriptor().part(0, 5000).unwrap());
    ok(&alone(&mut server), Kind::Place);
}

/// A directory with a socket.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        use std::sync::atomic::AtomicU32;
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("holdfast-shared-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn victim_setup(posted: usize) -> (Pool, Setup) {
    let pool = Pool::new(64 << 10, 32).unwrap();
    let setup = setup(&pool, Sizes::default(), posted);
    (pool, setup)
}

/// Two ends that have met.
fn pair(listener: &mut LocalListener, at: &Place) -> (End, End) {
    let ((ours, client), (theirs, server)) = (victim_setup(2), victim_setup(2));
    let client = connect(&at.socket(), PATIENCE, client).unwrap();
    let mut server = Some(server);
    let server = listener.accept(&mut |_| server.take()).unwrap();
    let (mut client, mut server) = (End::new(Box::new(client), ours), End::new(server, theirs));
    client.send(0, b"ready");
    drive(&mut [&mut client, &mut server], |ends| ends[1].count(Kind::Recv) == 1);
    (client, server)
}

fn note(kind: u8, access: u8, slot: u16, length: u32, address: u64, rkey: u32) -> Vec<u8> {
    let mut bytes = vec![kind, access];
    bytes.extend(slot.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(address.to_le_bytes());
    bytes.extend(rkey.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

/// The server's end of a channel whose client is a raw socket, which has the area.
struct RawClient {
    server: End,
    socket: UnixStream,
    area: Option<OwnedFd>,
    _at: Place,
}

impl RawClient {
    /// It has been handed the area, and said nothing.
    fn silent() -> Self {
        let at = Place::new();
        let mut listener = LocalListener::bind(&at.socket(), 0o600).unwrap();
        let socket = UnixStream::connect(at.socket()).unwrap();
        let (pool, setup) = victim_setup(2);
        let mut setup = Some(setup);
        let server = End::new(listener.accept(&mut |_| setup.take()).unwrap(), pool);
        let mut bytes = [0; 64];
        let (count, area) =
            recv_segments_and_descriptor(socket.as_fd(), &mut [RecvSegment::slice(&mut bytes)]).unwrap();
        let expected = note(1, 0, 1, RING as u32, 1 << 30, 256);
        assert_eq!(bytes[..count], expected, "the area, and nothing else");
        Self { server, socket, area, _at: at }
    }

    /// It has taken the area, as it should.
    fn ready() -> (Self, Arc<Region>) {
        let mut raw = Self::silent();
        let area = Region::adopt(raw.area.take().unwrap(), AREA_BYTES).unwrap();
        raw.tell(&note(2, 0, 0, 0, 0, 0), None);
        raw.server.send(1, b"hello");
        drive_for(&mut [&mut raw.server], Duration::from_millis(20), |ends| !ends[0].done.is_empty());
        assert_eq!(ok(&raw.server.next(), Kind::Send), 5, "the server begins when the client is ready");
        (raw, area)
    }

    fn tell(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) {
        let segments = [SendSegment::slice(bytes)];
        match descriptor {
            Some(descriptor) => {
                send_segments_and_descriptor(self.socket.as_fd(), &segments, descriptor).unwrap()
            }
            None => send_segments(self.socket.as_fd(), &segments).unwrap(),
        };
    }

    #[track_caller]
    fn expect_dropped(mut self, what: &str) {
        misbehaved(&mut self.server, what);
    }
}

#[track_caller]
fn misbehaved(end: &mut End, what: &str) {
    let ended = drive_for(&mut [end], PATIENCE, |ends| ends[0].has_ended());
    let why = end.channel.ended();
    assert!(ended && matches!(why, Some(ChannelError::Misbehaved(_))), "{what}: {why:?}");
    drive(&mut [end], |ends| ends[0].pool.available() + ends[0].done.len() == ends[0].pool.capacity());
}

#[test]
fn notes_that_make_no_sense_end_the_channel() {
    let cases = [
        ("an unknown kind", note(9, 0, 0, 0, 0, 0)),
        ("nothing but ones", vec![0xFF; 24]),
        ("an area from the client", note(1, 0, 1, RING as u32, 0, 0)),
        ("a descriptor from the client", note(6, 0, 0, 0, 0, 0)),
        ("ready again", note(2, 0, 0, 0, 0, 0)),
        ("a bell with something in it", note(3, 0, 0, 0, 0, 7)),
        ("a region of no bytes", note(4, 3, 0, 0, 4096, 7)),
        ("a region without access", note(4, 0, 0, 64, 4096, 7)),
        ("a region beyond the words", note(4, 3, 256, 64, 4096, 7)),
        ("a region that is too large", note(4, 3, 0, u32::MAX, 4096, 7)),
    ];
    for (what, bytes) in cases {
        let (raw, _area) = RawClient::ready();
        raw.tell(&bytes, None);
        raw.expect_dropped(what);
    }
}

#[test]
fn an_area_that_is_not_frozen_is_not_touched() {
    // It only says that it is ready.
    let raw = RawClient::silent();
    raw.tell(&note(2, 0, 0, 0, 0, 0), None);
    raw.expect_dropped("not frozen");
    // It has made a hole first.
    let mut raw = RawClient::silent();
    let area = raw.area.take().unwrap();
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&area, punch, 8192, 4096).unwrap();
    let seals = rustix::fs::SealFlags::FUTURE_WRITE | rustix::fs::SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&area, seals).unwrap();
    raw.tell(&note(2, 0, 0, 0, 0, 0), None);
    raw.expect_dropped("a hole");
    // One that never says anything holds nobody up, and its end is seen.
    let mut raw = RawClient::silent();
    raw.server.send(1, b"waits");
    drive_for(&mut [&mut raw.server], Duration::from_millis(20), |_| false);
    assert!(raw.server.done.is_empty() && !raw.server.has_ended());
    drop(raw.socket);
    drive(&mut [&mut raw.server], |ends| ends[0].has_ended());
    assert_eq!(raw.server.channel.ended(), Some(ChannelError::Disconnected));
}

#[test]
fn only_sealed_memory_files_are_mapped() {
    let region = |length: u32| note(4, 3, 0, length, 4096, 7);
    let loose = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&loose, 4096).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    for (what, file) in [("it may shrink", loose.as_fd()), ("a pipe", pipe.as_fd()), ("null", null.as_fd())] {
        let (raw, _area) = RawClient::ready();
        raw.tell(&region(64), Some(file));
        raw.expect_dropped(what);
    }
    let short = Region::shareable(4096).unwrap();
    let (raw, _area) = RawClient::ready();
    raw.tell(&region(4097), short.file());
    raw.expect_dropped("shorter than it says");
    let (raw, _area) = RawClient::ready();
    raw.tell(&region(64), short.file());
    raw.tell(&region(64), short.file());
    raw.expect_dropped("two of one key");
    // Without a descriptor, which may be lost on the way, there is none, and no harm.
    let (mut raw, _area) = RawClient::ready();
    raw.tell(&region(64), None);
    drive_for(&mut [&mut raw.server], Duration::from_millis(20), |_| false);
    assert!(!raw.server.has_ended());
}

#[test]
fn words_of_a_client_that_make_no_sense_end_the_channel() {
    for (what, at, word) in [
        ("a tail far ahead", TO_SERVER_TAIL, RING as u64 + 1),
        ("a tail behind", TO_SERVER_TAIL, u64::MAX),
        ("a tail beyond everything", TO_SERVER_TAIL, 1 << 63),
        ("a head that was never written", TO_CLIENT_HEAD, 1 << 40),
        ("a head far behind", TO_CLIENT_HEAD, (5u64 + 24).wrapping_sub(RING as u64 + 1)),
    ] {
        let (mut raw, area) = RawClient::ready();
        area.word(at).unwrap().store(word, Ordering::SeqCst);
        // The server finds out when it has something to write, at the latest when it asks how much fits.
        let full = vec![3; 60 << 10];
        for token in 0..4 {
            raw.server.send(token, &full);
        }
        raw.tell(&note(3, 0, 0, 0, 0, 0), None);
        raw.expect_dropped(what);
    }
}

#[test]
fn frames_of_noise_in_a_ring_end_the_channel() {
    for seed in 1..60 {
        let (mut raw, area) = RawClient::ready();
        area.copy_in(8192, &pattern(seed, 4096)).unwrap();
        area.word(TO_SERVER_TAIL).unwrap().store(4096, Ordering::SeqCst);
        raw.tell(&note(3, 0, 0, 0, 0, 0), None);
        drive(&mut [&mut raw.server], |ends| ends[0].has_ended());
        // It goes on scribbling over all there is: nobody minds any more.
        area.copy_in(0, &pattern(seed, AREA_BYTES)).unwrap();
        raw.expect_dropped("noise");
    }
}

#[test]
fn a_client_that_scribbles_over_everything_harms_itself_alone() {
    for seed in 1..40u64 {
        let (mut raw, area) = RawClient::ready();
        let region = Region::shareable(8192).unwrap();
        raw.tell(&note(4, 3, 0, 8192, 4096, 7), region.file());
        area.word(WORDS).unwrap().store(7 << 32, Ordering::SeqCst);
        let remote = RegionDescriptor::new(4096, 7, 8192);
        let scribbler = std::thread::spawn(move || {
            let mut random = Random(seed);
            for _ in 0..3000 {
                let at = random.below(AREA_BYTES - 64);
                area.copy_in(at, &pattern(random.next(), 1 + random.below(64))).unwrap();
                area.word(WORDS).unwrap().store(7 << 32 | (random.next() & 1), Ordering::SeqCst);
            }
        });
        for token in 0..50 {
            let _ = raw
                .server
                .channel
                .submit(token, Operation::Place { buffer: raw.server.pool.take().unwrap(), remote });
            raw.server.pump();
            raw.server.done.clear();
        }
        scribbler.join().unwrap();
        drop(raw.socket);
        drive(&mut [&mut raw.server], |ends| ends[0].has_ended());
        drive(&mut [&mut raw.server], |ends| {
            ends[0].done.clear();
            ends[0].pool.available() == ends[0].pool.capacity()
        });
    }
}

/// The client's end of a channel whose server is a raw socket.
fn raw_server(tell: impl FnOnce(&UnixStream)) -> (End, UnixStream) {
    let at = Place::new();
    let listener = UnixListener::bind(at.socket()).unwrap();
    let (pool, setup) = victim_setup(2);
    let client = connect(&at.socket(), PATIENCE, setup).unwrap();
    let (socket, _) = listener.accept().unwrap();
    tell(&socket);
    (End::new(Box::new(client), pool), socket)
}

fn hand_over(socket: &UnixStream, bytes: &[u8], file: BorrowedFd<'_>) {
    send_segments_and_descriptor(socket.as_fd(), &[SendSegment::slice(bytes)], file).unwrap();
}

#[test]
fn a_server_that_hands_over_nonsense_is_left() {
    let area_note = note(1, 0, 1, RING as u32, 1 << 20, 256);
    let area = Region::shareable(AREA_BYTES).unwrap();
    let loose = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&loose, AREA_BYTES as u64).unwrap();
    let short = Region::shareable(AREA_BYTES - 1).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let other = note(1, 0, 1, RING as u32 * 2, 1 << 20, 256);
    for (what, bytes, file) in [
        ("another version", &note(1, 0, 2, RING as u32, 1 << 20, 256), area.file().unwrap()),
        ("rings of another length", &other, area.file().unwrap()),
        ("not sealed", &area_note, loose.as_fd()),
        ("too short", &area_note, short.file().unwrap()),
        ("a pipe", &area_note, pipe.as_fd()),
    ] {
        let (mut client, _socket) = raw_server(|socket| hand_over(socket, bytes, file));
        misbehaved(&mut client, what);
    }
    for (what, bytes) in [("ready", note(2, 0, 0, 0, 0, 0)), ("a region", note(4, 3, 0, 64, 4096, 7))] {
        let (mut client, _socket) = raw_server(|socket| {
            send_segments(socket.as_fd(), &[SendSegment::slice(&bytes)]).unwrap();
        });
        misbehaved(&mut client, what);
    }
}

#[test]
fn words_of_a_server_that_make_no_sense_end_the_channel() {
    for (at, word) in
        [(TO_CLIENT_TAIL, RING as u64 + 1), (TO_CLIENT_TAIL, u64::MAX), (TO_SERVER_HEAD, 1 << 40)]
    {
        let area = Region::shareable(AREA_BYTES).unwrap();
        let bytes = note(1, 0, 1, RING as u32, 1 << 20, 256);
        let (mut client, socket) = raw_server(|socket| hand_over(socket, &bytes, area.file().unwrap()));
        client.pump();
        area.word(at).unwrap().store(word, Ordering::SeqCst);
        for token in 0..4 {
            client.send(token, &vec![3; 60 << 10]);
        }
        send_segments(socket.as_fd(), &[SendSegment::slice(&note(3, 0, 0, 0, 0, 0))]).unwrap();
        misbehaved(&mut client, "a word");
    }
}

#[test]
fn a_server_that_never_lets_go_is_waited_for_until_it_is_gone() {
    let area = Region::shareable(AREA_BYTES).unwrap();
    let bytes = note(1, 0, 1, RING as u32, 1 << 20, 256);
    let (mut client, socket) = raw_server(|socket| hand_over(socket, &bytes, area.file().unwrap()));
    client.pump();
    let registration = client.register(4096, RemoteAccess::Place);
    let word = area.word(WORDS).unwrap();
    assert_eq!(word.fetch_add(1, Ordering::SeqCst), u64::from(registration.descriptor().rkey()) << 32);
    let withdrawal = std::thread::spawn(move || drop(registration));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!withdrawal.is_finished(), "its thread may be in the middle of a copy");
    drop(socket);
    withdrawal.join().unwrap();
}
