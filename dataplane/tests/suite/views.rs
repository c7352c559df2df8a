//! Long reads over tcp, sent straight from mapped files: that they are, within bounds, and that what is read is what the file has.

use crate::common::{Client, Msg, Open, Rig, Told, anyone, eventually, pattern};
use crate::within::as_within;
use holdfast_dataplane::engine::{FileIo, KernelFile, Opener, Settings};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, ByteRange, IoRule, RegionDescriptor, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_shared::wire::link::{Fence, Restrict, Restricted};
use holdfast_transport::{Channel, Completion, FilePart, Registration, RemoteAccess, ViewPlaced};
use holdfast_verbs::memory::{Nowait, Region};
use rustix::fs::{FallocateFlags, MemfdFlags};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

const EXTENT: usize = 16 << 20;
const VIEWED: &str = "pieces_viewed_total";
const MAPPED: &str = "viewed_file_bytes";

fn client(rig: &Rig) -> Client {
    rig.tcp_clients(1).pop().unwrap()
}

/// A file in memory: of that file system it is known that a mapping shows what `read` does.
fn open(rig: &Rig, content: &[u8], policy: MacPolicy) -> Open {
    let file = File::from(rustix::fs::memfd_create("view-test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(content, 0).unwrap();
    rig.control.open_file(file, Access::ALL, policy)
}

fn bound(rig: &Rig, content: &[u8]) -> (Client, u32, Open) {
    let open = open(rig, content, MacPolicy::Header);
    let mut client = client(rig);
    let binding = client.bind(&open).unwrap();
    (client, binding, open)
}

#[test]
fn long_reads_are_sent_from_the_mapped_file_and_end_where_it_does() {
    let rig = Rig::new();
    let content = pattern(EXTENT + 70_001, 1);
    let (mut client, binding, _open) = bound(&rig, &content);
    // Within an extent, across two, unaligned, up to the end, beyond it.
    let mut sum = 0;
    for (at, length, pieces) in [
        (0, 1 << 20, 1),
        (3, 3_000_000, 3),
        (EXTENT - 70_000, 140_000, 2),
        (4097, 65_536, 1),
        (EXTENT - 1, 4 << 20, 2),
    ] {
        let end = content.len().min(at + length);
        let (status, read) = client.read(binding, at as u64, length as u32);
        assert!((status, &read[..]) == (Status::Ok, &content[at..end]), "{length} bytes at {at}");
        sum += pieces;
        assert_eq!(rig.gauge(VIEWED), sum);
    }
    assert_eq!(rig.gauge(MAPPED), 2 * EXTENT as u64);
    assert_eq!(client.read(binding, content.len() as u64, 1 << 20), (Status::Ok, vec![]));
    assert_eq!(client.read(binding, 10, 65_535).1, content[10..65_545]);
    assert_eq!(rig.gauge(VIEWED), sum, "short ones are copied");
    assert_eq!(rig.gauge("buffers_free"), rig.gauge("buffers_total"));
    // The binding goes, and what was mapped for it.
    let request = client.send_unbind(binding);
    assert_eq!(client.answer(request).0, Status::Ok);
    rig.wait_gauge(MAPPED, 0);
}

#[test]
fn what_is_read_is_what_the_file_has_however_it_changes() {
    let rig = Rig::new();
    let mut content = pattern(1 << 20, 2);
    let (mut client, binding, open) = bound(&rig, &content);
    let check = |client: &mut Client, content: &[u8], what: &str| {
        let (status, read) = client.read(binding, 0, 4 << 20);
        assert!((status, &read[..]) == (Status::Ok, content), "{what}: {} bytes", read.len());
    };
    check(&mut client, &content, "as it was made");
    assert_eq!(client.write_inline(binding, 70, b"through").0, Status::Ok);
    content[70..77].copy_from_slice(b"through");
    check(&mut client, &content, "written through");
    open.file.write_all_at(&[9; 5000], 300_000).unwrap();
    content[300_000..305_000].fill(9);
    check(&mut client, &content, "written beside");
    open.file.set_len(100_001).unwrap();
    check(&mut client, &content[..100_001], "cut short");
    open.file.write_all_at(b"more", 100_001).unwrap();
    content.truncate(100_001);
    content.extend_from_slice(b"more");
    check(&mut client, &content, "longer");
    let viewed = rig.gauge(VIEWED);
    assert!(viewed >= 5);
    // A hole is not filled by reading it, and is read all the same.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&*open.file, punch, 8192, 65_536).unwrap();
    content[8192..8192 + 65_536].fill(0);
    let blocks = || rustix::fs::fstat(&*open.file).unwrap().st_blocks;
    let before = blocks();
    check(&mut client, &content, "punched");
    assert_eq!((rig.gauge(VIEWED), blocks()), (viewed, before));
}

#[test]
fn nothing_is_sent_from_a_mapping_that_is_digested_or_where_it_is_switched_off() {
    for (policy, max) in [(MacPolicy::Payload, 4 << 30), (MacPolicy::Sealed, 4 << 30), (MacPolicy::Header, 0)]
    {
        let rig = Rig::with(|settings| settings.engine.viewed_bytes_max = max);
        let content = pattern(256 << 10, 3);
        let open = open(&rig, &content, policy);
        let mut client = client(&rig);
        let binding = client.bind(&open).unwrap();
        assert!(client.read(binding, 0, 256 << 10) == (Status::Ok, content));
        assert_eq!((rig.gauge(VIEWED), rig.gauge(MAPPED)), (0, 0), "{policy:?}");
    }
}

#[test]
fn never_more_is_mapped_than_allowed_and_what_was_read_longest_ago_makes_room() {
    let rig = Rig::with(|settings| settings.engine.viewed_bytes_max = 2 * EXTENT);
    let content = pattern(128 << 10, 4);
    let (mut client, first, open) = bound(&rig, &content);
    open.file.write_all_at(&content, EXTENT as u64).unwrap();
    open.file.write_all_at(&content, 2 * EXTENT as u64).unwrap();
    let mut read = |at: usize| {
        assert!(client.read(first, at as u64, 128 << 10) == (Status::Ok, content.clone()), "at {at}");
        assert!(rig.gauge(MAPPED) <= 2 * EXTENT as u64);
        rig.gauge(VIEWED)
    };
    assert_eq!((read(0), read(EXTENT), read(0), read(2 * EXTENT)), (1, 2, 3, 3), "there is no room yet");
    rig.wait_gauge(MAPPED, EXTENT as u64);
    assert_eq!((read(2 * EXTENT), read(0)), (4, 5), "the second has given way");
    assert_eq!(rig.gauge(MAPPED), 2 * EXTENT as u64);
}

#[test]
fn memory_that_was_not_given_is_not_written() {
    let rig = Rig::new();
    let (mut client, binding, _open) = bound(&rig, &pattern(1 << 20, 5));
    let known = client.descriptor();
    let unknown = RegionDescriptor::new(known.address(), known.rkey() ^ 1, 1 << 20);
    client.send_io(Opcode::Read, binding, 0, 1 << 20, unknown);
    eventually("the client ends the channel", || {
        client.pump();
        client.channel.ended().is_some()
    });
    rig.wait_gauge("channels", 0);
    rig.wait_gauge(MAPPED, 0);
}

/// So much that what a socket does not take leaves buffers free.
fn many_buffers(settings: &mut Settings) {
    settings.engine.pool_bytes = 96 << 20;
}

/// Has the server send more than the socket takes to a client that does not receive: what it sends next has to wait.
fn stand_still(rig: &Rig, client: &mut Client) {
    let other = open(rig, b"", MacPolicy::Header);
    // A hole: that goes through buffers.
    other.file.set_len(4 << 20).unwrap();
    let binding = client.bind(&other).unwrap();
    client.deaf = true;
    for _ in 0..6 {
        client.send_io(Opcode::Read, binding, 0, 4 << 20, client.descriptor());
    }
    let (mut last, mut same) = (0, 0);
    eventually("nothing moves any more", || {
        std::thread::sleep(Duration::from_millis(5));
        let free = rig.gauge("buffers_free");
        same = if free == last && free < rig.gauge("buffers_total") { same + 1 } else { 0 };
        last = free;
        same > 20
    });
}

const LENGTH: usize = 1 << 20;

/// A read that waits until the socket takes more. Returns its number, and where its bytes are to go.
fn waiting(rig: &Rig, client: &mut Client, binding: u32) -> (u32, Registration) {
    let memory =
        client.channel.registrar().register(Region::new(LENGTH).unwrap(), RemoteAccess::Place).unwrap();
    let (before, buffers) = (rig.gauge("requests_in_flight"), rig.gauge("buffers_free"));
    let request = client.send_io(Opcode::Read, binding, 0, LENGTH as u32, memory.descriptor());
    rig.wait_gauge("requests_in_flight", before + 1);
    // Its extent is mapped as it is tried, beside that of the other file.
    rig.wait_gauge(MAPPED, 2 * EXTENT as u64);
    eventually("it holds no buffer", || rig.gauge("buffers_free") >= buffers);
    assert_eq!(rig.gauge(VIEWED), 0);
    (request, memory)
}

fn bytes(memory: &Registration) -> Vec<u8> {
    let mut bytes = vec![1; LENGTH];
    memory.region().copy_out(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_read_waits_for_a_slow_client_without_a_buffer() {
    for spin_rounds in [32, 0] {
        let rig = Rig::with(|settings| {
            many_buffers(settings);
            settings.engine.spin_rounds = spin_rounds;
        });
        let content = pattern(LENGTH, 6);
        let (mut client, binding, _open) = bound(&rig, &content);
        stand_still(&rig, &mut client);
        let (request, memory) = waiting(&rig, &mut client, binding);
        assert_eq!(client.answer(request), (Status::Ok, LENGTH as u32));
        assert!(bytes(&memory) == content);
        assert!(rig.gauge(VIEWED) > 0);
        rig.wait_gauge("requests_in_flight", 0);
        assert_eq!(rig.gauge("buffers_free"), rig.gauge("buffers_total"));
    }
}

/// It goes through buffers then: rules don't wait for the client, and what the owner of the lock writes is not seen.
#[test]
fn lck_01_a_read_that_waits_for_its_client_is_done_before_rules_are_in_force() {
    let rig = Rig::with(|settings| {
        many_buffers(settings);
        settings.limits.fence_ms = 20_000;
    });
    let content = vec![b'a'; LENGTH];
    let (mut client, binding, open) = bound(&rig, &content);
    stand_still(&rig, &mut client);
    let (request, memory) = waiting(&rig, &mut client, binding);
    let told = Told::Restricted(Restricted { open: open.id, version: 1 });
    let rules = vec![IoRule { range: ByteRange::new(0, LENGTH as u64).unwrap(), deny: Access::READ }];
    rig.engine.restrict(Restrict { open: open.id, version: 1, rules });
    eventually("restricted", || rig.control.told().contains(&told));
    assert_eq!(rig.gauge(VIEWED), 0, "nothing is sent from the file that was not read before");
    open.file.write_all_at(&vec![b'X'; LENGTH], 0).unwrap();
    assert_eq!(client.answer(request), (Status::Ok, LENGTH as u32));
    assert!(bytes(&memory) == content);
    assert_eq!(client.read(binding, 0, LENGTH as u32).0, Status::LockConflict);
}

#[test]
fn a_fence_does_not_wait_for_a_read_that_waits_for_its_client() {
    let rig = Rig::with(|settings| {
        many_buffers(settings);
        settings.limits.fence_ms = 20_000;
    });
    let (mut client, binding, _open) = bound(&rig, &vec![b'a'; LENGTH]);
    let fence = Fence { binding: rig.control.last(), epoch: 5, reason: Status::Fenced };
    stand_still(&rig, &mut client);
    let (request, _memory) = waiting(&rig, &mut client, binding);
    rig.engine.fence(fence);
    eventually("the fence is confirmed", || rig.control.told().contains(&Told::Fenced(fence)));
    rig.wait_gauge(MAPPED, EXTENT as u64);
    let is_notice = |msg: &Msg| matches!(msg, Msg::Notice { status: Status::Fenced, .. });
    let is_answer =
        |msg: &Msg| matches!(msg, Msg::Reply { request: of, status: Status::Fenced, .. } if *of == request);
    let (mut notices, mut answers) = (0, 0);
    while notices + answers < 2 {
        let msg = client.next().expect("the channel lives");
        notices += usize::from(is_notice(&msg));
        answers += usize::from(is_answer(&msg));
    }
    assert_eq!((notices, answers), (1, 1));
}

#[test]
fn a_file_cut_short_while_its_read_waits_is_as_short_as_it_is_then() {
    let rig = Rig::with(many_buffers);
    let (mut client, binding, open) = bound(&rig, &vec![b'a'; LENGTH]);
    stand_still(&rig, &mut client);
    let (request, memory) = waiting(&rig, &mut client, binding);
    open.file.set_len(5000).unwrap();
    assert_eq!(client.answer(request), (Status::Ok, 5000));
    assert!(bytes(&memory)[..5000].iter().all(|byte| *byte == b'a'));
    assert_eq!(rig.gauge("channels"), 1);
}

/// Neither a signal, nor another count than what was there, nor the end of the channel.
#[test]
fn a_file_that_is_cut_and_grown_all_the_time_is_read_as_it_is() {
    let rig = Rig::new();
    let length = 3 << 20;
    let (mut client, binding, open) = bound(&rig, &vec![b'a'; length]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                open.file.set_len(LENGTH as u64).unwrap();
                open.file.write_all_at(&vec![b'a'; length - LENGTH], LENGTH as u64).unwrap();
            }
        });
        for _ in 0..500 {
            let (status, bytes) = client.read(binding, 0, 4 << 20);
            assert_eq!(status, Status::Ok);
            assert!((LENGTH..=length).contains(&bytes.len()), "{}", bytes.len());
            assert!(bytes.iter().all(|byte| *byte == b'a'));
        }
        stop.store(true, SeqCst);
    });
    assert!(rig.gauge(VIEWED) > 0);
}

