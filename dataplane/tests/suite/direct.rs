//! Volumes of direct I/O: what is aligned goes past the page cache, what is not goes through it, and both are the same file.

use crate::common::{Client, Gate, Open, Rig, Server, Told, eventually, pattern};
use holdfast_dataplane::config::{EngineConfig, MapConfig};
use holdfast_dataplane::engine::{KernelFile, Settings};
use holdfast_shared::auth::MacPolicy;
use holdfast_shared::types::{Access, Status};
use holdfast_shared::wire::data::Opcode;
use holdfast_shared::wire::link::Fence;
use holdfast_verbs::memory::{Nowait, pread_nowait};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const BLOCK: usize = 4096;

/// False, and words, where the file system of temporary files has no direct I/O.
fn is_possible() -> bool {
    let file = tempfile::tempfile().unwrap();
    let possible = holdfast_dataplane::engine::DirectIo::new(file.try_clone().unwrap().into()).is_some()
        && crate::common::past_the_page_cache(&file.into()).is_some();
    if !possible {
        println!("skipped: no direct I/O on the file system of temporary files");
    }
    possible
}

fn rig(change: impl FnOnce(&mut EngineConfig)) -> Option<Rig> {
    let rig = Rig::with(|settings| change(&mut settings.engine));
    rig.control.direct.store(true, Ordering::SeqCst);
    if rig.engine.settings().engine.io_uring && rig.gauge("file_rings") == 0 {
        println!("skipped: no io_uring here");
        return None;
    }
    is_possible().then_some(rig)
}

/// Reads and writes, aligned and not, against a copy in memory.
fn the_file_is_as_written(client: &mut Client, binding: u32, open: &Open, policy: MacPolicy) {
    let mut expected = open.content();
    let longest = if policy.covers_payload() { 256 << 10 } else { 700_000 };
    let mut dice = 7u64;
    for round in 0..60u64 {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let roll = |n: usize| usize::try_from(dice >> 33).unwrap() % n;
        let (mut at, mut length) = (roll(1 << 20), 1 + roll(longest));
        if round % 3 != 0 {
            at -= at % BLOCK;
            length = (length / (if round % 3 == 1 { 1 } else { 64 }))
                .next_multiple_of(BLOCK)
                .min(longest - longest % BLOCK);
        }
        let bytes = pattern(length, round);
        let new = (at + length).max(expected.len());
        expected.resize(new, 0);
        expected[at..at + length].copy_from_slice(&bytes);
        let written = if length <= BLOCK {
            client.write_inline(binding, at as u64, &bytes)
        } else {
            client.write(binding, at as u64, &bytes)
        };
        assert_eq!(written, (Status::Ok, length as u32), "{at} {length}");
        let (from, count) = (roll(new), 1 + roll(longest));
        let from = if round % 2 == 0 { from - from % BLOCK } else { from };
        let end = expected.len().min(from + count);
        let (status, read) = client.read(binding, from as u64, count as u32);
        assert_eq!((status, read.len()), (Status::Ok, end - from), "{from} {count} of {new}");
        assert!(read == expected[from..end], "{from} {count}");
    }
    assert_eq!(client.flush(binding), Status::Ok);
    assert!(open.content() == expected, "who reads it beside the server");
}

#[test]
fn aligned_and_unaligned_requests_see_one_file() {
    for (io_uring, policy) in [true, false].into_iter().flat_map(|ring| {
        [MacPolicy::Header, MacPolicy::Payload, MacPolicy::Sealed].map(|policy| (ring, policy))
    }) {
        let Some(rig) = rig(|engine| engine.io_uring = io_uring) else { return };
        let open = rig.control.open(&pattern(300_001, 5), Access::ALL, policy);
        let mut client = rig.client();
        let binding = client.bind(&open).unwrap();
        the_file_is_as_written(&mut client, binding, &open, policy);
        let (reads, writes) = (rig.gauge("reads_direct_total"), rig.gauge("writes_direct_total"));
        assert_eq!(reads > 20, io_uring, "{reads} reads by io_uring");
        assert!(writes > 20, "{writes}");
        assert_eq!(rig.gauge("file_rings_registered"), u64::from(io_uring));
        rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
        assert_eq!(rig.gauge("storage_queue"), 0);
    }
}

