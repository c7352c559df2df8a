//! Long reads over tcp, sent straight from mapped files: that they are, within bounds, and that what is read is what the file has.

use crate::common::{Client, Open, Rig, Told, eventually, pattern};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, ByteRange, IoRule, RegionDescriptor, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_shared::wire::link::{Fence, Restrict, Restricted};
use holdfast_transport::{Listener, Registration, RemoteAccess, tcp};
use holdfast_verbs::memory::Region;
use rustix::fs::{FallocateFlags, MemfdFlags};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const EXTENT: usize = 16 << 20;
const VIEWED: &str = "pieces_viewed_total";
const MAPPED: &str = "viewed_file_bytes";

fn client(rig: &Rig) -> Client {
    let mut listener = tcp::TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let parts = Client::parts();
    let address = listener.address();
    let channel = tcp::connect(address, Duration::from_secs(10), parts.setup()).unwrap();
    rig.engine.adopt(listener.accept(&mut |peer| rig.engine.setup(peer)).unwrap());
    let mut client = Client::new(Box::new(channel), parts);
    client.hello();
    client
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
    assert_eq!(rig.gauge(VIEWED), 5);
    // A hole is not filled by reading it, and is read all the same.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&*open.file, punch, 8192, 65_536).unwrap();
    content[8192..8192 + 65_536].fill(0);
    let blocks = || rustix::fs::fstat(&*open.file).unwrap().st_blocks;
    let before = blocks();
    check(&mut client, &content, "punched");
    assert_eq!((rig.gauge(VIEWED), blocks()), (5, before));
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
fn never_more_is_mapped_than_allowed_and_idle_extents_make_room() {
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
    assert_eq!((read(0), read(EXTENT), read(2 * EXTENT)), (1, 2, 2), "both are in use");
    // Once nobody has read one for a while, it gives way.
    let mut last = 2;
    eventually("the third is mapped", || {
        let now = read(2 * EXTENT);
        std::mem::replace(&mut last, now) < now
    });
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

/// Has the server send more than the socket takes to a client that does not receive: what it sends next has to wait.
fn stand_still(rig: &Rig, client: &mut Client) {
    let other = open(rig, b"", MacPolicy::Header);
    // A hole: that goes through buffers.
    other.file.set_len(4 << 20).unwrap();
    let binding = client.bind(&other).unwrap();
    for _ in 0..6 {
        client.send_io(Opcode::Read, binding, 0, 4 << 20, client.descriptor());
    }
    client.channel.push();
    let (mut last, mut same) = (0, 0);
    eventually("nothing moves any more", || {
        std::thread::sleep(Duration::from_millis(5));
        let free = rig.gauge("buffers_free");
        same = if free == last && free < rig.gauge("buffers_total") { same + 1 } else { 0 };
        last = free;
        same > 20
    });
}

/// A read that was answered, and that the socket has yet to take. Returns its number, and where its bytes are to go.
fn unsent(rig: &Rig, client: &mut Client, binding: u32) -> (u32, Registration) {
    let memory =
        client.channel.registrar().register(Region::new(LENGTH).unwrap(), RemoteAccess::Place).unwrap();
    let request = client.send_io(Opcode::Read, binding, 0, LENGTH as u32, memory.descriptor());
    client.channel.push();
    rig.wait_gauge(VIEWED, 1);
    (request, memory)
}

fn bytes(memory: &Registration) -> Vec<u8> {
    let mut bytes = vec![1; LENGTH];
    memory.region().copy_out(0, &mut bytes).unwrap();
    bytes
}

const LENGTH: usize = 1 << 20;

/// The kernel reads the pages when the socket takes them, which is after the read was answered: rules are not in force before.
#[test]
fn lck_01_rules_wait_for_reads_that_the_socket_has_yet_to_take() {
    let rig = Rig::with(|settings| settings.limits.fence_ms = 20_000);
    let content = vec![b'a'; LENGTH];
    let (mut client, binding, open) = bound(&rig, &content);
    stand_still(&rig, &mut client);
    let (request, memory) = unsent(&rig, &mut client, binding);
    let told = Told::Restricted(Restricted { open: open.id, version: 1 });
    let rules = vec![IoRule { range: ByteRange::new(0, LENGTH as u64).unwrap(), deny: Access::READ }];
    rig.engine.restrict(Restrict { open: open.id, version: 1, rules });
    let is_told = || rig.control.told().contains(&told);
    eventually("judged", || is_told() || rig.gauge("restricts_pending") == 1);
    assert!(!is_told(), "the lock is granted, and the socket has yet to take what was read");
    assert_eq!(client.answer(request), (Status::Ok, LENGTH as u32));
    assert!(bytes(&memory) == content);
    eventually("restricted", is_told);
    assert_eq!(client.read(binding, 0, LENGTH as u32).0, Status::LockConflict);
}

/// The same for a fence: what is mapped is let go before it is confirmed, and a client that does not receive is cut off.
#[test]
fn a_fence_cuts_off_who_does_not_receive() {
    let rig = Rig::with(|settings| settings.limits.fence_ms = 100);
    let (mut client, binding, _open) = bound(&rig, &vec![b'a'; LENGTH]);
    let fence = Fence { binding: rig.control.last(), epoch: 5, reason: Status::Fenced };
    stand_still(&rig, &mut client);
    unsent(&rig, &mut client, binding);
    rig.engine.fence(fence);
    eventually("the fence is confirmed", || rig.control.told().contains(&Told::Fenced(fence)));
    rig.wait_gauge(MAPPED, 0);
    rig.wait_gauge("channels", 0);
}

/// A file that loses what was promised of it: no signal, and no byte that it never had. The client asks again on another channel.
#[test]
fn a_file_cut_short_before_it_is_sent_ends_the_channel_alone() {
    let rig = Rig::new();
    let (mut first, binding, open) = bound(&rig, &vec![b'a'; LENGTH]);
    stand_still(&rig, &mut first);
    let (_, memory) = unsent(&rig, &mut first, binding);
    open.file.set_len(5000).unwrap();
    eventually("the channel ends", || {
        first.pump();
        first.channel.ended().is_some()
    });
    // Zeros are the region's own, or of the page that the file ends in now.
    assert!(bytes(&memory).iter().all(|byte| *byte == b'a' || *byte == 0));
    rig.wait_gauge("channels", 0);
    let mut second = client(&rig);
    let binding = second.bind(&open).unwrap();
    assert_eq!(second.read(binding, 0, 1 << 20), (Status::Ok, vec![b'a'; 5000]));
}