/// A file that can't be looked at any more, as after a failure of its file system.
struct Failing {
    file: KernelFile,
    fails: Arc<AtomicBool>,
}

impl FileIo for Failing {
    fn read_now(&self, data: &mut [u8], at: u64) -> io::Result<Nowait> {
        self.file.read_now(data, at)
    }
    fn write_now(&self, data: &[u8], at: u64) -> io::Result<Nowait> {
        self.file.write_now(data, at)
    }
    fn read(&self, data: &mut [u8], at: u64) -> io::Result<usize> {
        self.file.read(data, at)
    }
    fn write(&self, data: &[u8], at: u64) -> io::Result<usize> {
        self.file.write(data, at)
    }
    fn sync(&self, data_only: bool) -> io::Result<()> {
        self.file.sync(data_only)
    }
    fn view_length(&self) -> io::Result<Option<u64>> {
        if self.fails.load(SeqCst) { Err(io::ErrorKind::Other.into()) } else { self.file.view_length() }
    }
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.descriptor()
    }
}

#[test]
fn what_was_mapped_goes_with_its_binding_whatever_becomes_of_the_file() {
    let fails = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&fails);
    let opener: Opener =
        Arc::new(move |fd, _| Arc::new(Failing { file: KernelFile::new(fd), fails: Arc::clone(&theirs) }));
    let rig = Rig::with_files(|_| {}, opener);
    let content = pattern(LENGTH, 8);
    let (mut client, binding, _open) = bound(&rig, &content);
    assert!(client.read(binding, 0, LENGTH as u32) == (Status::Ok, content.clone()));
    let pieces = rig.gauge(VIEWED);
    assert!(pieces > 0);
    fails.store(true, SeqCst);
    assert!(client.read(binding, 0, LENGTH as u32) == (Status::Ok, content));
    assert_eq!(rig.gauge(VIEWED), pieces);
    drop(client);
    rig.wait_gauge(MAPPED, 0);
}