/// Straight from the disk: what the page cache has is not asked, nor filled.
#[test]
fn a_direct_read_leaves_nothing_in_the_page_cache() {
    let Some(rig) = rig(|_| {}) else { return };
    let content = pattern(8 << 20, 3);
    let (mut client, binding, open) = rig.bound(&content);
    open.file.sync_all().unwrap();
    // Asking makes the kernel read ahead: each place is asked about once.
    let cached = |at| pread_nowait(open.file.as_fd(), &mut [0], at).unwrap() == Nowait::Done(1);
    if !cached(6 << 20) {
        return println!(
            "skipped: the file system of temporary files does not tell what is in the page cache"
        );
    }
    rustix::fs::fadvise(&*open.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    if cached(7 << 20) {
        return println!("skipped: here the page cache can't be emptied");
    }
    assert_eq!(client.read(binding, 0, 1 << 20), (Status::Ok, content[..1 << 20].to_vec()));
    assert!(!cached(512 << 10));
    // Unaligned requests do fill it, and direct ones are still right behind them.
    assert_eq!(client.read(binding, 1, 100), (Status::Ok, content[1..101].to_vec()));
    assert!(cached(0));
    assert_eq!(client.write(binding, 0, &vec![9; 64 << 10]), (Status::Ok, 64 << 10));
    assert_eq!(client.read(binding, 1, 100), (Status::Ok, vec![9; 100]));
}

/// A fence waits for what is with the disk, and nothing lands after it.
#[test]
fn a_fence_waits_for_direct_writes() {
    let gate = Arc::new(Gate::default());
    let rig = Rig::with_files(|_| {}, gate.opener());
    rig.control.direct.store(true, Ordering::SeqCst);
    if !is_possible() {
        return;
    }
    let content = pattern(4 << 20, 1);
    let open = rig.open(&content);
    let mut client = rig.client();
    let binding = client.bind(&open).unwrap();
    gate.set(true);
    let writes: Vec<u32> = (0..8)
        .map(|n| client.send_io(Opcode::Write, binding, n * (128 << 10), 128 << 10, client.descriptor()))
        .collect();
    eventually("some are with the disk", || {
        client.pump();
        gate.waiting.load(Ordering::SeqCst) == 2
    });
    let fence = Fence { binding: rig.control.last(), epoch: 5, reason: Status::Fenced };
    rig.engine.fence(fence);
    std::thread::sleep(std::time::Duration::from_millis(100));
    client.pump();
    assert_eq!(rig.control.told(), [], "control is not told while they are under way");
    gate.set(false);
    for write in writes {
        assert_eq!(client.answer(write).0, Status::Fenced);
    }
    eventually("it is answered", || rig.control.told() == [Told::Fenced(fence)]);
    let after = open.content();
    assert_eq!(rig.gauge("storage_queue"), 0);
    assert!(open.content() == after, "a write landed after the fence's answer");
    rig.wait_gauge("buffers_free", rig.gauge("buffers_total"));
}

/// Reads ask for several pieces at once, and go on with one where there are no more buffers; what is asked for beyond the end of the
/// file is given back.
#[test]
fn long_reads_share_few_buffers_and_never_deadlock() {
    for (buffers, io_uring) in [(1, true), (3, true), (16, true), (3, false)] {
        let Some(rig) = rig(|engine| {
            engine.buffer_bytes = 16 << 10;
            engine.pool_bytes = buffers * (16 << 10);
            engine.io_uring = io_uring;
        }) else {
            return;
        };
        // The last pieces of reads near the end are short, or not there at all.
        let content = pattern((1 << 20) + 5000, 6);
        let mut clients: Vec<_> = (0..3).map(|_| rig.bound(&content)).collect();
        for at in [0u64, 409_600, (1 << 20) - (64 << 10), 1 << 20] {
            let asked: Vec<Vec<u32>> = clients
                .iter_mut()
                .map(|(client, binding, _)| {
                    (0..12)
                        .map(|_| client.send_io(Opcode::Read, *binding, at, 200_000, client.descriptor()))
                        .collect()
                })
                .collect();
            let there = (content.len() - at as usize).min(200_000);
            for ((client, ..), asked) in clients.iter_mut().zip(asked) {
                for request in asked {
                    assert_eq!(client.answer(request), (Status::Ok, there as u32), "{buffers} buffers, {at}");
                }
                let mut bytes = vec![0; there];
                client.region().copy_out(0, &mut bytes).unwrap();
                assert!(bytes == content[at as usize..at as usize + there]);
            }
        }
        rig.wait_gauge("buffers_free", buffers as u64);
        assert_eq!(rig.gauge("storage_queue"), 0);
    }
}

/// Direct writes leave pages behind that are pinned: nothing of such a volume may be.
#[test]
fn nothing_is_mapped_or_pinned_and_over_verbs_the_bytes_are_right_too() {
    let map = |settings: &mut Settings| settings.map = MapConfig { enabled: true, ..MapConfig::default() };
    let Some(server) = Server::start(map, KernelFile::opener()) else { return };
    server.rig.control.direct.store(true, Ordering::SeqCst);
    let (mut client, binding, open) = server.bound(&pattern(300_001, 5));
    the_file_is_as_written(&mut client, binding, &open, MacPolicy::Header);
    if is_possible() && server.rig.gauge("file_rings") > 0 {
        assert!(server.rig.gauge("reads_direct_total") > 20);
        assert_eq!(server.rig.gauge("file_rings_registered"), 1, "the pool serves the device and the ring");
    }
    for _ in 0..8 {
        client.read(binding, 0, 256 << 10);
    }
    assert_eq!(super::map::map(&server, &mut client, binding, 0, 4096).err(), Some(Status::Unsupported));
    assert_eq!(server.rig.gauge("pinned_file_bytes"), 0);
}
