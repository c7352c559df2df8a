//! Files whose pages are pinned because they are read again and again: that they are, within bounds, and that what is read is
//! always what the file has. Over real verbs; see [`crate::common::Server`].

use crate::common::{Client, Open, Server, Told, eventually, pattern};
use crate::within::as_within;
use holdfast_dataplane::engine::KernelFile;
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, ByteRange, IoRule, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_shared::wire::link::{Restrict, Restricted};
use holdfast_transport::verbs::{PinnedFile, Pinner};
use holdfast_transport::{Channel, Completion, Placed, RegionDescriptor, SubmitError};
use rustix::fs::{FallocateFlags, MemfdFlags};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

const EXTENT: usize = 4 << 20;
const PIECE: usize = 1 << 20;

fn start(pinned_bytes_max: usize) -> Option<Server> {
    Server::start(|settings| settings.engine.pinned_bytes_max = pinned_bytes_max, KernelFile::opener())
}

/// A file in memory: its file system tells every change, which that of the temporary directory may not.
fn open(server: &Server, content: &[u8], policy: MacPolicy) -> Open {
    let file = File::from(rustix::fs::memfd_create("pinned-test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(content, 0).unwrap();
    server.rig.control.open_file(file, Access::ALL, policy)
}

fn bound(server: &Server, content: &[u8]) -> (Client, u32, Open) {
    let open = open(server, content, MacPolicy::Header);
    let mut client = server.client();
    let binding = client.bind(&open).unwrap();
    (client, binding, open)
}

/// Reads the whole file in pieces, and checks it.
fn check(client: &mut Client, binding: u32, content: &[u8], what: &str) {
    for start in (0..content.len()).step_by(PIECE) {
        let (status, read) = client.read(binding, start as u64, PIECE as u32);
        let end = content.len().min(start + PIECE);
        assert_eq!(status, Status::Ok, "{what}, at {start}");
        assert!(read == content[start..end], "{what}: {} bytes at {start} are not the file's", read.len());
    }
}

/// Reads the file until all of a pass is placed from pinned pages.
fn warm(server: &Server, client: &mut Client, binding: u32, content: &[u8]) {
    eventually("pinned", || {
        let before = server.rig.gauge("reads_pinned_total");
        check(client, binding, content, "warming");
        let passed = server.rig.gauge("reads_pinned_total") - before;
        passed == content.len().div_ceil(PIECE) as u64
    });
}

#[test]
fn a_file_that_is_read_again_and_again_is_pinned_until_its_last_binding_goes() {
    let Some(server) = start(64 << 20) else { return };
    // Not a whole number of extents, nor of pages.
    let content = pattern(2 * EXTENT + 5000, 1);
    let (mut client, binding, open) = bound(&server, &content);
    check(&mut client, binding, &content, "once");
    assert_eq!(server.rig.gauge("reads_pinned_total"), 0, "one pass is no reason");
    warm(&server, &mut client, binding, &content);
    let pages = 2 * EXTENT as u64 + 8192;
    assert_eq!(server.rig.gauge("pinned_file_bytes"), pages);
    // Across extents, up to the end, and beyond it.
    let before = server.rig.gauge("reads_pinned_total");
    for (at, length) in [(EXTENT - 70_000, 140_000), (2 * EXTENT - 1, 1 << 20), (EXTENT + 1, 65_536)] {
        let end = content.len().min(at + length);
        assert_eq!(client.read(binding, at as u64, length as u32), (Status::Ok, content[at..end].to_vec()));
    }
    assert_eq!(client.read(binding, content.len() as u64, 1 << 20), (Status::Ok, vec![]));
    assert_eq!(server.rig.gauge("reads_pinned_total") - before, 3);
    // Another handle of the same file, on another channel, has them at once.
    let mut other = server.client();
    let second = other.bind(&open).unwrap();
    let before = server.rig.gauge("reads_pinned_total");
    check(&mut other, second, &content, "the other");
    assert_eq!(server.rig.gauge("reads_pinned_total") - before, 9);
    drop(client);
    check(&mut other, second, &content, "the first is gone");
    assert_eq!(server.rig.gauge("pinned_file_bytes"), pages);
    let request = other.send_unbind(second);
    assert_eq!(other.answer(request).0, Status::Ok);
    server.rig.wait_gauge("pinned_file_bytes", 0);
}

#[test]
fn what_is_read_is_what_the_file_has_however_it_changes() {
    let Some(server) = start(64 << 20) else { return };
    let mut content = pattern(2 * EXTENT, 2);
    let (mut client, binding, open) = bound(&server, &content);
    for round in 0..3 {
        warm(&server, &mut client, binding, &content);
        // Through a handle, and beside it.
        assert_eq!(client.write_inline(binding, 70, b"through").0, Status::Ok);
        content[70..77].copy_from_slice(b"through");
        check(&mut client, binding, &content, "written through");
        warm(&server, &mut client, binding, &content);
        open.file.write_all_at(&[round; 100], EXTENT as u64 - 50).unwrap();
        content[EXTENT - 50..EXTENT + 50].fill(round);
        check(&mut client, binding, &content, "written beside");
        warm(&server, &mut client, binding, &content);
        // Pages that a hole takes away, and pages that others take the place of.
        let (at, length) = (8192, 3 << 20);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&*open.file, punch, at, length).unwrap();
        content[at as usize..(at + length) as usize].fill(0);
        check(&mut client, binding, &content, "punched");
        open.file.set_len(PIECE as u64 + 3).unwrap();
        check(&mut client, binding, &content[..PIECE + 3], "cut short");
        let new = pattern(2 * EXTENT, 20 + u64::from(round));
        open.file.write_all_at(&new, 0).unwrap();
        content = new;
        check(&mut client, binding, &content, "grown again");
        warm(&server, &mut client, binding, &content);
        // No hole tells of it, nor another length.
        open.file.set_len(0).unwrap();
        content = pattern(2 * EXTENT, 30 + u64::from(round));
        open.file.write_all_at(&content, 0).unwrap();
        check(&mut client, binding, &content, "all pages replaced");
        warm(&server, &mut client, binding, &content);
        content.extend_from_slice(b"more");
        open.file.write_all_at(b"more", 2 * EXTENT as u64).unwrap();
        check(&mut client, binding, &content, "longer");
    }
}

#[test]
fn never_more_is_pinned_than_allowed_and_idle_files_make_room() {
    let Some(server) = start(2 * EXTENT) else { return };
    let contents = [pattern(2 * EXTENT, 3), pattern(EXTENT, 4)];
    let (mut client, first, _open) = bound(&server, &contents[0]);
    let open = open(&server, &contents[1], MacPolicy::Header);
    let second = client.bind(&open).unwrap();
    warm(&server, &mut client, first, &contents[0]);
    let all = 2 * EXTENT as u64;
    assert_eq!(server.rig.gauge("pinned_file_bytes"), all);
    // The first is not read any more: some of it gives way.
    let mut most = 0;
    eventually("the second is pinned", || {
        let before = server.rig.gauge("reads_pinned_total");
        check(&mut client, second, &contents[1], "the second");
        most = most.max(server.rig.gauge("pinned_file_bytes"));
        server.rig.gauge("reads_pinned_total") - before == 4
    });
    assert!(most <= all, "{most}");
    check(&mut client, first, &contents[0], "the first, half of it pinned");
}

#[test]
fn nothing_is_pinned_that_is_digested_has_holes_or_is_read_in_small_pieces() {
    let Some(server) = start(64 << 20) else { return };
    let content = pattern(EXTENT, 5);
    let sealed = open(&server, &content, MacPolicy::Payload);
    let sparse = open(&server, &content, MacPolicy::Header);
    sparse.file.set_len(2 * EXTENT as u64).unwrap();
    let small = open(&server, &content, MacPolicy::Header);
    let mut client = server.client();
    let bindings = [&sealed, &sparse, &small].map(|open| client.bind(open).unwrap());
    for _ in 0..4 {
        for (binding, length) in bindings.into_iter().zip([256 << 10, 1 << 20, 32 << 10]) {
            for start in (0..EXTENT).step_by(length as usize) {
                let expected = content[start..start + length as usize].to_vec();
                assert!(client.read(binding, start as u64, length) == (Status::Ok, expected));
            }
        }
    }
    assert_eq!((server.rig.gauge("reads_pinned_total"), server.rig.gauge("pinned_file_bytes")), (0, 0));
    // It costs no memory to read a hole.
    let blocks = rustix::fs::fstat(&*sparse.file).unwrap().st_blocks;
    assert!(blocks * 512 < 2 * EXTENT as i64, "the hole was filled");
}

/// A channel that can be stopped as it takes a Place from a file: nothing is given to the device then.
struct Held {
    channel: Box<dyn Channel>,
    /// 0: goes on; 1: stops at the next Place from a file; 2: stopped.
    hold: Arc<AtomicU8>,
}

impl Channel for Held {
    as_within!(channel);
    fn poll(&mut self, done: &mut Vec<Completion>) -> usize {
        if self.hold.load(Ordering::SeqCst) == 2 { 0 } else { self.channel.poll(done) }
    }
    fn pinner(&self) -> Option<Pinner> {
        self.channel.pinner()
    }
    fn place_pinned(
        &mut self,
        token: u64,
        file: &PinnedFile,
        range: Range<usize>,
        remote: RegionDescriptor,
    ) -> Result<(), SubmitError> {
        let _ = self.hold.compare_exchange(1, 2, Ordering::SeqCst, Ordering::SeqCst);
        self.channel.place_pinned(token, file, range, remote)
    }
    fn take_placed(&mut self, done: &mut Vec<Placed>) {
        self.channel.take_placed(done);
    }
}

/// The device reads the pages after the read was answered: rules are not in force before it has.
#[test]
fn lck_01_rules_wait_for_reads_that_the_device_has_yet_to_do() {
    let hold = Arc::new(AtomicU8::new(0));
    let theirs = Arc::clone(&hold);
    let wrap = move |channel| Box::new(Held { channel, hold: Arc::clone(&theirs) }) as Box<dyn Channel>;
    let Some(server) = Server::wrapped(|_| {}, KernelFile::opener(), wrap) else { return };
    let content = vec![b'a'; EXTENT];
    let (mut client, binding, open) = bound(&server, &content);
    warm(&server, &mut client, binding, &content);
    hold.store(1, Ordering::SeqCst);
    let request = client.send_io(Opcode::Read, binding, 0, PIECE as u32, client.descriptor());
    eventually("the Place is taken, and not given to the device", || hold.load(Ordering::SeqCst) == 2);
    let told = Told::Restricted(Restricted { open: open.id, version: 1 });
    let rules = vec![IoRule { range: ByteRange::new(0, EXTENT as u64).unwrap(), deny: Access::READ }];
    server.rig.engine.restrict(Restrict { open: open.id, version: 1, rules });
    let is_told = || server.rig.control.told().contains(&told);
    eventually("judged", || is_told() || server.rig.gauge("restricts_pending") == 1);
    let early = is_told();
    // Before a failure too, or the server could not end.
    hold.store(0, Ordering::SeqCst);
    assert!(!early, "the lock is granted, and the device has yet to read");
    assert_eq!(client.answer(request), (Status::Ok, PIECE as u32));
    eventually("restricted", is_told);
    assert_eq!(client.read(binding, 0, PIECE as u32).0, Status::LockConflict);
}