/// A channel that never has room for a part of a file.
struct Unwilling(Box<dyn Channel>);

impl Channel for Unwilling {
    as_within!(0);
    fn poll(&mut self, done: &mut Vec<Completion>) -> usize {
        self.0.poll(done)
    }
    fn places_views(&self) -> bool {
        true
    }
    fn place_view(&mut self, part: FilePart<'_>) -> ViewPlaced {
        ViewPlaced::Full(part.buffer)
    }
}

/// Though no operation is in flight.
#[test]
fn a_client_that_never_makes_room_is_sent_away_in_time() {
    let rig = Rig::with(|settings| settings.limits.stuck_ms = 300);
    let open = open(&rig, &pattern(LENGTH, 9), MacPolicy::Header);
    let parts = Client::parts();
    let setup = rig.engine.setup(anyone()).expect("room for a channel");
    let (ours, theirs) = holdfast_transport::memory::pair(parts.setup(), setup).unwrap();
    rig.engine.adopt(Box::new(Unwilling(Box::new(theirs))));
    let mut client = Client::new(Box::new(ours), parts);
    client.hello();
    let binding = client.bind(&open).unwrap();
    client.send_io(Opcode::Read, binding, 0, LENGTH as u32, client.descriptor());
    rig.wait_gauge(MAPPED, EXTENT as u64);
    rig.wait_gauge("channels", 0);
    rig.wait_gauge(MAPPED, 0);
}
